"""One colour per norm in every chart, told apart by everybody on light and dark pages."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from normexp.norms import available_norms
from normexp.report.aggregate import rows_by_task
from normexp.report.charts import DASHES, chart
from normexp.report.colours import PALETTE, as_css, number_of, on_light
from normexp.report.figures import curves_svg
from normexp.report.html import TEMPLATES
from normexp.runs.records import record_path

MAIN = ("layer", "batch", "power_v", "power", "power_released", "batch_released")
# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # sRGB, D65


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: str) -> np.ndarray:
    """CIE 1976 L*, a*, b* of a colour as somebody sees it."""
    seen = np.clip(np.array(VISIONS[vision]) @ linear(colour), 0, 1)
    relative = TO_XYZ @ seen / TO_XYZ.sum(axis=1)
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: from 1 to 21."""
    dark, light = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_the_measures_are_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert lab("#ff0000", "normal") == pytest.approx([53.24, 80.09, 67.20], abs=0.1)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [0, 1])
def test_everybody_can_tell_them_apart(vision: str, scheme: int) -> None:
    def nearest(colours: list[str]) -> float:
        places = [lab(colour, vision) for colour in colours]
        return min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2))

    every = [colours[scheme] for colours in PALETTE]
    assert len(set(every)) == len(every) and nearest(every) > 10
    assert nearest([PALETTE[number_of(norm)][scheme] for norm in MAIN]) > 20


def test_all_stand_out_from_the_page() -> None:
    style = (TEMPLATES / "report.css").read_text("utf-8")
    light, dark = re.findall(r"--background: (#\w{6});", style)
    for on_white, on_dark in PALETTE:
        assert contrast(on_white, light) >= 4.5 and contrast(on_dark, dark) >= 4.5
    shown = dict(re.findall(r"--(c\d+): (#\w{6});", as_css().split("@media")[0]))
    assert list(shown.values()) == [on_white for on_white, _ in PALETTE]


def test_every_norm_has_its_own() -> None:
    numbers = [number_of(norm) for norm in available_norms()]
    assert len(set(numbers)) == len(numbers)
    assert number_of("a new one") == number_of("a new one") < len(PALETTE)


@pytest.fixture
def rows(make_record):
    """Rows of a task, from (label, norm) pairs."""

    def make(task: str, *runs: tuple[str, str]):
        records = [
            make_record(task=task, label=label, norm=norm, curve=[(1, 3.0), (2, 2.0), (3, 1.5)])
            for label, norm in runs
        ]
        return rows_by_task({record_path(Path(), run): run for run in records})[task]

    return make


def test_a_norm_has_one_colour_in_all_charts_and_figures(rows) -> None:
    """Whatever else is drawn, and in whatever order."""
    one = rows("ptb", ("PN", "power"), ("LN", "layer"), ("BN", "batch"))
    other = rows("iwslt14", ("A", "rms"), ("B", "batch"), ("C", "power"), ("D", "power"))
    seen: dict[str, set] = {}
    for task, of_task in (("ptb", one), ("iwslt14", other)):
        drawn = chart(of_task, task)
        for curve in drawn.curves:
            path = rf'<g data-key="{curve.key}">\s*<path[^>]*?fill: none;([^>]*)>'
            [style] = re.findall(path, drawn.svg)
            line = re.search(r"stroke: var\(--c(\d+)\)", style)[1]
            seen.setdefault(curve.row.first.norm, set()).add(int(line))
        figure = curves_svg(of_task)
        for row in of_task:
            assert f"stroke: {on_light(row.first.norm)}" in figure
    assert seen == {norm: {number_of(norm)} for norm in ("power", "layer", "batch", "rms")}


def test_rows_of_one_norm_differ_in_their_lines(rows) -> None:
    many = [(f"PN-{n}", "power") for n in range(len(DASHES))]
    drawn = chart(rows("ptb", *many, ("LN", "layer")), "x")
    looks = [(curve.colour, curve.dash) for curve in drawn.curves]
    assert len(set(looks)) == len(looks) == len(DASHES) + 1
