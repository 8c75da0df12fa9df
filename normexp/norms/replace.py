"""Replace the LayerNorms of a model by any normalization, and pass the padding mask to it.

A model calls `norm(x)`; the norms here take `norm(x, padding_mask)`. A new norm stands under the
attribute of the one that it replaces, so that parameters keep their names and order, and a hook on
it adds the mask that `padding_mask_for` sets for the duration of a call.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms.registry import build_norm

_ATTRIBUTE = "padding_context"


def replace_layer_norms(
    model: nn.Module,
    name: str,
    *,
    batch_first: bool,
    only: str | None = None,
    kind: type[nn.Module] = nn.LayerNorm,
    **options: object,
) -> list[str]:
    """Replace the LayerNorms of a model by the normalization `name`, in place.

    batch_first: whether the model's hidden states are (B, T, C), as in Hugging Face models, or
    (T, B, C). only: a regular expression; LayerNorms in whose path it is found are replaced, all
    by default. kind: another class to replace, such as nn.RMSNorm. options: of the normalization;
    those not given have its defaults, eps included.

    Each new norm has its predecessor's number of channels, dtype and device, and fresh parameters;
    trained ones are not copied. Returns the paths of the replaced modules. The inference path of
    torch's TransformerEncoder, which would compute LN whatever norm is there, is switched off.
    Call the model within `padding_mask_for` afterwards. `instance` lets a position see later ones:
    do not use it in a causal model.

    Raises ValueError, and leaves the model as it was, where nothing is found, a norm spans
    several dimensions or stands at several places, batch_first contradicts torch's layers, or
    the name or an option is invalid.
    """
    places = _places(model, kind)
    selected = {path: at for path, at in places.items() if only is None or re.search(only, path)}
    if not selected:
        which = f" that matches {only!r}" if only is not None else ""
        raise ValueError(
            f"the model has no {kind.__name__}{which}; it has {', '.join(places) or 'none at all'}"
        )
    _check_unshared(places, selected)
    for path, (owner, _) in selected.items():
        if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            theirs = owner.self_attn.batch_first
            if theirs != batch_first:
                raise ValueError(f"batch_first={batch_first}, but {path} is built with {theirs}")
    choice = {"name": name, **options}
    built = {path: _build_like(path, *at, choice) for path, at in selected.items()}
    for path, (owner, attribute) in selected.items():
        _attach(owner, attribute, built[path], batch_first)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _contexts_in(module):
            module.use_nested_tensor = False
    return list(selected)


def replace_norm(
    owner: nn.Module, attribute: str, choice: Mapping[str, Any], batch_first: bool = False
) -> None:
    """Replace the LayerNorm `owner.attribute` by the norm {"name": ..., option: value, ...}.

    batch_first: as in `replace_layer_norms`. Raises ValueError where the LayerNorm spans several
    dimensions, or the name or an option is invalid.
    """
    _attach(owner, attribute, _build_like(attribute, owner, attribute, choice), batch_first)


@contextmanager
def padding_mask_for(*modules: nn.Module | None, padding_mask: Tensor | None) -> Iterator[None]:
    """Within this context the norms in these modules use the padding mask.

    padding_mask: (B, T) bool, True = padding (a Hugging Face `attention_mask == 0`), for every
    layout of the hidden states; None says that nothing is padded. An inner context overrides an
    outer one, so that an encoder and a decoder can each have their own. In training every norm
    has to be in such a context. Activation checkpointing runs forwards again in the backward pass,
    which then belongs into the context too.

    Raises ValueError where the mask is not bool or has other than one or two dimensions. A norm
    called in training without a context raises RuntimeError.
    """
    if padding_mask is not None and (
        padding_mask.dtype != torch.bool or padding_mask.dim() not in (1, 2)
    ):
        raise ValueError(
            "padding_mask must be bool (B, T), True = padding, such as attention_mask == 0; "
            f"got {padding_mask.dtype} {tuple(padding_mask.shape)}"
        )
    contexts = [one for module in modules if module is not None for one in _contexts_in(module)]
    before = [(context, context.known, context.padding_mask) for context in contexts]
    for context in contexts:
        context.known, context.padding_mask = True, padding_mask
    try:
        yield
    finally:
        for context, known, mask in before:
            context.known, context.padding_mask = known, mask


class _PaddingContext:
    """What a norm cannot see: the layout of the hidden states, and the padding of this call.

    On the norm and not in a context variable, because a GPU's backward pass, and with it the
    recomputation of checkpointed layers, runs in another thread. Copies start without padding.
    """

    def __init__(self, batch_first: bool):
        self.batch_first = batch_first
        self.known = False
        self.padding_mask: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return _PaddingContext, (self.batch_first,)


def _contexts_in(module: nn.Module) -> list[_PaddingContext]:
    return [getattr(norm, _ATTRIBUTE) for norm in module.modules() if hasattr(norm, _ATTRIBUTE)]


def _places(model: nn.Module, kind: type[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Every module of a kind: path -> (the module it belongs to, its name there)."""
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and isinstance(module, kind):
            parent, _, attribute = path.rpartition(".")
            places[path] = (model.get_submodule(parent), attribute)
    return places


