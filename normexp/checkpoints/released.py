"""Import of checkpoints of the PowerNorm authors' code into this project's fairseq plugin.

The files come from a fairseq of 2019 (github.com/sIncerass/powernorm): a pickle with the command
line as an argparse.Namespace, meters of classes that no longer exist, and a state dict whose
normalizations have other buffers than ours. Options that a file does not hold follow that code: eps
and alphas are its defaults, groups are the attention heads, and the warm-up is the learning rate's
in the layers and 1000 forwards in the final norms.

"theirs" below means the authors' code, "ours" this project's.
"""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig, OptimizationConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.registry import REGISTRIES
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from normexp.checkpoints import store
from normexp.errors import UserError
from normexp.fairseq_plugin.config_guard import check_checkpoint, check_groups
from normexp.fairseq_plugin.transformer import NormTransformerConfig, NormTransformerModel

FINAL_WARMUP_STEPS = 1000


class _Kind(NamedTuple):
    """The layer of ours that is equal to a normalization of theirs."""

    name: str
    buffers: dict[str, str]  # names, theirs -> ours


_KINDS = {
    "layer": _Kind("layer", {}),
    "batch": _Kind(
        "batch_released",
        {
            "running_mean": "running_mean",
            "running_var": "running_var",
            "num_batches_tracked": "step",
        },
    ),
    "power": _Kind(
        "power_released", {"running_phi": "running_psi2", "ema_gz": "e", "iters": "step"}
    ),
}
# (stack, module) -> site, and the command line's argument that chose its normalization
_SITES = {
    ("encoder", "self_attn_layer_norm"): ("encoder_attention", "encoder_norm_self"),
    ("encoder", "final_layer_norm"): ("encoder_ffn", "encoder_norm_ff"),
    ("encoder", "layer_norm"): ("encoder_final", "encoder_norm_ff"),
    ("decoder", "self_attn_layer_norm"): ("decoder_attention", "decoder_norm_self"),
    ("decoder", "encoder_attn_layer_norm"): ("decoder_cross", "decoder_norm_self"),
    ("decoder", "final_layer_norm"): ("decoder_ffn", "decoder_norm_ff"),
    ("decoder", "layer_norm"): ("decoder_final", "decoder_norm_ff"),
}
_NORM_ENTRY = re.compile(r"((encoder|decoder)\.(?:layers\.\d+\.)?(\w*layer_norm))\.(\w+)")
# Arguments with which today's fairseq builds another model than theirs.
_UNSUPPORTED = (
    "encoder_spec_norm",
    "layer_wise_attention",
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "encoder_layers_to_keep",
    "decoder_layers_to_keep",
)
_PARTS = ("criterion", "optimizer", "lr_scheduler")


class _Meter:
    """Replaces the classes of fairseq.meters and drops their content."""

    def __setstate__(self, state: object) -> None:
        pass


_METERS = ("AverageMeter", "TimeMeter", "StopwatchMeter")


def import_checkpoint(source: Path, target: Path, force: bool = False) -> str:
    """Rewrite the checkpoint `source` as `target` and return a summary of it, a few lines of text.

    The model, the number of updates and the validation loss are kept. Adam's moments are not: the
    file gives only their position, not the parameter they belong to. The target is written whole or
    not at all.

    Raises UserError, and changes nothing, when the source is missing, damaged, of another format or
    refers to a class that such files do not hold; when its arguments, its buffers and the
    normalizations of the authors' code contradict each other; when the target exists (unless
    `force`) or cannot be written. The format has no checksums: damaged numbers go unnoticed unless
    they are not finite; the summary lists those.
    """
    _check_target(source, target, force)
    state = read(source)
    try:
        result = _converted(state)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:
        # fairseq and torch raise many types for arguments and weights that do not fit.
        raise UserError(
            f"{source}: its arguments and weights do not make up a model: {_line(error)}"
        ) from None
    try:
        store.save(target, result)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        raise UserError(f"cannot write {target}: {error}") from None
    return "\n".join(
        f"{title:<12} {text}"
        for title, text in [("imported", f"{source} -> {target}"), *_summary(state, result)]
    )


def read(path: Path) -> dict[str, Any]:
    """Read a file of the authors' format: args, model, optimizer_history, extra_state.

    Only tensors, plain containers and the argparse.Namespace are created; meters become empty
    placeholders. Raises UserError for any other file.
    """
    # Not argparse.Namespace, which the plugin allows already: on leaving, the context forbids the
    # types that it lists, also those that were allowed before.
    meters = [(_Meter, f"fairseq.meters.{name}") for name in _METERS]
    try:
        with torch.serialization.safe_globals(meters):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise UserError(
                f"{path} refers to {foreign[1]}, which checkpoints of this format do not hold; "
                "it was not loaded, because loading it could run foreign code"
            ) from None
        raise UserError(
            f"{path} is damaged, cut off or no PyTorch checkpoint; fetch or copy it again"
        ) from None
    _check_format(path, state)
    return state


