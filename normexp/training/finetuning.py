"""A training that begins with the weights of another checkpoint, and with nothing else of it.

Parameters, running statistics and step counters come from the donor; optimizer, schedule, epochs,
best loss and times begin anew. fairseq's own way looks for a checkpoint_last.pt beside the donor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normexp.checkpoints import store
from normexp.config.settings import PLUGIN_MODELS, RunSettings
from normexp.corpora.hashing import file_hash
from normexp.errors import UserError
from normexp.norms.loss_scale import follow_loss_scale
from normexp.sites import resolve_sites

KEY = "fairseq.checkpoint.finetune_from_model"
_SHOWN = 3  # differences that a message names


def refuse_changed_donor(settings: RunSettings) -> None:
    """Raise UserError where the checkpoint to begin with is not the one that the settings name."""
    path = settings.fairseq["checkpoint"].get("finetune_from_model")
    if settings.finetuned_from is None:
        return
    if path is None or file_hash(Path(path)) != settings.finetuned_from:
        raise UserError(
            f"finetuned_from={settings.finetuned_from} is filled in by normexp, and is not the "
            f"SHA-256 of {KEY}={path}: leave it out"
        )


def load_donor(path: Path, model: nn.Module, model_cfg: Any) -> float:
    """Give a model the weights and the norms' state of a checkpoint, in place.

    model_cfg: fairseq's configuration of the model. Returns the loss scale of the checkpoint's last
    update, which `nu` and its kin are multiplied by (1 unless it was in float16). Raises UserError
    for a checkpoint that cannot be read, and for one of another model.
    """
    try:
        state = store.load(path)
    except store.Lost as lost:
        raise UserError(f"{KEY}: {lost}") from None
    _refuse_other_norms(path, state, model_cfg)
    try:
        model.load_state_dict(state["model"], strict=True, model_cfg=model_cfg)
    except RuntimeError as error:
        differences = [line.strip()[:300] for line in str(error).split("\n")[1:] if line.strip()]
        more = "; ..." if len(differences) > _SHOWN else ""
        raise UserError(
            f"{KEY}={path} is of another model (a corpus with another dictionary makes another "
            f"model, too): {'; '.join(differences[:_SHOWN])}{more}"
        ) from None
    scale = (state.get("last_optimizer_state") or {}).get("loss_scale", 1.0)
    return float(scale) if isinstance(scale, int | float) else 1.0


def follow_donor(model: nn.Module, donor_scale: float, scale: float) -> None:
    """Bring averages of gradients from the donor's loss scale to that of the training."""
    if donor_scale != scale:
        follow_loss_scale(model, scale / donor_scale)


def _refuse_other_norms(path: Path, state: Mapping[str, Any], model_cfg: Any) -> None:
    """Norms of two kinds may have parameters of the same names and shapes."""
    (kind,) = (kind for kind, models in PLUGIN_MODELS.items() if model_cfg["_name"] in models)
    wanted = resolve_sites(kind, model_cfg)
    donor = (state.get("cfg") or {}).get("model")
    if not isinstance(donor, Mapping) or "norm" not in donor:  # a model of stock fairseq
        donor = {**model_cfg, "norm": "layer", "norm_options": "{}", "norm_sites": "{}"}
    try:
        found = resolve_sites(kind, donor)
    except (ValueError, TypeError, AttributeError):
        return  # of another kind: its parameters will not fit
    for site in (site for site in wanted if site in found):
        one, other = found[site]["name"], wanted[site]["name"]
        if one != other:
            raise UserError(
                f"{KEY}={path} has the norm {one!r} at {site}, this run {other!r}; training can "
                "only go on with equal norms (norm=NAME, norm.sites)"
            )
