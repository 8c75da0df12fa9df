"""From the Hydra configuration to fairseq's, with every check that can be made before any work."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.config.identity import first_line, resolved
from normexp.errors import UserError
from normexp.evaluation.sliding_window import stride_for
from normexp.norms import available_norms, norm_class, norm_options
from normexp.norms.running_norm import RunningNorm
from normexp.sites import resolve_sites
from normexp.training import process_group, speed

# Settings of fairseq that corrupt results in silence when they are otherwise (key: value, reason).
SAFEGUARDS: dict[str, tuple[Any, str]] = {
    "dataset.required_batch_size_multiple": (
        1,
        "any other value drops the last sentences of a batch, in validation too",
    ),
    "dataset.update_epoch_batch_itr": (
        True,
        "a resumed run would otherwise see other batches than an uninterrupted one",
    ),
    "dataset.skip_invalid_size_inputs_valid_test": (
        False,
        "sentences left out of an evaluation make its score meaningless",
    ),
    "dataset.disable_validation": (False, "checkpoints are chosen by the validation loss"),
    "distributed_training.distributed_world_size": (1, "one process trains one model"),
    "checkpoint.restore_file": ("checkpoint_last.pt", "an interrupted run resumes from there"),
    "checkpoint.no_save": (False, "the evaluation reads the checkpoints"),
    "checkpoint.no_last_checkpoints": (False, "an interrupted run resumes from there"),
    # any name switches on the progress bar that feeds metrics.jsonl and W&B
    "common.wandb_project": ("normexp", "the curves are recorded through it"),
}

MODELS = {
    "translation": ("normexp_transformer",),
    "language_model": ("normexp_transformer_lm", "normexp_tensorized_lm"),
}
FAIRSEQ_TASKS = {
    "translation": ("translation",),
    "language_model": ("language_modeling", "normexp_language_modeling"),
}


def validate(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Check everything that can be checked without data and return the norm of every site.

    Returns site -> {"name": ..., option: value ...}. Raises UserError naming the cause, the known
    alternatives and the key to change.
    """
    _check_kind(cfg)
    plain = resolved(cfg)
    _check_names(plain)
    _check_evaluation(plain["evaluation"])
    _check_windows(plain)
    _check_blocks(plain["fairseq"])
    _check_stopping(plain["fairseq"])
    _check_hardware(plain["fairseq"])
    _check_tracking(plain["tracking"]["mode"])
    sites = _resolve_sites(plain)
    _check_ranks(plain, sites)
    node = _with_safeguards(plain["fairseq"])
    speed.into_fairseq(speed.settings(plain), node)
    typed = _typed(node)
    _check_criterion(plain["task"]["kind"], typed, sites)
    return sites


def fairseq_config(
    cfg: DictConfig,
    data_bin: Path,
    languages: tuple[str, str] | None,
    save_dir: Path,
) -> DictConfig:
    """fairseq's configuration of a validated run, ready for its trainer.

    languages: source and target of a translation corpus, None for a language model.
    """
    from fairseq.dataclass.initialize import add_defaults

    plain = resolved(cfg)
    node = _with_safeguards(plain["fairseq"])
    node["common"]["seed"] = plain["seed"]
    node["task"]["data"] = str(data_bin)
    if languages is not None:
        node["task"]["source_lang"], node["task"]["target_lang"] = languages
    node["model"] = _model(plain)
    speed.into_fairseq(speed.settings(plain), node)
    node["checkpoint"]["save_dir"] = str(save_dir)
    evaluation = plain["evaluation"]
    if evaluation["checkpoint"] == "average":
        node["checkpoint"]["keep_last_epochs"] = evaluation["average_last"]
    else:
        node["checkpoint"]["no_epoch_checkpoints"] = True
    typed = _typed(node)
    add_defaults(typed)
    # Plain strings instead of enums that exist only inside functions: those cannot be pickled.
    return OmegaConf.create(OmegaConf.to_container(typed, resolve=True, enum_to_str=True))


