"""The benchmarks of inference and of reading data, with a tiny model."""

import json
from functools import partial
from pathlib import Path

import pytest

from normexp.benchmarks import bench_data, bench_diagnostics, bench_inference
from normexp.benchmarks.toy import toy_task

SMALL = [
    f"fairseq.model.{side}.{key}=16"
    for side in ("encoder", "decoder")
    for key in ("embed_dim", "ffn_embed_dim")
]


@pytest.fixture
def small_toy(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks prepare the corpus once, and their models are small."""
    folder = tmp_path_factory.getbasetemp() / "toy_corpora"

    def small(task: str, _: Path, *overrides: str):
        return toy_task(task, folder, *overrides, *SMALL)

    for module in (bench_data, bench_diagnostics, bench_inference):
        monkeypatch.setattr(module, "toy_task", small)


def test_record_of_inference(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 4}
    shape = {"encoder": side, "decoder": side | {"input_dim": 16, "output_dim": 16}}
    monkeypatch.setattr(bench_inference, "ENCODER", shape)
    monkeypatch.setattr(bench_inference, "BATCHES", {"2 x 5": (2, 5), "2 x 1": (2, 1)})
    monkeypatch.setattr(bench_inference, "BEAM", 2)
    monkeypatch.setattr(
        bench_inference, "take_turns", partial(_one_round, bench_inference.take_turns)
    )
    record = tmp_path / "results" / "inference.json"
    result = bench_inference.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    assert len(result["encoder"]) == 2 * 2 * 3
    assert {row["norm"] for row in result["encoder"]} == {"LN", "PN", "PN, folded"}
    for row in result["encoder"]:
        low, median, high = row["ratio_to_layer_norm"]
        assert 0 < low <= median <= high and row["milliseconds"] > 0
    stock, ours = result["beam_search"]
    assert (stock["search"], stock["ratio_to_fairseq"]) == ("fairseq", [1, 1, 1])
    assert ours["sentences"] == 500 and ours["beam"] == 2
    assert ours["different_hypotheses"] == 0
    assert ours["sentences_per_second"] == pytest.approx(500 / ours["seconds"], rel=1e-2)


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


def test_record_of_diagnostics(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_diagnostics, "NORMS", ("layer", "power"))
    record = tmp_path / "results" / "diagnostics.json"
    result = bench_diagnostics.measure(2, record, progress=False)
    assert json.loads(record.read_text(encoding="utf-8")) == result
    layer, power = result["measured"]
    # 2 + 2 layers with 2 and 3 norms and one behind each stack; PN tells psi2, its distance, nu,
    # what it rejected and its gradient.
    assert (layer["values"], power["values"]) == (12, 5 * 12)
    for row in (layer, power):
        assert row["milliseconds_of_diagnostics"][1] > 0
        assert row["share_of_training"][1] == pytest.approx(
            row["share_of_logged_update"][1] / row["log_interval"], rel=1e-2
        )


def _one_round(take_turns, calls, rounds, progress):
    return take_turns(calls, 2, progress)
