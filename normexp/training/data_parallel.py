"""fairseq's trainer on several ranks: the same update as one process with all their batches.

fairseq averages the gradients. What it leaves open is settled here: which masks dropout draws,
what a rank does that has no batch left in the last update of an epoch, whose running statistics
are validated and saved, and where its code would have one rank wait for another forever.
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
from normexp.norms import average_statistics
from normexp.norms.running_norm import RunningNorm
from normexp.training.process_group import COLLECTIVE_TIMEOUT, Ranks


def seed_on(rank: int, seed: int) -> int:
    """The seed of torch on a rank; rank 0 has that of a single process.

    fairseq gives all ranks the same, so that their dropout masks would be alike. torch's generator
    of the CPU takes the lower 32 bits only. fairseq's seed grows by one with each update.
    """
    return (seed + (rank << 24)) % 2**32 if rank else seed


@contextmanager
def process_group(ranks: Ranks, cfg: DictConfig) -> Iterator[None]:
    """Several ranks: a process group for training, and fairseq's configuration changed for it.

    NCCL on GPUs, gloo on CPUs. Raises UserError where two ranks would share a GPU. After an error
    the group is left as it is: others may be waiting in it.
    """
    if ranks.size == 1:
        yield
        return
    from fairseq.distributed import utils as fairseq_distributed

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
    vars(fairseq_distributed.get_global_group).pop("_global_group", None)
    dist.init_process_group(
        cfg.distributed_training.distributed_backend,
        store=dist.PrefixStore("group", ranks.store),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    gather = fairseq_distributed.all_gather_list
    fairseq_distributed.all_gather_list = _own_alone
    try:
        with warnings.catch_warnings():
            # They are pooled before they are validated or saved.
            warnings.filterwarnings("ignore", "normalization statistics are private")
            yield
    finally:
        fairseq_distributed.all_gather_list = gather
    dist.destroy_process_group()


def total(value: float, ranks: Ranks) -> float:
    """The sum of the ranks' values; to be called on all of them within `process_group`."""
    if ranks.size == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)


def trainer_on(ranks: Ranks, trainer: type) -> type:
    """The class of trainer that goes with several ranks; with one, fairseq's own."""
    if ranks.size == 1:
        return trainer
    from fairseq import utils

    class DataParallelTrainer(trainer):
        def __init__(self, cfg: Any, task: Any, *args: Any, **kwargs: Any):
            super().__init__(cfg, task, *args, **kwargs)
            task.train_step = self._train_on(task.train_step)

        def begin_valid_epoch(self, epoch: int) -> None:
            super().begin_valid_epoch(epoch)
            _pool_state(self.get_model())

        def consolidate_optimizer(self) -> None:
            # fairseq calls this on all ranks before a checkpoint is written, and also on a rank
            # that failed, to go on with a search for the cause that needs all of them.
            error = sys.exc_info()[1]
            if error is not None:
                raise error
            _pool_state(self.get_model())
            super().consolidate_optimizer()

        def _set_seed(self) -> None:
            seed = self.cfg.common.seed + self.get_num_updates()
            utils.set_torch_seed(seed_on(ranks.rank, seed))

        def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
            if not sample and not is_dummy and self.get_model().training:
                return super()._prepare_sample(self._nothing())[0], False
            return super()._prepare_sample(sample, is_dummy)

        def _nothing(self) -> dict[str, Any]:
            """A batch without a token for a rank that has none left.

            fairseq would take one that it knows, whose tokens would count in statistics, and
            would forget how many tokens the rank had before it in the same update.
            """
            sample = utils.apply_to_sample(lambda tensor: tensor[:1], self._dummy_batch)
            padding = torch.full_like(sample["target"], self.task.target_dictionary.pad())
            return {**sample, "target": padding, "ntokens": 0, "nsentences": 0}

        def _train_on(self, train_step: Any) -> Any:
            def train(sample: dict[str, Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if sample["nsentences"]:
                    return train_step(sample, model, *args, **kwargs)
                with _padding_alone(model):
                    loss, size, logged = train_step(sample, model, *args, **kwargs)
                kept = ("penalty",)  # a share of what all ranks' tokens cost
                return (
                    loss,
                    size * 0,
                    {name: x if name in kept else x * 0 for name, x in logged.items()},
                )

            return train

    return DataParallelTrainer


def _pool_state(model: nn.Module) -> None:
    """The same state of the norms on all ranks, so that a checkpoint of one is that of all."""
    average_statistics(model)
    counters = [
        value
        for norm in model.modules()
        if isinstance(norm, RunningNorm)
        for value in norm.state_dict().values()
        if not value.is_floating_point()
    ]
    if counters:  # those of a rank that had no batch left are behind
        largest = torch.stack(counters)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        for counter, value in zip(counters, largest, strict=True):
            counter.copy_(value)


@contextmanager
def _padding_alone(model: nn.Module) -> Iterator[None]:
    """Running statistics take all tokens of this context's batch for padding."""

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


def _own_alone(data: Any, group: Any = None, max_size: int = 0) -> list[Any]:
    """In the place of fairseq's gathering of pickled objects: what a GPU is, for the log."""
    from fairseq import utils

    if not isinstance(data, utils.CudaEnvironment):
        raise UserError(
            "on several ranks fairseq.criterion must be one whose logged values can be summed, as "
            "those whose names start with normexp_ are"
        )
    return [data]


def refuse_other_start(ranks: Ranks, num_updates: int, checkpoint: str) -> None:
    """Raise UserError on a rank that starts from another number of updates than rank 0."""
    if ranks.size > 1 and (main := ranks.from_main("start", lambda: num_updates)) != num_updates:
        raise UserError(
            f"rank 0 starts after update {main}, but here after update {num_updates}: {checkpoint} "
            "must be on a disk that all nodes share (results_dir=...)"
        )
