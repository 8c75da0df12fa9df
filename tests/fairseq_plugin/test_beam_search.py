"""The evaluation's own beam search finds fairseq's hypotheses and scores."""

import argparse
import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationTask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normexp.errors import UserError
from normexp.evaluation import beam_search
from normexp.evaluation.beam_search import BeamSearch
from normexp.fairseq_plugin import candidates, decoder_attention, step_decoder
from normexp.fairseq_plugin.candidates import best_candidates
from normexp.fairseq_plugin.fast_attention import use_fast_attention
from normexp.fairseq_plugin.folding import fold_norms
from normexp.norms import available_norms
from normexp.norms.kernels.choice import chosen_kernels, use_kernels
from normexp.norms.replace import padding_mask_for
from normexp.sites import SITES

PAD, EOS, UNK = 1, 2, 3
STACKS = ("encoder", "decoder")
POST_NORM = {stack: {"normalize_before": False} for stack in STACKS}
MODELS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": POST_NORM,
    "stock": {"_name": "transformer"},
    "stock, post-norm": {"_name": "transformer", **POST_NORM},
    "nothing shared": {"share_all_embeddings": False},
    "decoder's embeddings shared": {
        "share_all_embeddings": False,
        "share_decoder_input_output_embed": True,
    },
    "learned positions": {stack: {"learned_pos": True} for stack in STACKS},
    "no positions": {"no_token_positional_embeddings": True},
    "normalized embeddings": {"layernorm_embedding": True, **POST_NORM},
    "other widths": {
        "share_all_embeddings": False,
        "encoder": {"embed_dim": 20},
        "decoder": {"input_dim": 12, "output_dim": 10},
    },
    "gelu": {"activation_fn": "gelu"},
    "no final norm": {"no_decoder_final_norm": True},
}


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = chosen_kernels()
    use_kernels(request.param)
    yield request.param
    use_kernels(chosen)


def _scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights by which sentences end at different steps, and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "embed" in name or "output_projection" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
            elif name.endswith(("running_psi2", "running_var")):
                value.copy_(torch.rand(value.shape, generator=generator) * 3 + 0.3)
            elif value.is_floating_point() and value.dim() == 1 and "version" not in name:
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight[PAD] = 0
        if model.decoder.output_projection is not None:
            model.decoder.output_projection.weight[EOS] *= 3  # an end is likely now and then
    return model.eval()


def _sample(source: Tensor) -> dict[str, Any]:
    return {"net_input": {"src_tokens": source, "src_lengths": (source != PAD).sum(1)}}


def _by_fairseq(
    model: nn.Module, source: Tensor, beam: int, length_penalty: float
) -> list[list[dict[str, Tensor]]]:
    model = copy.deepcopy(model)  # fairseq's generator leaves traces on it
    dictionary = model.decoder.dictionary
    generator = SequenceGenerator([model], dictionary, beam_size=beam, len_penalty=length_penalty)
    return generator.generate([model], _sample(source))


@torch.inference_mode()
def _by_us(
    model: nn.Module, source: Tensor, beam: int, length_penalty: float
) -> list[list[beam_search.Hypothesis]]:
    search = BeamSearch(model, model.decoder.dictionary, beam, length_penalty)
    with padding_mask_for(model.decoder, padding_mask=None):
        return search(model.encoder.forward_torchscript(_sample(source)["net_input"]))


def _assert_same(
    model: nn.Module, source: Tensor, beam: int, length_penalty: float = 1.0
) -> list[int]:
    """Compare all hypotheses of both searches; returns the lengths of the best."""
    stock = _by_fairseq(model, source, beam, length_penalty)
    ours = _by_us(model, source, beam, length_penalty)
    assert len(stock) == len(ours) == len(source)
    for theirs, found in zip(stock, ours, strict=True):
        assert [one["tokens"].tolist() for one in theirs] == [h.tokens.tolist() for h in found]
        scores = torch.tensor([h.score for h in found])
        expected = torch.stack([one["score"] for one in theirs])
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
    return [len(found[0].tokens) for found in ours]


