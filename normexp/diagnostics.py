"""Scalars that show whether the running statistics of normalization layers are sane."""

import torch
from torch import Tensor, nn

SECOND_MOMENTS = ("psi2", "var")
"""Statistics that are positive per channel and are reported by their mean over the channels."""


def norm_diagnostics(model: nn.Module) -> dict[str, float]:
    """Summarise the statistics of every layer that offers them.

    A layer offers them by a method `statistics()` that returns a dict of tensors with one entry
    per channel. Second moments (`psi2`, `var`) give their mean over the channels; every other
    statistic is a signed vector (`nu`, `mean`) and gives its L2 norm. Keys look like
    `norm/encoder.layers.0.self_attn_layer_norm/psi2_mean` and `.../nu_norm`. `.../rejected` counts
    the passes of this process whose statistics were not finite and therefore left out. A model
    without such layers gives an empty dict.
    """
    scalars: dict[str, Tensor] = {}
    for site, module in model.named_modules():
        if not callable(getattr(module, "statistics", None)):
            continue
        for name, value in module.statistics().items():
            value = value.detach().double()
            if name in SECOND_MOMENTS:
                scalars[f"norm/{site}/{name}_mean"] = value.mean()
            else:
                scalars[f"norm/{site}/{name}_norm"] = value.norm()
        if hasattr(module, "rejected"):
            scalars[f"norm/{site}/rejected"] = module.rejected.double()
    if not scalars:
        return {}
    # One transfer from the device instead of one per scalar.
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
