"""Names of normalizations and how to build them."""

import inspect
from collections.abc import Callable

from torch import nn

_NORMS: dict[str, type[nn.Module]] = {}


def register_norm(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: register a layer for `build_norm` as `name`.

    The class takes `num_features` first; its other parameters, each with a default, are the
    options of the normalization. Raises ValueError where the name is in use.
    """

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _NORMS:
            raise ValueError(f"normalization {name!r} is registered twice")
        _NORMS[name] = cls
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
    norm = norm_class(name)(num_features, **options)
    if not isinstance(norm, nn.LayerNorm):
        norm.register_forward_pre_hook(_block_fast_path)
    return norm


def _block_fast_path(norm: nn.Module, args: tuple[object, ...]) -> None:
    """A hook whose presence alone has an effect.

    In eval mode torch's TransformerEncoderLayer reads weight, bias and eps of whatever its norm1
    and norm2 are and computes LN by itself, unless a hook is attached to one of its modules.
    """
