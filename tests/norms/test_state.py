"""The running state in unusual circumstances, of every layer that has one."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.batches import Batch, C
from support.pending import PENDING, all_forwards_first, reference_like
from support.stateful import (
    CASES,
    CHANGED_IN_BACKWARD,
    WITH_STATE,
    assert_same,
    batch,
    forward,
    no_warnings,
    penalized,
    state,
    train,
)
from support.thorough import default_cases
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normexp.norms import available_norms, build_norm

every_case = pytest.mark.parametrize("case", CASES)
every_name = pytest.mark.parametrize("name", WITH_STATE)


def equal_to_reference(norm: nn.Module, reference: object, when: str = "") -> None:
    """State of the layer and of its reference, rejected batches excepted."""
    assert norm.num_rejected == 0
    for what, expected in reference.state.items():
        obtained = getattr(norm, what).numpy()
        np.testing.assert_allclose(
            obtained, expected, rtol=1e-9, atol=1e-10, err_msg=f"{what} {when}"
        )


# --- Gradient accumulation


@every_case
@pytest.mark.parametrize("before", default_cases([0, 1, 3], {0, 3}))
def test_forward_backward_times_k(case: str, before: int) -> None:
    """Each pair is one step of the state; parameter gradients add up."""
    norm = CASES[case].build()
    train(norm, range(before))
    norm.zero_grad()
    reference = reference_like(CASES[case].name, norm, **CASES[case].options)
    gradients = {name: 0.0 for name, _ in norm.named_parameters()}
    for seed in (10, 11, 12):
        of = batch(seed)
        (gx,) = train(norm, [seed])
        expected = reference.train_step(of.x, of.pad, of.gy)
        np.testing.assert_allclose(
            gx.numpy()[of.token_mask], expected.gx[of.token_mask], rtol=1e-8, atol=1e-9
        )
        gradients = {name: gradients[name] + expected.gradients[name] for name in gradients}
        equal_to_reference(norm, reference)
    for name, parameter in norm.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), gradients[name], rtol=1e-8, atol=1e-9)


@every_case
@pytest.mark.parametrize(
    "order", default_cases(itertools.permutations(range(3)), {(2, 0, 1)}), ids=str
)
@pytest.mark.parametrize("before", [0, 4])
def test_all_forwards_then_all_backwards(case: str, order: Sequence[int], before: int) -> None:
    """psi2 moves with the forwards, nu with the backwards in the order in which they run."""
    norm = CASES[case].build()
    train(norm, range(before))
    reference = reference_like(CASES[case].name, norm, **CASES[case].options)
    batches = [batch(seed) for seed in (10, 11, 12)]
    expected = all_forwards_first(CASES[case].name, reference, batches, order)
    pending = [forward(norm, of) for of in batches]
    for i in order:
        pending[i][1].backward()
    for (x, _), gx, of in zip(pending, expected, batches, strict=True):
        np.testing.assert_allclose(
            x.grad.numpy()[of.token_mask],
            gx[of.token_mask],
            rtol=1e-8,
            atol=1e-9,
            err_msg="gradient at x",
        )
    equal_to_reference(norm, reference)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].name in PENDING])
def test_order_of_backwards_matters_to_the_state(case: str) -> None:
    """So that the test above could notice a wrong order."""
    states = []
    for order in ((0, 1), (1, 0)):
        norm = CASES[case].build()
        train(norm, range(4))
        pending = [forward(norm, batch(seed)) for seed in (10, 11)]
        for i in order:
            pending[i][1].backward()
        states.append(state(norm))
    for what in CHANGED_IN_BACKWARD[CASES[case].name] - {"lambda_window"}:
        assert not torch.allclose(states[0][what], states[1][what], rtol=1e-4)


@every_case
def test_one_backward_of_a_sum(case: str) -> None:
    """Two forwards in one loss: autograd runs the later one's backward first."""
    together, apart = CASES[case].build(), CASES[case].build()
    for norm in (together, apart):
        train(norm, range(3))
        norm.zero_grad()
    (x0, loss0), (x1, loss1) = (forward(together, batch(seed)) for seed in (10, 11))
    (loss0 + loss1).backward()
    pending = [forward(apart, batch(seed)) for seed in (10, 11)]
    pending[1][1].backward()
    pending[0][1].backward()
    assert_same([x0.grad, x1.grad], [x.grad for x, _ in pending], 1e-12)
    assert_same(state(together), state(apart), 1e-12)


