"""Warm-ups of the norms: what one of their steps is, and trainings that end within a warm-up.

Until the end of its warm-up a norm divides by each batch's own statistics; only then the running
ones take over. A training with no more steps than that is one of another norm: PN is then PN-V.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn

from normexp.norms import available_norms, norm_class
from normexp.norms.running_norm import RunningNorm

WARMUP = "warmup_steps"


def what_counts(cfg: DictConfig, sites: Mapping[str, Mapping[str, Any]], ranks: int) -> list[str]:
    """Return lines that say of which tokens the norms' statistics are, and how warm-ups count.

    cfg: fairseq's configuration. sites: site -> {"name": NAME, option: value}. Empty where no norm
    has running statistics.
    """
    running = [norm for norm in sites.values() if issubclass(norm_class(norm["name"]), RunningNorm)]
    if not running:
        return []
    limits = {"tokens": cfg.dataset.max_tokens, "sentences": cfg.dataset.batch_size}
    size = " and ".join(f"{limit} {unit}" for unit, limit in limits.items() if limit is not None)
    over = f"one forward pass, of at most {size}, padding included"
    if ranks > 1:
        pooled = {bool(norm.get("sync")) for norm in running}
        over += f" on each of {ranks} ranks, "
        over += " or ".join(
            "whose tokens count together" if together else "each with statistics of its own"
            for together in sorted(pooled, reverse=True)
        )
    lines = [f"a step of the running statistics is {over}"]
    per_update = list(cfg.optimization.update_freq)
    if per_update != [1]:
        many = per_update[0] if len(per_update) == 1 else f"{per_update} (by epoch)"
        lines.append(
            f"an update has {many} steps (update_freq): statistics are not of all its batches"
        )
    for name, steps in dict.fromkeys((norm["name"], norm.get(WARMUP)) for norm in running):
        if steps:
            as_updates = f" = {math.ceil(steps / per_update[0])} updates"
            lines.append(f"warm-up of {name}: {steps} steps" + as_updates * (len(per_update) == 1))
    return lines


def too_short(cfg: DictConfig, model: nn.Module, batches: int) -> list[str]:
    """Return a warning for each norm of the model whose warm-up outlasts the training.

    cfg: fairseq's configuration, in which max_update or max_epoch limits the training. batches: of
    a rank in an epoch. A training that ends earlier, by patience for example, is not foreseen.
    """
    longest = max((warmup for _, warmup in _with_warmup(model)), default=0)
    steps = _steps(cfg, batches, enough=longest + 1)
    if steps is None:
        return []
    # A model that begins with another's weights may have its steps, too.
    return _unfinished(model, lambda norm: max(steps, int(norm.step)))


def notes(model: nn.Module) -> list[str]:
    """Return a note for each norm of a trained model that never left its warm-up."""
    return _unfinished(model, lambda norm: int(norm.step))


def _with_warmup(model: nn.Module) -> Iterator[tuple[RunningNorm, int]]:
    for module in model.modules():
        if isinstance(module, RunningNorm) and (warmup := getattr(module, WARMUP, 0)):
            yield module, warmup


def _unfinished(model: nn.Module, steps_of: Callable[[RunningNorm], int]) -> list[str]:
    names = {norm_class(name): name for name in available_norms()}
    found: dict[str, None] = {}  # a set in order
    for norm, warmup in _with_warmup(model):
        if (steps := steps_of(norm)) <= warmup:
            name = names[type(norm)]
            found[
                f"{name} never leaves its warm-up of {warmup} steps in a training of {steps}: each "
                "step normalizes by its own batch's statistics, the running ones serve evaluation "
                "only" + "; this is PN-V" * (name == "power")
            ] = None
    return list(found)


def _steps(cfg: DictConfig, batches: int, enough: int) -> int | None:
    """Return the most steps of the training; None where there is no limit, or at least `enough`."""
    limits, steps, updates = cfg.optimization, 0, 0
    max_epoch, max_update = limits.max_epoch or math.inf, limits.max_update or math.inf
    epoch = 1
    while epoch <= max_epoch and updates < max_update:
        if steps >= enough or not batches:
            return None
        per_update = limits.update_freq[min(epoch, len(limits.update_freq)) - 1]
        in_epoch = min(math.ceil(batches / per_update), max_update - updates)
        updates += in_epoch
        steps += min(batches, in_epoch * per_update)
        epoch += 1
    return steps
