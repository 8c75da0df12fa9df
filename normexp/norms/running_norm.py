"""Base of all layers with running statistics: parameters, state, and the rules of the state."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normexp.norms.core.masking import (
    check_input,
    flatten_tokens,
    list_of_tokens,
    mask_padding_,
    refusal,
)
from normexp.norms.core.option_checks import check_flag, check_positive
from normexp.norms.core.replay_cache import ReplayCache, in_recomputation
from normexp.norms.core.start import put_to_start
from normexp.norms.distributed.collectives import several_ranks, warn_of_private_statistics
from normexp.norms.distributed.deferred import DEFERRED
from normexp.norms.distributed.same_layer import next_place
from normexp.norms.kernels.dispatch import operators_for, runs_native

_HALF = (torch.float16, torch.bfloat16)


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # new in PyTorch 2.7
_WHY_NO_PROGRAM = (
    "a norm in training mode changes its statistics, which an exported or traced program cannot; "
    "call model.eval() before you export"
)


def _outside_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: run a method outside compiled graphs, as torch.compiler.disable does.

    Compiled code could not distinguish a forward from its recomputation by activation
    checkpointing. Decorating waits for the first call because it imports the compiler, which takes
    a second. Raises RuntimeError where the call is to become part of an exported program.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return method(*args)
        if _is_exporting():
            raise RuntimeError(_WHY_NO_PROGRAM)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args)

    return call


def _refuse_transforms() -> None:
    """Raise RuntimeError within torch.jit.trace and the transforms of torch.func."""
    if torch._C._is_tracing():
        raise RuntimeError(_WHY_NO_PROGRAM)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a norm in training mode changes its statistics, which torch.func's transforms (grad, "
            "vmap, jvp, ...) do not allow; call eval() of the model or of its norms, or use "
            "loss.backward() and torch.autograd.grad, which do"
        )


class RunningNorm(nn.Module):
    """Base of the layers that keep statistics of past batches.

    The state obeys these rules in every such layer:

    - Each forward in training mode is one step of the running statistics and each backward one of
      what a layer averages in backward, also when gradients are accumulated over several batches.
      Warm-ups therefore count forwards, not updates.
    - A forward repeated by activation checkpointing uses the statistics of the forward that it
      repeats and changes nothing.
    - In eval mode nothing changes. Parameters that are frozen (requires_grad_(False)) do not freeze
      the statistics; eval mode of the layer does, and so does `statistics_frozen` in training mode.
    - A batch without a real token changes nothing. Neither does one whose statistics are not
      finite: its outputs show it, `num_rejected` counts it (passes forward and backward), and a
      UserWarning reports the count at the next switch from training to eval mode.
    - Statistics are computed in float32 at least and kept in float32, also in a model converted by
      .half() or .bfloat16(); .double() converts them.
    - Data parallel: with sync=True statistics are those of the tokens of all ranks, and gradients
      those of the sum of the ranks' losses (every rank has to run the same layers: others than on
      the other ranks are a RuntimeError). Reading the state (`statistics`, `state_dict`, copies,
      inference) changes nothing, on whatever ranks it happens.
    - With sync=False each rank counts its own tokens, and a UserWarning says so. The statistics
      stay its own only under DistributedDataParallel(broadcast_buffers=False): torch's default
      replaces them by rank 0's before each forward. A checkpoint has those of the rank that writes
      it; torch.distributed.checkpoint, which takes equal keys for equal values, mixes the ranks'.
    - torch.compile: inference compiles without graph breaks. Training runs the layer outside the
      graph, with the same results. What cannot change a state, exported and traced programs and
      the transforms of torch.func, is refused in training mode.

    A training step has up to three implementations, the same up to rounding:

    - `_train_torch`, in torch's operations; every layer has it.
    - `_train_native` and `_train_kernel`, by a kernel, C++ on a CPU or Triton on a GPU (kernels/),
      where the layer names a `native_source` or has a Triton kernel and it is available. Not for
      statistics of several ranks.
    - `_train_deferred`, over several ranks without waiting for their sums: PN after its warm-up.

    `kernels` is the name of the one that ran last: plain, native or triton; None before the first
    forward in training mode. Inference is always torch's: subclasses offer `inference_affine`.
    """

    native_source: ClassVar[Path | None] = None  # the C++ file with the layer's kernel
    has_triton_kernel: ClassVar[bool] = False
    averages_of_gradients: ClassVar[tuple[str, ...]] = ()  # buffers in the unit of the loss

    def __init__(self, num_features: int, eps: float, sync: bool = False):
        super().__init__()
        check_positive(eps=eps)
        check_flag(sync=sync)
        self.num_features, self.eps, self.sync = num_features, eps, sync
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_rejected", torch.zeros((), dtype=torch.long), persistent=False)
        self.place = next_place()  # among the layers of this process
        self._replay_cache = ReplayCache()
        self._settled: tuple[object, dict[str, Tensor]] | None = None
        self._num_rejected_reported = 0
        self.kernels: str | None = None
        self._is_native_loaded = False  # in this process, as far as known
        self.is_frozen = False  # set by statistics_frozen

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """As in torch, but in float32 where half precision is torch's default."""
        super().register_buffer(
            name, tensor.float() if tensor.dtype in _HALF else tensor, persistent
        )

    # --- One forward

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C), padding_mask (B, T) or (N,), True = padding -> y like x.

        Other numbers of dimensions: see `check_input`. Values of y at padded positions are
        undefined. Raises ValueError on invalid shapes or masks, RuntimeError where activation
        checkpointing repeats a forward that is too long ago.
        """
        if self.training:
            return self._train_step(x, padding_mask)
        tokens, token_mask = flatten_tokens(x, padding_mask, self.num_features)
        return self._infer(tokens, token_mask).to(x.dtype).reshape(x.shape)

    @_outside_graphs
    def _train_step(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        _refuse_transforms()
        if self.is_frozen:
            return self._thrown_away()._train_step(x, padding_mask)
        among_ranks = several_ranks()
        if among_ranks and not self.sync:
            warn_of_private_statistics()
        if not among_ranks and DEFERRED.in_flight():
            DEFERRED.wait()  # of ranks that there were before
        if (
            not (among_ranks and self.sync)
            and x.dim() in (2, 3)
            and runs_native(self, x, self._is_native_loaded)
        ):
            try:
                y = self._train_native(x.contiguous(), padding_mask)
            except ValueError as error:
                raise refusal(error, x, padding_mask, self.num_features) from None
            if not self._is_native_loaded:
                self._is_native_loaded = True
            self._record_kernels("native")
            return y
        check_input(x, padding_mask, self.num_features)
        if x.dim() not in (2, 3):  # kernels know no other
            rows, mask = list_of_tokens(x, padding_mask)
            return self._train_step(rows, mask).reshape(x.shape)
        kernels, operators = operators_for(self, x)
        if self.sync and among_ranks:
            y = self._train_deferred(operators, x, padding_mask)
            if y is not None:
                self._record_kernels(kernels)
                return y
            # The kernels know nothing of ranks, and this step has to wait for the others.
            kernels, operators = "plain", None
        self._record_kernels(kernels)
        if operators is not None:
            return self._train_kernel(operators, x.contiguous(), padding_mask)
        tokens, token_mask = flatten_tokens(x, padding_mask, self.num_features)
        return self._train_torch(tokens, token_mask).to(x.dtype).reshape(x.shape)

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """Training in torch's operations: tokens (T*B, C), token_mask (T*B, 1) -> (T*B, C)."""
        raise NotImplementedError

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Training by a C++ kernel; x (T, B, C) or (N, C), contiguous. Returns y like x.

        Raises ValueError, before anything changes, where `check_input` would.
        """
        raise NotImplementedError

    def _train_kernel(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Training by Triton's operators; x as in `forward`, contiguous. Returns y like x."""
        raise NotImplementedError

    def _train_deferred(
        self, operators: Any, x: Tensor, padding_mask: Tensor | None
    ) -> Tensor | None:
        """Training over several ranks without waiting for them; None: this step has to wait."""
        return None

    def _infer(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """Inference: tokens (T*B, C), token_mask (T*B, 1) or None -> (T*B, C)."""
        scale, shift = self.inference_affine()
        return torch.addcmul(shift.to(tokens.dtype), tokens, scale)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift, each (C,): at inference the layer is y = x * scale + shift.

        Raises NotImplementedError in layers that do more than that.
        """
        raise NotImplementedError

    def _thrown_away(self) -> "RunningNorm":
        """This layer with a copy of its state, which whatever changes it leaves in the copy.

        Parameters are the same, and so are the forwards that a recomputation may have to repeat.
        """
        if self.sync and several_ranks():
            DEFERRED.flush()  # the copy is another layer, to which what is under way does not come
        other = copy.copy(self)
        other._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        other.is_frozen = False
        return other

    def _parameters_and(self, *names: str) -> list[Tensor]:
        """weight, bias and the buffers of these names.

        Reading them as attributes of an nn.Module would take half a microsecond each.
        """
        parameters, buffers = self._parameters, self._buffers
        if "weight" in parameters and "bias" in parameters:
            given = [parameters["weight"], parameters["bias"]]
        else:  # torch.nn.utils.parametrize makes properties of them
            given = [self.weight, self.bias]
        given += [buffers[name] for name in names]
        return given

    def _record_kernels(self, kernels: str) -> None:
        if kernels != self.kernels:  # torch makes setting an attribute slow
            self.kernels = kernels

    # --- Forwards repeated by activation checkpointing

    def _replayed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """What a kernel saved in the forward that this one repeats; None if this one is new."""
        if not in_recomputation():
            return None
        return self._replay_cache.replay(self._sum_sq(x, padding_mask))[0]

    def _sum_sq(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Sums of squares (C,) over the real tokens, by which a repeated forward is recognised."""
        tokens, token_mask = flatten_tokens(x.detach(), padding_mask, self.num_features)
        return mask_padding_(self._prescale(tokens).square(), token_mask).sum(0)

    def _prescale(self, tokens: Tensor) -> Tensor:
        """What the layer does to each token (T*B, C) before it takes statistics."""
        return tokens

    # --- State

    @torch.no_grad()
    def _is_finite_batch(self, n: Tensor, *statistics: Tensor) -> Tensor:
        """Whether a batch of n real tokens with these statistics may change the state.

        Returns a bool scalar on the device: n > 0 and every statistic is finite. Counts the batch
        in `num_rejected` where only the statistics are at fault.
        """
        # What is finite in float64 may not be so in the buffers' float32.
        dtype = next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())
        finite = torch.stack([value.to(dtype).isfinite().all() for value in statistics]).all()
        self.num_rejected += (n > 0) & ~finite
        return (n > 0) & finite

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Put the statistics and their step counter to their start; parameters stay.

        Named as in torch's batch norms. In data-parallel training: on all ranks at the same point.
        """
        if several_ranks():
            DEFERRED.flush()  # or what is under way would come to the new state
        put_to_start(self, self._buffers)
        self._state_replaced()

    def reset_parameters(self) -> None:
        """Put parameters and statistics to their start, as torch's batch norms do."""
        put_to_start(self, self._parameters)
        self.reset_running_stats()

    def _state_replaced(self) -> None:
        """Forget what has been derived from the state: another one has been put in its place."""
        self._num_rejected_reported = 0

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        raise NotImplementedError

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor | None:
        """Weight that running statistics after `first` steps have in those after `last` steps.

        For diagnostics. first, last: scalars, counts as in `step`. The rest of the weight, up to 1,
        is the batches' in between. None in layers that do not define it.
        """
        return None

    def train(self, mode: bool = True) -> "RunningNorm":
        """Switch to training or eval mode; leaving training, warn of rejected batches."""
        if self.training and not mode and not self.num_rejected.is_meta:
            num_rejected = int(self.settled("num_rejected"))
            unreported = num_rejected - self._num_rejected_reported
            if unreported > 0:
                warnings.warn(
                    f"{self}: the statistics of {unreported} passes were not finite and have been "
                    "left out of the running ones",
                    stacklevel=2,
                )
            self._num_rejected_reported = num_rejected
        return super().train(mode)

    def settled(self, name: str) -> Tensor:
        """The buffer of this name, or where sums over the ranks are under way, what it will be.

        PN leaves these to its next forward. A copy then, and the buffer itself otherwise.
        """
        if not DEFERRED.in_flight():
            return getattr(self, name)
        return self._settled_buffers()[name]

    @torch.no_grad()
    @torch.inference_mode(False)  # what is made in it would be of no use outside
    def _settled_buffers(self) -> dict[str, Tensor]:
        versions = [buffer._version for buffer in self._buffers.values()]
        if self._settled is None or self._settled[0] != (DEFERRED.num_launched, versions):
            copies = {name: buffer.clone() for name, buffer in self._buffers.items()}
            with self._other_buffers(copies):
                for use in DEFERRED.arrived(self):
                    use()
                settled = dict(self._buffers)
            self._settled = (DEFERRED.num_launched, versions), settled
        return self._settled[1]

    @contextmanager
    def _other_buffers(self, buffers: dict[str, Tensor]) -> Iterator[None]:
        before = dict(self._buffers)
        self._buffers.update(buffers)
        try:
            yield
        finally:
            self._buffers.update(before)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._other_buffers({name: self.settled(name) for name in self._buffers}):
            super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: self.settled(name) for name in self._buffers}
        fresh = {"_settled": None, "_is_native_loaded": False}
        return {**self.__dict__, "_buffers": buffers, **fresh}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningNorm":
        self._settled = None
        if self.num_rejected.is_meta and not self.step.is_meta:
            # Filled from a checkpoint, tensor by tensor, as accelerate does it.
            self.num_rejected = torch.zeros_like(self.step)
        # With eight bits of mantissa a running average would stand still: its steps are too small.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype in _HALF:
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        DEFERRED.wait()
        super()._load_from_state_dict(*args, **kwargs)
        # Not part of a checkpoint, and without content in a layer that was built on "meta".
        self.num_rejected = torch.zeros_like(self.step)
        self._state_replaced()

    def extra_repr(self) -> str:
        options = list(inspect.signature(type(self)).parameters)[1:]
        shown = [str(self.num_features), *(f"{o}={getattr(self, o)}" for o in options)]
        if self.kernels:
            shown.append(f"kernels={self.kernels}")
        return ", ".join(shown)
