"""Replace the norms of a model by any normalization, and pass the padding mask to it.

A model calls `norm(x)`; the norms here take `norm(x, padding_mask)`. A new norm stands under the
attribute of the one that it replaces, so that parameters keep their names and order, and a hook on
it adds the mask that `padding_mask_for` sets for the duration of a call.
"""

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms.core.stock_norms import (
    CHANNELS_SECOND,
    is_layer_norm,
    is_norm,
    objection,
    shape_of,
    without_qk_norms,
)
from normexp.norms.registry import available_norms, build_norm, norm_class

_ATTRIBUTE = "padding_context"

_Place = tuple[nn.Module, str]  # the module that a norm belongs to, and the norm's name there


def replace_layer_norms(
    model: nn.Module,
    name: str,
    *,
    batch_first: bool,
    only: str | None = None,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    **options: object,
) -> list[str]:
    """Replace the norms of a model's tokens by the normalization `name`, in place.

    batch_first: whether the model's hidden states are (B, T, C), as in Hugging Face models, or
    (T, B, C). only: a regular expression; norms in whose path it is found are replaced, all by
    default. kind: class or classes to replace instead of the default ones. options: of the
    normalization; those not given have its defaults, eps included.

    By default these are replaced: torch's LayerNorm and RMSNorm, and modules whose class is called
    a norm (T5LayerNorm, LlamaRMSNorm, ...) and, when tried, normalizes each token (..., C) by
    itself. Norms of queries and keys (q_norm, k_norm, ...) are replaced only where `only` names
    them: where it would not match if they were called `norm`. What is left out is warned of.

    kind=nn.BatchNorm1d (or 2d, 3d, SyncBatchNorm, nn.GroupNorm) replaces these; their inputs are
    (B, C, T) or (B, C), whatever batch_first says, and the mask is (B, T) all the same. Replaced by
    `batch`, a BatchNorm hands on its parameters, running statistics, eps and momentum, because
    they mean the same; without padding nothing changes, and padding is left out of the statistics.

    Each new norm has its predecessor's number of channels, dtype and device, and otherwise fresh
    parameters; trained ones are not copied. Returns the paths of the replaced modules. The
    inference path of torch's TransformerEncoder, which would compute LN whatever norm is there, is
    switched off. Call the model within `padding_mask_for` afterwards. `instance` lets a position
    see later ones: do not use it in a causal model.

    Raises ValueError, and leaves the model as it was, where nothing is found, a norm spans
    several dimensions or stands at several places, one of the given kind does not normalize
    tokens, batch_first contradicts torch's layers, or the name or an option is invalid.
    """
    places = _places(model, kind)
    selected = {path: at for path, at in places.items() if only is None or re.search(only, path)}
    left_out = {}
    for path, (owner, attribute) in list(selected.items()):
        neutral, norm = without_qk_norms(path), getattr(owner, attribute)
        if neutral != path and (only is None or re.search(only, neutral)):
            left_out[path] = "is of queries or keys, and replaced only if only=... names it"
        elif not isinstance(norm, _own_norms()) and (why := objection(norm)):
            if kind is not None or len(shape_of(norm)) > 1:
                raise ValueError(f"{path} {why} ({type(norm).__name__})")
            left_out[path] = why
        if path in left_out:
            del selected[path]
    if not selected:
        raise ValueError(_nothing_found(model, only, kind, places, left_out))
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
    if left_out:
        warnings.warn(f"left as they were: {_reasons(left_out)}", stacklevel=2)
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

    padding_mask: (B, T) bool, True = padding (a Hugging Face `attention_mask == 0`; of lengths (B,)
    `torch.arange(T) >= lengths[:, None]`), for every layout of the hidden states; None says that
    nothing is padded. Of states with more dimensions, (B, T, heads, C) or (B, heads, T, C), all
    that stands at a padded position is padding. An inner context overrides an
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

    def __init__(self, batch_first: bool, channels_second: bool = False):
        self.batch_first, self.channels_second = batch_first, channels_second
        self.known = False
        self.padding_mask: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[bool, bool]]:
        return _PaddingContext, (self.batch_first, self.channels_second)


def _contexts_in(module: nn.Module) -> list[_PaddingContext]:
    return [getattr(norm, _ATTRIBUTE) for norm in module.modules() if hasattr(norm, _ATTRIBUTE)]


