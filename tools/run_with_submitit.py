"""Submits main.py to Slurm through submitit, and goes on from its own checkpoint when Slurm requeues the job.

python tools/run_with_submitit.py --nodes 2 --gpus_per_node 8 --partition <p> --job_dir exps/<name> -- <main.py's flags>
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder, not the project
from util.config import make_parser, parse_config
from util.errors import UserError, run_as_command

ROOT = Path(__file__).resolve().parents[1]


class Training:
    """main.py with `flags` as one task of a job, which writes to `job_dir`.

    A job that Slurm starts again (preempted, out of time, or after a node failed) resumes from the checkpoint that it
    wrote. One that lay in `job_dir` before is used only if the flags say so.
    """

    def __init__(self, flags: list[str], job_dir: Path, threads: int) -> None:
        self.flags = [*flags, "--output_dir", str(job_dir)]
        self.saved = job_dir / "checkpoint.pth"
        self.saved_before = self.time_of_checkpoint()
        self.threads = threads

    def time_of_checkpoint(self) -> int | None:
        return self.saved.stat().st_mtime_ns if self.saved.is_file() else None

    def flags_now(self) -> list[str]:
        """The flags, with --resume if this job has written a checkpoint."""
        own_checkpoint = self.time_of_checkpoint() != self.saved_before
        return [*self.flags, "--resume", str(self.saved)] if own_checkpoint else self.flags

    def __call__(self) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if JobEnvironment().num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # not every machine can resolve its own name
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))

        import main  # found because jobs start in the folder of their submission, which is the root

        main.main(parse_config(self.flags_now()))

    def checkpoint(self) -> Any:
        """What submitit shall run when it requeues the job; main.py saves its state by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this script, and main.py's flags, which stand behind `--`. Raises UserError."""
    parser = make_parser("tools/run_with_submitit.py", "Submit main.py to Slurm, and resume it when Slurm requeues it.")
    parser.usage = "python tools/run_with_submitit.py --job_dir DIR [options] -- <main.py's flags>"
    parser.epilog = "Further options of sbatch: by its variables, such as SBATCH_ACCOUNT."

    def add(name: str, **options: Any) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)

    add("job_dir", type=Path, required=True, help="main.py's --output_dir; the job's logs go to its folder submitit")
    add("nodes", type=int, default=1, help="machines")
    add("gpus_per_node", type=int, default=8, help="0 for none")
    add("tasks_per_node", type=int, help="processes on each node; one for each GPU if not given")
    add("cpus_per_task", type=int, default=4, help="cores of each process")
    add("timeout", type=int, default=4320, help="minutes, after which the job is requeued")
    add("partition", help="of Slurm")
    add("constraint", help="features that the nodes must have, as in sbatch")
    add("cluster", choices=("slurm", "local", "debug"), default="slurm", help="local: several processes on this "
        "machine; debug: in this process, with pdb after an error; both wait for the end")  # fmt: skip

    split = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:split]), list(argv[split + 1 :])
    if args.tasks_per_node is None:
        args.tasks_per_node = max(1, args.gpus_per_node)
    if args.gpus_per_node < 0 or min(args.nodes, args.tasks_per_node, args.cpus_per_task, args.timeout) < 1:
        raise UserError("--gpus_per_node must be at least 0 and nodes, tasks, cores and minutes at least 1")
    if any(flag.partition("=")[0].replace("-", "_") == "__output_dir" for flag in flags):
        raise UserError("--output_dir is what --job_dir says here; leave it out")
    return args, flags


def submit(args: argparse.Namespace, training: Training) -> Any:
    """The submitit.Job. Raises UserError with the reason if submitit or Slurm refuses it."""
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=args.job_dir / "submitit", cluster=args.cluster)
        executor.update_parameters(
            name=args.job_dir.name,
            nodes=args.nodes,
            tasks_per_node=args.tasks_per_node,
            cpus_per_task=args.cpus_per_task,
            gpus_per_node=args.gpus_per_node or None,  # 0 would be refused where Slurm knows of no GPUs
            timeout_min=args.timeout,
            slurm_partition=args.partition,
            slurm_constraint=args.constraint,
            slurm_srun_args=["--kill-on-bad-exit=1"],
            slurm_additional_parameters={"requeue": True},
        )
        return executor.submit(training)
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install -r requirements.txt") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{args.cluster}: {error}") from error


def main(argv: Sequence[str]) -> None:
    args, flags = parse_args(argv)
    if Path.cwd() != ROOT:
        raise UserError(f"run this from the project's root: cd {ROOT}")
    args.job_dir = args.job_dir.resolve()
    training = Training(flags, args.job_dir, threads=1 if args.gpus_per_node else args.cpus_per_task)
    parse_config(training.flags)  # a wrong flag shows here, not after hours in a queue

    job = submit(args, training)
    print(f"job {job.job_id}: logs in {job.paths.folder}", flush=True)
    if args.cluster != "slurm":
        job.results()


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
