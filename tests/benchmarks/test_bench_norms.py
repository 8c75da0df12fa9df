"""The benchmark of the norms times what it says."""

import json
from pathlib import Path

import pytest
import torch

from normexp.benchmarks import bench_norms


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_norms, "SHAPES", {"small": (4, 6, 8)})
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    record = tmp_path / "results" / "norms.json"
    result = bench_norms.measure(3, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    assert result["malloc"] == {"MALLOC_TOP_PAD_": "1000"}
    kernels = {one["layer"]: one["kernels"] for one in result["measured"]}
    assert kernels["power, plain torch"] == kernels["unified"] == "plain"
    assert kernels["power"] in ("native", "triton", "plain") and kernels["nn.LayerNorm"] is None
    layers = {one["layer"] for one in result["measured"]}
    assert layers == {*bench_norms.LAYERS, "nn.LayerNorm", "F.rms_norm", "F.batch_norm, no mask"}
    assert len(result["measured"]) == 2 * len(layers)
    for one in result["measured"]:
        if one["layer"] == "nn.LayerNorm":
            assert one["ratio_to_layer_norm"] == [1, 1, 1]
        assert one["milliseconds"] > 0 and one["rounds_kept"] >= 3


def test_every_candidate_gives_the_gradients_of_its_layer() -> None:
    """Of x and of each parameter, in the type of each; F.batch_norm's are masked BN's."""
    calls, _ = bench_norms.candidates((4, 6, 8), torch.bfloat16)
    for call in calls.values():
        gradients = call()
        assert gradients[0].shape == (4, 6, 8) and gradients[0].dtype == torch.bfloat16
        assert all(gradient.shape == (8,) for gradient in gradients[1:])
        assert all(gradient.isfinite().all() for gradient in gradients)
    padded = calls["power"]()[0].abs().sum(-1) == 0
    assert 0 < padded.sum() < 12


def test_kernels_differ_in_rounding_only() -> None:
    calls, _ = bench_norms.candidates((4, 6, 8), torch.float32)
    for name in ("power", "power_v", "batch", "power_released"):
        torch.testing.assert_close(calls[name](), calls[f"{name}, plain torch"]())
