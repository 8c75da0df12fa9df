"""An archive of what runs with another configuration left behind, so that nothing is overwritten.

results/superseded/<task>/<name>.<time>/ is a former run folder, <name>.<time>.json a former record;
the time is that of archiving (UTC). Reports do not look there.
"""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from normexp.errors import UserError
from normexp.runs.records import read_record

FOLDER = "superseded"


def archive(path: Path, results_dir: Path, task: str, why: str) -> Path:
    """Move a run folder or a record to results/superseded/ and print so; returns its new path.

    The caller makes sure that nobody uses it. Raises UserError where it cannot be moved.
    """
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
    suffix = path.suffix if path.is_file() else ""
    target = results_dir / FOLDER / task / f"{path.name.removesuffix(suffix)}.{stamp}{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    except OSError as error:
        raise UserError(
            f"cannot archive {path} as {target} ({error.strerror}): {why}; move it away"
        ) from None
    print(f"archived: {path} -> {target} ({why})", flush=True)
    return target


def archive_record(path: Path, results_dir: Path, task: str, config_hash: str) -> None:
    """Archive the record at `path` unless it has this hash, or there is none."""
    if not path.exists():
        return
    try:
        earlier = read_record(path).config_hash
    except UserError:
        archive(path, results_dir, task, "it cannot be read")
        return
    if earlier != config_hash:
        archive(path, results_dir, task, f"configuration {earlier}, now {config_hash}")
