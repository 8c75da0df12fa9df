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

    x, padding_mask: as in `check_input`; True = padding. Returns tokens (T*B, C), in float32 where
    x is float16 or bfloat16 because sums over thousands of tokens need the digits, and their
    token_mask (T*B, 1) or None. Raises ValueError where shapes or dtypes do not fit.
    """
    check_input(x, padding_mask, num_features)
    tokens, padding = list_of_tokens(x, padding_mask)
    if x.dtype in (torch.float16, torch.bfloat16):
        tokens = tokens.float()
    return tokens, None if padding is None else ~padding[:, None]


def list_of_tokens(x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x with as many dimensions as `check_input` allows -> (N, C), and its padding_mask (N,)."""
    tokens = x.reshape(-1, x.shape[-1])
    if padding_mask is None:
        return tokens, None
    if padding_mask.dim() == 2 and x.dim() > 2:  # (B, T)
        of_tokens = padding_mask.t().reshape(*x.shape[:2], *[1] * (x.dim() - 3))
        padding_mask = of_tokens.expand(x.shape[:-1])
    return tokens, padding_mask.reshape(-1)


def check_input(x: Tensor, padding_mask: Tensor | None, num_features: int) -> None:
    """Raise ValueError unless x and padding_mask fit the layer and each other.

    x (T, B, C) has a padding_mask (B, T), and x (N, C) one of (N,). x may have any other number of
    dimensions with the channels last, too: images (B, H, W, C), say. Then padding_mask has an entry
    for each token, x.shape[:-1]; or, of x (T, B, ..., C), it is (B, T).
    """
    if x.is_nested:
        raise ValueError(
            "nested tensors; build the TransformerEncoder with enable_nested_tensor=False"
        )
    if x.dim() == 0 or x.shape[-1] != num_features:
        raise ValueError(
            f"expected input (T, B, {num_features}), (N, {num_features}) or another with "
            f"{num_features} channels last, got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point input, got {x.dtype}")
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool (True = padding), got {padding_mask.dtype}")
    by_sentence, by_token = tuple(x.shape[:2][::-1]), tuple(x.shape[:-1])
    expected = {2: [by_token], 3: [by_sentence]}.get(x.dim(), [by_sentence, by_token])
    if tuple(padding_mask.shape) not in expected:
        raise ValueError(
            f"padding_mask must have the shape {' or '.join(map(str, expected))} for an input "
            f"{tuple(x.shape)}, got {tuple(padding_mask.shape)}"
        )


def refusal(
    error: ValueError, x: Tensor, padding_mask: Tensor | None, num_features: int
) -> ValueError:
    """A kernel's refusal of its arguments, in the words of `check_input` if that refuses them too.

    Kernels check by themselves because checking takes longer here than a step on a small batch.
    """
    try:
        check_input(x, padding_mask, num_features)
    except ValueError as explained:
        return explained
    return error


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
