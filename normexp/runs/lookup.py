"""Look up the record that a run with given settings has left; imports no torch."""

from pathlib import Path

from normexp.config.identity import config_hash
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.paths import RESULTS
from normexp.runs.evidence import evidence_beside
from normexp.runs.folder import RunFolder
from normexp.runs.metric_values import unknown_values
from normexp.runs.records import Record, path_of_run, read_record


def find_record(settings: RunSettings) -> tuple[Path, Record] | None:
    """Find the record of this run and its path, however the run ended.

    Looks among its own results, then among the committed ones (`runs.evidence`). Returns None where
    there is none, where it is of another identity, and where it cannot be read.
    """
    return _own_record(settings) or _committed_record(settings)


def _own_record(settings: RunSettings) -> tuple[Path, Record] | None:
    folder = RunFolder(settings.run_dir)
    # A run that was killed between writing its two records has not ended.
    if folder.config.is_file() and not folder.record.is_file():
        return None
    return _record_in(settings.results_dir, settings)


def _committed_record(settings: RunSettings) -> tuple[Path, Record] | None:
    committed = evidence_beside(settings.results_dir)
    return _record_in(committed, settings) if committed else None


def _record_in(results_dir: Path, settings: RunSettings) -> tuple[Path, Record] | None:
    path = path_of_run(results_dir, settings.task.name, settings.label, settings.seed)
    if not path.is_file():
        return None
    try:
        record = read_record(path)
    except UserError:
        return None  # the run that replaces it archives it
    return (path, record) if record.config_hash == config_hash(settings) else None


def find_finished(settings: RunSettings) -> tuple[Path, Record] | None:
    """Find the record of this run if it needs nothing more: it is complete or has diverged."""
    found = find_record(settings)
    return found if found and is_final(found[1]) else None


def is_final(record: Record) -> bool:
    """Return False where the same command tries again: a failed run, or metrics without numbers."""
    if record.status == "complete":
        return not unknown_values(record.metrics)
    return record.status == "diverged"


def already(path: Path) -> str:
    """Return the line that says that the run of this record is not repeated."""
    committed = path.resolve().is_relative_to(RESULTS / "records")
    hint = " (committed; results_dir=FOLDER makes it again)" if committed else ""
    return f"complete already: {path}{hint}"
