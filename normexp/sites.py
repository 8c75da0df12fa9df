"""The normalization at each site of a Transformer.

Needs neither fairseq nor a model, so a configuration can be checked before any work and its
resolved sites can go into a record. The same function decides what the models are built with.
"""

import json
from collections.abc import Mapping
from typing import Any

from normexp.norms import build_norm, norm_class, norm_options

SITES: dict[str, tuple[str, ...]] = {
    "translation": (
        "encoder_attention",
        "encoder_ffn",
        "encoder_final",
        "decoder_attention",
        "decoder_cross",
        "decoder_ffn",
        "decoder_final",
    ),
    "language_model": ("decoder_attention", "decoder_ffn", "decoder_final"),
}
# fairseq's names for the norms of a layer.
_ATTRIBUTES = {
    "self_attn_layer_norm": "attention",
    "encoder_attn_layer_norm": "cross",
    "final_layer_norm": "ffn",
}
# Both kinds of model take their defaults from fairseq's dataclasses.
_DEFAULT_CHANNELS = 512


def resolve_sites(kind: str, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Choose the normalization of every site that a model has.

    kind: "translation" or "language_model". model: the model's configuration as in
    configs/model/*.yaml, with `norm` (a name), `norm_options` (a JSON object, the options of that
    norm) and `norm_sites` (a JSON object, site -> name or {"name": name, option: value, ...}).

    `norm` means what the paper means: in a translation model it stands at the encoder's sites
    and `layer` at the decoder's, in a language model it stands at every site. `norm_sites`
    overrides single sites; `norm_options` does not reach these.

    Returns site -> {"name": ..., every option with its value}, in the order of SITES. A site
    that the model lacks (the final ones of a post-norm model, decoder_cross without cross
    attention) is left out. Raises ValueError, naming what is known, for an unknown kind, site,
    norm or option, for an override of a site that the model lacks, for a norm in the decoder that
    would let a position see later ones, and for bad JSON.
    """
    if kind not in SITES:
        raise ValueError(f"unknown kind of model {kind!r}; known: {', '.join(SITES)}")
    norm = model.get("norm", "layer")
    options = _parse("norm_options", model.get("norm_options", "{}"))
    overrides = _parse("norm_sites", model.get("norm_sites", "{}"))
    channels = _channels(kind, model)
    for site in overrides:
        if site not in SITES[kind]:
            raise ValueError(
                f"norm_sites: unknown site {site!r}; the sites of a {kind} model: "
                f"{', '.join(SITES[kind])}"
            )
        if site not in channels:
            raise ValueError(
                f"norm_sites: this model has no {site}; its sites: {', '.join(channels)} "
                "(final norms exist in pre-norm models only, decoder_cross with cross attention)"
            )
    if "name" in options:
        raise ValueError("norm_options holds options only; the name is the value of norm")
    # All sites that `norm` can stand at have the first site's number of channels.
    chosen = _complete(
        "norm, norm_options", {"name": norm, **options}, next(iter(channels.values()))
    )

    resolved = {}
    for site, num_features in channels.items():
        if site in overrides:
            choice = overrides[site]
            choice = {"name": choice} if isinstance(choice, str) else choice
            resolved[site] = _complete(f"norm_sites, {site}", choice, num_features)
        elif kind == "language_model" or site.startswith("encoder_"):
            resolved[site] = dict(chosen)
        else:
            resolved[site] = {"name": "layer", **norm_options("layer")}
        _refuse_future(site, resolved[site]["name"])
    return resolved


def site_of(path: str) -> str | None:
    """Return site and layer of a module: "encoder.layers.0.final_layer_norm" -> "encoder_ffn/0".

    The norm after a stack has no layer: "encoder_final". None for what is no norm of a site.
    """
    match path.split("."):
        case [("encoder" | "decoder") as stack, "layers", layer, attribute]:
            part = _ATTRIBUTES.get(attribute)
            return f"{stack}_{part}/{layer}" if part else None
        case [("encoder" | "decoder") as stack, "layer_norm"]:
            return f"{stack}_final"
    return None


def _refuse_future(site: str, name: str) -> None:
    if site.startswith("decoder_") and getattr(norm_class(name), "mixes_positions", False):
        raise ValueError(
            f"norm {name!r} cannot stand at {site}: it normalizes over a whole sentence, so every "
            "position would see the later ones that it has to predict"
        )


def _channels(kind: str, model: Mapping[str, Any]) -> dict[str, int]:
    """Return the sites that the model has, with their numbers of channels."""
    if kind == "translation":
        encoder, decoder = model.get("encoder", {}), model.get("decoder", {})
        for name, stack in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(stack, Mapping):
                raise ValueError(f"{name}={stack!r} must be a group of the model's settings")
    else:  # fairseq's language models have a flat configuration
        encoder = {}
        decoder = {
            key: model[f"decoder_{key}"]
            for key in ("embed_dim", "normalize_before")
            if f"decoder_{key}" in model
        }
    absent = set()
    if not encoder.get("normalize_before", False):
        absent.add("encoder_final")
    if not decoder.get("normalize_before", False) or model.get("no_decoder_final_norm", False):
        absent.add("decoder_final")
    if model.get("no_cross_attention", False):
        absent.add("decoder_cross")
    stacks = {"encoder": encoder, "decoder": decoder}
    return {
        site: stacks[site.split("_")[0]].get("embed_dim", _DEFAULT_CHANNELS)
        for site in SITES[kind]
        if site not in absent
    }


def _parse(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{field} is not JSON: {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{field} must be a JSON object such as {{}}, got {text!r}")
    return value


def _complete(where: str, choice: Any, num_features: int) -> dict[str, Any]:
    """Fill in the defaults of a choice; building it once checks the options' values."""
    if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
        raise ValueError(f'{where}: expected NAME or {{"name": NAME, option: value}}: {choice!r}')
    try:
        build_norm(num_features=num_features, **choice)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return {"name": choice["name"], **norm_options(choice["name"]), **choice}
