"""Checks of a run's settings that can be made before any work, across their groups."""

import ast
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from normexp.config.fairseq_config import check_languages, model_config, typed_config, with_defaults
from normexp.config.settings import ExperimentSettings, window_stride
from normexp.corpora.catalogue import load_catalogue
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
    _check_schedule(typed)
    _check_batches(typed)
    _check_chosen_checkpoint(settings, typed)
    _check_languages(typed, settings.task.corpus)
    _check_layerdrop(settings, typed, sites)
    _check_criterion(settings, typed, sites)
    _check_output_width(typed)
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


def _check_schedule(typed: DictConfig) -> None:
    """Build optimizer and schedule for one parameter, so that what they refuse is known now."""
    import torch
    from fairseq.optim import build_optimizer, lr_scheduler

    betas = typed.optimizer.get("adam_betas")
    if isinstance(betas, str):
        try:
            ast.literal_eval(betas)  # fairseq evaluates the text as Python
        except (ValueError, SyntaxError):
            raise UserError(
                f"fairseq.optimizer.adam_betas={betas} must be two numbers, such as (0.9, 0.98)"
            ) from None
    complete = with_defaults(typed)
    parameter = torch.nn.Parameter(torch.zeros(1))
    group, name = "optimizer", typed.optimizer._name
    try:
        optimizer = build_optimizer(complete.optimizer, [parameter])
        group, name = "lr_scheduler", typed.lr_scheduler._name
        lr_scheduler.build_lr_scheduler(complete.lr_scheduler, optimizer).step_update(0)
    except Exception as error:  # their checks are assertions, and divisions by zero
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"fairseq.{group}: {name} refuses its settings: {reason}") from None


def _check_batches(typed: DictConfig) -> None:
    dataset = typed.dataset
    if dataset.max_tokens is None and dataset.batch_size is None:
        raise UserError(
            "set the size of a batch: fairseq.dataset.max_tokens or fairseq.dataset.batch_size"
        )


def _check_chosen_checkpoint(settings: ExperimentSettings, typed: DictConfig) -> None:
    if settings.evaluation.checkpoint == "best" and settings.save_interval > 1:
        raise UserError(
            f"fairseq.checkpoint.save_interval={settings.save_interval} leaves out epochs that may "
            "be better than those that are saved: use 1, or evaluation.checkpoint=average"
        )
    if settings.evaluation.checkpoint == "ema" and not typed.ema.store_ema:
        raise UserError("evaluation.checkpoint=ema needs fairseq.ema.store_ema=true")


def _check_languages(typed: DictConfig, corpus: str) -> None:
    if typed.task.get("source_lang") or typed.task.get("target_lang"):
        entry = load_catalogue().get(corpus)  # without one the preparation will say so
        if entry is not None and entry.is_parallel:
            check_languages(typed, tuple(entry.languages))


def _check_hardware(settings: ExperimentSettings) -> None:
    import torch

    common = settings.fairseq["common"]
    on_gpu = torch.cuda.is_available() and not settings.on_cpu
    for name in ("fp16", "amp"):
        if common.get(name) and not on_gpu:
            raise UserError(
                f"fairseq.common.{name}=true needs a GPU and there is none (or "
                f"fairseq.common.cpu=true); add fairseq.common.{name}=false"
            )
    chosen = [name for name in ("fp16", "bf16", "amp") if common.get(name)]
    if len(chosen) > 1:
        raise UserError(
            f"fairseq.common.{chosen[0]}=true and fairseq.common.{chosen[1]}=true are two "
            "precisions; choose one"
        )
    for name in ("fp16", "bf16"):
        if common.get(f"memory_efficient_{name}") and not common.get(name):
            raise UserError(
                f"fairseq.common.memory_efficient_{name}=true has no effect without "
                f"fairseq.common.{name}=true"
            )


def _check_ranks(settings: ExperimentSettings, sites: Sites) -> None:
    if settings.distributed.ranks == 1:
        return
    backend = settings.fairseq.get("distributed_training", {}).get("ddp_backend", "legacy_ddp")
    if backend != "legacy_ddp":
        raise UserError(
            f"fairseq.distributed_training.ddp_backend={backend}: ddp_backend is set by normexp "
            "where there are several ranks; leave it out"
        )
    for site, norm in sites.items():
        alone = issubclass(norm_class(norm["name"]), RunningNorm) and "sync" not in norm
        if alone and settings.distributed.synchronized:
            raise UserError(
                f"norm {norm['name']!r} ({site}) has no statistics over several ranks: choose "
                "distributed.statistics=local, by which each rank has its own, or one rank"
            )


def _check_layerdrop(settings: ExperimentSettings, typed: DictConfig, sites: Sites) -> None:
    """Each rank draws the layers that it leaves out for itself."""
    if settings.distributed.ranks == 1:
        return
    for key in ("encoder.layerdrop", "decoder.layerdrop", "decoder_layerdrop"):
        if not OmegaConf.select(typed.model, key, default=0):
            continue
        for site, norm in sites.items():
            in_layers = site.startswith(key[:7]) and not site.endswith("_final")
            if in_layers and norm.get("sync"):
                raise UserError(
                    f"fairseq.model.{key}: each rank leaves out other layers, and norm "
                    f"{norm['name']!r} ({site}) would add up the sums of different layers: choose "
                    "distributed.statistics=local, by which each rank has its own, or one rank"
                )


def _check_output_width(typed: DictConfig) -> None:
    """fairseq builds a model whose output does not fit the embedding that it shares."""
    model = with_defaults(typed).model
    if model._name == "normexp_transformer":
        shared = model.share_decoder_input_output_embed or model.share_all_embeddings
        inner, outer = "decoder.embed_dim", "decoder.output_dim"
    elif model._name == "normexp_transformer_lm":
        shared = model.share_decoder_input_output_embed
        inner, outer = "decoder_input_dim", "decoder_output_dim"
    else:
        return
    width, output = OmegaConf.select(model, inner), OmegaConf.select(model, outer)
    if shared and width != output:
        raise UserError(
            f"fairseq.model.{outer}={output} must be {inner}={width} where the output shares the "
            "embedding (fairseq.model.share_decoder_input_output_embed)"
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
