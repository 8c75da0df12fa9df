"""The layers' equations as torch.compile would have them: peers of the hand-written kernels.

A layer in training runs outside compiled graphs (norms/running_norm.py), so compiling it measures
nothing. Here are the same equations without what stands in the compiler's way: no recomputation,
no ranks, no counting of broken batches, and of the layers with a warm-up only what follows it,
where the branch is known. So these are, if anything, faster than a layer that can do the rest.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiled_layers(backend: str = "inductor") -> dict[str, Callable[[int], nn.Module]]:
    """Builders of the peers by the name of the layer of ours; each takes the number of channels.

    The modules take x (T, B, C) and padding_mask (B, T), as the layers do, and have parameters
    and statistics of the same names. backend: torch.compile's.
    """

    def builder(layer: type["_Compiled"]) -> Callable[[int], nn.Module]:
        return lambda channels: layer(channels, backend)

    return {
        "power": builder(Power),
        "power_v": builder(PowerV),
        "batch": builder(Batch),
        "power_released": builder(PowerReleased),
    }


class _Compiled(nn.Module):
    eps = 1e-5

    def __init__(self, channels: int, backend: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.backend = backend

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False)


class PowerV(_Compiled):
    """PN-V; its gradient is the one that the compiler derives."""

    alpha = 0.9

    def __init__(self, channels: int, backend: str):
        super().__init__(channels, backend)
        self.register_buffer("running_psi2", torch.ones(channels))
        self._function = self._compile(self._step)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x (T, B, C) -> y like x."""
        return self._function(x, padding_mask)

    def _step(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        rows = x.float()
        psi2 = _token_mean(rows.square(), padding_mask)
        with torch.no_grad():
            self.running_psi2.lerp_(psi2, 1 - self.alpha)
        y = rows * torch.rsqrt(psi2 + self.eps) * self.weight + self.bias
        return _zero_padding(y, padding_mask).to(x.dtype)


class Batch(_Compiled):
    """Masked BN; its gradient is the one that the compiler derives."""

    momentum = 0.05

    def __init__(self, channels: int, backend: str):
        super().__init__(channels, backend)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._function = self._compile(self._step)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x (T, B, C) -> y like x."""
        return self._function(x, padding_mask)

    def _step(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        rows = x.float()
        mean = _token_mean(rows, padding_mask)
        centered = rows - mean
        var = _token_mean(centered.square(), padding_mask)
        with torch.no_grad():
            n = (~padding_mask).sum()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        y = centered * torch.rsqrt(var + self.eps) * self.weight + self.bias
        return _zero_padding(y, padding_mask).to(x.dtype)


class Power(_Compiled):
    """PN past its warm-up. Forward and backward are compiled apart: they are not derivatives."""

    alpha_fwd = alpha_bwd = 0.9

    def __init__(self, channels: int, backend: str):
        super().__init__(channels, backend)
        self.register_buffer("running_psi2", torch.ones(channels))
        self.register_buffer("nu", torch.zeros(channels))
        self.first, self.second = self._compile(self._forward), self._compile(self._backward)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x (T, B, C) -> y like x."""
        return _Apart.apply(x, self.weight, self.bias, padding_mask, self)

    def _forward(self, x: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
        rows = x.float()
        inverse = torch.rsqrt(self.running_psi2 + self.eps)
        psi2_batch = _token_mean(rows.square(), padding_mask)
        gamma = psi2_batch * inverse.square()
        self.running_psi2.lerp_(psi2_batch, 1 - self.alpha_fwd)
        y = _zero_padding(rows * (inverse * self.weight) + self.bias, padding_mask)
        return y.to(x.dtype), inverse, gamma

    def _backward(
        self, gradient: Tensor, x: Tensor, padding_mask: Tensor, inverse: Tensor, gamma: Tensor
    ) -> tuple[Tensor, ...]:
        x_hat = _zero_padding(x.float() * inverse, padding_mask)
        given = _zero_padding(gradient.float(), padding_mask)
        d_x = (given * self.weight - self.nu * x_hat) * inverse
        d_weight, d_bias = (given * x_hat).sum((0, 1)), given.sum((0, 1))
        rate = 1 - self.alpha_bwd
        lambda_ = d_weight * self.weight / (~padding_mask).sum()
        self.nu.copy_(self.nu * (1 - rate * gamma) + rate * lambda_)
        return d_x.to(x.dtype), d_weight, d_bias


class PowerReleased(_Compiled):
    """PN as released, 4 groups, past its warm-up; forward and backward compiled apart."""

    alpha_fwd = alpha_bwd = 0.9
    num_groups = 4

    def __init__(self, channels: int, backend: str):
        super().__init__(channels, backend)
        self.register_buffer("running_psi2", torch.ones(channels))
        self.register_buffer("e", torch.zeros(channels))
        self.first, self.second = self._compile(self._forward), self._compile(self._backward)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x (T, B, C) -> y like x."""
        return _Apart.apply(x, self.weight, self.bias, padding_mask, self)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after group scaling, by group, and what they were multiplied by."""
        by_group = x.float().unflatten(-1, (self.num_groups, -1))
        r = torch.rsqrt(by_group.square().mean(-1, keepdim=True) + self.eps)
        return by_group * r, r

    def _forward(self, x: Tensor, padding_mask: Tensor) -> tuple[Tensor, ...]:
        scaled = self._scaled(x)[0].flatten(-2)
        inverse = torch.rsqrt(self.running_psi2 + self.eps)
        psi2_batch = _token_mean(scaled.square(), padding_mask)
        batch_inverse = torch.rsqrt(psi2_batch + self.eps)
        self.running_psi2.lerp_(psi2_batch, 1 - self.alpha_fwd)
        y = scaled * (inverse * self.weight) + self.bias
        return y.to(x.dtype), inverse, batch_inverse

    def _backward(
        self,
        gradient: Tensor,
        x: Tensor,
        padding_mask: Tensor,
        inverse: Tensor,
        batch_inverse: Tensor,
    ) -> tuple[Tensor, ...]:
        by_group, r = self._scaled(x)
        x_hat, given = by_group.flatten(-2) * inverse, gradient.float()
        d_weight, d_bias = (given * x_hat).sum((0, 1)), given.sum((0, 1))
        factor = (1 - self.alpha_bwd) * self.e
        x_tilde = given * self.weight - factor * x_hat
        self.e.add_((x_tilde * x_hat).mean((0, 1)))
        d_scaled = (x_tilde * batch_inverse).unflatten(-1, (self.num_groups, -1))
        d_x = r * (d_scaled - by_group * (d_scaled * by_group).mean(-1, keepdim=True))
        return d_x.flatten(-2).to(x.dtype), d_weight, d_bias


class _Apart(torch.autograd.Function):
    """y by the layer's compiled `first`, gradients by its compiled `second`, which sees both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding_mask: Tensor, layer: Any
    ) -> Tensor:
        y, *saved = layer.first(x, padding_mask)
        ctx.save_for_backward(x, padding_mask, *saved)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            d_x, d_weight, d_bias = ctx.layer.second(gradient, *ctx.saved_tensors)
        return d_x, d_weight, d_bias, None, None


def _zero_padding(values: Tensor, padding_mask: Tensor) -> Tensor:
    return torch.where(padding_mask.t().unsqueeze(-1), 0.0, values)


def _token_mean(values: Tensor, padding_mask: Tensor) -> Tensor:
    """Mean (C,) of values (T, B, C) over the positions that are not padding."""
    return _zero_padding(values, padding_mask).sum((0, 1)) / (~padding_mask).sum()
