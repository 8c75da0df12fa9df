"""Export of translation models with LN at every site to checkpoints of stock fairseq.

Programs outside fairseq that convert its models, such as CTranslate2, know fairseq's own
architectures only and read the settings from a flat argparse.Namespace. A model of this project
with `layer` everywhere is fairseq's `transformer`, weight by weight. Other norms have no
counterpart there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from normexp.checkpoints import store
from normexp.errors import UserError
from normexp.sites import resolve_sites

_MODEL = "normexp_transformer"
_LN = {"name": "layer", "eps": 1e-5}
_NORM_FIELDS = ("norm", "norm_options", "norm_sites")


def export_checkpoint(source: Path, target: Path, force: bool = False) -> str:
    """Write the checkpoint `source` as one of fairseq's arch `transformer`; returns a summary.

    Optimizer state is left behind. The target is written whole or not at all. Raises UserError,
    and writes nothing, where the source cannot be read or is no translation model of the plugin,
    where a site has another norm than LN with fairseq's eps, or where the target exists (unless
    `force`) or cannot be written.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name, or overwrite it with --force")
    state = store.load(source)
    args = _arguments(source, state.get("cfg"))
    result = {
        "args": args,
        "cfg": None,
        "model": state["model"],
        "criterion": None,
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "version": 2}},
    }
    try:
        store.save(target, result)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        raise UserError(f"cannot write {target}: {error}") from None
    settings = vars(args)
    return (
        f"exported {source} -> {target}\n"
        f"arch transformer, {settings.get('encoder_layers')} + {settings.get('decoder_layers')} "
        f"layers, {settings.get('source_lang')} to {settings.get('target_lang')}; its dictionaries "
        "are those of the data folder"
    )


def _arguments(source: Path, configuration: Any) -> argparse.Namespace:
    """The settings of model and task as fairseq's command line would have them."""
    groups = configuration if isinstance(configuration, dict) else {}
    model, task = groups.get("model"), groups.get("task")
    if not isinstance(model, dict) or model.get("_name") != _MODEL or not isinstance(task, dict):
        found = model.get("_name") if isinstance(model, dict) else None
        raise UserError(
            f"{source} holds a model {found!r}; only {_MODEL}, translation, can be exported"
        )
    try:
        sites = resolve_sites("translation", model)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from None
    others = [f"{site}: {json.dumps(norm)}" for site, norm in sites.items() if norm != _LN]
    if others:
        raise UserError(
            f"{source} has other norms than LN with eps 1e-05, which stock fairseq and CTranslate2 "
            f"do not know ({'; '.join(others)}); train with norm=layer, or run this model with "
            "fairseq-generate and this plugin, ONNX or OpenVINO (docs/own_models.md)"
        )
    flat: dict[str, Any] = {}
    for name, value in model.items():
        if isinstance(value, dict):  # encoder, decoder, quant_noise
            flat |= {f"{name}_{inner}": each for inner, each in value.items()}
        elif name not in _NORM_FIELDS:
            flat[name] = value
    settings = {**task, **flat, "arch": "transformer", "task": "translation"}
    del settings["_name"]  # of the plugin's model; with it fairseq would not ask for the arch
    return argparse.Namespace(**settings)