@every_case
def test_forward_without_backward(case: str) -> None:
    """A loss that is thrown away moves what forwards move and nothing else."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for layer in (norm, twin):
        train(layer, range(4))
    before = state(norm)
    forward(norm, batch(10))
    forward(twin, batch(10))[1].backward()
    for what, expected in state(twin).items():
        unmoved = what in CHANGED_IN_BACKWARD.get(CASES[case].name, ())
        assert_same(state(norm)[what], before[what] if unmoved else expected)


# --- Activation checkpointing


class Block(nn.Module):
    """What is checkpointed: a norm alone, or with linear layers about it, once or several times."""

    def __init__(self, norm: nn.Module, uses: int = 1, alone: bool = False, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        size = 0 if alone else 1 + uses
        self.linears = nn.ModuleList(nn.Linear(C, C).double() for _ in range(size))
        with torch.no_grad():
            for parameter in self.linears.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.norm, self.dropout = norm, nn.Dropout(dropout)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        if not self.linears:
            return self.norm(self.dropout(x), pad)
        for linear in self.linears[:-1]:
            x = self.norm(self.dropout(linear(x)), pad)
        return self.linears[-1](x)


Call = Callable[[Tensor, Tensor], Tensor]


def fairseqs(block: nn.Module) -> Call:
    """fairseq's way to checkpoint a module: it replaces its forward."""
    from fairseq.modules.checkpoint_activations import checkpoint_wrapper

    return checkpoint_wrapper(block)


def nested(block: nn.Module) -> Call:
    inner = functools.partial(checkpoint, block, use_reentrant=False)
    return functools.partial(checkpoint, lambda x, pad: inner(x, pad).tanh(), use_reentrant=False)


CHECKPOINTING: dict[str, Callable[[nn.Module], Call]] = {
    "non_reentrant": lambda block: functools.partial(checkpoint, block, use_reentrant=False),
    "reentrant": lambda block: functools.partial(checkpoint, block, use_reentrant=True),
    "fairseq": fairseqs,
}
every_checkpointing = pytest.mark.parametrize("how", CHECKPOINTING)
# Those that stay in warm-up are left out: the others start in it.
checkpointed_case = pytest.mark.parametrize(
    "case", [case for case in CASES if not case.endswith("warming-up")]
)


def optimize(
    block: nn.Module,
    call: Call,
    with_penalty: bool,
    *,
    micro_batches: int = 1,
    order: Sequence[int] = (0,),
    chained: int = 1,
    steps: int = 5,
    between: Callable[[], object] = lambda: None,
) -> dict[str, object]:
    """Some steps of gradient descent: all that can be seen of them.

    Each step runs `micro_batches` forwards of `chained` calls each, then `between`, then the
    backwards in `order`.
    """
    torch.manual_seed(0)
    outputs, gradients = [], []
    for step in range(steps):
        pending = []
        for i in range(micro_batches):
            of = batch(10 * step + i)
            x, pad = torch.from_numpy(of.x).requires_grad_(), torch.from_numpy(of.pad)
            y, loss = x, torch.zeros((), dtype=torch.float64)
            for _ in range(chained):
                y = call(y, pad)
                loss = penalized(block, loss) if with_penalty else loss
            outputs.append(y.detach().clone())
            pending.append((x, loss + (y * torch.from_numpy(of.gy)).sum()))
        between()
        for i in order:
            pending[i][1].backward()
        gradients += [x.grad for x, _ in pending]
        for parameter in block.parameters():
            gradients.append(parameter.grad.clone())
            parameter.data -= 0.01 * parameter.grad
            parameter.grad = None
    return {"y": outputs, "gradients": gradients, "state": state(block)}


def assert_checkpointing_changes_nothing(
    case: str, how: str, uses: int = 1, alone: bool = False, dropout: float = 0.0, **options: object
) -> None:
    """Nothing but memory and time."""
    straight, repeated = (
        Block(CASES[case].build(), uses=uses, alone=alone, dropout=dropout) for _ in range(2)
    )
    # Reentrant checkpointing cannot have a penalty, and repeated uses keep only the last one.
    with_penalty = how == "non_reentrant" and uses == 1
    expected = optimize(straight, straight, with_penalty, **options)
    obtained = optimize(repeated, CHECKPOINTING[how](repeated), with_penalty, **options)
    assert_same(obtained, expected, 1e-12)


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_a_block(case: str, how: str) -> None:
    assert_checkpointing_changes_nothing(case, how)


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_a_norm_alone(case: str, how: str) -> None:
    assert_checkpointing_changes_nothing(case, how, alone=True)


@every_checkpointing
@checkpointed_case
@pytest.mark.parametrize("order", default_cases([(0, 1, 2), (2, 0, 1)], {(2, 0, 1)}), ids=str)
def test_checkpointing_with_pending_micro_batches(
    case: str, how: str, order: Sequence[int]
) -> None:
    assert_checkpointing_changes_nothing(case, how, micro_batches=3, order=order)


@every_checkpointing
@checkpointed_case
def test_checkpointing_with_dropout_before_the_norm(case: str, how: str) -> None:
    assert_checkpointing_changes_nothing(case, how, dropout=0.4, micro_batches=2, order=(0, 1))


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_a_block_used_three_times(case: str, how: str) -> None:
    """One region of checkpointing for each use of the shared norm."""
    assert_checkpointing_changes_nothing(case, how, chained=3)


