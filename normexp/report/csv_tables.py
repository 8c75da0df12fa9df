"""Tidy CSV files with full precision, for further computation."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from normexp.report.aggregate import Row
from normexp.report.paper import Paper

RESULT_COLUMNS = (
    *("task", "label", "norm", "config_hash", "budget", "sees_future_tokens", "split", "metric"),
    *("n", "mean", "sd", "seeds", "paper", "paper_layer", "paper_verified", "ours_minus_paper"),
    *("num_runs", "num_incomplete", "records"),
)
RUN_COLUMNS = (
    *("task", "label", "norm", "seed", "status", "diverged_at_update", "reason", "split", "metric"),
    *("value", "config_hash", "budget", "sees_future_tokens", "num_parameters", "num_updates"),
    *("num_epochs", "tokens_per_second", "peak_memory_bytes", "wall_time_seconds"),
    *("code_commit", "code_dirty", "finished_at", "record"),
)


def results_csv(rows: list[Row], paper: Paper, folder: Path) -> str:
    """Write one line per row and metric; paths of records are relative to `folder`."""
    return _csv(RESULT_COLUMNS, result_lines(rows, paper, folder))


def result_lines(rows: list[Row], paper: Paper, folder: Path) -> list[dict[str, Any]]:
    """Give the lines of `results_csv`; a line has only the columns that have a value."""
    lines = []
    for row in rows:
        first = row.first
        shared = {name: getattr(first, name) for name in RESULT_COLUMNS if hasattr(first, name)}
        shared["num_runs"] = len(row.runs)
        shared["num_incomplete"] = sum(run.status != "complete" for run in row.runs.values())
        shared["records"] = " ".join(_relative(path, folder) for path in row.runs)
        for split, metric in _numeric_metrics(row):
            line = shared | {"split": split, "metric": metric, "n": 0}
            if (sample := row.sample(split, metric)) is not None:
                seeds = " ".join(map(str, sorted(sample.values)))
                line |= {"n": sample.n, "mean": sample.mean, "sd": sample.sd, "seeds": seeds}
            entry = paper.value(first.task, row.label, metric) if split == "test" else None
            if entry is not None and entry.applies_to(row):
                line |= {
                    "paper": entry.value,
                    "paper_layer": entry.layer,
                    "paper_verified": entry.verified,
                }
                if sample is not None:
                    line["ours_minus_paper"] = sample.mean - entry.value
            lines.append(line)
    return lines


def runs_csv(rows: Iterable[Row], folder: Path) -> str:
    """Write one line per run and metric, and one line for a run without metrics."""
    lines = []
    for row in rows:
        for path, run in row.runs.items():
            shared = {name: getattr(run, name) for name in RUN_COLUMNS if hasattr(run, name)}
            shared["record"] = _relative(path, folder)
            values = [
                {"split": split, "metric": metric, "value": value}
                for split, metrics in sorted(run.metrics.items())
                for metric, value in sorted(metrics.items())
            ]
            lines += [shared | value for value in values or [{}]]
    return _csv(RUN_COLUMNS, lines)


def _numeric_metrics(row: Row) -> list[tuple[str, str]]:
    present = {
        (split, metric)
        for run in row.runs.values()
        for split, metrics in run.metrics.items()
        for metric, value in metrics.items()
        if not isinstance(value, str)
    }
    return sorted(present)


def _csv(columns: tuple[str, ...], lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
