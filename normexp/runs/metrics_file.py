"""`metrics.jsonl`: every value logged in training, one JSON object per line."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from normexp.files import whole_file

logger = logging.getLogger(__name__)


class MetricsFile:
    """A metrics sink that appends lines `{"tag", "step", "time", NAME: value, ...}`.

    `step` counts updates, `time` is seconds since 1970 (UTC). NaN and infinities, which JSON does
    not have, become null. Each line is on disk when the call returns, so a killed run keeps what
    it had logged. A line half-written by a killed process is removed on opening. Other lines that
    are not metrics are removed too, with a warning, and the file as it was stays beside it as
    `metrics.jsonl.damaged`. A full disk costs lines, with a warning, and not the run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line must not wait in a buffer that a kill throws away.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._repair_last_line()
        self._move_damaged_lines()

    def __call__(self, tag: str, step: int, values: Mapping[str, float]) -> None:
        finite = {name: float(x) if math.isfinite(x) else None for name, x in values.items()}
        entry = {"tag": tag, "step": step, "time": round(time.time(), 3), **finite}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            logger.warning("%s: step %d is not written (%s)", self._path, step, error.strerror)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps: a resumed run logs them again."""
        self._replace([line for line, entry in self._lines() if entry["step"] <= step])

    def _replace(self, lines: list[bytes]) -> None:
        with whole_file(self._path, "wb") as replacement:
            replacement.writelines(lines)
        self._file.close()
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115

    def values(self, tag: str, name: str) -> dict[int, float]:
        """Return the finite numbers logged under a tag and a name so far, by step and in order.

        Whatever else stands there, 1e999 or a text, is left out.
        """
        entries = (entry for _, entry in self._lines())
        found = {entry["step"]: entry.get(name) for entry in entries if entry["tag"] == tag}
        return {step: float(value) for step, value in found.items() if _is_finite(value)}

    def close(self) -> None:
        """Close the file; the sink cannot be called afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repair_last_line(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        try:
            json.loads(content[whole:])
        except (ValueError, RecursionError):
            self._file.truncate(whole)
        else:  # an editor stripped the final newline
            self._file.write(b"\n")

    def _move_damaged_lines(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        if damaged := len(lines) - len(good := self._lines()):
            copy = self._path.with_name(self._path.name + ".damaged")
            with whole_file(copy, "wb") as file:
                file.write(b"".join(lines))
            logger.warning(
                "%s: %d lines are not lines of metrics and were left out; the file as it was is %s",
                *(self._path, damaged, copy),
            )
            self._replace([line for line, _ in good])

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return each line that is of metrics, as bytes and parsed."""
        found = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if isinstance(entry["tag"], str) and type(entry["step"]) is int:
                    found.append((line, entry))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return found


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
