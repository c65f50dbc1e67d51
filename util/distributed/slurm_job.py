"""Which Slurm job this is, and how often it was started again."""

from __future__ import annotations

import os


def own_job() -> str:
    """The job that this process belongs to; "" without Slurm."""
    job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{job} on {cluster}" if job and cluster else job


def restart_count() -> int:
    """How often Slurm or submitit has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)
