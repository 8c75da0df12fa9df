"""Perplexity depends on the text and on the context allowed, and on nothing else."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import models, tasks
from fairseq.data import FairseqDataset
from hypothesis import given
from hypothesis import strategies as st
from support.small_runs import SMALL, composed

from normexp import pipeline
from normexp.config.fairseq_config import trainer_config
from normexp.config.validation import validate
from normexp.corpora import prepare
from normexp.errors import UserError
from normexp.evaluation import sliding_window
from normexp.evaluation.scores import LoadedModel, score, score_stream

NORMS = ["layer", "group", "batch", "power", "power_released", "unified"]
LENGTH = 80
MODELS = {
    "transformer": ["model=lm_tiny"],
    "causal": [
        "model=tensorized_ptb_cpu",
        "fairseq.model.decoder_head_dim=6",
        "fairseq.model.attention=causal",
    ],
}
MODELS["published"] = [*MODELS["causal"], "fairseq.model.attention=published"]


@given(length=st.integers(0, 60), context_window=st.integers(0, 20), stride=st.integers(1, 20))
def test_windows_predict_every_position_once(length: int, context_window: int, stride: int) -> None:
    position = 0
    for window in sliding_window.split_into_windows(length, context_window, stride):
        assert window.start == max(0, position - context_window)
        assert position < window.stop <= min(position + stride, length)
        assert len(window) <= context_window + stride
        position = window.stop
    assert position == length


@pytest.fixture(scope="module")
def load(little_text: Path) -> Callable[..., LoadedModel]:
    """Build a small model with statistics of a few batches, in float64; blocks of LENGTH tokens.

    Every call has a task and a configuration of its own, and shares the model with the others.
    """
    corpus = prepare("toy_language_model", little_text)

    @cache
    def build(model: str, norm: str, *more: str) -> tuple[torch.nn.Module, Any]:
        settings = composed(
            "task=toy_language_model",
            *[o for o in SMALL["toy_language_model"] if "decoder_ffn" not in o],
            *MODELS[model],
            f"norm={norm}",
            f"fairseq.task.tokens_per_sample={LENGTH}",
            "fairseq.model.decoder_ffn_embed_dim=16",
            *more,
        )
        typed = validate(settings).fairseq
        fairseq_cfg = trainer_config(typed, corpus.data_bin, None, Path("unused"))
        torch.manual_seed(1)
        built = models.build_model(fairseq_cfg.model, tasks.setup_task(fairseq_cfg.task)).double()
        for parameter in built.parameters():  # far from a start at which context hardly matters
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            built(torch.randint(4, 20, (4, LENGTH), generator=generator))[0].sum().backward()
        return built.eval(), fairseq_cfg

    def load(model: str, norm: str, *more: str) -> LoadedModel:
        built, shared_cfg = build(model, norm, *more)
        fairseq_cfg = copy.deepcopy(shared_cfg)
        task = tasks.setup_task(fairseq_cfg.task)
        return LoadedModel(built, task, fairseq_cfg, torch.device("cpu"))

    return load


def _repacked(loaded: LoadedModel, **changes: object) -> LoadedModel:
    """The same model on the same text, cut into other blocks."""
    task_cfg = loaded.cfg.task.copy()
    for key, value in changes.items():
        task_cfg[key] = value
    task = tasks.setup_task(task_cfg)
    task.load_dataset("valid")
    task.args.tokens_per_sample = LENGTH  # what the model takes; whole sentences may need more
    return replace(loaded, task=task)


class _First(FairseqDataset):
    """The first blocks of a dataset."""

    def __init__(self, whole: FairseqDataset, number: int):
        self.whole, self.sizes = whole, whole.sizes[:number]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.whole[index]


def _keep_blocks(loaded: LoadedModel, number: int) -> list[int]:
    """Cut the validation text down to its first blocks; its tokens."""
    loaded.task.load_dataset("valid")
    kept = loaded.task.datasets["valid"] = _First(loaded.task.dataset("valid"), number)
    return torch.cat([kept[index]["target"] for index in range(number)]).tolist()


def _by_definition(loaded: LoadedModel, text: list[int], context_window: int, stride: int) -> float:
    """Nats, one token and one window at a time."""
    eos = loaded.task.source_dictionary.eos()
    inputs, nats = [eos, *text[:-1]], 0.0
    with torch.inference_mode():
        for position, token in enumerate(text):
            start = max(0, position // stride * stride - context_window)
            window = torch.tensor([inputs[start : position + 1]])
            logits = loaded.model(window)[0]
            nats -= float(logits[0, -1].log_softmax(-1)[token])
    return nats


@pytest.mark.parametrize("norm", ["layer", "batch", "power", "unified"])
@pytest.mark.parametrize("model", ["transformer", "causal"])
@pytest.mark.parametrize(("context_window", "stride"), [(9, 5), (0, 80), (20, 1), (3, 7)])
def test_streamed_score_is_that_of_its_definition(
    model: str, norm: str, context_window: int, stride: int, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(model, norm)
    text = _keep_blocks(loaded, 4)
    nats, tokens = score_stream(loaded, "valid", context_window, stride, 100, progress=False)
    assert tokens == len(text) == 4 * LENGTH
    # fairseq's softmax is taken in float32
    expected = _by_definition(loaded, text, context_window, stride)
    assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", ["transformer", "causal"])
def test_streamed_score_depends_on_neither_batches_nor_blocks(
    model: str, norm: str, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(model, norm)
    nats, tokens = score_stream(loaded, "valid", 8, 16, 1000, progress=False)
    assert nats / tokens > 0.1
    for changed, max_tokens in (
        (loaded, 1),
        (loaded, 130),
        (_repacked(loaded, sample_break_mode="complete", tokens_per_sample=9), 500),
        (_repacked(loaded, tokens_per_sample=7), 1000),
    ):
        found = score_stream(changed, "valid", 8, 16, max_tokens, progress=False)
        assert found == (pytest.approx(nats, rel=1e-6), tokens)


@pytest.mark.parametrize("mode", ["none", "complete"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", list(MODELS))
def test_score_depends_on_the_blocks_alone_and_not_on_their_batches(
    model: str, norm: str, mode: str, load: Callable[..., LoadedModel]
) -> None:
    """With whole sentences in each block, a batch holds several lengths and padding."""
    loaded = _repacked(load(model, norm), sample_break_mode=mode, tokens_per_sample=9)
    nats, tokens = score(loaded, "valid", 4000, progress=False)
    assert score(loaded, "valid", LENGTH + 3, progress=False) == (
        pytest.approx(nats, rel=1e-6),
        tokens,
    )


def test_enough_context_makes_the_stride_immaterial(load: Callable[..., LoadedModel]) -> None:
    """With all of the text in the window the score is that of one pass over it."""
    loaded = load("transformer", "power")
    _keep_blocks(loaded, 1)
    loaded.cfg.task.tokens_per_sample = 2 * LENGTH
    scores = [
        score_stream(loaded, "valid", LENGTH, stride, 64, progress=False)
        for stride in (1, 5, LENGTH)
    ]
    for found in scores:
        assert found == (pytest.approx(scores[0][0], rel=1e-6), LENGTH)


def test_context_helps_a_trained_model_and_is_recorded(
    overrides: Callable[..., list[str]], little_text: Path
) -> None:
    window = f"data.dir={little_text}", "evaluation.context_window=20"
    small = overrides("toy_language_model", *window, "norm=power")
    record = pipeline.run(composed(*small))
    test = record.metrics["test"]
    assert test["streamed_perplexity_per_token"] == pytest.approx(
        math.exp(test["streamed_loss_per_token_nats"])
    )
    assert test["streamed_perplexity_per_word"] != test["perplexity_per_word"]
    assert record.config["evaluation"]["context_window"] == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.context_window=80"], "their sum at most 80"),
        (["evaluation.context_window=-1"], "must not be negative"),
        (["evaluation.context_window=9", "evaluation.stride=72"], "their sum at most 80"),
        (["evaluation.context_window=9", "evaluation.stride=0"], "at least 1"),
        (["evaluation.context_window=0.5"], "must be an integer"),
        (["evaluation.context_window=null"], "must be an integer"),
    ],
)
def test_impossible_windows_are_refused_before_training(
    settings: list[str], message: str, load: Callable[..., LoadedModel]
) -> None:
    with pytest.raises(UserError, match=message):
        load("transformer", "layer", *settings)


def test_windows_are_for_language_models(overrides: Callable[..., list[str]]) -> None:
    settings = composed(*overrides("toy_translation", "evaluation.context_window=3"))
    with pytest.raises(UserError, match="are for language models"):
        validate(settings)
