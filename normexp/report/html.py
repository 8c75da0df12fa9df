"""`results/report.html`: all results and records on one page that needs no network.

The page is complete without scripts; its script sorts, filters and reads values off the charts. A
content security policy allows that one script and no connection, so that no text of a
record could run or load anything even if the escaping failed.
"""

import base64
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from normexp.report import colours, formatting
from normexp.report.aggregate import PRIMARY_METRIC, Row, differences, row_name
from normexp.report.causality_table import CAUSALITY_TITLE, causality_table
from normexp.report.charts import Chart, chart
from normexp.report.formatting import ABOUT_THE_NUMBERS, MARKS, metric_name
from normexp.report.paper import Paper, Published, PublishedTask
from normexp.report.repeated import Repeated
from normexp.report.result_tables import (
    differences_table,
    published_table,
    results_tables,
    runs_table,
)
from normexp.report.table import Cell, Link, Note, Number, Table
from normexp.runs.causality_record import CausalityRecord
from normexp.runs.folder import RunFolder
from normexp.runs.metric_values import value_of
from normexp.runs.records import Record

TEMPLATES = Path(__file__).parent / "templates"
FIXED_IDS = ("top", "filter", "filter-text", "filter-norm", "filter-status", "filtered")
SECTIONS = {
    "under-way": "Under way or interrupted",
    "failures": "Failures",
    "runs": "Runs in detail",
    "corpora": "Corpora",
    "published": "Published numbers",
}


@dataclass(frozen=True)
class Unfinished:
    """A run folder without a record. state: "running" or "interrupted"."""

    path: Path
    state: str
    changed: str


@dataclass(frozen=True)
class Line:
    """A line of a table, with the link of its numbers and the values it is filtered by."""

    cells: list[Cell]
    href: str
    norm: str
    statuses: frozenset[str] = frozenset()
    id: str = ""


@dataclass(frozen=True)
class Lines:
    """A table with links and filters; numeric columns are aligned to the right."""

    title: str
    header: list[str]
    lines: list[Line]
    notes: list[Note]

    @property
    def numeric(self) -> list[bool]:
        """Say for each column if it holds numbers."""
        return [
            any(isinstance(line.cells[i], Number) for line in self.lines)
            for i in range(len(self.header))
        ]


@dataclass(frozen=True)
class Section:
    """The part of the page about one task."""

    task: str
    id: str
    published: PublishedTask | None
    rows: list[Row]
    tables: list[Lines]
    chart: Chart | None
    after_chart: list[Lines]


def unfinished_runs(results: Path) -> list[Unfinished]:
    """Find the run folders below `results`/runs that have a configuration and no record."""
    unfinished = []
    for config in sorted((results / "runs").glob("*/*/config.yaml")):
        folder = config.parent
        if not (folder / "record.json").exists():
            log = folder / "log.txt"
            seconds = (log if log.exists() else config).stat().st_mtime
            changed = datetime.fromtimestamp(seconds, UTC).isoformat(" ", timespec="minutes")
            state = "running" if RunFolder(folder).in_use() else "interrupted"
            changed = changed.replace("+00:00", " UTC")
            unfinished.append(Unfinished(folder.relative_to(results), state, changed))
    return unfinished


