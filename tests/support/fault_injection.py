"""A run whose n-th operation on files goes wrong: it is killed there, or the disk is full.

What a run has reached lies in its files alone, so a SIGKILL at any moment leaves what a SIGKILL
before some operation on files leaves, or in the middle of a write. Counting these operations
therefore reaches every moment of a run, without a clock.

    python fault_injection.py FOLDER      # reads FOLDER/jobs.json, writes FOLDER/report.json

imports everything once and forks for each attempt. It must be a process of its own: a fork of a
process with threads is not safe.
"""

import builtins
import contextlib
import errno
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_runs import composed, few_sentences

CLOCKS = {"time", "wall", "train_wall", "wps", "ups", "gb_free"}


class Operations:
    """While installed, counts what this process does to files below a folder, the log apart.

    fault: called with the number of every operation before it is done, and with a function that
    does one half of it (None where there are no halves).
    """

    def __init__(self, root: Path, fault: Callable[[int, Callable | None], None]):
        self.root, self.fault = str(root), fault
        self.done: list[tuple[str, str]] = []  # operation, path below the root

    def install(self) -> None:
        """For the rest of this process."""
        plain_open = io.open

        def counted_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any):
            # Files that are written whole are opened by a descriptor.
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
            if not (set(mode) & set("wax+") and self.ours(path)):
                return plain_open(file, mode, buffering, *more, **named)
            self.count("open", path)
            raw = self._file(file, path, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)

        builtins.open = io.open = counted_open
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "truncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = self._counted(
            "fsync", os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}")
        )

    def ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.root)

    def count(self, operation: str, path: Any, half: Callable | None = None) -> None:
        # The name of an unfinished file has a random part.
        relative = re.sub(r"\.[0-9a-f]{16}\.part$", ".part", os.path.relpath(path, self.root))
        if relative.endswith("log.txt"):
            self.fault(-1, half)
            return
        self.done.append((operation, relative))
        self.fault(len(self.done), half)

    def _counted(self, name: str, original: Callable, path_of: Callable = lambda path: path):
        def counted(target: Any, *more: Any, **named: Any) -> Any:
            if self.ours(path_of(target)):
                self.count(name, path_of(target))
            return original(target, *more, **named)

        return counted

    def _file(self, file: Any, path: Any, mode: str) -> io.FileIO:
        operations = self

        class Counted(io.FileIO):
            def write(self, content: Any) -> int:
                half = memoryview(content)[: len(content) // 2]
                operations.count("write", path, lambda: io.FileIO.write(self, half))
                return super().write(content)

            def truncate(self, size: int | None = None) -> int:
                operations.count("truncate", path)
                return super().truncate(size)

        return Counted(file, mode)


def kill_at(number: int, half: bool) -> Callable[[int, Callable | None], None]:
    """SIGKILL before the operation of this number, or in the middle of it if it is a write."""

    def fault(count: int, first_half: Callable | None) -> None:
        if count == number:
            if half and first_half is not None:
                first_half()
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def full_disk_from(number: int) -> Callable[[int, Callable | None], None]:
    """From this operation on the disk takes nothing; what frees room still works."""
    full = False

    def fault(count: int, first_half: Callable | None) -> None:
        nonlocal full
        full = full or count == number
        if full and first_half is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fault


def no_fault(count: int, first_half: Callable | None) -> None:
    """Nothing goes wrong."""


class Start:
    """A process under way that runs a configuration as scripts/train.py does."""

    def __init__(
        self,
        overrides: list[str],
        results: Path,
        folder: Path,
        name: str,
        fault: Callable = no_fault,
    ):
        self._report, self._shown = folder / f"operations_{name}", folder / f"shown_{name}"
        results.mkdir(parents=True, exist_ok=True)
        self._child = os.fork()
        if self._child == 0:
            overrides = [*overrides, f"results_dir={results}"]
            _run(overrides, results, fault, self._report, self._shown)

    def end(self) -> "Start":
        """Wait for it."""
        _, status = os.waitpid(self._child, 0)
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.code = os.waitstatus_to_exitcode(status)
        self.shown = self._shown.read_text()
        self.operations = [] if self.killed else json.loads(self._report.read_text())
        return self


def attempt(overrides: list[str], results: Path, fault: Callable = no_fault) -> Start:
    """A process that has ended."""
    return Start(overrides, results, results.parent, "last", fault).end()


def _run(overrides: list[str], results: Path, fault: Callable, report: Path, shown: Path) -> None:
    """The forked process; never returns."""
    from normexp import pipeline
    from normexp.errors import UserError
    from normexp.runs import records

    code = 1
    logging.getLogger().handlers.clear()  # fairseq's, which it adds only where there are none
    output = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        operations = Operations(results, fault)
        operations.install()
        try:
            record = pipeline.run(composed(*overrides))
            print(records.describe(record))
            code = int(record.status != "complete")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        with os.fdopen(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            json.dump(operations.done, file)
    except BaseException:
        traceback.print_exc()
        with os.fdopen(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            json.dump(operations.done, file)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def outcome(results: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions, by name."""
    import torch

    (record,) = (json.loads(p.read_text()) for p in (results / "records").rglob("*.json"))
    (folder,) = (p.parent for p in results.glob("runs/*/*/record.json"))
    found: dict[str, Any] = {
        f"record/{name}": value
        for name, value in record.items()
        if name
        not in (
            *("finished_at", "tokens_per_second", "peak_memory_bytes", "wall_time_seconds"),
            *("command", "config", "hardware", "code_commit", "code_dirty"),
        )
    }
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    for number, line in enumerate(map(json.loads, lines)):
        found[f"metrics/{number}"] = {k: v for k, v in line.items() if k not in CLOCKS}
    for path in sorted(folder.glob("hypotheses/*")):
        found[f"hypotheses/{path.name}"] = path.read_text()
    # Those of an interval, checkpoint_<epoch>_<update>.pt, are copies for resuming from.
    lasting = [p for p in folder.glob("checkpoints/*.pt") if p.stem.count("_") < 2]
    for path in sorted(lasting):
        state = torch.load(path, weights_only=True)
        state["extra_state"].pop("previous_training_time", None)
        state["extra_state"].pop("metrics", None)
        for name in ("seconds", "tokens"):
            state["extra_state"]["normexp"].pop(name)
        state.pop("cfg")
        state["optimizer_history"] = state["optimizer_history"][-1]  # one entry per start
        found |= {f"{path.name}/{name}": value for name, value in _leaves(state)}
    found["files"] = sorted(str(p.relative_to(results)) for p in results.rglob("*") if p.is_file())
    return found


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    import torch

    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        if isinstance(value, torch.Tensor):  # bytes: NaN equals NaN, and -0 is not 0
            flat = value.contiguous().flatten().view(torch.uint8) if value.numel() else value
            value = (str(value.dtype), list(value.shape), flat.numpy().tobytes())
        return [(prefix, value)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{prefix}/{key}")]


def differences(straight: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs between two outcomes.

    A checkpoint that was to be removed at the moment of a kill may be left over.
    """
    absent = object()
    return [
        name
        for name in sorted(straight.keys() | other.keys())
        if straight.get(name, absent) != other.get(name, absent)
        and not (name.startswith("checkpoint") and name not in straight)
    ]


def sample(operations: list[list[str]], size: int | None, seed: int) -> list[int]:
    """Numbers of operations; None: all of them.

    In a sample are the first write of a checkpoint, and above all the moments at which a file has
    just taken its place, one for every kind of file.
    """
    if size is None:
        return list(range(1, len(operations) + 1))
    generator = random.Random(seed)
    first = next(n for n, (_, path) in enumerate(operations, start=1) if "/checkpoint" in path)
    after = {}
    for number, (operation, path) in enumerate(operations[:-1], start=1):
        if operation in ("replace", "rename", "remove"):
            after.setdefault(re.sub(r"\d+", "", path), []).append(number + 1)
    moments = [generator.choice(numbers) for numbers in after.values()]
    generator.shuffle(moments)
    others = [n for n in range(1, len(operations) + 1) if n not in moments]
    return sorted({first, *moments[: size - 2], generator.choice(others)})


@dataclass(frozen=True)
class Straight:
    """An attempt in which nothing goes wrong."""

    operations: list[list[str]]
    outcome: dict[str, Any]


_straight: dict[tuple[str, ...], Straight] = {}


def straight_run(overrides: list[str], folder: Path) -> Straight:
    """That of a configuration, done once for all jobs."""
    key = tuple(overrides)
    if key not in _straight:
        attempted = attempt(overrides, folder / "straight")
        if attempted.code:
            raise RuntimeError(attempted.shown)
        _straight[key] = Straight(attempted.operations, outcome(folder / "straight"))
    return _straight[key]


def inject(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """For each chosen operation a run that fails there and is then given again, until complete."""
    faults = {
        "kill": lambda number: kill_at(number, half=False),
        "kill in the middle": lambda number: kill_at(number, half=True),
        "full disk": full_disk_from,
    }
    fault = faults[job["fault"]]
    straight = straight_run(job["overrides"], folder)
    numbers = job.get("numbers") or sample(straight.operations, job["size"], job["seed"])
    cases = []
    for number in numbers:
        results = folder / f"at{number}"
        failed = attempt(job["overrides"], results, fault(number))
        again = attempt(job["overrides"], results)
        cases.append(
            {
                "number": number,
                "operation": straight.operations[number - 1],
                "killed": failed.killed,
                "failed": [failed.code, failed.shown],
                "again": [again.code, again.shown],
                "differences": None
                if again.code
                else differences(straight.outcome, outcome(results)),
            }
        )
        shutil.rmtree(results)
    return {"operations": straight.operations, "cases": cases}


def kill_again_and_again(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run that is killed at a random operation of each attempt, until an attempt completes."""
    straight = straight_run(job["overrides"], folder)
    generator = random.Random(job["seed"])
    kills, results = [], folder / "killed"
    while True:
        at = generator.randrange(1, len(straight.operations))
        last = attempt(job["overrides"], results, kill_at(at, half=bool(at % 2)))
        if not last.killed:
            break
        kills.append(at)
    found = differences(straight.outcome, outcome(results))
    return {"kills": kills, "code": last.code, "shown": last.shown, "differences": found}


def at_once(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Three processes that give the same command at the same moment."""
    started = [Start(job["overrides"], folder / "results", folder, name) for name in "abc"]
    ended = [start.end() for start in started]
    return {"codes": [e.code for e in ended], "shown": [e.shown for e in ended]}


def main() -> None:
    """Do the jobs of a file, all of them below one folder; write what came of them to another."""
    import fairseq_cli.train  # noqa: F401 (once, so that no attempt has to)

    from normexp.corpora import prepare
    from normexp.evaluation import (
        causality,  # noqa: F401
        scores,  # noqa: F401
    )
    from normexp.norms.kernels import native
    from normexp.tracking import tracker  # noqa: F401
    from normexp.training import loop  # noqa: F401

    folder = Path(sys.argv[1])
    for source in native.sources():
        native.load(source)
    *others, _ = prepare.__defaults__
    prepare.__defaults__ = (*others, few_sentences(folder))
    jobs = json.loads((folder / "jobs.json").read_text())
    reports = []
    for number, job in enumerate(jobs):
        of_job = folder / str(number)
        of_job.mkdir()
        reports.append(globals()[job["do"]](job, of_job))
    (folder / "report.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
