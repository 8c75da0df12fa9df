"""Names of normalizations and how to build them."""

import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from normexp.norms.core.nested import accept_nested
from normexp.norms.core.start import startable

_NORMS: dict[str, type[nn.Module]] = {}


def register_norm(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: register a layer for `build_norm` as `name`.

    The class takes `num_features` first; its other parameters, each with a default, are the
    options of the normalization. Within torch's TransformerEncoder its objects can stand for a
    LayerNorm. They get `reset_parameters`, where the class has none, and come out of transformers'
    `from_pretrained` with what a checkpoint does not hold at its start. Raises ValueError where the
    name is in use.
    """

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _NORMS:
            raise ValueError(f"normalization {name!r} is registered twice")
        cls.forward = accept_nested(cls.forward)
        if not issubclass(cls, nn.LayerNorm):
            cls.__init__ = _closing_the_fast_path(cls.__init__)
        _NORMS[name] = startable(cls)
        return cls

    return add


def available_norms() -> list[str]:
    """Names that `build_norm` accepts, sorted."""
    return sorted(_NORMS)


def norm_class(name: str) -> type[nn.Module]:
    """The layer's class. Raises ValueError on an unknown name."""
    if name not in _NORMS:
        raise ValueError(f"unknown normalization {name!r}; known: {', '.join(available_norms())}")
    return _NORMS[name]


def norm_options(name: str) -> dict[str, object]:
    """Options of a normalization with their defaults. Raises ValueError on an unknown name."""
    parameters = list(inspect.signature(norm_class(name)).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[1:]}


def build_norm(name: str, num_features: int, **options: object) -> nn.Module:
    """Build the normalization `name` for C = `num_features` channels.

    Returns a module called as `norm(x, padding_mask)` with x (T, B, C) float and padding_mask
    (B, T) bool (True = padding) or None, or x (N, C) with padding_mask (N,); the output has the
    shape and dtype of x.

    Raises ValueError for an unknown name, an unknown option (naming the known ones) or a value
    out of range.
    """
    known = norm_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"normalization {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    if not isinstance(num_features, int) or num_features < 1:
        raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
    return norm_class(name)(num_features, **options)


def _closing_the_fast_path(build: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a layer's __init__.

    In eval mode torch's TransformerEncoderLayer reads eps, weight and bias of whatever its norm1
    and norm2 are and computes LN by itself, unless a hook is attached to one of its modules. It
    asks for eps before it looks for hooks, and its TransformerEncoder for weight and bias.
    """

    @functools.wraps(build)
    def init(norm: nn.Module, *args: object, **options: object) -> None:
        build(norm, *args, **options)
        if norm._forward_pre_hooks:  # a subclass of a registered layer
            return
        hooks = _MostlySilent(norm._forward_pre_hooks)
        norm._forward_pre_hooks = hooks
        norm.register_forward_pre_hook(_block_fast_path)
        for parameter in ("weight", "bias"):
            if not hasattr(norm, parameter):
                setattr(norm, parameter, None)
        if not hasattr(norm, "eps"):
            norm.eps = math.nan  # equal to no other, which closes the path too

    return init


class _MostlySilent(OrderedDict):
    """Hooks, of which one is there to be counted: alone it is as if there were none.

    nn.Module asks whether it has hooks, and if so takes a microsecond longer for every call;
    torch's encoder layer asks how many there are.
    """

    def __bool__(self) -> bool:
        return len(self) > 1


def _block_fast_path(norm: nn.Module, args: tuple[object, ...]) -> None:
    """A hook whose presence alone has an effect."""
