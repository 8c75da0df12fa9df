"""How names, marks and numbers are written in tables."""

import math
from collections.abc import Mapping
from typing import Any

from normexp.report.aggregate import Row, Sample
from normexp.report.paper import Published
from normexp.report.table import Number
from normexp.runs.metric_values import value_of
from normexp.runs.records import Record

UNVERIFIED, BUDGET, FUTURE = "†", "‡", "§"
ABOUT_THE_NUMBERS = """\
Every number is the mean ± standard deviation over n seeds of the runs whose records are linked in
its row. The rules under which the runs were made and compared, written before they were run, are
in {protocol}"""
MARKS = {
    UNVERIFIED: "a published number that has not been verified at its source",
    BUDGET: "a smaller budget than the paper's: not comparable with the paper",
    FUTURE: """a language model that sees future tokens, those it predicts among them, as the
  published ones do; its number is not the perplexity of a language model, and only comparable
  with others of this kind""",
}

METRIC_NAMES = {
    "bleu_tokenised": "BLEU (tokenised)",
    "bleu_compound_split": "BLEU (tokenised, compounds split)",
    "bleu_compound_split_published": "BLEU (compounds split, by the published scripts)",
    "sacrebleu": "sacreBLEU",
    "perplexity_per_word": "PPL per word",
    "perplexity_per_token": "PPL per token",
    "streamed_perplexity_per_word": "streamed PPL per word",
    "loss_per_token_nats": "loss (nats per token)",
}

_MANY_DIGITS = 1e9


def metric_name(metric: str) -> str:
    """Give the name of a metric in a heading."""
    return METRIC_NAMES.get(metric, metric)


def with_marks(name: str, row: Row) -> str:
    """Add the marks for a small budget and for a model that sees future tokens."""
    marks = BUDGET * bool(row.first.budget) + FUTURE * bool(row.first.sees_future_tokens)
    return f"{name} {marks}" if marks else name


def mean(sample: Sample, metric: str, signed: bool = False) -> Number:
    """Format mean, standard deviation and number of seeds, as in "35.81 ± 0.05 (n = 3)"."""
    sd = "" if sample.sd is None else f" ± {number(sample.sd, metric)}"
    text = f"{number(sample.mean, metric, signed)}{sd} (n = {sample.n})"
    return Number(text, sample.mean)


def number(value: float, metric: str, signed: bool = False) -> Number:
    """Format a value with the number of decimals of its metric; ∞ where it is infinite."""
    if math.isinf(value):
        return Number(("+" * signed if value > 0 else "−") + "∞", value)
    if math.isnan(value):
        return Number("undefined", value)
    if abs(value) >= _MANY_DIGITS:
        return Number(minus(f"{value:{'+' if signed else ''}.2e}"), value)
    return Number(minus(f"{value:{'+' if signed else ''}.{_decimals(metric)}f}"), value)


def recorded(metrics: Mapping[str, Any], name: str) -> str | float:
    """Give a metric as a record has it, but a null as what it stands for."""
    if metrics[name] is not None:
        return metrics[name]
    return "not finite" if value_of(metrics, name) is None else "∞"


def published(entry: Published) -> Number:
    """Format a number as it was published; a difference has its sign."""
    value = str(entry.value) if entry.minus is None else f"{entry.value:+}"
    if entry.sd is not None:
        value = f"{entry.value:.2f} ± {entry.sd:.2f}"
    about = "≈ " * entry.approximate
    mark = "" if entry.verified else f" {UNVERIFIED}"
    return Number(about + minus(value) + mark, entry.value, published=entry)


def minus(text: str) -> str:
    """Replace the hyphen of a number by a minus sign."""
    return text.replace("-", "−")


def status(run: Record) -> str:
    """Describe the end of a run, as in "diverged at update 1,200: the loss is NaN"."""
    reason = " ".join((run.reason or "").split())
    at = "" if run.diverged_at_update is None else f" at update {run.diverged_at_update:,}"
    return f"{run.status}{at}" + (f": {reason}" if reason else "")


def count(value: int | None) -> str:
    """Format a count with separators; empty if unknown."""
    return "" if value is None else Number(f"{value:,}", value)


def memory(num_bytes: int | None) -> str:
    """Format a size in GiB; empty if unknown."""
    return "" if num_bytes is None else Number(f"{num_bytes / 2**30:.2f} GiB", num_bytes)


def peak_memory(run: Record) -> str:
    """Format the peak of a run; with ≤ where it may be that of an earlier run in its process."""
    size = memory(run.peak_memory_bytes)
    if not isinstance(size, Number) or run.peak_memory_of == "run":
        return size
    return Number(f"≤ {size}", size.value)


def duration(seconds: float | None) -> str:
    """Format a duration as seconds, or as hours and minutes; empty if unknown."""
    if seconds is None:
        return ""
    if seconds < 59.5:
        return Number(f"{seconds:.0f} s", seconds)
    hours, minutes = divmod(round(seconds / 60), 60)
    return Number(f"{hours} h {minutes:02d} min", seconds)


def hardware(facts: Mapping[str, Any]) -> str:
    """Name the GPUs of `hardware_facts()`, or the processor if there are none."""
    gpus = facts.get("gpus") or []
    if gpus:
        return ", ".join(f"{gpus.count(name)} × {name}" for name in sorted(set(gpus)))
    cores = facts.get("num_cores")
    return str(facts.get("processor", "")) + (f", {cores} cores" if cores else "")


def _decimals(metric: str) -> int:
    return 3 if metric.startswith("loss") else 2
