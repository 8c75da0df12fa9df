"""Saving and loading in mid-training, for every registered normalization."""

from pathlib import Path

import pytest
import torch
from support.batches import C, quick_options, random_batch
from support.norm_steps import penalty_of

from normexp.norms import available_norms, build_norm


def train(norm: torch.nn.Module, seeds: range) -> torch.Tensor:
    for seed in seeds:
        batch = random_batch(5, 3, seed)
        y = norm(torch.from_numpy(batch.x).requires_grad_(), torch.from_numpy(batch.pad))
        (y.sin().sum() + penalty_of(norm)).backward()
    return y.detach()


@pytest.mark.parametrize("saved_at", [1, 3, 5])
@pytest.mark.parametrize("name", available_norms())
def test_state_survives_saving(name: str, saved_at: int, tmp_path: Path) -> None:
    """Some steps, save, load into a new layer, the rest: as six steps in a row, bit by bit."""
    options = quick_options(name)
    straight, first = (build_norm(name, C, **options).double() for _ in range(2))
    expected = train(straight, range(6))
    train(first, range(saved_at))
    torch.save(first.state_dict(), tmp_path / "norm.pt")
    second = build_norm(name, C, **options).double()
    second.load_state_dict(torch.load(tmp_path / "norm.pt", weights_only=True))
    assert torch.equal(train(second, range(saved_at, 6)), expected)
    for what, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[what]), what
    assert "step" not in straight.state_dict() or straight.step == 6
