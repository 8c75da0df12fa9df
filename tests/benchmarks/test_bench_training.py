"""The benchmark of updates, with a small model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normexp.benchmarks import bench_training as benchmark
from normexp.benchmarks import torch_transformer


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2}
    shape["normalize_before"] = True
    monkeypatch.setattr(benchmark, "_SHAPE", shape)
    model = benchmark._MODEL | {"encoder": shape, "decoder": shape}
    monkeypatch.setattr(benchmark, "_MODEL", model)
    for name, value in {"VOCABULARY": 60, "SENTENCES": 6, "LENGTH": 8, "WARM_UPDATES": 1}.items():
        monkeypatch.setattr(benchmark, name, value)
    kept = {name: benchmark.CONFIGURATIONS[name] for name in (benchmark.STOCK, benchmark.FASTEST)}
    monkeypatch.setattr(benchmark, "CONFIGURATIONS", kept)
    monkeypatch.setattr(benchmark, "_measured_with_memory_kept", lambda rounds: {})


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.usefixtures("small")
def test_record(tmp_path: Path, monkeypatch, compiles: bool) -> None:
    def compiled(model: torch.nn.Module) -> Any:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            if not compiles:
                raise RuntimeError("no C++ compiler\nand more")
            return model(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    path = tmp_path / "training.json"
    result = benchmark.measure(3, path, progress=False)
    assert json.loads(path.read_text(encoding="utf-8")) == result
    rows = {row["configuration"]: row for row in result["measured"]}
    expected = {benchmark.STOCK, benchmark.FASTEST}
    if compiles:
        assert rows.keys() == expected | {torch_transformer.NAME} and result["skipped"] == {}
    else:
        assert rows.keys() == expected
        why = {torch_transformer.NAME: "torch.compile failed: no C++ compiler"}
        assert result["skipped"] == why
    for row in rows.values():  # of models that know nothing yet
        assert row["loss"] == pytest.approx(torch.tensor(60.0).log().item(), rel=0.25)


@pytest.mark.usefixtures("small")
def test_torchs_transformer_leaves_padding_out(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    batch, losses = benchmark._batch(), []
    for extra in (0, 3):
        inputs = batch["net_input"]
        padded = {
            "net_input": {
                "src_tokens": torch.nn.functional.pad(inputs["src_tokens"], (0, extra), value=1),
                "prev_output_tokens": torch.nn.functional.pad(
                    inputs["prev_output_tokens"], (0, extra), value=1
                ),
            },
            "target": torch.nn.functional.pad(batch["target"], (0, extra), value=1),
            "ntokens": batch["ntokens"],
        }
        update = torch_transformer.compiled_update(padded, benchmark._SHAPE, 60, 1, **off)
        losses.append([update() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # bfloat16
    assert losses[0][2] < losses[0][0]
