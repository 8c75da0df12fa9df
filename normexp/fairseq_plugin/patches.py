"""Every name of fairseq, and of torch under it, that this project replaces while something runs.

Each but the first is replaced by a context manager of this file and restored on leaving it.
`fairseq-train --user-dir normexp/fairseq_plugin` meets only the first three; the others surround
normexp's own runs and are in force only while they are needed.

name                           fairseq                           put in its place, and why
-----------------------------  --------------------------------  -----------------------------------
checkpoint_utils               brings what it has read of a      `check_configurations`: the same
  ._upgrade_state_dict         checkpoint into today's form and  for configurations that
                               evaluates texts in its            config_guard.py lets through, from
                               configuration as Python later     the import of the plugin on

transformer_lm                 builds a language model with the  `language_model_decoder`: the
  .TransformerDecoder          class under this name             decoder with chosen norms; fairseq
                                                                 has no argument for a subclass

data_utils.batch_by_size       leaves the last batch out unless  `last_batches_kept`: the same
                               it has a multiple of 8            batches and the last one; no
                               sentences: they are missing in    sentence is missing
                               training, validation and scores
                               (required_batch_size_multiple)

fairseq_cli.train.Trainer      builds the trainer with the       `trainer_class`: a subclass that
                               class under this name             measures, resumes, reports
                                                                 divergence and supports several
                                                                 ranks

fairseq_cli.train              validates and saves after an      `after_updates`: the same, then a
  .validate_and_save           update, as configured             call, in which a signal can end
                                                                 training in order

fairseq_cli.train.validate     returns the validation losses     `after_validations`: the same, then
                                                                 a call that can end the training
                                                                 before one of them chooses a
                                                                 checkpoint

progress_bar                   calls wandb.init at each epoch    `metrics_sent_to`: a bar that
  .WandBProgressBarWrapper     and validation, which leaves      passes each number to functions and
                               empty run folders                 knows nothing of W&B

iterators.BackgroundConsumer   reads batches ahead in a thread   `prefetchers_closed`: the same
                               that outlives a training stopped  thread, ended with the training
                               within an epoch; Python may then
                               end with SIGABRT

PathManager.copy               copies a checkpoint in place: a   `checkpoint_files_by`: the caller's
                               kill leaves half a file           copy, which leaves the old file or
                                                                 the new one

checkpoint_utils               writes without fsync; repeats a   `checkpoint_files_by`: the caller's
  .torch_persistent_save       failed write behind what is in    save, likewise
                               the file already

fairseq.trainer.build_ema      averages integers, which torch    `moving_average`: integers copied,
                               refuses, tied weights twice, and  every tensor averaged once, norms
                               loses the norms after the stacks  kept

torch.load                     unpickles a checkpoint without    `preloaded`: a state read before,
                               comparing checksums               with checksums and weights_only

distributed.utils              gathers pickled objects of all    `no_pickled_gathering`: the rank's
  .all_gather_list             ranks through buffers on a GPU    own object if it is for the log,
                                                                 else an error; ranks on CPUs have
                                                                 no such buffers

fairseq also keeps state in attributes of its functions. A second training of the same process
would inherit it, so `forget_earlier_trainings` removes:

attribute                             what a second training would do with it
------------------------------------  ----------------------------------------------------------
checkpoint_utils.save_checkpoint.best compare with the other training's best loss, and write no
                                      checkpoint_best.pt
fairseq_cli.train.should_stop_early   count epochs without progress from the other training's best
  .best, .num_runs                    loss
get_global_group._global_group        communicate in a process group that has been destroyed

Single objects, not names, are changed elsewhere: the class of modules in dropout.py and
fast_attention.py, `criterion.forward` in training/speed.py, `task.train_step` in
training/data_parallel.py.
"""

import logging
import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, trainer, utils
from fairseq.data import data_utils, iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar
from fairseq.logging.meters import AverageMeter
from fairseq.models import transformer_lm
from fairseq.models.ema import EMA

from normexp.errors import UserError
from normexp.fairseq_plugin.config_guard import check_checkpoint

logger = logging.getLogger(__name__)

# fairseq_cli.train configures the root logger when it is imported, so it is a parameter here: only
# a training imports it.


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context the attribute `name` of a module or class is `value`."""
    original = vars(owner)[name]  # not getattr, which would unwrap a staticmethod
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def check_configurations() -> None:
    """Let fairseq refuse checkpoints whose configuration it could run as code, from now on."""
    upgrade = checkpoint_utils._upgrade_state_dict

    def checked(state: dict[str, Any]) -> dict[str, Any]:
        try:
            check_checkpoint(state)
        except UserError as error:
            raise UserError(f"a checkpoint was not loaded: {error}") from None
        return upgrade(state)

    checkpoint_utils._upgrade_state_dict = checked


def language_model_decoder(build: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let TransformerLanguageModel.build_model get its decoder from `build`.

    build: called with the arguments of fairseq's TransformerDecoder.
    """
    return patched(transformer_lm, "TransformerDecoder", build)


