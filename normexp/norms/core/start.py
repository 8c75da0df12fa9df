"""The start of a norm: the values that its constructor gives to parameters and buffers.

PyTorch builds large models without memory, on the "meta" device, and fills in afterwards what a
checkpoint holds. Whatever it does not hold is memory with arbitrary content until somebody puts it
to its start: `reset_parameters`, which torch's own modules have too and FSDP calls, or
transformers' `from_pretrained`, which knows the starts of the modules of its own models only.
"""

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

_LOADED = "_is_hf_initialized"  # transformers' mark on tensors from a checkpoint, and on modules


@torch.no_grad()
def put_to_start(norm: nn.Module, names: Collection[str]) -> None:
    """Give these parameters and buffers of a norm the values that they have in a new one."""
    cls, args, kwargs = norm._construction
    with torch.device("cpu"):
        new = cls(*args, **kwargs)
    for name, value in _tensors(new).items():  # in one order on all ranks
        if name in names:
            tensor = getattr(norm, name)
            tensor.copy_(_spread_like(tensor, value))


def _spread_like(tensor: Tensor, value: Tensor) -> Tensor:
    """value, distributed over the ranks as tensor is: FSDP and tensor parallelism shard it."""
    if type(tensor.data) is Tensor:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def startable(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: norms of this class can be put to their start.

    Adds `reset_parameters` where the class has none, and puts what `from_pretrained` leaves
    uninitialized to its start: transformers sets an attribute on a module when it takes it for
    initialized.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self._construction = cls, args, kwargs  # in a subclass, its own comes last
        self._without_memory = any(tensor.is_meta for tensor in _tensors(self).values())

    cls.__init__ = __init__
    setattr(cls, _LOADED, property(_is_initialized, _set_initialized))
    if not hasattr(cls, "reset_parameters"):
        cls.reset_parameters = _reset_parameters
    return cls


def _tensors(norm: nn.Module) -> dict[str, Tensor]:
    both = {**norm._parameters, **norm._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _reset_parameters(norm: nn.Module) -> None:
    """Put the parameters to their start."""
    put_to_start(norm, _tensors(norm))


def _is_initialized(norm: nn.Module) -> bool:
    return norm.__dict__.get(_LOADED, False)


def _set_initialized(norm: nn.Module, value: bool) -> None:
    norm.__dict__[_LOADED] = value
    # A norm that had memory from the beginning was at its start then, and may be trained by now.
    if value and norm._without_memory:
        norm._without_memory = False
        put_to_start(norm, [k for k, v in _tensors(norm).items() if not getattr(v, _LOADED, False)])
