"""Checks of a run's settings that can be made before any work, across their groups."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from normexp.config.fairseq_config import model_config, typed_config
from normexp.config.settings import ExperimentSettings, window_stride
from normexp.errors import UserError
from normexp.norms import norm_class
from normexp.norms.running_norm import RunningNorm
from normexp.sites import resolve_sites

Sites = dict[str, dict[str, Any]]
"""Site -> {"name": NAME, option: value, ...}."""


@dataclass(frozen=True)
class ValidRun:
    """What follows from settings that passed every check.

    fairseq: fairseq's typed configuration, see `fairseq_config.typed_config`.
    """

    sites: Sites
    fairseq: DictConfig


def validate(settings: ExperimentSettings) -> ValidRun:
    """Check everything that can be checked without data.

    Raises UserError naming the cause, the known alternatives and the key to change.
    """
    _check_windows(settings)
    _check_blocks(settings.fairseq)
    _check_hardware(settings)
    try:
        sites = resolve_sites(settings.task.kind, model_config(settings))
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_ranks(settings, sites)
    typed = typed_config(settings)
    _check_stopping(typed)
    _check_criterion(settings, typed, sites)
    return ValidRun(sites, typed)


def _check_windows(settings: ExperimentSettings) -> None:
    evaluation = settings.evaluation
    if evaluation.context_window == 0 and evaluation.stride is None:
        return
    if settings.task.kind != "language_model":
        raise UserError("evaluation.context_window and evaluation.stride are for language models")
    length = settings.fairseq["task"].get("tokens_per_sample", 1024)  # fairseq's default
    window_stride(length, evaluation.context_window, evaluation.stride)


def _check_blocks(fairseq: dict[str, dict[str, Any]]) -> None:
    task = fairseq["task"]
    if task.get("streams"):
        from normexp.fairseq_plugin.streams import check_streams

        try:
            check_streams(
                task["streams"],
                fairseq["dataset"].get("batch_size"),
                task.get("sample_break_mode", "none"),
            )
        except ValueError as error:
            raise UserError(f"fairseq.task and fairseq.dataset: {error}") from None
    if task.get("sample_break_mode") == "eos" and not hasattr(np, "compat"):
        raise UserError(
            "fairseq.task.sample_break_mode=eos fails in fairseq-fixed with NumPy "
            f"{np.__version__}; use complete or none, or an older NumPy (1.26)"
        )


def _check_stopping(typed: DictConfig) -> None:
    limits = typed.optimization
    ends = limits.max_epoch, limits.max_update, limits.stop_time_hours, typed.checkpoint.patience
    if not any(end is not None and end > 0 for end in ends):
        raise UserError(
            "this run would never end: set fairseq.optimization.max_epoch or max_update, or "
            "fairseq.checkpoint.patience"
        )


def _check_hardware(settings: ExperimentSettings) -> None:
    import torch

    on_gpu = torch.cuda.is_available() and not settings.on_cpu
    if settings.fairseq["common"].get("fp16") and not on_gpu:
        raise UserError(
            "fairseq.common.fp16=true needs a GPU and there is none (or fairseq.common.cpu=true); "
            "add fairseq.common.fp16=false"
        )


def _check_ranks(settings: ExperimentSettings, sites: Sites) -> None:
    if settings.distributed.ranks == 1:
        return
    given = set(settings.fairseq.get("distributed_training", {})) - {"distributed_world_size"}
    if given:
        raise UserError(
            f"fairseq.distributed_training.{min(given)} is set by normexp where there are several "
            "ranks; leave it out"
        )
    for site, norm in sites.items():
        alone = issubclass(norm_class(norm["name"]), RunningNorm) and "sync" not in norm
        if alone and settings.distributed.synchronized:
            raise UserError(
                f"norm {norm['name']!r} ({site}) has no statistics over several ranks: choose "
                "distributed.statistics=local, by which each rank has its own, or one rank"
            )


def _check_criterion(settings: ExperimentSettings, typed: DictConfig, sites: Sites) -> None:
    name = typed.criterion._name
    stock = name.removeprefix("normexp_")
    adaptive_loss = stock == "adaptive_loss"
    adaptive_softmax = typed.model.get("adaptive_softmax_cutoff") is not None
    if adaptive_loss != adaptive_softmax:
        raise UserError(
            "fairseq.criterion._name=normexp_adaptive_loss and "
            "fairseq.model.adaptive_softmax_cutoff belong together: set both or neither"
        )
    if name == "adaptive_loss":
        raise UserError(
            "fairseq.criterion._name=adaptive_loss leaves words out of the loss: use "
            "normexp_adaptive_loss"
        )
    if settings.task.kind == "language_model" and stock == "label_smoothed_cross_entropy":
        raise UserError(
            "label smoothing makes perplexities meaningless: use fairseq.criterion._name="
            "normexp_cross_entropy for a language model"
        )
    penalized = [
        norm["name"] for norm in sites.values() if hasattr(norm_class(norm["name"]), "penalty")
    ]
    if penalized and name == stock:
        raise UserError(
            f"norm {penalized[0]!r} has a penalty that fairseq.criterion._name={name} would leave "
            f"out of the loss: use normexp_{name}"
        )
