"""The tables of results, differences, runs and published numbers."""

from normexp.report import formatting
from normexp.report.aggregate import (
    PRIMARY_METRIC,
    Row,
    by_budget,
    differences,
    label_sort_key,
    row_name,
)
from normexp.report.formatting import metric_name, with_marks
from normexp.report.notes import notes
from normexp.report.paper import Paper, Published
from normexp.report.table import Cell, Link, Number, Table

SHOWN = (
    ("test", "bleu_tokenised"),
    ("test", "bleu_compound_split"),
    ("test", "bleu_compound_split_published"),
    ("test", "sacrebleu"),
    ("test", "perplexity_per_word"),
    ("test", "perplexity_per_token"),
    ("test", "streamed_perplexity_per_word"),
    ("valid", "bleu_tokenised"),
    ("valid", "perplexity_per_word"),
    ("valid", "perplexity_per_token"),
)


def results_tables(task: str, rows: list[Row], paper: Paper) -> list[tuple[str, Table]]:
    """Tabulate norms by metrics, runs of every budget apart, each table with its budget.

    The first has the published numbers: of the paper's budget, or of most runs. The budget is ""
    where there is one table.
    """
    groups = by_budget(rows)
    if len(groups) < 2:
        return [("", results_table(task, rows, paper))]
    (first, rows_of_first), *others = groups
    return [
        (first or "the paper's setting", results_table(task, rows_of_first, paper)),
        *((budget, results_table(task, own, paper, alone=True)) for budget, own in others),
    ]


def results_table(task: str, rows: list[Row], paper: Paper, alone: bool = False) -> Table:
    """Tabulate norms by metrics: ours, the published number, and the difference if comparable.

    A norm with a published number and without runs has a row of its own. alone: leave the published
    numbers out.
    """
    published = [] if alone else paper.values_of(task)
    metrics = _shown_metrics(rows, published)
    header = ["norm"]
    for split, metric in metrics:
        header.append(f"{split} {metric_name(metric)}")
        if _has_paper(published, split, metric):
            header += ["published", "ours − published"]
    header += ["runs", "records"]

    lines: list[tuple[tuple[int, str], list[Cell]]] = []
    for row in rows:
        line: list[Cell] = [with_marks(row_name(row, rows), row)]
        for split, metric in metrics:
            line.append(_ours(row, split, metric))
            if _has_paper(published, split, metric):
                line += _published_and_difference(row, paper.value(task, row.label, metric))
        num_complete = sum(run.status == "complete" for run in row.runs.values())
        by_seed = sorted(row.runs.items(), key=lambda item: item[1].seed)
        line.append(f"{num_complete} of {len(row.runs)} complete")
        line.append([Link(f"seed {run.seed}", path) for path, run in by_seed])
        lines.append((label_sort_key(row.label), line))
    for entry in published:
        if any(paper.value(task, row.label, entry.metric) == entry for row in rows):
            continue
        line = [entry.norm]
        for split, metric in metrics:
            line.append("—")
            if _has_paper(published, split, metric):
                line += [formatting.published(entry) if metric == entry.metric else "", ""]
        lines.append((label_sort_key(entry.norm), [*line, "no runs", []]))
    lines.sort(key=lambda ranked: ranked[0])  # stable: rows of one label stay in their order
    return Table(header, [line for _, line in lines], notes(rows, published))


def differences_table(task: str, rows: list[Row], paper: Paper) -> Table:
    """Tabulate differences to the baseline, paired by seed, with the verdicts of PROTOCOL.md."""
    lines: list[list[Cell]] = []
    for difference in differences(rows):
        row, baseline, metric = difference.row, difference.baseline, difference.metric
        interval: Cell = ""
        if (ends := difference.sample.interval) is not None:
            low, high = (formatting.number(end, metric, signed=True) for end in ends)
            interval = Number(f"{low} to {high}", ends[0])
        theirs = ""
        if (entry := paper.difference(task, row.label, baseline.label, metric)) is not None:
            theirs = formatting.published(entry) if entry.applies_to(row) else "not comparable"
        lines.append(
            [
                with_marks(f"{row_name(row, rows)} − {row_name(baseline, rows)}", row),
                f"test {metric_name(metric)}",
                formatting.mean(difference.sample, metric, signed=True),
                interval,
                difference.verdict,
                theirs,
            ]
        )
    header = ["difference", "metric", "mean ± sd", "95 % interval", "verdict", "published"]
    return Table(header, lines)


def runs_table(rows: list[Row]) -> Table:
    """Tabulate status, cost, hardware and code version of every run."""
    lines: list[list[Cell]] = []
    for row in rows:
        for path, run in sorted(row.runs.items(), key=lambda item: item[1].seed):
            speed, epochs = run.tokens_per_second, run.num_epochs
            lines.append(
                [
                    with_marks(row_name(row, rows), row),
                    str(run.seed),
                    formatting.status(run),
                    formatting.count(run.num_updates),
                    "" if epochs is None else Number(f"{epochs:g}", epochs),
                    formatting.count(run.num_parameters),
                    "" if speed is None else Number(f"{speed:,.0f}", speed),
                    formatting.peak_memory(run),
                    formatting.duration(run.wall_time_seconds),
                    formatting.hardware(run.hardware),
                    run.code_commit[:7] + (" (modified)" if run.code_dirty else ""),
                    run.config_hash[:8],
                    run.finished_at[:10],
                    [Link("record", path)],
                ]
            )
    header = ["norm", "seed", "status", "updates", "epochs", "parameters", "tokens/s"]
    header += ["peak memory", "wall time", "hardware", "commit", "config", "date", "record"]
    return Table(header, lines)


def published_table(paper: Paper) -> Table:
    """Tabulate every published number with its source."""
    lines: list[list[Cell]] = [
        [
            entry.task,
            entry.norm if entry.minus is None else f"{entry.norm} − {entry.minus}",
            metric_name(entry.metric),
            formatting.published(entry),
            "yes" if entry.verified else "no",
            entry.layer or "",
            entry.source,
            entry.setting or paper.tasks[entry.task].setting or "",
        ]
        for entry in [*paper.values, *paper.differences]
    ]
    header = ["task", "norm", "metric", "value", "verified", "layer", "source", "setting"]
    return Table(header, lines)


def _shown_metrics(rows: list[Row], published: list[Published]) -> list[tuple[str, str]]:
    """Give (split, metric) of the columns; the CSV files have all metrics."""
    present = {("test", entry.metric) for entry in published}
    present |= {("test", PRIMARY_METRIC[row.first.kind]) for row in rows}
    for row in rows:
        for run in row.runs.values():
            present |= {(split, name) for split, metrics in run.metrics.items() for name in metrics}
    return [column for column in SHOWN if column in present]


def _has_paper(published: list[Published], split: str, metric: str) -> bool:
    return split == "test" and any(entry.metric == metric for entry in published)


def _ours(row: Row, split: str, metric: str) -> str:
    if (sample := row.sample(split, metric)) is not None:
        return formatting.mean(sample, metric)
    ends = {run.status for run in row.runs.values()} - {"complete"}
    return "/".join(sorted(ends)) or "—"


def _published_and_difference(row: Row, entry: Published | None) -> list[Cell]:
    if entry is None:
        return ["", ""]
    if not entry.applies_to(row):
        return ["not comparable", ""]
    sample = row.sample("test", entry.metric)
    # Published values have one decimal; more digits of the difference would mean nothing.
    ours: Cell = ""
    if sample is not None:
        difference = sample.mean - entry.value
        ours = Number(formatting.minus(f"{difference:+.1f}"), difference)
    return [formatting.published(entry), ours]
