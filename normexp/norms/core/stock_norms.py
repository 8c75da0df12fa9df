"""Norms of other people's models: how many channels they have, where, and what they do.

Models define norms of their own (T5LayerNorm, LlamaRMSNorm, ...). They are recognised by the name
of the class and by trying them, so that no library of models has to be known.
"""

import inspect
import itertools
import re

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

# Torch's norms of (B, C, T) or (B, C), with any number of dimensions after the channels.
CHANNELS_SECOND = (_BatchNorm, nn.GroupNorm)

_OF_OTHER_THINGS = re.compile("(batch|group|instance|weight|spectral|response)norm")
_QK_NORM = re.compile(
    r"(norm|ln)_?(added_)?(q|k|qk|query|key)|"
    r"(q|k|qk|query|key)_?(layer|rms|l2|head)?_?(norm|ln)s?"
)


def is_layer_norm(module: nn.Module) -> bool:
    """Whether its class is torch's LayerNorm or RMSNorm or calls itself a norm of single tokens."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    kind = type(module)
    name = kind.__name__.lower()
    if kind.__module__.startswith("torch.") or next(module.children(), None) is not None:
        return False
    return "norm" in name and not _OF_OTHER_THINGS.search(name)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of any sort."""
    return is_layer_norm(module) or isinstance(module, (*CHANNELS_SECOND, _InstanceNorm))


def without_qk_norms(path: str) -> str:
    """The path with names of query and key norms (q_norm, norm_k, ...) replaced by `norm`."""
    parts = path.split(".")
    return ".".join("norm" if _QK_NORM.fullmatch(part.lower()) else part for part in parts)


def shape_of(norm: nn.Module) -> tuple[int, ...]:
    """Shape of what it normalizes: (C,), or longer, or () where nothing says it."""
    for attribute in ("normalized_shape", "num_features", "num_channels"):
        shape = getattr(norm, attribute, None)
        if isinstance(shape, int):
            return (shape,)
        if shape is not None:
            return tuple(shape)
    tensors = itertools.chain(norm.parameters(), norm.buffers())
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.dim() > 0}
    return shapes.pop() if len(shapes) == 1 else ()


def objection(norm: nn.Module) -> str | None:
    """Why it cannot be replaced by a norm of tokens (..., C); None if it can.

    What follows the module's path in a message.
    """
    shape = shape_of(norm)
    if not shape:
        return "has no weight that says how many channels it normalizes"
    if len(shape) != 1:
        return f"normalizes {len(shape)} dimensions, {shape}, not one"
    if shape == (0,):
        return "is lazy and has not seen a batch yet"
    if isinstance(norm, _InstanceNorm):
        return "has channels in the middle; of such norms BatchNorm and GroupNorm can be replaced"
    forward = type(norm).forward
    if isinstance(norm, CHANNELS_SECOND) or forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return None
    others = [
        parameter.name
        for parameter in list(inspect.signature(norm.forward).parameters.values())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if others:
        return f"takes more than the hidden states: {', '.join(others)}"
    if not _normalizes_tokens(norm, shape[0]):
        return "does not normalize each token of hidden states (..., C) by itself"
    return None


@torch.no_grad()
def _normalizes_tokens(norm: nn.Module, channels: int) -> bool:
    """Whether, as far as some random tokens tell, each is normalized by itself, channels last."""
    like = next(itertools.chain(norm.parameters(), norm.buffers()), torch.empty(0, device="cpu"))
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, 3, channels, generator=generator, device="cpu").to(like)
    training = norm.training
    try:
        norm.eval()
        y, one, scaled = norm(x), norm(x[1:, 2:]), norm(8 * x)
    except Exception:  # whatever a foreign module raises on them, it wants something else
        return False
    finally:
        norm.train(training)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    if y.is_meta:
        return True

    def near(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one.float(), other.float(), rtol=0.05, atol=0.05)

    return near(one, y[1:, 2:]) and near(scaled, y)