@pytest.mark.filterwarnings("ignore:.*was not added to the loss")
@every_checkpointing
@checkpointed_case
def test_checkpointing_of_a_norm_shared_within_a_block(case: str, how: str) -> None:
    """One region with several uses of the shared norm."""
    assert_checkpointing_changes_nothing(case, how, uses=3, micro_batches=2, order=(0, 1))


@every_case
def test_nested_checkpointing(case: str) -> None:
    """Some forwards run three times."""
    straight, repeated = Block(CASES[case].build()), Block(CASES[case].build())
    options = {"micro_batches": 2, "order": (0, 1)}
    expected = optimize(straight, lambda x, pad: straight(x, pad).tanh(), True, **options)
    assert_same(optimize(repeated, nested(repeated), True, **options), expected, 1e-12)


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_one_batch_over_and_over(case: str, how: str) -> None:
    """The batch of each step has the statistics of all earlier ones; the state has moved on."""
    results = []
    for wrap in (lambda norm: norm, CHECKPOINTING[how]):
        norm, gradients = CASES[case].build(), []
        call = wrap(norm)
        of = batch(3)
        for _ in range(6):
            x = torch.from_numpy(of.x).requires_grad_()
            y = call(x, torch.from_numpy(of.pad))
            (y * torch.from_numpy(of.gy)).sum().backward()
            gradients.append(x.grad)
        results.append([gradients, state(norm)])
    assert_same(results[1], results[0], 1e-12)


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_equal_forwards_in_one_loss(case: str, how: str) -> None:
    """Siamese use: nothing tells the forwards apart, and the later one's backward comes first."""
    results = []
    for wrap in (lambda norm: norm, CHECKPOINTING[how]):
        norm = CASES[case].build()
        train(norm, range(4))
        call, of = wrap(norm), batch(3)
        leaves = [torch.from_numpy(of.x).requires_grad_() for _ in range(3)]
        loss = torch.zeros((), dtype=torch.float64)
        for i, x in enumerate(leaves):
            loss = loss + (call(x, torch.from_numpy(of.pad)) * torch.from_numpy(of.gy)).sum() * i
            loss = penalized(norm, loss) if how == "non_reentrant" else loss
        loss.backward()
        results.append([[x.grad for x in leaves], state(norm)])
    assert_same(results[1], results[0], 1e-12)


@every_checkpointing
@checkpointed_case
def test_checkpointing_of_almost_equal_micro_batches(case: str, how: str) -> None:
    """Statistics that differ in the seventh digit still tell which forward is repeated."""
    results = []
    for wrap in (lambda norm: norm, CHECKPOINTING[how]):
        norm = CASES[case].build()
        train(norm, range(4))
        call = wrap(norm)
        pending = []
        for i in range(4):
            of = batch(3)
            x = (torch.from_numpy(of.x) * (1 + 1e-7 * i)).requires_grad_()
            loss = (call(x, torch.from_numpy(of.pad)) * torch.from_numpy(of.gy)).sum()
            pending.append((x, penalized(norm, loss) if how == "non_reentrant" else loss))
        for _, loss in pending:
            loss.backward()
        results.append([[x.grad for x, _ in pending], state(norm)])
    assert_same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("how", ["non_reentrant", "reentrant"])  # fairseq's forgets autocast
@every_case
def test_checkpointing_under_autocast(case: str, how: str) -> None:
    """Half-precision inputs of the norm, rounded the same way twice."""
    results = []
    for wrap in (lambda block: block, CHECKPOINTING[how]):
        block = Block(CASES[case].build().float()).float()
        call, seen = wrap(block), []
        for seed in range(5):
            of = batch(seed)
            x, pad = torch.from_numpy(of.x).float().requires_grad_(), torch.from_numpy(of.pad)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = call(x, pad)
            (y.float() * torch.from_numpy(of.gy).float()).sum().backward()
            seen += [y.detach(), x.grad]
        results.append([seen, state(block), [p.grad for p in block.parameters()]])
    assert_same(results[1], results[0])


@every_checkpointing
@checkpointed_case
def test_eval_forward_between_forward_and_backward(case: str, how: str) -> None:
    """A validation in the middle, checkpointed or not, leaves no trace."""
    straight = Block(CASES[case].build())
    with_penalty = how == "non_reentrant"
    options = {"micro_batches": 2, "order": (0, 1)}
    expected = optimize(straight, straight, with_penalty, **options)
    for wrap in (lambda block: block, CHECKPOINTING[how]):
        block = Block(CASES[case].build())
        call = wrap(block)

        def validate(block: nn.Module = block) -> None:
            block.eval()
            with torch.no_grad():
                block(torch.from_numpy(batch(99).x), torch.from_numpy(batch(99).pad))
            block.train()

        obtained = optimize(block, call, with_penalty, between=validate, **options)
        assert_same(obtained, expected, 1e-12)


