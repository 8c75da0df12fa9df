"""Tests of the Triton kernels against the plain layers; run by test_triton.py."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from normexp.norms import build_norm
from normexp.norms.kernels import triton
from normexp.norms.kernels.choice import use_kernels
from support.stateful import assert_same, state
from support.thorough import default_cases

assert triton.load()
kernels = triton.operators()

# Of the interpreter's numpy, on batches that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def plain_layers() -> Iterator[None]:
    use_kernels("plain")
    yield
    use_kernels("auto")


# --- One call of an operator, as the layers do it


def call_power(
    norm: nn.Module, x: Tensor, mask: Tensor | None, replayed: Tensor | None = None
) -> tuple:
    buffers = norm.running_psi2, norm.nu, norm.step, norm.num_rejected
    options = norm.eps, norm.alpha_fwd, norm.alpha_bwd, norm.warmup_steps, norm.bound_nu
    return kernels.power(x, mask, norm.weight, norm.bias, *buffers, replayed, *options)


def call_power_v(norm: nn.Module, x: Tensor, mask: Tensor | None, is_replay: bool = False) -> tuple:
    buffers = norm.running_psi2, norm.step, norm.num_rejected
    options = norm.eps, norm.alpha
    return (kernels.power_v(x, mask, norm.weight, norm.bias, *buffers, is_replay, *options),)


def call_released(
    norm: nn.Module, x: Tensor, mask: Tensor | None, replayed: Tensor | None = None
) -> tuple:
    buffers = norm.running_psi2, norm.e, norm.step, norm.num_rejected
    options = norm.num_groups, norm.eps, norm.alpha_fwd, norm.alpha_bwd, norm.warmup_steps
    return kernels.power_released(x, mask, norm.weight, norm.bias, *buffers, replayed, *options)


def call_batch(norm: nn.Module, x: Tensor, mask: Tensor | None, is_replay: bool = False) -> tuple:
    buffers = norm.running_mean, norm.running_var, norm.step, norm.num_rejected
    options = norm.eps, norm.momentum, norm._regularized
    return kernels.batch(x, mask, norm.weight, norm.bias, *buffers, is_replay, *options)


class Case(NamedTuple):
    name: str
    call: Callable[..., tuple]
    options: dict[str, object]


CASES = {
    "power": Case("power", call_power, {"warmup_steps": 2}),
    "power-bound_nu": Case(
        "power", call_power, {"warmup_steps": 1, "bound_nu": True, "alpha_bwd": 0.1}
    ),
    "power_v": Case("power_v", call_power_v, {"alpha": 0.3}),
    "power_released": Case("power_released", call_released, {"warmup_steps": 2}),
    "batch": Case("batch", call_batch, {}),
    "regularized_batch": Case("regularized_batch", call_batch, {"eps": 0.5, "momentum": 0.7}),
}
every_case = pytest.mark.parametrize("case", CASES)
GROUPS = {60: 2, 513: 3, 12: 2, 1: 1}


def build(case: str, channels: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In training mode, with random parameters; buffers and parameters float32 unless double."""
    name, _, options = CASES[case]
    if name == "power_released":
        options = {**options, "num_groups": GROUPS[channels]}
    norm = build_norm(name, channels, **options).to(DEVICE)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm.double() if dtype == torch.float64 else norm


