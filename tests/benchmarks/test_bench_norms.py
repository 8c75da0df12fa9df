"""The benchmark of the norms times what it says."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normexp.benchmarks import bench_norms
from normexp.benchmarks.peers import Peers, of_module
from normexp.benchmarks.timing import Timings
from normexp.report.benchmark_tables import tables


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than everything else here; test_peers has what it gives."""
    none = Peers({}, {"torch.compile": "no C++ compiler"})
    monkeypatch.setattr(bench_norms, "compiled_peers", lambda *_: none)


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_norms, "SHAPES", {"small": (4, 6, 8)})
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    record = tmp_path / "results" / "norms.json"
    result = bench_norms.measure(3, None, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    assert result["malloc"] == {"MALLOC_TOP_PAD_": "1000"}
    kernels = {one["layer"]: one["kernels"] for one in result["measured"]}
    assert kernels["power, plain torch"] == kernels["unified, plain torch"] == "plain"
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
    inputs = bench_norms.make_inputs((4, 6, 8), torch.bfloat16)
    found = bench_norms.candidates(inputs)
    for candidate in found.values():
        gradients = candidate.gradients(inputs)
        assert gradients[0].shape == (4, 6, 8) and gradients[0].dtype == torch.bfloat16
        assert all(gradient.shape == (8,) for gradient in gradients[1:])
        assert all(gradient.isfinite().all() for gradient in gradients)
    padded = found["power"].gradients(inputs)[0].abs().sum(-1) == 0
    assert 0 < padded.sum() < 12


def test_kernels_differ_in_rounding_only() -> None:
    inputs = bench_norms.make_inputs((4, 6, 8), torch.float32)
    found = bench_norms.candidates(inputs)
    for name in ("power", "power_v", "batch", "power_released"):
        plain = found[f"{name}, plain torch"].gradients(inputs)
        torch.testing.assert_close(found[name].gradients(inputs), plain)


def test_peers_stand_beside_ours_and_what_was_skipped_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the authors' layers, each with the rows that are compared with it."""

    def made_up_times(calls: dict, rounds: int, progress: bool) -> Timings:
        for call in calls.values():
            call()
        theirs = {"power, authors": 2.0, "batch, authors": 4.0}
        seconds = {name: [theirs.get(name, 1.0)] * rounds for name in calls}
        return Timings(seconds, dropped=0, disturbed=False)

    class Theirs(nn.Linear):
        def __init__(self, channels: int):
            super().__init__(channels, channels)

        def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
            assert padding_mask.shape == (x.shape[1], x.shape[0])
            return super().forward(x)

    monkeypatch.setattr(bench_norms, "SHAPES", {"small": (4, 6, 8)})
    monkeypatch.setattr(
        bench_norms, "authors_layers", lambda clone: {"power": Theirs, "batch": Theirs}
    )
    monkeypatch.setattr(
        bench_norms,
        "compiled_peers",
        lambda channels, *_: Peers({"peer": of_module(Theirs(8))}, {}),
    )
    monkeypatch.setattr(bench_norms, "DTYPES", {"float32": torch.float32})
    monkeypatch.setattr(bench_norms, "interleave", made_up_times)
    result = bench_norms.measure(2, tmp_path, tmp_path / "norms.json", progress=False)
    rows = {row["layer"]: row for row in result["measured"]}
    assert {"peer", "power, authors", "batch, authors"} < set(rows)
    ratios = {
        name: row["ratio_to_authors"] for name, row in rows.items() if "ratio_to_authors" in row
    }
    assert set(ratios) == set(bench_norms.LAYERS)
    for name, ratio in ratios.items():
        assert ratio == [1 / 4] * 3 if "batch" in name else ratio == [1 / 2] * 3
    assert set(result["skipped"]) == {"Liger", "quack"} or torch.cuda.is_available()
    assert "--authors PATH" in result["command"] and str(tmp_path) not in result["command"]
    *_, (title, table) = tables("norms", result)
    assert "authors" in title and len(table.rows) == len(bench_norms.LAYERS)
    assert any("Skipped: Liger: needs a GPU" in note.text for note in table.notes)
