"""The SLURM jobs of runs and their states in the queue.

Each sweep leaves results/sweeps/<time>/jobs.json: run folder -> job and where its output is.
"""

import logging
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from normexp.files import read_json, write_json

logger = logging.getLogger(__name__)

JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """A job that a sweep submitted for a run. state: as squeue calls it, "" when it has left."""

    id: str
    errors: Path  # where its standard error is
    state: str = ""
    reason: str = ""

    def last_words(self) -> str:
        """Return the last line of its standard error that is not srun's; "" where there is none."""
        try:
            lines = self.errors.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        # srun ends with the exit status of a job that has said why itself.
        telling = (line.strip() for line in reversed(lines) if not line.startswith("srun: "))
        return next((line for line in telling if line), "")


def remember(sweep_dir: Path, jobs: dict[Path, Job]) -> None:
    """Write the job of every run folder to the sweep's jobs.json."""
    write_json(
        sweep_dir / JOBS,
        {str(path): {"job": job.id, "errors": str(job.errors)} for path, job in jobs.items()},
    )


def jobs(results_dir: Path) -> dict[Path, Job]:
    """Return the newest job of every run that a sweep ever submitted, by run folder."""
    known: dict[Path, Job] = {}
    for path in sorted((results_dir / "sweeps").glob(f"*/{JOBS}")):
        try:
            content = read_json(path)
            known |= {
                Path(run): Job(str(job["job"]), Path(job["errors"])) for run, job in content.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s: not a list of jobs (%s); their states are not known", path, error)
    queue = in_queue() if known else None
    return {
        run: Job(job.id, job.errors, *(queue or {}).get(job.id, ("", "")))
        for run, job in known.items()
    }


def in_queue() -> dict[str, tuple[str, str]] | None:
    """Return state and reason of this user's jobs by id; None if squeue does not answer."""
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r"]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip().split("|") for line in shown.stdout.splitlines() if line]
    return {job: (state, reason) for job, state, reason in lines}
