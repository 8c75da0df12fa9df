"""scripts/export_checkpoint.py: models with LN everywhere, for fairseq itself and CTranslate2."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fairseq import models, tasks
from fairseq.models.transformer import TransformerModel
from omegaconf import DictConfig, OmegaConf
from torch import nn

from normexp.checkpoints import store
from normexp.checkpoints.stock import export_checkpoint
from normexp.errors import UserError

SIZES = {"embed_dim": 16, "ffn_embed_dim": 24, "layers": 2, "attention_heads": 2}
MODEL = {
    "_name": "normexp_transformer",
    "encoder": {**SIZES, "normalize_before": True},
    "decoder": {**SIZES, "normalize_before": True},
    "dropout": 0.0,
    "activation_fn": "gelu",
}
# Sizes and switches that have another name, or another default, in a flat namespace.
VARIANTS = {
    "pre-norm": {},
    "post-norm": {
        "encoder": {"normalize_before": False},
        "decoder": {"normalize_before": False, "layers": 1},
        "share_all_embeddings": True,
    },
}


@pytest.fixture
def checkpoint(
    structured_config: Callable[..., DictConfig], translation_data: Path, tmp_path: Path
) -> Callable[..., tuple[Path, nn.Module]]:
    """A checkpoint as fairseq writes it, of an untrained model with large weights."""

    def write(**values: Any) -> tuple[Path, nn.Module]:
        languages = {"source_lang": "de", "target_lang": "en"}
        task = {"_name": "translation", "data": str(translation_data), **languages}
        config = structured_config(model=OmegaConf.merge(MODEL, values), task=task)
        torch.manual_seed(1)
        model = models.build_model(config.model, tasks.setup_task(config.task)).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        state = {
            "args": None,
            "cfg": OmegaConf.to_container(config),
            "model": model.state_dict(),
            "optimizer_history": [{"num_updates": 7, "optimizer_name": "FairseqAdam"}],
            "extra_state": {},
        }
        store.save(tmp_path / "trained.pt", state)
        return tmp_path / "trained.pt", model

    return write


def stock(exported: Path, data: Path) -> nn.Module:
    """fairseq's own model, built from what the file says."""
    state = torch.load(exported, weights_only=True)
    args: argparse.Namespace = state["args"]
    args.data = str(data)
    model = models.build_model(args, tasks.setup_task(args))
    model.load_state_dict(state["model"], strict=True)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fairseqs_own_model_computes_the_same(
    variant: str,
    checkpoint: Callable[..., tuple[Path, nn.Module]],
    translation_data: Path,
    sentences: argparse.Namespace,
    tmp_path: Path,
) -> None:
    path, model = checkpoint(**VARIANTS[variant])
    summary = export_checkpoint(path, tmp_path / "exported.pt")
    assert "de to en" in summary
    theirs = stock(tmp_path / "exported.pt", translation_data)
    assert type(theirs) is TransformerModel
    lengths = (sentences.source != 1).sum(1)
    for each, expected in zip(
        theirs(sentences.source, lengths, sentences.shifted)[:1],
        model(sentences.source, lengths, sentences.shifted)[:1],
        strict=True,
    ):
        assert torch.equal(each, expected)


@pytest.fixture
def ctranslate2() -> ModuleType:
    return pytest.importorskip("ctranslate2", reason="pip install ctranslate2")


@pytest.mark.parametrize("variant", VARIANTS)
def test_ctranslate2_gives_every_word_the_same_probability(
    variant: str,
    checkpoint: Callable[..., tuple[Path, nn.Module]],
    translation_data: Path,
    ctranslate2: ModuleType,
    tmp_path: Path,
) -> None:
    """Its converter takes the file. Search is its own; what it searches by are these numbers."""
    path, model = checkpoint(**VARIANTS[variant])
    export_checkpoint(path, tmp_path / "exported.pt")
    converter = ctranslate2.converters.FairseqConverter(
        str(tmp_path / "exported.pt"), str(translation_data)
    )
    converter.convert(str(tmp_path / "converted"))
    translator = ctranslate2.Translator(
        str(tmp_path / "converted"), compute_type="float32", intra_threads=1
    )

    task = tasks.setup_task(torch.load(tmp_path / "exported.pt", weights_only=True)["args"])
    task.load_dataset("test")
    dataset = task.dataset("test")
    for i in range(len(dataset)):
        batch = dataset.collater([dataset[i]])
        source = task.source_dictionary.string(batch["net_input"]["src_tokens"]).split()
        target = task.target_dictionary.string(batch["target"]).split()
        (scored,) = translator.score_batch([source], [target])
        with torch.no_grad():
            logits, _ = model(**batch["net_input"])
        expected = logits.log_softmax(-1).gather(-1, batch["target"][..., None]).flatten()
        assert len(expected) == len(target) + 1
        assert scored.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "power"}, "encoder_attention.*power.*train with norm=layer"),
        ({"norm_options": '{"eps": 0.001}'}, "encoder_ffn.*0.001"),
        ({"norm_sites": '{"decoder_ffn": "rms"}'}, "decoder_ffn.*rms"),
    ],
)
def test_what_ctranslate2_cannot_compute_is_refused(
    values: dict[str, Any],
    message: str,
    checkpoint: Callable[..., tuple[Path, nn.Module]],
    tmp_path: Path,
) -> None:
    path, _ = checkpoint(**values)
    with pytest.raises(UserError, match=message):
        export_checkpoint(path, tmp_path / "exported.pt")
    assert not (tmp_path / "exported.pt").exists()


def test_other_files_and_existing_targets_are_refused(
    checkpoint: Callable[..., tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    path, _ = checkpoint()
    for target, source, message in (
        (path, path, "exists"),
        (tmp_path / "new.pt", tmp_path / "missing.pt", "no checkpoint"),
        (tmp_path / "no" / "folder.pt", path, "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(source, target)
    state = store.load(path)
    language_model = {**state["cfg"], "model": {"_name": "normexp_transformer_lm"}}
    message = r"only normexp_transformer, translation|is not to be trusted"
    for configuration in (language_model, {}, None, "text", {"model": [], "task": {}}):
        store.save(tmp_path / "other.pt", {**state, "cfg": configuration})
        with pytest.raises(UserError, match=message):
            export_checkpoint(tmp_path / "other.pt", tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
