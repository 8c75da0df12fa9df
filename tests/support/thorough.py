"""The marker `thorough`: cases that repeat others over implementations, layers or orders."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def default_cases(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Values for parametrize: those in `default` always run, the others are `thorough`."""
    cases = list(cases)
    missing = [case for case in default if case not in cases]
    assert not missing, f"no such cases: {missing}"
    return [
        case if case in default else pytest.param(case, marks=pytest.mark.thorough)
        for case in cases
    ]