def _check_kind(cfg: DictConfig) -> None:
    """Model, both tasks and the kind must fit together; checked before references are followed."""
    kind = cfg.task.kind
    if kind not in MODELS:
        raise UserError(f"task.kind={kind!r}; known: {', '.join(MODELS)}")
    model, task = cfg.fairseq.model.get("_name"), cfg.fairseq.task.get("_name")
    if model not in MODELS[kind]:
        raise UserError(
            f"task={cfg.task.name} is a {kind.replace('_', ' ')} task and needs a model of the "
            f"type {' or '.join(MODELS[kind])}, but the model is {model!r}; choose another model= "
            "(configs/model/)"
        )
    if task not in FAIRSEQ_TASKS[kind]:
        raise UserError(
            f"fairseq.task._name={task!r} does not fit task.kind={kind}; "
            f"it must be {' or '.join(FAIRSEQ_TASKS[kind])}"
        )


def _check_names(plain: dict[str, Any]) -> None:
    for key in ("task.name", "label"):
        value = OmegaConf.select(OmegaConf.create(plain), key)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*", str(value)):
            raise UserError(
                f"{key}={value!r} names files: use letters, digits and . _ - + = (no spaces)"
            )
    seed = plain["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 1 <= seed < 2**31:
        raise UserError(f"seed={seed!r} must be an integer from 1 to 2147483647")


def _check_evaluation(evaluation: dict[str, Any]) -> None:
    if evaluation["checkpoint"] not in ("average", "best"):
        raise UserError(f"evaluation.checkpoint={evaluation['checkpoint']!r}; known: average, best")
    for key in ("average_last", "beam", "max_tokens"):
        value = evaluation[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"evaluation.{key}={value!r} must be an integer of at least 1")
    unknown = set(evaluation["splits"]) - {"valid", "test"}
    if unknown or not evaluation["splits"]:
        raise UserError(f"evaluation.splits={evaluation['splits']}; known: valid, test")


def _check_windows(plain: dict[str, Any]) -> None:
    context_window, stride = (plain["evaluation"][key] for key in ("context_window", "stride"))
    for key, value in (("context_window", context_window), ("stride", stride)):
        optional = key == "stride" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"evaluation.{key}={value!r} must be an integer")
    if context_window == 0 and stride is None:
        return
    if plain["task"]["kind"] != "language_model":
        raise UserError("evaluation.context_window and evaluation.stride are for language models")
    length = plain["fairseq"]["task"].get("tokens_per_sample", 1024)  # fairseq's default
    stride_for(length, context_window, stride)


def _check_blocks(node: dict[str, Any]) -> None:
    task = node["task"]
    if task.get("streams"):
        from normexp.fairseq_plugin.streams import check_streams

        try:
            check_streams(
                task["streams"],
                node["dataset"].get("batch_size"),
                task.get("sample_break_mode", "none"),
            )
        except ValueError as error:
            raise UserError(f"fairseq.task and fairseq.dataset: {error}") from None
    if task.get("sample_break_mode") == "eos" and not hasattr(np, "compat"):
        raise UserError(
            "fairseq.task.sample_break_mode=eos fails in fairseq-fixed with NumPy "
            f"{np.__version__}; use complete or none, or an older NumPy (1.26)"
        )


def _check_stopping(node: dict[str, Any]) -> None:
    optimization = node["optimization"]
    if not (
        optimization.get("max_epoch", 0) > 0
        or optimization.get("max_update", 0) > 0
        or optimization.get("stop_time_hours", 0) > 0
        or node["checkpoint"].get("patience", -1) > 0
    ):
        raise UserError(
            "this run would never end: set fairseq.optimization.max_epoch or max_update, or "
            "fairseq.checkpoint.patience"
        )


def _check_tracking(mode: str) -> None:
    from normexp.tracking.tracker import MODES

    if mode not in MODES:
        raise UserError(f"tracking.mode={mode!r}; known: {', '.join(MODES)}")


def _check_hardware(node: dict[str, Any]) -> None:
    import torch

    common = node["common"]
    on_gpu = torch.cuda.is_available() and not common.get("cpu", False)
    if common.get("fp16") and not on_gpu:
        raise UserError(
            "fairseq.common.fp16=true needs a GPU and there is none (or fairseq.common.cpu=true); "
            "add fairseq.common.fp16=false"
        )


