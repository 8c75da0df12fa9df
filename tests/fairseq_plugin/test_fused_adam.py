"""normexp_adam takes the steps of fairseq's adam, also after a checkpoint."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from fairseq import optim
from omegaconf import DictConfig
from torch import nn


def _optimizer(config: Callable[..., DictConfig], name: str, module: nn.Module) -> Any:
    node = {"_name": name, "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-3, "weight_decay": 0.1}
    made = config(optimizer=node, optimization={"lr": [0.01]})
    made.optimizer.lr = [0.01]
    return optim.build_optimizer(made.optimizer, list(module.parameters()))


def _step(module: nn.Module, optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.set_lr(0.01 / (1 + step))
    optimizer.zero_grad()
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    optimizer.multiply_grads(1e-3)  # so that the large epsilon counts
    optimizer.step()


def test_equals_fairseqs_adam(structured_config: Callable[..., DictConfig]) -> None:
    torch.manual_seed(1)
    start = copy.deepcopy(nn.Linear(7, 5).double().state_dict())
    modules = {}
    for name in ("adam", "normexp_adam"):
        modules[name] = module = nn.Linear(7, 5).double()
        module.load_state_dict(start)
        optimizer = _optimizer(structured_config, name, module)
        for step in range(12):
            if step == 6:  # as after a checkpoint
                state = optimizer.state_dict()
                optimizer = _optimizer(structured_config, name, module)
                optimizer.load_state_dict(state, {"lr": 0.01, "eps": 1e-3})
            _step(module, optimizer, step)
    for expected, got in zip(*(module.parameters() for module in modules.values()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    assert not torch.equal(modules["adam"].weight, start["weight"])