@pytest.mark.parametrize("how", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_checkpointing_after_too_many_forwards_says_so(name: str, how: str) -> None:
    """Sixty-four pending forwards are remembered; never is a wrong one taken in silence."""
    case = name
    results = []
    for wrap in (lambda norm: norm, CHECKPOINTING[how]):
        norm = CASES[case].build()
        call = wrap(norm)
        pending = []
        for seed in range(64):
            of = batch(seed)
            x = torch.from_numpy(of.x).requires_grad_()
            y = call(x, torch.from_numpy(of.pad))
            pending.append((x, penalized(norm, y.sum()) if how == "non_reentrant" else y.sum()))
        for _, loss in pending[:2]:
            loss.backward()
        results.append([[x.grad for x, _ in pending[:2]], state(norm)])
    assert_same(results[1], results[0], 1e-12)
    forward(norm, batch(98))
    for seed in range(200, 202):  # pushes out the third
        forward(norm, batch(seed))
    if name in PENDING or name == "regularized_batch":
        with pytest.raises(RuntimeError, match=r"last 64.*backward after fewer forwards"):
            pending[2][1].backward()
    else:  # needs no memory
        pending[2][1].backward()


@pytest.mark.parametrize("how", ["reentrant", "fairseq"])
def test_penalty_of_a_reentrant_forward_is_refused(how: str) -> None:
    norm = build_norm("regularized_batch", C).double()
    call = CHECKPOINTING[how](norm)
    call(torch.from_numpy(batch(0).x).requires_grad_(), torch.from_numpy(batch(0).pad))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        norm.penalty()


# --- Eval mode, frozen layers, inference mode


@every_name
def test_eval_changes_nothing_and_is_affine(name: str) -> None:
    """Also with gradients, also for batches that training mode would reject."""
    norm = CASES[name].build()
    train(norm, range(4))
    norm.eval()
    before = state(norm)
    of = batch(5)
    pad = torch.from_numpy(of.pad)
    x = torch.from_numpy(of.x).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *parameters: torch.func.functional_call(
            norm, dict(zip(("weight", "bias"), parameters, strict=True)), (x, pad)
        )[~pad.t()],
        (x, norm.weight, norm.bias),
    )
    norm(torch.full((2, 1, C), float("nan")))
    norm(torch.zeros(0, 1, C))
    assert_same(state(norm), before)
    if name in ("batch_released", "power_released"):  # they scale every token first
        with pytest.raises((AttributeError, NotImplementedError)):
            norm.inference_affine()
        return
    scale, shift = norm.inference_affine()
    assert scale.shape == shift.shape == (C,)
    assert_same(norm(x), x * scale + shift, 1e-12)


@every_name
def test_eval_forward_with_gradient_survives_a_training_forward(name: str) -> None:
    """Losses of both modes in one backward pass, as in distillation from the layer itself."""
    norm, twin = CASES[name].build(), CASES[name].build()
    for layer in (norm, twin):
        train(layer, range(3))
        layer.zero_grad()
    of = batch(5)
    x = torch.from_numpy(of.x).requires_grad_()
    in_eval = norm.eval()(x, torch.from_numpy(of.pad)).square().sum()
    _, in_training = forward(norm.train(), batch(6))
    (in_eval + in_training).backward()

    expected_x = torch.from_numpy(of.x).requires_grad_()
    twin.eval()(expected_x, torch.from_numpy(of.pad)).square().sum().backward()
    forward(twin.train(), batch(6))[1].backward()
    assert_same(x.grad, expected_x.grad, 1e-12)
    gradients = [[p.grad for p in layer.parameters()] for layer in (norm, twin)]
    assert_same(*gradients, 1e-12)
    assert_same(state(norm), state(twin))


@every_name
def test_state_overwritten_before_backward(name: str) -> None:
    """As data-parallel training does when it hands out the buffers of its first rank."""
    gradients = []
    for overwritten in (False, True):
        norm = CASES[name].build()
        train(norm, range(4))
        x, loss = forward(norm, batch(5))
        if overwritten:
            for what, buffer in norm.named_buffers():
                if what not in CHANGED_IN_BACKWARD.get(name, ()):
                    buffer.fill_(3)
        loss.backward()
        gradients.append(x.grad)
    assert_same(gradients[1], gradients[0])


@every_case
def test_frozen_parameters_do_not_freeze_the_statistics(case: str) -> None:
    frozen, free = CASES[case].build(), CASES[case].build()
    frozen.requires_grad_(False)
    assert_same(train(frozen, range(5)), train(free, range(5)))
    assert_same(state(frozen), state(free))
    assert frozen.weight.grad is None and frozen.bias.grad is None
    assert frozen.step == CASES[case].first_step + 5


@every_name
def test_layer_in_eval_within_a_model_in_training(name: str) -> None:
    norm = CASES[name].build()
    train(norm, range(4))
    model = Block(norm).train()
    norm.eval()
    before = state(norm)
    optimize(model, model, with_penalty=False)
    assert_same(state(norm), before)
    model.train()
    optimize(model, model, with_penalty=True)
    assert norm.step == before["step"] + 5


