"""State that fairseq loses when a training is resumed, so that it ends as if never interrupted."""

import math
from collections.abc import Mapping
from typing import Any

from fairseq import utils
from fairseq.logging.meters import MetersDict
from omegaconf import DictConfig

from normexp.fairseq_plugin.patches import numbers


class AlreadyTrained(Exception):
    """The checkpoint to resume from is that of a training which has reached its end."""


def reached_end(cfg: DictConfig, updates: int, seconds: float) -> bool:
    """Return whether fairseq stops at this number of updates or of seconds of training.

    By itself a resumed fairseq would check that only after one more update.
    """
    hours = cfg.optimization.stop_time_hours
    return updates >= (cfg.optimization.max_update or math.inf) or 0 < hours < seconds / 3600


def epoch_averages(extra_state: Mapping[str, Any]) -> dict[str, float]:
    """Return the averages over an epoch, which fairseq logs only after the epoch's checkpoint.

    extra_state: that of the checkpoint. Apart from times, the values are those that the
    interrupted process would have logged.
    """
    meters = MetersDict()
    meters.load_state_dict(extra_state["metrics"]["train"])
    # Derived values are not in a checkpoint.
    likelihood = meters["nll_loss" if "nll_loss" in meters else "loss"]
    return numbers(meters.get_smoothed_values()) | {"ppl": utils.get_perplexity(likelihood.avg)}


def scheduler_state(lr_scheduler: Any) -> dict[str, Any]:
    """Return the state of a schedule that fairseq leaves out of its checkpoints.

    That is the count of bad epochs of `reduce_lr_on_plateau`; an empty dict for other schedules.
    """
    inner = getattr(lr_scheduler, "lr_scheduler", None)
    return {} if inner is None else {"num_bad_epochs": inner.num_bad_epochs}


def restore_scheduler(lr_scheduler: Any, state: Mapping[str, Any]) -> None:
    """Put the result of `scheduler_state` back, in place."""
    for name, value in state.items():
        setattr(lr_scheduler.lr_scheduler, name, value)
