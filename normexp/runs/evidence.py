"""The committed results as evidence: runs read them and never write them.

`scripts/promote.py` is the one command that adds to them.
"""

from pathlib import Path

from normexp.errors import UserError
from normexp.paths import OWN_RESULTS, RESULTS
from normexp.runs.records import Record, load_records


def is_evidence(results_dir: Path) -> bool:
    """Return whether this is the folder of the committed results."""
    return results_dir.resolve() == RESULTS


def refuse_evidence(results_dir: Path) -> None:
    """Raise UserError for the folder of the committed results."""
    if is_evidence(results_dir):
        raise UserError(
            f"results_dir={results_dir} holds the committed results, which runs do not change: "
            "leave results_dir out (results/own) or choose another, and add a finished run by "
            "scripts/promote.py"
        )


def evidence_beside(results_dir: Path) -> Path | None:
    """Return the folder of the committed results where they count as done for runs in this one.

    That is so for the default folder. In any other a run is repeated.
    """
    return RESULTS if results_dir.resolve() == OWN_RESULTS else None


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
