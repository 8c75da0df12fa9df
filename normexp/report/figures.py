"""Validation curves as SVG.

Other versions of matplotlib draw the same curves with other bytes. So that a figure can be told to
be up to date all the same, it carries the SHA-256 of what it shows.
"""

import hashlib
import io
import json
import math
import re

from normexp.report.aggregate import Row, row_name

_DIGEST = re.compile(r"<dc:description>(\w+)</dc:description>")
_STYLE = {
    "svg.hashsalt": "normexp",  # else the ids of elements are random
    "svg.fonttype": "none",  # text stays text
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}


def curves_svg(rows: list[Row]) -> str | None:
    """Validation perplexity per token over updates, one line per run and one colour per row.

    Rows that see the future are dashed. None where no run has a curve of two points.
    """
    curves = [
        (row_name(row, rows), bool(row.first.sees_future_tokens), number, run.curve)
        for number, row in enumerate(rows)
        for run in sorted(row.runs.values(), key=lambda run: run.seed)
        if len(run.curve) > 1
    ]
    if not curves:
        return None
    # here, because a report without curves needs no matplotlib, which takes a second to load
    import matplotlib.figure

    shown = json.dumps(curves).encode()
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        named: set[str] = set()
        for name, sees_future, number, curve in curves:
            updates, losses = zip(*curve, strict=True)
            axes.plot(
                updates,
                [math.exp(loss) for loss in losses],
                color=f"C{number % 10}",
                linestyle="--" if sees_future else "-",
                label=None if name in named else name + " (sees future tokens)" * sees_future,
            )
            named.add(name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_formatter("{x:.4g}")
        axes.set_xlabel("updates")
        axes.set_ylabel("validation perplexity per token")
        axes.legend(frameon=False)
        file = io.StringIO()
        digest = hashlib.sha256(shown).hexdigest()
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": digest})
    # matplotlib leaves blanks at line ends
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def digest_of(svg: str) -> str | None:
    """The SHA-256 that a figure of `curves_svg` carries; None for another text."""
    found = _DIGEST.search(svg)
    return found[1] if found else None
