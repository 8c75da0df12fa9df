"""Put any normalization into fairseq's modules and let it know the padding.

fairseq's layers call `norm(x)`; ours take `norm(x, padding_mask)`. The norms stand under the
stock attribute names, so parameters keep their stock names and order, and a hook on each norm
adds the mask that the enclosing forward has laid down for the duration of its call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normexp.norms import build_norm

_MASK = "padding_mask_of_this_call"


def fill_slot(owner: nn.Module, attribute: str, choice: dict[str, Any]) -> None:
    """Replace the LayerNorm `owner.attribute` by the norm {"name": ..., option: value, ...}."""
    stock: nn.LayerNorm = getattr(owner, attribute)
    norm = build_norm(num_features=stock.normalized_shape[0], **choice)
    # A plain function: hooks that are closures or bound methods do not survive deepcopy.
    norm.register_forward_pre_hook(_add_padding_mask, with_kwargs=True)
    setattr(owner, attribute, norm)


@contextmanager
def padding_mask_for(*norms: nn.Module | None, padding_mask: Tensor | None) -> Iterator[None]:
    """Within this context the norms are called with padding_mask (B, T), True = padding."""
    present = [norm for norm in norms if norm is not None]
    for norm in present:
        setattr(norm, _MASK, padding_mask)
    try:
        yield
    finally:
        for norm in present:
            delattr(norm, _MASK)


def _add_padding_mask(
    norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not hasattr(norm, _MASK):
        # Normalizing padding as if it were text would go unnoticed.
        raise RuntimeError(
            f"{type(norm).__name__} was called outside the forward of its layer, "
            "so its padding mask is unknown"
        )
    return args, {**kwargs, "padding_mask": getattr(norm, _MASK)}
