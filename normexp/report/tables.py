"""The tables of the report, as cells that every output format writes in its own way."""

from normexp.report import cells
from normexp.report.aggregate import PRIMARY_METRIC, Row, differences, label_rank, row_name
from normexp.report.cells import Cell, Link, Number, Table, metric_name, with_marks
from normexp.report.notes import notes
from normexp.report.paper import Paper, Published

SHOWN = (
    ("test", "bleu_tokenised"),
    ("test", "bleu_compound_split"),
    ("test", "sacrebleu"),
    ("test", "perplexity_per_word"),
    ("test", "perplexity_per_token"),
    ("test", "streamed_perplexity_per_word"),
    ("valid", "bleu_tokenised"),
    ("valid", "perplexity_per_word"),
    ("valid", "perplexity_per_token"),
)


def results_table(task: str, rows: list[Row], paper: Paper) -> Table:
    """Norms by metrics: ours, the paper's, and their difference where the settings are equal.

    A norm that only the paper has is a row as well.
    """
    published = paper.values_of(task)
    metrics = _shown_metrics(rows, published)
    header = ["norm"]
    for split, metric in metrics:
        header.append(f"{split} {metric_name(metric)}")
        if _has_paper(published, split, metric):
            header += ["paper", "ours − paper"]
    header += ["runs", "records"]

    lines: list[tuple[tuple[int, str], list[Cell]]] = []
    for row in rows:
        line: list[Cell] = [with_marks(row_name(row, rows), row)]
        for split, metric in metrics:
            line.append(_ours(row, split, metric))
            if _has_paper(published, split, metric):
                line += _beside(row, paper.value(task, row.label, metric))
        num_complete = sum(run.status == "complete" for run in row.runs.values())
        by_seed = sorted(row.runs.items(), key=lambda item: item[1].seed)
        line.append(f"{num_complete} of {len(row.runs)} complete")
        line.append([Link(f"seed {run.seed}", path) for path, run in by_seed])
        lines.append((label_rank(row.label), line))
    for entry in published:
        if any(paper.value(task, row.label, entry.metric) == entry for row in rows):
            continue
        line = [entry.norm]
        for split, metric in metrics:
            line.append("—")
            if _has_paper(published, split, metric):
                line += [cells.published(entry) if metric == entry.metric else "", ""]
        lines.append((label_rank(entry.norm), [*line, "no runs", []]))
    lines.sort(key=lambda ranked: ranked[0])  # stable: rows of one label stay in their order
    return Table(header, [line for _, line in lines], notes(rows, published))


def differences_table(task: str, rows: list[Row], paper: Paper) -> Table:
    """Differences to the baseline, paired by seed, with the verdict of the rule in PROTOCOL.md."""
    lines: list[list[Cell]] = []
    for found in differences(rows):
        metric, interval = found.metric, found.sample.interval
        entry = paper.difference(task, found.row.label, found.baseline.label, metric)
        theirs = ""
        if entry is not None:
            theirs = cells.published(entry) if entry.applies_to(found.row) else "not comparable"
        names = f"{row_name(found.row, rows)} − {row_name(found.baseline, rows)}"
        ends = (
            [] if interval is None else [cells.number(end, metric, signed=True) for end in interval]
        )
        lines.append(
            [
                with_marks(names, found.row),
                f"test {metric_name(metric)}",
                cells.mean(found.sample, metric, signed=True),
                Number(" to ".join(ends), interval[0]) if ends else "",
                found.verdict,
                theirs,
            ]
        )
    header = ["difference", "metric", "mean ± sd", "95 % interval", "verdict", "paper"]
    return Table(header, lines)


def runs_table(rows: list[Row]) -> Table:
    """One line per run: how it ended, what it cost, where and with which code it was made."""
    lines: list[list[Cell]] = []
    for row in rows:
        for path, run in sorted(row.runs.items(), key=lambda item: item[1].seed):
            speed, epochs = run.tokens_per_second, run.num_epochs
            lines.append(
                [
                    with_marks(row_name(row, rows), row),
                    str(run.seed),
                    cells.status(run),
                    cells.count(run.num_updates),
                    "" if epochs is None else Number(f"{epochs:g}", epochs),
                    cells.count(run.num_parameters),
                    "" if speed is None else Number(f"{speed:,.0f}", speed),
                    cells.memory(run.peak_memory_bytes),
                    cells.duration(run.wall_time_seconds),
                    cells.hardware(run.hardware),
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
    """Every published number with its source."""
    lines: list[list[Cell]] = [
        [
            entry.task,
            entry.norm if entry.minus is None else f"{entry.norm} − {entry.minus}",
            metric_name(entry.metric),
            cells.published(entry),
            "yes" if entry.verified else "no",
            entry.source,
            entry.setting or paper.tasks[entry.task].setting or "",
        ]
        for entry in [*paper.values, *paper.differences]
    ]
    header = ["task", "norm", "metric", "value", "verified", "source", "setting"]
    return Table(header, lines)


def _shown_metrics(rows: list[Row], published: list[Published]) -> list[tuple[str, str]]:
    """(split, metric) of the columns; the CSV files have all metrics."""
    found = {("test", entry.metric) for entry in published}
    found |= {("test", PRIMARY_METRIC[row.first.kind]) for row in rows}
    for row in rows:
        for run in row.runs.values():
            found |= {(split, name) for split, metrics in run.metrics.items() for name in metrics}
    return [column for column in SHOWN if column in found]


def _has_paper(published: list[Published], split: str, metric: str) -> bool:
    return split == "test" and any(entry.metric == metric for entry in published)


def _ours(row: Row, split: str, metric: str) -> str:
    if (sample := row.sample(split, metric)) is not None:
        return cells.mean(sample, metric)
    ends = {run.status for run in row.runs.values()} - {"complete"}
    return "/".join(sorted(ends)) or "—"


def _beside(row: Row, entry: Published | None) -> list[Cell]:
    if entry is None:
        return ["", ""]
    if not entry.applies_to(row):
        return ["not comparable", ""]
    sample = row.sample("test", entry.metric)
    # Published values have one decimal; more digits of the difference would mean nothing.
    ours: Cell = ""
    if sample is not None:
        difference = sample.mean - entry.value
        ours = Number(cells.minus(f"{difference:+.1f}"), difference)
    return [cells.published(entry), ours]
