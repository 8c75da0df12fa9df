"""Beam search with fairseq's hypotheses and scores, by a decoder of single steps."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from normexp.errors import UserError
from normexp.evaluation.side_by_side import Work, side_by_side
from normexp.fairseq_plugin import step_decoder
from normexp.fairseq_plugin.candidates import Candidates, best_candidates
from normexp.fairseq_plugin.step_decoder import Past, StepDecoder
from normexp.norms.replace import padding_mask_for

_SENTENCES_AT_ONCE = 32  # so that a batch's keys and values fit into a processor's caches
_MOST_THREADS = 8  # what lies between operators holds Python's lock
_SHRINK_BY = 8  # sentences; every number of rows has a matrix product of its own to be compiled


def why_not(model: nn.Module, task: Any) -> str | None:
    """The reason why a model cannot be searched here as its task does, None if it can."""
    for method in ("build_generator", "inference_step"):
        if getattr(type(task), method) is not getattr(FairseqTask, method):
            return f"{type(task).__name__} searches in a way of its own"
    if model.max_decoder_positions() < 2:
        return "there is no room for a word and the end of the sentence"
    return step_decoder.why_not(model)


def division(device: torch.device) -> tuple[int | None, int]:
    """How many sentences a batch should have at most (None: any), and how many threads search."""
    if device.type != "cpu":
        return None, 1
    return _SENTENCES_AT_ONCE, min(torch.get_num_threads(), _MOST_THREADS)


def searched(
    model: nn.Module,
    dictionary: Any,
    batches: Iterator[Any],
    beam: int,
    length_penalty: float,
    num_threads: int,
) -> Iterator[tuple[Any, list[Tensor]]]:
    """Yield each batch with the best hypothesis of each of its sentences, as int32 on the CPU.

    num_threads: batches that are searched at once; with more than 1 they come in any order.
    """
    search = BeamSearch(model, dictionary, beam, length_penalty)

    def with_own_encoder() -> Work[Any, list[Tensor]]:
        # While it runs, the norms of an encoder know the padding of one batch.
        encoder = _sharing_tensors(model.encoder)

        def best(sample: Any, check: Callable[[], None]) -> list[Tensor]:
            states = encoder.forward_torchscript(sample["net_input"])
            return [found[0].tokens for found in search(states, check)]

        return best

    with padding_mask_for(model.decoder, padding_mask=None):
        yield from side_by_side(with_own_encoder, batches, num_threads)


def _sharing_tensors(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters, buffers and dictionary."""
    shared = [*module.parameters(), *module.buffers(), module.dictionary]
    return copy.deepcopy(module, {id(one): one for one in shared})


class Hypothesis(NamedTuple):
    """tokens: (T,) with the end of sentence. score: log-probability by length ** penalty."""

    tokens: Tensor
    score: float


