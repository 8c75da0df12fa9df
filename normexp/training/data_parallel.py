"""fairseq's trainer on several ranks: the same update as one process with all their batches.

fairseq averages the gradients. This module adds what it leaves open: a rank that has no batch left
in the last update of an epoch takes part without a token, all ranks validate and save the same
running statistics, and none waits forever for another that failed.
"""

import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn

from normexp.errors import UserError
from normexp.fairseq_plugin.patches import no_pickled_gathering
from normexp.norms import average_statistics
from normexp.norms.running_norm import RunningNorm
from normexp.training.process_group import COLLECTIVE_TIMEOUT, Ranks


@contextmanager
def torch_process_group(ranks: Ranks, cfg: DictConfig) -> Iterator[None]:
    """Open torch's process group for several ranks and adapt fairseq's configuration to it.

    NCCL on GPUs, gloo on CPUs; nothing for one rank. Raises UserError where two ranks would share
    a GPU. After an error the group is left open: other ranks may be waiting in it.
    """
    if ranks.size == 1:
        yield
        return
    device = 0
    on_gpu = torch.cuda.is_available() and not cfg.common.cpu
    if on_gpu:
        device = ranks.process.local_rank % torch.cuda.device_count()
        uuid = torch.cuda.get_device_properties(device).uuid
        ranks.refuse_shared_devices(f"GPU {device} of {socket.gethostname()}, {uuid}")
        torch.cuda.set_device(device)
    cfg.distributed_training.update(
        distributed_world_size=ranks.size,
        distributed_rank=ranks.rank,
        distributed_no_spawn=True,
        distributed_backend="nccl" if on_gpu else "gloo",
        device_id=device,
        # fairseq's use of torch's wrapper is for GPUs only, and minds unused parameters.
        ddp_backend="legacy_ddp",
    )
    # Otherwise rank 0 sends its checkpoint by pickle.
    cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
    if not ranks.is_main:
        cfg.common.log_format = "none"
    if dist.is_initialized():  # a run before this one diverged, on all ranks
        dist.destroy_process_group()
    dist.init_process_group(
        cfg.distributed_training.distributed_backend,
        store=dist.PrefixStore("group", ranks.store),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    with no_pickled_gathering(), warnings.catch_warnings():
        # They are averaged over the ranks before they are validated or saved.
        warnings.filterwarnings("ignore", "normalization statistics are private")
        yield
    dist.destroy_process_group()


def sum_over_ranks(value: float, ranks: Ranks) -> float:
    """Return the sum of the ranks' values. All ranks call it, within `torch_process_group`."""
    if ranks.size == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)


def data_parallel_trainer(ranks: Ranks, trainer: type) -> type:
    """Return a subclass of fairseq's Trainer for several ranks, `trainer` itself for one."""
    if ranks.size == 1:
        return trainer
    from fairseq import utils

    class DataParallelTrainer(trainer):
        def __init__(self, cfg: Any, task: Any, *args: Any, **kwargs: Any):
            super().__init__(cfg, task, *args, **kwargs)
            task.train_step = self._without_padding(task.train_step)

        def begin_valid_epoch(self, epoch: int) -> None:
            super().begin_valid_epoch(epoch)
            _synchronize_state(self.get_model())

        def consolidate_optimizer(self) -> None:
            # fairseq calls this on all ranks before a checkpoint is written, and also on a rank
            # that failed, to go on with a search for the cause that needs all of them.
            error = sys.exc_info()[1]
            if error is not None:
                raise error
            _synchronize_state(self.get_model())
            if self._ema is not None:
                _synchronize_state(self.ema.get_model())
            super().consolidate_optimizer()

        def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
            if not sample and not is_dummy and self.get_model().training:
                return super()._prepare_sample(self._empty_batch())[0], False
            return super()._prepare_sample(sample, is_dummy)

        def _empty_batch(self) -> dict[str, Any]:
            """Return a batch of padding alone, for a rank that has no batch left.

            fairseq would use its dummy batch, whose tokens would count in statistics, and would
            forget how many tokens the rank had before it in the same update.
            """
            sample = utils.apply_to_sample(lambda tensor: tensor[:1], self._dummy_batch)
            padding = torch.full_like(sample["target"], self.task.target_dictionary.pad())
            return {**sample, "target": padding, "ntokens": 0, "nsentences": 0}

        def _without_padding(self, train_step: Any) -> Any:
            """Return the task's train_step for which an empty batch counts nothing."""

            def train(sample: dict[str, Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if sample["nsentences"]:
                    return train_step(sample, model, *args, **kwargs)
                with _padding_alone(model):
                    loss, size, logged = train_step(sample, model, *args, **kwargs)
                kept = ("penalty",)  # this rank's share of the penalty on all ranks' tokens
                return (
                    loss,
                    size * 0,
                    {name: x if name in kept else x * 0 for name, x in logged.items()},
                )

            return train

    return DataParallelTrainer


def _synchronize_state(model: nn.Module) -> None:
    """Give the norms the same state on all ranks, so that one rank's checkpoint serves all."""
    average_statistics(model)
    counters = [
        value
        for norm in model.modules()
        if isinstance(norm, RunningNorm)
        for value in norm.state_dict().values()
        if not value.is_floating_point()
    ]
    if counters:  # a rank that had no batch left has counted fewer steps
        largest = torch.stack(counters)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        for counter, value in zip(counters, largest, strict=True):
            counter.copy_(value)


@contextmanager
def _padding_alone(model: nn.Module) -> Iterator[None]:
    """Within this context layers with running statistics treat every token as padding."""

    def hide(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        return (x,), {
            "padding_mask": torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device).t()
        }

    handles = [
        norm.register_forward_pre_hook(hide, with_kwargs=True)
        for norm in model.modules()
        if isinstance(norm, RunningNorm)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_other_start(ranks: Ranks, num_updates: int, checkpoint: str) -> None:
    """Raise UserError on a rank that starts from another number of updates than rank 0.

    checkpoint: the path that the ranks read, for the message.
    """
    if ranks.size > 1 and (main := ranks.from_main("start", lambda: num_updates)) != num_updates:
        raise UserError(
            f"rank 0 starts after update {main}, but here after update {num_updates}: {checkpoint} "
            "must be on a disk that all nodes share (results_dir=...)"
        )
