"""`make demo`: eight toy runs in two processes, with one bar and the time left for all of them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.paths import REPOSITORY
from normexp.runs.folder import RunFolder
from normexp.runs.lookup import find_finished
from normexp.sweeps.run_status import last_logged
from normexp.sweeps.sweep import runs_of_sweep

TRAIN = REPOSITORY / "scripts" / "train.py"
# Two processes of one thread each: together faster than one of two threads, and steady where other
# programs want a core too (OpenMP's threads wait for each other by spinning).
STREAMS = ("norm=layer,batch", "norm=power_v,power")
TASKS = "task=toy_translation,toy_language_model"
SECONDS = {"toy_translation": (95.0, 15.0), "toy_language_model": (33.0, 5.0)}
"""About what training and evaluation take on an EPYC, for the time left."""
LINE_SECONDS = 15.0  # between lines about all runs where there is no terminal
POLL_SECONDS = 0.5


Tell = Callable[[float, float, float, Sequence[RunSettings]], None]
"""Called as tell(done, already, seconds, runs): see `_state`."""


def run_demo(results_dir: Path) -> int:
    """Train and evaluate what is missing and print how far it is; return the exit status."""
    runs = []
    for norms in STREAMS:
        for run in runs_of_sweep([TASKS, norms, f"results_dir={results_dir}"]):
            if isinstance(run, UserError):
                raise run
            runs.append(run)
    minutes = sum(map(sum, SECONDS.values())) * len(STREAMS) / 60
    console = Console(soft_wrap=True)
    console.print(
        f"demo: {len(runs)} runs, {len(STREAMS)} at a time, about {minutes:.0f} minutes on "
        f"{len(STREAMS)} cores; 120 MB in {results_dir}",
        highlight=False,
    )
    with _started(results_dir, console) as processes, _bar(console) as tell:
        began, already = time.monotonic(), _done(runs)
        while any(process.poll() is None for process in processes):
            if (done := _done(runs)) == already:  # Python starts, the corpus is prepared
                began = time.monotonic()
            tell(done, already, time.monotonic() - began, runs)
            time.sleep(POLL_SECONDS)
    return int(any(process.returncode for process in processes))


@contextmanager
def _started(results_dir: Path, console: Console) -> Iterator[list[subprocess.Popen]]:
    """Within this context the processes run; what they print is printed line by line."""
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, str(TRAIN), "-m"),
                *(TASKS, norms, f"results_dir={results_dir}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for norms in STREAMS
    ]
    readers = [
        threading.Thread(target=_pass_on, args=(process, console), daemon=True)
        for process in processes
    ]
    for reader in readers:
        reader.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()  # they save and end in order; nothing happens where one has ended
        for process, reader in zip(processes, readers, strict=True):
            process.wait()
            reader.join()


def _pass_on(process: subprocess.Popen, console: Console) -> None:
    for line in process.stdout:
        console.print(line.rstrip("\n"), markup=False, highlight=False)


def _done(runs: Sequence[RunSettings]) -> float:
    """Return the seconds of work that are done, as `SECONDS` has them."""
    done = 0.0
    for run in runs:
        training, evaluation = SECONDS[run.task.name]
        folder = RunFolder(run.run_dir)
        if find_finished(run):
            done += training + evaluation
        elif folder.finished.is_file():
            done += training
        elif logged := last_logged(folder):
            done += training * min(1.0, logged[0] / run.fairseq["optimization"]["max_update"])
    return done


@contextmanager
def _bar(console: Console) -> Iterator[Tell]:
    """Yield a function that shows how far all runs are: in a bar, or in a line now and then."""
    if not console.is_terminal:
        said = time.monotonic()

        def tell(done: float, already: float, seconds: float, runs: Sequence[RunSettings]) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                state = _state(done, already, seconds, runs)
                console.print(f"demo: {state}", markup=False, highlight=False)

        yield tell
        return
    columns = TextColumn("demo"), BarColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("demo", total=1.0, state="starting")

        def draw(done: float, already: float, seconds: float, runs: Sequence[RunSettings]) -> None:
            part = done / _work(runs)
            bar.update(task, completed=part, state=_state(done, already, seconds, runs))

        yield draw


def _work(runs: Sequence[RunSettings]) -> float:
    return sum(sum(SECONDS[run.task.name]) for run in runs)


def _state(done: float, already: float, seconds: float, runs: Sequence[RunSettings]) -> str:
    """Return how much is done, and how long the rest takes at the pace of this command.

    done, already: seconds of work now and at the beginning of the command, whose first work was
    done `seconds` ago.
    """
    work = _work(runs)
    fresh = done - already
    # At the beginning the pace is not known yet: as on the EPYC.
    pace = fresh / seconds if fresh > 0.03 * work else len(STREAMS)
    left = round((work - done) / pace)
    finished = sum(1 for run in runs if find_finished(run))
    return (
        f"{done / work:.0%}, {finished} of {len(runs)} runs, about {left // 60}:{left % 60:02} left"
    )
