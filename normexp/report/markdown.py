"""`results/README.md` and `results/benchmarks/README.md`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from normexp.audits import Audit
from normexp.report.aggregate import Row
from normexp.report.audits import audits_table
from normexp.report.benchmarks import TITLES, Benchmarks, authors_table, circumstances, tables
from normexp.report.cells import BUDGET, FUTURE, UNVERIFIED, Cell, Link, Table
from normexp.report.paper import Paper
from normexp.report.tables import differences_table, published_table, results_table, runs_table

HEAD = f"""# Results

<!-- Made by `python scripts/report.py` from the records; do not edit. -->

Every number is the mean ± standard deviation over n seeds of the runs whose records are linked in
its row. The rules under which the runs were made and compared, written before they were run, are
in [PROTOCOL.md]({{protocol}}); the tables are also in `tables/` as CSV and LaTeX.

- {UNVERIFIED} a published number that has not been verified at its source
- {BUDGET} a smaller budget than the paper's: not comparable with the paper
- {FUTURE} a language model that sees the tokens it predicts, as the published ones do; its
  perplexity is not the perplexity of a language model, and comparable only with its like
"""

BENCHMARKS_HEAD = """# Benchmarks

<!-- Made by `python scripts/report.py` from the records; do not edit. -->

Competitors take turns in one process. A ratio is the median (lower–upper quartile) of the ratios
taken round by round; times beside it are medians. Numbers are comparable within one record only.
"""


def results_page(
    rows_by_task: dict[str, list[Row]],
    paper: Paper,
    page: Path,
    home: Path,
    figures: Mapping[str, Path],
    audits: Mapping[Path, Audit],
    benchmarks: Path | None,
) -> str:
    """The whole page; links are relative to the folder of `page`, PROTOCOL.md is in `home`.

    figures: the validation curves of the tasks that have any; benchmarks: the page on speed.
    """
    folder = page.parent
    parts = [HEAD.format(protocol=_relative(home / "PROTOCOL.md", folder))]
    if benchmarks:
        link = _relative(benchmarks, folder)
        parts.append(f"Times of layers, training and inference are in [{link}]({link}).\n")
    for task in _in_order(rows_by_task, paper):
        rows, published = rows_by_task.get(task, []), paper.task(task)
        parts.append(f"## {task}: {published.title}\n" if published else f"## {task}\n")
        if published:
            if published.setting:
                parts.append(f"Setting of the paper: {_escape(published.setting)}.\n")
            if published.meaning:
                parts.append(f"{_escape(published.meaning.strip())}\n")
        parts.append(table(results_table(task, rows, paper), folder))
        if not rows:
            continue
        compared = differences_table(task, rows, paper)
        if compared.rows:
            parts.append("Differences on the same seeds:\n\n" + table(compared, folder))
        if task in figures:
            link = _relative(figures[task], folder)
            parts.append(f"![Validation perplexity over updates]({link})\n")
        audited = audits_table(task, audits)
        if audited.rows:
            parts.append("Without the future tokens:\n\n" + table(audited, folder))
        parts.append("Runs:\n\n" + table(runs_table(rows), folder))
    parts.append("## Published numbers\n")
    parts.append(table(published_table(paper), folder))
    return "\n".join(parts)


def benchmarks_page(
    benchmarks: Benchmarks, page: Path, home: Path, figures: Mapping[str, Path]
) -> str:
    """The page of the benchmarks; links are relative to its folder, records lie in `home`.

    figures: those there are, by the name of the benchmark.
    """
    folder = page.parent
    parts = [BENCHMARKS_HEAD]
    for name, record in benchmarks.records.items():
        parts.append(f"## {TITLES[name]}\n")
        if "what" in record:
            parts.append(f"{_escape(record['what'])}:\n")
        parts.append(f"```sh\n{record['command']}\n```\n")
        link = _link(Link("record", home / f"{name}.json"), folder)
        parts.append(f"{_escape(circumstances(record))}; {link}\n")
        if name in figures:
            parts.append(f"![{TITLES[name]}]({_relative(figures[name], folder)})\n")
        for title, content in tables(name, record):
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
    """A table with its notes as a list below it."""
    lines = [content.header, ["---"] * len(content.header)]
    lines += [[_cell(cell, folder) for cell in row] for row in content.rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if content.notes:
        text += "\n"
    for note in content.notes:
        link = f" ({_link(note.link, folder)})" if note.link else ""
        text += f"- {_escape(note.text)}{link}\n"
    return text


def _in_order(rows_by_task: dict[str, list[Row]], paper: Paper) -> list[str]:
    """The paper's tasks, each followed by those that share its numbers, then the others."""
    tasks = []
    for name, published in paper.tasks.items():
        tasks += [name, *(task for task in published.also if task in rows_by_task)]
    return tasks + sorted(rows_by_task.keys() - set(tasks))


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
