"""Scalars that show whether normalization layers are sane: their statistics and gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normexp.sites import site_of

SECOND_MOMENTS = ("psi2", "var")
"""Statistics that are positive per channel and are reported by their mean over the channels."""


def norm_diagnostics(model: nn.Module) -> dict[str, float]:
    """Summarise the statistics of every layer that offers them.

    A layer offers them by a method `statistics()` that returns a dict of tensors with one entry
    per channel. Second moments (`psi2`, `var`) give their mean over the channels; every other
    statistic is a signed vector (`nu`, `mean`) and gives its L2 norm. Keys look like
    `norm/encoder_attention/0/psi2_mean` and `.../nu_norm`: the site as in normexp.sites and the
    layer, or a module's path where it is at none of these sites. `.../rejected` counts the passes
    of this process whose statistics were not finite and therefore left out. A model without such
    layers gives an empty dict.
    """
    return _transferred(_statistics(model))


@contextmanager
def update_diagnostics(
    trainer: Any, report: Callable[[int, dict[str, float]], None]
) -> Iterator[None]:
    """Around fairseq's Trainer.train_step: diagnostics of every update that fairseq logs.

    After each update that is a multiple of common.log_interval, on the master process only, calls
    report(update, values) with what norm_diagnostics gives and, per site,

    - `grad_norm`: L2 norm of the gradient of the site's parameters as the optimizer got it, that
      is per token of the batch, averaged over the ranks and clipped. Left out where weights are
      float16 or bfloat16, whose gradients fairseq unscales in a copy of its own.
    - `psi2_distance`, `var_distance`: |batch - running| / |running|, L2 norms over the channels, of
      the batch's statistic and the running one of before the update.
    - `mean_distance`: |batch - running| of the mean, in standard deviations: divided by the square
      root of the sum of running_var.

    The layers do not hand out a batch's statistics; the step of the running ones tells them, as
    running_t = kept running_(t-1) + (1 - kept) batch. So "the batch" is what the layer averages
    (with `unified` after its warm-up the mean of its window; with statistics of one rank each, the
    master's), and with several forwards in one update, as with update_freq, the mean of their
    statistics with weights that fall by the layer's alpha from the last to the first. NaN where
    no batch of the update could be used. A layer whose `retained` gives None has no distances.

    Nothing of this changes training: state is only read.
    """
    update = trainer.get_num_updates() + 1
    if update % trainer.cfg.common.log_interval or not trainer.is_data_parallel_master:
        yield
        return
    before = _snapshot(trainer.get_model())
    yield
    if trainer.get_num_updates() != update:  # fp16: an overflow, and nothing was updated
        return
    model = trainer.get_model()
    scalars = _statistics(model) | _distances(before) | _gradient_norms(model)
    report(update, _transferred(scalars))


@dataclass(frozen=True)
class _Before:
    """What a layer's statistics were before an update."""

    layer: nn.Module
    step: Tensor
    statistics: dict[str, Tensor]


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Key and module of every normalization: what stands at a site, or offers statistics."""
    for path, module in model.named_modules():
        site = site_of(path)
        if site is not None or callable(getattr(module, "statistics", None)):
            yield f"norm/{site or path}", module


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    scalars = {}
    for site, module in _sites(model):
        if not callable(getattr(module, "statistics", None)):
            continue
        for name, value in module.statistics().items():
            value = value.detach().double()
            if name in SECOND_MOMENTS:
                scalars[f"{site}/{name}_mean"] = value.mean()
            else:
                scalars[f"{site}/{name}_norm"] = value.norm()
        if hasattr(module, "rejected"):
            scalars[f"{site}/rejected"] = module.rejected.double()
    return scalars


def _snapshot(model: nn.Module) -> dict[str, _Before]:
    return {
        site: _Before(
            module,
            module.step.clone(),
            {name: value.detach().clone() for name, value in module.statistics().items()},
        )
        for site, module in _sites(model)
        if callable(getattr(module, "retained", None))
    }


def _distances(before: dict[str, _Before]) -> dict[str, Tensor]:
    scalars = {}
    for site, then in before.items():
        kept = then.layer.retained(then.step, then.layer.step)
        if kept is None:
            continue
        now = then.layer.statistics()
        for name, running in then.statistics.items():
            if name in SECOND_MOMENTS:
                unit = running.double().norm()
            elif name == "mean":
                unit = then.statistics["var"].double().sum().sqrt()
            else:
                continue  # not an average of something that a batch has in forward
            moved = (now[name].detach().double() - running.double()).norm()
            scalars[f"{site}/{name}_distance"] = moved / ((1 - kept.double()) * unit)
    return scalars


def _gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    scalars = {}
    for site, module in _sites(model):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients and all(g.dtype in (torch.float32, torch.float64) for g in gradients):
            scalars[f"{site}/grad_norm"] = torch.stack(
                [g.double().norm() for g in gradients]
            ).norm()
    return scalars


def _transferred(scalars: dict[str, Tensor]) -> dict[str, float]:
    """To the host: one transfer from the device instead of one per scalar."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
