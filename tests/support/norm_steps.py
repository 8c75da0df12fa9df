"""A layer driven step by step with numpy arrays, as the references are."""

import numpy as np
import torch

from normexp.norms import build_norm
from normexp.norms.reference import Step


def penalty_of(norm: torch.nn.Module) -> torch.Tensor:
    """What the last forward in training adds to the loss; zero for layers without a penalty."""
    return norm.penalty() if hasattr(norm, "penalty") else torch.zeros(())


class LayerSteps:
    """`norm` in float64; parameters are views that may be written to."""

    def __init__(self, name: str, num_features: int, **options: object):
        self.norm = build_norm(name, num_features, **options).double()
        self.parameters = {n: p.detach().numpy() for n, p in self.norm.named_parameters()}

    def train_step(self, x: np.ndarray, pad: np.ndarray, gy: np.ndarray) -> Step:
        """One forward and one backward of sum(gy * y) + penalty in training mode."""
        leaf = torch.from_numpy(x.copy()).requires_grad_()
        self.norm.train().zero_grad()
        y = self.norm(leaf, torch.from_numpy(pad))
        penalty = penalty_of(self.norm)
        loss = (y * torch.from_numpy(gy)).sum() + penalty
        loss.backward()
        gradients = {n: p.grad.numpy().copy() for n, p in self.norm.named_parameters()}
        return Step(y.detach().numpy(), leaf.grad.numpy(), gradients, penalty.item())

    def infer(self, x: np.ndarray, pad: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.norm.eval()(torch.from_numpy(x), torch.from_numpy(pad)).numpy()

    def state(self) -> dict[str, np.ndarray]:
        return {n: b.numpy().copy() for n, b in self.norm.named_buffers()}