@every_case
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "grad"])
def test_training_forwards_without_gradients(case: str, mode: Callable) -> None:
    """They are steps like others, and training goes on as if they had been discarded losses."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for layer in (norm, twin):
        train(layer, range(2))
    with no_warnings():
        for seed in (10, 11):
            of = batch(seed)
            with mode():
                y = norm(torch.from_numpy(of.x), torch.from_numpy(of.pad))
            _, loss = forward(twin, of)
            if not hasattr(norm, "penalty"):
                assert_same((y * torch.from_numpy(of.gy)).sum(), loss.detach())
        assert_same(state(norm), state(twin))
        assert_same(train(norm, range(20, 24)), train(twin, range(20, 24)))
    assert_same(state(norm), state(twin))


@every_name
def test_eval_under_inference_mode(name: str) -> None:
    norm, twin = CASES[name].build(), CASES[name].build()
    for layer in (norm, twin):
        train(layer, range(3))
    of = batch(5)
    with torch.inference_mode():
        y = norm.eval()(torch.from_numpy(of.x), torch.from_numpy(of.pad))
    assert_same(y.clone(), twin.eval()(torch.from_numpy(of.x), torch.from_numpy(of.pad)).detach())
    assert_same(train(norm.train(), range(3)), train(twin.train(), range(3)))
    assert_same(state(norm), state(twin))


@every_name
def test_layer_built_in_inference_mode(name: str) -> None:
    """It works there; torch refuses to train such tensors, and a copy of the state trains."""
    with torch.inference_mode():
        norm = CASES[name].build()
        norm(torch.from_numpy(batch(0).x))
        norm.eval()(torch.from_numpy(batch(0).x))
        twin = CASES[name].build()
        twin(torch.from_numpy(batch(0).x))
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        forward(norm.train(), batch(1))[1].backward()
    copied = CASES[name].build()
    copied.load_state_dict(twin.state_dict())
    assert copied.step == CASES[name].first_step + 1
    train(copied, [1])
    assert copied.step == CASES[name].first_step + 2


# --- Batches with little or nothing in them


@every_case
@pytest.mark.parametrize(("t", "b"), [(4, 3), (1, 1)])
def test_one_real_token(case: str, t: int, b: int) -> None:
    """Finite in training and inference; a step like others."""
    norm = CASES[case].build()
    for seed in range(5):
        of = batch(seed, t, b)
        of.pad[...] = True
        of.pad[-1, -1] = False
        x, loss = forward(norm, of)
        loss.backward()
        assert x.grad.isfinite().all()
    assert norm.step == CASES[case].first_step + 5
    for values in [*norm.buffers(), *(parameter.grad for parameter in norm.parameters())]:
        assert values.isfinite().all()
    y = norm.eval()(torch.from_numpy(batch(9).x), torch.from_numpy(batch(9).pad))
    assert y.isfinite().all()


@every_name
def test_rows_of_padding(name: str) -> None:
    """Sentences that are nothing but padding: as without them, for layers that mask."""
    if name in ("batch_released", "power_released", "unified"):
        pytest.skip("counts padded positions, as the code it follows does")
    with_rows, without = CASES[name].build(), CASES[name].build()
    for seed in range(5):
        of = batch(seed)
        row = Batch(of.x[:, :1] * 1e3, np.ones((1, 4), dtype=bool), of.gy[:, :1])
        longer = Batch(
            *(
                np.concatenate(parts, axis=axis)
                for parts, axis in (((of.x, row.x), 1), ((of.pad, row.pad), 0))
            ),
            np.concatenate((of.gy, row.gy), axis=1),
        )
        x, loss = forward(with_rows, longer)
        loss.backward()
        (expected,) = train(without, [seed])
        assert_same(x.grad[:, :3][of.token_mask], expected[of.token_mask], 1e-12)
        assert_same(x.grad[:, 3], torch.zeros(4, C, dtype=torch.float64))
    assert_same(state(with_rows), state(without), 1e-12)


@every_case
@pytest.mark.parametrize("content", [1.0, 1e3, float("nan")])
def test_batch_of_padding_changes_no_state(case: str, content: float) -> None:
    """Not even the step; gradients at its parameters stay finite where its content is."""
    norm = CASES[case].build()
    train(norm, range(4))
    norm.zero_grad()
    before = state(norm)
    of = batch(5)
    for _ in range(2):
        empty = Batch(of.x * content, np.ones_like(of.pad), of.gy)
        x, loss = forward(norm, empty)
        loss.backward()
        if np.isfinite(content):
            assert x.grad.isfinite().all()
            assert all(parameter.grad.isfinite().all() for parameter in norm.parameters())
    with torch.no_grad():
        norm(torch.from_numpy(empty.x), torch.from_numpy(empty.pad))
        if hasattr(norm, "penalty"):
            assert norm.penalty() == 0
    assert_same(state(norm), before)
    twin = CASES[case].build()
    train(twin, range(4))
    assert_same(train(norm, range(20, 22)), train(twin, range(20, 22)))


@every_case
def test_first_batch_of_padding(case: str) -> None:
    """Before any statistic was seen."""
    norm = CASES[case].build()
    of = batch(0)
    empty = Batch(of.x, np.ones_like(of.pad), of.gy)
    x, loss = forward(norm, empty)
    loss.backward()
    assert x.grad.isfinite().all()
    assert_same(state(norm), state(CASES[case].build()))


@every_case
@pytest.mark.parametrize(
    "shape",
    default_cases([(0, 3, C), (4, 0, C), (0, 0, C), (0, C)], {(4, 0, C), (0, C)}),
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_batch_without_positions(case: str, shape: tuple[int, ...], masked: bool) -> None:
    """Empty in, empty out, in training and inference; no trace in state or gradients."""
    norm = CASES[case].build()
    train(norm, range(4))
    norm.zero_grad()
    before = state(norm)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(shape[1::-1] if len(shape) == 3 else shape[:1], dtype=torch.bool)
    for training in (True, False):
        y = norm.train(training)(x, mask if masked else None)
        assert y.shape == shape
        loss = penalized(norm, y.sum()) if training else y.sum()
        loss.backward()
        assert x.grad.shape == shape
    for parameter in norm.parameters():
        assert_same(parameter.grad, torch.zeros_like(parameter))
    assert_same(state(norm), before)


# --- Autograd: graphs kept, graphs of gradients, inputs without gradients


@every_case
def test_second_backward_through_a_kept_graph(case: str) -> None:
    """The forward's part of the state moves once, the backward's part with every backward."""
    norm = CASES[case].build()
    train(norm, range(4))
    reference = reference_like(CASES[case].name, norm, **CASES[case].options)
    of = batch(10)
    x, loss = forward(norm, of)
    if CASES[case].name in PENDING:
        saved = reference.forward(of)
        expected = sum(reference.backward(saved) for _ in range(3))
    else:
        expected = 3 * reference.train_step(of.x, of.pad, of.gy).gx
    for _ in range(3):
        loss.backward(retain_graph=True)
    np.testing.assert_allclose(
        x.grad.numpy()[of.token_mask],
        expected[of.token_mask],
        rtol=1e-8,
        atol=1e-9,
        err_msg="gradient at x",
    )
    equal_to_reference(norm, reference)


@every_case
def test_gradient_of_the_gradient(case: str) -> None:
    """Exact, or refused where the backward is not the derivative of the forward."""
    norm = CASES[case].build()
    train(norm, range(4))
    x = torch.from_numpy(batch(5).x).requires_grad_()
    loss = penalized(norm, norm(x, torch.from_numpy(batch(5).pad)).sin().sum())
    (gx,) = torch.autograd.grad(loss, x, create_graph=True)
    if CASES[case].name in PENDING:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gx.square().sum().backward()
        return
    weight = norm.weight.detach().requires_grad_()
    pad = torch.from_numpy(batch(5).pad)

    def of_real_tokens(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x, pad))[~pad.t()]

    inputs = torch.from_numpy(batch(5).x).requires_grad_(), weight
    assert torch.autograd.gradgradcheck(of_real_tokens, inputs)


@every_case
def test_input_without_gradient(case: str) -> None:
    """A norm at the very beginning of a model: parameter gradients and forward state as ever."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for seed in range(5):
        of = batch(seed)
        y = norm(torch.from_numpy(of.x), torch.from_numpy(of.pad))
        penalized(norm, (y * torch.from_numpy(of.gy)).sum()).backward()
        forward(twin, of)[1].backward()
    assert_same([p.grad for p in norm.parameters()], [p.grad for p in twin.parameters()], 1e-12)
    for what, expected in state(twin).items():
        assert state(norm)[what].isfinite().all()
        if what not in CHANGED_IN_BACKWARD.get(CASES[case].name, ()):
            assert_same(state(norm)[what], expected)


