"""Normalization layers for sequences, in plain PyTorch; usable in anybody's model.

    from normexp.norms import build_norm, available_norms
    norm = build_norm("power", num_features=512, warmup_steps=8000)
    y = norm(x, padding_mask)   # x (T, B, C) or (N, C); padding_mask (B, T) or (N,), True = padding

One file per layer, named like the layer: power.py is `build_norm("power", ...)`, and
reference/power.py the same equations token by token. To read PN: power.py, power_v.py,
running_norm.py.

Every file of this folder that registers a layer is imported: a new normalization is one file here
and its reference in reference/, and nothing else is edited. The layer's docstring ends with three
lines, which a test checks: its reference, its proof (a pytest command) and its number (where a
result made with it is recorded). Dimension letters: T time, B batch, C channels, N real
tokens, G groups.
"""

import importlib
import pkgutil

from normexp.norms.average_over_ranks import average_statistics
from normexp.norms.frozen_statistics import statistics_frozen
from normexp.norms.kernels.choice import use_kernels
from normexp.norms.loss_scale import follow_loss_scale
from normexp.norms.recompute_statistics import recompute_statistics
from normexp.norms.registry import (
    available_norms,
    build_norm,
    norm_class,
    norm_options,
    register_norm,
)
from normexp.norms.replace import padding_mask_for, replace_layer_norms
from normexp.norms.reset_statistics import reset_statistics
from normexp.norms.weight_decay import norm_parameters

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:  # parts of layers; whoever needs one imports it
        continue
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "available_norms",
    "average_statistics",
    "build_norm",
    "follow_loss_scale",
    "norm_class",
    "norm_options",
    "norm_parameters",
    "padding_mask_for",
    "recompute_statistics",
    "register_norm",
    "replace_layer_norms",
    "reset_statistics",
    "statistics_frozen",
    "use_kernels",
]
