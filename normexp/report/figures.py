"""Figures as SVG files: validation curves and the ratios of benchmarks.

Another version of matplotlib writes the same figure with other bytes. A figure therefore carries
the SHA-256 of its data, by which it is found to be up to date.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from normexp.report.aggregate import Row, row_name
from normexp.report.colours import on_light
from normexp.runs.perplexity import perplexity

MOST_DRAWN = 1e9
"""Perplexity at which a curve of a diverging run leaves the figure; no dictionary is as large."""
MOST_NAMED = 20
"""Rows in the legend of a figure; where there are more, it names the norms."""
_DIGEST = re.compile(r"<dc:description>(\w+)</dc:description>")
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "svg.hashsalt": "normexp",  # else the ids of elements are random
    "svg.fonttype": "none",  # text stays text
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
}


def curves_svg(rows: list[Row]) -> str | None:
    """Draw validation perplexity per token over updates, one line per run.

    The colour says the norm, the marker which row of that norm, unless there are more rows than a
    legend can hold. Rows that see future tokens are dashed. None if no run was validated twice.
    """
    many = len(rows) > MOST_NAMED
    norms = [row.first.norm for row in rows]
    curves = [
        (
            row.first.norm if many else row_name(row, rows),
            bool(row.first.sees_future_tokens),
            on_light(row.first.norm),
            "" if many else MARKERS[norms[:number].count(row.first.norm) % len(MARKERS)],
            run.curve,
        )
        for number, row in enumerate(rows)
        for run in sorted(row.runs.values(), key=lambda run: run.seed)
        if len(run.curve) > 1
    ]
    if not curves:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        named: set[str] = set()
        for name, sees_future, colour, marker, curve in _joined(curves) if many else curves:
            updates, losses = zip(*curve, strict=True)
            axes.plot(
                updates,
                [
                    loss if math.isnan(loss) else min(perplexity(loss), MOST_DRAWN)
                    for loss in losses
                ],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle="--" if sees_future else "-",
                label=None if name in named else name + " (sees future tokens)" * sees_future,
            )
            named.add(name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_formatter("{x:.4g}")
        axes.set_xlabel("updates")
        axes.set_ylabel("validation perplexity per token")
        # "best" compares every curve with every place.
        axes.legend(frameon=False, loc="upper right" if many else "best")

    return _svg(curves, (6.4, 4.0), draw)


def _drawn(loss: float) -> float:
    return loss if math.isnan(loss) else min(perplexity(loss), MOST_DRAWN)


def _joined(curves: list[tuple]) -> list[tuple]:
    """Join the curves that look alike, which matplotlib draws in a fraction of the time.

    A loss that is not a number ends a part of a joined curve.
    """
    joined: dict[tuple, list[tuple[float, float]]] = {}
    for *look, curve in curves:
        joined.setdefault(tuple(look), []).extend([*curve, (curve[-1][0], math.nan)])
    return [(*look, curve) for look, curve in joined.items()]


def norms_svg(rows: list[dict[str, Any]]) -> str:
    """Draw bars of the ratio to nn.LayerNorm, with quartiles, from rows of the benchmark `norms`.

    One panel per type, one group of bars per layer, one bar per shape.
    """
    shapes, layers, dtypes = (_values(rows, key) for key in ("shape", "layer", "dtype"))
    height = 0.8 / len(shapes)
    bars = [
        (dtype, layers.index(row["layer"]) + height * number, shape, row["ratio_to_layer_norm"])
        for dtype in dtypes
        for number, shape in enumerate(shapes)
        for row in rows
        if (row["dtype"], row["shape"]) == (dtype, shape)
    ]

    def draw(figure: Any) -> None:
        every = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(every, dtypes, strict=True):
            for number, shape in enumerate(shapes):
                own = [(at, ratio) for d, at, s, ratio in bars if (d, s) == (dtype, shape)]
                places, ratios = zip(*own, strict=True)
                low, median, high = zip(*ratios, strict=True)
                axes.barh(
                    places,
                    median,
                    height,
                    xerr=[_differences(median, low), _differences(high, median)],
                    error_kw={"linewidth": 0.8},
                    color=f"C{number % 10}",
                    label=shape,
                )
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:.3g}")
            axes.set_title(dtype)
            axes.set_xlabel("time as a multiple of nn.LayerNorm's")
        every[0].set_yticks([n + 0.4 - height / 2 for n in range(len(layers))], layers)
        every[0].invert_yaxis()
        every[-1].legend(frameon=False, title="(T, B, C)")

    return _svg(bars, (8.0, 0.45 * len(layers) + 1.2), draw)


def scaling_svg(rows: list[dict[str, Any]]) -> str:
    """Draw the ratio to nn.LayerNorm over size, from the rows of the benchmark `scaling`.

    One column of panels per quantity that is varied, one row per type; bands span the quartiles.
    """
    curves = [
        (sweep, dtype, layer, [(row[sweep], row["ratio_to_layer_norm"]) for row in own])
        for sweep in _values(rows, "sweep")
        for dtype in _values(rows, "dtype")
        for layer, own in _by_layer(rows, sweep, dtype).items()
    ]
    sweeps, dtypes = _values(rows, "sweep"), _values(rows, "dtype")
    # The name in the legend is the norm's, maybe with more behind it.
    colors = {layer: on_light(layer.split()[0]) for _, _, layer, _ in curves}

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(dtypes), len(sweeps), sharey="row", squeeze=False)
        for sweep, dtype, layer, curve in curves:
            axes = panels[dtypes.index(dtype)][sweeps.index(sweep)]
            sizes, ratios = zip(*curve, strict=True)
            low, median, high = zip(*ratios, strict=True)
            axes.plot(sizes, median, marker=".", color=colors[layer], label=layer)
            axes.fill_between(sizes, low, high, color=colors[layer], alpha=0.2, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_title(dtype)
            axes.set_xlabel(sweep)
        for line in panels:
            line[0].set_ylabel("multiple of nn.LayerNorm's time")
        panels[0][0].legend(frameon=False)

    return _svg(curves, (3.0 * len(sweeps), 2.8 * len(dtypes)), draw)


def digest_of(svg: str) -> str | None:
    """Read the SHA-256 of the data of a figure; None for any other text."""
    match = _DIGEST.search(svg)
    return match[1] if match else None


def _svg(shown: object, inches: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Let `draw` fill an empty figure and write it as SVG; `shown` is the data, for the digest."""
    # here, because matplotlib takes a second to load
    import matplotlib.figure

    with matplotlib.rc_context(STYLE | {"grid.alpha": 0.3, "font.size": 9}):
        figure = matplotlib.figure.Figure(figsize=inches, layout="constrained")
        draw(figure)
        file = io.StringIO()
        digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": digest})
    # matplotlib leaves blanks at line ends
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _by_layer(
    rows: list[dict[str, Any]], sweep: str, dtype: str
) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of our layers by their name in the legend; groups of a layer are one curve."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ours = row["ratio_to_layer_norm"] != [1, 1, 1]
        if ours and (row["sweep"], row["dtype"]) == (sweep, dtype):
            layers.setdefault(row["layer"].split(",")[0], []).append(row)
    return layers


def _values(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _differences(of: Sequence[float], less: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(of, less, strict=True)]
