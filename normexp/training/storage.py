"""Room for the checkpoints of a training, looked at before its first update."""

import shutil
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from normexp.errors import UserError


def check_room(cfg: DictConfig, model: nn.Module) -> None:
    """Raise UserError where the disk has less room than the checkpoints certainly need.

    cfg: fairseq's configuration. What earlier checkpoints of the run take is theirs already.
    """
    folder = Path(cfg.checkpoint.save_dir)
    if not folder.is_dir():
        return
    needed = _number_kept(cfg) * _smallest_size(cfg, model)
    taken = sum(path.stat().st_size for path in folder.glob("*.pt"))
    free = shutil.disk_usage(folder).free
    if needed > free + taken:
        raise UserError(
            f"no space left on the disk of {folder} for the checkpoints of this run: they need "
            f"{needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; free some and give the same "
            "command again, or set results_dir=..."
        )


def _smallest_size(cfg: DictConfig, model: nn.Module) -> int:
    """Return the bytes of a checkpoint's tensors at least: weights, and two averages of Adam's."""
    with_averages = "adam" in cfg.optimizer._name and not cfg.checkpoint.no_save_optimizer_state
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights * (3 if with_averages else 1)


def _number_kept(cfg: DictConfig) -> int:
    """Return how many checkpoints there are at once: the last, the best, one half-written, epochs.

    Without a limit to the epochs kept, those count that max_epoch promises.
    """
    settings = cfg.checkpoint
    if settings.no_epoch_checkpoints:
        return 3
    epochs = max(cfg.optimization.max_epoch, 0) // (settings.save_interval or 1)
    kept = settings.keep_last_epochs
    return 3 + (min(kept, epochs) if kept > 0 and epochs else max(kept, 0) or epochs)
