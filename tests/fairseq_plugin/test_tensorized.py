"""The Tensorized Transformer against recorded outputs of the public code, and its causal form."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import models, tasks
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from omegaconf import DictConfig
from torch import Tensor, nn

from normexp.fairseq_plugin.criterions import PenalizedAdaptiveLoss
from normexp.fairseq_plugin.tensorized import TensorizedDecoder
from normexp.fairseq_plugin.tensorized_attention import TensorizedAttention
from normexp.norms import available_norms

GOLDEN = sorted((Path(__file__).parent / "golden").glob("tensorized_lm_*.npz"))
TINY = {
    "_name": "normexp_tensorized_lm",
    "decoder_layers": 2,
    "decoder_embed_dim": 16,
    "decoder_head_dim": 6,
    "decoder_ffn_embed_dim": 24,
    "dropout": 0.0,
}


def _golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    file = np.load(path, allow_pickle=False)
    arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
    params = {name: value for name, value in arrays.items() if name.startswith("param.")}
    return json.loads(str(file["config"])), params, arrays


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_attention_equals_the_recorded_outputs(path: Path) -> None:
    config, params, recorded = _golden(path)
    decoder = TensorizedDecoder.from_published(params, **config)
    with torch.no_grad():
        hidden = decoder.features(recorded["tokens"])
        nll = decoder.nll(recorded["tokens"], recorded["targets"])
    torch.testing.assert_close(hidden, recorded["hidden"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(nll, recorded["nll"], rtol=1e-9, atol=1e-9)
    # the way fairseq's criterion goes
    logits, _ = decoder(recorded["tokens"].t())
    log_probs = decoder.get_normalized_probs((logits, None), log_probs=True)
    by_criterion = -log_probs.gather(2, recorded["targets"].t().unsqueeze(2))[..., 0].t()
    # fairseq takes its softmax in float32
    torch.testing.assert_close(by_criterion.double(), recorded["nll"], rtol=0, atol=1e-5)


def test_unfit_published_parameters_are_refused() -> None:
    config, params, _ = _golden(GOLDEN[0])
    with pytest.raises(ValueError, match="do not fit the configuration"):
        TensorizedDecoder.from_published(params, **{**config, "d_inner": 25})
    with pytest.raises(ValueError, match="one head"):
        TensorizedDecoder.from_published(params, **{**config, "heads": 2})


def _by_definition(
    attention: TensorizedAttention, x: Tensor, r: Tensor, u: Tensor, t: Tensor
) -> Tensor:
    """Compute M as the publication writes it, core by core, with the mask applied last."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    p = attention.positions(r)
    per_core = [
        torch.einsum("h,ibh,jbh,mbh->bijm", a, q + u, k, v)
        + torch.einsum("h,ibh,jh,mbh->bijm", a, q + t, p, v)
        for a in attention.cores
    ]
    m = torch.stack(per_core).mean(0)
    if attention.causal:
        for i in range(len(x)):
            m[:, i, i + 1 :, :] = 0
            m[:, i, :, i + 1 :] = 0
    return attention.out(m.flatten(2)).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "cores"), [(9, 1), (4, 2), (1, 3)])
def test_attention_and_its_gradient_are_those_of_the_definition(
    causal: bool, length: int, cores: int
) -> None:
    torch.manual_seed(length)
    attention = TensorizedAttention(10, 5, length, cores, causal).double()
    nn.init.normal_(attention.cores)
    x = torch.randn(length, 3, 10, dtype=torch.float64, requires_grad=True)
    r = torch.randn(length, 10, dtype=torch.float64)
    u, t = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, u, t, *attention.parameters()]
    results = []
    for y in (attention(x, r, u, t), _by_definition(attention, x, r, u, t)):
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.fixture
def build_tensorized(
    structured_config: Callable[..., DictConfig], language_model_data: Path
) -> Callable[..., nn.Module]:
    """Build a tiny model (2 layers, 16 channels, segments of 12) with other values."""

    def build(**values: Any) -> nn.Module:
        task = {
            "_name": "language_modeling",
            "data": str(language_model_data),
            "tokens_per_sample": 12,
        }
        config = structured_config(model={**TINY, **values}, task=task)
        torch.manual_seed(1)
        return models.build_model(config.model, tasks.setup_task(config.task))

    return build


