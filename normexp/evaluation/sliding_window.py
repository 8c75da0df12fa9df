"""Perplexity with context carried over: a window that slides along the whole text.

Block by block, as language models are trained, the first token of a block is predicted from the
one before it alone. Here each token is predicted from at least `context_window` earlier ones,
wherever lines and blocks end.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def split_into_windows(length: int, context_window: int, stride: int) -> Iterator[range]:
    """Yield the positions that each window reads; it predicts the last `stride` of them or fewer.

    Window n predicts positions n stride to (n + 1) stride - 1 and reads from context_window
    positions before them on, or from the beginning of the text.
    """
    for first in range(0, length, stride):
        yield range(max(0, first - context_window), min(first + stride, length))


def stream_batches(
    dataset: Any, pad: int, context_window: int, stride: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield batches for fairseq's criterions; targets that are context only are padding.

    dataset: a split of fairseq's language_modeling; however it is cut into blocks, the text is the
    same. A window is never longer than context_window + stride, and a batch of them has at most
    max_tokens tokens, or one window.
    """
    blocks = [dataset[index] for index in range(len(dataset))]
    if not blocks:
        return
    targets = torch.cat([block["target"] for block in blocks])
    # What stands before the text is what fairseq puts before each block, the end of a sentence.
    inputs = torch.cat([blocks[0]["source"][:1], targets[:-1]])
    windows = list(split_into_windows(len(targets), context_window, stride))
    at_a_time = max(1, max_tokens // (context_window + stride))
    for first in range(0, len(windows), at_a_time):
        chosen = windows[first : first + at_a_time]
        sources = [inputs[window.start : window.stop] for window in chosen]
        wanted = [
            _only_the_last(targets[window.start : window.stop], window.stop - number * stride, pad)
            for number, window in enumerate(chosen, first)
        ]
        target = pad_sequence(wanted, batch_first=True, padding_value=pad)
        yield {
            "id": torch.arange(first, first + len(chosen)),
            "nsentences": len(chosen),
            "ntokens": int(target.ne(pad).sum()),
            "net_input": {
                "src_tokens": pad_sequence(sources, batch_first=True, padding_value=pad),
                "src_lengths": torch.tensor([len(source) for source in sources]),
            },
            "target": target,
        }


def _only_the_last(targets: Tensor, count: int, pad: int) -> Tensor:
    kept = targets.clone()
    kept[: len(kept) - count] = pad
    return kept