# --- Layouts of memory


@every_case
def test_non_contiguous_input(case: str) -> None:
    """Views of (B, T, C), every second channel, masks and gradients that are views."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for seed in range(4):
        of = batch(seed)
        wide = torch.full((3, 4, 2 * C), float("nan"), dtype=torch.float64)
        wide[..., ::2] = torch.from_numpy(of.x).transpose(0, 1)
        x = wide.requires_grad_()[..., ::2].transpose(0, 1)
        pad = torch.from_numpy(of.pad.T.copy()).t()
        gy = torch.from_numpy(of.gy.transpose(2, 1, 0).copy()).permute(2, 1, 0)
        assert not any(values.is_contiguous() for values in (x, pad, gy))
        y = norm(x, pad)
        penalty = [norm.penalty()] if hasattr(norm, "penalty") else []
        torch.autograd.backward([y, *penalty], [gy, *(torch.ones(()) for _ in penalty)])
        (expected,) = train(twin, [seed])
        assert_same(wide.grad[..., ::2].transpose(0, 1), expected, 1e-12)
    assert_same(state(norm), state(twin), 1e-12)
    assert_same(list(norm.parameters()), list(twin.parameters()))


@every_case
def test_expanded_input_and_gradient(case: str) -> None:
    """One token seen many times through stride zero; the gradient of a sum is expanded too."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for seed in range(4):
        token = torch.from_numpy(batch(seed).x[0, 0])
        leaves = [token.clone().requires_grad_() for _ in range(2)]
        y = norm(leaves[0].expand(4, 3, C))
        penalized(norm, y.sum()).backward()
        y = twin(leaves[1].repeat(4, 3, 1))
        penalized(twin, (y * torch.ones(4, 3, C)).sum()).backward()
        assert_same(leaves[0].grad, leaves[1].grad, 1e-12)
    assert_same(state(norm), state(twin), 1e-12)