def inputs(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, masked: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, mask and a gradient; where padding has no part, NaN at padding."""
    x = (torch.randn(shape) * torch.rand(shape[-1]) + torch.randn(shape[-1])).to(DEVICE, dtype)
    gradient = torch.randn(shape).to(DEVICE, dtype)
    if not masked:
        return x, None, gradient
    mask = torch.rand(shape[:-1], device=DEVICE) < 0.4
    garbage = 100.0 if case == "power_released" else float("nan")
    x[mask] = garbage
    if case != "power_released":
        gradient[mask] = garbage
    return x, mask.t() if x.dim() == 3 else mask, gradient  # of strides (1, B): read in place


def backward(norm: nn.Module, outputs: tuple, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Gradients of x and parameters; for BN with gradients reaching its statistics too."""
    targets, upstream = [outputs[0]], [gradient]
    if len(outputs) == 4:
        targets += outputs[1:3]
        upstream += [torch.full_like(outputs[1], 0.3), torch.full_like(outputs[2], -0.2)]
    return list(torch.autograd.grad(targets, (x, norm.weight, norm.bias), upstream))


def plain(norm: nn.Module, x: Tensor, mask: Tensor | None) -> tuple:
    """As a kernel's result, less what only a kernel returns."""
    if not hasattr(norm, "momentum"):
        return (norm(x, mask),)
    kept: list[tuple] = []
    norm._after_step = lambda *statistics: kept.append(statistics)
    return (norm(x, mask), *kept[0])


# --- Results


SIZES = [(60, torch.float64), (513, torch.float32), (12, torch.bfloat16), (1, torch.float16)]
EQUALITIES = [(case, *size) for size in SIZES for case in CASES]
# Every kernel in float64, every size and type with one of them.
EQUAL_BY_DEFAULT = [one for one in EQUALITIES if one[2] == torch.float64 or one[0] == "power"]


@pytest.mark.parametrize("setting", default_cases(EQUALITIES, EQUAL_BY_DEFAULT), ids=str)
def test_equal_to_the_plain_layer(setting: tuple[str, int, torch.dtype]) -> None:
    """Outputs, gradients and state over the end of the warm-up and over unusable batches."""
    case, channels, dtype = setting
    torch.manual_seed(1 + [size for _, size in SIZES].index(dtype))
    norm = build(case, channels, dtype)
    expected_norm = copy.deepcopy(norm)
    for batch in ("first", "padding", "no mask", "broken", "list", "empty"):
        shape = (29, channels) if batch == "list" else (11, 3, channels)
        if batch == "empty":
            shape = (0, 2, channels)
        x, mask, gradient = inputs(case, shape, dtype, masked=batch != "no mask")
        if batch == "padding":
            mask = torch.ones_like(mask)
            if case == "power_released":
                x = torch.randn_like(x)
        if batch == "broken":
            x[0, 0, 0], mask[0, 0] = float("inf"), False
        results = []
        for which in (norm, expected_norm):
            leaf = x.clone().requires_grad_()
            outputs = (CASES[case].call if which is norm else plain)(which, leaf, mask)
            gradients = backward(which, outputs, leaf, gradient)
            results.append([outputs[0].detach(), *gradients])
            assert outputs[0].dtype == dtype
        for obtained, expected in zip(*results, strict=True):
            assert obtained.dtype == expected.dtype
            if batch != "broken":
                size = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
                assert_same(obtained / size, expected / size, TOLERANCE[dtype])
        if batch == "broken":
            assert not results[0][0][0, 0].isfinite().all()
            assert norm.num_rejected > 0
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4
        assert_same(state(norm), state(expected_norm), tolerance)
    assert norm.step == 3


@every_case
def test_results_repeat_to_the_bit(case: str) -> None:
    torch.manual_seed(7)
    norm = build(case, 60, torch.float32)
    for _ in range(2):
        x, mask, gradient = inputs(case, (11, 3, 60), torch.float32)
        results = []
        for which in (copy.deepcopy(norm), norm):
            leaf = x.clone().requires_grad_()
            outputs = CASES[case].call(which, leaf, mask)
            gradients = backward(which, outputs, leaf, gradient)
            results.append([*(o.detach() for o in outputs), *gradients, state(which)])
        assert_same(results[0], results[1])


@every_case
def test_repeated_forward(case: str) -> None:
    """As activation checkpointing does: the same y and gradients, and nothing changes."""
    torch.manual_seed(8)
    norm, call = build(case, 60), CASES[case].call
    for _ in range(4):
        x, mask, gradient = inputs(case, (5, 3, 60), torch.float64)
        leaf = x.requires_grad_()
        first = call(norm, leaf, mask)
        other, other_mask, _ = inputs(case, (4, 2, 60), torch.float64)
        call(norm, other, other_mask)
        between = state(norm)
        repeated = call(norm, leaf, mask, first[2] if hasattr(norm, "warmup_steps") else True)
        assert_same(state(norm), between)
        results = []
        for outputs in (first, repeated):
            gradients = backward(norm, outputs, leaf, gradient)
            results.append([outputs[0].detach(), *gradients, state(norm)])
            for name, buffer in norm.named_buffers():
                buffer.copy_(between[name])
        assert_same(results[1], results[0], 1e-13)


@pytest.mark.parametrize("case", ["power_v", "batch", "regularized_batch"])
def test_second_derivatives(case: str) -> None:
    torch.manual_seed(9)
    norm, call = build(case, 60), CASES[case].call
    x, mask, gradient = inputs(case, (4, 3, 60), torch.float64)
    results = []
    for function in (call, plain):
        leaf = x.clone().requires_grad_()
        y = function(norm, leaf, mask)[0]
        leaves = leaf, norm.weight
        first = torch.autograd.grad(y, leaves, gradient, create_graph=True)
        results.append(torch.autograd.grad([g.sin().sum() for g in first], leaves))
    assert_same(results[0], results[1], 1e-10)


@pytest.mark.parametrize("case", ["power", "power_released"])
def test_no_second_derivatives_where_there_are_none(case: str) -> None:
    norm = build(case, 60)
    x, mask, gradient = inputs(case, (4, 3, 60), torch.float64)
    y = CASES[case].call(norm, x.requires_grad_(), mask)[0]
    (dx,) = torch.autograd.grad(y, x, gradient.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_case
def test_refuses_what_it_cannot_read_in_place(case: str) -> None:
    norm, call = build(case, 60), CASES[case].call
    x, mask, _ = inputs(case, (4, 3, 60), torch.float64)
    with pytest.raises(ValueError, match="x must be contiguous"):
        call(norm, x.transpose(0, 1), None)
    for name in ("running_psi2", "running_var"):
        if hasattr(norm, name):
            setattr(norm, name, torch.ones(120, dtype=torch.float64, device=DEVICE)[::2])
    with pytest.raises(ValueError, match="buffers must be contiguous"):
        call(norm, x, mask)


# --- What compilers and graphs need


@every_case
def test_nothing_waits_for_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read on the host: on a GPU torch itself watches, else what would read one."""
    norm, call = build(case, 60, torch.float32), CASES[case].call
    x, mask, gradient = inputs(case, (11, 3, 60), torch.float32)
    call(norm, x, mask)  # compiles, which may wait
    leaf = x.requires_grad_()

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read on the host")

    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    try:
        backward(norm, call(norm, leaf, mask), leaf, gradient)
    finally:
        monkeypatch.undo()
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", default_cases(CASES, {"power", "power_released"}))
def test_compiles_without_graph_breaks(case: str) -> None:
    torch.manual_seed(10)
    norm, call = build(case, 60, torch.float32), CASES[case].call
    compiled_norm = copy.deepcopy(norm)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for shape in ((5, 3, 60), (5, 3, 60), (9, 2, 60)):
        x, mask, gradient = inputs(case, shape, torch.float32)
        results = []
        for function, which in ((call, norm), (compiled, compiled_norm)):
            leaf = x.clone().requires_grad_()
            outputs = function(which, leaf, mask)
            gradients = backward(which, outputs, leaf, gradient)
            results.append([outputs[0].detach(), *gradients, state(which)])
        assert_same(results[1], results[0], 1e-6)
    assert norm.step == 3


def arguments_of_operators() -> dict[str, tuple]:
    """Per operator known to torch its arguments; parameters without gradients."""
    x, mask, gradient = inputs("batch", (5, 3, 60), torch.float32)
    vector, counter = torch.rand(60, device=DEVICE), torch.zeros((), dtype=torch.long)
    counter = counter.to(DEVICE)
    n, saved = counter.float() + 9, torch.ones(122, dtype=torch.float64, device=DEVICE)
    r, all_x = torch.rand(15, 4, device=DEVICE), x.nan_to_num()
    state = vector + 1, counter.clone(), counter.clone()
    both = vector.clone(), vector.clone()
    return {
        "power_forward": (x, mask, *both, *state, 1e-5, 0.9, 2, False),
        "power_replay": (x, mask, *both, saved, 1e-5),
        "power_backward": (
            *(x, mask, vector, gradient, saved),
            *(*state[:2], 1e-5, 0.9, True),
        ),
        "power_v_backward": (x, mask, vector, gradient, saved, 1e-5),
        "power_released_forward": (all_x, mask, *both, *state, 4, 1e-5, 0.9, 2),
        "power_released_replay": (all_x, *both, saved, 4, 1e-5),
        "power_released_backward": (
            *(all_x, vector, saved, vector.double(), r, all_x + 1),
            *(*state[:2], 4, 1e-5, 0.9),
        ),
        "batch_forward": (
            *(x, mask, *both, vector + 2, vector + 3, *state[1:]),
            *(False, 1e-5, 0.1, True),
        ),
        "batch_backward": (
            *(x, mask, vector, vector + 1, vector + 2, n, gradient),
            *(vector + 3, None, 1e-5, False),
        ),
    }


@pytest.mark.parametrize("name", arguments_of_operators())
def test_torch_agrees_with_the_declaration(name: str) -> None:
    """Schema, what is mutated, results' shapes and types, tracing."""
    operator = getattr(torch.ops.normexp, f"triton_{name}")
    torch.library.opcheck(operator.default, arguments_of_operators()[name])


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@every_case
def test_in_a_cuda_graph(case: str) -> None:
    """A captured step, replayed over the end of the warm-up, does what the operator does."""
    torch.manual_seed(11)
    norm, call = build(case, 60, torch.float32), CASES[case].call
    captured_norm = copy.deepcopy(norm)
    start = state(captured_norm)
    x, mask, gradient = inputs(case, (11, 3, 60), torch.float32)
    static = [x.clone().requires_grad_(), mask.clone(), gradient.clone()]

    def step(which: nn.Module, x: Tensor, mask: Tensor, gradient: Tensor) -> list[Tensor]:
        outputs = call(which, x, mask)
        return [outputs[0].detach(), *backward(which, outputs, x, gradient)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured_norm, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured_norm, *static)
    for name, buffer in captured_norm.named_buffers():
        buffer.copy_(start[name])
    for _ in range(5):
        given = inputs(case, (11, 3, 60), torch.float32)
        with torch.no_grad():
            for to, value in zip(static, given, strict=True):
                to.copy_(value)
        graph.replay()
        expected = step(norm, given[0].requires_grad_(), *given[1:])
        assert_same(results, expected, 1e-6)
        assert_same(state(captured_norm), state(norm), 1e-6)
