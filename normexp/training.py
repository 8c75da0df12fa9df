"""Training in this process with fairseq's own trainer, made safe to interrupt and to repeat."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from normexp import checkpoints, preemption, speed
from normexp.diagnostics import norm_diagnostics
from normexp.kernels import use_kernels
from normexp.metrics_file import MetricsFile
from normexp.norms.loss_scale import follow_loss_scale
from normexp.norms.running_norm import RunningNorm
from normexp.progress import Sink, metrics_to

logger = logging.getLogger(__name__)


class Diverged(Exception):
    """Training met a loss or gradient that is not finite; `update` is the update that failed."""

    def __init__(self, update: int, reason: str):
        super().__init__(reason)
        self.update, self.reason = update, reason


@dataclass
class Observed:
    """What is seen of fairseq's trainer from outside while it trains."""

    trainer: Any = None
    seconds: float = 0.0  # inside training steps of this process
    tokens: int = 0  # real target tokens trained on in these seconds, end-of-sentence included
    num_epochs: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves besides its checkpoints."""

    num_updates: int
    num_epochs: int
    num_parameters: int
    tokens_per_second: float  # real target tokens, over the updates of the last process
    wall_time_seconds: float  # all processes together
    kernels: dict[str, int]  # layers with running statistics by what computed their last step


def train(
    fairseq_cfg: DictConfig,
    metrics: MetricsFile,
    sinks: list[Sink],
    speed_settings: Mapping[str, Any],
) -> TrainingResult:
    """Train to the end as configured, from checkpoint_last.pt where there is one.

    metrics and sinks receive every logged value as sink(tag, update, {name: value}), and after
    each validation the norms' statistics under the tag "diagnostics". Raises Diverged when a loss
    or gradient is not finite.

    speed_settings: of normexp.speed, which have decided the loss and the optimizer in fairseq_cfg
    and here decide precision, dropout and kernels.
    """
    from fairseq_cli import train as fairseq_train

    use_kernels(speed_settings["kernels"])
    observed = Observed()
    sinks = [metrics, *sinks]

    def diagnostics(tag: str, step: int, values: Mapping[str, float]) -> None:
        if tag == "valid":
            found = norm_diagnostics(observed.trainer.get_model())
            for sink in sinks:
                sink("diagnostics", step, found)

    def resume(step: int) -> None:
        metrics.truncate_after(step)
        # fairseq's count of epochs without a better loss is not in its checkpoints.
        metric = fairseq_cfg.checkpoint.best_checkpoint_metric
        for loss in metrics.values("valid", metric).values():
            fairseq_train.should_stop_early(fairseq_cfg, loss)

    _forget_earlier_trainings(fairseq_train)
    with (
        metrics_to(*sinks, diagnostics),
        checkpoints.atomic_copies(),
        preemption.checkpoint_at_updates(fairseq_train),
        _observed_trainer(fairseq_train, observed, resume, speed_settings),
    ):
        fairseq_train.main(fairseq_cfg)
    trainer = observed.trainer
    return TrainingResult(
        num_updates=trainer.get_num_updates(),
        num_epochs=observed.num_epochs,
        num_parameters=sum(p.numel() for p in trainer.get_model().parameters()),
        tokens_per_second=observed.tokens / observed.seconds if observed.seconds else 0.0,
        wall_time_seconds=trainer.cumulative_training_time(),
        kernels=dict(
            Counter(
                norm.kernels
                for norm in trainer.get_model().modules()
                if isinstance(norm, RunningNorm) and norm.kernels
            )
        ),
    )


def _forget_earlier_trainings(fairseq_train: Any) -> None:
    # fairseq keeps the best loss so far in attributes of functions, which a second training of the
    # same process inherits: it would then write no checkpoint_best.pt.
    from fairseq import checkpoint_utils

    for function, names in (
        (checkpoint_utils.save_checkpoint, ["best"]),
        (fairseq_train.should_stop_early, ["best", "num_runs"]),
    ):
        for name in names:
            vars(function).pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def _observed_trainer(
    fairseq_train: Any,
    observed: Observed,
    resume: Callable[[int], None],
    speed_settings: Mapping[str, Any],
) -> Iterator[None]:
    """Let fairseq's training loop build a trainer that can be seen from outside."""
    original = fairseq_train.Trainer

    class ObservedTrainer(original):
        def __init__(
            self, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any
        ):
            speed.into_model(speed_settings, model, criterion)
            super().__init__(cfg, task, model, criterion, *args, **kwargs)
            observed.trainer = self

        def train_step(self, samples: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            scale = _loss_scale(self.optimizer)
            try:
                output = super().train_step(samples, *args, **kwargs)
            except (FloatingPointError, StopIteration) as error:
                # On a gradient that is not finite fairseq looks for the layer it came from, and
                # that search dies of StopIteration at the encoder, whose output holds no tensor.
                cause = error if isinstance(error, FloatingPointError) else error.__context__
                if not isinstance(cause, FloatingPointError):
                    raise
                update = self.get_num_updates() + 1
                raise Diverged(update, f"{cause} in update {update}") from None
            if (changed := _loss_scale(self.optimizer)) != scale:
                follow_loss_scale(self.get_model(), changed / scale)
            observed.seconds += time.perf_counter() - started
            observed.tokens += sum(sample["ntokens"] for sample in samples if sample)
            return output

        def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
            filename = _instead_of_a_damaged(Path(filename))
            extra_state = super().load_checkpoint(str(filename), *args, **kwargs)
            if extra_state is not None:
                updates, position = self.get_num_updates(), extra_state["train_iterator"]
                # At the end of an epoch the position is the beginning of the next one.
                observed.num_epochs = position["epoch"] - (position["iterations_in_epoch"] == 0)
                logger.warning("resuming after update %d from %s", updates, filename)
                resume(updates)
            return extra_state

        def begin_epoch(self, epoch: int) -> None:
            super().begin_epoch(epoch)
            observed.num_epochs = epoch

    fairseq_train.Trainer = ObservedTrainer
    try:
        yield
    finally:
        fairseq_train.Trainer = original


def _loss_scale(optimizer: Any) -> float:
    """By what fairseq multiplies the loss at the moment: in float16 not always the same."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return 1.0
    return scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale


def _instead_of_a_damaged(last: Path) -> Path:
    good = checkpoints.newest_good(last.parent)
    if good is None or good == last:
        return last
    if last.exists():
        logger.warning("%s cannot be read; resuming from %s instead", last, good)
    return good
