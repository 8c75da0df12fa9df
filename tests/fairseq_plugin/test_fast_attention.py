"""Attention for fast training passes against fairseq's own."""

import copy

import pytest
import torch
from fairseq.modules import MultiheadAttention

from normexp.fairseq_plugin.fast_attention import FastAttention, use_fast_attention

T, B, C = 7, 3, 16


def pair() -> tuple[MultiheadAttention, FastAttention]:
    torch.manual_seed(1)
    stock = MultiheadAttention(C, 4, dropout=0.0, self_attention=True).double()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    assert type(fast) is FastAttention
    return stock, fast


def future(kind: str | None) -> torch.Tensor | None:
    if kind is None:
        return None
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    return hidden if kind == "bool" else torch.zeros(T, T).double().masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [None, "float", "bool"])
def test_outputs_and_gradients(kind: str | None, padded: bool) -> None:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 4:] = padded
    results = []
    for attention in pair():
        x = torch.randn(T, B, C, generator=torch.Generator().manual_seed(2)).double()
        x.requires_grad_()
        y, _ = attention(
            x, x, x, key_padding_mask=padding, attn_mask=future(kind), need_weights=False
        )
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in attention.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_a_sentence_of_padding_alone_spoils_nothing() -> None:
    """No NaN arises in the outputs of other sentences or, through gradients, in the weights."""
    _, fast = pair()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    x = torch.randn(T, B, C).double().requires_grad_()
    y, _ = fast(x, x, x, key_padding_mask=padding, attn_mask=future("float"))
    y[:, [0, 2]].sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)
