"""Training in this process with fairseq's own trainer, made safe to interrupt and to repeat."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from normexp.checkpoints import store
from normexp.config.settings import SpeedSettings
from normexp.norms.kernels.choice import use_kernels
from normexp.norms.loss_scale import follow_loss_scale
from normexp.norms.running_norm import RunningNorm
from normexp.runs.metrics_file import MetricsFile
from normexp.training import data_parallel, preemption, reading_ahead, speed
from normexp.training import resume as resumption
from normexp.training.diagnostics import norm_diagnostics, update_diagnostics
from normexp.training.divergence import StatisticsWatch
from normexp.training.process_group import Ranks
from normexp.training.progress import Sink, metrics_to

logger = logging.getLogger(__name__)


class Diverged(Exception):
    """Training met a loss or gradient that is not finite; `update` is the update that failed.

    `site` is where statistics were first not finite (see StatisticsWatch), or None.
    """

    def __init__(self, update: int, reason: str, site: str | None):
        super().__init__(reason)
        self.update, self.reason, self.site = update, reason, site


@dataclass
class Observed:
    """What is seen of fairseq's trainer from outside while it trains."""

    trainer: Any = None
    seconds: float = 0.0  # inside training steps, of all processes up to now
    tokens: int = 0  # real target tokens trained on in these seconds, end-of-sentence included
    num_epochs: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # of an earlier process


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves besides its checkpoints."""

    num_updates: int
    num_epochs: int
    num_parameters: int
    tokens_per_second: float  # real target tokens of all ranks, over all updates
    wall_time_seconds: float  # all processes together
    kernels: dict[str, int]  # layers with running statistics by what computed their last step


def train(
    fairseq_cfg: DictConfig,
    metrics: MetricsFile | None,
    sinks: list[Sink],
    speed_settings: SpeedSettings,
    ranks: Ranks,
) -> TrainingResult:
    """Train to the end as configured, from checkpoint_last.pt where there is one.

    metrics and sinks receive every logged value as sink(tag, update, {name: value}), and under the
    tag "diagnostics" what diagnostics.py says of the norms: after each validation of their
    statistics, and at every update that is logged of that update. Raises Diverged when a loss or
    gradient is not finite.

    speed_settings: have decided the loss and the optimizer in fairseq_cfg and here decide
    precision, dropout and kernels.

    ranks: with several, all of them call this; metrics and sinks are those of rank 0, which alone
    logs and writes, and None and [] on the others.
    """
    from fairseq_cli import train as fairseq_train

    use_kernels(speed_settings.kernels)
    observed = Observed()
    sinks = [metrics, *sinks] if ranks.is_main else []

    def report(step: int, found: Mapping[str, float]) -> None:
        for sink in sinks:
            sink("diagnostics", step, found)

    def diagnostics(tag: str, step: int, values: Mapping[str, float]) -> None:
        if tag == "valid":
            report(step, norm_diagnostics(observed.trainer.get_model()))

    def earlier_losses(step: int) -> list[float]:
        metrics.truncate_after(step)
        metric = fairseq_cfg.checkpoint.best_checkpoint_metric
        return list(metrics.values("valid", metric).values())

    def resume(step: int, extra_state: Mapping[str, Any]) -> None:
        ended = False
        # fairseq's count of epochs without a better loss is not in its checkpoints.
        for loss in ranks.from_main("earlier losses", lambda: earlier_losses(step)):
            ended = fairseq_train.should_stop_early(fairseq_cfg, loss)
        if not extra_state:
            return
        seconds = extra_state["previous_training_time"]
        ended = ended or resumption.reached_end(fairseq_cfg, step, seconds)
        at_end_of_epoch = extra_state["train_iterator"]["iterations_in_epoch"] == 0
        due = ranks.is_main and (ended or at_end_of_epoch)
        if due and step not in metrics.values("train", "lr"):
            for sink in sinks:
                sink("train", step, resumption.epoch_averages(extra_state))
        if ended:
            raise resumption.AlreadyTrained

    _forget_earlier_trainings(fairseq_train)
    with (
        metrics_to(*sinks, diagnostics),
        store.atomic_writes(Path(fairseq_cfg.checkpoint.save_dir)),
        reading_ahead.ended_with_training(),
        preemption.checkpoint_at_updates(fairseq_train),
        data_parallel.process_group(ranks, fairseq_cfg),
        _observed_trainer(fairseq_train, observed, resume, report, speed_settings, ranks),
    ):
        try:
            with suppress(resumption.AlreadyTrained):
                fairseq_train.main(fairseq_cfg)
        except Diverged as diverged:  # the state of all sites, for whoever looks for the cause
            found = norm_diagnostics(observed.trainer.get_model())
            if ranks.is_main:
                metrics("diagnostics", diverged.update, found)
            raise
        tokens = data_parallel.total(observed.tokens, ranks)
    trainer = observed.trainer
    return TrainingResult(
        num_updates=trainer.get_num_updates(),
        num_epochs=observed.num_epochs,
        num_parameters=sum(p.numel() for p in trainer.get_model().parameters()),
        tokens_per_second=tokens / observed.seconds if observed.seconds else 0.0,
        wall_time_seconds=float(trainer.cumulative_training_time()),
        kernels=_kernels(trainer.get_model()) or observed.kernels,
    )


def _kernels(model: nn.Module) -> dict[str, int]:
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    return dict(Counter(norm.kernels for norm in norms if norm.kernels))


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
    resume: Callable[[int, Mapping[str, Any]], None],
    report: Callable[[int, Mapping[str, float]], None],
    speed_settings: SpeedSettings,
    ranks: Ranks,
) -> Iterator[None]:
    """Let fairseq's training loop build a trainer that can be seen from outside."""
    original = fairseq_train.Trainer

    class ObservedTrainer(data_parallel.trainer_on(ranks, original)):
        def __init__(
            self, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any
        ):
            speed.into_model(speed_settings, model, criterion)
            super().__init__(cfg, task, model, criterion, *args, **kwargs)
            observed.trainer = self
            self._watch = StatisticsWatch(model, criterion)

        def train_step(self, samples: Any, raise_oom: bool = True) -> Any:
            started = time.perf_counter()
            scale = _loss_scale(self.optimizer)
            self._watch.begin_update()
            try:
                # By itself fairseq leaves out a batch that does not fit into the GPU's memory, and
                # with it collectives that other ranks wait in.
                with update_diagnostics(self, report):
                    output = super().train_step(samples, raise_oom=True)
            except (FloatingPointError, StopIteration) as error:
                # On a gradient that is not finite fairseq looks for the layer it came from, and
                # that search dies of StopIteration at the encoder, whose output holds no tensor.
                cause = error if isinstance(error, FloatingPointError) else error.__context__
                if not isinstance(cause, FloatingPointError):
                    raise
                update = self.get_num_updates() + 1
                reason, first = f"{cause} in update {update}", self._watch.first_site(len(samples))
                if first is not None:
                    reason += f"; first not finite: {first[1]} at {first[0]}"
                elif self._watch:
                    reason += "; the statistics of all sites were finite"
                raise Diverged(update, reason, first and first[0]) from None
            if (changed := _loss_scale(self.optimizer)) != scale:
                follow_loss_scale(self.get_model(), changed / scale)
            observed.seconds += time.perf_counter() - started
            observed.tokens += sum(sample["ntokens"] for sample in samples if sample)
            return output

        def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> Any:
            ours = {
                "seconds": observed.seconds,
                "tokens": observed.tokens,
                "kernels": _kernels(self.get_model()) or observed.kernels,
                "lr_scheduler": resumption.scheduler_state(self.lr_scheduler),
            }
            return super().save_checkpoint(filename, {**extra_state, "normexp": ours})

        def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
            found: dict[str, Any] = {}
            path = ranks.from_main("checkpoint", lambda: self._newest(Path(filename), found))
            if path is None:
                data_parallel.refuse_other_start(ranks, 0, filename)
                resume(0, {})
                return super().load_checkpoint(filename, *args, **kwargs)
            state = found or store.load(Path(path))
            with store.instead_of_reading(state):
                extra_state = super().load_checkpoint(path, *args, **kwargs)
            updates = self.get_num_updates()
            data_parallel.refuse_other_start(ranks, updates, path)
            position = extra_state["train_iterator"]
            # At the end of an epoch the position is the beginning of the next one.
            at_end_of_epoch = position["iterations_in_epoch"] == 0
            observed.num_epochs = position["epoch"] - at_end_of_epoch
            ours = extra_state.get("normexp", {})  # absent in checkpoints of earlier versions
            for name in ("seconds", "tokens", "kernels"):
                setattr(observed, name, ours.get(name, getattr(observed, name)))
            resumption.restore_scheduler(self.lr_scheduler, ours.get("lr_scheduler", {}))
            if at_end_of_epoch:  # which the learning rate follows only after the checkpoint
                self.lr_step(observed.num_epochs, extra_state["val_loss"])
            logger.warning("resuming after update %d from %s", updates, path)
            resume(updates, extra_state)
            return extra_state

        def _newest(self, last: Path, found: dict[str, Any]) -> str | None:
            """Where to resume from; its content into `found`. Copies that were lost are remade."""
            newest = store.newest_good(last.parent)
            if newest is None:
                return None
            path, state = newest
            if path != last and last.exists():
                logger.warning("%s cannot be read; resuming from %s instead", last, path)
            position, of_epochs = state["extra_state"]["train_iterator"], self.cfg.checkpoint
            epoch = position["epoch"] - 1
            kept = position["iterations_in_epoch"] == 0 and epoch % of_epochs.save_interval == 0
            kept = kept and not of_epochs.no_epoch_checkpoints
            store.restore(last.parent, path, state, f"checkpoint{epoch}.pt" if kept else None)
            found.update(state)
            return str(path)

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
