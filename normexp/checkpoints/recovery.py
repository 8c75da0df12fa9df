"""Recovery from lost checkpoints: resuming from another one, and repeating a part of training.

fairseq resumes from checkpoint_last.pt alone. When that is damaged (a crash of the machine, a bad
disk), the copies that fairseq keeps under other names take its place.
"""

import logging
import math
from pathlib import Path
from typing import Any

from normexp.checkpoints.store import (
    BEST,
    LAST,
    Lost,
    copy,
    epoch_checkpoints,
    epoch_of,
    load,
    num_updates,
)

logger = logging.getLogger(__name__)


def latest_readable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the checkpoint to resume from, None where there is none at all.

    It is checkpoint_last.pt if that can be read, else the one with the most updates. Raises Lost
    where there are checkpoints, but none that can be read: training anew is for the user to decide.
    """
    last, lost, best = folder / LAST, None, None
    others = [path for path in folder.glob("checkpoint*.pt") if path != last]
    for path in [*([last] if last.exists() else []), *sorted(others)]:
        try:
            state = load(path)
            updates = num_updates(path, state)
        except Lost as error:
            lost = error
            logger.warning("%s", lost)
            continue
        if path == last:
            return path, state
        if best is None or updates > best[0]:
            best = updates, path, state
    if best is None and lost is not None:
        raise Lost(lost.path, f"{lost}; no other checkpoint is left: remove {folder} to train anew")
    return best and best[1:]


def rewind_to_before(folder: Path, lost: Lost) -> Path:
    """Remove a lost checkpoint and those with more updates, so that training makes them again.

    Returns the checkpoint that training will resume from. Raises Lost, and removes nothing, where
    no earlier checkpoint is left. (Later ones could stay where training repeats itself to the bit;
    on a GPU it does not, and an average is of one training.)
    """
    if lost.path.name in (LAST, BEST):
        latest = latest_readable(folder)
        if latest is not None:
            restore(folder, *latest)
        if latest is not None and (lost.path.name == LAST or _updates(folder / BEST) < math.inf):
            return latest[0]
    epoch = epoch_of(lost.path)
    earlier = [path for path in epoch_checkpoints(folder) if epoch and epoch_of(path) < epoch]
    for path in earlier:
        try:
            limit = num_updates(path, load(path))
        except Lost:
            continue
        for other in folder.glob("checkpoint*.pt"):
            if other != path and _updates(other) > limit:
                other.unlink()
        return path
    raise Lost(lost.path, f"{lost}; no earlier one is left: remove {folder.parent} to train anew")


def restore(folder: Path, source: Path, state: dict[str, Any], name: str | None = None) -> None:
    """Copy a checkpoint to those files that should equal it and are missing or damaged.

    They are checkpoint_last.pt, from which training is about to resume, checkpoint_best.pt if no
    earlier validation loss was lower, and `name`, the file of a finished epoch.

    state: the content of `source`.
    """
    extra = state.get("extra_state")
    extra = extra if isinstance(extra, dict) else {}
    is_best = extra.get("val_loss") is not None and extra["val_loss"] == extra.get("best")
    for equal in (LAST, BEST if is_best else None, name):
        path = folder / (equal or source)
        if path != source and (not path.exists() or _updates(path) == math.inf):
            logger.warning("%s is missing or damaged; it is made again from %s", path, source)
            copy(source, path)


def _updates(path: Path) -> float:
    """Return the number of updates behind a checkpoint, infinity if it is lost."""
    try:
        return num_updates(path, load(path))
    except Lost:
        return math.inf