@every_case
def test_list_of_tokens(case: str) -> None:
    """(N, C) with a mask (N,) is (T, B, C) with a mask (B, T) without its shape."""
    norm, twin = CASES[case].build(), CASES[case].build()
    for seed in range(5):
        of = batch(seed)
        x = torch.from_numpy(of.x.reshape(-1, C)).requires_grad_()
        y = norm(x, torch.from_numpy(of.pad.T.reshape(-1)))
        penalized(norm, (y * torch.from_numpy(of.gy.reshape(-1, C))).sum()).backward()
        (expected,) = train(twin, [seed])
        assert_same(x.grad, expected.reshape(-1, C), 1e-12)
    assert_same(state(norm), state(twin), 1e-12)


@every_case
def test_input_is_left_alone(case: str) -> None:
    """Neither x nor the mask is written to."""
    norm, of = CASES[case].build(), batch(3)
    x, pad = torch.from_numpy(of.x.copy()), torch.from_numpy(of.pad.copy())
    for training in (True, False):
        norm.train(training)(x, pad)
    assert_same([x, pad], [torch.from_numpy(of.x), torch.from_numpy(of.pad)])


# --- Precision


def _half_model(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(C, C), norm).to(dtype)[1]


@pytest.mark.parametrize(
    "dtype", default_cases([torch.bfloat16, torch.float16], {torch.bfloat16}), ids=str
)
@pytest.mark.parametrize("how", ["model", "autocast"])
@pytest.mark.parametrize("case", sorted({*CASES} - {"unified-filtration"}))  # a yes or no of digits
def test_statistics_move_below_the_digits_of_half_precision(
    case: str, how: str, dtype: torch.dtype
) -> None:
    """One batch again and again: its statistics are approached to the end, not to a standstill.

    (1 - alpha) x difference soon falls below what half precision can add.
    """
    norm, exact = CASES[case].build().float(), CASES[case].build()
    if how == "model":
        norm = _half_model(norm, dtype)
    with torch.no_grad():
        for parameter in [*norm.parameters(), *exact.parameters()]:
            parameter.fill_(1.0)
    of = batch(4)
    x = torch.from_numpy(of.x).to(dtype)
    gy = torch.from_numpy(of.gy).to(dtype)
    for _ in range(60):
        for layer, dt in ((norm, dtype), (exact, torch.float64)):
            leaf = x.to(dt).requires_grad_()
            on = how == "autocast" and layer is norm
            with torch.autocast("cpu", dtype=dtype, enabled=on):
                y = layer(leaf, torch.from_numpy(of.pad))
            assert y.dtype == dt
            y.backward(gy.to(dt))
            if hasattr(layer, "penalty"):
                layer.penalty()
    for what, expected in state(exact).items():
        buffer = state(norm)[what]
        if expected.is_floating_point():
            assert buffer.dtype == torch.float32, what
            assert_same(buffer.double(), expected, 3e-5)
        else:
            assert_same(buffer, expected)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to-twice": lambda model: model.to(torch.float16).to(torch.bfloat16),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@every_case
