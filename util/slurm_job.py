"""Which Slurm job this is, what Slurm's controller knows of a job, and why a job that it ends must come back."""

from __future__ import annotations

import os
import re
import subprocess


def own_job() -> str:
    """The job that this process belongs to; "" without Slurm."""
    job, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{job} on {cluster}" if job and cluster else job


def restart_count() -> int:
    """How often this job has been started again, by Slurm or by tools/run_srun.py."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def job_fields(job: str) -> dict[str, str]:
    """The fields of `scontrol show job` by name; none if the controller does not answer or has forgotten the job."""
    try:
        shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(?:^|\s)([^\s=]+)=(\S*)", shown.stdout))


def why_job_is_ended(fields: dict[str, str]) -> str:
    """Why Slurm ends a batch job that has work left, if it does not requeue it by itself; "" otherwise.

    While a job is being ended the controller shows it as COMPLETING whatever the reason. A job that its user cancels has none
    of the signs looked for, and neither has one that Slurm has requeued: of that the controller shows the next run already.
    """
    if fields.get("Reason") == "TimeLimit":
        return "ran out of time"
    if re.match(r"\d", fields.get("PreemptTime", "")):
        return "was preempted"
    return ""
