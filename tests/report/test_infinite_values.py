"""Diverged and infinite values in records: every table, figure and page shows them, none stops."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import lxml.html
import pytest

from normexp.report import formatting
from normexp.report.aggregate import Row, Sample, differences, rows_by_task
from normexp.report.figures import curves_svg
from normexp.report.html import report_html
from normexp.report.paper import Paper
from normexp.report.report_files import report_files
from normexp.runs.causality_record import (
    CausalityRecord,
    load_causality_records,
    write_causality_record,
)
from normexp.runs.records import Record, load_records, record_path, write_record

NO_PAPER = Paper(tasks={}, values=[], differences=[])
PERPLEXITY = "perplexity_per_word"


@pytest.fixture
def run(make_record) -> Callable[..., Record]:
    """run(label, seed, nats): the record of a language model with this test loss."""

    def make(label: str, seed: int, nats: float | None, **changes: object) -> Record:
        found = None if nats is None or nats > 709 else math.exp(nats)
        return make_record(
            task="ptb",
            kind="language_model",
            label=label,
            seed=seed,
            sees_future_tokens=False,
            metrics={"test": {"loss_per_token_nats": nats, PERPLEXITY: found}},
            **changes,
        )

    return make


def written(tmp_path: Path, *records: Record) -> dict[str, list[Row]]:
    """The rows of records that were written and read."""
    for record in records:
        write_record(record_path(tmp_path, record), record)
    return rows_by_task(load_records(tmp_path))


def test_every_page_shows_an_infinite_perplexity(run, tmp_path: Path) -> None:
    curve = [(100, 5.0), (200, 800.0), (300, 1e30), (400, 1e300)]
    rows = written(
        tmp_path,
        *(run("LN", seed, 5.0 + seed / 10) for seed in (1, 2, 3)),
        *(run("PN", seed, nats, curve=curve) for seed, nats in enumerate((800.0, 5.1, 700.0), 1)),
        run("BN", 1, None),
        run("PN-V", 1, None, status="diverged", reason="the validation loss is nan after update 9"),
    )
    files = report_files(rows, NO_PAPER, tmp_path / "README.md", tmp_path)
    page = next(text for path, text in files.items() if path.name == "README.md")
    assert "∞ (n = 3)" in page and "the validation loss is nan" in page
    assert any("inf" in text for path, text in files.items() if path.suffix == ".csv")
    assert any(r"$\infty$" in text for path, text in files.items() if path.suffix == ".tex")
    html = report_html(rows, NO_PAPER, {}, [], "2026-01-02T03:04:05+00:00")
    cells = lxml.html.document_fromstring(html).xpath("//td[@data-sort='Infinity']")
    assert cells and all("∞" in cell.text_content() for cell in cells)


def test_infinity_is_not_judged_and_has_no_spread(run, tmp_path: Path) -> None:
    rows = written(
        tmp_path,
        *(run("LN", seed, 5.0) for seed in (1, 2, 3)),
        *(run("PN", seed, 800.0 if seed == 2 else 5.0) for seed in (1, 2, 3)),
    )["ptb"]
    (difference,) = differences(rows)
    assert difference.sample.mean == math.inf
    assert difference.sample.sd is None and difference.sample.interval is None
    assert difference.verdict == "not judged: not all perplexities are finite"
    assert formatting.mean(difference.sample, PERPLEXITY, signed=True) == "+∞ (n = 3)"


@pytest.mark.parametrize(
    ("value", "signed", "shown"),
    [
        (math.inf, False, "∞"),
        (-math.inf, True, "−∞"),
        (math.nan, False, "undefined"),
        (1e300, False, "1.00e+300"),
        (999_999_999.0, False, "999999999.00"),
        (-3.25, True, "−3.25"),
    ],
)
def test_numbers_of_every_size(value: float, signed: bool, shown: str) -> None:
    assert formatting.number(value, PERPLEXITY, signed) == shown


def test_two_infinities_have_no_difference() -> None:
    sample = Sample({1: math.nan, 2: math.inf})
    assert math.isnan(sample.mean) and sample.sd is None


def test_the_largest_floats_have_a_mean() -> None:
    assert Sample({1: 1.7e308, 2: 1.7e308}).mean == math.inf


@pytest.mark.filterwarnings("error")
def test_a_figure_of_curves_that_leave_it(run, tmp_path: Path) -> None:
    rows = written(
        tmp_path,
        run("LN", 1, 5.0, curve=[(1, 6.0), (2, 5.0)]),
        run("PN", 1, 5.0, curve=[(1, 6.0), (2, 708.0), (3, 1e300), (4, 5.0)]),
    )["ptb"]
    svg = curves_svg(rows)
    assert svg is not None and "inf" not in svg and "nan" not in svg


def test_a_causality_record_of_an_infinite_perplexity(tmp_path: Path, run) -> None:
    record = CausalityRecord(
        **{name.name: "text" for name in dataclasses.fields(CausalityRecord)}
        | {"schema_version": 1, "task": "ptb", "label": "LN", "seed": 1, "blocks": 1}
        | {"draw_seed": 1, "sees_future_tokens": True, "changed": 1.0, "largest_nats": 900.0}
        | {"perplexity_visible": 9.0, "perplexity_random": None, "perplexity_hidden": None}
        | {"code_dirty": False, "versions": {}},
    )
    write_causality_record(tmp_path / "causality/ptb/LN-seed1.json", record)
    rows = written(tmp_path, run("LN", 1, 5.0))
    causality = load_causality_records(tmp_path)
    files = report_files(rows, NO_PAPER, tmp_path / "README.md", tmp_path, causality)
    assert "9.00 | ∞ | ∞" in next(x for path, x in files.items() if path.name == "README.md")
