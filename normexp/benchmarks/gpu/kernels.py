"""Every Triton kernel against the plain layer in float64, both on the device."""

import copy
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from normexp.benchmarks.bench_norms import DTYPES
from normexp.benchmarks.gpu.section import Row, device, one_line
from normexp.norms import build_norm
from normexp.norms.kernels.choice import use_kernels

# Each takes a few steps before and after the end of its warm-up.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "power": ("power", {"warmup_steps": 2}),
    "power, bound_nu": ("power", {"warmup_steps": 2, "bound_nu": True}),
    "power_v": ("power_v", {}),
    "batch": ("batch", {}),
    "regularized_batch": ("regularized_batch", {}),
    "power_released": ("power_released", {"warmup_steps": 2}),
}
STEPS = 4
SHAPES = ((40, 100, 512), (11, 3, 60), (3, 5, 2048), (128, 256, 1024))
REHEARSED_SHAPES = ((5, 3, 12),)
# Of ||kernel - float64|| / ||float64||. What has the type of x is rounded to it, by 2^-9 at most in
# bfloat16, and 2^-8 by triton's interpreter, which cuts off instead; parameters' gradients and
# statistics are float32 sums, from the same x.
ROUNDED = ("y", "dL/dx")
TOLERANCES = {
    "float32": {"rounded": 1e-5, "summed": 1e-5},
    "bfloat16": {"rounded": 4e-3, "summed": 1e-5},
}


def rows(rehearsal: bool) -> Iterator[Row]:
    """Yield for each kernel and type the largest error of outputs, gradients and state.

    `errors` are relative in the L2 norm, the largest over shapes, with padding (whose content is
    NaN where it must not matter) and without, and over steps. `repeats`: whether the same step
    twice gave the same bits. `passed`: all errors are within their tolerance, and `repeats`.
    `failure`: the error that a kernel raised, if it did.
    """
    cases = [(case, dtype) for dtype in DTYPES for case in CASES]
    # Nearly all of the time kernels are being compiled, some hundred of them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(cases), os.cpu_count() or 1), mp_context=context) as pool:
        yield from pool.map(check, *zip(*cases, strict=True), repeat(rehearsal))


def check(case: str, dtype: str, rehearsal: bool) -> Row:
    """One of `rows`."""
    row: Row = {"kernel": case, "dtype": dtype, "failure": ""}
    errors: dict[str, float] = {}
    repeats = True
    try:
        for shape in REHEARSED_SHAPES if rehearsal else SHAPES:
            for masked in (True,) if rehearsal else (True, False):
                found, same = compare(case, DTYPES[dtype], shape, masked)
                errors = {name: max(found[name], errors.get(name, 0.0)) for name in found}
                repeats = repeats and same
    except Exception as error:  # whatever triton raises
        row["failure"] = one_line(error)
    bounds = TOLERANCES[dtype]
    tolerances = {name: bounds["rounded" if name in ROUNDED else "summed"] for name in errors}
    within = all(errors[name] <= tolerances[name] for name in errors)
    return row | {
        "errors": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "tolerances": tolerances,
        "repeats": repeats,
        "passed": within and repeats and not row["failure"],
    }


def compare(
    case: str, dtype: torch.dtype, shape: tuple[int, int, int], masked: bool
) -> tuple[dict[str, float], bool]:
    """Largest relative errors over STEPS steps, and whether each step repeats to the bit."""
    name, options = CASES[case]
    if name == "power_released":
        options = {**options, "num_groups": 4}
    torch.manual_seed(1)
    norm = build_norm(name, shape[-1], **options)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    norm = norm.to(device())
    exact = copy.deepcopy(norm).double()
    errors: dict[str, float] = {}
    repeats = True
    for _ in range(STEPS):
        x, gradient, padding_mask = _inputs(name, dtype, shape, masked)
        again = copy.deepcopy(norm)
        obtained = _step(norm, x, gradient, padding_mask, "triton")
        same = _step(again, x, gradient, padding_mask, "triton")
        repeats = repeats and all(map(torch.equal, obtained.values(), same.values()))
        expected = _step(exact, x.double(), gradient.double(), padding_mask, "plain")
        for key, value in expected.items():
            error = _relative_error(obtained[key], value)
            errors[key] = max(error, errors.get(key, 0.0))
    return errors, repeats


def _inputs(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int], masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    times, batch, channels = shape
    spread = torch.rand(channels, device=device()) + 0.5
    x = (torch.randn(shape, device=device()) * spread + torch.randn_like(spread)).to(dtype)
    gradient = torch.randn(shape, device=device()).to(dtype)
    if not masked:
        return x, gradient, None
    mask = torch.rand(batch, times, device=device()) < 0.3
    if name != "power_released":  # where padding counts
        x[mask.t()] = gradient[mask.t()] = float("nan")
    return x, gradient, mask


def _step(
    norm: nn.Module, x: Tensor, gradient: Tensor, padding_mask: Tensor | None, kernels: str
) -> dict[str, Tensor]:
    use_kernels(kernels)
    leaf = x.clone().requires_grad_()
    y = norm(leaf, padding_mask)
    if norm.kernels != kernels:
        raise RuntimeError(f"{norm.kernels} kernels computed, not {kernels}")
    names = ("dL/dx", "dL/dw", "dL/db")
    outputs, upstream = [y], [gradient]
    if hasattr(norm, "penalty"):  # whose gradient reaches the batch's statistics
        outputs.append(norm.penalty())
        upstream.append(torch.ones_like(outputs[1]))
    gradients = torch.autograd.grad(outputs, [leaf, norm.weight, norm.bias], upstream)
    state = {key: buffer.clone() for key, buffer in norm.named_buffers()}
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True)), **state}


def _relative_error(obtained: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    size = float(expected.norm())
    return float((obtained.double() - expected).norm()) / (size or 1.0)
