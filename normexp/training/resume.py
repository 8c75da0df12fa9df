"""What fairseq forgets when a training is resumed, so that it ends as if never interrupted."""

import math
from collections.abc import Mapping
from typing import Any

from fairseq import utils
from fairseq.logging.meters import MetersDict
from omegaconf import DictConfig

from normexp.training.progress import numbers


class AlreadyTrained(Exception):
    """The checkpoint to resume from is the last of a training that has reached its end."""


def reached_end(cfg: DictConfig, updates: int, seconds: float) -> bool:
    """Whether fairseq had stopped here by number of updates or time; by itself it looks only after
    one more update."""
    hours = cfg.optimization.stop_time_hours
    return updates >= (cfg.optimization.max_update or math.inf) or 0 < hours < seconds / 3600


def epoch_averages(extra_state: Mapping[str, Any]) -> dict[str, float]:
    """The averages over an epoch, which fairseq logs only after the epoch's checkpoint.

    extra_state: of a checkpoint. Apart from times, these are the numbers that were to be logged.
    """
    meters = MetersDict()
    meters.load_state_dict(extra_state["metrics"]["train"])
    # Derived values are not in a checkpoint.
    likelihood = meters["nll_loss" if "nll_loss" in meters else "loss"]
    return numbers(meters.get_smoothed_values()) | {"ppl": utils.get_perplexity(likelihood.avg)}


def scheduler_state(lr_scheduler: Any) -> dict[str, Any]:
    """What fairseq leaves out of a checkpoint of `reduce_lr_on_plateau`: its count of epochs."""
    inner = getattr(lr_scheduler, "lr_scheduler", None)
    return {} if inner is None else {"num_bad_epochs": inner.num_bad_epochs}


def restore_scheduler(lr_scheduler: Any, state: Mapping[str, Any]) -> None:
    """The counterpart of `scheduler_state`."""
    for name, value in state.items():
        setattr(lr_scheduler.lr_scheduler, name, value)
