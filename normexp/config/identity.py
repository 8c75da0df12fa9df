"""The identity of a run: a hash of the settings that decide its result.

Two runs of equal identity and seed are the same run; runs of equal identity and different seeds are
averaged. The hash must survive a new setting, or every run recorded before it would count as
changed and be trained again. Hence these rules:

- Paths and tracking are left out, and `distributed` with one rank, where it has no effect.
- A setting at the value that means "as before it existed" is left out. For a field of
  `config.settings` that value is its default; for a site without a norm of its own it is null; for
  the options of norms and for fairseq's settings, which other code declares, it stands in
  `NEUTRAL_OPTIONS` and `NEUTRAL_FAIRSEQ`.
- A setting that was renamed without another effect is hashed under its old name (`RENAMED`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from normexp.config.settings import NOT_IN_IDENTITY, ExperimentSettings

NEUTRAL_OPTIONS: dict[str, Any] = {"bound_nu": False}
"""Options of norms that came after the first recorded runs, at the value without effect."""

NEUTRAL_FAIRSEQ: dict[str, dict[str, Any]] = {}
"""Keys of fairseq's groups that configs/train.yaml named later, at fairseq's own default."""

RENAMED: dict[str, dict[str, str]] = {
    # Ours add the penalty of `PENALIZED` norms, for which the stock names are refused.
    "criterion": {
        "normexp_cross_entropy": "cross_entropy",
        "normexp_label_smoothed_cross_entropy": "label_smoothed_cross_entropy",
    }
}
"""fairseq's `_name` by group: new name -> the name that computed the same before."""

PENALIZED = {"regularized_batch"}
"""Norms with a `penalty` in the loss, by name because the layers themselves import torch."""

_ABSENT = "(absent)"


def identity(settings: ExperimentSettings) -> dict[str, Any]:
    """The settings that decide the result of a run, neutral ones left out; JSON types."""
    kept = settings.model_dump(exclude=set(NOT_IN_IDENTITY), exclude_defaults=True)
    alone = settings.distributed.ranks == 1
    if alone:
        kept.pop("distributed", None)
    norm = kept["norm"]
    norm["options"] = _options(norm["options"], alone)
    norm["sites"] = {
        site: _options(choice, alone) if isinstance(choice, Mapping) else choice
        for site, choice in settings.norm.overridden_sites().items()
    }
    renamed = {} if _has_penalty(settings) else RENAMED
    kept["fairseq"] = {
        group: _fairseq_group(values, NEUTRAL_FAIRSEQ.get(group, {}), renamed.get(group, {}))
        for group, values in settings.fairseq.items()
    }
    # A path; what lies there counts, as finetuned_from.
    kept["fairseq"]["checkpoint"].pop("finetune_from_model", None)
    return kept


def is_same_training(one: ExperimentSettings, other: ExperimentSettings) -> bool:
    """Return whether the training of `one` is that of `other`: name and evaluation may differ.

    But for an average that needs epochs whose checkpoints `one` did not keep.
    """
    kept, needed = (settings.evaluation for settings in (one, other))
    enough = needed.checkpoint != "average" or (
        kept.checkpoint == "average" and needed.average_last <= kept.average_last
    )
    return enough and one.seed == other.seed and _of_training(one) == _of_training(other)


def _of_training(settings: ExperimentSettings) -> str:
    without = ["label", "evaluation", "budget", "task.budget"]
    return hash_config(identity(settings), without=without)


def config_hash(settings: ExperimentSettings) -> str:
    """First 12 hex digits of the SHA-256 of `identity` without the seed."""
    return hash_config(identity(settings), without=["seed"])


def hash_config(config: Mapping[str, Any], without: Iterable[str] = ()) -> str:
    """First 12 hex digits of the SHA-256 of plain containers; the order of keys has no effect.

    without: dotted keys that may differ between runs that are averaged, such as "seed".
    """
    kept = json.loads(json.dumps(config))
    for key in without:
        *parents, last = key.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def differences(earlier: ExperimentSettings, now: ExperimentSettings) -> str:
    """Return the first few settings in which two identities differ, as "key: old -> new".

    The seed is one of them.
    """
    changed = _changed(identity(earlier), identity(now), "")
    return ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")


def _options(options: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    return {
        name: value
        for name, value in options.items()
        # Statistics over one rank are those of one rank.
        if not (alone and name == "sync" and isinstance(value, bool))
        and not (name in NEUTRAL_OPTIONS and value == NEUTRAL_OPTIONS[name])
    }


def _has_penalty(settings: ExperimentSettings) -> bool:
    choices = settings.norm.overridden_sites().values()
    names = [choice.get("name") if isinstance(choice, Mapping) else choice for choice in choices]
    return any(name in [settings.norm.name, *names] for name in PENALIZED)


def _fairseq_group(values: Any, neutral: Mapping[str, Any], renamed: Mapping[str, str]) -> Any:
    if not isinstance(values, Mapping):
        return values
    kept = {
        key: value
        for key, value in values.items()
        if not (key in neutral and value == neutral[key])
    }
    if isinstance(kept.get("_name"), str):
        kept["_name"] = renamed.get(kept["_name"], kept["_name"])
    return kept


def _changed(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    changed = []
    for key in sorted(set(earlier) | set(now)):
        a, b = earlier.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += _changed(a, b, f"{prefix}{key}.")
        elif json.dumps(a) != json.dumps(b):  # as the hash tells 1 from 1.0 and from true
            changed.append(f"{prefix}{key}: {a} -> {b}")
    return changed
