"""A training that diverged names the site at which a known cause reached the statistics first."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import composed
from torch import nn

from normexp import pipeline
from normexp.runs import records
from normexp.sites import site_of

UPDATE = 5  # in which the training is poisoned

SITES = [f"encoder_{part}/{layer}" for layer in (0, 1) for part in ("attention", "ffn")]


@pytest.fixture
def diverged(overrides, little_text, tmp_path, monkeypatch) -> Callable[..., records.Record]:
    """Return diverged(poison, *more) -> record of a training with poison(model) before update 5."""

    def run(poison: Callable[[nn.Module], None], *more: str) -> records.Record:
        from fairseq.tasks.translation import TranslationTask

        batches = 0
        original = TranslationTask.train_step

        def train_step(task, sample, model, *args, **kwargs):
            nonlocal batches
            batches += 1
            if batches == 2 * UPDATE:  # the second batch of the update
                with torch.no_grad():
                    poison(model)
            return original(task, sample, model, *args, **kwargs)

        monkeypatch.setattr(TranslationTask, "train_step", train_step)
        command = overrides(
            "toy_translation",
            f"data.dir={little_text}",
            "fairseq.model.encoder.layers=2",
            "fairseq.dataset.max_tokens=400",
            "fairseq.optimization.update_freq=[2]",
            "task.norm_warmup_steps=3",
            *more,
        )
        record = pipeline.run(composed(*command))
        assert records.load_records(tmp_path / "results").popitem()[1] == record
        assert record.status == "diverged"
        return record

    return run


def at_site(model: nn.Module, site: str) -> nn.Module:
    return next(module for path, module in model.named_modules() if site_of(path) == site)


def nothing(model: nn.Module) -> None:
    """Poison nothing."""


@pytest.mark.parametrize(("sublayer", "site"), [("self_attn.out_proj", 1), ("fc2", 2)])
def test_infinite_weight_before_a_site(sublayer, site, diverged, tmp_path) -> None:
    """Norms come before sublayers, so the one of the next sublayer meets the infinity first."""
    path = f"encoder.layers.0.{sublayer}"

    def poison(model: nn.Module) -> None:
        model.get_submodule(path).bias[3] = math.inf

    record = diverged(poison, "norm=power")
    assert (record.diverged_at_update, record.diverged_site) == (UPDATE, SITES[site])
    assert f"first not finite: statistics of the forward pass at {SITES[site]}" in record.reason
    lines = (tmp_path / "results/runs/toy_translation/PN-seed1/metrics.jsonl").read_text()
    last = json.loads(lines.split("\n")[-2])
    assert last["tag"] == "diagnostics" and last["step"] == UPDATE
    assert last[f"norm/{SITES[3]}/rejected"] > 0


def test_running_statistic_that_is_not_a_number(diverged) -> None:
    def poison(model: nn.Module) -> None:
        at_site(model, SITES[2]).running_psi2[0] = math.nan

    record = diverged(poison, "norm=power")
    assert (record.diverged_at_update, record.diverged_site) == (UPDATE, SITES[2])
    assert "first not finite: running statistics at" in record.reason


def test_correction_of_gradients_that_has_run_away(diverged) -> None:
    """nu of one site is huge but finite; the gradient it sends back overflows, one site earlier."""

    def poison(model: nn.Module) -> None:
        at_site(model, SITES[2]).nu.fill_(3e38)

    record = diverged(poison, "norm=power")
    assert (record.diverged_at_update, record.diverged_site) == (UPDATE, SITES[1])
    assert "statistics of the backward pass" in record.reason


def test_too_high_a_learning_rate(diverged) -> None:
    rate = "fairseq.optimization.lr=[1e35]", "fairseq.lr_scheduler.warmup_updates=0"
    record = diverged(nothing, "norm=batch", *rate)
    assert record.diverged_site in SITES and record.diverged_site in record.reason


def test_layer_norm_has_no_statistics(diverged) -> None:
    def poison(model: nn.Module) -> None:
        model.get_submodule("encoder.layers.0.fc2").bias[3] = math.inf

    record = diverged(poison, "norm=layer")
    assert (record.diverged_at_update, record.diverged_site) == (UPDATE, None)
    assert "finite" not in record.reason.partition("update")[2]


def test_record_without_the_field_stays_readable(diverged, tmp_path: Path) -> None:
    diverged(lambda model: model.encoder.embed_tokens.weight.fill_(math.nan), "norm=layer")
    (path,) = (tmp_path / "results/records").rglob("*.json")
    content = json.loads(path.read_text())
    assert content.pop("diverged_site", "absent") is None
    path.write_text(json.dumps(content))
    assert records.read_record(path).diverged_site is None
