"""Figures show the values of the records, and a stale figure is found."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from normexp.errors import UserError
from normexp.report.aggregate import rows_by_task
from normexp.report.figures import MOST_NAMED, curves_svg, digest_of
from normexp.report.paper import Paper
from normexp.report.report_files import check_files, report_files, write_files
from normexp.runs.records import record_path, write_record

SVG = "{http://www.w3.org/2000/svg}"
NO_PAPER = Paper(tasks={}, values=[], differences=[])


@pytest.fixture
def rows(make_record):
    """Rows of a language model whose runs have the given curves, by label and seed."""

    def make(curves: dict[tuple[str, int], list[tuple[int, float]]]):
        runs = [
            make_record(
                task="ptb",
                kind="language_model",
                label=label,
                seed=seed,
                curve=curve,
                sees_future_tokens="published" in label,
            )
            for (label, seed), curve in curves.items()
        ]
        return rows_by_task({record_path(Path(), run): run for run in runs})

    return make


def _drawn_lines(svg: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Style and points of every curve in the order of drawing."""
    axes = ElementTree.fromstring(svg).find(f".//{SVG}g[@id='axes_1']")
    lines = [group for group in axes if re.fullmatch(r"line2d_\d+", group.get("id", ""))]
    found = []
    for path in (line.find(f"{SVG}path") for line in lines):
        numbers = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))
        found.append((path.get("style"), [(float(x), float(y)) for x, y in numbers]))
    return found


def test_curves_are_drawn_to_scale(rows) -> None:
    curves = {
        ("LN-causal", 1): [(100, math.log(400)), (200, math.log(200)), (400, math.log(100))],
        ("LN-causal", 2): [(100, math.log(300)), (400, math.log(150))],
        ("LN-published", 1): [(100, math.log(400)), (300, math.log(50))],
    }
    svg = curves_svg(rows(curves)["ptb"])
    drawn = _drawn_lines(svg)
    assert [len(points) for _, points in drawn] == [3, 2, 2]
    (first, second, third), (_, end), (also_first, lowest) = (points for _, points in drawn)
    assert also_first == first
    assert third[0] - second[0] == pytest.approx(2 * (second[0] - first[0]), rel=1e-4)
    assert end[0] == pytest.approx(third[0])
    # a logarithmic axis, downwards: each halving is as far, three of them from 400 to 50
    halving = second[1] - first[1]
    assert halving > 0
    assert third[1] - second[1] == pytest.approx(halving, rel=1e-4)
    assert lowest[1] - first[1] == pytest.approx(3 * halving, rel=1e-4)
    styles = [style for style, _ in drawn]
    assert ["dash" in style for style in styles] == [False, False, True]
    colors = {re.search("stroke: (#[0-9a-f]+)", style)[1] for style in styles}
    assert len(colors) == 1  # all of one norm
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert texts.count("LN-causal") == 1
    assert texts.count("LN-published (sees future tokens)") == 1


def test_without_curves_there_is_no_figure(rows) -> None:
    assert curves_svg(rows({("LN", 1): [], ("PN", 1): [(5, 2.0)]})["ptb"]) is None


def test_the_digest_follows_what_is_shown(rows) -> None:
    first, again, other, dashed = (
        digest_of(curves_svg(rows({(label, 1): [(1, 3.0), (2, last)]})["ptb"]))
        for label, last in (("LN", 2.0), ("LN", 2.0), ("LN", 2.5), ("LN-published", 2.0))
    )
    assert first == again
    assert len({first, other, dashed}) == 3 and None not in (first, other)


def test_a_stale_figure_is_found_and_another_drawing_of_the_same_is_accepted(
    make_record, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    run = make_record(curve=[(1, 3.0), (2, 2.5)])
    write_record(record_path(tmp_path, run), run)

    def files(record):
        rows = rows_by_task({record_path(tmp_path, record): record})
        return report_files(rows, NO_PAPER, page, home=tmp_path)

    write_files(files(run))
    assert "](figures/iwslt14.svg)" in page.read_text(encoding="utf-8")
    figure = tmp_path / "figures" / "iwslt14.svg"
    drawn_otherwise = figure.read_text(encoding="utf-8").replace('width="', 'width=" ', 1)
    figure.write_text(drawn_otherwise, encoding="utf-8")
    check_files(files(run))
    changed = make_record(curve=[(1, 3.0), (2, 2.25)])
    with pytest.raises(UserError, match=r"out of date: .*iwslt14\.svg"):
        check_files(files(changed))
    figure.rename(figure.with_name("gone.svg"))
    with pytest.raises(UserError, match=r"out of date: .*iwslt14\.svg"):
        check_files(files(run))
    write_files(files(run))
    with pytest.raises(UserError, match=r"made from no record: .*gone\.svg"):
        check_files(files(run))


def test_many_rows_are_told_apart_by_norm_alone(rows) -> None:
    """As one line for all runs of a norm, in which each run is a part of its own."""
    curves = {
        (f"PN-{number:02}", seed): [(100 * k, 5 - k**2 / (9 + number + seed)) for k in (1, 3, 2, 5)]
        for number in range(MOST_NAMED + 1)
        for seed in (1, 2)
    }
    few = {key: curve for key, curve in curves.items() if key[0] != "PN-00"}
    assert len(_drawn_lines(curves_svg(rows(few)["ptb"]))) == len(few)
    many = curves_svg(rows(curves)["ptb"])
    [_] = _drawn_lines(many)
    [path] = re.findall(r'id="line2d_\d+"> <path d="([^"]*)" clip', re.sub(r"\s+", " ", many))[-1:]
    parts = [part.split(" L ") for part in path.removeprefix("M ").split("M ")]
    # matplotlib repeats the last point of all
    assert [len({point.strip() for point in part}) for part in parts] == [4] * len(curves)
    assert len({part[0].split()[0] for part in parts}) == 1
    legend = many[many.index('id="legend_1"') :]
    assert re.findall(r">([^<>]+)</text>", legend) == ["power"]
