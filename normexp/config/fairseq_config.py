"""From a run's settings to fairseq's configuration, checked against fairseq's own dataclasses."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normexp.config import fairseq_keys
from normexp.config.settings import ExperimentSettings, SpeedSettings, first_line
from normexp.errors import UserError
from normexp.norms import available_norms, norm_options

_FUSED_CRITERIONS = ("normexp_cross_entropy", "normexp_label_smoothed_cross_entropy")
_FUSED_MODELS = ("normexp_transformer", "normexp_transformer_lm")


def typed_config(settings: ExperimentSettings) -> DictConfig:
    """fairseq's configuration of an experiment, typed, complete but for paths and languages.

    Raises UserError for a key or value that fairseq's dataclasses do not have, and for one that
    fairseq_keys.yaml forbids.
    """
    fairseq_keys.check_components(settings.fairseq)
    fairseq_keys.check_keys(settings.fairseq, _with_defaults(settings.fairseq))
    guarded = OmegaConf.create(settings.fairseq)
    for key, value in fairseq_keys.set_values().items():
        OmegaConf.update(guarded, key, value)
    node = OmegaConf.to_container(guarded)
    node["common"]["seed"] = settings.seeds.initialization
    node["model"] = model_config(settings)
    apply_speed(settings.speed, node)
    if node["criterion"].get("_name") == "normexp_adaptive_loss":
        # fairseq's criterion asks for this backend, with one process too.
        node["distributed_training"] = {"ddp_backend": "legacy_ddp"} | (
            node.get("distributed_training") or {}
        )
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

    languages: source and target of a translation corpus, None for a language model. Raises
    UserError where the configuration names others, and for a path that fairseq would split.
    """
    if os.pathsep in str(data_bin):
        raise UserError(
            f"fairseq takes {data_bin} for several folders, because of the {os.pathsep!r} in it: "
            "set data.dir to a path without one"
        )
    paths = {"task": {"data": str(data_bin)}, "checkpoint": {"save_dir": str(save_dir)}}
    if languages is not None:
        check_languages(typed, languages)
        paths["task"]["source_lang"], paths["task"]["target_lang"] = languages
    return with_defaults(OmegaConf.merge(typed, paths))


def with_defaults(typed: DictConfig) -> DictConfig:
    """`typed_config` with fairseq's default of every key that it lacks, in plain values.

    Raises UserError for a value that another key, which follows it by default, cannot have.
    """
    from fairseq.dataclass.initialize import add_defaults

    complete = OmegaConf.merge(typed)
    add_defaults(complete)
    # Plain strings instead of enums that exist only inside functions: those cannot be pickled.
    try:
        plain = OmegaConf.to_container(complete, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise UserError(f"fairseq: {first_line(error)}") from None
    return OmegaConf.create(plain)


def check_languages(typed: DictConfig, languages: tuple[str, str]) -> None:
    """Raise UserError where fairseq's task names other languages than the corpus.

    languages: source and target of the corpus.
    """
    for key, language in zip(("source_lang", "target_lang"), languages, strict=True):
        given = typed.task.get(key)
        if given not in (None, language):
            raise UserError(
                f"fairseq.task.{key}={given}, but it is {language} in the corpus, which decides "
                "what is trained: leave it out, or choose a corpus of the other direction"
            )


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


def _with_defaults(node: dict[str, Any]) -> DictConfig:
    """fairseq's whole configuration with these values; for typos it raises UserError."""
    typed = _typed(node)
    registries = fairseq_keys.registries()
    for group in fairseq_keys.COMPONENTS:
        defaults = OmegaConf.structured(registries[group][node[group]["_name"]])
        typed[group] = OmegaConf.merge(defaults, node[group])
    return typed


def _refuse_code(node: dict[str, Any]) -> None:
    """Raise UserError for a text that fairseq would run as Python: a run folder may be foreign."""
    from normexp.fairseq_plugin.config_guard import check_groups

    try:
        check_groups(node)
    except UserError as error:
        raise UserError(f"fairseq.{error}") from None


def _typed(node: dict[str, Any]) -> DictConfig:
    """Check a fairseq configuration against fairseq's own dataclasses; typos raise UserError."""
    from fairseq.dataclass.configs import FairseqConfig

    for group, registry in fairseq_keys.registries().items():
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