def _check_unshared(
    places: Mapping[str, tuple[nn.Module, str]], selected: Mapping[str, tuple[nn.Module, str]]
) -> None:
    # A layer that is itself registered twice is one place with two paths, and no obstacle.
    for path, (owner, attribute) in selected.items():
        norm = getattr(owner, attribute)
        for other, at in places.items():
            if getattr(*at) is norm and at != (owner, attribute):
                raise ValueError(
                    f"{path} and {other} are one module, and the statistics of two places would "
                    "be mixed; give each place a norm of its own first"
                )


def _build_like(
    path: str, owner: nn.Module, attribute: str, choice: Mapping[str, Any]
) -> nn.Module:
    stock = getattr(owner, attribute)
    shape = stock.normalized_shape if hasattr(stock, "normalized_shape") else stock.weight.shape
    if len(shape) != 1:
        raise ValueError(f"{path} normalizes {len(shape)} dimensions, {tuple(shape)}, not one")
    norm = build_norm(num_features=shape[0], **choice).train(stock.training)
    like = next(itertools.chain(stock.parameters(), owner.parameters()), None)
    return norm if like is None else norm.to(like.device, like.dtype)


def _attach(owner: nn.Module, attribute: str, norm: nn.Module, batch_first: bool) -> None:
    """Put a norm at `owner.attribute`, with the hook that passes it the padding mask."""
    setattr(norm, _ATTRIBUTE, _PaddingContext(batch_first))
    # Plain functions: hooks that are closures or bound methods do not survive deepcopy.
    norm.register_forward_pre_hook(_add_padding_mask, with_kwargs=True)
    if batch_first and _mixes_positions(norm):
        norm.register_forward_hook(_put_batch_first)
    setattr(owner, attribute, norm)
    if isinstance(owner, nn.TransformerEncoderLayer):
        # In eval mode its fast path reads weight, bias and eps of its norms and computes LN.
        # Hooks close that path, but it asks for eps, which some norms lack, before it looks.
        owner.activation_relu_or_gelu = 0


def _mixes_positions(norm: nn.Module) -> bool:
    return getattr(norm, "mixes_positions", False)


def _add_padding_mask(
    norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context: _PaddingContext = getattr(norm, _ATTRIBUTE)
    (x,) = args
    mixes = _mixes_positions(norm)
    if x.is_nested:
        raise ValueError(
            "nested tensors; build the TransformerEncoder with enable_nested_tensor=False"
        )
    if not context.known and (norm.training or mixes):
        # Normalizing padding as if it were text would go unnoticed.
        raise RuntimeError(
            f"the padding mask is unknown to this {type(norm).__name__}: run the model, and with "
            "activation checkpointing the backward pass too, within "
            "padding_mask_for(model, padding_mask=mask), where None says that nothing is padded"
        )
    mask = context.padding_mask
    if mask is not None:
        mask = _arranged_like(mask.to(x.device), x, context.batch_first, flatten=not mixes)
    if context.batch_first and mixes and x.dim() == 3:
        # A norm of single tokens needs no order: for it (B, T, C) is not copied into another.
        x, mask = x.transpose(0, 1), None if mask is None else mask.t()
    return (x,), {**kwargs, "padding_mask": None if mask is None else mask.t()}


def _arranged_like(mask: Tensor, x: Tensor, batch_first: bool, flatten: bool) -> Tensor:
    """Arrange (B, T) like the tokens of x: (B, T), (T, B), or (N,) where x is a list of them."""
    tokens = mask if batch_first else mask.t()
    if flatten and x.dim() == 2:
        tokens = tokens.reshape(-1)
    if tokens.shape != x.shape[:-1]:
        layout = "(B, T, C)" if batch_first else "(T, B, C)"
        raise ValueError(
            f"a padding_mask {tuple(mask.shape)} does not fit hidden states {tuple(x.shape)}, "
            f"which are read as {layout} (batch_first={batch_first}); a norm of other states than "
            "the tokens' needs a padding_mask_for of its own, within that of the model"
        )
    return tokens


def _put_batch_first(norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return y.transpose(0, 1) if y.dim() == 3 else y
