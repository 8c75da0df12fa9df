"""torch.compile and layers whose training changes state."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def eager(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: run this outside compiled graphs, as torch.compiler.disable does.

    Compiled code could not tell a forward from its recomputation by activation checkpointing.
    Decorating waits for the first call because it imports the compiler, which takes a second.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return method(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args)

    return call
