"""Values of fairseq's settings that may be written in several ways, in one form.

fairseq's types ask for a list where one number is meant, and for the text "(0.9, 0.98)" where two
are. Who writes a number or a list gets the same run, with the same identity. Imports no fairseq.
"""

import ast
from collections.abc import Mapping
from typing import Any

from normexp.errors import UserError

LISTS: dict[str, type] = {"lr": float, "update_freq": int}
"""Settings of the group `optimization` that are lists, one entry per epoch, by type of entry."""

PAIRS = ("adam_betas",)
"""Settings of the group `optimizer` that are texts of two numbers."""


def in_one_form(fairseq: Mapping[str, Any]) -> dict[str, Any]:
    """Return fairseq's groups with these values as their types ask for.

    Raises UserError for a value of another kind.
    """
    formed = dict(fairseq)
    if isinstance(group := formed.get("optimization"), Mapping):
        lists = {key: _list(key, group[key]) for key in LISTS if key in group}
        formed["optimization"] = {**group, **lists}
    if isinstance(group := formed.get("optimizer"), Mapping):
        formed["optimizer"] = group | {key: _pair(key, group[key]) for key in PAIRS if key in group}
    return formed


def _list(key: str, value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    kind = LISTS[key]
    if not values or not all(type(one) in (int, kind) for one in values):
        what = "an integer" if kind is int else "a number"
        raise UserError(f"fairseq.optimization.{key}={value} must be {what} or a list of them")
    return [kind(one) for one in values]


def _pair(key: str, value: Any) -> str:
    try:
        numbers = ast.literal_eval(value) if isinstance(value, str) else value
        first, second = numbers
        return str((float(first), float(second)))
    except (ValueError, TypeError, SyntaxError):
        raise UserError(
            f"fairseq.optimizer.{key}={value} must be two numbers, such as "
            f"fairseq.optimizer.{key}=[0.9,0.98]"
        ) from None
