"""Submit main.py to Slurm through submitit; the run resumes by itself when Slurm requeues the job."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import AutoExecutor, Job, JobEnvironment
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

# Python looks for modules beside the script only
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import make_parser, parse_config
from util.errors import Preempted, UserError, run_as_command

EXAMPLE = """python tools/run_with_submitit.py --nodes 2 --gpus_per_node 8 --partition gpu \\
      --job_dir exps/batchformer -- --batch_size 3 --bf 1 --share_bf 0 --insert_idx 0"""
ROOT = Path(__file__).resolve().parents[1]
SIGNAL_SECONDS = 120  # from submitit's signal to the time limit
MAX_TIMEOUTS = 1000  # a run of weeks in jobs of an hour


@dataclass(frozen=True)
class TrainingJob:
    """main.py with `flags` as one task of a job; `restarts` counts its starts by submitit."""

    flags: tuple[str, ...]
    threads: int
    restarts: int = 0

    def __call__(self) -> None:
        """Run in each task."""
        job = JobEnvironment()
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if job.num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # not every machine can resolve its own name
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
        # main.py resumes by itself if this is above 0. Slurm sets it; other clusters do not.
        os.environ.setdefault("SLURM_RESTART_COUNT", str(self.restarts))

        import main  # found because jobs start in the folder of their submission, which is the root

        name = f"SIG{job.USR_SIG}"
        requeue = signal.getsignal(getattr(signal, name))  # of submitit; main.py installs its own

        def train() -> None:
            try:
                main.main(parse_config(self.flags))
            except Preempted as reason:
                # without a handler (--cluster debug) nothing can requeue the job
                if reason.signal != name or not callable(requeue):
                    raise
                print(reason, file=sys.stderr, flush=True)
                # requeues the job and exits in rank 0, only logs in the others
                requeue(getattr(signal, name), None)
                # with another status Slurm would end rank 0 before it has requeued the job
                sys.exit(0)

        run_as_command(train)

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls this after it has requeued the job. main.py has saved its state by itself."""
        return DelayedSubmission(replace(self, restarts=self.restarts + 1))


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this script, and the flags of main.py, which follow `--`. Raises UserError."""
    parser = make_parser(
        "tools/run_with_submitit.py",
        "Submit main.py to Slurm, and resume it when Slurm requeues it. Further options of sbatch: "
        "by its variables, such as SBATCH_ACCOUNT.",
        EXAMPLE,
    )
    parser.usage = "python tools/run_with_submitit.py --job_dir DIR [options] -- <main.py's flags>"

    def add(name: str, **options: Any) -> None:
        spellings = {f"--{name}": None, f"--{name.replace('_', '-')}": None}
        parser.add_argument(*spellings, **options)

    help = "main.py's --output_dir; the job's logs go to its folder submitit"
    add("job_dir", type=Path, required=True, help=help)
    add("nodes", type=int, default=1, help="machines")
    add("gpus_per_node", type=int, default=8, help="0 for none")
    add("tasks_per_node", type=int, help="processes on each node; one for each GPU if not given")
    add("cpus_per_task", type=int, default=4, help="cores of each process")
    add("timeout", type=int, default=4320, help="minutes, after which the job is requeued")
    add("partition", help="of Slurm")
    add("constraint", help="features that the nodes must have, as in sbatch")
    help = (
        "local: several processes on this machine; debug: in this process, with pdb after an error; both "
        "wait for the end"
    )
    add("cluster", choices=("slurm", "local", "debug"), default="slurm", help=help)

    split = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:split]), list(argv[split + 1 :])
    if args.tasks_per_node is None:
        args.tasks_per_node = max(1, args.gpus_per_node)
    if args.gpus_per_node < 0 or min(args.nodes, args.tasks_per_node, args.cpus_per_task, args.timeout) < 1:
        raise UserError("--gpus_per_node must be at least 0 and nodes, tasks, cores and minutes at least 1")
    if any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in flags):
        raise UserError("--output_dir is what --job_dir says here; leave it out")
    return args, flags


def submit(args: argparse.Namespace, training: TrainingJob) -> Job[None]:
    """Raises UserError with the reason if submitit or Slurm refuses the job."""
    try:
        executor = AutoExecutor(
            args.job_dir / "submitit", cluster=args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS
        )
        executor.update_parameters(
            name=args.job_dir.name,
            nodes=args.nodes,
            tasks_per_node=args.tasks_per_node,
            cpus_per_task=args.cpus_per_task,
            # 0 would be refused where Slurm knows of no GPUs
            gpus_per_node=args.gpus_per_node or None,
            timeout_min=args.timeout,
            slurm_partition=args.partition,
            slurm_constraint=args.constraint,
            slurm_signal_delay_s=SIGNAL_SECONDS,
            slurm_srun_args=["--kill-on-bad-exit=1"],
            slurm_additional_parameters={"requeue": True},
        )
        return executor.submit(training)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{args.cluster}: {error}") from error


def main(argv: Sequence[str]) -> None:
    args, flags = parse_args(argv)
    if Path.cwd() != ROOT:
        raise UserError(f"run this from the project's root: cd {ROOT}")
    args.job_dir = args.job_dir.resolve()
    threads = 1 if args.gpus_per_node else args.cpus_per_task
    training = TrainingJob((*flags, "--output_dir", str(args.job_dir)), threads)
    parse_config(training.flags)  # a wrong flag shows here, not after hours in a queue

    job = submit(args, training)
    print(f"job {job.job_id}: logs in {job.paths.folder}", flush=True)
    if args.cluster == "slurm":
        return

    # here the job is a child of this process
    try:
        job.results()
    except UncompletedJobError as error:
        # main.py has ended with a traceback, which submitit passes on
        if isinstance(error, FailedJobError):
            raise
        raise UserError(
            f"job {job.job_id} has ended early, see the last line of {job.paths.stderr}"
        ) from None


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
