"""The blocks of docs/own_models.md run as they stand, and do what the guide says."""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from normexp.norms.power import PowerNorm

GUIDE = Path(__file__).parents[2] / "docs" / "own_models.md"
LOSSES = re.compile(r"^(.+): loss ([\d.]+) at first, ([\d.]+) at last$")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


def run(block: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """What the block leaves behind, and the lines that it prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, GUIDE.name, "exec"), names)
    return names, capsys.readouterr().out.strip().split("\n")


def losses(lines: list[str]) -> dict[str, tuple[float, float]]:
    found = [LOSSES.match(line) for line in lines]
    return {line[1]: (float(line[2]), float(line[3])) for line in found if line}


def power_norms(names: dict[str, Any]) -> list[PowerNorm]:
    return [norm for norm in names["model"].modules() if isinstance(norm, PowerNorm)]


def test_every_block_of_the_guide_is_tested_here() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert text.count("```python") == len(blocks()) == 5
    assert text.count("```") == 2 * (len(blocks()) + text.count("```sh"))


def test_the_norm_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    names, _ = run(blocks()[0], capsys)
    assert names["y"].shape == names["x"].shape
    assert names["norm"].step == 1  # in training mode a forward moves the statistics


def test_the_transformer_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    names, lines = run(blocks()[1], capsys)
    found = losses(lines)
    assert list(found) == ["layer", "power"] and len(lines) == 2
    for first, last in found.values():
        assert first > 2 and last < 0.3  # of log 11 = 2.4, what guessing gives
    norms = power_norms(names)
    assert [int(norm.step) for norm in norms] == [201] * 5  # the last batch was in eval mode
    assert norms[0].warmup_steps < 201


def test_the_hugging_face_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="needs normexp[huggingface]")
    names, lines = run(blocks()[2], capsys)
    found = losses(lines)
    assert list(found) == ["layer at 5 sites", "power at 5 sites", "power at 2 sites"]
    for first, last in found.values():
        # The first token cannot be known; it is one in about 8.5 that are predicted.
        assert first > 2 and last < 1
    assert len(power_norms(names)) == 2
    for sentence in ast.literal_eval(lines[-1]):
        counted = [token for token in sentence if token]
        assert all(b == a % 11 + 1 for a, b in itertools.pairwise(counted))
        assert len(sentence) == 10


def test_trainer_and_from_pretrained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("accelerate", reason="needs normexp[huggingface]")
    names, lines = run(blocks()[3], capsys)
    assert lines[-1] == "[[4, 5, 6, 7, 8, 9, 10, 11, 1]]"
    assert [int(norm.step) for norm in power_norms(names)] == [100] * 5
    decayed, others = names["trainer"].optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert all(parameter.dim() == 2 for parameter in decayed["params"])


def test_averaged_weights_and_a_second_forward(capsys: pytest.CaptureFixture[str]) -> None:
    names, lines = run(blocks()[4], capsys)
    ((first, last),) = losses(lines).values()
    assert last < first / 2
    assert names["norm"].step == 200  # one of two forwards counts
    averaged = names["averaged"].module
    with torch.no_grad():
        means = [averaged[0](x).square().mean(0) for x in names["batches"][-50:]]
    torch.testing.assert_close(averaged[1].running_psi2, torch.stack(means).mean(0))


def test_norms_need_nothing_but_torch() -> None:
    """In a process that can import neither the project's other dependencies nor its other parts."""
    code = """
import sys
for name in ("fairseq", "hydra", "omegaconf", "transformers", "wandb", "pandas", "yaml", "rich"):
    sys.modules[name] = None
import normexp.norms
print([name for name in sys.modules if name.startswith("normexp.") and ".norms" not in name])
"""
    environment = {**os.environ, "PYTHONPATH": str(GUIDE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