def _resolve_sites(plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        return resolve_sites(plain["task"]["kind"], _model(plain))
    except ValueError as error:
        raise UserError(str(error)) from None


def _model(plain: dict[str, Any]) -> dict[str, Any]:
    norm = plain["norm"]
    chosen = {site: choice for site, choice in norm["sites"].items() if choice is not None}
    options = norm["options"]
    parallel = process_group.settings(plain)
    if parallel["ranks"] > 1:
        synchronized = parallel["statistics"] == "synchronized"
        options = _over_ranks({"name": norm["name"], **options}, synchronized)
        options = {key: value for key, value in options.items() if key != "name"}
        chosen = {site: _over_ranks(choice, synchronized) for site, choice in chosen.items()}
    return plain["fairseq"]["model"] | {
        "norm": norm["name"],
        "norm_options": json.dumps(options),
        "norm_sites": json.dumps(chosen),
    }


def _over_ranks(choice: Any, synchronized: bool) -> Any:
    """A norm, or its name, with the option `sync` where it has it: by default True if synchronized,
    otherwise False in any case."""
    named = {"name": choice} if isinstance(choice, str) else choice
    name = named.get("name") if isinstance(named, dict) else None
    if name not in available_norms() or "sync" not in norm_options(name):
        return choice
    return {"sync": True, **named} if synchronized else {**named, "sync": False}


def _check_ranks(plain: dict[str, Any], sites: dict[str, dict[str, Any]]) -> None:
    parallel = process_group.settings(plain)
    if parallel["ranks"] == 1:
        return
    given = set(plain["fairseq"].get("distributed_training", {})) - {"distributed_world_size"}
    if given:
        raise UserError(
            f"fairseq.distributed_training.{min(given)} is set by normexp where there are several "
            "ranks; leave it out"
        )
    for site, norm in sites.items():
        alone = issubclass(norm_class(norm["name"]), RunningNorm) and "sync" not in norm
        if alone and parallel["statistics"] == "synchronized":
            raise UserError(
                f"norm {norm['name']!r} ({site}) has no statistics over several ranks: choose "
                "distributed.statistics=local, by which each rank has its own, or one rank"
            )


def _with_safeguards(node: dict[str, Any]) -> dict[str, Any]:
    guarded = OmegaConf.create(node)
    for key, (value, reason) in SAFEGUARDS.items():
        given = OmegaConf.select(guarded, key)
        if given is not None and given != value:
            raise UserError(f"fairseq.{key}={given} is not allowed (must be {value}): {reason}")
        OmegaConf.update(guarded, key, value)
    return OmegaConf.to_container(guarded)


def _typed(node: dict[str, Any]) -> DictConfig:
    """Check a fairseq configuration against fairseq's own dataclasses; typos raise UserError."""
    import fairseq.criterions
    import fairseq.optim
    import fairseq.optim.lr_scheduler
    import fairseq.tasks
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from fairseq.registry import REGISTRIES

    import normexp.fairseq_plugin  # noqa: F401 (registers the models)

    dataclasses = {
        "model": MODEL_DATACLASS_REGISTRY,
        "task": fairseq.tasks.TASK_DATACLASS_REGISTRY,
        **{
            group: REGISTRIES[group]["dataclass_registry"]
            for group in ("criterion", "optimizer", "lr_scheduler")
        },
    }
    for group, registry in dataclasses.items():
        name = node[group].get("_name")
        if name not in registry:
            known = ", ".join(sorted(registry))
            raise UserError(f"fairseq.{group}._name={name!r} is unknown; known: {known}")
        given = {key: value for key, value in node[group].items() if key != "_name"}
        try:
            OmegaConf.merge(OmegaConf.structured(registry[name]), given)
        except OmegaConfBaseException as error:
            raise UserError(f"fairseq.{group}: {first_line(error)}") from None
    try:
        return OmegaConf.merge(OmegaConf.structured(FairseqConfig), node)
    except OmegaConfBaseException as error:
        raise UserError(f"fairseq: {first_line(error)}") from None


def _check_criterion(kind: str, typed: DictConfig, sites: dict[str, dict[str, Any]]) -> None:
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
    if kind == "language_model" and stock == "label_smoothed_cross_entropy":
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
