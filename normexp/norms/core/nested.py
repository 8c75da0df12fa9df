"""Nested tensors, which torch's TransformerEncoder makes of a padded batch in eval mode."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def accept_nested(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of a norm's forward, which in eval mode takes sentences (T_i, C) nested, too.

    Those of torch.jagged layout, and any in training, are left to `forward`, which refuses them.
    """

    @functools.wraps(forward)
    def call(norm: nn.Module, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if not x.is_nested or norm.training or x.layout != torch.strided:
            return forward(norm, x, padding_mask)
        sentences = x.unbind()
        lengths = torch.tensor([len(sentence) for sentence in sentences], device=x.device)
        padded = pad_sequence(sentences)  # (T, B, C)
        positions = torch.arange(len(padded), device=x.device)
        y = forward(norm, padded, positions >= lengths[:, None])
        lists = [y[: len(sentence), i] for i, sentence in enumerate(sentences)]
        return torch.nested.as_nested_tensor(lists)

    return call
