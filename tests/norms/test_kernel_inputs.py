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
    "unified": {"warmup_steps": 1, "window_size": 1},
    "batch_released": {},
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


def elsewhere(values: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins `offset` values behind where an allocation begins."""
    memory = torch.empty(values.numel() + offset, dtype=values.dtype)
    return memory[offset:].view(values.shape).copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [5, 100])  # some are left over where 4, 8 or 16 go at once
@every_layer
def test_results_do_not_depend_on_addresses(name: str, channels: int, dtype: torch.dtype) -> None:
    """To the bit: a run that was killed and goes on finds other memory."""
    options = OPTIONS[name] | ({"num_groups": 1} if "num_groups" in OPTIONS[name] else {})
    results = []
    for offset in (0, 1, 3, 7):
        generator = torch.Generator().manual_seed(1)
        norm, seen = build_norm(name, channels, **options), []
        for what, tensor in [*norm._parameters.items(), *norm._buffers.items()]:
            if tensor.dim() > 0:
                tensor.data = elsewhere(tensor.data, offset)
                assert tensor.is_contiguous(), what
        for _ in range(3):
            drawn = (torch.randn(70, 3, channels, generator=generator) for _ in range(2))
            x, upstream = (elsewhere(values.to(dtype), offset) for values in drawn)
            y = norm(x.requires_grad_(), torch.rand(3, 70, generator=generator) < 0.3)
            seen += [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], upstream)]
            if hasattr(norm, "penalty"):
                seen.append(norm.penalty())
        assert norm.kernels == "native"
        results.append([*seen, *norm.state_dict().values()])
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*OPTIONS, "rms"])
def test_the_fast_path_is_taken(name: str, masked: bool, dtype: torch.dtype) -> None:
    """One node of the graph, which the kernel has made; nothing kept that nobody asks for."""
    norm = build_norm(name, C, **OPTIONS.get(name, {}))
    for _ in range(3):
        x = torch.randn(6, 3, C, dtype=dtype).requires_grad_()
        y = norm(x, torch.rand(3, 6) < 0.3 if masked else None)
        if hasattr(norm, "penalty"):
            norm.penalty()
        assert norm.kernels == "native"
        (to_x, _), *_ = y.grad_fn.next_functions
        assert to_x.variable is x
    if name != "rms":
        assert not norm._replay_cache._forwards


@pytest.mark.parametrize("how", ["reentrant", "non_reentrant", "own hooks"])
@pytest.mark.parametrize("name", ["power", "power_released", "unified", "regularized_batch"])
def test_what_may_be_repeated_is_kept(name: str, how: str) -> None:
    norm = build_norm(name, C, **OPTIONS[name])
    x = torch.randn(6, 3, C, requires_grad=True)
    if how == "own hooks":
        with torch.autograd.graph.save_on_cpu():
            norm(x)
    else:
        torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=how == "reentrant")
    assert norm.kernels == "native" and len(norm._replay_cache._forwards) == 1


@every_layer
def test_forward_mode_is_refused(name: str) -> None:
    norm, x = build_norm(name, C, **OPTIONS[name]), torch.randn(5, 3, C)
    before = {what: buffer.clone() for what, buffer in norm.named_buffers()}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            norm(dual)
    assert_same(dict(norm.named_buffers()), before)


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
        # BN subtracts the mean, and layers as released scale every token first.
        overflown = name in ("power", "power_v", "unified")
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
