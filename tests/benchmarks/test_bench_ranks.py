"""The benchmark of synchronized statistics counts what the layers really send."""

import json
from pathlib import Path

import pytest

from normexp.benchmarks import bench_ranks
from normexp.report.benchmark_tables import tables


def test_record(tmp_path: Path) -> None:
    record = tmp_path / "ranks.json"
    result = bench_ranks.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    collectives = {one["layer"]: one["collectives"] for one in result["measured"]}
    passes = 2 * bench_ranks.LAYERS
    assert collectives == {
        "layer": 0,
        "power, each rank its own": 0,
        "power, synchronized": 1,
        "power, synchronized, torch alone": passes,
        "power in its warm-up, synchronized": passes,
        "batch, synchronized": passes,
    }
    for one in result["measured"]:
        low, median, high = one["ratio_to_layer"]
        assert 0 < low <= median <= high
    assert result["measured"][0]["ratio_to_layer"] == pytest.approx([1, 1, 1])
    ((title, table),) = tables("ranks", result)
    assert "12 layers on 2 ranks, 64 × 8 × 256" in title
    assert len(table.rows) == len(bench_ranks.CANDIDATES)
