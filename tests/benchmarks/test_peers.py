"""Peers compute what they are compared for; those that cannot run are named with the reason."""

from collections.abc import Iterator

import pytest
import torch

from normexp.benchmarks import bench_norms, peers
from normexp.benchmarks.compiled_layers import compiled_layers
from normexp.norms import build_norm
from normexp.norms.kernels.choice import use_kernels

CPU = torch.device("cpu")
OPTIONS = {
    "power": {"warmup_steps": 0},
    "power_v": {},
    "batch": {},
    "power_released": {"warmup_steps": 0, "num_groups": 4},
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_equations_are_those_of_the_layer(name: str) -> None:
    """Gradients and statistics over several steps; traced whole, as the compiler's input is."""
    assert set(compiled_layers()) == set(OPTIONS)
    use_kernels("plain")
    torch.manual_seed(3)
    norm, peer = build_norm(name, 8, **OPTIONS[name]), compiled_layers("eager")[name](8)
    inputs = bench_norms.make_inputs((5, 6, 8), torch.float32)
    for _ in range(3):
        results = []
        for layer in (norm, peer):
            leaves = inputs.x, layer.weight, layer.bias
            y = layer(inputs.x, inputs.padding_mask)
            gradients = torch.autograd.grad(y, leaves, inputs.gradient)
            state = [dict(layer.named_buffers())[key] for key, _ in peer.named_buffers()]
            results.append([*gradients, *state])
        torch.testing.assert_close(results[0], results[1])


def test_a_compiler_is_needed_and_its_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    peers._why_not_compiled.cache_clear()
    try:
        found = peers.compiled_peers(8, CPU, ("power",))
    finally:
        peers._why_not_compiled.cache_clear()
    assert found == ({}, {"torch.compile": "no C++ compiler"})


def test_peers_for_gpus_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.gpu_peers(8, CPU, torch.float32).skipped == {
        "Liger": "needs a GPU", "quack": "needs a GPU"
    }  # fmt: skip
    monkeypatch.setattr(peers, "version", lambda package: None)
    found = peers.gpu_peers(8, torch.device("cuda"), torch.float32)
    assert found.skipped["Liger"] == "liger-kernel is not installed" and not found.layers


def test_a_peer_of_a_gpu_gets_x_and_vectors_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the two packages' functions; one that cannot be imported is named."""

    class OnGPU:
        type = "cuda"

    def refuse() -> None:
        raise OSError("no libcuda")

    monkeypatch.setattr(peers, "version", lambda package: "1.0")
    monkeypatch.setattr(torch, "ones", lambda n, device, dtype: torch.full((n,), 2.0, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda n, device, dtype: torch.full((n,), 3.0, dtype=dtype))
    functions = {"LayerNorm": (lambda x, weight, bias: x * weight + bias, 2)}
    monkeypatch.setattr(peers, "_liger", lambda: functions)
    monkeypatch.setattr(peers, "_quack", refuse)
    found = peers.gpu_peers(4, OnGPU(), torch.bfloat16)
    assert found.skipped == {"quack": "quack-kernels cannot be imported: no libcuda"}
    (peer,) = found.layers.values()
    assert list(found.layers) == ["LayerNorm, Liger"] and len(peer.parameters) == 2
    y = peer.forward(torch.full((1, 1, 4), 5.0, dtype=torch.bfloat16), None)
    assert y.dtype == torch.bfloat16 and y.tolist() == [[[13.0] * 4]]
