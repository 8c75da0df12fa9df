"""What each rank of the tests of synchronized statistics runs, in a process of its own.

A scenario is a function of (rank, world size) that returns nested dicts, lists and tensors.
"""

import copy
import datetime
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normexp.norms import (
    average_statistics,
    build_norm,
    norm_options,
    recompute_statistics,
    statistics_frozen,
)
from normexp.norms.kernels.choice import use_kernels
from support.batches import Batch, C, random_batch
from support.stateful import CASES, forward, penalized, state

# Those that stay in warm-up are left out: the others start in it.
SYNC_CASES = [
    name
    for name, case in CASES.items()
    if "sync" in norm_options(case.name) and not name.endswith("warming-up")
]
STEPS = 7
LEARNING_RATE = 0.01
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "gather", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter"),
)


def batch_of(rank: int, step: int, world: int) -> Batch:
    """Ranks differ in T, B, tokens and scale; some have padding only, or nothing at all."""
    rng = np.random.default_rng([rank, step])
    of = random_batch(
        *rng.integers(2, 5, 2), seed=100 * step + rank, scale=1.5 ** (rank - step % 3)
    )
    if (step, rank) in ((1, 0), (3, world - 1)):
        of.pad[...] = True
    if (step, rank) == (5, world - 1):
        return Batch(of.x[:0], of.pad[:, :0], of.gy[:0])
    return of


def concatenated(world: int, step: int) -> tuple[Batch, list[int]]:
    """The batches of all ranks as one list of tokens, (N, C) with a mask (N,), and their sizes."""
    of = [batch_of(rank, step, world) for rank in range(world)]
    x, gy = (np.concatenate([getattr(b, what).reshape(-1, C) for b in of]) for what in ("x", "gy"))
    return Batch(x, np.concatenate([b.pad.T.reshape(-1) for b in of]), gy), [b.pad.size for b in of]


