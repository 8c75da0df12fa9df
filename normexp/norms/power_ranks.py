"""PN over several ranks after its warm-up, when neither y nor dL/dx waits for another rank.

Both are computed from the state of before the step. The kernels of a single rank compute them, on a
copy of the state that is thrown away; what they return of sums over the rank's tokens is posted to
`exchange`, and its totals move the true state on before the layer's next step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normexp.norms.core.averaging import average_
from normexp.norms.distributed.deferred import EXCHANGE


@dataclass
class _Iteration:
    """One forward and its backward; gamma and n of all ranks once they are known."""

    norm: Any
    n: Tensor | None = None
    gamma: Tensor | None = None

    @torch.no_grad()
    def finish_forward(self, total: Tensor) -> None:
        self.n = total[-1]
        psi2_batch = total[:-1] / self.n.clamp(min=1)
        # The state is still that of the forward: the next one first completes the exchange.
        self.gamma = psi2_batch / (self.norm.running_psi2 + self.norm.eps)
        usable = self.norm._usable(self.n, psi2_batch)
        average_(self.norm.running_psi2, psi2_batch, 1 - self.norm.alpha_fwd, usable)
        self.norm.step += usable

    @torch.no_grad()
    def finish_backward(self, total: Tensor) -> None:
        self.norm._advance_nu(total / self.n.clamp(min=1), self.gamma, self.n)


def step_of_ranks(
    norm: Any, operators: Any, x: Tensor, padding_mask: Tensor | None, again: tuple | None
) -> Tensor:
    """One iteration of a PowerNorm past its warm-up, x (T, B, C) or (N, C), contiguous -> y.

    again: what `norm` remembers of the forward that this one repeats. nu advances in backward
    passes that reach the layer's weight, as those of `.backward()` do.
    """
    taken, iteration = again or (None, None)
    nu = norm.nu.clone()
    copies = norm.running_psi2.clone(), nu, norm.step.clone(), norm.rejected.clone()
    weight = norm.weight if norm.weight.requires_grad else norm.weight.detach().requires_grad_()
    # In bfloat16 its gradient, of which nu is made, would have eight bits. Never the parameter
    # itself: a hook on it would stay.
    weight = weight.float() if weight.dtype == torch.bfloat16 else weight.view_as(weight)
    y, squares, taken = operators.power(
        *(x, padding_mask, weight, norm.bias, *copies, taken),
        *(norm.eps, norm.alpha_fwd, norm.alpha_bwd, 0, norm.bound_nu),
    )
    if iteration is None:
        iteration = _Iteration(norm)
        sums = torch.cat([squares, taken[-1:].to(squares.dtype)])
        EXCHANGE.post((norm, "psi2"), sums, iteration.finish_forward)
        norm._recent_of_ranks.remember(squares, taken, iteration)
    if y.requires_grad:

        def before_backward(_: Tensor) -> None:
            if EXCHANGE.owes((norm, "nu")):  # another backward of this layer has come before
                EXCHANGE.complete()
            nu.copy_(norm.nu)

        def after_backward(d_weight: Tensor) -> None:
            products = d_weight.detach() * weight.detach()
            EXCHANGE.post((norm, "nu"), products, iteration.finish_backward)

        y.register_hook(before_backward)
        weight.register_hook(after_backward)
    return y