class BeamSearch:
    """fairseq's beam search with the settings of its command-line tools.

    Hypotheses have at least one token and at most 200 (or one less than the positions of the
    model), each without the end of sentence. A sentence is finished when as many hypotheses have
    ended as there are beams; among candidates of a step, only the first `beam` can end one.
    """

    def __init__(self, model: nn.Module, dictionary: Any, beam: int, length_penalty: float):
        """Raises ValueError where the model's decoder cannot be a StepDecoder."""
        self._decoder = StepDecoder(model)
        self._pad, self._eos, self._size = dictionary.pad(), dictionary.eos(), len(dictionary)
        self._beam = min(beam, self._size - 1)  # padding is no candidate
        self._length_penalty = length_penalty
        self._max_len = min(200, model.max_decoder_positions() - 1)
        self._positions = self._decoder.positions(self._max_len + 1)

    def __call__(
        self, encoder_out: dict[str, Any], check: Callable[[], None] = lambda: None
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first, from what the encoder returns.

        check: called at each step, for its exceptions. Raises UserError where the model gives no
        finite probabilities.
        """
        past = self._decoder.start(encoder_out, self._beam)
        states = past.source_keys[0]
        sentences, device = states.size(0), states.device
        ended = _Ended(sentences, self._beam, self._max_len + 1, device)
        original = torch.arange(sentences, device=device)  # of the sentences that are left
        tokens = torch.full((sentences, self._beam, self._max_len + 2), self._pad, device=device)
        tokens[:, :, 0] = self._eos
        totals = torch.zeros(sentences, self._beam, device=device)
        for step in range(self._max_len + 1):
            check()
            # All beams begin alike.
            rows = 1 if step == 0 else self._beam
            values, parents, words = self._candidates(
                past, tokens[:, :rows], totals[:, :rows].contiguous(), step
            )
            ends = (words == self._eos) & (values > -math.inf)
            now = ends[:, : self._beam] & (ended.count[original] < self._beam)[:, None]
            if bool(now.any()):
                scores = values[:, : self._beam] / (step + 1) ** self._length_penalty
                begun = _follow(tokens[:, :, 1 : step + 1], parents[:, : self._beam])
                ended.add(original, now, scores, begun, self._eos)
                left = (ended.count[original] < self._beam).nonzero().squeeze(1)
                if left.numel() == 0 or step == self._max_len:
                    break
            else:
                left = original
            # The first candidates that have not ended; a stable sort keeps their order.
            going_on = ends.byte().argsort(dim=1, stable=True)[:, : self._beam]
            parents, words, totals = (
                of_all.gather(1, going_on) for of_all in (parents, words, values)
            )
            tokens[:, :, : step + 1] = _follow(tokens[:, :, : step + 1], parents)
            tokens[:, :, step + 1] = words
            past.follow(parents)
            number = _SHRINK_BY * math.ceil(left.numel() / _SHRINK_BY)
            if number < original.numel():
                # Beside those that are left, finished ones fill the last rows.
                done = ended.count[original] >= self._beam
                kept = done.byte().argsort(stable=True)[:number]
                past.keep(kept)
                original, tokens, totals = original[kept], tokens[kept], totals[kept]
        return ended.hypotheses()

    def _candidates(self, past: Past, tokens: Tensor, totals: Tensor, step: int) -> Candidates:
        """Return twice as many candidates as there are beams, because half may be ends."""
        position = None if self._positions is None else self._positions[step]
        logits = self._decoder.logits(tokens[:, :, step], position, past)
        return best_candidates(
            logits,
            totals,
            min(2 * self._beam, logits[0].numel() - 1),
            self._pad,
            without=self._eos if step == 0 else None,
            only=self._eos if step == self._max_len else None,
        )


class _Ended:
    """The hypotheses that have ended, in the order in which they did."""

    def __init__(self, sentences: int, beam: int, most_tokens: int, device: torch.device):
        self.count = torch.zeros(sentences, dtype=torch.long, device=device)
        self._scores = torch.full((sentences, beam), -math.inf, device=device)
        self._lengths = torch.zeros(sentences, beam, dtype=torch.long, device=device)
        self._tokens = torch.zeros(sentences, beam, most_tokens, dtype=torch.long, device=device)

    def add(self, original: Tensor, now: Tensor, scores: Tensor, begun: Tensor, eos: int) -> None:
        """Add candidates (B, K) where `now`, as long as there is room for a sentence's.

        original: (B,), indices of the sentences. begun: (B, K, T), the tokens before the end.
        """
        beam, length = self._scores.size(1), begun.size(2)
        places = self.count[original, None] + now.cumsum(1) - 1
        rows, columns = (now & (places < beam)).nonzero(as_tuple=True)
        at = original[rows], places[rows, columns]
        self._scores[at] = scores[rows, columns]
        self._lengths[at] = length + 1
        ids = torch.nn.functional.pad(begun[rows, columns], (0, 1), value=eos)
        self._tokens[(*at, slice(length + 1))] = ids
        self.count[original] = (self.count[original] + now.sum(1)).clamp(max=beam)

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Return each sentence's hypotheses, best first; of equal ones, the first to end."""
        if not bool(self.count.all()):
            raise UserError("the model's probabilities are not finite: it translates nothing")
        order = self._scores.argsort(dim=1, descending=True, stable=True)
        tokens = self._tokens.int().cpu()
        scores, lengths, order, counts = (
            of_all.tolist() for of_all in (self._scores, self._lengths, order, self.count)
        )
        return [
            [
                Hypothesis(tokens[sentence, at, : lengths[sentence][at]], scores[sentence][at])
                for at in order[sentence][: counts[sentence]]
            ]
            for sentence in range(len(counts))
        ]


def _follow(tokens: Tensor, parents: Tensor) -> Tensor:
    """Tokens (B, K, T) of the beams that `parents` (B, candidates) names."""
    return tokens.gather(1, parents[:, :, None].expand(-1, -1, tokens.size(2)))
