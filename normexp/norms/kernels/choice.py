"""Which implementation computes: plain torch, C++ compiled for this CPU, or Triton on a GPU."""

import os

CHOICES = ("auto", "plain", "native", "triton")
VARIABLE = "NORMEXP_KERNELS"


def use_kernels(choice: str) -> None:
    """Let this process use one implementation wherever there is more than one.

    auto (default): native on a CPU, triton on a GPU, where available, else plain.
    plain: operations of torch only. native, triton: as auto, but layers raise RuntimeError where
    that implementation is not available. The environment variable NORMEXP_KERNELS is the same
    choice for a whole run.

    Raises ValueError on any other choice.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}; known: {', '.join(CHOICES)}")
    _choice = choice


def chosen_kernels() -> str:
    """The choice in force: the last one of `use_kernels`, else that of NORMEXP_KERNELS."""
    return _choice


_choice = "auto"
use_kernels(os.environ.get(VARIABLE, "auto"))