def test_half_precision_keeps_every_digit_of_the_state(case: str, conversion: str) -> None:
    """There and back: parameters are rounded, buffers are not."""
    norm = CASES[case].build().float()
    for seed in range(4):
        norm(torch.from_numpy(batch(seed).x).float().requires_grad_()).square().sum().backward()
    before = state(norm)
    model = nn.Sequential(nn.Linear(C, C), norm)
    CONVERSIONS[conversion](model)
    assert {p.dtype for p in model.parameters()} <= {torch.float16, torch.bfloat16}
    assert_same(state(norm), before)
    assert_same(state(CONVERSIONS[conversion](copy.deepcopy(model)))["1.step"], before["step"])
    model.float()
    assert_same(state(norm), before)
    model.double()
    doubled = state(norm)
    for what, value in before.items():
        assert doubled[what].dtype == (torch.float64 if value.is_floating_point() else torch.long)
        assert_same(doubled[what], value.to(doubled[what].dtype))
    CONVERSIONS[conversion](model)
    assert_same(state(norm), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_name
def test_layer_built_where_half_precision_is_the_default(name: str, dtype: torch.dtype) -> None:
    """As when a library builds a whole model in the dtype of its checkpoint."""
    torch.set_default_dtype(dtype)
    try:
        norm = build_norm(name, C)
    finally:
        torch.set_default_dtype(torch.float32)
    for what, buffer in norm.named_buffers():
        assert buffer.dtype in (torch.float32, torch.long), what


# --- Copies, files, devices


@every_case
def test_copies_are_independent(case: str) -> None:
    """deepcopy and pickle, also in the middle of a step: same future, no shared tensor."""
    norm = CASES[case].build()
    train(norm, range(3))
    of = batch(3)
    _, loss = forward(norm, of)
    copies = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
    before = state(norm)
    for copied in copies:
        assert type(copied) is type(norm) and repr(copied) == repr(norm)
        assert_same(state(copied), before)
    mine = {tensor.data_ptr() for tensor in [*norm.buffers(), *norm.parameters()]}
    for copied in copies:
        assert not mine & {t.data_ptr() for t in [*copied.buffers(), *copied.parameters()]}
    futures = [train(copied, range(20, 24)) for copied in copies]
    assert_same(futures[0], futures[1])
    assert_same(state(norm), before)
    assert_same(train(norm, range(20, 24)), futures[0])
    loss.backward()


@every_name
def test_copy_with_checkpointed_forwards_pending(name: str) -> None:
    """The copy starts without them; the original's backward still finds its own."""
    norm, twin = CASES[name].build(), CASES[name].build()
    of = batch(3)
    gradients = []
    for layer in (norm, twin):
        train(layer, range(4))
        x = torch.from_numpy(of.x).requires_grad_()
        y = checkpoint(layer, x, torch.from_numpy(of.pad), use_reentrant=False)
        if layer is norm:
            train(copy.deepcopy(layer), range(3))
        y.sin().sum().backward()
        gradients.append(x.grad)
    assert_same(gradients[0], gradients[1])


@every_case
def test_state_dict_is_strict_both_ways(case: str) -> None:
    norm = CASES[case].build()
    train(norm, range(3))
    saved = norm.state_dict()
    assert {"weight", "bias", "step"} < set(saved)
    assert set(norm.statistics()) and all(v.shape == (C,) for v in norm.statistics().values())
    assert "num_rejected" not in norm.statistics()
    for key in saved:
        fewer = {other: value for other, value in saved.items() if other != key}
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
            CASES[case].build().load_state_dict(fewer)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        CASES[case].build().load_state_dict({**saved, "more": torch.zeros(C)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        CASES[case].build(2 * C).load_state_dict(saved)


@every_case
def test_loading_into_another_dtype(case: str) -> None:
    """float64 into float32, and float32 into a layer in half precision."""
    norm = CASES[case].build()
    train(norm, range(3))
    single = CASES[case].build().float()
    single.load_state_dict(norm.state_dict())
    half = CASES[case].build().bfloat16()
    half.load_state_dict(single.state_dict())
    for what, value in norm.state_dict().items():
        expected = value.float() if value.is_floating_point() else value
        assert_same(single.state_dict()[what], expected)
        if what not in ("weight", "bias"):
            assert_same(half.state_dict()[what], expected)


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_layer_built_without_memory(case: str, assign: bool) -> None:
    """Built on the meta device, as large models are; then like any other, warnings included."""
    norm = CASES[case].build()
    train(norm, range(4))
    with torch.device("meta"):
        empty = build_norm(CASES[case].name, C, **CASES[case].options).double()
    if not assign:
        # Memory as it may come: full of something else.
        empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            buffer.fill_(77)
    empty.load_state_dict(copy.deepcopy(norm.state_dict()), assign=assign)
    assert {buffer.device.type for buffer in empty.buffers()} == {"cpu"}
    with no_warnings():
        assert_same(train(empty, range(20, 24)), train(norm, range(20, 24)))
        empty.eval()
        norm.eval()
    assert_same(state(empty), state(norm))


@every_name
def test_to_meta_and_back(name: str) -> None:
    norm = CASES[name].build().to("meta")
    assert all(tensor.is_meta for tensor in [*norm.parameters(), *norm.buffers()])
    norm.half().eval()
    y = norm(torch.empty(4, 3, C, device="meta", dtype=torch.float16))
    assert y.is_meta and y.shape == (4, 3, C)
    norm.to_empty(device="cpu")
    assert {buffer.dtype for buffer in norm.buffers()} == {torch.float32, torch.long}


@pytest.mark.parametrize("name", sorted(set(available_norms()) - set(WITH_STATE)))
@every_checkpointing
def test_stateless_layers_with_checkpointing(name: str, how: str) -> None:
    results = []
    for wrap in (lambda block: block, CHECKPOINTING[how]):
        block = Block(build_norm(name, C).double())
        results.append(optimize(block, wrap(block), False, micro_batches=2, order=(0, 1)))
    assert_same(results[1], results[0], 1e-12)
