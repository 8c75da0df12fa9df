"""`statistics_frozen`: a training step whose traces are thrown away."""

import copy

import pytest
import torch
from support.stateful import CASES, assert_same, batch, forward, penalized, state, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normexp.norms import build_norm, statistics_frozen

every_case = pytest.mark.parametrize("case", CASES)


def trained(case: str) -> nn.Module:
    norm = CASES[case].build()
    train(norm, range(4))
    norm.zero_grad()
    return norm


def observed(norm: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.grad, *(parameter.grad for parameter in norm.parameters())]


@pytest.mark.parametrize("backward_within", [True, False])
@every_case
def test_a_frozen_step_computes_as_any_other_and_changes_nothing(
    case: str, backward_within: bool
) -> None:
    """Outputs and gradients of a twin that takes the step; its own state to the bit."""
    norm, twin = trained(case), trained(case)
    before = state(norm)
    with statistics_frozen(norm):
        x, loss = forward(norm, batch(10))
        if backward_within:
            loss.backward()
    if not backward_within:
        loss.backward()
    expected_x, expected_loss = forward(twin, batch(10))
    expected_loss.backward()
    # A penalty is about the running statistics after the step, which are those of both.
    assert_same([loss, *observed(norm, x)], [expected_loss, *observed(twin, expected_x)], 1e-12)
    assert_same(state(norm), before)
    assert any(not torch.equal(value, before[name]) for name, value in state(twin).items())


@every_case
def test_training_goes_on_as_if_it_had_not_been(case: str) -> None:
    """As in sharpness-aware minimization: one forward that counts, one that does not, in turns."""
    norm, twin = trained(case), trained(case)
    for seed in range(10, 14):
        gradients = train(norm, [seed])
        with statistics_frozen(norm):
            train(norm, [seed, seed + 20])
        assert_same(gradients, train(twin, [seed]))
        assert_same(state(norm), state(twin))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if "regularized" not in case])
def test_activation_checkpointing_with_the_backward_in_the_context(
    case: str, reentrant: bool
) -> None:
    norm, twin = trained(case), trained(case)
    before, of = state(norm), batch(10)
    pad, gy = torch.from_numpy(of.pad), torch.from_numpy(of.gy)
    x = torch.from_numpy(of.x).requires_grad_()
    with statistics_frozen(norm):
        y = checkpoint(norm, x, pad, use_reentrant=reentrant)
        (y * gy).sum().backward()
    expected_x, loss = forward(twin, of)
    loss.backward()
    assert_same(observed(norm, x), observed(twin, expected_x), 1e-12)
    assert_same(state(norm), before)


def test_a_broken_batch_is_not_counted() -> None:
    norm = trained("power")
    before = state(norm)
    with statistics_frozen(norm):
        norm(torch.full((3, 2, norm.num_features), torch.nan, dtype=torch.float64))
    assert_same(state(norm), before)
    assert norm.num_rejected == 0


def test_contexts_nest_and_end_with_an_exception() -> None:
    inner, other = trained("power"), trained("batch")
    model = nn.ModuleList([inner, other])
    with pytest.raises(KeyError), statistics_frozen(model):
        with statistics_frozen(inner):
            pass
        assert inner.is_frozen and other.is_frozen
        raise KeyError
    before = state(model)
    train(inner, [10])
    train(other, [10])
    after = state(model)
    assert after["0.step"] == before["0.step"] + 1 and after["1.step"] == before["1.step"] + 1


def test_a_compiled_model_follows_the_context() -> None:
    models = [nn.Sequential(nn.Linear(4, 4), build_norm("power", 4, warmup_steps=2))]
    models.append(copy.deepcopy(models[0]))
    compiled = torch.compile(models[0], backend="eager")
    for call in (compiled, models[1]):
        torch.manual_seed(0)
        for step in range(6):
            x = torch.randn(8, 4)
            if step % 2:
                with statistics_frozen(call):
                    call(x).sin().sum().backward()
            else:
                call(x).sin().sum().backward()
    assert_same(state(models[0]), state(models[1]), 1e-6)
    assert models[0][1].step == 3


def test_a_gradient_penalty_differentiates_through_a_frozen_forward() -> None:
    norm, twin = trained("batch"), trained("batch")
    for layer in (norm, twin):
        with statistics_frozen(layer) if layer is norm else statistics_frozen():
            x, loss = forward(layer, batch(10))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            penalized(layer, gradient.square().sum()).backward()
    assert_same([p.grad for p in norm.parameters()], [p.grad for p in twin.parameters()], 1e-12)
    assert norm.step == 4 and twin.step == 5
