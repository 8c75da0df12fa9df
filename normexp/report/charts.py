"""Validation curves of a task as the HTML page draws them: what is shown, and on which axes."""

import math
import string
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from normexp.report.aggregate import Row, row_name
from normexp.report.formatting import with_marks
from normexp.runs.records import Record

MOST_TICKS = 6
# Two keys nearer than this, in per cent of the chart's width and height, would overlap.
KEY_WIDTH, KEY_HEIGHT = 5.0, 4.5
# Part of the longest curve that is left free on the right for the lines to the keys.
ROOM_FOR_KEYS = 0.03


@dataclass(frozen=True)
class Curve:
    """One line of a chart: validation loss per token in nats.

    Attributes:
        runs: The complete runs of a row, or one run that did not complete.
        mean: (update, mean over the runs) wherever all of them were validated.
        band: (update, lowest, highest) of more runs than one; else empty.
        key: Letter at the end of the line.
        key_at: Update and loss at which it is put.
    """

    name: str
    row: Row
    runs: dict[Path, Record]
    mean: list[tuple[int, float]]
    band: list[tuple[int, float, float]]
    key: str = ""
    key_at: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Chart:
    """Curves on common axes: updates from 0 to `right`, losses from `bottom` to `top`."""

    curves: list[Curve]
    right: float
    bottom: float
    top: float
    updates: list[float]
    losses: list[float]

    def left_of(self, update: float) -> float:
        """Per cent of the width."""
        return 100 * update / self.right

    def above(self, loss: float) -> float:
        """Per cent of the height, from the top."""
        return 100 * (self.top - loss) / (self.top - self.bottom)


def chart(rows: list[Row]) -> Chart | None:
    """The curves of a task; None where no run has two points.

    A run that did not complete is a line of its own. It does not stretch the axis of losses while
    there are complete ones: what diverges would flatten everything else.
    """
    found = [curve for row in rows for curve in _curves(row, with_marks(row_name(row, rows), row))]
    if not found:
        return None
    scaling = [curve for curve in found if _is_complete(curve)] or found
    losses = [loss for curve in scaling for _, *ends in curve.band or curve.mean for loss in ends]
    spare = 0.05 * (max(losses) - min(losses)) or 0.5
    bottom, top = min(losses) - spare, max(losses) + spare
    longest = max(curve.mean[-1][0] for curve in found)
    right = longest * (1 + ROOM_FOR_KEYS)
    axes = Chart([], right, bottom, top, ticks(0, longest), ticks(bottom, top))
    return replace(axes, curves=_with_keys(found, axes))


def ticks(low: float, high: float) -> list[float]:
    """At most `MOST_TICKS` multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < MOST_TICKS:
            break
    return [round(n * step, 12) for n in range(first, last + 1)]


def _curves(row: Row, name: str) -> list[Curve]:
    by_seed = sorted(row.runs.items(), key=lambda item: item[1].seed)
    drawn = {path: run for path, run in by_seed if len(run.curve) > 1}
    complete = {path: run for path, run in drawn.items() if run.status == "complete"}
    found = []
    if complete:
        losses = [dict(run.curve) for run in complete.values()]
        shared = sorted(set.intersection(*map(set, losses)))
        values = {update: [one[update] for one in losses] for update in shared}
        mean = [(update, fmean(every)) for update, every in values.items()]
        several = values.items() if len(complete) > 1 else ()
        band = [(update, min(every), max(every)) for update, every in several]
        if len(mean) > 1:
            found.append(Curve(name, row, complete, mean, band))
    for path, run in drawn.items():
        if run.status != "complete":
            own = f"{name}, seed {run.seed} ({run.status})"
            found.append(Curve(own, row, {path: run}, run.curve, []))
    return found


def _is_complete(curve: Curve) -> bool:
    return all(run.status == "complete" for run in curve.runs.values())


def _with_keys(curves: list[Curve], axes: Chart) -> list[Curve]:
    """Each with a letter beside its end; letters that would overlap are moved apart in order."""
    ends = [(axes.left_of(curve.mean[-1][0]), axes.above(curve.mean[-1][1])) for curve in curves]
    heights = [min(max(top, 0.0), 100.0) for _, top in ends]
    for number in sorted(range(len(ends)), key=lambda number: ends[number][0]):
        near = [n for n, (left, _) in enumerate(ends) if abs(left - ends[number][0]) < KEY_WIDTH]
        for n, height in zip(near, _spread([heights[n] for n in near]), strict=True):
            heights[n] = height
    room = axes.right * ROOM_FOR_KEYS * 2 / 3
    keyed = []
    for number, curve in enumerate(curves):
        loss = axes.top - heights[number] / 100 * (axes.top - axes.bottom)
        at = (curve.mean[-1][0] + room, loss)
        keyed.append(replace(curve, key=_key(number), key_at=at))
    return keyed


def _spread(wanted: list[float]) -> list[float]:
    """Heights in per cent at least `KEY_HEIGHT` apart, in the same order and as near as they can.

    More than fit are spread evenly.
    """
    gap = min(KEY_HEIGHT, 100 / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    clusters: list[tuple[float, int]] = []  # centre and number of heights
    for n in order:
        clusters.append((wanted[n], 1))
        while len(clusters) > 1:
            (upper, many), (lower, few) = clusters[-2:]
            if lower - upper >= gap * (many + few) / 2:
                break
            clusters[-2:] = [((upper * many + lower * few) / (many + few), many + few)]
    heights = []
    for centre, number in clusters:
        half = gap * (number - 1) / 2
        centre = min(max(centre, half), 100 - half)
        heights += [centre - half + gap * n for n in range(number)]
    return [height for _, height in sorted(zip(order, heights, strict=True))]


def _key(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    head = _key(number // len(letters) - 1) if number >= len(letters) else ""
    return head + letters[number % len(letters)]
