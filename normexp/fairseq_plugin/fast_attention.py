"""fairseq's multi-head attention for training on the CPU, with the module's own dropout.

fairseq calls a function of torch that draws dropout from the serial generator, and whose fused
kernel for the CPU is slower in bfloat16 than in float32. Here the attention's dropout module draws
the masks, the matrix products follow autocast and the softmax is float32.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn


class FastAttention(MultiheadAttention):
    """Multi-head attention that computes training passes here and others by fairseq's class."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with query (T, B, C) to key and value (S, B, C).

        key_padding_mask: (B, S), True or nonzero = padding. attn_mask: (T, S), bool (True = hidden)
        or added to the scores. Returns the output (T, B, C) and, if `need_weights`, the weights
        averaged over heads (B, T, S), else None.
        """
        here = (
            self.training
            and query.device.type == "cpu"
            and incremental_state is None
            and not (static_kv or before_softmax or need_head_weights or self.add_zero_attn)
            and self.bias_k is None
            and not self.use_xformers
        )
        if not here:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv,
                attn_mask,
                before_softmax,
                need_head_weights,
            )
        length, sentences, _ = query.shape
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        scores = torch.bmm(q * self.scaling, k.transpose(1, 2))
        # Not minus infinity: softmax would give NaN for a sentence of nothing but padding.
        lowest = torch.finfo(scores.dtype).min
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores.masked_fill_(attn_mask, lowest)
        elif attn_mask is not None:
            scores += attn_mask
        if key_padding_mask is not None:
            hidden = key_padding_mask.bool()[:, None, None]
            scores.unflatten(0, (sentences, -1)).masked_fill_(hidden, lowest)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = self.dropout_module(scores.softmax(-1, dtype=wide))
        mixed = torch.bmm(weights.to(v.dtype), v).transpose(0, 1)
        averaged = weights.unflatten(0, (sentences, -1)).mean(1) if need_weights else None
        return self.out_proj(mixed.reshape(length, sentences, self.embed_dim)), averaged

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Iterable[Tensor]:
        """Project queries, keys and values; by one product where all have the same input."""
        linear = [self.q_proj, self.k_proj, self.v_proj]
        if query is key and key is value and all(type(part) is nn.Linear for part in linear):
            weight, bias = (
                None
                if getattr(linear[0], name) is None
                else torch.cat([getattr(p, name) for p in linear])
                for name in ("weight", "bias")
            )
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        return (part(x) for part, x in zip(linear, (query, key, value), strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """Split (T, B, C) into the H heads: (B H, T, C / H)."""
        heads = x.unflatten(2, (self.num_heads, self.head_dim)).flatten(1, 2).transpose(0, 1)
        # The product of small matrices in bfloat16 is much faster when they are dense.
        return heads.contiguous() if heads.dtype == torch.bfloat16 else heads


def use_fast_attention(model: nn.Module) -> None:
    """Turn every attention module of a fairseq model into a FastAttention, in place."""
    for module in model.modules():
        if type(module) is MultiheadAttention:
            module.__class__ = FastAttention
