"""From a run's settings to fairseq's configuration, checked against fairseq's own dataclasses."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.config.settings import ExperimentSettings, SpeedSettings, first_line
from normexp.errors import UserError
from normexp.norms import available_norms, norm_options

# Settings of fairseq that corrupt results silently when they are otherwise (key: value, reason).
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
_FUSED_CRITERIONS = ("normexp_cross_entropy", "normexp_label_smoothed_cross_entropy")
_FUSED_MODELS = ("normexp_transformer", "normexp_transformer_lm")


def typed_config(settings: ExperimentSettings) -> DictConfig:
    """fairseq's configuration of an experiment, typed, complete but for paths and languages.

    Raises UserError for a key or value that fairseq's dataclasses do not have, and for one that
    `SAFEGUARDS` forbids.
    """
    node = _with_safeguards(settings.fairseq)
    node["common"]["seed"] = settings.seed
    node["model"] = model_config(settings)
    apply_speed(settings.speed, node)
    if settings.evaluation.checkpoint == "average":
        node["checkpoint"]["keep_last_epochs"] = settings.evaluation.average_last
    else:
        node["checkpoint"]["no_epoch_checkpoints"] = True
    typed = _typed(node)
    _refuse_code(node)
    return typed


def trainer_config(
    typed: DictConfig, data_bin: Path, languages: tuple[str, str] | None, save_dir: Path
) -> DictConfig:
    """What fairseq's trainer takes: `typed_config` with its paths filled in.

    languages: source and target of a translation corpus, None for a language model.
    """
    from fairseq.dataclass.initialize import add_defaults

    paths = {"task": {"data": str(data_bin)}, "checkpoint": {"save_dir": str(save_dir)}}
    if languages is not None:
        paths["task"]["source_lang"], paths["task"]["target_lang"] = languages
    complete = OmegaConf.merge(typed, paths)
    add_defaults(complete)
    # Plain strings instead of enums that exist only inside functions: those cannot be pickled.
    return OmegaConf.create(OmegaConf.to_container(complete, resolve=True, enum_to_str=True))


def model_config(settings: ExperimentSettings) -> dict[str, Any]:
    """The model's part of fairseq's configuration, with the norms as the plugin's models take them.

    With several ranks every norm that has the option `sync` gets it from distributed.statistics.
    """
    options, sites = settings.norm.options, settings.norm.overridden_sites()
    if settings.distributed.ranks > 1:
        synchronized = settings.distributed.synchronized
        named = _over_ranks({"name": settings.norm.name, **options}, synchronized)
        options = {key: value for key, value in named.items() if key != "name"}
        sites = {site: _over_ranks(choice, synchronized) for site, choice in sites.items()}
    return settings.fairseq["model"] | {
        "norm": settings.norm.name,
        "norm_options": json.dumps(options),
        "norm_sites": json.dumps(sites),
    }


def apply_speed(speed: SpeedSettings, node: dict[str, Any]) -> None:
    """Choose the loss and the optimizer in a fairseq configuration with model, in place.

    fused_loss is for the two cross entropies of models that end in one linear projection, and not
    for float16, whose small gradients need scaling before they are rounded. fused_adam is for
    `adam`. Raises UserError where speed.precision contradicts fairseq's own settings.
    """
    common, optimizer, criterion = node["common"], node["optimizer"], node["criterion"]
    reduced = [
        name
        for name in ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")
        if common.get(name)
    ]
    if reduced and speed.precision != "float32":
        raise UserError(
            f"speed.precision={speed.precision} and fairseq.common.{reduced[0]}=true are two "
            "ways of saving precision; choose one"
        )
    fits = (
        criterion.get("_name") in _FUSED_CRITERIONS and node["model"].get("_name") in _FUSED_MODELS
    )
    if speed.fused_loss and fits and not reduced:
        criterion["fused"] = True
    special = [name for name in ("use_old_adam", "fp16_adam_stats") if optimizer.get(name)]
    memory_efficient = any(name.startswith("memory_efficient") for name in reduced)
    if speed.fused_adam and optimizer.get("_name") == "adam" and not (special or memory_efficient):
        optimizer["_name"] = "normexp_adam"


def _over_ranks(choice: Any, synchronized: bool) -> Any:
    """A norm, or its name, with the option `sync` where it has it: by default True if synchronized,
    otherwise False in any case."""
    named = {"name": choice} if isinstance(choice, str) else choice
    name = named.get("name") if isinstance(named, dict) else None
    if name not in available_norms() or "sync" not in norm_options(name):
        return choice
    return {"sync": True, **named} if synchronized else {**named, "sync": False}


def _with_safeguards(node: dict[str, Any]) -> dict[str, Any]:
    guarded = OmegaConf.create(node)
    for key, (value, reason) in SAFEGUARDS.items():
        given = OmegaConf.select(guarded, key)
        if given is not None and given != value:
            raise UserError(f"fairseq.{key}={given} is not allowed (must be {value}): {reason}")
        OmegaConf.update(guarded, key, value)
    return OmegaConf.to_container(guarded)


def _refuse_code(node: dict[str, Any]) -> None:
    """Raise UserError for a text that fairseq would run as Python: a run folder may be foreign."""
    from normexp.fairseq_plugin.config_guard import check_groups

    try:
        check_groups(node)
    except UserError as error:
        raise UserError(f"fairseq.{error}") from None


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
