"""Runs with the settings of `speed`: resumed, recorded, refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.config.settings import RunSettings, SpeedSettings, validated
from normexp.config.validation import validate
from normexp.errors import UserError
from normexp.training import loop

ALL = [
    "speed.precision=bfloat16",
    "speed.fast_dropout=true",
    "speed.fused_loss=true",
    "speed.fused_adam=true",
]
NONE = ["speed.fast_dropout=false", "speed.fused_loss=false", "speed.fused_adam=false"]


class _Interrupted(Exception):
    """Simulates a kill: nothing of the process is used again."""


def test_resumed_run_is_the_same_to_the_bit(
    overrides: Callable[..., list[str]], little_text: Path, tmp_path: Path, monkeypatch
) -> None:
    """Interrupted in its second epoch, between checkpoints, with every setting on."""
    settings = overrides(
        "toy_translation",
        f"data.dir={little_text}",
        "fairseq.dataset.max_tokens=400",
        "norm=power",
        "task.norm_warmup_steps=10",
        "fairseq.model.dropout=0.3",
        "fairseq.model.attention_dropout=0.2",
        "evaluation.splits=[valid]",
        *ALL,
    )
    straight = pipeline.run(composed(*settings))
    assert sum(straight.kernels.values()) == 3  # two norms in one layer, and the final one
    (tmp_path / "results").rename(tmp_path / "straight")

    observed_metrics = loop.patches.metrics_sent_to

    def interrupting(*sinks):
        def sink(tag: str, step: int, values) -> None:
            if tag == "train_inner" and step == straight.num_updates - 3:
                raise _Interrupted

        return observed_metrics(*sinks, sink)

    with monkeypatch.context() as patched:
        patched.setattr(loop.patches, "metrics_sent_to", interrupting)
        with pytest.raises(_Interrupted):
            pipeline.run(composed(*settings))
    for record in (tmp_path / "results").rglob("*.json"):
        record.unlink()
    torch.manual_seed(12345)  # whatever the process did before must not matter
    resumed = pipeline.run(composed(*settings))
    assert resumed.metrics == straight.metrics and resumed.curve == straight.curve
    weights = [_weights(tmp_path / root) for root in ("straight", "results")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def _weights(root: Path) -> dict[str, torch.Tensor]:
    (path,) = root.rglob("checkpoint_last.pt")
    return torch.load(path, weights_only=True)["model"]


def test_settings_are_recorded_and_change_little(overrides, little_text, tmp_path) -> None:
    """Without dropout the losses of an epoch are the same to 2 %, and not the weights."""
    losses, weights = {}, {}
    for label, chosen in {"stock": NONE, "fast": ALL}.items():
        settings = overrides(
            "toy_language_model",
            f"label={label}",
            f"data.dir={little_text}",
            "fairseq.dataset.max_tokens=600",
            "fairseq.optimization.max_epoch=1",
            "evaluation.splits=[valid]",
            "norm=power",
            "speed.kernels=plain",
            *chosen,
        )
        record = pipeline.run(composed(*settings))
        assert record.config["speed"]["fused_loss"] == (label == "fast")
        assert record.kernels == {"plain": 3}
        losses[label] = record.curve[-1][1]
        (log,) = tmp_path.rglob(f"*{label}*/log.txt")
        assert ("normexp_adam" in log.read_text()) == (label == "fast")
        weights[label] = _weights(log.parent)
    assert losses["fast"] == pytest.approx(losses["stock"], rel=2e-2)
    assert not all(torch.equal(weights["fast"][name], w) for name, w in weights["stock"].items())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["speed.precision=float16"], "speed.precision='float16'; known: float32, bfloat16"),
        (["speed.fused_loss=1"], "speed.fused_loss=1 must be true or false"),
        (["speed.kernels=fast"], "speed.kernels='fast'; known: auto, plain, native, triton"),
        (["+speed.dropout=true"], "speed.dropout is unknown; known: precision"),
        (
            ["speed.precision=bfloat16", "+fairseq.common.bf16=true"],
            "fairseq.common.bf16=true are two ways",
        ),
    ],
)
def test_bad_settings_are_named(chosen: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(composed("task=toy_translation", *chosen))


def _fairseq_node(*chosen: str) -> tuple[str, bool]:
    node = validate(composed(*chosen)).fairseq
    return node.optimizer._name, node.criterion.get("fused", False)


def test_what_the_settings_choose_in_fairseq() -> None:
    assert _fairseq_node("task=toy_language_model") == ("normexp_adam", True)
    assert _fairseq_node("task=toy_language_model", *NONE) == ("adam", False)
    wikitext = ("task=wikitext103", "fairseq.common.cpu=true")
    assert _fairseq_node(*wikitext)[1] is False  # an adaptive softmax
    assert _fairseq_node("task=ptb", "model=tensorized_ptb_cpu")[1] is False


def test_older_run_folders_are_stock() -> None:
    """A configuration written before there were such settings."""
    stock = {
        "fast_dropout": False,
        "fused_loss": False,
        "fused_adam": False,
        "precision": "float32",
    }
    content = composed("task=toy_language_model").model_dump(mode="json")
    del content["speed"]
    assert validated(RunSettings, content).speed == SpeedSettings() == SpeedSettings(**stock)
    content["speed"] = {"fused_loss": True}
    assert validated(RunSettings, content).speed == SpeedSettings(fused_loss=True)