class Collectives:
    """Counts the calls of torch.distributed from now on."""

    def __init__(self) -> None:
        self.count = 0
        self._replaced = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self._replaced.items():
            setattr(dist, name, self._counting(function))

    def _counting(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            self.count += 1
            return function(*args, **kwargs)

        return call

    def since(self) -> int:
        """Calls since the last question."""
        count, self.count = self.count, 0
        return count

    def stop(self) -> None:
        for name, function in self._replaced.items():
            setattr(dist, name, function)


def train_and_record(norm: nn.Module, batches: list[Batch]) -> dict[str, list]:
    """Step by step: y, gradients, state, and how many collectives each pass took."""
    counted, steps = Collectives(), []
    for of in batches:
        norm.zero_grad()
        x = torch.from_numpy(of.x.copy()).requires_grad_()
        y = norm(x, torch.from_numpy(of.pad))
        loss = penalized(norm, (y * torch.from_numpy(of.gy)).sum())
        collectives = [counted.since()]
        loss.backward()
        collectives.append(counted.since())
        steps.append(
            {
                "y": y.detach().reshape(-1, C),
                "gx": x.grad.reshape(-1, C),
                "parameters": {name: p.grad.clone() for name, p in norm.named_parameters()},
                "state": state(norm),
                "loss": loss.detach(),
                "collectives": collectives,
            }
        )
    y = norm.eval()(torch.from_numpy(of.x), torch.from_numpy(of.pad)).detach()
    counted.stop()
    return {"steps": steps, "y_eval": y.reshape(-1, C), "collectives_eval": counted.since()}


def training(rank: int, world: int) -> dict[str, object]:
    return {
        case: train_and_record(
            CASES[case].build(sync=True), [batch_of(rank, step, world) for step in range(STEPS)]
        )
        for case in SYNC_CASES
    }


def private(rank: int, world: int) -> dict[str, object]:
    """Without sync: the warnings, and the state of each rank before and after averaging."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = nn.ModuleList([CASES[case].build(sync=False) for case in SYNC_CASES])
        model.append(CASES["batch_released"].build())
        model.append(nn.BatchNorm1d(C))
        for norm in model[:-1]:
            for seed in range(4):
                forward(norm, batch_of(rank, seed, world))[1].backward()
    model[-1].running_mean.fill_(rank)
    before = state(model)
    counted = Collectives()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average_statistics(model)
    counted.stop()
    return {
        "warnings": [str(warning.message) for warning in caught],
        "before": before,
        "after": state(model),
        "collectives": counted.since(),
    }


def not_finite(rank: int, world: int) -> dict[str, object]:
    """A NaN in a token of one rank, then one in a gradient of one rank."""
    results = {}
    for case in SYNC_CASES:
        norm = CASES[case].build(sync=True)
        for step in (0, 2, 4):
            forward(norm, batch_of(rank, step, world))[1].backward()
        recorded = {"before": state(norm)}
        for what in ("x", "gy"):
            of = random_batch(4, 3, 50 + rank)
            of.pad[0, 0] = False
            if rank == world - 1:
                getattr(of, what)[0, 0, 1] = np.nan
            forward(norm, of)[1].backward()
            recorded[what] = state(norm)
        forward(norm, batch_of(rank, 6, world))[1].backward()
        results[case] = {**recorded, "after": state(norm)}
    return results


def checkpointing(rank: int, world: int) -> dict[str, object]:
    """Gradients and state with either kind and without, two micro-batches pending."""
    results = {}
    for case in SYNC_CASES:
        # The reentrant kind can have no penalty.
        for how, with_penalty in ((None, True), (False, True), (None, False), (True, False)):
            norm, gradients = CASES[case].build(sync=True), []
            for step in range(3):
                pending = []
                for i in (0, 1):
                    of = batch_of(rank, 2 * step + i, world)
                    x = torch.from_numpy(of.x).requires_grad_()
                    pad = torch.from_numpy(of.pad)
                    y = norm(x, pad) if how is None else checkpoint(norm, x, pad, use_reentrant=how)
                    loss = (y * torch.from_numpy(of.gy)).sum()
                    pending.append((x, penalized(norm, loss) if with_penalty else loss))
                for i in (0, 1) if step else (1, 0):
                    pending[i][1].backward()
                gradients += [x.grad for x, _ in pending]
            recorded = {"gradients": gradients, "state": state(norm)}
            results.setdefault(case, {})[f"{how}-{with_penalty}"] = recorded
    return results


def small_model(case: str, **options: object) -> nn.Module:
    """Linear, norm, Linear; called with x (N, C) and a mask (N,)."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm = nn.Linear(C, C), CASES[case].build(**options)
            self.after = nn.Linear(C, C)

        def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
            return self.after(self.norm(self.before(x), pad))

    torch.manual_seed(3)
    return Model().double()


def descend(
    model: nn.Module, call: nn.Module, batches: list[Batch], learning_rate: float
) -> list[dict[str, torch.Tensor]]:
    """Gradient descent, one step for every two batches: all of the model after each step.

    Both forwards come before the one backward pass.
    """
    trained = []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        loss = 0.0
        for of in (first, second):
            x = torch.from_numpy(of.x.reshape(-1, C))
            pad = torch.from_numpy(of.pad.T.reshape(-1))
            loss = penalized(model, loss + (call(x, pad) * _weights(of)).sum())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
                parameter.grad = None
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
    return trained


def _weights(of: Batch) -> torch.Tensor:
    """gy (N, C), zero at padding: what stands there in y depends on the batch's layout."""
    return torch.from_numpy(of.gy.reshape(-1, C) * ~of.pad.T.reshape(-1, 1))


def data_parallel(rank: int, world: int) -> dict[str, object]:
    """torch's wrapper about a model with synchronized norms."""
    results = {}
    batches = [batch_of(rank, step, world) for step in (0, 1, 2, 3, 4, 6)]
    for case in SYNC_CASES:
        for broadcast in (True, False):
            model = small_model(case, sync=True)
            wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
            # The wrapper averages gradients over the ranks; the layers' are those of the sum.
            trained = descend(model, wrapped, batches, world * LEARNING_RATE)
            results[f"{case}-{broadcast}"] = trained
    return results


def data_parallel_private(rank: int, world: int) -> dict[str, object]:
    """torch's wrapper about a norm without sync: its state after each of three steps."""
    results = {}
    for case in SYNC_CASES:
        for broadcast in (True, False):
            norm = CASES[case].build(sync=False)
            wrapped = DistributedDataParallel(norm, broadcast_buffers=broadcast)
            states = []
            for step in (0, 2, 4):
                of = batch_of(rank, step, world)
                y = wrapped(torch.from_numpy(of.x).requires_grad_(), torch.from_numpy(of.pad))
                penalized(norm, (y * torch.from_numpy(of.gy)).sum()).backward()
                states.append(state(norm))
            results[f"{case}-{broadcast}"] = states
    return results


def differentiable(rank: int, world: int) -> dict[str, object]:
    """Gradients at x and the weight as they are, and as functions that can be differentiated."""
    results = {}
    for case in ("batch", "regularized_batch", "power_v"):
        norm = CASES[case].build(sync=True)
        for step in (0, 2):
            x, loss = forward(norm, batch_of(rank, step, world))
            inputs = x, norm.weight
            written_out = torch.autograd.grad(loss, inputs, retain_graph=True)
            by_autograd = torch.autograd.grad(loss, inputs, create_graph=True)
            results[f"{case}-{step}"] = [list(written_out), [g.detach() for g in by_autograd]]
    return results


def half_precision(rank: int, world: int) -> dict[str, object]:
    """Models in bfloat16, the state after a few steps."""
    results = {}
    for case in SYNC_CASES:
        norm = CASES[case].build(sync=True).bfloat16()
        for step in range(4):
            of = batch_of(rank, step, world)
            x = torch.from_numpy(of.x).bfloat16().requires_grad_()
            y = norm(x, torch.from_numpy(of.pad))
            loss = (y * torch.from_numpy(of.gy).bfloat16()).sum().float()
            penalized(norm, loss).backward()
        results[case] = state(norm)
    return results


def stack(shared: bool, frozen: bool) -> nn.Module:
    """Three PN past their warm-up between linear layers, or one PN three times."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
            norms = [build_norm("power", C, warmup_steps=0, sync=True) for _ in range(3)]
            self.norms = nn.ModuleList([norms[0]] * 3 if shared else norms)

        def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
            for linear, norm in zip(self.linears, self.norms, strict=True):
                x = norm(linear(x), pad).tanh()
            return x

    torch.manual_seed(5)
    model = Stack().double()
    for norm in model.norms:
        norm.weight.requires_grad_(not frozen)
    return model


def iterate(model: nn.Module, batches: list[Batch]) -> dict[str, list]:
    """Forward and backward of each batch, the third without backward: state, gradients, calls."""
    counted, steps = Collectives(), []
    for number, of in enumerate(batches):
        x = torch.from_numpy(of.x.reshape(-1, C)).requires_grad_()
        y = model(x, torch.from_numpy(of.pad.T.reshape(-1)))
        if number != 2:
            (y * _weights(of)).sum().backward()
        steps.append({"gx": x.grad, "collectives": counted.since(), "state": state(model)})
    counted.stop()
    return {"steps": steps}


def several_layers(rank: int, world: int) -> dict[str, object]:
    """PN past its warm-up, several in a model."""
    batches = [batch_of(rank, step, world) for step in range(STEPS)]
    return {
        f"{shared}-{frozen}": iterate(stack(shared, frozen), batches)
        for shared in (False, True)
        for frozen in (False, True)
    }


def _complaint(work: Callable[[], object]) -> str:
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return ""


def other_layers(rank: int, world: int) -> dict[str, object]:
    """What is said where rank 0 runs one layer and the others another one of the same kind."""
    x = torch.ones(5, C) * 10.0**rank
    said: dict[str, object] = {}
    for case in SYNC_CASES:
        one, other = (CASES[case].build(sync=True) for _ in range(2))
        kept = one if rank == 0 else other
        said[case] = _complaint(lambda kept=kept: kept.train()(x))
    # PN past its warm-up, whose sums arrive at its next forward.
    one, other = (build_norm("power", num_features=C, warmup_steps=0, sync=True) for _ in range(2))
    order = (one, other) if rank == 0 else (other, one)

    def two_steps() -> None:
        for _ in range(2):
            y = x.clone().requires_grad_()
            for norm in order:
                y = norm(y)
            y.sum().backward()

    said["deferred"] = _complaint(two_steps)
    # A rank that has built a further model, before or after, is in the right.
    for when in ("before", "after"):
        if rank == 0 and when == "before":
            build_norm("batch", num_features=C)
        norm = build_norm("batch", num_features=C, sync=True)
        if rank == 0 and when == "after":
            build_norm("batch", num_features=C)
        said[when] = _complaint(lambda norm=norm: norm(x))
        # Level again, for what comes next.
        if rank != 0:
            build_norm("batch", num_features=C)
    return said


def reading(rank: int, world: int) -> dict[str, object]:
    """PN past its warm-up under torch's wrapper, whose state a rank reads after every step.

    By what is read, by which rank: the model after each step, and what has been read.
    """

    def by_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
        return model.norm.statistics()

    def by_inference(model: nn.Module) -> dict[str, torch.Tensor]:
        training = model.training
        norm = model.eval().norm
        with torch.inference_mode():
            norm(torch.ones(2, C).double())
        read = dict(zip(("scale", "shift"), norm.inference_affine(), strict=True))
        model.train(training)
        return read

    def by_copy(model: nn.Module) -> dict[str, torch.Tensor]:
        return dict(copy.deepcopy(model).named_buffers())

    def by_pickle(model: nn.Module) -> dict[str, torch.Tensor]:
        return dict(pickle.loads(pickle.dumps(model.norm)).named_buffers())

    def by_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in tensors.items()}

    def by_moving(model: nn.Module) -> dict[str, torch.Tensor]:
        """As evaluations begin."""
        return model.to("cpu").double().state_dict()

    results: dict[str, object] = {}
    ways = (by_state_dict, by_statistics, by_inference, by_copy, by_pickle, by_moving)
    for broadcast in (True, False):
        for reader, read in ((None, by_state_dict), *((i, w) for i in range(world) for w in ways)):
            model = _OfOneNorm(build_norm("power", C, warmup_steps=1, sync=True))
            wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
            steps = []
            for step in (0, 2, 4, 6):
                of = batch_of(rank, step, world)
                wrapped(torch.from_numpy(of.x)).square().mean().backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= LEARNING_RATE * parameter.grad
                        parameter.grad = None
                steps.append(copied(read(model)) if reader in (None, rank) else {})
                # What is read twice is read from the same.
                again = read(model) if reader == rank else {}
                assert all(torch.equal(value, again[key]) for key, value in again.items())
            results[f"{broadcast}-{reader}-{read.__name__}"] = {
                "read": steps,
                "last": copied(model.state_dict()),
            }
    return results


class _OfOneNorm(nn.Module):
    """Linear, norm, Linear; of a module level's class, to be pickled."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        torch.manual_seed(3)
        self.before, self.norm, self.after = nn.Linear(C, C), norm, nn.Linear(C, C)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(self.before(x)))