def _tokens(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(4, 24, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", [n for n in available_norms() if n != "instance"])
def test_causal_model_sees_no_future_token(
    norm: str, build_tensorized: Callable[..., nn.Module]
) -> None:
    model = build_tensorized(norm=norm, attention="causal")
    model(_tokens((3, 12)))[0].sum().backward()
    model.eval()
    tokens = _tokens((3, 12), seed=1)
    with torch.no_grad():
        before = model(tokens)[0]
        for cut in range(11):
            changed = tokens.clone()
            changed[:, cut + 1 :] = 4 + (tokens[:, cut + 1 :] - 4 + 1) % 20
            after = model(changed)[0]
            assert torch.equal(before[:, : cut + 1], after[:, : cut + 1])
            assert (before[:, cut + 1 :] != after[:, cut + 1 :]).any()
    assert not model.sees_future


def test_published_model_sees_future_tokens(build_tensorized: Callable[..., nn.Module]) -> None:
    model = build_tensorized(attention="published").eval()
    for attention in (layer.self_attn for layer in model.decoder.layers):
        nn.init.normal_(attention.out.weight)  # not the tiny start
        nn.init.normal_(attention.cores)
    tokens = _tokens((3, 12))
    changed = tokens.clone()
    changed[:, 8:] = 4 + (tokens[:, 8:] - 4 + 1) % 20
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert (before[:, :8] != after[:, :8]).any(-1).all()
    assert model.sees_future


@pytest.mark.parametrize("attention", ["published", "causal"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_padding_changes_nothing(
    attention: str, normalize_before: bool, build_tensorized: Callable[..., nn.Module]
) -> None:
    """A short last block beside a whole one, as fairseq batches them."""
    model = build_tensorized(
        norm="power", attention=attention, decoder_normalize_before=normalize_before
    ).double()
    tokens = _tokens((2, 12))
    tokens[1, 7:] = 1
    short = model(tokens[1:, :7])[0]
    torch.testing.assert_close(model.eval()(tokens)[0][1, :7], model(tokens[1:, :7])[0][0])
    garbage = model.decoder.embed_tokens.weight
    with torch.no_grad():
        garbage[1] = 100.0
    model.train()
    fresh = build_tensorized(
        norm="power", attention=attention, decoder_normalize_before=normalize_before
    ).double()
    torch.testing.assert_close(fresh(tokens[1:, :7])[0], short)


def test_too_long_a_segment_is_refused(build_tensorized: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="tokens_per_sample"):
        build_tensorized()(_tokens((1, 13)))


def test_final_norm_is_refused(build_tensorized: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="no final norm"):
        build_tensorized(no_decoder_final_norm=False)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_adaptive_softmax_is_tied_and_gives_the_loss_of_its_distribution(
    normalize_before: bool, build_tensorized: Callable[..., nn.Module]
) -> None:
    """The setting of WikiText-103: the criterion's loss against the written-out distribution."""
    model = build_tensorized(
        adaptive_softmax_cutoff="8,16",
        adaptive_softmax_factor=2,
        decoder_normalize_before=normalize_before,
    )
    decoder = model.decoder
    own = decoder.embed_tokens.embeddings[0][0].weight
    assert decoder.adaptive_softmax.head.word_proj.weight is own
    task = SimpleNamespace(target_dictionary=decoder.dictionary)
    criterion = PenalizedAdaptiveLoss(task, sentence_avg=False)
    tokens, targets = _tokens((3, 12)), _tokens((3, 12), seed=1)
    targets[2, 9:] = decoder.padding_idx
    sample = {
        "net_input": {"src_tokens": tokens},
        "target": targets,
        "ntokens": 33,
        "nsentences": 3,
    }
    loss, sample_size, _ = criterion(model, sample)
    log_probs = model.get_normalized_probs(model(tokens), log_probs=True)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 12))
    chosen = log_probs.gather(2, targets.unsqueeze(2))[..., 0]
    expected = -chosen[targets != decoder.padding_idx].sum()
    assert sample_size == 33
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stock_adaptive_loss_leaves_out_a_word_of_each_band(
    build_tensorized: Callable[..., nn.Module],
) -> None:
    """The reason for normexp_adaptive_loss: fairseq treats a band's second word as padding."""
    model = build_tensorized(adaptive_softmax_cutoff="8,16", adaptive_softmax_factor=2)
    task = SimpleNamespace(target_dictionary=model.decoder.dictionary)
    losses = {}
    for word in range(4, 24):
        sample = {
            "net_input": {"src_tokens": _tokens((1, 12))},
            "target": torch.full((1, 12), word),
            "ntokens": 12,
        }
        ours, stock = (
            float(criterion(task, sentence_avg=False)(model, sample)[0])
            for criterion in (PenalizedAdaptiveLoss, AdaptiveLoss)
        )
        losses[word] = stock == pytest.approx(ours, rel=1e-6)
    assert [word for word, equal in losses.items() if not equal] == [9, 17]


@pytest.mark.parametrize("attention", ["published", "causal"])
def test_it_learns(attention: str, build_tensorized: Callable[..., nn.Module]) -> None:
    """Causal attention learns to copy the previous token, published attention the target itself."""
    torch.manual_seed(0)
    model = build_tensorized(attention=attention, decoder_head_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        stream = _tokens((16, 13), seed=step)
        stream[:, 1::2] = stream[:, 0:-1:2]
        logits, _ = model(stream[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), stream[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
