"""What Slurm's controller knows of a job, and why a job that it ends must come back."""

from __future__ import annotations

import re
import subprocess


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
