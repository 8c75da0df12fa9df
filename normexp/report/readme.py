"""The block of results in the top-level README.md, between two markers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from normexp.errors import UserError
from normexp.report import formatting
from normexp.report.aggregate import Row, by_budget
from normexp.report.markdown import table
from normexp.report.paper import Paper
from normexp.report.table import Cell, Table

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

# Name of a norm in the block, and the labels of its runs; the first published number is shown.
NORMS = {
    "LN": ("LN",),
    "BN": ("BN",),
    "PN-V": ("PN-V",),
    "PN, Algorithm 2": ("PN",),
    "PN with group scaling, as released": ("PN-released", "PN-released-mt"),
}
BLEU, PERPLEXITY = "bleu_tokenised", "perplexity_per_word"


@dataclass(frozen=True)
class Column:
    """One column: the published numbers of a task, or our runs of it.

    Attributes:
        suffix: End of the labels in this column, such as "-causal".
        ours: False for the published numbers.
        small: Runs with a smaller budget than the paper's are shown instead of those without.
    """

    title: str
    task: str
    metric: str
    suffix: str = ""
    ours: bool = True
    small: bool = False


TABLE_1 = (
    Column("IWSLT14 De-En, paper", "iwslt14", BLEU, ours=False),
    Column("ours", "iwslt14", BLEU),
    Column("WMT14 En-De, paper", "wmt14", "bleu_compound_split", ours=False),
    Column("ours", "wmt14", "bleu_compound_split"),
)
TABLE_2 = (
    Column("PTB, paper §", "ptb", PERPLEXITY, ours=False),
    Column("ours §", "table2_ptb_tensorized", PERPLEXITY, "-published"),
    Column("ours, causal", "table2_ptb", PERPLEXITY),
    Column("WikiText-103, paper §", "wikitext103", PERPLEXITY, ours=False),
    Column("ours §", "table2_wikitext103_tensorized", PERPLEXITY, "-published"),
    Column("ours, causal", "wikitext103", PERPLEXITY),
)
SMALL = (
    Column("Multi30k De-En, BLEU", "multi30k", BLEU, small=True),
    Column("PTB, perplexity, causal Transformer", "ptb", PERPLEXITY, small=True),
    Column("PTB, Tensorized, causal", "ptb_future", PERPLEXITY, "-causal", small=True),
    Column("PTB, Tensorized, as published §", "ptb_future", PERPLEXITY, "-published", small=True),
)


def readme_with_results(
    readme: Path, rows_by_task: Mapping[str, list[Row]], paper: Paper, page: Path
) -> str:
    """Replace the block between the markers of `readme` and return the whole text.

    page: the page of all results, to which the block links. Raises UserError if the markers are
    missing.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme}: needs the lines {BEGIN} and {END}, in this order")
    link = Path(os.path.relpath(page, readme.parent)).as_posix()
    return f"{before}{BEGIN}\n{results_block(rows_by_task, paper, link)}{END}{after}"


def results_block(rows_by_task: Mapping[str, list[Row]], paper: Paper, link: str) -> str:
    """Write the paper's Tables 1 and 2 with our numbers beside them, and our small models."""
    tables = [
        _table("Table 1: BLEU on test", TABLE_1, rows_by_task, paper),
        _table("Table 2: perplexity per word on test", TABLE_2, rows_by_task, paper),
    ]
    small = _table("small models, not the paper's setting", SMALL, rows_by_task, paper)
    marks = (
        "≈ “around”, says the author, not in the paper; "
        f"{formatting.UNVERIFIED} not verified at its source; "
        f"{formatting.FUTURE} the model sees the tokens it predicts; "
        "— nothing published or no run.\n"
    )
    return "\n".join(
        [
            "<!-- Made by `python scripts/report.py` from the records; do not edit. -->\n",
            *(table(one, Path()) for one in tables),
            f"{marks}All runs, spreads and sources: [{link}]({link}). Our runs of small models "
            "([how to repeat them](docs/commands.md#train)):\n",
            table(small, Path()),
        ]
    )


def _table(
    title: str, columns: tuple[Column, ...], rows_by_task: Mapping[str, list[Row]], paper: Paper
) -> Table:
    lines: list[list[Cell]] = []
    for name, labels in NORMS.items():
        cells = [_cell(column, labels, rows_by_task, paper) for column in columns]
        if any(cell != "—" for cell in cells):
            lines.append([name, *cells])
    return Table([title, *(column.title for column in columns)], lines)


def _cell(
    column: Column, labels: tuple[str, ...], rows_by_task: Mapping[str, list[Row]], paper: Paper
) -> str:
    if not column.ours:
        entries = [paper.value(column.task, label, column.metric) for label in labels]
        return next((formatting.published(entry) for entry in entries if entry), "—")
    own = {label + column.suffix for label in labels}
    of_task = [
        row
        for row in rows_by_task.get(column.task, [])
        if (row.first.budget is not None) == column.small
        and row.label.endswith(column.suffix)
        and not row.first.departures  # whatever its label says
    ]
    # A column has one budget: that of the most runs.
    rows = [row for row in by_budget(of_task)[0][1] if row.label in own] if of_task else []
    shown = "; ".join(_result(row, column.metric) for row in rows)
    return shown or ("—" if column.small else "not run")


def _result(row: Row, metric: str) -> str:
    if (sample := row.sample("test", metric)) is not None:
        return formatting.mean(sample, metric)
    return "/".join(sorted({run.status for run in row.runs.values()}))
