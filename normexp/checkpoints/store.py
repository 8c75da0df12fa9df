"""Checkpoints: averaging, safe loading, and copies that are whole or absent."""

import errno
import logging
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normexp.errors import UserError
from normexp.files import whole_file

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"

logger = logging.getLogger(__name__)


class Lost(UserError):
    """A checkpoint that is missing, or whose content cannot be used."""

    def __init__(self, path: Path, message: str):
        super().__init__(message)
        self.path = path


def load(path: Path) -> dict[str, Any]:
    """Read a fairseq checkpoint onto the CPU.

    Only tensors and the few classes that the plugin allow-lists are unpickled. Raises Lost, which
    is a UserError, for a missing, damaged or untrusted file, a UserError for one that the system
    does not let us read.
    """
    import normexp.fairseq_plugin  # noqa: F401 (allow-lists fairseq's classes)

    try:
        _compare_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Lost(path, f"there is no checkpoint {path}") from None
    except Exception as error:
        # Not EINVAL: a truncated archive makes zipfile seek to places that are none.
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
        reason = str(error).strip().split("\n")[0]
        raise Lost(
            path, f"the checkpoint {path} is damaged or not to be trusted: {reason}"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise Lost(path, f"{path} is not a fairseq checkpoint: it has no model")
    return state


def _compare_checksums(path: Path) -> None:
    """torch leaves them alone: to it a flipped bit is a weight. Reads the file once more."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        if member is not None:
            raise ValueError(f"the checksum of {member} is wrong")


@contextmanager
def instead_of_reading(state: dict[str, Any]) -> Iterator[None]:
    """While active, fairseq's loading of a checkpoint gets a state that `load` has read."""
    original = torch.load
    torch.load = lambda *_, **__: state
    try:
        yield
    finally:
        torch.load = original


def epoch_checkpoints(folder: Path) -> list[Path]:
    """checkpoint<N>.pt, newest epoch first."""
    found = [path for path in folder.glob("checkpoint*.pt") if _epoch(path) is not None]
    return sorted(found, key=_epoch, reverse=True)


def _epoch(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def average(paths: list[Path]) -> dict[str, Any]:
    """The first checkpoint with its model replaced by the mean over all of them.

    Parameters and the norms' running statistics are averaged in float64; integers (step
    counters) are the first checkpoint's. Raises UserError when the files do not belong together.
    """
    state = load(paths[0])
    sums = {key: value.double() for key, value in state["model"].items() if _averaged(value)}
    for path in paths[1:]:
        model = load(path)["model"]
        if model.keys() != state["model"].keys():
            raise UserError(f"{path} and {paths[0]} are checkpoints of different models")
        for key in sums:
            sums[key] += model[key].double()
    for key, total in sums.items():
        state["model"][key] = (total / len(paths)).to(state["model"][key].dtype)
    return state


def choose(
    folder: Path, checkpoint: str, average_last: int, save_interval: int = 1
) -> tuple[Path, str]:
    """The checkpoint to evaluate, made where it is an average, and what it is in words.

    checkpoint: 'average' (of the last `average_last` epochs, fewer when training was shorter; of a
    run that ended within its first epoch the last checkpoint) or 'best' (lowest validation loss).
    save_interval: one of so many epochs was kept. Raises Lost where one of these is missing or
    damaged.
    """
    if checkpoint == "best":
        return folder / BEST, "lowest validation loss"
    paths = epoch_checkpoints(folder)[:average_last]
    if paths:
        newest = _epoch(paths[0])
        for epoch in range(newest, max(newest - average_last * save_interval, 0), -save_interval):
            if not (path := folder / f"checkpoint{epoch}.pt").exists():
                raise Lost(path, f"the checkpoint {path} is missing")
    if len(paths) < 2:
        return (paths[0] if paths else folder / LAST), "last checkpoint"
    target = folder / "average.pt"
    save(target, average(paths))
    names = ", ".join(path.stem.removeprefix("checkpoint") for path in reversed(paths))
    return target, f"average of epochs {names}"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    with whole_file(path, "wb") as file:
        torch.save(state, file)


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The most advanced checkpoint that can be read and its content, None where there is none.

    fairseq resumes from checkpoint_last.pt alone; when that is damaged (a crash of the machine, a
    bad disk), the copies that fairseq keeps under other names take its place. Raises Lost where
    there are checkpoints, but none that can be read: to begin anew is not ours to decide.
    """
    last, lost, best = folder / LAST, None, None
    others = [path for path in folder.glob("checkpoint*.pt") if path != last]
    for path in [*([last] if last.exists() else []), *sorted(others)]:
        try:
            state = load(path)
            updates = state["optimizer_history"][-1]["num_updates"]
        except (Lost, KeyError, IndexError, TypeError) as error:
            lost = error if isinstance(error, Lost) else Lost(path, f"{path} lacks {error}")
            logger.warning("%s", lost)
            continue
        if path == last:
            return path, state
        if best is None or updates > best[0]:
            best = updates, path, state
    if best is None and lost is not None:
        raise Lost(lost.path, f"{lost}; no other checkpoint is left: remove {folder} to train anew")
    return best and best[1:]


def go_back_before(folder: Path, lost: Lost) -> Path:
    """Remove a lost checkpoint and what came after it, so that training makes them again.

    Returns where training will go on from. Raises Lost, and removes nothing, where no earlier
    checkpoint is left. (Later ones could stay where training repeats itself to the bit; on a GPU
    it does not, and an average is of one training.)
    """
    if lost.path.name in (LAST, BEST):
        found = newest_good(folder)
        if found is not None:
            restore(folder, *found)
        if found is not None and (lost.path.name == LAST or _updates(folder / BEST) < math.inf):
            return found[0]
    epoch = _epoch(lost.path)
    earlier = [path for path in epoch_checkpoints(folder) if epoch and _epoch(path) < epoch]
    for path in earlier:
        try:
            limit = load(path)["optimizer_history"][-1]["num_updates"]
        except Lost:
            continue
        for other in folder.glob("checkpoint*.pt"):
            if other != path and _updates(other) > limit:
                other.unlink()
        return path
    raise Lost(lost.path, f"{lost}; no earlier one is left: remove {folder.parent} to train anew")


def restore(folder: Path, source: Path, state: dict[str, Any], name: str | None = None) -> None:
    """Make those copies of a checkpoint anew that are lost and should be equal to it.

    That is checkpoint_last.pt, from which training is about to go on, checkpoint_best.pt if none
    before was better, and `name`, that of a finished epoch.
    """
    extra = state["extra_state"]
    is_best = extra.get("val_loss") is not None and extra["val_loss"] == extra.get("best")
    for copy in (LAST, BEST if is_best else None, name):
        path = folder / (copy or source)
        if path != source and (not path.exists() or _updates(path) == math.inf):
            logger.warning("%s is missing or damaged; it is made again from %s", path, source)
            _copy(source, path)


def _updates(path: Path) -> float:
    """Number of updates behind a checkpoint; infinite if it is lost."""
    try:
        return load(path)["optimizer_history"][-1]["num_updates"]
    except Lost:
        return math.inf


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, whole_file(target, "wb") as new:
        shutil.copyfileobj(old, new)


@contextmanager
def atomic_writes(folder: Path) -> Iterator[None]:
    """While active, fairseq writes and copies checkpoints whole or not at all.

    By itself it copies in place (checkpoint_last.pt among others), writes without waiting for the
    disk, and tries a write that failed twice more, behind what is there already. Removes what a
    killed process left half-written in the folder of checkpoints.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        _copy(Path(src_path), Path(dst_path))
        return True

    def write(obj: Any, filename: str, async_write: bool = False) -> None:
        save(Path(filename), obj)

    for partial in folder.glob("*.pt.part"):
        partial.unlink(missing_ok=True)  # another rank may have done it
    originals = PathManager.copy, checkpoint_utils.torch_persistent_save
    PathManager.copy, checkpoint_utils.torch_persistent_save = staticmethod(copy), write
    try:
        yield
    finally:
        PathManager.copy = staticmethod(originals[0])
        checkpoint_utils.torch_persistent_save = originals[1]


def _averaged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
