"""What a run with another configuration left behind is put aside, and never overwritten.

results/superseded/<task>/<name>.<time>/ is a former run folder, <name>.<time>.json a former record;
the time is when it was put aside (UTC). Reports do not look there.
"""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from normexp.errors import UserError
from normexp.runs.records import read_record

FOLDER = "superseded"


def put_aside(path: Path, results_dir: Path, task: str, why: str) -> Path:
    """Move a run folder or a record to results/superseded/ and say so; returns where it is now.

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
            f"cannot put {path} aside as {target} ({error.strerror}): {why}; move it away"
        ) from None
    print(f"put aside: {path} -> {target} ({why})", flush=True)
    return target


def put_record_aside(path: Path, results_dir: Path, task: str, config_hash: str) -> None:
    """Put the record at `path` aside unless it has this configuration, or there is none."""
    if not path.exists():
        return
    try:
        earlier = read_record(path).config_hash
    except UserError:
        put_aside(path, results_dir, task, "it cannot be read")
        return
    if earlier != config_hash:
        put_aside(path, results_dir, task, f"configuration {earlier}, now {config_hash}")
