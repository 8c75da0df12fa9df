"""Advice on errors of the machine: full disks, refused writes, too little memory."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from normexp.config.settings import ExperimentSettings

FULL_DISK_BYTES = 1_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def about_files(error: BaseException, folder: Path) -> str | None:
    """Return cause and cure of an error of writing files below `folder`; None for another error."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return _full(folder)
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
            return f"a file in {folder} may not grow further: raise the limit (ulimit -f)"
        if isinstance(cause, OSError) and cause.filename is not None:
            path = Path(cause.filename2 or cause.filename)
            while isinstance(cause, NotADirectoryError) and not path.exists():
                path = path.parent
            if isinstance(cause, _IN_THE_WAY):
                return (
                    f"{path} is in the way ({cause.strerror}); remove or rename it and "
                    "give the same command again"
                )
            if cause.errno in _REFUSED:
                return f"cannot write {path} ({cause.strerror}); set results_dir=..."
    # torch's errors may not mention the disk, so look at its present state.
    if folder.exists() and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        return _full(folder)
    return None


def _full(folder: Path) -> str:
    return (
        f"no space left on the disk of {folder}; free some and give the same command again, which "
        "resumes from the last checkpoint"
    )


def about_memory(error: BaseException, settings: ExperimentSettings, trained: bool) -> str | None:
    """Return cause and cure of an error of memory; None for another error.

    trained: whether it happened after the training.
    """
    if not any(_is_of_memory(cause) for cause in _causes(error)):
        return None
    again = "give the same command again where there is more memory, and it resumes from "
    if trained:
        return (
            f"out of memory while evaluating; {again}the trained model, or choose another label= "
            f"and evaluation.max_tokens below {settings.evaluation.max_tokens}"
        )
    max_tokens = settings.fairseq["dataset"].get("max_tokens")
    update_freq = list(settings.fairseq["optimization"].get("update_freq", [1]))
    if max_tokens is None:
        smaller = "a smaller fairseq.dataset.batch_size and a larger update_freq"
    else:
        doubled = ",".join(str(2 * number) for number in update_freq)
        smaller = (
            f"fairseq.dataset.max_tokens={max_tokens // 2} (now {max_tokens}) and "
            f"fairseq.optimization.update_freq=[{doubled}], which keeps the effective batch"
        )
    return (
        f"out of memory while training; {again}the last checkpoint, or choose another label=, "
        f"{smaller}"
    )


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
