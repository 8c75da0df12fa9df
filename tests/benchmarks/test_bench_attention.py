"""The benchmark of the attention measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normexp.benchmarks import bench_attention

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.mark.parametrize("causal", [True, False])
def test_the_einsum_computes_the_same(causal: bool) -> None:
    torch.manual_seed(1)
    layer = bench_attention.TensorizedAttention(10, 6, 7, cores=2, causal=causal).double()
    nn.init.normal_(layer.cores)
    x, r = torch.randn(7, 3, 10).double(), torch.randn(7, 10).double()
    u, t = torch.randn(2, 6).double()
    torch.testing.assert_close(
        bench_attention.straightforward(layer, x, r, u, t),
        layer(x, r, u, t),
        rtol=1e-10,
        atol=1e-10,
    )


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"small": (8, 64, 32, 10)}
    monkeypatch.setattr(bench_attention, "SHAPES", shapes)
    # the process that is started to measure the memory has the real sizes
    monkeypatch.setattr(bench_attention, "_memory", bench_attention._memory_of_a_step)
    record = tmp_path / "results" / "attention.json"
    result = bench_attention.measure(3, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    assert [one["attention"] for one in result["measured"]] == ["published", "causal"]
    for one in result["measured"]:
        low, median, high = one["ratio_of_ours_to_einsum"]
        assert 0 < low <= median <= high
        assert set(one["memory_bytes"]) == {"ours", "einsum"}
    assert "attention --rounds 3 --threads " in result["command"]


def test_memory_is_that_of_the_big_tensors() -> None:
    """The einsum holds M, B x L x L x L numbers, at least twice over; ours never does."""
    m = 4 * 60 * 80**3
    assert bench_attention._memory("einsum", "wikitext103", "published") > 2 * m
    assert bench_attention._memory("ours", "wikitext103", "published") < 2 * m


def test_too_few_rounds_are_refused() -> None:
    command = [sys.executable, SCRIPT, "attention", "--rounds", "1"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 2 and "at least 2" in shown.stderr
