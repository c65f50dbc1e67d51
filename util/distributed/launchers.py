"""Processes that another launcher than torchrun has started: each would take itself for the only one."""

from __future__ import annotations

import os

from util.errors import UserError

_SLURM = "./tools/run_dist_slurm.sh <partition> <job name> {count} main.py, or one alone with srun --ntasks=1"
_OTHERS = "torchrun or ./tools/run_dist_launch.sh {count} main.py"
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
        number, processes = _number(rank), _number(count)
        if number > 0 or processes > 1:
            several = str(processes) if processes > 1 else "<processes>"
            raise UserError(
                f"{launcher} has started this as one of {several} processes ({rank}={number}), and "
                f"without WORLD_SIZE each would train by itself; start them with "
                f"{instead.format(count=several)}"
            )


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