def report_html(
    rows_by_task: dict[str, list[Row]],
    paper: Paper,
    causality: Mapping[Path, CausalityRecord],
    unfinished: Iterable[Unfinished],
    made_at: str,
) -> str:
    """Write the whole page; made_at is the time in the format of `utc_now()`."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    content = _Content(rows_by_task, paper, causality)
    unfinished = list(unfinished)
    return _template().render(
        page=content,
        own_sections=[section for section in content.sections if section.rows],
        empty_sections=[section for section in content.sections if not section.rows],
        section_counts={"under-way": len(unfinished), "failures": len(content.failures.lines)},
        runs=content.runs,
        statuses=Counter(run.status for run in content.runs.values()),
        num_causality=len(causality),
        unfinished=unfinished,
        made_at=made_at[:16].replace("T", " "),
        about=ABOUT_THE_NUMBERS.format(protocol="results/PROTOCOL.md"),
        marks=MARKS,
        section_titles=SECTIONS,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8") + colours.as_css()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["yaml"] = _yaml
    environment.globals |= {"formatting": formatting, "row_name": row_name}
    return environment.get_template("report.html")


class _Content:
    """The content of the template and the ids of its links."""

    def __init__(
        self,
        rows_by_task: dict[str, list[Row]],
        paper: Paper,
        causality: Mapping[Path, CausalityRecord],
    ) -> None:
        self.paper = paper
        self._causality = causality
        self._taken = {*FIXED_IDS, *SECTIONS}
        self.rows_by_task = rows_by_task
        every_row = [row for rows in rows_by_task.values() for row in rows]
        self.runs: dict[Path, Record] = {}
        for row in every_row:
            self.runs |= row.runs
        self.ids = {path: self._new_id(run.task, path.stem) for path, run in self.runs.items()}
        self.ids |= {
            path: self._new_id("causality", record.task, path.stem)
            for path, record in causality.items()
        }
        self._row_ids = {
            id(row): self._new_id("row", row.first.task, row_name(row, rows))
            for rows in rows_by_task.values()
            for row in rows
        }
        published = [*paper.values, *paper.differences]
        self._published_ids = {
            _name(entry): self._new_id("published", *filter(None, _name(entry)))
            for entry in published
        }
        self.repeated = Repeated(self.runs)
        self._norms = {run.label: run.norm for run in self.runs.values()}
        self._corpora: dict[str, str] = {}
        for run in self.runs.values():
            if _canonical(run.corpus) not in self._corpora:
                self._corpora[_canonical(run.corpus)] = self._new_id("corpus", run.task)
        self.published = self._published(published)
        self.sections = [self._section(task) for task in paper.in_order(rows_by_task)]
        self.failures = self._failures(every_row)
        self.norms = self._norm_names(entry.norm for entry in published)

    @property
    def corpora(self) -> dict[str, Record]:
        """One run per corpus, by the id of the corpus."""
        return {self.corpus_id(run): run for run in self.runs.values()}

    def row_id(self, row: Row) -> str:
        """Give the id of the detailed list of the row's runs."""
        return self._row_ids[id(row)]

    def href(self, row: Row) -> str:
        """Link to the record of a row's only run, or to the list of its runs."""
        only = len(row.runs) == 1
        return "#" + (self.ids[next(iter(row.runs))] if only else self.row_id(row))

    def norm_of(self, label: str) -> str:
        """Give the norm of the runs with that label; the label itself if there are none."""
        return self._norms.get(label, label)

    def corpus_id(self, run: Record) -> str:
        """Give the id of the description of the run's corpus."""
        return self._corpora[_canonical(run.corpus)]

    def number_href(self, number: Number, line: Line) -> str:
        """Link a published number to its source and a number of ours to its records."""
        entry = number.published
        return line.href if entry is None else "#" + self._published_ids[_name(entry)]

    def headline(self, run: Record) -> str:
        """Give name and value of the run's primary metric."""
        value = value_of(run.metrics.get("test", {}), metric := PRIMARY_METRIC[run.kind])
        if value is None:
            return ""
        return f"test {metric_name(metric)} {formatting.number(value, metric)}"

    def causality_of(self, task: str) -> dict[Path, CausalityRecord]:
        """Give the causality records of a task's runs."""
        return {path: record for path, record in self._causality.items() if record.task == task}

    def _section(self, task: str) -> Section:
        rows, own = self.rows_by_task.get(task, []), self.causality_of(task)
        tables = [
            self._of_rows(f"Results: {budget}" if budget else "Results", content, rows)
            for budget, content in results_tables(task, rows, self.paper)
        ]
        compared = differences_table(task, rows, self.paper)
        if compared.rows:
            tables.append(self._of_differences(compared, rows))
        after = []
        task_id = self._new_id("task", task)
        if rows:
            if own:
                after.append(self._of_causality(causality_table(task, own), own))
            after.append(self._of_rows("Runs", runs_table(rows), rows))
        return Section(
            task=task,
            id=task_id,
            published=self.paper.task(task),
            rows=rows,
            tables=tables,
            chart=chart(rows, f"chart-{task_id}"),
            after_chart=after,
        )

    def _of_rows(self, title: str, table: Table, rows: list[Row]) -> Lines:
        """Make lines from a table whose last cell links the records of the line, or none."""
        lines, row_of = [], {path: row for row in rows for path in row.runs}
        for line in table.rows:
            paths = [link.target for link in line[-1]]
            if not paths:
                lines.append(Line(line, "", self.norm_of(line[0]), frozenset(["no runs"])))
                continue
            row = row_of[paths[0]]
            href = f"#{self.ids[paths[0]]}" if len(paths) == 1 else self.href(row)
            statuses = frozenset(self.runs[path].status for path in paths)
            lines.append(Line(line, href, row.first.norm, statuses))
        return Lines(title, table.header, lines, table.notes)

    def _of_differences(self, table: Table, rows: list[Row]) -> Lines:
        """Make lines with links to the records of both rows."""
        lines = []
        for line, difference in zip(table.rows, differences(rows), strict=True):
            both = [difference.row, difference.baseline]
            links = [
                Link(f"{row_name(row, rows)}, seed {run.seed}", path)
                for row in both
                for path, run in row.runs.items()
                if run.seed in difference.sample.values
            ]
            statuses = frozenset(self.runs[link.target].status for link in links)
            href = self.href(difference.row)
            lines.append(Line([*line, links], href, difference.row.first.norm, statuses))
        header = [*table.header, "records"]
        return Lines("Differences on the same seeds", header, lines, table.notes)

    def _of_causality(self, table: Table, causality: Mapping[Path, CausalityRecord]) -> Lines:
        lines = [
            Line(line, f"#{self.ids[path]}", self.norm_of(record.label))
            for line, (path, record) in zip(table.rows, causality.items(), strict=True)
        ]
        return Lines(CAUSALITY_TITLE, table.header, lines, table.notes)

    def _published(self, entries: Iterable[Published]) -> Lines:
        table = published_table(self.paper)
        lines = []
        for line, entry in zip(table.rows, entries, strict=True):
            own = self._published_ids[_name(entry)]
            lines.append(Line(line, f"#{own}", self.norm_of(entry.norm), id=own))
        return Lines(SECTIONS["published"], table.header, lines, table.notes)

    def _failures(self, rows: Iterable[Row]) -> Lines:
        lines = []
        for row in rows:
            for path, run in row.runs.items():
                if run.status == "complete":
                    continue
                line: list[Cell] = [
                    run.task,
                    row_name(row, self.rows_by_task[run.task]),
                    str(run.seed),
                    run.status,
                    formatting.count(run.diverged_at_update or run.num_updates),
                    " ".join((run.reason or "").split()),
                    [Link("record", path)],
                ]
                lines.append(Line(line, f"#{self.ids[path]}", run.norm, frozenset([run.status])))
        header = ["task", "norm", "seed", "status", "at update", "reason", "record"]
        return Lines("Runs that diverged or failed", header, lines, [])

    def _norm_names(self, published: Iterable[str]) -> dict[str, str]:
        """Map each norm in the filter to the name shown: "power (PN)", with its shortest label."""
        labels: dict[str, set[str]] = {}
        for label in {*self._norms, *published}:
            labels.setdefault(self.norm_of(label), set()).add(label)
        shown = {}
        for norm, own in sorted(labels.items()):
            shortest = min(own, key=lambda label: (len(label), label))
            shown[norm] = norm if shortest == norm else f"{norm} ({shortest})"
        return shown

    def _new_id(self, *parts: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-")
        name, number = plain, 1
        while name in self._taken:
            number += 1
            name = f"{plain}-{number}"
        self._taken.add(name)
        return name


def _name(entry: Published) -> tuple[str, str, str | None, str]:
    return entry.task, entry.norm, entry.minus, entry.metric


def _canonical(corpus: Mapping[str, Any]) -> str:
    return json.dumps(corpus, sort_keys=True)


def _yaml(content: Any) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(content, Dumper=dumper, allow_unicode=True, width=100).rstrip()
