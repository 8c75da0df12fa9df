"""Training in this process with fairseq's own trainer, made safe to interrupt and to repeat."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from normexp.checkpoints import recovery, store
from normexp.config.seeding import Seeds
from normexp.config.settings import SpeedSettings
from normexp.errors import UserError
from normexp.fairseq_plugin import patches
from normexp.norms.kernels.choice import use_kernels
from normexp.norms.loss_scale import follow_loss_scale
from normexp.norms.running_norm import RunningNorm
from normexp.runs.metrics_file import MetricsFile
from normexp.training import (
    data_parallel,
    finetuning,
    preemption,
    randomness,
    resume,
    speed,
    storage,
    warmups,
)
from normexp.training.diagnostics import norm_diagnostics, update_diagnostics
from normexp.training.divergence import StatisticsWatch
from normexp.training.peak_memory import PeakMemory
from normexp.training.process_group import Ranks

logger = logging.getLogger(__name__)

_REFUSALS = (
    *(ValueError, TypeError, LookupError, ArithmeticError),
    *(AssertionError, AttributeError, RuntimeError),
)
"""What fairseq raises while it builds a model from settings that do not fit together."""


class Diverged(Exception):
    """A loss or gradient of training, or the loss of a validation, is not finite.

    update: the update that failed, or after which the validation was, counted from 1. num_updates:
    how many were done. reason: what is not finite and where, in words. site: where statistics were
    first not finite (see StatisticsWatch), or None. notes: see TrainingResult.
    """

    def __init__(self, update: int, num_updates: int, reason: str, site: str | None):
        super().__init__(reason)
        self.update, self.num_updates, self.reason, self.site = update, num_updates, reason, site
        self.notes: list[str] = []


@dataclass
class Observed:
    """fairseq's trainer, and counts of its work that outlive the process in checkpoints."""

    trainer: Any = None
    donor: Path | None = None  # the checkpoint whose weights the training begins with
    seconds: float = 0.0  # inside training steps, summed over this process and those it resumes
    tokens: int = 0  # non-padding target tokens in these seconds, end-of-sentence included
    num_epochs: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # of the process it resumes
    warned_of_warmups: bool = False


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training besides its checkpoints."""

    num_updates: int
    num_epochs: int
    num_parameters: int
    tokens_per_second: float  # non-padding target tokens of all ranks, over all updates
    wall_time_seconds: float  # summed over the processes that resumed one another
    kernels: dict[str, int]  # layers with running statistics by what computed their last step
    notes: list[str] = field(default_factory=list)  # what a reader of the result has to know
    peak_memory_bytes: int | None = None  # of the process that ended the training


def train(
    fairseq_cfg: DictConfig,
    metrics: MetricsFile | None,
    sinks: list[patches.Sink],
    speed_settings: SpeedSettings,
    seeds: Seeds,
    ranks: Ranks,
) -> TrainingResult:
    """Train to the end as configured, from checkpoint_last.pt where there is one.

    fairseq_cfg: fairseq's configuration with task, model, criterion and optimizer. metrics and
    sinks: receive every logged value as sink(tag, update, {name: value}) and, under the tag
    "diagnostics", what diagnostics.py computes of the norms: their statistics after each
    validation, and more at every update that is logged. speed_settings: they
    have decided the loss and the optimizer in fairseq_cfg and here decide precision, dropout and
    kernels. seeds: of each update and each epoch. ranks: all of them call this function; rank 0
    logs and writes, the others pass None and [] for metrics and sinks.

    Raises Diverged when a loss or gradient, or the loss of a validation, is not finite, UserError
    for what the user can correct (such as settings that make up no model), and Preempted after a
    signal (see preemption.py).
    """
    from fairseq_cli import train as fairseq_train

    use_kernels(speed_settings.kernels)
    # fairseq would begin with whatever lies beside this checkpoint.
    donor = fairseq_cfg.checkpoint.finetune_from_model
    fairseq_cfg.checkpoint.finetune_from_model = None
    observed = Observed(donor=donor and Path(donor))
    sinks = [metrics, *sinks] if ranks.is_main else []

    def report(step: int, values: Mapping[str, float]) -> None:
        for sink in sinks:
            sink("diagnostics", step, values)

    def report_after_validation(tag: str, step: int, values: Mapping[str, float]) -> None:
        if tag == "valid":
            report(step, norm_diagnostics(observed.trainer.get_model()))

    def earlier_losses(step: int) -> list[float]:
        metrics.truncate_after(step)
        metric = fairseq_cfg.checkpoint.best_checkpoint_metric
        return list(metrics.values("valid", metric).values())

    def catch_up(step: int, extra_state: Mapping[str, Any]) -> None:
        """Restore what fairseq has forgotten at update `step`; raise AlreadyTrained at the end."""
        # Early stopping: fairseq's count of epochs without a better loss is not in its checkpoints.
        ended = False
        for loss in ranks.from_main("earlier losses", lambda: earlier_losses(step)):
            ended = fairseq_train.should_stop_early(fairseq_cfg, loss)
        if not extra_state:
            return
        ended = ended or resume.reached_end(
            fairseq_cfg, step, extra_state["previous_training_time"]
        )
        # An epoch's averages: fairseq logs them only after the epoch's checkpoint.
        at_end_of_epoch = extra_state["train_iterator"]["iterations_in_epoch"] == 0
        due = ranks.is_main and (ended or at_end_of_epoch)
        if due and step not in metrics.values("train", "lr"):
            for sink in sinks:
                sink("train", step, resume.epoch_averages(extra_state))
        if ended:
            raise resume.AlreadyTrained

    patches.forget_earlier_trainings(fairseq_train)
    peak_memory = PeakMemory()
    trainer_class = _observed_trainer(
        randomness.seeded_trainer(
            seeds, ranks.rank, data_parallel.data_parallel_trainer(ranks, fairseq_train.Trainer)
        ),
        observed,
        catch_up,
        report,
        speed_settings,
        ranks,
    )
    with (
        patches.metrics_sent_to(*sinks, report_after_validation),
        store.atomic_writes(Path(fairseq_cfg.checkpoint.save_dir)),
        patches.prefetchers_closed(),
        patches.moving_average(),
        preemption.checkpoint_at_updates(fairseq_train),
        data_parallel.torch_process_group(ranks, fairseq_cfg),
        patches.after_validations(fairseq_train, _check_validation),
        patches.trainer_class(fairseq_train, trainer_class),
    ):
        try:
            with suppress(resume.AlreadyTrained):
                fairseq_train.main(fairseq_cfg)
        except Diverged as diverged:  # the state of all sites, to look for the cause
            values = norm_diagnostics(observed.trainer.get_model())
            diverged.notes = warmups.notes(observed.trainer.get_model())
            if ranks.is_main:
                metrics("diagnostics", diverged.update, values)
            raise
        except _REFUSALS as error:
            if observed.trainer is not None or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.info("fairseq could not begin", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"fairseq cannot train with these settings: {reason}") from error
        tokens = data_parallel.sum_over_ranks(observed.tokens, ranks)
    trainer = observed.trainer
    return TrainingResult(
        num_updates=trainer.get_num_updates(),
        num_epochs=observed.num_epochs,
        num_parameters=sum(p.numel() for p in trainer.get_model().parameters()),
        tokens_per_second=tokens / observed.seconds if observed.seconds else 0.0,
        wall_time_seconds=float(trainer.cumulative_training_time()),
        kernels=_kernels(trainer.get_model()) or observed.kernels,
        notes=warmups.notes(trainer.get_model()),
        peak_memory_bytes=peak_memory.read(),
    )


def _check_validation(trainer: Any, losses: list[float | None]) -> None:
    """Raise Diverged where a validation's loss is not finite.

    fairseq would go on and, as no number is smaller than NaN, take the next model for the best.
    An infinite perplexity may be that of a finite loss.
    """
    may_be_infinite = trainer.cfg.checkpoint.best_checkpoint_metric == "ppl"
    for loss in losses:
        if loss is None or math.isfinite(loss) or (may_be_infinite and loss == math.inf):
            continue
        updates = trainer.get_num_updates()
        what = f"the validation loss is {loss} after update {updates}"
        raise trainer.divergence(updates, what, num_batches=0)


def _kernels(model: nn.Module) -> dict[str, int]:
    """Count the layers with running statistics by the kernels of their last step."""
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    return dict(Counter(norm.kernels for norm in norms if norm.kernels))


def _observed_trainer(
    trainer: type,
    observed: Observed,
    catch_up: Callable[[int, Mapping[str, Any]], None],
    report: Callable[[int, Mapping[str, float]], None],
    speed_settings: SpeedSettings,
    ranks: Ranks,
) -> type:
    """Return a subclass of fairseq's Trainer that measures, resumes and reports divergence.

    observed: is filled as training goes. catch_up: called with the number of updates done and the
    checkpoint's extra_state ({} without a checkpoint) before training begins. report: called with
    the update and the diagnostics of each update that is logged.
    """

    class ObservedTrainer(trainer):
        def __init__(
            self, cfg: Any, task: Any, model: Any, criterion: Any, *args: Any, **kwargs: Any
        ):
            speed.apply_to_model(speed_settings, model, criterion)
            super().__init__(cfg, task, model, criterion, *args, **kwargs)
            observed.trainer = self
            self._watch = StatisticsWatch(model, criterion)

        def train_step(self, samples: Any, raise_oom: bool = True) -> Any:
            started = time.perf_counter()
            scale = _loss_scale(self.optimizer)
            self._watch.begin_update()
            # 1. fairseq's update. By itself fairseq leaves out a batch that does not fit into the
            # GPU's memory, and with it collectives that other ranks wait in: hence raise_oom.
            try:
                with update_diagnostics(self, report):
                    output = super().train_step(samples, raise_oom=True)
            except (FloatingPointError, StopIteration) as error:
                # On a gradient that is not finite fairseq looks for the layer it came from, and
                # that search dies of StopIteration at the encoder, whose output holds no tensor.
                cause = error if isinstance(error, FloatingPointError) else error.__context__
                if not isinstance(cause, FloatingPointError):
                    raise
                update = self.get_num_updates() + 1
                what = f"{cause} in update {update}"
                raise self.divergence(update, what, len(samples)) from None
            # 2. float16: nu has the scale of the loss, which this update may have changed.
            if (changed := _loss_scale(self.optimizer)) != scale:
                follow_loss_scale(self.get_model(), changed / scale)
            # 3. Time and tokens, for the record.
            observed.seconds += time.perf_counter() - started
            observed.tokens += sum(sample["ntokens"] for sample in samples if sample)
            return output

        def divergence(self, update: int, reason: str, num_batches: int) -> Diverged:
            first = self._watch.first_site(num_batches)
            if first is not None:
                reason += f"; first not finite: {first[1]} at {first[0]}"
            elif self._watch:
                reason += "; the statistics of all sites were finite"
            return Diverged(update, self.get_num_updates(), reason, first and first[0])

        def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> Any:
            added = {
                "seconds": observed.seconds,
                "tokens": observed.tokens,
                "kernels": _kernels(self.get_model()) or observed.kernels,
                "lr_scheduler": resume.scheduler_state(self.lr_scheduler),
            }
            return super().save_checkpoint(filename, {**extra_state, "normexp": added})

        def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
            # 1. Rank 0 decides which file, and all ranks must see the same one.
            latest: dict[str, Any] = {}
            path = ranks.from_main("checkpoint", lambda: self._latest(Path(filename), latest))
            if ranks.is_main:
                storage.check_room(self.cfg, self.get_model())
            if path is None:
                data_parallel.refuse_other_start(ranks, 0, filename)
                if observed.donor is not None:
                    model = self.get_model()
                    scale = finetuning.load_donor(observed.donor, model, self.cfg.model)
                    finetuning.follow_donor(model, scale, _loss_scale(self.optimizer))
                catch_up(0, {})
                return super().load_checkpoint(filename, *args, **kwargs)
            state = latest or store.load(Path(path))
            # 2. fairseq restores model, optimizer, schedule and the position in the data.
            with patches.preloaded(state):
                extra_state = super().load_checkpoint(path, *args, **kwargs)
            updates = self.get_num_updates()
            data_parallel.refuse_other_start(ranks, updates, path)
            _check_validation(self, [extra_state.get("val_loss")])  # earlier versions went on
            # 3. The rest: our counts, and what fairseq does only after an epoch's checkpoint.
            position = extra_state["train_iterator"]
            # At the end of an epoch the position is the beginning of the next one.
            at_end_of_epoch = position["iterations_in_epoch"] == 0
            observed.num_epochs = position["epoch"] - at_end_of_epoch
            added = extra_state.get("normexp", {})  # absent in checkpoints of earlier versions
            for name in ("seconds", "tokens", "kernels"):
                setattr(observed, name, added.get(name, getattr(observed, name)))
            resume.restore_scheduler(self.lr_scheduler, added.get("lr_scheduler", {}))
            if self.cfg.ema.store_ema:  # fairseq forgets how many updates ago it averaged
                self.ema.update_freq_counter = updates % self.cfg.ema.ema_update_freq
            if at_end_of_epoch:
                self.lr_step(observed.num_epochs, extra_state["val_loss"])
            logger.warning("resuming after update %d from %s", updates, path)
            catch_up(updates, extra_state)
            return extra_state

        def _latest(self, last: Path, content: dict[str, Any]) -> str | None:
            """Return the path to resume from and fill `content`. Remakes copies that were lost."""
            latest = recovery.latest_readable(last.parent)
            if latest is None:
                return None
            path, state = latest
            if path != last and last.exists():
                logger.warning("%s cannot be read; resuming from %s instead", last, path)
            position, settings = state["extra_state"]["train_iterator"], self.cfg.checkpoint
            epoch = position["epoch"] - 1
            kept = position["iterations_in_epoch"] == 0 and epoch % settings.save_interval == 0
            kept = kept and not settings.no_epoch_checkpoints
            recovery.restore(last.parent, path, state, f"checkpoint{epoch}.pt" if kept else None)
            content.update(state)
            return str(path)

        def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
            iterator = super().get_train_iterator(*args, **kwargs)
            if ranks.is_main and not observed.warned_of_warmups:
                observed.warned_of_warmups = True
                for warning in warmups.too_short(self.cfg, self.get_model(), len(iterator)):
                    logger.warning("%s", warning)
            return iterator

        def begin_epoch(self, epoch: int) -> None:
            super().begin_epoch(epoch)
            observed.num_epochs = epoch

    return ObservedTrainer


def _loss_scale(optimizer: Any) -> float:
    """Return the factor by which fairseq multiplies the loss: it changes in float16, else 1."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return 1.0
    return scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.loss_scale
