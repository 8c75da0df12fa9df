"""The benchmark of inference, with a tiny model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from normexp.benchmarks import bench_inference


def test_record_of_inference(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 4}
    shape = {"encoder": side, "decoder": side | {"input_dim": 16, "output_dim": 16}}
    monkeypatch.setattr(bench_inference, "ENCODER", shape)
    monkeypatch.setattr(bench_inference, "BATCHES", {"2 x 5": (2, 5), "2 x 1": (2, 1)})
    monkeypatch.setattr(bench_inference, "BEAM", 2)
    monkeypatch.setattr(
        bench_inference, "interleave", partial(_one_round, bench_inference.interleave)
    )
    record = tmp_path / "results" / "inference.json"
    result = bench_inference.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    assert len(result["encoder"]) == 2 * 2 * 3
    assert {row["norm"] for row in result["encoder"]} == {"LN", "PN", "PN, folded"}
    for row in result["encoder"]:
        low, median, high = row["ratio_to_layer_norm"]
        assert 0 < low <= median <= high and row["milliseconds"] > 0
    found = {(row["search"], row["threads"]): row for row in result["beam_search"]}
    assert len(found) == len(result["beam_search"])
    for threads in {1, torch.get_num_threads()}:
        assert found["fairseq", threads]["ratio_to_fairseq"] == [1, 1, 1]
        for name in ("ours", "ours, plain torch"):
            ours = found[name, threads]
            assert ours["sentences"] == 500 and ours["beam"] == 2
            assert ours["different_hypotheses"] == 0
            assert ours["sentences_per_second"] == pytest.approx(500 / ours["seconds"], rel=1e-2)


def _one_round(interleave, calls, rounds, progress):
    return interleave(calls, 2, progress)
