"""Checkpoints with next to nothing in them."""

from pathlib import Path

import torch


def write(path: Path, values: list[float], step: int) -> Path:
    """Write a checkpoint after `step` updates of a model with the weight `values`."""
    model = {"w": torch.tensor(values), "norm.step": torch.tensor(step)}
    torch.save({"model": model, "optimizer_history": [{"num_updates": step}]}, path)
    return path