def _places(
    model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] | None
) -> dict[str, _Place]:
    """Every module of a kind, or every norm of tokens that is not one of this package's: by path.

    This package's LN is torch's.
    """
    places = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if kind is not None:
            wanted = isinstance(module, kind)
        else:
            new = isinstance(module, _own_norms()) and not isinstance(module, nn.LayerNorm)
            wanted = is_layer_norm(module) and not new
        if path and wanted:
            parent, _, attribute = path.rpartition(".")
            places[path] = (model.get_submodule(parent), attribute)
    return places


def _own_norms() -> tuple[type[nn.Module], ...]:
    return tuple(norm_class(name) for name in available_norms())


def _nothing_found(
    model: nn.Module,
    only: str | None,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] | None,
    places: Iterable[str],
    left_out: Mapping[str, str],
) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind or nn.LayerNorm,)
    wanted = " or ".join(one.__name__ for one in kinds)
    if left_out:
        return f"the model has no {wanted} to replace; {_reasons(left_out)}"
    which = f" that matches {only!r}" if only is not None and places else ""
    others = [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if path and path not in places and (is_norm(module) or isinstance(module, _own_norms()))
    ]
    found = [_listed(places)] if places else []
    found += [f"norms of another kind=...: {_listed(others)}"] if others else []
    if is_norm(model):
        found.append("to be a norm itself: give the module that it belongs to")
    return f"the model has no {wanted}{which}; it has {'; '.join(found) or 'none at all'}"


