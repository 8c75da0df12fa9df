"""Validation curves of a task as an SVG in the HTML page, drawn by matplotlib.

matplotlib was chosen because an inline SVG needs no script and no network, is sharp on paper, and
takes its colours from the page's style, so that it follows the dark scheme; the scripts of plotly
and Vega alone are larger than the page may be.
"""

import io
import re
import string
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from normexp.report import figures
from normexp.report.aggregate import Row, row_name
from normexp.report.colours import PALETTE, number_of
from normexp.report.formatting import with_marks
from normexp.report.thinning import thinned
from normexp.runs.records import Record

INCHES = (7.0, 4.4)
AXES = (0.09, 0.1, 0.9, 0.87)  # left, bottom, width, height as parts of the figure
COLOURS = [f"#0001{n:02x}" for n in range(len(PALETTE))]  # stands for the page's --c0, --c1, ...
DASHES = (
    *("-", (0, (5, 2.5)), (0, (1.5, 2)), (0, (7, 2, 1.5, 2)), (0, (4, 2, 1, 1.5, 1, 2))),
    *((0, (10, 3)), (0, (3, 1)), (0, (9, 2, 1, 2, 1, 2, 1, 2))),
)
VARIABLES = {
    **{colour: f"--c{n}" for n, colour in enumerate(COLOURS)},
    "#0000e0": "--text",
    "#0000e1": "--muted",
    "#0000e2": "--grid",
}
_COORDINATE = re.compile(r"(\.\d)\d+")  # a tenth of a point is less than a pixel
STYLE = figures.STYLE | {
    "axes.edgecolor": "#0000e1",
    "grid.color": "#0000e2",
    "xtick.color": "#0000e1",
    "ytick.color": "#0000e1",
    "text.color": "#0000e0",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: validation loss per token in nats.

    Attributes:
        key: Letter on the line.
        dash: Number of its kind of line, by which curves of one norm are told apart.
        runs: The complete runs of a row, or one run that did not complete.
        points: (update, mean, lowest, highest over the runs) at the updates at which all of them
            were validated; of a long curve those that can be told apart.
    """

    key: str
    dash: int
    name: str
    row: Row
    runs: dict[Path, Record]
    points: list[tuple[int, float, float, float]]

    @property
    def colour(self) -> int:
        """The number of the norm's colour."""
        return number_of(self.row.first.norm)

    @property
    def is_complete(self) -> bool:
        """False for a run that diverged or failed."""
        return all(run.status == "complete" for run in self.runs.values())


@dataclass(frozen=True)
class Chart:
    """The curves of a task, and the updates that lie at the left and right end of the drawing."""

    curves: list[Curve]
    svg: str
    left: float
    right: float


def chart(rows: list[Row], name: str) -> Chart | None:
    """Draw the curves of a task; None if no run was validated twice.

    A run that did not complete is a line of its own. It does not stretch the axis of losses while
    there are complete ones: a diverging one would flatten all others. name: a prefix for ids that
    is unique on the page.
    """
    drawn = [
        curve for row in rows for curve in _curves_of(row, with_marks(row_name(row, rows), row))
    ]
    if not drawn:
        return None
    dashes = _dashes([row.first.norm for _, row, *_ in drawn])
    curves = [Curve(_key(n), dashes[n], *curve) for n, curve in enumerate(drawn)]
    scaling = [curve for curve in curves if curve.is_complete] or curves
    losses = [loss for curve in scaling for _, _, *ends in curve.points for loss in ends]
    spare = 0.05 * (max(losses) - min(losses)) or 0.5
    end = 1.02 * max(curve.points[-1][0] for curve in curves)
    svg = _draw(curves, end, min(losses) - spare, max(losses) + spare)
    svg = re.sub(r'(id="|url\(#)', rf"\1{name}-", svg)
    left, _, width, _ = AXES
    return Chart(curves, svg, -end * left / width, end * (1 - left) / width)


def _curves_of(row: Row, name: str) -> list[tuple[str, Row, dict[Path, Record], list[tuple]]]:
    by_seed = sorted(row.runs.items(), key=lambda item: item[1].seed)
    validated = {path: run for path, run in by_seed if len(run.curve) > 1}
    groups = {name: {path: run for path, run in validated.items() if run.status == "complete"}}
    for path, run in validated.items():
        if run.status != "complete":
            groups[f"{name}, seed {run.seed} ({run.status})"] = {path: run}
    curves = []
    for own_name, runs in groups.items():
        losses = [dict(run.curve) for run in runs.values()]
        updates = sorted(set.intersection(*map(set, losses))) if losses else []
        every = [[one[update] for one in losses] for update in updates]
        points = [
            (u, fmean(own), min(own), max(own)) for u, own in zip(updates, every, strict=True)
        ]
        if len(points) > 1:
            curves.append((own_name, row, runs, thinned(points)))
    return curves


def _dashes(norms: list[str]) -> list[int]:
    """Choose a kind of line for each curve: unused by its norm, then by others, where possible."""
    chosen: list[int] = []
    for norm in norms:
        own = [dash for other, dash in zip(norms, chosen, strict=False) if other == norm]
        uses = [(own.count(dash), chosen.count(dash), dash) for dash in range(len(DASHES))]
        chosen.append(min(uses)[-1])
    return chosen


def _draw(curves: list[Curve], end: float, bottom: float, top: float) -> str:
    # here, because matplotlib takes a second to load
    import matplotlib.figure
    import numpy as np

    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=INCHES)
        axes = figure.add_axes(AXES, xlim=(0, end), ylim=(bottom, top))
        axes.tick_params(length=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        for number, curve in enumerate(curves):
            updates, means, lows, highs = map(np.array, zip(*curve.points, strict=True))
            look = {"color": COLOURS[curve.colour], "gid": f"key-{curve.key}"}
            if len(curve.runs) > 1:
                outline = np.append(updates, updates[::-1]), np.append(lows, highs[::-1])
                axes.fill(*outline, alpha=0.18, linewidth=0, **look)
            axes.plot(updates, means, linestyle=DASHES[curve.dash], **look)
            # Letters stand at different parts of the curves, so that those of close ones do not
            # overlap, and not at the beginning, where all curves are close.
            part = 0.3 + 0.7 * (number + 0.5) / len(curves)
            x = updates[0] + part * (updates[-1] - updates[0])
            y = np.clip(np.interp(x, updates, means), bottom, top)
            axes.text(x, y, curve.key, ha="center", va="center_baseline", **look)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _for_the_page(file.getvalue())


def _for_the_page(svg: str) -> str:
    """Strip the parts that only a file needs and take the colours from the style of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg)
    svg = re.sub(r'width="\S+" height="\S+"', 'aria-hidden="true"', svg, count=1)
    svg = re.sub(r'id="key-(\w+)"', r'data-key="\1"', svg)
    svg = re.sub(r' id="(?!p[0-9a-f]{8})[^"]*"', "", svg)  # all but that of the clip path
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"\s+", " ", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: _COORDINATE.sub(r"\1", path[0]), svg)
    return re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg)


def _key(number: int) -> str:
    """Count A, B, ..., Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    head = _key(number // len(letters) - 1) if number >= len(letters) else ""
    return head + letters[number % len(letters)]
