"""Layers of other software that the benchmarks put beside ours, where it can run."""

import functools
import importlib.metadata
import pkgutil
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normexp.benchmarks.compiled_layers import compiled_layers

EPS = 1e-5
_GPU_ONLY = {"Liger": "liger-kernel", "quack": "quack-kernels"}


class Peer(NamedTuple):
    """A layer by somebody else: y of x (T, B, C) and a mask (B, T), and its parameters."""

    forward: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]


class Peers(NamedTuple):
    """Peers by name, and those that cannot run here, each with the reason."""

    layers: dict[str, Peer]
    skipped: dict[str, str]


def of_module(module: nn.Module) -> Peer:
    """A module that takes x and the mask."""
    return Peer(module, list(module.parameters()))


def compiled_peers(
    channels: int, device: torch.device, names: tuple[str, ...], backend: str = "inductor"
) -> Peers:
    """torch.compile of the equations of the layers `names`, as "NAME, torch.compile".

    Those of an earlier call compile again if they are used: torch keeps a few versions of a
    function only, and each set of sizes is one.
    """
    torch._dynamo.reset()
    reason = _why_not_compiled(device) if backend == "inductor" else ""
    if reason:
        return Peers({}, {"torch.compile": reason})
    builders = compiled_layers(backend)
    return Peers(
        {
            f"{name}, torch.compile": of_module(builders[name](channels).to(device))
            for name in names
        },
        {},
    )


def gpu_peers(channels: int, device: torch.device, dtype: torch.dtype) -> Peers:
    """LayerNorm and RMSNorm of Liger-Kernel and RMSNorm of quack; these know no padding."""
    found = Peers({}, {})
    if device.type != "cuda":
        return Peers({}, {name: "needs a GPU" for name in _GPU_ONLY})
    for name, package in _GPU_ONLY.items():
        if version(package) is None:
            found.skipped[name] = f"{package} is not installed"
            continue
        try:
            functions = _liger() if name == "Liger" else _quack()
        except Exception as error:  # whatever foreign code raises where it does not fit
            found.skipped[name] = f"{package} cannot be imported: {_first_line(error)}"
            continue
        for layer, (function, num_vectors) in functions.items():
            options = {"device": device, "dtype": dtype}
            vectors = [
                nn.Parameter(make(channels, **options))
                for make in (torch.ones, torch.zeros)[:num_vectors]
            ]

            def forward(
                x: Tensor,
                padding_mask: Tensor,
                function: Callable[..., Tensor] = function,
                vectors: list[nn.Parameter] = vectors,
            ) -> Tensor:
                return function(x, *vectors)

            found.layers[f"{layer}, {name}"] = Peer(forward, vectors)
    return found


def version(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peer_versions() -> dict[str, str]:
    """Versions of the peers' packages, and of triton, which compiles for torch and for us."""
    versions = {package: version(package) for package in ("triton", *_GPU_ONLY.values())}
    return {package: found for package, found in versions.items() if found is not None}


# Not by import statements: these packages are no part of what the project needs.
def _liger() -> dict[str, tuple[Callable[..., Tensor], int]]:
    layer_norm, rms_norm = (
        pkgutil.resolve_name(f"liger_kernel.transformers.functional:liger_{name}")
        for name in ("layer_norm", "rms_norm")
    )
    return {
        "LayerNorm": (lambda x, weight, bias: layer_norm(x, weight, bias, EPS), 2),
        # By default its backward writes over the gradient that it is given.
        "RMSNorm": (lambda x, weight: rms_norm(x, weight, EPS, in_place=False), 1),
    }


def _quack() -> dict[str, tuple[Callable[..., Tensor], int]]:
    rms_norm = pkgutil.resolve_name("quack.rmsnorm:rmsnorm")
    return {"RMSNorm": (lambda x, weight: rms_norm(x, weight, eps=EPS), 1)}


@functools.cache
def _why_not_compiled(device: torch.device) -> str:
    """Why torch.compile does not work here; an empty string if it does."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "no C++ compiler"
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler raises
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
