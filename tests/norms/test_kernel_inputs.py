"""What compiled kernels must not take for granted: memory, sizes and types, now and at backward."""

from collections.abc import Iterator

import pytest
import torch
from support.stateful import assert_same

from normexp.norms import build_norm
from normexp.norms.kernels import native
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

OPTIONS = {
    "batch": {},
    "regularized_batch": {},
    "power_v": {},
    "power": {"warmup_steps": 1},
    "power_released": {"warmup_steps": 1, "num_groups": 2},
}
every_layer = pytest.mark.parametrize("name", OPTIONS)
C = 8


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    before = chosen_kernels()
    use_kernels("auto")
    if not native.load(native.NATIVE_SOURCES / "power.cpp"):
        pytest.skip("no compiled kernels here: see the line that kernels.native has logged")
    yield
    use_kernels(before)


def gradients(name: str, kernels: str, between=lambda mask: None, hooks=None) -> list[object]:
    """Of the second step, and the state after it; `between` runs before the backward."""
    use_kernels(kernels)
    generator = torch.Generator().manual_seed(1)
    norm, seen = build_norm(name, C, **OPTIONS[name]), []
    for _ in range(2):
        x = torch.randn(6, 3, C, generator=generator).requires_grad_()
        mask = torch.rand(3, 6, generator=generator) < 0.3
        upstream = torch.randn(6, 3, C, generator=generator)
        with torch.autograd.graph.saved_tensors_hooks(*hooks or (lambda t: t, lambda t: t)):
            y = norm(x, mask)
        between(mask)
        seen = list(torch.autograd.grad(y, [x, norm.weight, norm.bias], upstream))
        if hasattr(norm, "penalty"):
            norm.penalty()
    assert norm.kernels == kernels
    return [*seen, *norm.state_dict().values()]


@every_layer
def test_a_mask_may_be_used_again_before_backward(name: str) -> None:
    expected = gradients(name, "native")
    assert_same(gradients(name, "native", lambda mask: mask.logical_not_()), expected)


@every_layer
def test_saved_tensors_may_come_back_with_other_strides(name: str) -> None:
    turned = (
        lambda t: t.transpose(0, -1).contiguous() if t.dim() > 1 else t,
        lambda t: t.transpose(0, -1) if t.dim() > 1 else t,
    )
    assert_same(gradients(name, "native", hooks=turned), gradients(name, "native"))


@every_layer
def test_kernels_agree(name: str) -> None:
    assert_same(gradients(name, "native"), gradients(name, "plain"), 1e-5)


@every_layer
def test_parameters_in_half_precision(name: str) -> None:
    """float16 has no kernel: left to torch. bfloat16 has."""
    x = torch.randn(5, 3, C)
    for dtype, kernels in ((torch.float16, "plain"), (torch.bfloat16, "native")):
        norm = build_norm(name, C, **OPTIONS[name]).to(dtype)
        y = norm(x)
        assert y.dtype == torch.float32 and norm.kernels == kernels
        y.square().sum().backward()
        assert norm.weight.grad.dtype == dtype
        if hasattr(norm, "penalty"):
            norm.penalty()


@every_layer
def test_huge_tokens(name: str) -> None:
    """Their squares have no float32: the outputs are the same as torch's, finite or not."""
    outputs = []
    for kernels in ("native", "plain"):
        use_kernels(kernels)
        norm = build_norm(name, C, **OPTIONS[name])
        outputs.append(norm(torch.full((5, 3, C), 1e37)).isfinite())
        overflown = name in ("power", "power_v")  # BN subtracts the mean, and PN as released scales
        assert norm.num_rejected == overflown and norm.step == (not overflown)
    assert_same(outputs[0], outputs[1])


@every_layer
@pytest.mark.parametrize("what", ["weight", "bias", "statistic"])
def test_wrong_sizes_are_refused(name: str, what: str) -> None:
    """Where plain torch would broadcast, or complain later, a kernel would read past the end."""
    norm = build_norm(name, C, **OPTIONS[name])
    if what == "statistic":
        statistic = "running_mean" if "batch" in name else "running_psi2"
        setattr(norm, statistic, torch.ones(1))
    else:
        setattr(norm, what, torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"must be on the CPU and have 8 entries, got \[1\]"):
        norm(torch.randn(5, 3, C))


def test_operators_refuse_what_layers_never_pass() -> None:
    one, count = torch.ones(C), torch.zeros((), dtype=torch.long)
    good = {"x": torch.randn(5, 3, C), "mask": torch.zeros(3, 5, dtype=torch.bool), "step": count}
    bad = {
        "x": torch.randn(3, 5, C).transpose(0, 1),
        "mask": torch.zeros(5, 3, dtype=torch.bool),
        "step": count.int(),
    }
    for name in bad:
        given = {**good, name: bad[name]}
        with pytest.raises(ValueError):
            torch.ops.normexp.power_v(
                given["x"], given["mask"], one, one, one, given["step"], count, False, 1e-5, 0.9
            )