def find_norms(args: argparse.Namespace, model: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the normalization of ours at each site of their model, with its options.

    args: their command line, with the four choices and the sizes. model: their state dict, whose
    buffers show which normalizations were built. Returns site -> {"name": ..., option: value}.
    Raises UserError where the two contradict each other and for normalizations that are unknown.
    """
    modules: dict[tuple[str, str, str], set[str]] = {}
    for key in model:
        entry = _NORM_ENTRY.fullmatch(key)
        if entry:
            modules.setdefault(entry.group(1, 2, 3), set()).add(entry[4])
    norms = {}
    for (path, stack, module), entries in modules.items():
        if (stack, module) not in _SITES:
            raise UserError(f"the authors' model has no normalization {path}")
        site, argument = _SITES[stack, module]
        kind = getattr(args, argument)
        if kind not in _KINDS:
            raise UserError(
                f"{argument} is {kind!r}; the normalizations of the authors' code that can be "
                f"imported: {', '.join(_KINDS)}"
            )
        if entries != {"weight", "bias", *_KINDS[kind].buffers}:
            raise UserError(
                f"{argument} is {kind!r}, but {path} holds {', '.join(sorted(entries))}"
            )
        norms[site] = _norm_of(site, kind, args)
    return {site: norms[site] for site, _ in _SITES.values() if site in norms}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_target(source: Path, target: Path, force: bool) -> None:
    if target.is_dir():
        raise UserError(f"{target} is a folder; name the file to write")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to write {target.name} into")
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target} is the file to import; choose another name for the result")
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name, or overwrite it with --force")


def _check_format(path: Path, state: Any) -> None:
    wrong = f"{path} is no checkpoint of the PowerNorm authors' code: "
    parts = {"args": argparse.Namespace, "model": dict, "optimizer_history": list}
    for part, kind in {**parts, "extra_state": dict}.items():
        if not isinstance(state, dict) or not isinstance(state.get(part), kind):
            raise UserError(f"{wrong}it has no {part} (a {kind.__name__})")
    if not all(isinstance(value, Tensor) for value in state["model"].values()):
        raise UserError(f"{wrong}its model does not consist of tensors")
    history = state["optimizer_history"]
    if not history or not isinstance(history[-1], dict) or "num_updates" not in history[-1]:
        raise UserError(f"{wrong}its optimizer_history does not tell the number of updates")
    args = state["args"]
    for _, argument in _SITES.values():
        if not hasattr(args, argument):
            raise UserError(
                f"{wrong}its arguments lack {argument} (those of stock fairseq need no import)"
            )
    if getattr(args, "task", "translation") != "translation":
        raise UserError(f"{path}: its task is {args.task}; only translation can be imported")
    for argument in _UNSUPPORTED:
        if getattr(args, argument, None):
            raise UserError(f"{path}: a model with {argument} cannot be imported")


def _converted(state: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint that the plugin's own training would save, without optimizer state."""
    args, history = state["args"], state["optimizer_history"][-1]
    check_checkpoint({"args": args})
    sites = find_norms(args, state["model"])
    configuration = _configuration(args, sites)
    check_groups(configuration)
    model = _build(OmegaConf.create(configuration["model"]), state["model"])
    # Strict: an entry without a counterpart, on either side, is an error.
    model.load_state_dict(_renamed(state["model"]), strict=True)
    # Their epochs were cut into other batches, so training that resumes from here begins an epoch.
    epoch = {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}
    return {
        "args": None,
        "cfg": configuration,
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": history.get("criterion_name"),
                "optimizer_name": history.get("optimizer_name"),
                "lr_scheduler_state": {},
                "num_updates": int(history["num_updates"]),
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": epoch,
            "val_loss": _number(state["extra_state"].get("val_loss")),
        },
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _norm_of(site: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return name and all options of our layer for their normalization `kind` at a site."""
    name = _KINDS[kind].name
    if name == "layer":
        return {"name": name, "eps": 1e-5}
    if name == "batch_released":
        return {"name": name, "eps": 1e-5, "momentum": 0.05}
    if site.endswith("_final"):
        warmup_steps = FINAL_WARMUP_STEPS
    elif hasattr(args, "warmup_updates"):
        warmup_steps = args.warmup_updates
    else:
        raise UserError("its arguments lack warmup_updates, the warm-up of 'power' in the layers")
    return {
        "name": name,
        "eps": 1e-5,
        "alpha_fwd": 0.9,
        "alpha_bwd": 0.9,
        "warmup_steps": warmup_steps,
        "num_groups": getattr(args, f"{site.split('_')[0]}_attention_heads"),
    }


def _configuration(args: argparse.Namespace, sites: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return fairseq's configuration in plain containers, without settings unknown to it."""
    # fairseq would read pretrained embeddings from these paths whenever it builds the model.
    args = argparse.Namespace(
        **{**vars(args), "encoder_embed_path": None, "decoder_embed_path": None}
    )
    try:
        model = OmegaConf.structured(NormTransformerConfig.from_namespace(args))
        model._name, model.norm_sites = "normexp_transformer", json.dumps(sites)
        groups = {
            "model": OmegaConf.to_container(model, enum_to_str=True),
            "task": {"_name": "translation", **_given(args, TranslationConfig)},
            "optimization": _given(args, OptimizationConfig),
        }
        for group, name in _known_parts(args).items():
            dataclass = REGISTRIES[group]["dataclass_registry"][name]
            groups[group] = {"_name": name, **_given(args, dataclass)}
        configuration = OmegaConf.merge(OmegaConf.structured(FairseqConfig), groups)
        add_defaults(configuration)
        return OmegaConf.to_container(configuration, resolve=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise UserError(f"an argument has a value that fairseq refuses: {_line(error)}") from None


def _known_parts(args: argparse.Namespace) -> dict[str, str]:
    """Return names of criterion, optimizer and schedule, without those unknown to fairseq."""
    names = {part: getattr(args, part, None) for part in _PARTS}
    return {
        part: name for part, name in names.items() if name in REGISTRIES[part]["dataclass_registry"]
    }


def _given(args: argparse.Namespace, dataclass: type) -> dict[str, Any]:
    """Return the arguments that have the same name in a configuration class of fairseq."""
    names = [field.name for field in fields(dataclass)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _build(configuration: Any, theirs: dict[str, Tensor]) -> NormTransformerModel:
    """Build a new model of the configuration, with dictionaries as large as their embeddings."""

    def dictionary(stack: str) -> Dictionary:
        words = Dictionary()
        for word in range(len(theirs[f"{stack}.embed_tokens.weight"]) - len(words)):
            words.add_symbol(str(word))
        return words

    task = SimpleNamespace(
        source_dictionary=dictionary("encoder"), target_dictionary=dictionary("decoder")
    )
    return NormTransformerModel.build_model(configuration, task)


def _renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return their state dict with our names and shapes for the buffers of normalizations."""
    our_names = {their: our for kind in _KINDS.values() for their, our in kind.buffers.items()}
    renamed = {}
    for key, value in theirs.items():
        entry = _NORM_ENTRY.fullmatch(key)
        if entry and entry[4] in our_names:
            name = our_names[entry[4]]
            # their shapes are (1, C, 1, 1), (C,), (1,) and ()
            renamed[f"{entry[1]}.{name}"] = value.reshape(() if name == "step" else -1)
        else:
            renamed[key] = value
    return renamed


def _summary(state: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    args, model = state["args"], result["cfg"]["model"]
    words = [
        len(result["model"][f"{stack}.embed_tokens.weight"]) for stack in ("encoder", "decoder")
    ]
    trained = f"{result['optimizer_history'][-1]['num_updates']} updates"
    if result["extra_state"]["val_loss"] is not None:
        trained += f", validation loss {result['extra_state']['val_loss']:.4g}"
    lines = [
        (
            "model",
            f"{getattr(args, 'arch', 'transformer')}, {model['encoder']['layers']} + "
            f"{model['decoder']['layers']} layers, dictionaries of {words[0]} and {words[1]} words",
        ),
        ("trained", trained),
    ]
    sites_of: dict[str, list[str]] = {}
    for site, norm in json.loads(model["norm_sites"]).items():
        options = ", ".join(f"{key}={value}" for key, value in norm.items() if key != "name")
        sites_of.setdefault(f"{norm['name']} ({options})", []).append(site)
    lines += [("norm", f"{norm} at {', '.join(sites)}") for norm, sites in sites_of.items()]

    left = []
    if "last_optimizer_state" in state:
        left.append("optimizer state")
    if "train_meters" in state["extra_state"]:
        left.append("training meters")
    for part in _PARTS:
        if part not in _known_parts(args):
            left.append(f"{part} {getattr(args, part, None)} (unknown to fairseq)")
    lines.append(("left behind", ", ".join(left) or "nothing"))
    lines += [
        ("not finite", key) for key, value in result["model"].items() if not value.isfinite().all()
    ]
    return lines
