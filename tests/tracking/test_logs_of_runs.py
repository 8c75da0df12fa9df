"""What whole runs log of themselves, read back from W&B's files and metrics.jsonl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.errors import UserError
from normexp.training import loop

SITES = ("decoder_attention/0", "decoder_ffn/0")


def tracked(settings: list[str]) -> list[str]:
    return [x for x in settings if x != "tracking=disabled"] + ["tracking=offline"]


def logs(results: Path) -> list[Path]:
    return sorted(results.glob("runs/*/*/wandb/offline-run-*/*.wandb"))


def summary_of(log: Path) -> dict:
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    return json.loads(subprocess.check_output([*leet, log]))


def records_of(log: Path) -> dict[str, list[dict]]:
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    records: dict[str, list[dict]] = {}
    for line in subprocess.check_output([*leet, log], text=True).split("\n")[:-1]:
        entry = json.loads(line)
        records.setdefault(entry["type"], []).append(entry[entry["type"]])
    return records


def diagnostics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [line for line in lines if line["tag"] == "diagnostics"]


def test_dashboard_gets_what_compares_runs(overrides, tmp_path) -> None:
    """Group, tags, configuration, curves, statistics and final metrics, read back from disk."""
    settings = overrides("toy_language_model", "norm=power", "seed=3")
    record = pipeline.run(composed(*tracked(settings)))
    (log,) = logs(tmp_path / "results")
    summary, records = summary_of(log), records_of(log)
    assert summary["name"] == "PN-seed3"
    assert set(summary["tags"]) == {"toy_language_model", "power", "seed3"}
    (run,) = records["run"]
    assert (run["run_group"], run["job_type"]) == ("toy_language_model", "train")
    config = summary["config"]
    for name in ("task", "norm", "label", "seed", "config_hash", "budget", "versions"):
        assert config[name] == getattr(record, name), name
    assert config["sites"] == record.sites
    assert config["experiment"]["fairseq"]["optimization"]["max_epoch"] == 2

    final = summary["summary"]
    expected = record.metrics["test"]["perplexity_per_word"]
    assert final["test/perplexity_per_word"] == pytest.approx(expected)
    assert (summary["state"], final["status"]) == ("finished", "complete")
    assert final["num_updates"] == record.num_updates

    items = [entry["item"] for entry in records["history"]]
    assert all(item["num_updates"] == item["_step"] for item in items)
    assert final["valid/loss"] == {"min": min(x["valid/loss"] for x in items if "valid/loss" in x)}
    assert {"train_inner/loss", "train/loss", "valid/ppl"} <= set().union(*items)
    defined = {entry.get("glob_name"): entry["step_metric"] for entry in records["metric"][1:]}
    assert defined["*"] == "num_updates"
    # every update is logged here
    looked_at = [x for x in items if "train_inner/loss" in x]
    assert [x["_step"] for x in looked_at] == list(range(1, record.num_updates + 1))
    for item in looked_at:
        for site in SITES:
            for name in ("psi2_mean", "nu_norm", "psi2_distance", "grad_norm"):
                assert item[f"diagnostics/norm/{site}/{name}"] >= 0


def test_diagnostics_change_nothing_in_training(overrides, tmp_path) -> None:
    """Weights and statistics with and without them are the same bit by bit."""
    found = []
    for interval in (1, 1000):
        settings = overrides(
            "toy_language_model",
            "norm=power",
            "norm.sites.decoder_ffn=batch",
            f"fairseq.common.log_interval={interval}",
            "evaluation.splits=[valid]",
            f"results_dir={tmp_path / str(interval)}",
        )
        pipeline.run(composed(*settings))
        folder = tmp_path / f"{interval}/runs/toy_language_model/PN-seed1"
        found.append(store.load(folder / "checkpoints/checkpoint_last.pt")["model"])
        distances = [x for line in diagnostics(folder) for x in line if x.endswith("_distance")]
        assert bool(distances) == (interval == 1)
    with_them, without = found
    assert with_them.keys() == without.keys()
    assert all(torch.equal(with_them[name], without[name]) for name in without)


def test_gradient_norms_are_of_what_the_optimizer_got(overrides, tmp_path) -> None:
    """After one update Adam's first moment is 0.1 times the gradient, and it is in the checkpoint.

    Gradients of two batches, clipped, with masks of dropout."""
    settings = overrides(
        "toy_language_model",
        "norm=layer",
        "norm.sites.decoder_ffn=power",
        "fairseq.optimization.max_update=1",
        "fairseq.optimization.update_freq=[2]",
        "fairseq.optimization.clip_norm=0.1",
        "fairseq.dataset.max_tokens=4000",
        "evaluation.splits=[valid]",
    )
    pipeline.run(composed(*settings))
    folder = tmp_path / "results/runs/toy_language_model/LN-seed1"
    state = store.load(folder / "checkpoints/checkpoint_last.pt")
    moments = state["last_optimizer_state"]["state"]
    first = next(line for line in diagnostics(folder) if f"norm/{SITES[0]}/grad_norm" in line)
    assert first["step"] == 1
    names = ("self_attn_layer_norm", "final_layer_norm")
    parameters = [name for name in state["model"] if _is_parameter(name)]
    assert len(parameters) == len(moments)
    for site, name in zip(SITES, names, strict=True):
        squares = [
            (moments[i]["exp_avg"].double() / 0.1).square().sum()
            for i, parameter in enumerate(parameters)
            if f"layers.0.{name}." in parameter
        ]
        assert len(squares) == 2
        assert first[f"norm/{site}/grad_norm"] == pytest.approx(
            float(sum(squares)) ** 0.5, rel=1e-4
        )
    assert f"norm/{SITES[0]}/psi2_distance" not in first  # LN has no statistics
    assert first[f"norm/{SITES[1]}/psi2_distance"] > 0


def _is_parameter(name: str) -> bool:
    buffers = ("running_psi2", "nu", "step", "version", "_float_tensor")
    return not name.endswith(buffers) and name != "decoder.output_projection.weight"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (loop.Diverged(7, 6, "loss is nan in update 7", None), "diverged"),
        (ZeroDivisionError("a defect"), "failed"),
        (UserError("no space left on the disk"), "failed"),
    ],
)
def test_a_run_that_ends_badly_says_so(overrides, tmp_path, monkeypatch, error, status) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "train", fail)
    cfg = composed(*tracked(overrides("toy_language_model")))
    if status == "diverged":
        assert pipeline.run(cfg).status == "diverged"
    else:
        with pytest.raises(type(error)):
            pipeline.run(cfg)
    (log,) = logs(tmp_path / "results")
    summary = summary_of(log)
    assert (summary["state"], summary["summary"]["status"]) == ("failed", status)
    assert str(error) in summary["summary"]["reason"]
