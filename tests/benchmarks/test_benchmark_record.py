"""What stands in the record of every benchmark beside its measurements."""

import json
from pathlib import Path

import pytest

from normexp.benchmarks.benchmark_record import write_record


def test_circumstances_of_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for name in ("MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "new" / "one.json"
    result = write_record(path, "one", {"rounds": 3}, {"measured": []})
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert result["malloc"] == "default"
    assert result["command"].startswith("python scripts/benchmark.py one --rounds 3 --threads ")
    assert {"hardware", "versions", "code_commit", "code_dirty", "measured_at"} < set(result)
