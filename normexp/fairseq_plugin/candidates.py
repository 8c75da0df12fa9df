"""The candidates of a step of fairseq's beam search."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normexp.norms.kernels import native

_SOURCE = Path(__file__).with_suffix(".cpp")


class Candidates(NamedTuple):
    """Continuations of the beams of B sentences, best first, each (B, candidates).

    scores: sums of log-probabilities. beams: which beam they continue. words: by which word.
    """

    scores: Tensor
    beams: Tensor
    words: Tensor


def best_candidates(
    logits: Tensor,
    totals: Tensor,
    number: int,
    pad: int,
    *,
    without: int | None = None,
    only: int | None = None,
) -> Candidates:
    """Return the best of all continuations of each sentence's beams.

    logits: (B, K, V). totals: (B, K), the beams' scores so far. `pad` and the word `without` have
    no probability, nor has any word but `only`, nor anything where it is NaN. Where scores are
    equal, the order is that of torch.topk over all beams and words.
    """
    compiled = (
        only is None
        and logits.device.type == "cpu"
        and logits.dtype == torch.float32
        and native.load(_SOURCE)
    )
    if not compiled:
        return _by_topk(logits, totals, number, pad, without, only)
    never = -1 if without is None else without
    *found, unsure = torch.ops.normexp.best_candidates(logits, totals, number, pad, never)
    if unsure.any():
        again = _by_topk(logits[unsure], totals[unsure], number, pad, without, only)
        for values, others in zip(found, again, strict=True):
            values[unsure] = others
    return Candidates(*found)


def _by_topk(
    logits: Tensor,
    totals: Tensor,
    number: int,
    pad: int,
    without: int | None,
    only: int | None,
) -> Candidates:
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_probs.masked_fill_(log_probs.isnan(), -math.inf)
    log_probs[:, :, pad] = -math.inf
    if without is not None:
        log_probs[:, :, without] = -math.inf
    if only is not None:
        log_probs[:, :, :only] = -math.inf
        log_probs[:, :, only + 1 :] = -math.inf
    log_probs += totals[:, :, None]
    scores, index = log_probs.flatten(1).topk(number)
    size = logits.size(2)
    return Candidates(scores, index // size, index % size)
