"""The notes below a table of results."""

from collections.abc import Iterator

from normexp.report import formatting
from normexp.report.aggregate import Row, label_sort_key, row_name
from normexp.report.formatting import BUDGET, FUTURE, UNVERIFIED, metric_name, status
from normexp.report.paper import Published
from normexp.report.table import Link, Note
from normexp.runs.metric_values import value_of


def notes(rows: list[Row], published: list[Published]) -> list[Note]:
    """Explain runs left out of the means, separate rows, budgets, marks and BLEU signatures."""
    shown = [note for row in rows for note in _left_out(row, row_name(row, rows))]
    for label in sorted({row.label for row in rows}, key=label_sort_key):
        names = [row_name(row, rows) for row in rows if row.label == label]
        if len(names) > 1:
            shown.append(
                Note(
                    f"{', '.join(names)} differ in configuration, corpus or budget "
                    "and are therefore not averaged."
                )
            )
    for budget in sorted({row.first.budget for row in rows if row.first.budget}):
        names = [row_name(row, rows) for row in rows if row.first.budget == budget]
        shown.append(Note(f"{BUDGET} {', '.join(names)}: {budget.rstrip('.')}."))
    if any(row.first.sees_future_tokens for row in rows):
        text = "the model sees the tokens it predicts: not the perplexity of a language model."
        shown.append(Note(f"{FUTURE} {text}"))
    if any(not entry.verified for entry in published):
        shown.append(Note(f"{UNVERIFIED} published number, not verified at its source."))
    layers = [
        f"{entry.norm} {formatting.published(entry)}: {entry.layer}"
        for entry in published
        if entry.layer
    ]
    if layers:
        shown.append(Note(f"Which layer a published number is of: {'; '.join(layers)}."))
    in_setting: dict[str, list[str]] = {}
    for entry in published:
        if entry.setting:
            number = f"{entry.norm} {formatting.published(entry)}"
            in_setting.setdefault(entry.setting, []).append(number)
    if in_setting:
        groups = [f"{', '.join(own)} ({setting})" for setting, own in in_setting.items()]
        shown.append(Note(f"Published in another setting, not compared: {'; '.join(groups)}."))
    return shown + list(_signatures(rows))


def _left_out(row: Row, name: str) -> Iterator[Note]:
    for path, run in row.runs.items():
        link = Link("record", path)
        for note in run.notes:
            yield Note(f"{name}, seed {run.seed}: {note}.", link)
        if run.status != "complete":
            yield Note(f"{name}, seed {run.seed}: {status(run)}; not in the mean.", link)
            continue
        absent = [
            f"{split} {metric_name(metric)}"
            for split, metrics in sorted(run.metrics.items())
            for metric, value in sorted(metrics.items())
            if value is None and value_of(metrics, metric) is None
        ]
        if absent:
            text = f"{', '.join(absent)} is not a finite number; not in the mean."
            yield Note(f"{name}, seed {run.seed}: {text}", link)


def _signatures(rows: list[Row]) -> Iterator[Note]:
    users: dict[str, dict[str, None]] = {}  # dict as an ordered set
    for row in rows:
        for run in row.runs.values():
            if signature := run.metrics.get("test", {}).get("sacrebleu_signature"):
                users.setdefault(str(signature), {})[row_name(row, rows)] = None
    for signature, names in sorted(users.items()):
        whose = f" of {', '.join(names)}" if len(users) > 1 else ""
        yield Note(f"sacreBLEU signature{whose}: {signature}")
