"""Look up the record that a run with given settings has left; imports no torch."""

from pathlib import Path

from normexp.config.identity import config_hash
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.runs.records import Record, path_of_run, read_record


def find_record(settings: RunSettings) -> tuple[Path, Record] | None:
    """Find the record of this run among the results and its path, however the run ended.

    None where there is none, where it is of another identity, and where it cannot be read.
    """
    path = path_of_run(settings.results_dir, settings.task.name, settings.label, settings.seed)
    folder = RunFolder(settings.run_dir)
    # A run that was killed between writing its two records has not ended.
    if not path.is_file() or (folder.config.is_file() and not folder.record.is_file()):
        return None
    try:
        record = read_record(path)
    except UserError:
        return None  # the run that replaces it archives it
    return (path, record) if record.config_hash == config_hash(settings) else None


def find_finished(settings: RunSettings) -> tuple[Path, Record] | None:
    """Find the record of this run if it needs nothing more: it is complete or has diverged."""
    found = find_record(settings)
    return found if found and found[1].status != "failed" else None
