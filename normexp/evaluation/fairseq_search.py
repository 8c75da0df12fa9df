"""fairseq's own beam search, for models that beam_search.py does not know, with less work."""

import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fairseq.dataclass.configs import GenerationConfig
from fairseq.sequence_generator import EnsembleModel
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def searched(
    model: nn.Module, task: Any, batches: Iterable[Any], beam: int, length_penalty: float
) -> Iterator[tuple[Any, list[Tensor]]]:
    """Yield each batch with the best hypothesis of each of its sentences, as int32 on the CPU."""
    generator = task.build_generator(
        LeanEnsemble([model]), GenerationConfig(beam=beam, lenpen=length_penalty)
    )
    with beams_share_encoder_states(model, generator.beam_size):
        for sample in batches:
            found = task.inference_step(generator, [model], sample)
            yield sample, [beams[0]["tokens"].int().cpu() for beams in found]


@functools.cache
def notice_once(reason: str) -> None:
    """Say why this search is used, once per reason and process."""
    logger.warning("fairseq's beam search instead of the faster one, same result: %s", reason)


class LeanEnsemble(EnsembleModel):
    """Replaces the models in fairseq's SequenceGenerator; its hypotheses have no alignment.

    fairseq records the attention of every step, and rearranges encoder outputs with the beams,
    although the beams of a sentence share theirs.
    """

    def forward_decoder(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the log-probabilities as fairseq does, without the attention."""
        return super().forward_decoder(*args, **kwargs)[0], None

    def reorder_encoder_out(
        self, encoder_outs: list[dict[str, list[Tensor]]], new_order: Tensor
    ) -> list[dict[str, list[Tensor]]]:
        """Reorder as fairseq does, but only where sentences have left the batch or become beams."""
        if encoder_outs[0]["encoder_padding_mask"][0].size(0) == new_order.numel():
            return encoder_outs
        return super().reorder_encoder_out(encoder_outs, new_order)


@contextmanager
def beams_share_encoder_states(model: nn.Module, beam: int) -> Iterator[None]:
    """Within this context the decoder attends to one copy of each sentence's encoder states.

    Use it for beam search only, with `beam` rows per sentence; scores would be wrong.
    """
    attentions = [m for m in model.modules() if getattr(m, "encoder_decoder_attention", False)]
    try:
        for attention in attentions:
            attention.set_beam_size(beam)
        yield
    finally:
        for attention in attentions:
            attention.set_beam_size(1)
