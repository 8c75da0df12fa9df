"""A toy corpus of each kind, and models built in the two ways in which users build them."""

import argparse
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import models, options, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import preprocess
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

import normexp.fairseq_plugin  # noqa: F401  (registers the models)

WORDS = [f"w{i}" for i in range(20)]
TINY_TRANSLATION = {
    "_name": "normexp_transformer",
    "encoder": {
        "layers": 2,
        "embed_dim": 16,
        "ffn_embed_dim": 24,
        "attention_heads": 2,
        "normalize_before": True,
    },
    "decoder": {
        "layers": 2,
        "embed_dim": 16,
        "ffn_embed_dim": 24,
        "attention_heads": 2,
        "normalize_before": True,
    },
    "share_all_embeddings": True,
    "dropout": 0.0,
}
TINY_LANGUAGE_MODEL = {
    "_name": "normexp_transformer_lm",
    "decoder_layers": 2,
    "decoder_embed_dim": 16,
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_attention_heads": 2,
    "decoder_normalize_before": True,
    "share_decoder_input_output_embed": True,
    "dropout": 0.0,
}


def _binarize(folder: Path, *flags: str) -> Path:
    parser = options.get_preprocessing_parser()
    preprocess.main(parser.parse_args(["--destdir", str(folder / "bin"), "--workers", "1", *flags]))
    return folder / "bin"


@pytest.fixture(scope="session")
def translation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarized toy corpus: 120 sentences of 2 to 9 words and their reversals, de -> en."""
    folder, draw = tmp_path_factory.mktemp("translation"), random.Random(0)
    for split, size in {"train": 120, "valid": 11, "test": 13}.items():
        lines = [draw.choices(WORDS, k=draw.randint(2, 9)) for _ in range(size)]
        for language, step in {"de": 1, "en": -1}.items():
            text = "".join(" ".join(words[::step]) + "\n" for words in lines)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")
    prefixes = itertools.chain.from_iterable(
        (f"--{split}pref", str(folder / split)) for split in ("train", "valid", "test")
    )
    return _binarize(folder, "-s", "de", "-t", "en", "--joined-dictionary", *prefixes)


@pytest.fixture(scope="session")
def language_model_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarized toy text of some 1500 words."""
    folder, draw = tmp_path_factory.mktemp("language_model"), random.Random(1)
    for split, size in {"train": 240, "valid": 20, "test": 20}.items():
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(size)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prefixes = itertools.chain.from_iterable(
        (f"--{split}pref", str(folder / f"{split}.txt")) for split in ("train", "valid", "test")
    )
    return _binarize(folder, "--only-source", *prefixes)


@pytest.fixture
def command_line_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """Return fairseq's configuration from a command line, as fairseq-train parses it."""
    # fairseq's conversion needs Hydra's old behaviour, which a test of an app may have switched.
    monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))

    def convert(*argv: str) -> DictConfig:
        args = options.parse_args_and_arch(options.get_training_parser(), list(argv))
        return convert_namespace_to_omegaconf(args)

    return convert


@pytest.fixture
def structured_config() -> Callable[..., DictConfig]:
    """Return fairseq's configuration from Hydra's groups: values over fairseq's dataclasses."""

    def merge(**groups: Any) -> DictConfig:
        config = OmegaConf.merge(OmegaConf.structured(FairseqConfig), groups)
        add_defaults(config)
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))

    return merge


@pytest.fixture
def build_translation(
    structured_config: Callable[..., DictConfig], translation_data: Path
) -> Callable[..., torch.nn.Module]:
    """Build a tiny translation model (16 channels, 2+2 pre-norm layers) with other values."""

    def build(seed: int = 1, **values: Any) -> torch.nn.Module:
        task = {"_name": "translation", "data": str(translation_data)}
        model = OmegaConf.merge(TINY_TRANSLATION, values)
        config = structured_config(model=model, task=task)
        torch.manual_seed(seed)
        return models.build_model(config.model, tasks.setup_task(config.task))

    return build


@pytest.fixture
def tiny_language_model() -> dict[str, Any]:
    """Return the configuration of the tiny language model."""
    return dict(TINY_LANGUAGE_MODEL)


@pytest.fixture
def build_language_model(
    structured_config: Callable[..., DictConfig], language_model_data: Path
) -> Callable[..., torch.nn.Module]:
    """Build a tiny language model (16 channels, 2 pre-norm layers) with other values."""

    def build(seed: int = 1, **values: Any) -> torch.nn.Module:
        task = {"_name": "language_modeling", "data": str(language_model_data)}
        model = OmegaConf.merge(TINY_LANGUAGE_MODEL, values)
        config = structured_config(model=model, task=task)
        torch.manual_seed(seed)
        return models.build_model(config.model, tasks.setup_task(config.task))

    return build


@pytest.fixture(scope="session")
def sentences() -> argparse.Namespace:
    """Three sentence pairs as token ids: source (3, 7) padded on the left as fairseq does, shifted
    target and target (3, 6) padded on the right. 1 = padding, 2 = end of sentence.
    """
    source = [[7, 8, 9, 10, 11, 12, 2], [1, 1, 1, 13, 14, 15, 2], [1, 5, 6, 7, 8, 9, 2]]
    target = [[9, 8, 7, 2, 1, 1], [15, 14, 13, 12, 11, 2], [6, 5, 2, 1, 1, 1]]
    shifted = [[2, 9, 8, 7, 1, 1], [2, 15, 14, 13, 12, 11], [2, 6, 5, 1, 1, 1]]
    return argparse.Namespace(
        source=torch.tensor(source), target=torch.tensor(target), shifted=torch.tensor(shifted)
    )
