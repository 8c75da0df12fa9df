"""PN as the authors' released code computes it, which is not Algorithm 2."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.averaging import average_
from normexp.norms.core.masking import mask_padding_, num_tokens
from normexp.norms.core.option_checks import check_count, check_decay, check_groups
from normexp.norms.core.replay_cache import in_recomputation, may_be_repeated
from normexp.norms.distributed.collectives import pooled_mean
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm


@register_norm("power_released")
class PowerNormReleased(RunningNorm):
    """PN as in the authors' released code.

    Equal to recorded outputs of their layer to 1e-9 in float64 (tests/norms/test_golden.py).
    It departs from Algorithm 2 (`power`) as follows; s is the step, counted from 1:
    1. Group scaling first: x <- x / sqrt(mean(x^2 over the C/G channels of its group) + eps) per
       token and group, in training and inference; the gradient flows through it.
    2. While s <= warmup_steps, x_hat = x / sqrt(psi2_B + eps) and no gradient flows through
       psi2_B. While s < warmup_steps the running statistic is first set to the cumulative mean,
       psi2 <- psi2 (s - 1) / s + psi2_B / s; the exponential average with alpha_fwd follows in
       every step, so early steps count twice.
    3. Backward divides by sqrt(psi2_B + eps), the batch's, also after warm-up.
    4. nu is kept as e = nu / (1 - alpha_bwd): x_tilde = g - (1 - alpha_bwd) e x_hat,
       e <- e + mean(x_tilde x_hat), the mean over all T*B positions, padding included.
    5. Statistics are each worker's own; sync=True is not what was released.

    Because of 4 padded positions influence e, and parameter gradients count them, so training
    depends on how batches are padded. In a batch of padding only the running statistic divides
    forward and backward, and nothing corrects the gradient. RunningNorm lists the rules of the
    state.

    Reference: normexp/norms/reference/power_released.py
    Proof: pytest tests/norms/test_references.py -k "power_released]"
    Number: no training run of it is recorded
    """

    native_source = NATIVE_SOURCES / "power_released.cpp"
    has_triton_kernel = True
    averages_of_gradients = ("e",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_steps: int = 10000,
        num_groups: int = 1,
        sync: bool = False,
    ):
        super().__init__(num_features, eps, sync)
        check_decay(alpha_fwd=alpha_fwd, alpha_bwd=alpha_bwd)
        check_count(warmup_steps=warmup_steps)
        check_groups(num_features, num_groups)
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps, self.num_groups = warmup_steps, num_groups
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("e", torch.zeros(num_features))

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        function = PowerNormReleasedFunction
        return function.apply(tokens, self.weight, self.bias, token_mask, self)

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if may_be_repeated():
            return self._train_kernel(torch.ops.normexp, x, padding_mask)
        return native_operator("power_released_once")(
            x,
            padding_mask,
            *self._parameters_and("running_psi2", "e", "step", "num_rejected"),
            *(self.num_groups, self.eps, self.alpha_fwd, self.alpha_bwd, self.warmup_steps),
        )

    def _train_kernel(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        replayed = self._replayed(x, padding_mask)
        y, sum_sq, saved = operators.power_released(
            x,
            padding_mask,
            *self._parameters_and("running_psi2", "e", "step", "num_rejected"),
            replayed,
            *(self.num_groups, self.eps, self.alpha_fwd, self.alpha_bwd, self.warmup_steps),
        )
        if replayed is None:
            self._replay_cache.store(sum_sq, saved)
        return y

    @torch.no_grad()
    def _step(self, sum_sq: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """psi2 to divide by, psi2_B, N of all ranks; advances psi2 and the step.

        sum_sq (C,): sums of squares over the rank's n real tokens, after group scaling.
        """
        if in_recomputation():
            return self._replay_cache.replay(sum_sq)
        psi2_batch, n = pooled_mean(sum_sq, n, self.sync, self)
        step = self.step + 1
        running = self.running_psi2
        psi2_batch = torch.where(n > 0, psi2_batch, running.to(sum_sq.dtype))
        psi2 = torch.where(step <= self.warmup_steps, psi2_batch, running.to(sum_sq.dtype))
        self._replay_cache.store(sum_sq, psi2, psi2_batch, n)
        usable = self._is_finite_batch(n, psi2_batch)
        # One division, in the dtype of psi2: (step - 1) / step by itself would be float32.
        cumulative = (running * (step - 1) + psi2_batch) / step
        running.copy_(torch.where(usable & (step < self.warmup_steps), cumulative, running))
        average_(running, psi2_batch, 1 - self.alpha_fwd, usable)
        self.step += usable
        return psi2, psi2_batch, n

    def _step_backward(self, products: Tensor, sum_sq: Tensor, n: Tensor, positions: int) -> Tensor:
        """(1 - alpha_bwd) e, the factor of x_hat in x_tilde; advances e.

        products, sum_sq (C,): sums of g x_hat and x_hat^2 over the rank's positions.
        """
        factor = (1 - self.alpha_bwd) * self.e.to(products.dtype)
        partial_sums = products - factor * sum_sq
        mean, _ = pooled_mean(partial_sums, partial_sums.new_full((), positions), self.sync)
        e = self.e + mean
        self.e.copy_(torch.where(self._is_finite_batch(n, e), e, self.e))
        return torch.where(n > 0, factor, 0.0)

    def _infer(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        scale = torch.rsqrt(self.running_psi2 + self.eps) * self.weight
        return self._prescale(tokens) * scale + self.bias

    def _prescale(self, tokens: Tensor) -> Tensor:
        """The group scaling."""
        groups = tokens.unflatten(1, (self.num_groups, -1))
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(1)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics; nu in Algorithm 2's scale."""
        return {"psi2": self.running_psi2, "nu": (1 - self.alpha_bwd) * self.e}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        # Before the exponential average a step s < warmup_steps keeps (s - 1) / s; these cancel.
        cumulative = last.clamp(max=self.warmup_steps - 1).maximum(first)
        # Nothing is left of the initial values if there was such a step, and all if there was none.
        share = torch.where(cumulative > first, first / cumulative.clamp(min=1), 1.0)
        return share * self.alpha_fwd ** (last - first)


