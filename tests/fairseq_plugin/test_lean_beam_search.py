"""The evaluation's beam search finds fairseq's hypotheses and does not change the model."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import nn

from normexp.evaluation.fairseq_search import LeanEnsemble, beams_share_encoder_states


def _sample(sentences: argparse.Namespace) -> dict[str, Any]:
    lengths = (sentences.source != 1).sum(1)
    return {"net_input": {"src_tokens": sentences.source, "src_lengths": lengths}}


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hypotheses_are_fairseqs(
    beam: int,
    seed: int,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    torch.manual_seed(seed)
    model = build_translation(norm="power").eval()
    nn.init.normal_(model.encoder.embed_tokens.weight)  # so that sentences end at different steps
    settings = {"beam_size": beam, "max_len": 12}
    dictionary, sample = model.decoder.dictionary, _sample(sentences)
    stock = SequenceGenerator([model], dictionary, **settings).generate([model], sample)
    generator = SequenceGenerator(LeanEnsemble([model]), dictionary, **settings)
    with beams_share_encoder_states(model, generator.beam_size):
        ours = generator.generate([model], sample)
    for theirs, found in zip(stock, ours, strict=True):
        assert len(theirs) == len(found) == beam
        for one, other in zip(theirs, found, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])
            torch.testing.assert_close(one["score"], other["score"], rtol=1e-5, atol=1e-5)


def test_scoring_after_a_search_is_as_before(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="power").eval()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(sentences.source, None, sentences.shifted)[0]

    before = logits()
    with pytest.raises(RuntimeError), beams_share_encoder_states(model, 3):
        raise RuntimeError("interrupted")
    assert torch.equal(logits(), before)


def test_encoder_states_are_rearranged_only_when_a_sentence_leaves(
    build_translation: Callable[..., nn.Module],
) -> None:
    model = build_translation(norm="layer").eval()
    with torch.no_grad():
        outputs = [model.encoder(torch.tensor([[5, 6, 2], [7, 8, 2]]))]
    ensemble = LeanEnsemble([model])
    beams = ensemble.reorder_encoder_out(outputs, torch.tensor([0, 0, 1, 1]))
    assert beams[0]["encoder_out"][0].shape[1] == 4
    assert ensemble.reorder_encoder_out(beams, torch.tensor([1, 0, 3, 3])) is beams
    (left,) = ensemble.reorder_encoder_out(beams, torch.tensor([3, 2]))
    expected = outputs[0]["encoder_out"][0][:, [1, 1]]
    assert torch.equal(left["encoder_out"][0], expected)
