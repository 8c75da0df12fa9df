"""Evaluate a run again from its folder and set the numbers beside those of its record."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from normexp.config.validation import validate
from normexp.corpora import prepare
from normexp.errors import UserError
from normexp.evaluation.evaluate_run import evaluate_run
from normexp.runs.folder import RunFolder
from normexp.runs.records import read_record

CHANGEABLE = ("evaluation.", "data.")


def main(path: Path, overrides: list[str], fold: bool) -> None:
    """Print the metrics of a run folder.

    overrides: KEY=VALUE of `evaluation` and `data`. Raises UserError for a folder that is none of a
    run, and for other or invalid overrides.
    """
    for override in overrides:
        if not override.startswith(CHANGEABLE) or "=" not in override:
            raise UserError(
                f"{override!r}: only evaluation.<key>=<value> and data.<key>=<value> may follow "
                "the run folder; other settings belong to training"
            )
    folder = RunFolder(path.absolute())
    settings = folder.read_settings().with_overrides(overrides)
    validate(settings)
    corpus = prepare(settings.task.corpus, settings.data.dir, settings.data.local)
    evaluated = evaluate_run(settings, folder, corpus, fold)
    recorded = read_record(folder.record).metrics if folder.record.is_file() else {}
    folded = ", norms folded" if fold else ""
    table = Table()
    for column in ("split", "metric", "now", "record"):
        table.add_column(column, justify="left" if column in ("split", "metric") else "right")
    for split, values in evaluated.metrics.items():
        for name, value in values.items():
            table.add_row(split, name, _shown(value), _shown(recorded.get(split, {}).get(name)))
    console = Console()
    console.print(f"{path} ({evaluated.checkpoint}{folded})", soft_wrap=True, markup=False)
    console.print(table)


def _shown(value: float | str | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value or "")
