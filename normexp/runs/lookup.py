"""The record that a run with these settings has left, looked up without torch."""

from pathlib import Path

from normexp.config.identity import config_hash
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.runs.records import Record, path_of_run, read_record


def find_record(settings: RunSettings) -> tuple[Path, Record] | None:
    """The record of this run among the results, however it ended, and where it lies.

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
    """`find_record` where the run needs nothing more: it is complete or has diverged."""
    found = find_record(settings)
    return found if found and found[1].status != "failed" else None
