"""The benchmark over sizes measures every layer at every size."""

import json
from pathlib import Path

import pytest

from normexp.benchmarks import bench_norms, bench_scaling
from normexp.benchmarks.timing import Timings


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scaling, "TOKENS", (64, 128))
    monkeypatch.setattr(bench_scaling, "CHANNELS", (16,))
    monkeypatch.setattr(bench_scaling, "GROUPS", (1, 4))
    record = tmp_path / "results" / "scaling.json"
    result = bench_scaling.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    rows = result["measured"]
    layers = {"nn.LayerNorm", "power", "power_released", "batch"}
    for sweep, sizes in {"tokens": {64, 128}, "channels": {16}}.items():
        own = [row for row in rows if row["sweep"] == sweep]
        assert {row[sweep] for row in own} == sizes
        assert {row["layer"] for row in own} == layers
        assert len(own) == 2 * len(sizes) * len(layers)
    by_groups = [row for row in rows if row["sweep"] == "groups"]
    assert {row["groups"] for row in by_groups} == {None, 1, 4}
    assert len(by_groups) == 2 * 3
    for row in rows:
        low, median, high = row["nanoseconds_per_element"]
        assert 0 < low <= median <= high
        if row["layer"] == "nn.LayerNorm":
            assert row["ratio_to_layer_norm"] == [1, 1, 1]


def test_nanoseconds_are_per_element_of_x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def a_second_each(calls: dict, rounds: int, progress: bool) -> Timings:
        return Timings({name: [1.0] * rounds for name in calls}, dropped=0, disturbed=False)

    monkeypatch.setattr(bench_norms, "interleave", a_second_each)
    monkeypatch.setattr(bench_scaling, "CHANNELS", (8,))
    monkeypatch.setattr(bench_scaling, "TOKENS", (64,))
    result = bench_scaling.measure(2, tmp_path / "scaling.json", progress=False)
    found = {row["sweep"]: row["nanoseconds_per_element"][1] for row in result["measured"]}
    assert found["tokens"] == round(1e9 / (64 * 512), 4)
    assert found["channels"] == round(1e9 / (4096 * 8), 4)
