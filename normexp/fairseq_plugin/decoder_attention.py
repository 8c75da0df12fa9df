"""Attention of the newest position of all beams to earlier positions and to the source."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from normexp.norms.kernels import native

_SOURCE = Path(__file__).with_suffix(".cpp")


def attend_to_past(
    qkv: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, position: int, num_heads: int
) -> Tensor:
    """Add the new keys and values to the earlier ones and attend to all of them.

    qkv: (1, B K', 3 C), queries, keys and values of the new position. keys, values:
    (B, room, K, C), to which this function writes. ancestors: (B, K, room), for each beam where
    its earlier positions are; the new one's entry is the beam itself. Returns (1, B K', C).
    """
    if _compiled_for(qkv):
        return torch.ops.normexp.attend_to_past(qkv, keys, values, ancestors, position, num_heads)
    sentences, _, beam, channels = keys.shape
    query, key, value = qkv.view(sentences, -1, 3, channels).unbind(2)
    num_rows = query.size(1)  # 1 or K
    keys[:, position, :num_rows] = key
    values[:, position, :num_rows] = value
    if num_rows < beam:  # not even where it is hidden may there be a NaN
        keys[:, position, num_rows:] = 0
        values[:, position, num_rows:] = 0
    # All beams' positions are compared to each query, and those of others hidden: fewer copies
    # than to gather each beam's own.
    own = ancestors[:, :num_rows, : position + 1, None] == torch.arange(beam, device=keys.device)
    mixed = F.scaled_dot_product_attention(
        _heads(query, num_heads),
        _heads(keys[:, : position + 1].flatten(1, 2), num_heads),
        _heads(values[:, : position + 1].flatten(1, 2), num_heads),
        attn_mask=own.flatten(2)[:, None],
    )
    return mixed.transpose(1, 2).reshape(1, -1, channels)


def attend_to_source(
    query: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, num_heads: int
) -> Tensor:
    """Attend with query (1, B K', C) to the keys and values (B, S, C) of each sentence.

    padding: (B, S) bool, True = padding; None without any. Returns (1, B K', C).
    """
    if _compiled_for(query):
        return torch.ops.normexp.attend_to_source(query, keys, values, padding, num_heads)
    sentences, _, channels = keys.shape
    mixed = F.scaled_dot_product_attention(
        _heads(query.view(sentences, -1, channels), num_heads),
        _heads(keys, num_heads),
        _heads(values, num_heads),
        attn_mask=None if padding is None else ~padding[:, None, None],
    )
    return mixed.transpose(1, 2).reshape(1, -1, channels)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Split (B, T, C) into the H heads: (B, H, T, C / H)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _compiled_for(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.load(_SOURCE)
