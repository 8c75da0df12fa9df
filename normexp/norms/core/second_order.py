"""Gradients of PN-V and BN in operations that autograd can differentiate in turn.

The layers write their backward passes out, which is fast, and which autograd cannot look into. For
a gradient of a gradient they call these functions instead: the forward again, then autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from normexp.norms.core.masking import mask_padding, num_tokens


def power_v_gradients(
    x: Tensor,
    weight: Tensor,
    gradient: Tensor,
    tokens: Tensor,
    token_mask: Tensor | None,
    eps: float,
    mean: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx like x, dL/dw (C,) and dL/db (C,) of PN-V.

    tokens (T*B, C): the rows of x, computed from x; gradient: dL/dy, of as many values.
    mean(sums (C,), n): their mean over the tokens of all ranks.
    """
    tokens = mask_padding(tokens, token_mask)
    psi2 = mean(tokens.square().sum(0), num_tokens(tokens, token_mask))
    y = mask_padding(tokens * (torch.rsqrt(psi2 + eps) * weight), token_mask)
    gradient = gradient.reshape(y.shape).to(y.dtype)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), gradient, create_graph=True)
    return d_x, d_weight, mask_padding(gradient, token_mask).sum(0).to(weight.dtype)


def batch_gradients(
    x: Tensor,
    weight: Tensor,
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    tokens: Tensor,
    token_mask: Tensor | None,
    inverse_std: Callable[[Tensor], Tensor],
    moments: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx like x, dL/dw (C,) and dL/db (C,) of BN.

    gradients: those reaching y, mu_B (C,) and var_B (C,); tokens (T*B, C): the rows of x, computed
    from x. inverse_std: variance (C,) -> factor (C,). moments(n, mean, m2): mean and variance over
    the tokens of all ranks, from the rank's number of tokens, mean and squared distances from it.
    """
    tokens = mask_padding(tokens, token_mask)
    n = num_tokens(tokens, token_mask)
    mean = tokens.sum(0) / n.clamp(min=1)
    m2 = mask_padding(tokens - mean, token_mask).square().sum(0)
    mean, var = moments(n, mean, m2)
    y = mask_padding((tokens - mean) * (inverse_std(var) * weight), token_mask)
    d_y, d_mean, d_var = gradients
    d_y = mask_padding(d_y.reshape(y.shape).to(y.dtype), token_mask)
    pairs = [(y, d_y), (mean, d_mean), (var, d_var)]
    outputs, upstream = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    d_x, d_weight = torch.autograd.grad(outputs, (x, weight), upstream, create_graph=True)
    return d_x, d_weight, d_y.sum(0).to(weight.dtype)
