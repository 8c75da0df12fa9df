"""Scalars that show whether normalization layers are sane: their statistics and gradients."""

import itertools
from collections.abc import Callable, Iterator, Mapping
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
    return _transferred(_statistics(dict(_sites(model))))


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
    no batch of the update could be used. A layer whose `decay_over` gives None has no distances.

    Nothing of this changes training: state is only read.
    """
    update = trainer.get_num_updates() + 1
    if update % trainer.cfg.common.log_interval or not trainer.is_data_parallel_master:
        yield
        return
    sites = dict(_sites(trainer.get_model()))
    before = _snapshot(sites)
    yield
    if trainer.get_num_updates() != update:  # fp16: an overflow, and nothing was updated
        return
    scalars = _statistics(sites) | _distances(sites, before) | _gradient_norms(sites)
    report(update, _transferred(scalars))


_Sites = Mapping[str, nn.Module]


@dataclass(frozen=True)
class _Before:
    """What a layer's averages of batches were before an update, and the step they were of."""

    step: Tensor
    averages: dict[str, Tensor]


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Key and module of every normalization: what stands at a site, or offers statistics."""
    for path, module in model.named_modules():
        site = site_of(path)
        if site is not None or callable(getattr(module, "statistics", None)):
            yield f"norm/{site or path}", module


def _statistics(sites: _Sites) -> dict[str, Tensor]:
    scalars = {}
    for site, module in sites.items():
        if not callable(getattr(module, "statistics", None)):
            continue
        for name, value in module.statistics().items():
            value = value.detach().double()
            if name in SECOND_MOMENTS:
                scalars[f"{site}/{name}_mean"] = value.mean()
            else:
                scalars[f"{site}/{name}_norm"] = value.norm()
        if hasattr(module, "num_rejected"):
            scalars[f"{site}/rejected"] = module.num_rejected.double()
    return scalars


def _averages(layer: nn.Module) -> dict[str, Tensor]:
    """Of a layer's statistics those that forwards average: not nu, which backwards do."""
    found = layer.statistics().items()
    return {name: x.detach() for name, x in found if name in (*SECOND_MOMENTS, "mean")}


def _snapshot(sites: _Sites) -> dict[str, _Before]:
    found = {}
    for site, layer in sites.items():
        if callable(getattr(layer, "decay_over", None)):
            # First the statistics: asking for them lets what is under way over the ranks arrive.
            averages = {
                name: x.to(torch.float64, copy=True) for name, x in _averages(layer).items()
            }
            found[site] = _Before(layer.step.clone(), averages)
    return found


def _distances(sites: _Sites, before: Mapping[str, _Before]) -> dict[str, Tensor]:
    scalars = {}
    for site, then in before.items():
        layer = sites[site]
        kept = layer.decay_over(then.step, layer.step)
        if kept is None:
            continue
        for name, now in _averages(layer).items():
            running = then.averages[name]
            unit = then.averages["var"].sum().sqrt() if name == "mean" else running.norm()
            moved = (now.double() - running).norm()
            scalars[f"{site}/{name}_distance"] = moved / ((1 - kept) * unit)
    return scalars


def _gradient_norms(sites: _Sites) -> dict[str, Tensor]:
    found = {
        site: [p.grad for p in module.parameters() if p.grad is not None]
        for site, module in sites.items()
    }
    whole = (torch.float32, torch.float64)
    found = {site: all_ for site, all_ in found.items() if all_ and all_[0].dtype in whole}
    if not found:
        return {}
    norms = iter(torch._foreach_norm([gradient for all_ in found.values() for gradient in all_]))
    return {
        f"{site}/grad_norm": torch.stack(list(itertools.islice(norms, len(all_)))).double().norm()
        for site, all_ in found.items()
    }


def _transferred(scalars: dict[str, Tensor]) -> dict[str, float]:
    """To the host: one transfer from the device instead of one per scalar."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
