"""Training on several ranks: real processes on the CPU against one process with all their data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import train_on_ranks
from small_runs import REPOSITORY, composed

from normexp import checkpoints, pipeline, records
from normexp.norms import pool_statistics

LAST = "checkpoints/checkpoint_last.pt"


def run_folder(results: Path) -> Path:
    (record,) = results.glob("runs/*/*/config.yaml")
    return record.parent


def trained(results: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(run_folder(results) / LAST)["model"]


def metrics(results: Path, tag: str) -> list[dict[str, Any]]:
    lines = (run_folder(results) / "metrics.jsonl").read_text().split("\n")[:-1]
    return [entry for line in lines if (entry := json.loads(line))["tag"] == tag]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_two_ranks_equal_two_batches_per_update(overrides, tmp_path) -> None:
    """LN without dropout, to the bit; and rank 0 alone leaves traces, all of them once."""
    settings = overrides("toy_translation", "norm=layer", "fairseq.dataset.max_tokens=9000")
    ended = train_on_ranks(tmp_path / "printed", *settings, f"results_dir={tmp_path / 'two'}")
    assert ended.codes == [0, 0], ended.err
    assert "toy_translation LN seed 1: tokenised BLEU" in ended.out[0]
    assert ended.out[1] == ended.err[1] == ""

    single = pipeline.run(composed(*settings, "fairseq.optimization.update_freq=[2]"))
    assert_same(trained(tmp_path / "two"), trained(tmp_path / "results"))
    ((path, record),) = records.load_records(tmp_path / "two").items()
    assert (record.ranks, record.statistics) == (2, "synchronized")
    assert (single.ranks, single.statistics) == (1, None)
    assert record.config_hash != single.config_hash
    assert record.metrics == single.metrics

    # every sentence of the validation is scored once, by whichever rank
    for two, one in zip(metrics(tmp_path / "two", "valid"), metrics(tmp_path / "results", "valid")):
        assert two["loss"] == one["loss"] and two["step"] == one["step"]

    updates = metrics(tmp_path / "two", "train_inner")
    assert [entry["step"] for entry in updates] == list(range(1, record.num_updates + 1))
    assert [(entry["loss"], entry["bsz"], entry["wpb"]) for entry in updates] == [
        (entry["loss"], entry["bsz"], entry["wpb"])
        for entry in metrics(tmp_path / "results", "train_inner")
    ]
    log = (run_folder(tmp_path / "two") / "log.txt").read_text()
    assert log.count("begin training epoch 1") == 1
    assert (run_folder(tmp_path / "two") / "command.txt").read_text().count("\n") == 1
