"""The benchmark of reading data, with a tiny model."""

import json
from pathlib import Path

import pytest

from normexp.benchmarks import bench_data


def test_record_of_reading(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "TASKS", ("toy_translation",))
    monkeypatch.setattr(bench_data, "_BATCHES", 2)
    record = tmp_path / "results" / "data.json"
    result = bench_data.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    reading, step = result["measured"]
    assert [reading["part"], step["part"]] == ["reading", "training step"]
    assert 600 < reading["tokens_per_batch"] == step["tokens_per_batch"] <= 1200
    assert step["ratio_to_step"] == [1, 1, 1]
    for row in (reading, step):
        seconds = row["milliseconds_per_batch"][1] / 1e3
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_batch"] / seconds, rel=0.1)