def last_batches_kept() -> AbstractContextManager[None]:
    """Let fairseq's batch_by_size return every index that it is given.

    Since 2022 it drops the last batch if required_batch_size_multiple, 8 by default, does not
    divide its number of sentences. The first time that a batch is kept, a warning says so.
    """
    original = data_utils.batch_by_size
    told: set[int] = set()

    def complete(
        indices: Any,
        num_tokens_fn: Callable[[int], int],
        num_tokens_vec: Any = None,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
        fixed_shapes: Any = None,
    ) -> Any:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)  # it may be an iterator
        if len(indices) == 0:
            return []  # which the original takes for an error
        batches = original(
            indices,
            num_tokens_fn,
            num_tokens_vec,
            max_tokens,
            max_sentences,
            required_batch_size_multiple,
            fixed_shapes,
        )
        kept = sum(map(len, batches))
        if fixed_shapes is not None or kept == len(indices):
            return batches
        if required_batch_size_multiple not in told:
            told.add(required_batch_size_multiple)
            logger.warning(
                "keeping the last %d of %d sentences, which fairseq leaves out without a word "
                "because of required_batch_size_multiple=%d",
                len(indices) - kept,
                len(indices),
                required_batch_size_multiple,
            )
        return [*batches, indices[kept:]]  # they are in the order of the indices

    return patched(data_utils, "batch_by_size", complete)


def trainer_class(fairseq_train: Any, replacement: type) -> AbstractContextManager[None]:
    """Let fairseq's training loop, the module fairseq_cli.train, build a trainer of this class."""
    return patched(fairseq_train, "Trainer", replacement)


@contextmanager
def after_updates(
    fairseq_train: Any, action: Callable[[Any, Any, Any, bool], None]
) -> Iterator[None]:
    """Within this context fairseq's training loop, the module fairseq_cli.train, calls `action`.

    action: called as action(cfg, trainer, epoch_itr, at_end) after an update and the validation and
    the checkpoint that were due at it. at_end: the update was the last of an epoch or of the
    training.
    """
    validate_and_save = fairseq_train.validate_and_save

    def and_then(
        cfg: Any, trainer: Any, task: Any, epoch_itr: Any, subsets: list[str], end_of_epoch: bool
    ) -> tuple[list[float | None], bool]:
        losses, should_stop = validate_and_save(
            cfg, trainer, task, epoch_itr, subsets, end_of_epoch
        )
        action(cfg, trainer, epoch_itr, end_of_epoch or should_stop)
        return losses, should_stop

    with patched(fairseq_train, "validate_and_save", and_then):
        yield


@contextmanager
def after_validations(
    fairseq_train: Any, action: Callable[[Any, list[float | None]], None]
) -> Iterator[None]:
    """Within this context fairseq's training loop, the module fairseq_cli.train, calls `action`.

    action: called as action(trainer, losses) after a validation that has been logged, before a
    checkpoint is written; losses: the value of best_checkpoint_metric for each subset.
    """
    validate = fairseq_train.validate

    def and_then(cfg: Any, trainer: Any, *args: Any) -> list[float | None]:
        losses = validate(cfg, trainer, *args)
        action(trainer, losses)
        return losses

    with patched(fairseq_train, "validate", and_then):
        yield


@contextmanager
def prefetchers_closed() -> Iterator[None]:
    """End, on leaving this context, all threads by which fairseq has read ahead in it."""
    prefetchers: list[Any] = []

    class Prefetcher(iterators.BackgroundConsumer):
        def start(self) -> None:
            prefetchers.append(self)
            super().start()

    try:
        with patched(iterators, "BackgroundConsumer", Prefetcher):
            yield
    finally:
        for prefetcher in prefetchers:
            prefetcher._max_len = 0  # it ends after the batch at hand
            while prefetcher.is_alive():
                with suppress(queue.Empty):  # it may wait for room
                    prefetcher._queue.get_nowait()
                prefetcher.join(0.01)


