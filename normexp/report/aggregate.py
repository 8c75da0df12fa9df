"""Rows of runs that may be averaged, their means, and differences paired by seed.

The rules are those of results/PROTOCOL.md.
"""

import hashlib
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from normexp.runs.metric_values import value_of
from normexp.runs.records import Record

LABEL_ORDER = ("LN", "BN", "BN-released", "PN-V", "PN", "PN-released", "PN-released-mt")
BASELINE = "LN"
PRIMARY_METRIC = {"translation": "bleu_tokenised", "language_model": "perplexity_per_word"}
HIGHER_IS_BETTER = ("bleu_tokenised", "sacrebleu")
MIN_SEEDS_TO_JUDGE = 3


@dataclass(frozen=True)
class Sample:
    """Values of one metric by seed."""

    values: Mapping[int, float]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean; infinite where a sum of the values is."""
        try:
            return statistics.fmean(self.values.values())
        except OverflowError:
            return math.inf

    @property
    def sd(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for one seed, and beside an infinity."""
        if self.n < 2 or not math.isfinite(self.mean):
            return None
        return statistics.stdev(self.values.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None where `sd` is None."""
        if self.sd is None:
            return None
        from scipy.stats import t  # here, because it takes a second to load

        half = float(t.ppf(0.975, self.n - 1)) * self.sd / self.n**0.5
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Row:
    """The runs of one label with the same configuration, corpus and budget."""

    runs: Mapping[Path, Record]

    # Kept, because rows are compared with each other.
    @cached_property
    def first(self) -> Record:
        """One run of the row, for the values that all of them share."""
        return next(iter(self.runs.values()))

    @cached_property
    def label(self) -> str:
        """The label that the runs share."""
        return self.first.label

    @cached_property
    def setting(self) -> tuple[str, str, str]:
        """Budget, seeing of future tokens and corpus, which two compared rows must share."""
        return _setting(self.first)

    def sample(self, split: str, metric: str) -> Sample | None:
        """Collect the values of the complete runs, also infinite ones; None if there are none."""
        values = {
            run.seed: value
            for run in self.runs.values()
            if run.status == "complete"
            and (value := value_of(run.metrics.get(split, {}), metric)) is not None
        }
        return Sample(values) if values else None


@dataclass(frozen=True)
class Difference:
    """A row minus the baseline's row, on the seeds that both have."""

    row: Row
    baseline: Row
    metric: str
    sample: Sample

    @property
    def verdict(self) -> str:
        """The verdict by the rule of PROTOCOL.md."""
        if self.sample.n < MIN_SEEDS_TO_JUDGE:
            return f"not judged: fewer than {MIN_SEEDS_TO_JUDGE} seeds"
        if (interval := self.sample.interval) is None:
            return "not judged: not all perplexities are finite"
        low, high = interval
        if low <= 0 <= high:
            return "no difference shown"
        better = (low > 0) == (self.metric in HIGHER_IS_BETTER)
        return f"{self.row.label if better else self.baseline.label} is better"


def rows_by_task(records: Mapping[Path, Record]) -> dict[str, list[Row]]:
    """Group records into rows; runs of different configuration, corpus or budget are separate."""
    groups: dict[tuple, dict[Path, Record]] = defaultdict(dict)
    for path, run in records.items():
        groups[run.task, label_sort_key(run.label), run.config_hash, _setting(run)][path] = run
    rows: dict[str, list[Row]] = defaultdict(list)
    for (task, *_), runs in sorted(groups.items(), key=lambda group: group[0]):
        rows[task].append(Row(runs))
    return dict(rows)


def by_budget(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Separate rows by their budget: the paper's ("") first, then those with the most runs."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.first.budget or ""].append(row)

    def order(group: tuple[str, list[Row]]) -> tuple[bool, int, str]:
        budget, own = group
        return bool(budget), -sum(len(row.runs) for row in own), budget

    return sorted(groups.items(), key=order)


def differences(rows: Iterable[Row]) -> list[Difference]:
    """Compare every row with every baseline row of the same setting, in the primary metric.

    "LN-causal" is the baseline of the other labels that end with "-causal", and so is
    "LN+optimization.lr=0.01" of those that end alike.
    """
    rows = list(rows)
    compared = []
    for baseline in (row for row in rows if _is_baseline(row)):
        suffix = baseline.label.removeprefix(BASELINE)
        for row in rows:
            if _is_baseline(row) or not row.label.endswith(suffix):
                continue
            if row.setting != baseline.setting:
                continue
            metric = PRIMARY_METRIC[row.first.kind]
            ours, theirs = row.sample("test", metric), baseline.sample("test", metric)
            shared = sorted(ours.values.keys() & theirs.values.keys()) if ours and theirs else []
            if shared:
                paired = Sample({seed: ours.values[seed] - theirs.values[seed] for seed in shared})
                compared.append(Difference(row, baseline, metric, paired))
    return compared


def row_name(row: Row, rows: Iterable[Row]) -> str:
    """Give the label, with the hash of the configuration if several of `rows` have the label."""
    namesakes = [other for other in rows if other.label == row.label]
    if len(namesakes) == 1:
        return row.label
    tag = row.first.config_hash[:8]
    if len({other.first.config_hash for other in namesakes}) < len(namesakes):
        tag += "/" + hashlib.sha256(repr(row.setting).encode()).hexdigest()[:6]
    return f"{row.label} [{tag}]"


def label_sort_key(label: str) -> tuple[int, str]:
    """Sort the paper's norms in the paper's order, then the others by name."""
    known = label in LABEL_ORDER
    return (LABEL_ORDER.index(label) if known else len(LABEL_ORDER), label)


def _is_baseline(row: Row) -> bool:
    return re.split(r"[-+]", row.label)[0] == BASELINE


def _setting(run: Record) -> tuple[str, str, str]:
    return run.budget or "", str(run.sees_future_tokens), json.dumps(run.corpus, sort_keys=True)
