"""fairseq's checkpoints load under torch's weights_only default, and nothing else does."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import train
from omegaconf import DictConfig, OmegaConf

from normexp.fairseq_plugin.checkpoint_types import CHECKPOINT_TYPES

BLEU = '{"beam": 1, "max_len_a": 0, "max_len_b": 4}'
GROUPS = {
    "model": {
        "_name": "normexp_transformer",
        "encoder": {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2},
        "decoder": {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2},
        "norm": "batch",
    },
    "task": {"_name": "translation", "eval_bleu": True, "eval_bleu_args": BLEU},
    "criterion": {"_name": "label_smoothed_cross_entropy"},
    "optimizer": {"_name": "adam"},
    "lr_scheduler": {"_name": "fixed"},
    "optimization": {"lr": [0.001], "max_update": 2},
    "dataset": {"num_workers": 0, "max_tokens": 300, "required_batch_size_multiple": 1},
    "common": {"cpu": True},
}
FLAGS = (
    "--encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 16 "
    "--encoder-attention-heads 2 --decoder-layers 1 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --decoder-attention-heads 2 --eval-bleu "
    "--criterion label_smoothed_cross_entropy --lr 0.001 --max-update 2 "
    "--num-workers 0 --max-tokens 300 --required-batch-size-multiple 1 --cpu"
)


@pytest.fixture
def configure(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    translation_data: Path,
    structured_config: Callable[..., DictConfig],
    command_line_config: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], DictConfig]:
    """Configure a short training with BLEU in validation, started in one of four ways."""
    # The best loss so far is an attribute of fairseq's function: reset it between trainings.
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)

    def make(way: str) -> DictConfig:
        if way == "configuration":
            groups = OmegaConf.merge(GROUPS, {"task": {"data": str(translation_data)}})
            config = structured_config(**groups)
        else:
            arch = "transformer" if way == "stock" else "normexp_transformer"
            # fairseq keeps all flags with an optimizer that has no dataclass, such as adagrad.
            optimizer = "adagrad" if way == "old optimizer" else "adam"
            config = command_line_config(
                *(str(translation_data), "--arch", arch, "--optimizer", optimizer),
                *("--eval-bleu-args", BLEU, *FLAGS.split()),
            )
        config.checkpoint.save_dir = str(tmp_path / "checkpoints")
        return config

    return make


@pytest.mark.parametrize("way", ["configuration", "command line", "old optimizer", "stock"])
def test_checkpoints_load_and_training_resumes(
    way: str, configure: Callable[[str], DictConfig], tmp_path: Path
) -> None:
    train.main(configure(way))
    last = tmp_path / "checkpoints" / "checkpoint_last.pt"

    (model,), _ = checkpoint_utils.load_model_ensemble([str(last)])
    saved = torch.load(last)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    assert saved["optimizer_history"][-1]["num_updates"] == 2

    config = configure(way)
    config.optimization.max_update = 3
    train.main(config)
    assert torch.load(last)["optimizer_history"][-1]["num_updates"] == 3


def test_every_allowed_type_is_needed(
    configure: Callable[[str], DictConfig], tmp_path: Path
) -> None:
    train.main(configure("stock"))
    allowed = torch.serialization.get_safe_globals()
    try:
        for needed in CHECKPOINT_TYPES:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([item for item in allowed if item is not needed])
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt")
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


class _Malicious:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"args": None, "model": _Malicious(tmp_path / "trace")}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "trace").exists()
