"""Models of every mixture of norms and other shapes, in the authors' format and back."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from support.authors_format import arguments, build_model, dictionary, their_state_dict, write
from torch import nn

from normexp.checkpoints import store
from normexp.checkpoints.released import import_checkpoint
from normexp.norms.power_released import PowerNormReleased

NORMS = ("layer", "batch", "power")
SOURCE = torch.tensor([[7, 8, 9, 10, 11, 2], [1, 1, 1, 14, 15, 2], [1, 5, 6, 7, 8, 2]])
TARGET = torch.tensor([[2, 9, 8, 7, 5, 6], [2, 15, 14, 1, 1, 1], [2, 6, 5, 13, 1, 1]])


def load(path: Path) -> nn.Module:
    """Load the model as fairseq's tools do, in eval mode."""
    words = dictionary()
    task = TranslationTask(TranslationConfig(), words, words)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(SOURCE, SOURCE.ne(1).sum(1), TARGET)[0]


def check_equal(imported: nn.Module, model: nn.Module) -> None:
    state = imported.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
    assert str(imported) == str(model)  # names the norms with all their options
    assert torch.equal(logits(imported), logits(model))


@pytest.mark.parametrize("norms", itertools.product(NORMS, repeat=4), ids="-".join)
def test_every_mixture_survives_exactly(norms: tuple[str, ...], tmp_path: Path) -> None:
    args = arguments(norms, encoder_layers=1, decoder_layers=1)
    model = build_model(args)
    source = write(tmp_path / "theirs.pt", args, their_state_dict(model, args))
    import_checkpoint(source, tmp_path / "ours.pt")
    check_equal(load(tmp_path / "ours.pt"), model)


def test_final_norms_keep_their_warmup_and_all_have_a_group_per_head(tmp_path: Path) -> None:
    args = arguments(("power",) * 4, warmup_updates=123)
    source = write(tmp_path / "theirs.pt", args, their_state_dict(build_model(args), args))
    import_checkpoint(source, tmp_path / "ours.pt")
    found = {
        name: (norm.warmup_steps, norm.num_groups)
        for name, norm in load(tmp_path / "ours.pt").named_modules()
        if isinstance(norm, PowerNormReleased)
    }
    assert len(found) == 2 * 2 + 2 * 3 + 2
    for name, options in found.items():
        steps = 123 if ".layers." in name else 1000
        assert options == (steps, 4 if name.startswith("encoder") else 2), name


SHAPES: dict[str, dict[str, Any]] = {
    "post-norm": {"encoder_normalize_before": False, "decoder_normalize_before": False},
    "tied decoder": {"share_all_embeddings": False},
    "untied": {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
    "narrow decoder": {
        "share_all_embeddings": False,
        "decoder_embed_dim": 6,
        "decoder_input_dim": 6,
        "decoder_output_dim": 6,
        "decoder_layers": 3,
    },
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_other_shapes_survive_exactly(changes: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(("power", "batch", "layer", "power"), **changes)
    model = build_model(args)
    source = write(tmp_path / "theirs.pt", args, their_state_dict(model, args))
    import_checkpoint(source, tmp_path / "ours.pt")
    check_equal(load(tmp_path / "ours.pt"), model)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    args = arguments(("power", "power", "batch", "batch"))
    model = build_model(args)
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in their_state_dict(model, args).items()
    }
    import_checkpoint(write(tmp_path / "theirs.pt", args, half), tmp_path / "ours.pt")
    state = store.load(tmp_path / "ours.pt")["model"]
    for key, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(state[key], expected), key


def test_configuration_holds_what_the_arguments_said(tmp_path: Path) -> None:
    args = arguments(
        ("power", "power", "layer", "layer"),
        dropout=0.25,
        source_lang="xx",
        left_pad_source=False,
        label_smoothing=0.2,
        lr=[0.5],
        # files of another machine, which are not needed any more
        encoder_embed_path="/elsewhere/vectors",
        decoder_embed_path="/elsewhere/vectors",
    )
    source = write(tmp_path / "theirs.pt", args, their_state_dict(build_model(args), args))
    import_checkpoint(source, tmp_path / "ours.pt")
    cfg = store.load(tmp_path / "ours.pt")["cfg"]
    assert (cfg["model"]["dropout"], cfg["model"]["relu_dropout"]) == (0.25, 0.2)
    assert (cfg["model"]["max_source_positions"], cfg["model"]["max_target_positions"]) == (64, 96)
    assert (cfg["task"]["source_lang"], cfg["task"]["left_pad_source"]) == ("xx", False)
    assert cfg["criterion"]["_name"] == "label_smoothed_cross_entropy"
    assert cfg["criterion"]["label_smoothing"] == 0.2
    assert (cfg["optimizer"]["_name"], cfg["optimizer"]["adam_eps"]) == ("adam", 1e-8)
    assert (cfg["lr_scheduler"]["warmup_updates"], cfg["lr_scheduler"]["lr"]) == (70, [0.5])
    load(tmp_path / "ours.pt")


def test_what_stays_behind_is_named(tmp_path: Path) -> None:
    args = arguments(("layer", "layer", "layer", "batch"), criterion="cross_entropy_of_theirs")
    theirs = their_state_dict(build_model(args), args)
    theirs["decoder.layers.1.final_layer_norm.running_mean"][3] = float("nan")
    extra = {"val_loss": None, "train_iterator": {"epoch": 1}}
    source = write(tmp_path / "theirs.pt", args, theirs, extra_state=extra)
    summary = import_checkpoint(source, tmp_path / "ours.pt")
    assert "left behind  optimizer state, criterion cross_entropy_of_theirs (unknown to" in summary
    assert "trained      77 updates\n" in summary
    assert summary.endswith("not finite   decoder.layers.1.final_layer_norm.running_mean")
