"""Padding: which tokens count, and sums and means over the N real tokens of a batch.

A token_mask is (T*B, 1) bool, True = real token, or None where every token is real. It is the
opposite of a padding_mask (B, T) or (N,), True = padding, which is what users pass.
"""

import torch
from torch import Tensor


def flatten_tokens(
    x: Tensor, padding_mask: Tensor | None, num_features: int
) -> tuple[Tensor, Tensor | None]:
    """View a batch as a list of tokens.

    x: (T, B, C) with padding_mask (B, T), or (N, C) with padding_mask (N,); True = padding.
    Returns tokens (T*B, C), in float32 where x is float16 or bfloat16 because sums over
    thousands of tokens need the digits, and their token_mask (T*B, 1) or None.
    Raises ValueError where shapes or dtypes do not fit.
    """
    check_input(x, padding_mask, num_features)
    tokens = x.reshape(-1, num_features)
    if x.dtype in (torch.float16, torch.bfloat16):
        tokens = tokens.float()
    if padding_mask is None:
        return tokens, None
    token_mask = ~(padding_mask.t() if x.dim() == 3 else padding_mask)
    return tokens, token_mask.reshape(-1, 1)


def check_input(x: Tensor, padding_mask: Tensor | None, num_features: int) -> None:
    """Raise ValueError unless x is (T, B, C) or (N, C) and padding_mask, if any, fits it."""
    if x.is_nested:
        raise ValueError(
            "nested tensors; build the TransformerEncoder with enable_nested_tensor=False"
        )
    if x.dim() not in (2, 3) or x.shape[-1] != num_features:
        raise ValueError(
            f"expected input (T, B, {num_features}) or (N, {num_features}), got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point input, got {x.dtype}")
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool (True = padding), got {padding_mask.dtype}")
    expected = (x.shape[1], x.shape[0]) if x.dim() == 3 else (x.shape[0],)
    if padding_mask.shape != expected:
        raise ValueError(
            f"padding_mask must have the shape {tuple(expected)} for an input {tuple(x.shape)}, "
            f"got {tuple(padding_mask.shape)}"
        )


def num_tokens(tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """N, the number of real tokens, as a scalar tensor of the dtype of tokens (T*B, C)."""
    if token_mask is None:
        return tokens.new_full((), tokens.shape[0])
    return token_mask.sum().to(tokens.dtype)


def mask_padding(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """values (T*B, C) with zeros at padded positions, whatever they hold, NaN included."""
    return values if token_mask is None else torch.where(token_mask, values, 0.0)


def mask_padding_(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """`mask_padding` in place; on a CPU it touches the padded rows only. Returns values."""
    if token_mask is None:
        return values
    if values.device.type == "cpu":  # a GPU would have to be waited for to know the rows
        return values.index_fill_(0, (~token_mask[:, 0]).nonzero()[:, 0], 0.0)
    return values.masked_fill_(~token_mask, 0.0)


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: values (T*B, C) -> (C,). Zero where no token is real."""
    total = mask_padding(values, token_mask).sum(0)
    return total / num_tokens(values, token_mask).clamp(min=1)
