"""The peak of a run's memory is its own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.training import loop, peak_memory
from normexp.training.peak_memory import PeakMemory, larger

LARGE = 400 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_of_a_smaller_piece_of_work_after_a_larger_one() -> None:
    first = PeakMemory()
    torch.ones(LARGE, dtype=torch.uint8)
    of_large = first.read()
    second = PeakMemory()
    torch.ones(LARGE // 4, dtype=torch.uint8)
    of_small = second.read()
    assert of_large - of_small == pytest.approx(LARGE * 3 / 4, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_of_a_run_after_a_larger_one(overrides, little_text: Path, monkeypatch) -> None:
    """Two runs in one process, as in a sweep, of which the first holds more."""
    train = loop.train

    def holding_much(cfg: Any, metrics: Any, sinks: list[Any], *rest: Any) -> Any:
        held = []

        def hold(*_: object) -> None:
            if not held:
                held.append(torch.ones(LARGE, dtype=torch.uint8))

        return train(cfg, metrics, [*sinks, hold], *rest)

    settings = ("toy_language_model", f"data.dir={little_text}", "evaluation.splits=[valid]")
    small = "fairseq.optimization.max_update=2"
    plain = pipeline.run(composed(*overrides(*settings, small, "seed=3")))
    monkeypatch.setattr(loop, "train", holding_much)
    large = pipeline.run(composed(*overrides(*settings, small, "seed=1")))
    monkeypatch.setattr(loop, "train", train)
    after = pipeline.run(composed(*overrides(*settings, small, "seed=2")))
    assert large.peak_memory_bytes - after.peak_memory_bytes > 0.9 * LARGE
    assert after.peak_memory_bytes == pytest.approx(plain.peak_memory_bytes, rel=0.1)


def test_unknown_without_the_kernels_help(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(peak_memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert PeakMemory().read() is None
    assert larger(None, 3) is larger(3, None) is None and larger(3, 5) == 5
