"""`metrics.jsonl`: every value logged in training, one JSON object per line."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from normexp.atomic import whole_file
from normexp.errors import UserError

logger = logging.getLogger(__name__)


class MetricsFile:
    """A metrics sink that appends lines `{"tag", "step", "time", NAME: value, ...}`.

    `step` counts updates, `time` is seconds since 1970 (UTC). NaN and infinities, which JSON does
    not have, become null. Each line is on disk when the call returns, so a killed run keeps what
    it had logged. A line half-written by a killed process is removed on opening; a full disk
    costs lines, with a warning, and not the run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line must not wait in a buffer that a kill throws away.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._repair_last_line()

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
        """Drop the lines of later steps: a resumed run logs them again.

        Raises UserError if a line is not JSON; the file is then left as it is.
        """
        kept = [line for line, at in self._lines() if at <= step]
        with whole_file(self._path, "wb") as replacement:
            replacement.writelines(kept)
        self._file.close()
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115

    def values(self, tag: str, name: str) -> dict[int, float]:
        """By step, in order, what was logged under a tag and a name so far; finite values only."""
        entries = (json.loads(line) for line, _ in self._lines())
        found = {entry["step"]: entry.get(name) for entry in entries if entry["tag"] == tag}
        return {step: value for step, value in found.items() if value is not None}

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
        except ValueError:
            self._file.truncate(whole)
        else:  # an editor stripped the final newline
            self._file.write(b"\n")

    def _lines(self) -> list[tuple[bytes, int]]:
        lines = self._path.read_bytes().splitlines(keepends=True)
        steps = []
        for number, line in enumerate(lines, start=1):
            try:
                steps.append(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._path}, line {number} is not a line of metrics; "
                    "delete that line, or move the file away to start a new one"
                ) from None
        return list(zip(lines, steps, strict=True))
