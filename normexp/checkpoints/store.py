"""Checkpoints of a run: loading them safely, selecting, averaging, writing whole or not at all."""

import errno
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normexp.errors import UserError
from normexp.files import remove_unfinished, whole_file

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"


class Lost(UserError):
    """A checkpoint that is missing, or whose content cannot be used."""

    def __init__(self, path: Path, message: str):
        super().__init__(message)
        self.path = path


def load(path: Path) -> dict[str, Any]:
    """Read a fairseq checkpoint onto the CPU: `model`, `optimizer_history`, `extra_state`, ...

    Only tensors and the few classes that the plugin allow-lists are unpickled, and only a
    configuration that fairseq cannot run as code is accepted. Raises Lost, a UserError, for a
    missing, damaged or untrusted file, and UserError for one that the system does not let us read.
    """
    import normexp.fairseq_plugin  # noqa: F401 (allow-lists fairseq's classes)
    from normexp.fairseq_plugin.config_guard import check_checkpoint

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
    if not isinstance(state["model"], dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state["model"].items()
    ):
        raise Lost(path, f"{path} is not a fairseq checkpoint: its model is no mapping of tensors")
    try:
        check_checkpoint(state)
    except UserError as error:
        raise Lost(path, f"the checkpoint {path} is not to be trusted: {error}") from None
    return state


def num_updates(path: Path, state: dict[str, Any]) -> int:
    """Return the number of updates behind the checkpoint that `load` read. Raises Lost."""
    try:
        updates = state["optimizer_history"][-1]["num_updates"]
    except (LookupError, TypeError):
        updates = None
    if type(updates) is not int:
        raise Lost(path, f"the checkpoint {path} does not tell its number of updates")
    return updates


def _compare_checksums(path: Path) -> None:
    """Raise ValueError where the file's content does not match its checksums.

    torch does not look at them: to it a flipped bit is a weight. Reads the file once more.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        if member is not None:
            raise ValueError(f"the checksum of {member} is wrong")


def epoch_checkpoints(folder: Path) -> list[Path]:
    """Return the folder's checkpoint<N>.pt, newest epoch N first."""
    paths = [path for path in folder.glob("checkpoint*.pt") if epoch_of(path) is not None]
    return sorted(paths, key=epoch_of, reverse=True)


def epoch_of(path: Path) -> int | None:
    """Return N of checkpoint<N>.pt, None for any other name."""
    match = re.fullmatch(r"checkpoint(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def average(paths: list[Path]) -> dict[str, Any]:
    """Return the first checkpoint with its model replaced by the mean over all of them.

    Parameters and the norms' running statistics are averaged in float64; integers (step counters)
    are the first checkpoint's. Raises Lost where a file cannot be used and UserError where two are
    of different models.
    """
    state = load(paths[0])
    sums = {key: value.double() for key, value in state["model"].items() if _is_averaged(value)}
    for path in paths[1:]:
        model = load(path)["model"]
        if model.keys() != state["model"].keys():
            raise UserError(f"{path} and {paths[0]} are checkpoints of different models")
        for key in sums:
            sums[key] += model[key].double()
    for key, total in sums.items():
        state["model"][key] = (total / len(paths)).to(state["model"][key].dtype)
    return state


def select(
    folder: Path, checkpoint: str, average_last: int, save_interval: int = 1
) -> tuple[Path, str]:
    """Return the path of the checkpoint to evaluate and a description of it.

    checkpoint: 'best' (lowest validation loss), 'ema' (the moving average of the weights that
    checkpoint_last.pt has beside them; written to ema.pt) or 'average' (of the last `average_last`
    epochs' checkpoints, fewer when training was shorter; checkpoint_last.pt of a run that ended
    within its first epoch). An average is written to average.pt. save_interval: epochs from one
    kept checkpoint to the next. Raises Lost where a checkpoint to average is missing or damaged,
    and UserError where it has no moving average.
    """
    if checkpoint == "best":
        return folder / BEST, "lowest validation loss"
    if checkpoint == "ema":
        state = load(folder / LAST)
        if "ema" not in state["extra_state"]:
            raise UserError(f"{folder / LAST} has no moving average: fairseq.ema.store_ema was off")
        state["model"] = state["extra_state"].pop("ema")
        save(folder / "ema.pt", state)
        return folder / "ema.pt", "moving average of the weights"
    paths = epoch_checkpoints(folder)[:average_last]
    if paths:
        newest = epoch_of(paths[0])
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


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint whole or not at all; `target` keeps its old content until the end."""
    with open(source, "rb") as old, whole_file(target, "wb") as new:
        shutil.copyfileobj(old, new)


@contextmanager
def atomic_writes(folder: Path) -> Iterator[None]:
    """Let fairseq write and copy checkpoints whole or not at all while this context lasts.

    On entering, removes what a killed process left half-written in the folder of checkpoints.
    """
    from normexp.fairseq_plugin.patches import checkpoint_files_by

    remove_unfinished(folder)
    with checkpoint_files_by(copy, save):
        yield


def _is_averaged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
