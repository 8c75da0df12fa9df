"""The benchmark of the diagnostics, with a tiny model."""

import json
from pathlib import Path

import pytest

from normexp.benchmarks import bench_diagnostics


def test_record_of_diagnostics(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_diagnostics, "NORMS", ("layer", "power"))
    record = tmp_path / "results" / "diagnostics.json"
    result = bench_diagnostics.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    layer, power = result["measured"]
    # 2 + 2 layers with 2 and 3 norms and one behind each stack; PN reports psi2, its distance, nu,
    # what it rejected and its gradient.
    assert (layer["values"], power["values"]) == (12, 5 * 12)
    for row in (layer, power):
        assert row["milliseconds_of_diagnostics"][1] > 0
        assert row["share_of_training"][1] == pytest.approx(
            row["share_of_logged_update"][1] / row["log_interval"], rel=1e-2
        )
