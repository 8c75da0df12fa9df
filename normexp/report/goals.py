"""The table of the goals of speed and memory, beside what is measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.files import Unreadable, read_yaml
from normexp.report.table import Cell, Link, Table


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One quantity, as a multiple of a peer's or of an earlier build's.

    Attributes:
        what: The quantity, and what it is a multiple of.
        before: What it was, as text.
        goal: What it should be at most; None where there is no goal.
        record: The record in which it is found, without ".json"; "" where `now` is given.
        rows: The record's list of rows, dotted where it lies deeper.
        where: The entries by which the row is told from others.
        value: The row's entry: a number, or quartiles, of which the median counts.
        inverse: The entry is a speed-up, and the quantity one over it.
        now: Text in place of what a record says, for what has none; with the command.
        floor: The smallest value that is possible, or what stands in the way.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    what: str
    before: str
    goal: float | None
    record: str = ""
    rows: str = "measured"
    where: dict[str, Any] | None = None
    value: str = ""
    inverse: bool = False
    now: str = ""
    floor: str = ""


def load_goals(path: Path) -> list[Goal]:
    """Read a list of goals; raises UserError that says what is wrong with the file."""
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Goal]).validate_json(json.dumps(read_yaml(path)))
    except Unreadable as error:
        raise UserError(str(error)) from None
    except ValidationError as error:
        raise UserError(f"{path}: {invalid_fields(error)}") from None


def goals_table(goals: list[Goal], records: Mapping[str, Any], home: Path) -> Table:
    """Tabulate the goals with what the records in `home` say now.

    A goal that is reached has a check mark. Raises UserError where a record has no such row.
    """
    rows: list[list[Cell]] = []
    for goal in goals:
        now: Cell = goal.now
        reached = ""
        if goal.record:
            number = _value(goal, records)
            now = [Link(f"{number:.2f}", home / f"{goal.record}.json")]
            reached = " ✓" if goal.goal is not None and round(number, 2) <= goal.goal else ""
        wanted = "" if goal.goal is None else f"≤ {goal.goal:g}{reached}"
        rows.append([goal.what, goal.before, now, wanted, goal.floor])
    return Table(["what", "before", "now", "goal", "floor, or what stands in the way"], rows)


def _value(goal: Goal, records: Mapping[str, Any]) -> float:
    where = goal.where or {}
    content = records.get(goal.record, {})
    for key in goal.rows.split("."):
        content = content.get(key, {})
    found = [row for row in content if all(row.get(key) == value for key, value in where.items())]
    if len(found) != 1 or goal.value not in found[0]:
        raise UserError(
            f"goals.yaml, {goal.what}: {len(found)} rows of {goal.record}.json have {where} and "
            f"{goal.value}; one is needed"
        )
    value = found[0][goal.value]
    number = value[1] if isinstance(value, list) else value
    return 1 / number if goal.inverse else number
