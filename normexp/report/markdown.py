"""`results/README.md` and `results/benchmarks/README.md`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from normexp.report.aggregate import Row
from normexp.report.benchmark_tables import (
    Benchmarks,
    authors_table,
    benchmark_of,
    environment,
    tables,
    title_of,
)
from normexp.report.causality_table import CAUSALITY_TITLE, causality_table
from normexp.report.formatting import ABOUT_THE_NUMBERS, MARKS
from normexp.report.goals import goals_table
from normexp.report.paper import Paper
from normexp.report.result_tables import (
    differences_table,
    published_table,
    results_tables,
    runs_table,
)
from normexp.report.table import Cell, Link, Table
from normexp.runs.causality_record import CausalityRecord

HEAD = f"""# Results

<!-- Made by `python scripts/report.py` from the records; do not edit. -->

{ABOUT_THE_NUMBERS}; the tables are also in `tables/` as CSV and LaTeX.

""" + "".join(f"- {mark} {meaning}\n" for mark, meaning in MARKS.items())

BENCHMARKS_HEAD = """# Benchmarks

<!-- Made by `python scripts/report.py` from the records; do not edit. -->

The candidates are timed in turns in one process. A ratio is the median (lower–upper quartile) of
the ratios of all rounds; times beside it are medians. Only numbers of one record are comparable.
"""


def results_page(
    rows_by_task: dict[str, list[Row]],
    paper: Paper,
    page: Path,
    home: Path,
    figures: Mapping[str, Path],
    causality: Mapping[Path, CausalityRecord],
    benchmarks: Path | None,
) -> str:
    """Write the page of all results.

    Links are relative to the folder of `page`; PROTOCOL.md is in `home`.

    figures: the validation curves of the tasks that have any; benchmarks: the page on speed.
    """
    folder = page.parent
    protocol = f"[PROTOCOL.md]({_relative(home / 'PROTOCOL.md', folder)})"
    parts = [HEAD.format(protocol=protocol)]
    if benchmarks:
        link = _relative(benchmarks, folder)
        parts.append(f"Times of layers, training and inference are in [{link}]({link}).\n")
    for task in paper.in_order(rows_by_task):
        rows, published = rows_by_task.get(task, []), paper.task(task)
        parts.append(f"## {task}: {published.title}\n" if published else f"## {task}\n")
        if published:
            if published.setting:
                parts.append(f"Setting of the paper: {_escape(published.setting)}.\n")
            if published.meaning:
                parts.append(f"{_escape(published.meaning.strip())}\n")
        for budget, content in results_tables(task, rows, paper):
            parts.append((f"{_escape(budget)}:\n\n" if budget else "") + table(content, folder))
        if not rows:
            continue
        compared = differences_table(task, rows, paper)
        if compared.rows:
            parts.append("Differences on the same seeds:\n\n" + table(compared, folder))
        if task in figures:
            link = _relative(figures[task], folder)
            parts.append(f"![Validation perplexity over updates]({link})\n")
        tested = causality_table(task, causality)
        if tested.rows:
            parts.append(f"{CAUSALITY_TITLE}:\n\n" + table(tested, folder))
        parts.append("Runs:\n\n" + table(runs_table(rows), folder))
    parts.append("## Published numbers\n")
    parts.append(table(published_table(paper), folder))
    return "\n".join(parts)


def benchmarks_page(
    benchmarks: Benchmarks, page: Path, home: Path, figures: Mapping[str, Path]
) -> str:
    """Write the page of the benchmarks.

    Links are relative to the folder of `page`; the records are in `home`.

    figures: those there are, by the name of the benchmark.
    """
    folder = page.parent
    parts = [BENCHMARKS_HEAD]
    if benchmarks.goals:
        parts.append("## Goals\n")
        parts.append(table(goals_table(benchmarks.goals, benchmarks.records, home), folder))
    for name, record in benchmarks.records.items():
        parts.append(f"## {title_of(name)}\n")
        if "what" in record:
            parts.append(f"{_escape(record['what'])}:\n")
        parts.append(f"```sh\n{record['command']}\n```\n")
        link = _link(Link("record", home / f"{name}.json"), folder)
        parts.append(f"{_escape(environment(record))}; {link}\n")
        if name in figures:
            parts.append(f"![{title_of(name)}]({_relative(figures[name], folder)})\n")
        for title, content in tables(benchmark_of(name), record):
            parts.append((f"{_escape(title)}:\n\n" if title else "") + table(content, folder))
        if name == "norms" and benchmarks.authors is not None:
            authors = benchmarks.authors
            parts.append(
                f"The authors' layers for comparison, quoted: {_escape(authors.what.strip())}; "
                f"{_escape(authors.source)}, on {_escape(authors.machine)}. That is another "
                "machine than ours, so only multiples of the nn.LayerNorm measured beside them "
                "can be compared.\n\n" + table(authors_table(authors), folder)
            )
    return "\n".join(parts)


def table(content: Table, folder: Path) -> str:
    """Write a table with its notes as a list below it; links are relative to `folder`."""
    lines = [content.header, ["---"] * len(content.header)]
    lines += [[_cell(cell, folder) for cell in row] for row in content.rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if content.notes:
        text += "\n"
    for note in content.notes:
        link = f" ({_link(note.link, folder)})" if note.link else ""
        text += f"- {_escape(note.text)}{link}\n"
    return text


def _cell(cell: Cell, folder: Path) -> str:
    if isinstance(cell, str):
        return _escape(cell)
    return ", ".join(_link(link, folder) for link in cell)


def _link(link: Link, folder: Path) -> str:
    return f"[{_escape(link.text)}]({_relative(link.target, folder)})"


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix().replace(" ", "%20")


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
