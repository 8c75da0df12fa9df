"""The committed results as evidence: runs read them and never write them.

`scripts/promote.py` is the one command that adds to them.
"""

from pathlib import Path

from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.paths import OWN_RESULTS, RESULTS
from normexp.runs.records import Record, load_records, path_of_run

COMMITTED = ("records", "translations", "causality", "benchmarks", "tables", "figures")
"""Folders of the committed results."""


def is_evidence(results_dir: Path) -> bool:
    """Return whether this is the folder of the committed results."""
    return results_dir.resolve() == RESULTS


def refuse_evidence(settings: RunSettings) -> None:
    """Raise UserError where a run would write among the committed results, through links too."""
    record = path_of_run(
        settings.results_dir, settings.task.name, settings.label, settings.seed
    ).parent
    written = {
        f"results_dir={settings.results_dir}": (settings.results_dir, record),
        f"run_dir={settings.run_dir}": (settings.run_dir,),
    }
    for key, folders in written.items():
        if any(is_evidence(folder) or _is_inside_committed(folder) for folder in folders):
            raise UserError(
                f"{key} holds the committed results, which runs do not change: leave "
                f"{key.partition('=')[0]} out (results/own) or choose another, and add a finished "
                "run by scripts/promote.py"
            )


def _is_inside_committed(folder: Path) -> bool:
    return any(folder.resolve().is_relative_to(RESULTS / name) for name in COMMITTED)


def evidence_beside(results_dir: Path) -> Path | None:
    """Return the folder of the committed results where they count as done for runs in this one.

    That is so for the default folder, also where a link leads to another disk. In any other a run
    is repeated.
    """
    return RESULTS if results_dir.resolve() == OWN_RESULTS.resolve() else None


def load_records_beside(results_dir: Path) -> dict[Path, Record]:
    """Read the records of a folder and, for its tasks, the committed ones that count beside them.

    Raises UserError as `records.load_records` does.
    """
    found = load_records(results_dir)
    if committed := evidence_beside(results_dir):
        tasks = {record.task for record in found.values()}
        beside = load_records(committed).items()
        found |= {path: record for path, record in beside if record.task in tasks}
    return found
