"""Text of random words, and fairseq's configurations of experiments, with no corpus to prepare."""

from typing import Any

import torch
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

import normexp.fairseq_plugin  # noqa: F401 (registers models, criterions and the optimizer)
from normexp.config.fairseq_config import typed_config, with_defaults
from normexp.config.settings import RunSettings, parse
from normexp.paths import CONFIGS

_PLUGIN = "normexp_"


def settings_of(*overrides: str) -> RunSettings:
    """The settings of scripts/train.py with these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("train", list(overrides)))


def fairseq_config(settings: RunSettings, stock: bool, cpu: bool) -> DictConfig:
    """fairseq's configuration of a run; stock: of fairseq's own model and loss, for LN."""
    typed = typed_config(settings)
    with open_dict(typed):
        typed.common.cpu = cpu
        if stock:
            for key in ("norm", "norm_options", "norm_sites"):
                del typed.model[key]
            for part in (typed.model, typed.criterion):
                part._name = part._name.removeprefix(_PLUGIN)
    return with_defaults(typed)


def dictionary(size: int) -> Dictionary:
    """A dictionary of so many types, fairseq's special ones among them."""
    words = Dictionary()
    for word in range(size - len(words)):
        words.add_symbol(str(word))
    return words


def translation_task(cfg: DictConfig, words: Dictionary) -> FairseqTask:
    """fairseq's translation with one dictionary for both languages."""
    return TranslationTask(cfg.task, words, words)


def language_modeling_task(cfg: DictConfig, words: Dictionary) -> FairseqTask:
    """fairseq's language modeling."""
    return LanguageModelingTask(cfg.task, words)


def sentence_pairs(words: Dictionary, sentences: int, longest: int) -> LanguagePairDataset:
    """Pairs of three quarters of `longest` to `longest` tokens a side, the ends included."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(0.75 * longest, longest, sentences).round().long().tolist()

    def side() -> list[torch.Tensor]:
        return [
            torch.cat([_words(words, (length - 1,), generator), torch.tensor([words.eos()])])
            for length in lengths
        ]

    return LanguagePairDataset(side(), lengths, words, side(), lengths, words)


def translation_batch(words: Dictionary, sentences: int, longest: int) -> dict[str, Any]:
    """`sentence_pairs` as one batch of fairseq's."""
    pairs = sentence_pairs(words, sentences, longest)
    return pairs.collater([pairs[index] for index in range(len(pairs))])


def language_batch(words: Dictionary, segments: int, length: int) -> dict[str, Any]:
    """A batch of fairseq's, of full segments of text."""
    text = _words(words, (segments, length + 1), torch.Generator().manual_seed(1))
    return {
        "id": torch.arange(segments),
        "nsentences": segments,
        "ntokens": segments * length,
        "net_input": {
            "src_tokens": text[:, :-1].contiguous(),
            "src_lengths": torch.full((segments,), length),
        },
        "target": text[:, 1:].contiguous(),
    }


def _words(words: Dictionary, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(words.nspecial, len(words), shape, generator=generator)
