"""Training in float16, whose loss scale changes; without a GPU the scaler is simulated."""

from types import SimpleNamespace

import pytest
import torch

from normexp.config.settings import SpeedSettings
from normexp.norms import build_norm
from normexp.training import loop
from normexp.training.process_group import Process, Ranks


@pytest.mark.parametrize("kind", ["fairseq", "torch"])
def test_layers_follow_the_loss_scale(kind: str) -> None:
    """nu is rescaled in the step that changes the scale, and in no other."""
    scales = iter([8.0, 8.0, 2.0, 2.0])
    scaler = SimpleNamespace(loss_scale=8.0)
    if kind == "torch":
        scaler = SimpleNamespace(get_scale=lambda: scaler.now, now=8.0)

    class Trainer:
        def __init__(self, cfg, task, model, criterion):
            self.cfg, self.model = cfg, model
            self.optimizer = SimpleNamespace(scaler=scaler)

        def get_model(self):
            return self.model

        def get_num_updates(self):
            return 0

        def train_step(self, samples, raise_oom):
            setattr(scaler, "now" if kind == "torch" else "loss_scale", next(scales))

    norm = build_norm("power", 4)
    norm.nu.fill_(1.0)
    observed, seen = loop.Observed(), []
    alone = Ranks(Process())
    cfg = SimpleNamespace(common=SimpleNamespace(log_interval=100))
    hooks = (lambda step, state: None), (lambda step, values: None)  # catch_up, report
    observing = loop._observed_trainer(Trainer, observed, *hooks, SpeedSettings(), alone)
    trainer = observing(cfg, None, torch.nn.Sequential(norm), torch.nn.Module())
    for _ in range(4):
        trainer.train_step([{"ntokens": 1}])
        seen.append(float(norm.nu[0]))
    assert seen == [1.0, 1.0, 0.25, 0.25]
