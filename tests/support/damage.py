"""Damage to files as disks, editors and other versions do it, drawn by hypothesis."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normexp.errors import UserError

ODD = [
    *(None, True, False, 0, -1, 3, 2**70, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "3", "nan", "../x", "\0", "\udc80", "a" * 300, "${a}", "${oc.env:NO}", "[1, 2]"),
    *([], [None], [[]], [1, 2, 3], ["x"], {}, {"a": 1}, {"": None}, {"_name": 3}, [{"a": []}]),
]
"""Values of other types and sizes than most settings have."""

DOCUMENTS = [
    *(b"", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"1e999", b"[" * 100_000, b"\xff\xfe{}"),
    *(b"{", b'{"a": 1e999}', b"\0" * 64, b"- a\n- b\n", b"a: b: c", b"*a", b"!!python/none x"),
    *(b"&a [*a]", b"2001-99-99", b"a: 2001-01-01", b"? [1]\n: 2", b"\xef\xbb\xbf{}", b"9" * 5000),
]
"""What may stand in place of a JSON or YAML file."""


def paths(content: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in nested dictionaries and lists, the whole one's included."""
    parts = {}
    if isinstance(content, dict):
        parts = content
    elif isinstance(content, list):
        parts = dict(enumerate(content[:3]))  # the others are of the same kind
    below = [found for key, value in parts.items() for found in paths(value, (*path, key))]
    return [path, *below]


def changed(content: Any, path: tuple, value: Any) -> Any:
    """Return the content with another value at the path."""
    if not path:
        return value
    whole = copy.deepcopy(content)
    node = whole
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return whole


def without(content: Any, path: tuple) -> Any:
    """Return the content without what is at the path."""
    whole = copy.deepcopy(content)
    node = whole
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return whole


@st.composite
def damaged_values(draw: st.DrawFn, content: Any) -> Any:
    """Draw a nested content in which one value is odd, missing, or under an unknown name."""
    path = draw(st.sampled_from(paths(content)))
    how = draw(st.sampled_from(["odd", "odd", "odd", "missing", "more"]))
    if how == "missing" and path:
        return without(content, path)
    if how == "more" and isinstance(path and _at(content, path), dict):
        return changed(content, (*path, draw(st.sampled_from(["x", "", "_name"]))), None)
    return changed(content, path, draw(st.sampled_from(ODD)))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: Any, text: bytes | None = None) -> bytes:
    """Draw the bytes of a damaged file. content: the values in it; text: it as it is (JSON)."""
    text = json.dumps(content).encode() if text is None else text
    how = draw(st.sampled_from(["values", "values", "values", "cut", "byte", "document", "twice"]))
    if how == "values":
        return json.dumps(draw(damaged_values(content))).encode("utf-8", "surrogatepass")
    if how == "document":
        return draw(st.sampled_from(DOCUMENTS))
    if how == "twice":
        return text + text
    place = draw(st.integers(0, len(text) - 1))
    if how == "cut":
        return text[:place]
    return text[:place] + bytes([draw(st.integers(0, 255))]) + text[place + 1 :]


def _at(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def fuzzed(strategy: st.SearchStrategy, read: Callable[[Any], object], examples: int) -> None:
    """Call `read` with drawn damage; it may raise UserError."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(damage: Any) -> None:
        try:
            read(damage)
        except UserError as error:
            assert "\n" not in str(error), f"more than one line: {error}"

    run()
