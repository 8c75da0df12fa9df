"""What must be said below a table of results so that nobody misreads it."""

from collections.abc import Iterator

from normexp.report.aggregate import Row, label_rank, row_name
from normexp.report.cells import BUDGET, FUTURE, UNVERIFIED, Link, Note, metric_name, status
from normexp.report.paper import Published


def notes(rows: list[Row], published: list[Published]) -> list[Note]:
    """Runs that are not in the means, rows kept apart, budgets, marks and BLEU signatures."""
    found = [note for row in rows for note in _left_out(row, row_name(row, rows))]
    for label in sorted({row.label for row in rows}, key=label_rank):
        names = [row_name(row, rows) for row in rows if row.label == label]
        if len(names) > 1:
            found.append(
                Note(
                    f"{', '.join(names)} differ in configuration, corpus or budget "
                    "and are therefore not averaged."
                )
            )
    for budget in sorted({row.first.budget for row in rows if row.first.budget}):
        names = [row_name(row, rows) for row in rows if row.first.budget == budget]
        found.append(Note(f"{BUDGET} {', '.join(names)}: {budget.rstrip('.')}."))
    if any(row.first.sees_future_tokens for row in rows):
        text = "the model sees the tokens it predicts: not the perplexity of a language model."
        found.append(Note(f"{FUTURE} {text}"))
    if any(not entry.verified for entry in published):
        found.append(Note(f"{UNVERIFIED} published number, not verified at its source."))
    own = [f"{entry.norm} {entry.value} ({entry.setting})" for entry in published if entry.setting]
    if own:
        found.append(Note(f"Published in another setting, not compared: {', '.join(own)}."))
    return found + list(_signatures(rows))


def _left_out(row: Row, name: str) -> Iterator[Note]:
    for path, run in row.runs.items():
        link = Link("record", path)
        if run.status != "complete":
            yield Note(f"{name}, seed {run.seed}: {status(run)}; not in the mean.", link)
            continue
        absent = [
            f"{split} {metric_name(metric)}"
            for split, metrics in sorted(run.metrics.items())
            for metric, value in sorted(metrics.items())
            if value is None
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
