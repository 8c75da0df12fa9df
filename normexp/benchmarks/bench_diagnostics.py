"""Cost of the diagnostics of logged updates: their time beside that of a training update."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
from normexp.benchmarks.toy import toy_task
from normexp.sites import SITES
from normexp.training.diagnostics import update_diagnostics

NORMS = ("layer", "batch", "power", "power_released")
_MODEL = "translation_small_cpu"
_PARTS = ("update", "update with diagnostics", "diagnostics alone")


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time updates of a small Transformer with and without diagnostics, one norm at all sites.

    Writes to `record`, and returns, for each norm quartiles of an update's milliseconds, of those
    of the diagnostics alone, and of two ratios computed round by round: an update with diagnostics
    to one without, and the diagnostics alone to an update. `share_of_training` is the latter over
    the log_interval of configs/train.yaml. The small model of configs/model and the toy corpus make
    the updates short, so elsewhere the shares are smaller.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = [_row(norm, Path(folder), rounds, progress) for norm in NORMS]
    result = {
        "what": f"one update of the model {_MODEL} on the toy corpus, a norm at all of its sites, "
        "with and without the diagnostics of that update",
        "quartiles": "lower, median, upper",
        "measured": measured,
    }
    return write_record(record, "diagnostics", {"rounds": rounds}, result)


def _row(norm: str, folder: Path, rounds: int, progress: bool) -> dict[str, Any]:
    from fairseq.trainer import Trainer

    everywhere = [f"norm.sites.{site}={norm}" for site in SITES["translation"]]
    cfg, task = toy_task(
        "toy_translation", folder, f"model={_MODEL}", f"norm={norm}", "seed=1", *everywhere
    )
    interval, cfg.common.log_interval = cfg.common.log_interval, 1
    cfg.common.cpu = not torch.cuda.is_available()
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    trainer = Trainer(cfg, task, model, criterion)
    batches = list(itertools.islice(trainer.get_train_iterator(1).next_epoch_itr(), 8))
    trainer.begin_epoch(1)
    # One each, so that in a round both train on the same batch.
    own, its = itertools.cycle(batches), itertools.cycle(batches)
    reports: list[dict[str, float]] = []

    def report(_: int, values: dict[str, float]) -> None:
        reports[:] = [values]

    def update() -> None:
        trainer.train_step([next(own)])

    def update_with_diagnostics() -> None:
        with update_diagnostics(trainer, report):
            trainer.train_step([next(its)])

    def alone() -> None:
        with update_diagnostics(_AfterAnUpdate(trainer), report):
            pass

    calls: tuple[Callable[[], None], ...] = (update, update_with_diagnostics, alone)
    timings = interleave(dict(zip(_PARTS, calls, strict=True)), rounds, progress)
    shares = timings.ratios(_PARTS[2], _PARTS[0])
    return {
        "norm": norm,
        "values": len(reports[0]),
        "milliseconds_per_update": [round(1e3 * x, 3) for x in timings.quartiles(_PARTS[0])],
        "milliseconds_of_diagnostics": [round(1e3 * x, 3) for x in timings.quartiles(_PARTS[2])],
        "ratio_with_to_without": [round(x, 4) for x in timings.ratios(_PARTS[1], _PARTS[0])],
        "share_of_logged_update": [round(x, 5) for x in shares],
        "log_interval": interval,
        "share_of_training": [round(x / interval, 7) for x in shares],
        **timings.rounds,
    }


class _AfterAnUpdate:
    """A trainer as it looks where an update has just been made and takes no time."""

    is_data_parallel_master = True

    def __init__(self, trainer: Any) -> None:
        self.cfg, self.get_model = trainer.cfg, trainer.get_model
        self._updates = itertools.count()

    def get_num_updates(self) -> int:
        return next(self._updates)
