"""Training steps replayed from CUDA graphs: equal to eager ones to the bit, and their time."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normexp.benchmarks.gpu.section import Row, device, timed
from normexp.norms import build_norm
from normexp.norms.kernels.choice import use_kernels

NORMS: dict[str, dict[str, Any]] = {
    "layer": {},
    "power": {"warmup_steps": 6},
    "power_v": {},
    "batch": {},
    "power_released": {"warmup_steps": 6, "num_groups": 4},
}
SHAPE, REHEARSED_SHAPE = (40, 100, 512), (4, 3, 8)
BLOCKS = 4
STEPS, REHEARSED_STEPS = 10, 2  # 10 are more than the warm-up
ROUNDS = 15


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """What replays a call from a CUDA graph; the call runs once before, to be compiled.

    Without a GPU the replay is the call itself.
    """
    if device().type == "cpu":
        call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows(rehearsal: bool) -> Iterator[Row]:
    """Yield for each norm whether replays equal eager steps to the bit, and quartiles of times.

    A step: forward and backward of a stack of pre-norm FFN blocks on a new batch, and SGD with
    momentum. Parameters and statistics are compared after each of STEPS steps, which begin in the
    norm's warm-up and end behind it.
    """
    use_kernels("triton")
    for norm, options in NORMS.items():
        shape, steps = (REHEARSED_SHAPE, REHEARSED_STEPS) if rehearsal else (SHAPE, STEPS)
        torch.manual_seed(1)
        stack = Stack(norm, options, shape[-1]).to(device())
        eager, replayed = _Training(stack, shape), _Training(stack, shape)
        start = replayed.state()
        replay = captured(replayed.step)
        replayed.restore(start)
        equal = True
        for _ in range(steps):
            batch = [torch.randn(shape, device=device()) for _ in range(2)]
            for training, step in ((eager, eager.step), (replayed, replay)):
                training.give(*batch)
                step()
            pairs = zip(eager.state(), replayed.state(), strict=True)
            equal = equal and all(torch.equal(*pair) for pair in pairs)
        calls = {"eager": eager.step, "replayed": replay}
        timings = timed(calls, ROUNDS, rehearsal)
        yield {
            "norm": norm,
            "equal_to_the_bit": equal,
            "steps": steps,
            "microseconds": {name: round(1e6 * timings.quartiles(name)[1], 1) for name in calls},
            "ratio_to_eager": [round(r, 3) for r in timings.ratios("replayed", "eager")],
            **timings.rounds,
        }


class Stack(nn.Module):
    """Residual blocks of norm and FFN, with one mask."""

    def __init__(self, norm: str, options: dict[str, Any], channels: int):
        super().__init__()
        self.norms = nn.ModuleList(build_norm(norm, channels, **options) for _ in range(BLOCKS))
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
            for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x (T, B, C) -> y like x."""
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x, padding_mask))
        return x


class _Training:
    """A copy of a stack that is trained, on a batch in memory of its own."""

    def __init__(self, stack: Stack, shape: tuple[int, int, int]):
        self.stack = copy.deepcopy(stack)
        times, batch, _ = shape
        lengths = torch.linspace(times / 2, times, batch).round()
        self.padding_mask = (torch.arange(times) >= lengths[:, None]).to(device())
        self.x, self.target = (torch.zeros(shape, device=device()) for _ in range(2))
        self.optimizer = torch.optim.SGD(
            self.stack.parameters(), lr=0.01, momentum=0.9, foreach=True
        )
        self.give(*(torch.randn(shape, device=device()) for _ in range(2)))
        # Makes gradients and momenta, which a graph needs to find at their places.
        start = self.state()
        self.step()
        self.restore([*start, *(torch.zeros_like(one) for one in self.state()[len(start) :])])

    def give(self, x: Tensor, target: Tensor) -> None:
        """Take another batch."""
        self.x.copy_(x)
        self.target.copy_(target)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        y = self.stack(self.x, self.padding_mask)
        (y - self.target).square().mean().backward()
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        """Copies of parameters, statistics and momenta."""
        return [one.detach().clone() for one in self._tensors()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Write a state back, in place."""
        for to, value in zip(self._tensors(), state, strict=True):
            to.copy_(value)

    def _tensors(self) -> list[Tensor]:
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.stack.parameters(), *self.stack.buffers(), *momenta]
