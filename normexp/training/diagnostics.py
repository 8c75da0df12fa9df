"""Scalars that show whether normalization layers work: their statistics and gradients."""

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
    """Summarise the statistics of every layer with a method `statistics()`.

    That method returns a dict of tensors (C,). Of second moments (`psi2`, `var`) the result has the
    mean over the channels, of every other statistic, a signed vector (`nu`, `mean`), the L2 norm.
    Keys look like `norm/encoder_attention/0/psi2_mean` and `.../nu_norm`: the site as in
    normexp.sites and the layer, or the module's path where it is at none of these sites.
    `.../rejected` counts the passes of this process whose statistics were not finite and therefore
    left out. Empty for a model without such layers.
    """
    return _transferred(_statistics(dict(_sites(model))))


@contextmanager
def update_diagnostics(
    trainer: Any, report: Callable[[int, dict[str, float]], None]
) -> Iterator[None]:
    """Report diagnostics of the update done in this context, if fairseq logs that update.

    The context surrounds one call of fairseq's Trainer.train_step. After each update that is a
    multiple of common.log_interval, on the master process only, it calls report(update, values)
    with the result of norm_diagnostics and, per site,

    - `grad_norm`: L2 norm of the gradient of the site's parameters as the optimizer got it, that
      is per token of the batch, averaged over the ranks and clipped. Left out where weights are
      float16 or bfloat16, whose gradients fairseq unscales in a copy of its own.
    - `psi2_distance`, `var_distance`: |batch - running| / |running|, L2 norms over the channels, of
      the batch's statistic and the running one before the update. No unit.
    - `mean_distance`: |batch - running| of the mean, in standard deviations: divided by the square
      root of the sum of running_var.

    The batch's statistic is computed from the step of the running one, because layers do not keep
    it: running_t = kept running_(t-1) + (1 - kept) batch. So "the batch" is what the layer averages
    (with `unified` after its warm-up the mean of its window; with statistics of one rank each, the
    master's). With several forwards in one update, as with update_freq, it is the mean of their
    statistics with weights that fall by the layer's alpha from the last to the first. NaN where
    no batch of the update could be used. A layer whose `decay_over` gives None has no distances.

    Training is not changed: state is only read.
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
    """The running statistics (C,) of a layer before an update, and its step count."""

    step: Tensor
    averages: dict[str, Tensor]


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield key and module of every normalization: at a site, or with a method `statistics`."""
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
            scalars[f"{site}/rejected"] = module.settled("num_rejected").double()
    return scalars


def _averages(layer: nn.Module) -> dict[str, Tensor]:
    """Return the statistics (C,) that forward passes average; backward passes average nu."""
    averaged = (*SECOND_MOMENTS, "mean")
    return {name: x.detach() for name, x in layer.statistics().items() if name in averaged}


def _snapshot(sites: _Sites) -> dict[str, _Before]:
    before = {}
    for site, layer in sites.items():
        if callable(getattr(layer, "decay_over", None)):
            # Statistics before the step: reading them waits for an all-reduce that is under way.
            averages = {
                name: x.to(torch.float64, copy=True) for name, x in _averages(layer).items()
            }
            before[site] = _Before(layer.settled("step").clone(), averages)
    return before


def _distances(sites: _Sites, before: Mapping[str, _Before]) -> dict[str, Tensor]:
    scalars = {}
    for site, then in before.items():
        layer = sites[site]
        kept = layer.decay_over(then.step, layer.settled("step"))
        if kept is None:
            continue
        for name, now in _averages(layer).items():
            running = then.averages[name]
            unit = then.averages["var"].sum().sqrt() if name == "mean" else running.norm()
            moved = (now.double() - running).norm()
            scalars[f"{site}/{name}_distance"] = moved / ((1 - kept) * unit)
    return scalars


def _gradient_norms(sites: _Sites) -> dict[str, Tensor]:
    gradients = {
        site: [p.grad for p in module.parameters() if p.grad is not None]
        for site, module in sites.items()
    }
    full = (torch.float32, torch.float64)
    gradients = {
        site: grads for site, grads in gradients.items() if grads and grads[0].dtype in full
    }
    if not gradients:
        return {}
    # One kernel for all parameters, then one norm per site.
    norms = iter(torch._foreach_norm([grad for grads in gradients.values() for grad in grads]))
    return {
        f"{site}/grad_norm": torch.stack(list(itertools.islice(norms, len(grads)))).double().norm()
        for site, grads in gradients.items()
    }


def _transferred(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Return the scalars as floats, by one transfer from the device instead of one each."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
