"""torch.compile and torch.export, for every registered normalization."""

import copy
from collections.abc import Iterator

import pytest
import torch
from support.batches import C, quick_options
from support.stateful import CASES, assert_same, batch, penalized, state, train
from support.thorough import default_cases
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from normexp.norms import available_norms, build_norm
from normexp.norms.running_norm import RunningNorm, _outside_graphs

every_norm = pytest.mark.parametrize("name", available_norms())
# One of each kind of inference: affine, tokens scaled first, positions mixed, groups of channels.
KINDS = {"power", "power_released", "batch_released", "instance", "group"}
every_kind = pytest.mark.parametrize("name", default_cases(available_norms(), KINDS))
# Those that stay in warm-up are left out: the others start in it.
STATEFUL = [case for case in CASES if not case.endswith("warming-up")]
# The training of all of them runs outside the graph by the same line. One has a penalty.
some_case = pytest.mark.parametrize("case", default_cases(STATEFUL, {"power", "regularized_batch"}))
STATELESS = sorted({*available_norms()} - {case.name for case in CASES.values()})
# None equal to C, which compilers would take for the same symbol.
SHAPES = [(5, 3), (6, 3), (2, 7), (7, 2), (9, 6)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(name: str) -> nn.Module:
    """In float32, with statistics of some batches where it has statistics."""
    norm = build_norm(name, C, **quick_options(name))
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    if isinstance(norm, RunningNorm):
        train(norm, range(4))
        norm.zero_grad(set_to_none=True)
    return norm


class Residual(nn.Module):
    """A pre-norm residual block as models have it, with the mask as an input."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(C, C)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return x + self.linear(self.norm(x, padding_mask)).relu()


class Stack(nn.Module):
    """Two blocks. The compiler leaves out a loop with a graph break in it, but not its blocks."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(copy.deepcopy(norm)) for _ in range(2))

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, padding_mask)
        return x


def inputs(t: int, b: int) -> tuple[Tensor, Tensor]:
    """x (T, B, C) and a mask (B, T)."""
    of = batch(10 * t + b, t, b)
    return torch.from_numpy(of.x).float(), torch.from_numpy(of.pad)


# --- Inference


@pytest.mark.parametrize("masked", default_cases([True, False], {True}))
@every_norm
def test_inference_is_one_graph(name: str, masked: bool) -> None:
    """No break in it, a few graphs for all shapes, none for new statistics; equal results."""
    norm = trained(name).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for t, b in SHAPES:
        arguments = inputs(t, b) if masked else inputs(t, b)[:1]
        assert_same(compiled(*arguments), norm(*arguments), 1e-6)
    graphs = counter.frame_count
    assert 1 <= graphs <= 3
    if isinstance(norm, RunningNorm):
        before = norm(*arguments)
        train(norm.train(), range(20, 23))
        norm.eval()
        assert_same(compiled(*arguments), norm(*arguments), 1e-6)
        assert not torch.allclose(norm(*arguments), before)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("name", default_cases(available_norms(), {"power", "power_released"}))
def test_dynamic_inference_compiles_once(name: str) -> None:
    """For all shapes, with gradients, as when a frozen layer is part of a model that learns."""
    stack = Stack(trained(name)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for t, b in SHAPES[::2]:
        seen = []
        for call in (stack, compiled):
            x, pad = inputs(t, b)
            y = call(x.requires_grad_(), pad)
            y.sin().sum().backward()
            seen.append([y.detach(), x.grad, *(p.grad for p in stack.parameters())])
            stack.zero_grad(set_to_none=True)
        assert_same(seen[1], seen[0], 1e-5)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] >= 1


@every_kind
def test_compiled_inference_in_half_precision(name: str) -> None:
    norm = trained(name).eval().bfloat16()
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    x, pad = inputs(5, 3)
    y = compiled(x.bfloat16(), pad)
    assert y.dtype == torch.bfloat16
    assert_same(y, norm(x.bfloat16(), pad))


# --- Training