def _reasons(left_out: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for path, why in left_out.items():
        by_reason.setdefault(why, []).append(path)
    return "; ".join(f"{_listed(paths)}: {why}" for why, paths in by_reason.items())


def _listed(paths: Iterable[str], shown: int = 8) -> str:
    first, others = list(paths)[:shown], list(paths)[shown:]
    return ", ".join(first) + (f" and {len(others)} others" if others else "")


def _check_unshared(places: Mapping[str, _Place], selected: Mapping[str, _Place]) -> None:
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
    shape = shape_of(stock)
    if len(shape) != 1:
        raise ValueError(f"{path} {objection(stock)}")
    hands_on = choice["name"] == "batch" and isinstance(stock, nn.modules.batchnorm._BatchNorm)
    if hands_on:
        choice = {**_options_like(path, stock, choice), **choice}
    norm = build_norm(num_features=shape[0], **choice).train(stock.training)
    buffers = (buffer for buffer in stock.buffers() if buffer.is_floating_point())
    like = next(itertools.chain(stock.parameters(), buffers, owner.parameters()), None)
    if like is not None:
        norm.to(like.device, like.dtype)
    if hands_on:
        _hand_on(stock, norm)
    return norm


def _options_like(path: str, stock: nn.Module, choice: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `batch` with which it is this BatchNorm."""
    if stock.momentum is None and "momentum" not in choice:
        raise ValueError(
            f"{path} has momentum=None, the mean of all batches so far; batch has an exponential "
            "average: choose its momentum=..., 0.1 being torch's default"
        )
    sync = isinstance(stock, nn.SyncBatchNorm)
    return {"eps": stock.eps, "momentum": stock.momentum, "sync": sync}


@torch.no_grad()
def _hand_on(stock: nn.Module, norm: nn.Module) -> None:
    """Copy what a BatchNorm has learned, and leave frozen what it does not learn."""
    for parameter in ("weight", "bias"):
        learned = getattr(stock, parameter)
        new = getattr(norm, parameter)
        new.requires_grad_(learned is not None and learned.requires_grad)
        if learned is not None:
            new.copy_(learned)
    if stock.running_mean is not None:
        norm.running_mean.copy_(stock.running_mean)
        norm.running_var.copy_(stock.running_var)
        norm.step.copy_(stock.num_batches_tracked)


def _attach(owner: nn.Module, attribute: str, norm: nn.Module, batch_first: bool) -> None:
    """Put a norm at `owner.attribute`, with the hook that passes it the padding mask."""
    stock = getattr(owner, attribute)
    channels_second = isinstance(stock, CHANNELS_SECOND)
    if hasattr(stock, _ATTRIBUTE):  # it has replaced another
        channels_second = getattr(stock, _ATTRIBUTE).channels_second
    context = _PaddingContext(batch_first or channels_second, channels_second)
    setattr(norm, _ATTRIBUTE, context)
    # Plain functions: hooks that are closures or bound methods do not survive deepcopy.
    norm.register_forward_pre_hook(_add_padding_mask, with_kwargs=True)
    if channels_second or (batch_first and _mixes_positions(norm)):
        norm.register_forward_hook(_put_back)
    setattr(owner, attribute, norm)
    if isinstance(owner, nn.TransformerEncoderLayer):
        # No TransformerEncoder that this layer is stacked into will make nested tensors for it.
        owner.activation_relu_or_gelu = 0


def _mixes_positions(norm: nn.Module) -> bool:
    return getattr(norm, "mixes_positions", False)


def _add_padding_mask(
    norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context: _PaddingContext = getattr(norm, _ATTRIBUTE)
    if len(args) + len(kwargs) != 1:
        raise TypeError(
            f"this {type(norm).__name__} has replaced a norm and takes the hidden states only; the "
            f"model calls it with {len(args) + len(kwargs)} arguments. Leave it out with only=..."
        )
    (x,) = args or kwargs.values()
    if x.is_nested:  # what is padding, it says itself
        return (x,), {}
    mixes = _mixes_positions(norm)
    if not context.known and (norm.training or mixes):
        # Normalizing padding as if it were text would go unnoticed.
        raise RuntimeError(
            f"the padding mask is unknown to this {type(norm).__name__}: run the model, and with "
            "activation checkpointing the backward pass too, within "
            "padding_mask_for(model, padding_mask=mask), where None says that nothing is padded"
        )
    if context.channels_second and x.dim() > 2:
        x = x.movedim(1, -1)
    mask = context.padding_mask
    if mask is not None:
        mask = _arranged_like(mask.to(x.device), x, context, flatten=not mixes)
    if x.dim() > 3:
        return (x,), {"padding_mask": mask}
    if context.batch_first and mixes and x.dim() == 3:
        # A norm of single tokens needs no order: for it (B, T, C) is not copied into another.
        x, mask = x.transpose(0, 1), None if mask is None else mask.t()
    return (x,), {"padding_mask": None if mask is None else mask.t()}


def _arranged_like(mask: Tensor, x: Tensor, context: _PaddingContext, flatten: bool) -> Tensor:
    """Arrange (B, T) like the tokens of x, channels last: as x.shape[:-1]."""
    tokens = mask if context.batch_first else mask.t()
    if flatten and x.dim() == 2:
        tokens = tokens.reshape(-1)
    if x.dim() > 3 and mask.dim() == 2:
        tokens = _expanded_like(tokens, x, context)
    if tokens.shape != x.shape[:-1]:
        layout = "(B, T, C)" if context.batch_first else "(T, B, C)"
        if context.channels_second:
            x, layout = x.movedim(-1, 1), "(B, C, T)"
        raise ValueError(
            f"a padding_mask {tuple(mask.shape)} does not fit hidden states {tuple(x.shape)}, "
            f"which are read as {layout} (batch_first={context.batch_first}); a norm of other "
            "states than the tokens' needs a padding_mask_for of its own, within that of the model"
        )
    return tokens


def _expanded_like(tokens: Tensor, x: Tensor, context: _PaddingContext) -> Tensor:
    """tokens of states (B, T, ..., C), (B, ..., T, C) or (T, B, ..., C), for all between."""
    heads = [1] * (x.dim() - 3)
    first = tuple(x.shape[:2]) == tuple(tokens.shape)
    last = context.batch_first and (x.shape[0], x.shape[-2]) == tuple(tokens.shape)
    if first and last and tokens.any():
        raise ValueError(
            f"hidden states {tuple(x.shape)} can be (B, T, ..., C) and (B, ..., T, C), and which "
            "of them are padding is unknown; pad the batch to another length"
        )
    if first:
        return tokens.reshape(*tokens.shape, *heads).expand(x.shape[:-1])
    if last:
        return tokens.reshape(len(tokens), *heads, -1).expand(x.shape[:-1])
    return tokens


def _put_back(norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    context: _PaddingContext = getattr(norm, _ATTRIBUTE)
    if y.is_nested:
        return y
    if y.dim() == 3 and _mixes_positions(norm):
        y = y.transpose(0, 1)
    return y.movedim(-1, 1).contiguous() if context.channels_second and y.dim() > 2 else y
