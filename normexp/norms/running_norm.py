"""What all layers with running statistics share: parameters, state and its rules."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normexp.norms.compilation import eager
from normexp.norms.core import option_checks
from normexp.norms.core.masking import check_input, flatten_tokens, zero_padding_
from normexp.norms.core.replay_cache import RecentForwards, recomputing
from normexp.norms.distributed.collectives import several_ranks, warn_of_private_statistics
from normexp.norms.distributed.deferred import EXCHANGE
from normexp.norms.kernels import native, triton
from normexp.norms.kernels.choice import chosen_kernels

_HALF = (torch.float16, torch.bfloat16)
_NATIVE_TYPES = (torch.float32, torch.float64, torch.bfloat16)
NATIVE_SOURCES = Path(__file__).parent / "kernels" / "cpp"


class RunningNorm(nn.Module):
    """Base of the layers that keep statistics of past batches.

    The state obeys these rules in every such layer:

    - Each forward in training mode is one step of the running statistics and each backward one of
      what a layer averages in backward, also when gradients are accumulated over several batches.
      Warm-ups therefore count forwards, not updates.
    - A forward repeated by activation checkpointing uses the statistics of the forward that it
      repeats and changes nothing.
    - In eval mode nothing changes. Parameters that are frozen (requires_grad_(False)) do not freeze
      the statistics; eval mode of the layer does.
    - A batch without a real token changes nothing. Neither does one whose statistics are not
      finite: its outputs show it, `rejected` counts it (passes forward and backward), and a
      UserWarning tells at the next switch from training to eval mode.
    - Statistics are computed in float32 at least and kept in float32, also in a model converted by
      .half() or .bfloat16(); .double() converts them.
    - Data parallel: with sync=True statistics are those of the tokens of all ranks, and gradients
      those of the sum of the ranks' losses; with sync=False each rank keeps its own, and a
      UserWarning says so.
    - torch.compile: inference compiles without graph breaks. Training runs the layer outside the
      graph, with the same results, because compiled code could not tell a repeated forward.

    - Training steps are computed by a kernel compiled for the CPU (kernels/native.py) or by Triton
      on a GPU (kernels/triton), where the layer has one and it can be had, else by torch's
      operations: the same up to rounding.
      Statistics of several ranks are left to torch but for PN's after its warm-up, and so is
      inference. `kernels` tells what computed the last forward in training mode.

    Subclasses offer `_normalize` (training) and `inference_affine`, and where they name a
    `native_source`, `_kernel_step`.
    """

    native_source: ClassVar[Path | None] = None
    averages_of_gradients: ClassVar[tuple[str, ...]] = ()  # buffers in the unit of the loss

    def __init__(self, num_features: int, eps: float, sync: bool = False):
        super().__init__()
        option_checks.positive(eps=eps)
        option_checks.flag(sync=sync)
        self.num_features, self.eps, self.sync = num_features, eps, sync
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.long), persistent=False)
        self._recent = RecentForwards()
        self._rejected_told = 0
        self.kernels: str | None = None

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """As in torch, but in float32 where half precision is torch's default."""
        super().register_buffer(
            name, tensor.float() if tensor.dtype in _HALF else tensor, persistent
        )

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C), mask (B, T) or (N,) -> y like x.

        What stands at padded positions of y is of no account. Raises ValueError on unfit shapes
        or masks.
        """
        if self.training:
            return self._train_step(x, padding_mask)
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        return self._infer(tokens, real).to(x.dtype).reshape(x.shape)

    @eager
    def _train_step(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        check_input(x, padding_mask, self.num_features)
        if not self.sync and several_ranks():
            warn_of_private_statistics()
        kernels = self._kernels_for(x)
        if self.sync and several_ranks():
            y = self._step_of_ranks(kernels, x, padding_mask)
            if y is not None:
                return y
            kernels = "plain"
        self._computed_by(kernels)
        if kernels != "plain":
            return self._kernel_step(operators(kernels), x.contiguous(), padding_mask)
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        return self._normalize(tokens, real).to(x.dtype).reshape(x.shape)

    def _step_of_ranks(self, kernels: str, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """Training with synchronized statistics by kernels; None: plain torch has to do it."""
        return None

    def _computed_by(self, kernels: str) -> None:
        if kernels != self.kernels:  # torch makes setting an attribute slow
            self.kernels = kernels

    def _kernels_for(self, x: Tensor) -> str:
        if (
            self.native_source is None
            or type(x) not in (Tensor, nn.Parameter)  # subclasses may have no memory to read
            or self.weight.dtype == torch.float16
        ):
            return "plain"
        # On a CPU triton only interprets its kernels, for tests.
        if x.is_cuda or (x.device.type == "cpu" and chosen_kernels() == "triton"):
            return "triton" if triton.load() else "plain"
        runs_native = x.device.type == "cpu" and x.dtype in _NATIVE_TYPES
        return "native" if runs_native and native.load(self.native_source) else "plain"

    def _kernel_step(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Training, by operators of one signature in C++ and Triton; x as in `forward`, contiguous.

        Returns y like x.
        """
        raise NotImplementedError

    def _recalled(self, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """What a kernel took from the state in the forward that this one repeats, if it does."""
        return self._recent.recall(self._squares(x, padding_mask))[0] if recomputing() else None

    def _squares(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Sums (C,) by which a repeated forward is recognised."""
        tokens, real = flatten_tokens(x.detach(), padding_mask, self.num_features)
        return zero_padding_(self._scaled(tokens).square(), real).sum(0)

    def _scaled(self, tokens: Tensor) -> Tensor:
        """What the layer takes the squares of, by which a repeated forward is recognised."""
        return tokens

    def _normalize(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Training: tokens (T*B, C), real (T*B, 1) bool or None -> (T*B, C)."""
        raise NotImplementedError

    def _infer(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        scale, shift = self.inference_affine()
        return torch.addcmul(shift.to(tokens.dtype), tokens, scale)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,): what the layer is at inference, y = x * scale + shift."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        raise NotImplementedError

    def retained(self, first: Tensor, last: Tensor) -> Tensor | None:
        """Weight that running statistics after `first` steps have in those after `last` steps.

        For diagnostics. first, last: scalars, counts as in `step`. The rest of the weight, up to 1,
        is the batches' in between. None where a layer does not tell.
        """
        return None

    @torch.no_grad()
    def _usable(self, n: Tensor, *statistics: Tensor) -> Tensor:
        """Whether a batch of n real tokens with these statistics may change the state.

        A bool scalar on the device; counts the batch in `rejected` if it is not finite.
        """
        # What is finite in float64 may not be so in the buffers' float32.
        dtype = next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())
        finite = torch.stack([value.to(dtype).isfinite().all() for value in statistics]).all()
        self.rejected += (n > 0) & ~finite
        return (n > 0) & finite

    def train(self, mode: bool = True) -> "RunningNorm":
        """Switch to training or eval mode; on leaving training, tell of rejected batches."""
        EXCHANGE.settle()
        if self.training and not mode and not self.rejected.is_meta:
            rejected = int(self.rejected)
            if rejected > self._rejected_told:
                warnings.warn(
                    f"{self}: the statistics of {rejected - self._rejected_told} passes were not "
                    "finite and have been left out of the running ones",
                    stacklevel=2,
                )
            self._rejected_told = rejected
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        EXCHANGE.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        EXCHANGE.settle()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningNorm":
        EXCHANGE.settle()
        # With eight bits of mantissa a running average would stand still: its steps are too small.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype in _HALF:
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        EXCHANGE.settle()
        super()._load_from_state_dict(*args, **kwargs)
        # Not part of a checkpoint, and without content in a layer that was built on "meta".
        self.rejected = torch.zeros_like(self.step)
        self._rejected_told = 0

    def extra_repr(self) -> str:
        options = list(inspect.signature(type(self)).parameters)[1:]
        shown = [str(self.num_features), *(f"{o}={getattr(self, o)}" for o in options)]
        if self.kernels:
            shown.append(f"kernels={self.kernels}")
        return ", ".join(shown)


def operators(kernels: str) -> Any:
    """The namespace of a kernel's operators; kernels: native or triton."""
    return triton.operators() if kernels == "triton" else torch.ops.normexp
