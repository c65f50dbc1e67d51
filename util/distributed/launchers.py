"""What started this process: a launcher, one of several processes by mistake, or a Slurm job."""

from __future__ import annotations

import os

from util.errors import UserError

_SLURM = "./tools/run_dist_slurm.sh <partition> <job name> {count} main.py, or one alone with srun --ntasks=1"
_OTHERS = "torchrun or ./tools/run_dist_launch.sh {count} main.py"
# without WORLD_SIZE each process would take itself for the only one:
# launcher; its variables for the rank of a process and for their number; what to start instead
_VARIABLES = (
    # SLURM_NTASKS would be wrong: the script of a batch job has it too, and is one process
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", _SLURM),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", _OTHERS),  # Open MPI
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", _OTHERS),  # MVAPICH
    ("mpirun", "PMI_RANK", "PMI_SIZE", _OTHERS),  # MPICH, Intel MPI
    ("mpirun", "PMIX_RANK", "", _OTHERS),
    ("a launcher", "RANK", "", _OTHERS),
    ("a launcher", "LOCAL_RANK", "LOCAL_WORLD_SIZE", _OTHERS),
)


def require_single_process() -> None:
    """Raise UserError if this process was started as one of several. Call it without WORLD_SIZE."""
    for launcher, rank, count, instead in _VARIABLES:
        # a shell on a node (srun --pty) is one process, however many tasks it asked for
        if launcher == "srun" and "SLURM_PTY_PORT" in os.environ:
            continue
        own_rank, processes = number(rank), number(count)
        if own_rank > 0 or processes > 1:
            several = str(processes) if processes > 1 else "<processes>"
            raise UserError(
                f"{launcher} has started this as one of {several} processes ({rank}={own_rank}), and "
                f"without WORLD_SIZE each would train by itself; start them with "
                f"{instead.format(count=several)}"
            )


def number(variable: str, otherwise: int = 0) -> int:
    """An environment variable that is a whole number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def slurm_job() -> str:
    """The job that this process belongs to; "" without Slurm."""
    job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{job} on {cluster}" if job and cluster else job


def slurm_restarts() -> int:
    """How often Slurm or submitit has started this job again."""
    return number("SLURM_RESTART_COUNT")
