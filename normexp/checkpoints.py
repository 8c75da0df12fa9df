"""Checkpoints: averaging, safe loading, and copies that are whole or absent."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normexp.atomic import whole_file
from normexp.errors import UserError

LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"


def load(path: Path) -> dict[str, Any]:
    """Read a fairseq checkpoint onto the CPU.

    Only tensors and the few classes that the plugin allow-lists are unpickled. Raises UserError
    for a missing, truncated or untrusted file.
    """
    import normexp.fairseq_plugin  # noqa: F401 (allow-lists fairseq's classes)

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the checkpoint {path} is damaged or not to be trusted: {reason}"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is not a fairseq checkpoint: it has no model")
    return state


def epoch_checkpoints(folder: Path) -> list[Path]:
    """checkpoint<N>.pt, newest epoch first."""
    found = []
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(r"checkpoint(\d+)\.pt", path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


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


def choose(folder: Path, checkpoint: str, average_last: int) -> tuple[Path, str]:
    """The checkpoint to evaluate, made where it is an average, and what it is in words.

    checkpoint: 'average' (of the last `average_last` epochs, fewer when training was shorter; of a
    run that ended within its first epoch the last checkpoint) or 'best' (lowest validation loss).
    """
    if checkpoint == "best":
        return folder / BEST, "lowest validation loss"
    paths = epoch_checkpoints(folder)[:average_last]
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


def newest_good(folder: Path) -> Path | None:
    """The most advanced checkpoint that can be read, None where there is none.

    fairseq resumes from checkpoint_last.pt alone; when that is damaged (a crash of the machine, a
    full disk), the copies that fairseq keeps under other names take its place.
    """
    candidates = sorted(
        (path for path in folder.glob("checkpoint*.pt")),
        key=lambda path: (path.name == LAST, path.stat().st_mtime),
        reverse=True,
    )
    readable = []
    for path in candidates:
        try:
            state = load(path)
        except UserError:
            continue
        if path.name == LAST:
            return path
        readable.append((state["optimizer_history"][-1]["num_updates"], path))
    return max(readable)[1] if readable else None


@contextmanager
def atomic_copies() -> Iterator[None]:
    """While active, fairseq's copies of checkpoints (checkpoint_last.pt among them) are atomic.

    fairseq copies in place: killed half-way, it leaves a truncated checkpoint_last.pt behind.
    """
    from fairseq.file_io import PathManager

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        with open(src_path, "rb") as source, whole_file(Path(dst_path), "wb") as file:
            shutil.copyfileobj(source, file)
        return True

    original = PathManager.copy
    PathManager.copy = staticmethod(copy)
    try:
        yield
    finally:
        PathManager.copy = staticmethod(original)


def _averaged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
