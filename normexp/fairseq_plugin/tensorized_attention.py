"""The attention of the Tensorized Transformer (Ma et al., 2019), published and causal."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Queries computed at a time; each holds B x L x (L + d_head) numbers.
_QUERIES = 4


class TensorizedAttention(nn.Module):
    """Single-head attention by a third-order tensor, from the LM that PowerNorm builds on.

    In a segment of L tokens, with q, k, v = W_qkv x and p_j = W_r r_j (r_j a position encoding),
    all of size d_head, and the two vectors u, t that all layers of a model share:
        M_i[j, m] = sum_h a_h ((q_i + u)_h k_jh + (q_i + t)_h p_jh) v_mh
        output_i = W_o vec(M_i),  vec j-major
    a is the mean of the cores' vectors a_c. The publication averages M over the cores, which is the
    same because M is linear in a: more cores change the parametrization and nothing else.

    published: M_i over all j and m, so every position sees the whole segment, including the token
    that it has to predict. The public code accepts a mask and does not use it.
    causal: M_i[j, m] only for j <= i and m <= i, else 0.

    M is computed for a few queries at a time, in the forward pass and again in the backward pass,
    so neither all of M (B x L x L^2 numbers) nor B x L x L x d_head numbers are in memory at once.
    """

    def __init__(self, embed_dim: int, head_dim: int, segment_len: int, cores: int, causal: bool):
        super().__init__()
        self.segment_len, self.causal = segment_len, causal
        self.qkv = nn.Linear(embed_dim, 3 * head_dim, bias=False)
        self.positions = nn.Linear(embed_dim, head_dim, bias=False)
        self.cores = nn.Parameter(torch.empty(cores, head_dim))
        self.out = nn.Linear(segment_len**2, embed_dim, bias=False)

    def forward(
        self, x: Tensor, r: Tensor, u: Tensor, t: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return (L', B, C) for x (L', B, C) with L' <= L.

        r: position encodings (L, C). u, t: (d_head,). padding_mask: (B, L'), True = padding, which
        no position sees. A segment shorter than L is treated as one whose later positions
        contribute nothing. Raises ValueError for a longer one.
        """
        length = x.shape[0]
        if length > self.segment_len:
            raise ValueError(
                f"a segment of {length} tokens for a model of segments of {self.segment_len}; "
                "set tokens_per_sample to the model's"
            )
        q, k, v = self.qkv(x.transpose(0, 1)).chunk(3, dim=-1)  # (B, L', d_head)
        p = self.positions(r[:length])
        if padding_mask is not None:
            v = v.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        a = self.cores.mean(0)
        by_key, by_position = (q + u) * a, (q + t) * a
        weight = self.out.weight.view(-1, self.segment_len, self.segment_len)
        outputs = []
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            seen = end if self.causal else length
            arguments = (
                by_key[:, start:end],
                by_position[:, start:end],
                k[:, :seen],
                p[:seen],
                v[:, :seen],
                weight[:, :seen, :seen],
                start if self.causal else None,
            )
            # Recomputing holds one block's M at a time, where autograd would hold all of them.
            outputs.append(checkpoint(_block, *arguments, use_reentrant=False))
        return torch.cat(outputs, dim=1).transpose(0, 1)


def _block(
    by_key: Tensor,
    by_position: Tensor,
    k: Tensor,
    p: Tensor,
    v: Tensor,
    weight: Tensor,
    first: int | None,
) -> Tensor:
    """Return the outputs (B, I, C) of I queries.

    by_key, by_position: (q + u) a and (q + t) a, (B, I, d_head). k, v: (B, L', d_head). p:
    (L', d_head). weight: (C, L', L'). first: index of the first query, None without a causal mask.
    """
    batch, queries, head_dim = by_key.shape
    seen = k.shape[1]
    left = by_key.unsqueeze(2) * k.unsqueeze(1)  # (B, I, L', d_head)
    left = torch.addcmul(left, by_position.unsqueeze(2), p)
    m = torch.bmm(left.view(batch, queries * seen, head_dim), v.transpose(1, 2))
    m = m.view(batch, queries, seen, seen)
    if first is not None:
        position = torch.arange(seen, device=m.device)
        visible = position <= torch.arange(first, first + queries, device=m.device)[:, None]
        m = m * (visible.unsqueeze(2) & visible.unsqueeze(1))
    return torch.nn.functional.linear(m.flatten(2), weight.flatten(1))
