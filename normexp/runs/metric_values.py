"""Metrics as a record has them: JSON knows neither infinity nor NaN, and both become null."""

import math
from collections.abc import Mapping
from typing import Any


def value_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return the number of a metric, or None where there is none.

    metrics: those of one split. A perplexity that is null beside a finite loss is infinite: its
    exponent exceeded what a float can hold.
    """
    value = metrics.get(name)
    if isinstance(value, int | float) and not math.isnan(value):
        return value
    if name in metrics and value is None and _loss_beside(metrics, name) is not None:
        return math.inf
    return None


def unknown_values(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the metrics that are not numbers, as in "test loss_per_token_nats".

    metrics: by split, then by name. An infinite perplexity is a number, an infinite loss is none.
    """
    return [
        f"{split} {name}"
        for split, values in metrics.items()
        for name, value in values.items()
        if not isinstance(value, str) and not _is_known(values, name)
    ]


def _is_known(metrics: Mapping[str, Any], name: str) -> bool:
    value = value_of(metrics, name)
    if value == math.inf and "perplexity" in name:
        return _loss_beside(metrics, name) is not None
    return value is not None and math.isfinite(value)


def _loss_beside(metrics: Mapping[str, Any], name: str) -> float | None:
    """Return the finite loss that a perplexity is made of; None where there is none."""
    convention, found, _ = name.partition("perplexity_per_")
    loss = metrics.get(f"{convention}loss_per_token_nats") if found else None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None
