"""Runs of different budgets: no column has two of them, and none stands beside the paper's."""

from pathlib import Path

import pytest

from normexp.report.aggregate import by_budget, differences, rows_by_task
from normexp.report.latex import results_tex
from normexp.report.markdown import results_page
from normexp.report.paper import load_paper
from normexp.report.readme import results_block
from normexp.report.result_tables import results_tables
from normexp.runs.records import record_path

RESULTS = Path(__file__).resolve().parents[2] / "results"
PAPER = load_paper(RESULTS / "paper.yaml")
SHORT = "fairseq.optimization.max_epoch=1 instead of 200"


@pytest.fixture
def rows(make_record) -> dict:
    """Full runs of LN and PN, and short ones; names and values as a user could make them."""
    made = [
        make_record(
            task="iwslt14",
            kind="translation",
            label=label,
            seed=1,
            budget=budget,
            departures=[budget] if budget else [],
            config_hash=f"{number:012}",
            metrics={"test": {"bleu_tokenised": value}},
        )
        for number, (label, budget, value) in enumerate(
            [("LN", None, 35.3), ("PN", None, 35.8), ("LN", SHORT, 15.29), ("PN", SHORT, 14.1)]
        )
    ]
    paths = [RESULTS / "own" / f"{number}" for number in range(len(made))]
    return rows_by_task(dict(zip(paths, made, strict=True)))


def test_tables_have_one_budget_each(rows) -> None:
    own = rows["iwslt14"]
    assert [budget for budget, _ in by_budget(own)] == ["", SHORT]
    (first, full), (second, short) = results_tables("iwslt14", own, PAPER)
    assert (first, second) == ("the paper's setting", SHORT)
    shown = [str(cell) for row in full.rows for cell in row]
    assert "35.30 (n = 1)" in shown and "35.80 (n = 1)" in shown
    assert "15.29" not in str(full.rows) and "35.30" not in str(short.rows)
    assert "published" in full.header and "published" not in short.header

    page = results_page(rows, PAPER, RESULTS / "x.md", RESULTS, {}, {}, None)
    assert (
        page.index("35.30")
        < page.index(f"{SHORT.replace('_', chr(92) + '_')}:")
        < page.index("15.29")
    )
    assert "15.29" in results_tex(short, "c", "l")


def test_short_runs_are_never_beside_the_papers_number(rows) -> None:
    block = results_block(rows, PAPER, "results/README.md")
    assert "35.30" in block and "15.29" not in block and "14.10" not in block
    short = [row for row in rows["iwslt14"] if row.first.budget]
    ((_, table),) = results_tables("iwslt14", short, PAPER)
    ours = [row for row in table.rows if "15.29" in str(row)]
    assert len(ours) == 1 and "not comparable" in ours[0]
    assert not any(d.row.first.budget != d.baseline.first.budget for d in differences(short))


def test_a_departure_is_not_compared_with_the_paper(make_record) -> None:
    """A tuned learning rate has the paper's budget, and is not its setting."""
    tuned = make_record(
        task="iwslt14",
        kind="translation",
        label="LN",
        budget=None,
        departures=["fairseq.optimization.lr=[0.01] instead of [0.0015]"],
        metrics={"test": {"bleu_tokenised": 36.0}},
    )
    rows = rows_by_task({record_path(RESULTS, tuned): tuned})["iwslt14"]
    ((_, table),) = results_tables("iwslt14", rows, PAPER)
    assert "not comparable" in next(row for row in table.rows if "36.00" in str(row))