def second_forwards(rank: int, world: int) -> dict[str, object]:
    """State after some steps without and with a frozen one after each; recomputed statistics."""
    results = {}
    for case in SYNC_CASES:
        states = []
        for with_frozen in (False, True):
            norm = CASES[case].build(sync=True)
            for step in (0, 2, 4, 6):
                forward(norm, batch_of(rank, step, world))[1].backward()
                if with_frozen:
                    with statistics_frozen(norm):
                        forward(norm, batch_of(rank, step + 10, world))[1].backward()
            states.append(state(norm))
        recompute(norm, [batch_of(rank, step, world) for step in range(STEPS)])
        results[case] = [*states, state(norm)]
    return results


def recompute(norm: nn.Module, batches: list[Batch]) -> None:
    def run(of: Batch) -> None:
        norm(torch.from_numpy(of.x), torch.from_numpy(of.pad))

    recompute_statistics(batches, norm, forward=run)


def fully_sharded(rank: int, world: int) -> dict[str, object]:
    """FSDP of a model built without memory, and DDP, from the same weights: the model after."""
    mesh, results = init_device_mesh("cpu", (world,)), {}
    batches = [batch_of(rank, step, world) for step in (0, 1, 2, 3, 4, 6)]
    whole = StateDictOptions(full_state_dict=True)
    for case in ("batch", "power"):
        model = small_model(case, sync=True)
        with torch.device("meta"):
            sharded = small_model(case, sync=True)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device="cpu")
        for module in sharded.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        started = get_model_state_dict(sharded, options=whole)
        started = {key: value.clone() for key, value in started.items() if "norm." in key}
        set_model_state_dict(sharded, dict(model.state_dict()), options=whole)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        for call in (wrapped, sharded):
            descend(call, call, batches, world * LEARNING_RATE)
        results[case] = {
            "started": started,
            "ddp": dict(model.state_dict()),
            "fsdp": get_model_state_dict(sharded, options=whole),
        }
    return results


SCENARIOS = [
    private,
    several_layers,
    training,
    not_finite,
    checkpointing,
    data_parallel,
    data_parallel_private,
    differentiable,
    half_precision,
    other_layers,
    reading,
    second_forwards,
    fully_sharded,
]


def _run(rank: int, world: int, kernels: str, folder: Path) -> None:
    torch.set_num_threads(1)
    use_kernels(kernels)
    warnings.simplefilter("ignore")
    # Collectives that do not match end in an error instead of a silent wait.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {scenario.__name__: scenario(rank, world) for scenario in SCENARIOS}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run_all(world: int, kernels: str, folder: Path) -> list[dict[str, dict]]:
    """Run every scenario on `world` ranks; the results by rank."""
    torch.multiprocessing.spawn(_run, args=(world, kernels, folder), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
