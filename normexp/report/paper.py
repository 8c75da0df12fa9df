"""The published numbers of `results/paper.yaml`."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.files import Unreadable, read_yaml
from normexp.report.aggregate import Row

_STRICT: ConfigDict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number: a value of `norm`, or, with `minus`, a difference of two norms.

    Attributes:
        task: Task of the published number.
        norm: Our label of the layer that was measured; a name with its source in parentheses if
            the number is not compared with ours.
        layer: Which layer a published "PN" means, with or without group scaling.
        compare_with: Labels of our rows that the number is set beside.
        sd: Published standard deviation over seeds.
        approximate: The source says "around".
        verified: The number was read at its source.
        setting: The published setting if it is not the task's.
        sees_future_tokens: Of a language model; only equal ones are compared.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    task: str
    norm: str
    minus: str | None = None
    layer: str | None = None
    compare_with: list[str]
    metric: str
    value: float
    sd: float | None = None
    approximate: bool = False
    verified: bool
    source: str
    setting: str | None = None
    sees_future_tokens: bool | None = None

    def applies_to(self, row: Row) -> bool:
        """Say if the row has the published setting, so that the numbers can be subtracted."""
        run = row.first
        usual = run.budget is None and not run.departures
        return usual and run.sees_future_tokens == self.sees_future_tokens


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """The text above the table of a task.

    Attributes:
        setting: How the published numbers were obtained; None if there are none.
        meaning: What a reader must know about the numbers.
        also: Our tasks that share the published numbers.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    title: str
    setting: str | None = None
    meaning: str | None = None
    also: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """All published numbers; tasks are in the order of the file."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tasks: dict[str, PublishedTask]
    values: list[Published]
    differences: list[Published]

    def task(self, name: str) -> PublishedTask | None:
        """Find the published task of our task; None if the paper has no counterpart."""
        return self.tasks.get(self._published_name(name))

    def in_order(self, tasks: Collection[str]) -> list[str]:
        """Order tasks: the paper's, each followed by ours that share its numbers, then others."""
        ordered = []
        for name, published in self.tasks.items():
            ordered += [name, *(task for task in published.also if task in tasks)]
        return ordered + sorted(set(tasks) - set(ordered))

    def values_of(self, task: str) -> list[Published]:
        """List the published values for our task."""
        return [entry for entry in self.values if entry.task == self._published_name(task)]

    def value(self, task: str, label: str, metric: str) -> Published | None:
        """Find the published number for our row `label`."""
        for entry in self.values_of(task):
            if entry.metric == metric and label in entry.compare_with:
                return entry
        return None

    def difference(self, task: str, label: str, minus: str, metric: str) -> Published | None:
        """Find the published difference for our rows `label` and `minus`."""
        # A baseline can have a suffix, as LN-published.
        key = (self._published_name(task), minus.split("-")[0], metric)
        for entry in self.differences:
            if (entry.task, entry.minus, entry.metric) == key and label in entry.compare_with:
                return entry
        return None

    def _published_name(self, task: str) -> str:
        for name, published in self.tasks.items():
            if task in published.also:
                return name
        return task


def load_paper(path: Path) -> Paper:
    """Read and check the file; raises UserError that names the invalid entry."""
    try:
        return TypeAdapter(Paper).validate_json(json.dumps(read_yaml(path)))
    except Unreadable as error:
        raise UserError(str(error)) from None
    except ValidationError as error:
        raise UserError(f"{path}: {invalid_fields(error)}") from None