@pytest.mark.parametrize("beam", [1, 4, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(
    name: str,
    beam: int,
    kernels: str,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    model = _scattered(build_translation(max_target_positions=20, **MODELS[name]))
    lengths = _assert_same(model, sentences.source, beam)
    if name == "pre-norm" and beam > 1:
        assert min(lengths) < max(lengths)  # so that sentences do leave the batch


@pytest.mark.parametrize("name", available_norms())
@pytest.mark.parametrize("pre_norm", [True, False])
def test_every_norm_at_every_site(
    name: str,
    pre_norm: bool,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    sites = [
        site
        for site in SITES["translation"]
        if (pre_norm or not site.endswith("final"))
        and (name != "instance" or site.startswith("encoder"))
    ]
    model = build_translation(
        max_target_positions=15,
        norm_sites=json.dumps(dict.fromkeys(sites, name)),
        **({} if pre_norm else POST_NORM),
    )
    _assert_same(_scattered(model), sentences.source, 4)


def test_folded_norms_and_fast_attention(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    sites = json.dumps(dict.fromkeys(SITES["translation"], "power"))
    model = fold_norms(_scattered(build_translation(max_target_positions=15, norm_sites=sites)))
    _assert_same(model, sentences.source, 3)
    use_fast_attention(model)
    _assert_same(model, sentences.source, 3)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    norm=st.sampled_from(available_norms()),
    pre_norm=st.booleans(),
    tied=st.booleans(),
    beam=st.integers(1, 7),
    positions=st.integers(2, 60),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.5]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    native=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_searches(
    build_translation: Callable[..., nn.Module],
    norm: str,
    pre_norm: bool,
    tied: bool,
    beam: int,
    positions: int,
    length_penalty: float,
    lengths: list[int],
    native: bool,
    seed: int,
) -> None:
    """Sources have unknown words, and some have only the end of the sentence."""
    draw = random.Random(seed)
    longest = max(lengths)
    rows = [
        [PAD] * (longest - length) + [draw.randint(UNK, 23) for _ in range(length)] + [EOS]
        for length in lengths
    ]
    model = _scattered(
        build_translation(
            norm=norm,
            max_target_positions=positions,
            share_all_embeddings=tied,
            **({} if pre_norm else POST_NORM),
        ),
        seed,
    )
    chosen = chosen_kernels()
    use_kernels("native" if native else "plain")
    try:
        _assert_same(model, torch.tensor(rows), beam, length_penalty)
    finally:
        use_kernels(chosen)


def test_a_beam_as_wide_as_the_dictionary(
    kernels: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    """Then impossible continuations, padding too, are among the candidates."""
    model = _scattered(build_translation(max_target_positions=6))
    _assert_same(model, sentences.source, len(model.decoder.dictionary) + 3)


def test_equal_words_fall_as_they_do_in_fairseq(
    kernels: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(max_target_positions=9, share_all_embeddings=False)
    model = _scattered(model)
    with torch.no_grad():  # five words that are one to the model
        for weight in (model.decoder.output_projection.weight, model.decoder.embed_tokens.weight):
            weight[[6, 9, 12, 20]] = weight[15].clone()
    _assert_same(model, sentences.source, 4)


def test_a_model_that_is_not_finite_translates_nothing(
    kernels: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = _scattered(build_translation(max_target_positions=9))
    with torch.no_grad():
        model.decoder.layers[0].fc1.bias[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        _by_us(model, sentences.source, 4, 1.0)


def test_searching_leaves_the_model_as_it_was(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = _scattered(build_translation(norm="power"))
    before = copy.deepcopy(model.state_dict())
    _by_us(model, sentences.source, 4, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _OwnDecoderLayer(step_decoder.TransformerDecoderLayerBase):
    """Somebody's layer, which may compute anything."""


def _with_a_layer_of_ones_own(model: nn.Module) -> None:
    model.decoder.layers[1].__class__ = _OwnDecoderLayer


def _with_a_hook(model: nn.Module) -> None:
    model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)


def _with_dropout(model: nn.Module) -> None:
    model.decoder.dropout_module.make_generation_fast_("name", retain_dropout=True)


@pytest.mark.parametrize(
    ("values", "change", "reason"),
    [
        ({"adaptive_softmax_cutoff": [10], "share_all_embeddings": False}, None, "adaptive_soft"),
        ({"no_cross_attention": True}, None, "does not attend to the encoder's states"),
        ({"cross_self_attention": True}, None, "does not attend to the encoder's states"),
        ({}, _with_a_layer_of_ones_own, "_OwnDecoderLayer"),
        ({}, _with_a_hook, "not a plain linear layer"),
        ({}, _with_dropout, "dropout at inference"),
        ({}, nn.Module.train, "training mode"),
        ({"max_target_positions": 1}, None, "no room"),
    ],
)
def test_what_is_unknown_is_left_to_fairseq(
    values: dict[str, Any],
    change: Callable[[nn.Module], None] | None,
    reason: str,
    build_translation: Callable[..., nn.Module],
) -> None:
    model = build_translation(**values).eval()
    if change is not None:
        change(model)
    task = TranslationTask.__new__(TranslationTask)
    assert reason in beam_search.why_not(model, task)


def test_a_task_with_a_search_of_its_own_is_left_to_it(
    build_translation: Callable[..., nn.Module],
) -> None:
    class OwnTask(TranslationTask):
        def inference_step(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    model = build_translation().eval()
    assert beam_search.why_not(model, TranslationTask.__new__(TranslationTask)) is None
    assert "OwnTask" in beam_search.why_not(model, OwnTask.__new__(OwnTask))


@settings(max_examples=60, deadline=None)
@given(
    sentences=st.integers(1, 5),
    beam=st.integers(1, 6),
    size=st.sampled_from([12, 63, 64, 65, 200]),
    number=st.integers(1, 11),
    kind=st.sampled_from(["spread", "equal", "nan", "infinite"]),
    seed=st.integers(0, 999),
)
def test_candidates_are_the_best_in_the_order_of_topk(
    sentences: int, beam: int, size: int, number: int, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sentences, beam, size, generator=generator) * 4
    totals = -10 * torch.rand(sentences, beam, generator=generator)
    if kind == "equal":
        logits, totals = logits.round(), totals.zero_()
        logits[:, 1:] = logits[:, :1]
    elif kind == "nan":
        logits[0, 0, size // 2] = math.nan
    elif kind == "infinite":
        logits[:, :, 5 : size - 2] = -math.inf
        totals[:, 0] = -math.inf
    log_probs = logits.log_softmax(-1)
    log_probs[log_probs != log_probs] = -math.inf
    log_probs[:, :, [PAD, EOS]] = -math.inf
    summed = (log_probs + totals[:, :, None]).flatten(1)
    expected, index = summed.topk(number)
    assert native_is_available()
    found = best_candidates(logits, totals, number, PAD, without=EOS)
    torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=2e-5)
    if kind == "spread":
        exact = logits.double().log_softmax(-1)
        exact[:, :, [PAD, EOS]] = -math.inf
        index = (exact + totals[:, :, None]).flatten(1).argsort(1, descending=True)[:, :number]
    assert torch.equal(found.beams * size + found.words, index)


def native_is_available() -> bool:
    return all(candidates.native.load(module._SOURCE) for module in (candidates, decoder_attention))


@pytest.mark.parametrize(("heads", "size"), [(1, 5), (4, 8), (2, 16), (3, 40)])
def test_attention_is_that_of_the_formula(heads: int, size: int, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 2

    def attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One query (C) over keys and values (T, C)."""
        q, k, v = (x.double().unflatten(-1, (heads, size)) for x in (query, keys, values))
        weights = (torch.einsum("hd,thd->ht", q, k) / math.sqrt(size)).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, v).flatten()

    batch, beam, room, position, channels = 3, 4, 32, 18, heads * size
    keys, values = draw(batch, room, beam, channels), draw(batch, room, beam, channels)
    keys[:, position:], values[:, position:] = math.nan, math.nan  # not computed yet
    qkv = draw(1, batch * beam, 3 * channels)
    ancestors = torch.randint(0, beam, (batch, beam, room), generator=generator)
    ancestors[:, :, position] = torch.arange(beam)
    found = decoder_attention.attend_to_past(qkv, keys, values, ancestors, position, heads)
    query, key, value = qkv.view(batch, beam, 3, channels).unbind(2)
    assert torch.equal(keys[:, position], key) and torch.equal(values[:, position], value)
    assert keys[:, position + 1 :].isnan().all()
    time = torch.arange(position + 1)
    for b in range(batch):
        for k in range(beam):
            own = time, ancestors[b, k, : position + 1]
            expected = attended(query[b, k], keys[b][own], values[b][own]).float()
            torch.testing.assert_close(found[0, b * beam + k], expected, rtol=1e-5, atol=1e-5)

    source_keys, source_values = draw(batch, 21, channels), draw(batch, 21, channels)
    padding = torch.arange(21) < torch.tensor([0, 20, 7])[:, None]
    for mask in (padding, None):
        found = decoder_attention.attend_to_source(
            query.flatten(0, 1)[None].contiguous(), source_keys, source_values, mask, heads
        )
        for b in range(batch):
            seen = slice(None) if mask is None else ~mask[b]
            for k in range(beam):
                expected = attended(query[b, k], source_keys[b, seen], source_values[b, seen])
                torch.testing.assert_close(
                    found[0, b * beam + k], expected.float(), rtol=1e-5, atol=1e-5
                )