def learn(model: nn.Module, call: nn.Module, steps: int = 6) -> list[object]:
    """Gradients of each step and the state after it; shapes vary."""
    results = []
    for step in range(steps):
        of = batch(step, *SHAPES[step % 2])
        x = torch.from_numpy(of.x).requires_grad_()
        y = call(x, torch.from_numpy(of.pad))
        penalized(model, (y * torch.from_numpy(of.gy)).sum()).backward()
        results.append([y.detach(), x.grad, [p.grad.clone() for p in model.parameters()]])
        results.append(state(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return results


@some_case
def test_training_equals_eager(case: str) -> None:
    """Step by step, through the end of warm-ups; nothing is compiled anew in the later steps."""
    models = [Stack(CASES[case].build()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(models[1], backend=counter)
    assert_same(learn(models[1], compiled), learn(models[0], models[0]), 1e-12)
    graphs = counter.frame_count
    assert graphs >= 1, "the linear layers compile"
    assert_same(learn(models[1], compiled), learn(models[0], models[0]), 1e-12)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", default_cases(STATELESS, {"layer", "group"}))
def test_stateless_layers_train_in_one_graph(name: str) -> None:
    models = [Stack(build_norm(name, C)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    expected = learn(models[0], models[0], steps=2)
    assert_same(learn(models[1], compiled, steps=2), expected, 1e-12)


@some_case
def test_training_of_a_layer_breaks_the_graph_once(case: str) -> None:
    """Policy: what keeps statistics runs outside the graph."""
    norm, of = CASES[case].build(), batch(0)
    explained = torch._dynamo.explain(norm)(torch.from_numpy(of.x), torch.from_numpy(of.pad))
    assert explained.graph_break_count <= 1
    assert norm.step == CASES[case].first_step + 1


@some_case
def test_two_norms_in_a_model_make_three_graphs(case: str) -> None:
    """As the guide says. fullgraph=True, which forbids breaks, is an error of torch's."""

    class Straight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(C, C).double() for _ in range(3))
            self.first, self.second = (CASES[case].build() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.linears[0](x))
            return self.linears[2](self.second(self.linears[1](x)))

    model, counter = Straight(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for seed in range(3):
        compiled(torch.from_numpy(batch(seed).x))
    assert counter.frame_count == 3
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(torch.from_numpy(batch(0).x))


@some_case
def test_training_and_eval_in_turns(case: str) -> None:
    """A compiled model keeps up with the switches of mode."""
    models = [Stack(CASES[case].build()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled, results = torch.compile(models[1], backend="eager"), []
    for model, call in zip(models, (models[0], compiled), strict=True):
        seen = []
        for seed in range(3):
            seen.append(learn(model.train(), call, steps=2))
            x, pad = (torch.from_numpy(v) for v in (batch(seed).x, batch(seed).pad))
            seen.append(call.eval()(x, pad).detach())
        results.append([seen, state(model)])
    assert_same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("name", default_cases(["batch", "power", "unified"], {"power"}))
def test_compiled_before_any_eager_run(name: str) -> None:
    """What keeps a layer out of graphs is set up on the first call, here while one is traced."""
    norm, twin = CASES[name].build(), CASES[name].build()

    class Fresh(type(norm)):
        _train_step = _outside_graphs(RunningNorm._train_step.__wrapped__)

    norm.__class__ = Fresh
    compiled = torch.compile(norm, backend="aot_eager")
    assert_same(learn(norm, compiled), learn(twin, twin), 1e-12)


@pytest.mark.parametrize("name", default_cases(["batch", "power", "unified"], {"power"}))
@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_model_with_checkpointing(name: str, reentrant: bool) -> None:
    models = [Stack(CASES[name].build()).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = models[1]

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            checkpoint = torch.utils.checkpoint.checkpoint
            return checkpoint(self.stack, 1.0 * x, pad, use_reentrant=reentrant)

    compiled = torch.compile(Checkpointed(), backend="aot_eager")
    assert_same(learn(models[1], compiled), learn(models[0], models[0]), 1e-12)


# --- Export


T, B = Dim("T", min=2, max=64), Dim("B", min=2, max=64)


@pytest.mark.parametrize("form", ["no-mask", "list-of-tokens"])
@every_kind
def test_export_of_a_layer(name: str, form: str) -> None:
    """One program for all shapes."""
    norm = trained(name).eval()

    def arguments(t: int, b: int) -> tuple[Tensor, ...]:
        x, pad = inputs(t, b)
        return (x,) if form == "no-mask" else (x[:, 0], pad[0])

    dynamic = ({0: T, 1: B},) if form == "no-mask" else ({0: T}, {0: T})
    program = torch.export.export(norm, arguments(5, 3), dynamic_shapes=dynamic).module()
    for t, b in SHAPES:
        assert_same(program(*arguments(t, b)), norm(*arguments(t, b)), 1e-6)


@every_kind
def test_export_of_a_stack(name: str) -> None:
    """With the mask as an input; parameters and buffers are those of the model."""
    stack = Stack(trained(name)).eval()
    dynamic = ({0: T, 1: B}, {0: B, 1: T})
    exported = torch.export.export(stack, inputs(5, 3), dynamic_shapes=dynamic)
    assert_same(dict(exported.state_dict), dict(stack.state_dict()))
    program = exported.module()
    for t, b in SHAPES:
        assert_same(program(*inputs(t, b)), stack(*inputs(t, b)), 1e-6)