class PowerNormReleasedFunction(torch.autograd.Function):
    """x -> y; backward divides by the batch's statistic and drives `e` to cancel Lambda.

    The gradient of the group scaling xg = x r, r = 1 / sqrt(mean_group(x^2) + eps), is
    dL/dx = r (d - xg mean_group(d xg)),  d = dL/dxg.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        token_mask: Tensor | None,
        norm: PowerNormReleased,
    ) -> Tensor:
        buf = tokens.square()
        by_group = buf.unflatten(1, (norm.num_groups, -1))
        r = torch.rsqrt(by_group.mean(-1, keepdim=True) + norm.eps)  # (N, G, 1)
        scaled = (tokens.unflatten(1, (norm.num_groups, -1)) * r).flatten(1)
        torch.mul(scaled, scaled, out=buf)
        sum_sq = buf.sum(0)
        token_sum_sq = sum_sq if token_mask is None else mask_padding_(buf, token_mask).sum(0)
        psi2, psi2_batch, n = norm._step(token_sum_sq, num_tokens(tokens, token_mask))
        inverse, batch_inverse = (torch.rsqrt(p + norm.eps) for p in (psi2, psi2_batch))
        ctx.save_for_backward(scaled, r, weight, inverse, batch_inverse, sum_sq, n)
        ctx.norm = norm
        return torch.addcmul(bias.to(tokens.dtype), scaled, inverse * weight, out=buf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, r, weight, inverse, batch_inverse, sum_sq, n = ctx.saved_tensors
        buf = gradient * scaled
        d_weight = buf.sum(0) * inverse
        d_bias = gradient.sum(0)
        factor = ctx.norm._step_backward(
            d_weight * weight, sum_sq * inverse.square(), n, len(scaled)
        )
        d_scaled = gradient * (weight * batch_inverse)
        d_scaled.addcmul_(scaled, factor * inverse * batch_inverse, value=-1)
        torch.mul(d_scaled, scaled, out=buf)
        by_group = (ctx.norm.num_groups, -1)
        mean = buf.unflatten(1, by_group).mean(-1, keepdim=True)
        d_tokens = d_scaled.unflatten(1, by_group)
        d_tokens.addcmul_(scaled.unflatten(1, by_group), mean, value=-1).mul_(r)
        types = weight.dtype
        return d_tokens.flatten(1), d_weight.to(types), d_bias.to(types), None, None