@contextmanager
def checkpoint_files_by(
    copy: Callable[[Path, Path], None], save: Callable[[Path, dict[str, Any]], None]
) -> Iterator[None]:
    """Within this context fairseq writes its checkpoints by `save` and copies them by `copy`.

    copy: called with source and target; save: with the target and the content.
    """

    def copied(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        copy(Path(src_path), Path(dst_path))
        return True

    def saved(obj: Any, filename: str, async_write: bool = False) -> None:
        save(Path(filename), obj)

    with (
        patched(PathManager, "copy", staticmethod(copied)),
        patched(checkpoint_utils, "torch_persistent_save", saved),
    ):
        yield


class _MovingAverage(EMA):
    """fairseq's moving average of a model's state, once for every tensor of it.

    By itself it averages integers, such as counters of steps, which torch refuses; it averages
    tied weights once under each of their names, that is twice; and it leaves the models' `version`
    out, so that its own model takes itself for one of an early fairseq and loses the norms after
    its stacks.
    """

    @torch.no_grad()
    def _step_internal(self, new_model: Any, updates: int | None = None) -> None:
        before = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
        average = {}
        for name, value in new_model.state_dict().items():
            if value.is_floating_point():
                value = value.to(before[name].dtype).lerp(before[name], self.decay)
            average[name] = value.clone()
        if self.config.ema_fp32:
            self.fp32_params = average
        self.restore(average)


def moving_average() -> AbstractContextManager[None]:
    """Let fairseq's trainer average weights by `_MovingAverage`."""
    return patched(trainer, "build_ema", _MovingAverage)


def preloaded(state: dict[str, Any]) -> AbstractContextManager[None]:
    """Let fairseq's loading of a checkpoint get `state` in place of the file's content."""
    return patched(torch, "load", lambda *_, **__: state)


def no_pickled_gathering() -> AbstractContextManager[None]:
    """Let fairseq's all_gather_list return what the rank itself gave, if that is a GPU's name.

    It raises UserError for anything else: logged values of a criterion that cannot be summed.
    """
    return patched(distributed_utils, "all_gather_list", _own_device_only)


def _own_device_only(data: Any, group: Any = None, max_size: int = 0) -> list[Any]:
    if not isinstance(data, utils.CudaEnvironment):
        raise UserError(
            "on several ranks fairseq.criterion must be one whose logged values can be summed, as "
            "those whose names start with normexp_ are"
        )
    return [data]


def forget_earlier_trainings(fairseq_train: Any) -> None:
    """Remove what earlier trainings of this process left in attributes of fairseq's functions.

    fairseq_train: the module fairseq_cli.train.
    """
    for function, names in (
        (checkpoint_utils.save_checkpoint, ("best",)),
        (fairseq_train.should_stop_early, ("best", "num_runs")),
        (distributed_utils.get_global_group, ("_global_group",)),
    ):
        for name in names:
            vars(function).pop(name, None)


Sink = Callable[[str, int, Mapping[str, float]], None]
"""Called as `sink(tag, step, values)`: the tag is "train_inner", "train" or the name of a
validation subset, the step a number of updates."""


@contextmanager
def metrics_sent_to(*sinks: Sink) -> Iterator[None]:
    """Within this context fairseq's metrics go to the sinks.

    fairseq builds the bar only where `common.wandb_project` is set (to any string), and only on
    the master process.
    """
    with patched(progress_bar, "WandBProgressBarWrapper", partial(MetricsBar, sinks=sinks)):
        yield


class MetricsBar(progress_bar.BaseProgressBar):
    """Wraps the progress bar on the console and passes every logged number to the sinks."""

    def __init__(
        self,
        wrapped_bar: progress_bar.BaseProgressBar,
        wandb_project: str,
        run_name: str | None = None,
        *,
        sinks: tuple[Sink, ...],
    ) -> None:
        super().__init__(wrapped_bar)
        self.wrapped_bar = wrapped_bar
        self.sinks = sinks

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wrapped_bar)

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None):
        """Pass on statistics within an epoch."""
        self._pass_on(stats, tag, step)
        self.wrapped_bar.log(stats, tag=tag, step=step)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None):
        """Pass on statistics at the end of an epoch or of a validation."""
        self._pass_on(stats, tag, step)
        self.wrapped_bar.print(stats, tag=tag, step=step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Leave the sinks alone: the run's owner has already given them its own configuration."""
        self.wrapped_bar.update_config(config)

    def _pass_on(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        for sink in self.sinks:
            sink(tag or "", int(stats["num_updates"] if step is None else step), numbers(stats))


def numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return those of fairseq's statistics that are numbers, without the number of updates."""
    values = {name: _number(stat) for name, stat in stats.items() if name != "num_updates"}
    return {name: value for name, value in values.items() if value is not None}


def _number(stat: Any) -> float | None:
    if isinstance(stat, AverageMeter):
        stat = stat.val
    if isinstance(stat, Number) or (torch.is_tensor(stat) and stat.numel() == 1):
        return float(stat)
    return None
