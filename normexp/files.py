"""Files that are written whole or not at all, and read whole or called unreadable."""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

_UNFINISHED = re.compile(r"(.+?)(\.[0-9a-f]{16})?\.part")
_MOST_VALUES = 1_000_000  # of a YAML file: a few lines of aliases can stand for far more
_NAME_BYTES = 200  # of the 255 that a file name may have


class Unreadable(ValueError):
    """A file that is missing, refused or damaged; the message is one line with path and reason."""


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` when the block ends without an error.

    mode: "w" (UTF-8, newlines as written) or "wb". Until then, and after an error or a crash of the
    machine, `path` holds its old content. Processes that write the same path do not meet: the last
    one to end wins. What a killed process left is removed by the next one that writes the path.
    Raises OSError as open and write do.
    """
    remove_unfinished(path.parent, path.name)
    partial, descriptor = _create_beside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)  # before the lock ends with the descriptor
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_writable(folder: Path) -> None:
    """Make a folder. Raises OSError where nothing can be written in it.

    Leaves no file behind: one to try it with would outlive a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, sorted and indented, whole or not at all."""
    with whole_file(path) as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path, finite: bool = False) -> Any:
    """Return the content of a JSON file. Raises Unreadable.

    finite: refuse NaN and Infinity, which Python writes and JSON does not have.
    """
    with _readable(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_number[finite])


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, of JSON's types only. Raises Unreadable."""
    with _readable(path, "YAML"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _count(content, {}) > _MOST_VALUES:
            raise ValueError("its aliases stand for too much")
        return json.loads(json.dumps(content))


def _count(value: Any, known: dict[int, int]) -> int:
    """Count the values below one, as often as aliases repeat them. Raises ValueError for a circle.

    known: the counts found so far by the object's id, negative while it is being counted.
    """
    if not isinstance(value, dict | list):
        return 1
    if known.get(id(value), 0) < 0:
        raise ValueError("it contains itself")
    if id(value) not in known:
        known[id(value)] = -1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


@contextmanager
def _readable(path: Path, form: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise Unreadable(f"{path}: not {form} (nested too deeply)") from None
    # YAML's numbers and dates raise more than its own errors.
    except (ValueError, TypeError, ArithmeticError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Unreadable(f"{path}: not {form} ({reason})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


_number = {True: _refuse, False: float}


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `whole_file`: for the file `name`, or for all there.

    What a living process is writing stays, and so does whatever cannot be removed.
    """
    wanted = None if name is None else _shortened(name)
    with suppress(OSError):
        for path in list(folder.iterdir()):
            unfinished = _UNFINISHED.fullmatch(path.name)
            if unfinished and wanted in (None, unfinished[1]):
                with suppress(OSError):
                    _remove_abandoned(path)


def open_own(path: Path, flags: int) -> int:
    """Open a regular file that no link stands for, and return its descriptor.

    A link in its place is removed: it may lead to a file of somebody else's. flags: of os.open.
    Raises OSError as os.open does, and FileExistsError for a folder or a device.
    """
    with suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            path.unlink()
        elif not stat.S_ISREG(kind):
            raise FileExistsError(f"{path} is no regular file")
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _create_beside(path: Path) -> tuple[Path, int]:
    """Create a file of a new name, locked until its descriptor is closed."""
    while True:
        partial = path.with_name(f"{_shortened(path.name)}.{secrets.token_hex(8)}.part")
        # O_EXCL: neither somebody else's file nor what a link leads to. Not tempfile, whose files
        # nobody else may read.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o666)
        with suppress(OSError):  # a file system without locks: then nothing is taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return partial, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
