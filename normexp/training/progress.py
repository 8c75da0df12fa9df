"""How far a run is, on standard output: a bar on a terminal, elsewhere a line now and then."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from normexp.config import terminal
from normexp.fairseq_plugin import patches

SILENCE_SECONDS = 15.0
"""The longest silence of a short run without a terminal."""
SILENCE_PART = 0.02
"""The longest silence of a long one, as a part of the time that it has taken."""
REDRAW_SECONDS = 0.2


@dataclass(frozen=True)
class Position:
    """Where a training stands. Updates and seconds; None where they are not limited."""

    update: int
    total: int | None
    seconds_left: float | None

    def __str__(self) -> str:
        shown = f"update {self.update:,}"
        if self.total is not None:
            shown += f" of {self.total:,}"
        return shown


class RunProgress:
    """Tells of one run; every line begins with the run's name.

    Used as a context manager around the run. It is also a sink of the training loop, from which it
    gets losses.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._phase = "starting"
        self._position: Position | None = None
        self._loss: float | None = None
        self._began = self._said = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "RunProgress":
        if not self._on_terminal:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def say(self, line: str) -> None:
        """Print a line of the run."""
        self._said = time.monotonic()
        terminal.say(f"{self.name}: {line}")

    def begin(self, phase: str) -> None:
        """Say that something else than training begins, such as "evaluating"."""
        self._phase, self._position = phase, None
        self.say(phase)

    def __call__(self, tag: str, step: int, values: Mapping[str, float]) -> None:
        """Take what the training loop logs: the loss, and a validation to print."""
        if tag == "train_inner":
            self._loss = values.get("loss")
        elif tag == "valid":
            self.say(
                f"update {step:,}, validation loss {values['loss']:.3f} bits, "
                f"perplexity {values.get('ppl', math.nan):.2f}"
            )

    @contextmanager
    def of_training(self, fairseq_train: Any) -> Iterator[None]:
        """Within this context follow fairseq's training loop, the module fairseq_cli.train."""
        first: list[tuple[float, int]] = []

        def follow(cfg: Any, trainer: Any, epoch_itr: Any, at_end: bool) -> None:
            now, update = time.monotonic(), trainer.get_num_updates()
            first[:] = first or [(now, update)]
            self._position = position(
                cfg, trainer, epoch_itr, now - first[0][0], update - first[0][1]
            )
            redraw(now)

        with patches.after_updates(fairseq_train, follow):
            if not self._on_terminal:
                redraw = _nothing
                yield
                return
            with self._bar() as redraw:
                yield

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
        )
        drawn = 0.0
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(self.name, total=None, state=self._phase)

            def redraw(now: float) -> None:
                nonlocal drawn
                if now - drawn >= REDRAW_SECONDS and (at := self._position):
                    drawn = now
                    bar.update(task, completed=at.update, total=at.total, state=self._state())

            yield redraw

    def _state(self) -> str:
        at = self._position
        if at is None:
            return f"{self._phase}, {_clock(time.monotonic() - self._began)} since the start"
        parts = [str(at)]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f} bits")
        if at.seconds_left is not None:
            parts.append(f"{_clock(at.seconds_left)} left")
        return ", ".join(parts)

    def _break_silence(self) -> None:
        while not self._ended.wait(0.5):
            now = time.monotonic()
            if now - self._said >= max(SILENCE_SECONDS, SILENCE_PART * (now - self._began)):
                self.say(self._state())


def position(cfg: Any, trainer: Any, epoch_itr: Any, seconds: float, updates: int) -> Position:
    """Tell from fairseq's trainer how far its training is.

    seconds, updates: since the first update of this process had ended.
    """
    update, limits = trainer.get_num_updates(), cfg.optimization
    totals = [limits.max_update] if limits.max_update > 0 else []
    if limits.max_epoch > 0:
        totals.append(update + _updates_left(epoch_itr, limits.update_freq, limits.max_epoch))
    total = min(totals, default=None)
    lefts = []
    if total is not None and updates > 0:
        lefts.append(max(0, total - update) * seconds / updates)
    if limits.stop_time_hours > 0:
        trained = trainer.cumulative_training_time()
        lefts.append(max(0.0, 3600 * limits.stop_time_hours - trained))
    return Position(update, total, min(lefts, default=None))


def _updates_left(epoch_itr: Any, update_freq: list[int], max_epoch: int) -> int:
    """Return the updates to the end of the last epoch, each of `update_freq[epoch - 1]` batches."""

    def freq(epoch: int) -> int:
        return update_freq[min(epoch, len(update_freq)) - 1]

    batches, epoch = len(epoch_itr), epoch_itr.epoch
    in_this = math.ceil((batches - epoch_itr.iterations_in_epoch) / freq(epoch))
    later = max(0, max_epoch - epoch)
    varied = range(epoch + 1, epoch + 1 + min(later, len(update_freq)))
    updates = sum(math.ceil(batches / freq(other)) for other in varied)
    # Of the others, which may be millions, each has the last number of batches.
    return in_this + updates + (later - len(varied)) * math.ceil(batches / update_freq[-1])


def _clock(seconds: float) -> str:
    """Write seconds as 4:05 or 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _nothing(_: float) -> None:
    pass
