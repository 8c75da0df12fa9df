"""Evaluate a run again from its folder and set the numbers beside those of its record."""

from pathlib import Path

from rich.table import Table

from normexp.config import terminal
from normexp.config.validation import validate
from normexp.corpora import prepare
from normexp.corpora.prepared import recorded_corpus
from normexp.errors import UserError
from normexp.evaluation import promotion
from normexp.evaluation.evaluate_run import evaluate_run
from normexp.runs.folder import RunFolder, hold
from normexp.runs.records import Metrics, read_record

CHANGEABLE = ("evaluation.", "data.")


def main(path: Path, overrides: list[str], fold: bool) -> None:
    """Print the metrics of a run folder, or BLEU of the translations of a committed record.

    overrides: KEY=VALUE of `evaluation` and `data`; of a record `data` only. Raises UserError for a
    path that is neither or is in use, and for other or invalid overrides.
    """
    if path.suffix == ".json":
        _rescore(path, overrides, fold)
        return
    for override in overrides:
        if not override.startswith(CHANGEABLE) or "=" not in override:
            raise UserError(
                f"{override!r}: only evaluation.<key>=<value> and data.<key>=<value> may follow "
                "the run folder; other settings belong to training"
            )
    folder = RunFolder(path.absolute())
    with hold(folder) as settings:
        settings = settings.with_overrides(overrides)
        validate(settings)
        corpus = prepare(
            settings.task.corpus,
            settings.data.dir,
            settings.data.local,
            splits=settings.evaluation.splits,
        )
        evaluated = evaluate_run(settings, folder, corpus, fold)
    recorded: dict[str, Metrics] = {}
    if folder.record.is_file():
        record = read_record(folder.record)
        recorded = record.metrics
        if difference := corpus.difference_from(recorded_corpus(record.corpus)):
            print(f"other data: {difference}", flush=True)
    folded = ", norms folded" if fold else ""
    _print(f"{path} ({evaluated.checkpoint}{folded})", evaluated.metrics, recorded)


def _rescore(path: Path, overrides: list[str], fold: bool) -> None:
    record = read_record(path)
    if record.kind != "translation" or record.status != "complete":
        raise UserError(f"{path} is of a run without translations; name a run folder")
    allowed = {"data.dir": "data", "data.local": ""}
    given = dict(override.partition("=")[::2] for override in overrides)
    if fold or not given.keys() <= allowed.keys():
        raise UserError(f"{path} is a record, no model: only data.dir= and data.local= may follow")
    places = allowed | given
    local = Path(places["data.local"]) if places["data.local"] else None
    results = path.absolute().parents[2]
    folder = promotion.translations_of(record, results)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the translations of this record are not committed")
    now = promotion.rescored(record, Path(places["data.dir"]), local, folder)
    _print(f"{path} (its translations)", now, record.metrics)


def _print(title: str, metrics: dict[str, Metrics], recorded: dict[str, Metrics]) -> None:
    table = Table()
    for column in ("split", "metric", "now", "record"):
        table.add_column(column, justify="left" if column in ("split", "metric") else "right")
    for split, values in metrics.items():
        for name, value in values.items():
            table.add_row(split, name, _shown(value), _shown(recorded.get(split, {}).get(name)))
    console = terminal.console()
    console.print(title, soft_wrap=True, markup=False)
    console.print(table)


def _shown(value: float | str | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value or "")
