"""The published numbers of `results/paper.yaml`."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.report.aggregate import Row

_STRICT: ConfigDict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number: a value of `norm`, or, with `minus`, a difference of two norms."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    task: str
    norm: str
    minus: str | None = None
    compare_with: list[str]
    metric: str
    value: float
    verified: bool
    source: str
    setting: str | None = None
    sees_future_tokens: bool | None = None

    def applies_to(self, row: Row) -> bool:
        """Whether the row was made in the published setting, so that numbers can be subtracted."""
        same_sight = row.first.sees_future_tokens == self.sees_future_tokens
        return row.first.budget is None and same_sight


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """What is said of a task above its table.

    setting: how the published numbers were obtained, None where there are none; meaning: what a
    reader must know of the numbers; also: tasks of ours that share the published ones.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    title: str
    setting: str | None = None
    meaning: str | None = None
    also: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """All published numbers; tasks in the order of the file."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tasks: dict[str, PublishedTask]
    values: list[Published]
    differences: list[Published]

    def task(self, name: str) -> PublishedTask | None:
        """What the paper says of the setting of our task."""
        return self.tasks.get(self._published_name(name))

    def in_order(self, tasks: Collection[str]) -> list[str]:
        """The paper's tasks, each followed by those of ours that share its numbers; the others."""
        found = []
        for name, published in self.tasks.items():
            found += [name, *(task for task in published.also if task in tasks)]
        return found + sorted(set(tasks) - set(found))

    def values_of(self, task: str) -> list[Published]:
        """The published values of our task."""
        return [entry for entry in self.values if entry.task == self._published_name(task)]

    def value(self, task: str, label: str, metric: str) -> Published | None:
        """The number that our row `label` is set beside."""
        for entry in self.values_of(task):
            if entry.metric == metric and label in entry.compare_with:
                return entry
        return None

    def difference(self, task: str, label: str, minus: str, metric: str) -> Published | None:
        """The published difference between what our rows `label` and `minus` stand for."""
        # A baseline can have a suffix, as LN-published.
        sought = (self._published_name(task), minus.split("-")[0], metric)
        for entry in self.differences:
            if (entry.task, entry.minus, entry.metric) == sought and label in entry.compare_with:
                return entry
        return None

    def _published_name(self, task: str) -> str:
        for name, published in self.tasks.items():
            if task in published.also:
                return name
        return task


def load_paper(path: Path) -> Paper:
    """Read and check the file; UserError names the entry that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(Paper).validate_json(json.dumps(content))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        raise UserError(f"{path}: {invalid_fields(error)}") from None
