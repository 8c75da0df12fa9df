"""Perplexity, which divergence makes infinite."""

import math


def perplexity(nats: float) -> float:
    """Return exp(nats), the perplexity of a mean negative log-likelihood in nats.

    It is infinity where no float is as large (above 709.78 nats), and NaN for NaN.
    """
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
