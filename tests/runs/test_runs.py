"""Runs from configuration to record: what is left behind, resumed, refused and reported."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.forked_processes import run, script
from support.small_runs import composed, run_script, script_process, train_script

from normexp import pipeline
from normexp.checkpoints import store
from normexp.corpora import prepare
from normexp.corpora.catalogue import CATALOGUE
from normexp.errors import UserError
from normexp.runs import records
from normexp.runs.metrics_file import MetricsFile


@pytest.fixture
def small(overrides: Callable[..., list[str]], little_text: Path) -> Callable[..., list[str]]:
    """Overrides of a small run on little text with several updates per epoch."""

    def build(task: str, *more: str) -> list[str]:
        tokens = "fairseq.dataset.max_tokens=600"
        return overrides(task, f"data.dir={little_text}", tokens, *more)

    return build


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return store.load(checkpoint)["model"]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def run_folder(results: Path, task: str, name: str) -> Path:
    return results / "runs" / task / name


@pytest.mark.parametrize(
    ("task", "test_metrics"),
    [
        (
            "toy_translation",
            {
                "bleu_tokenised",
                "sacrebleu",
                "sacrebleu_signature",
                "loss_per_token_nats",
                "perplexity_per_token",
            },
        ),
        (
            "toy_language_model",
            {"loss_per_token_nats", "perplexity_per_token", "perplexity_per_word"},
        ),
    ],
)
def test_run_leaves_its_record_and_folder(task, test_metrics, small, tmp_path) -> None:
    cfg = composed(*small(task, "norm=power", "norm.sites.decoder_ffn=batch", "label=mixed"))
    record = pipeline.run(cfg)
    results = tmp_path / "results"
    assert records.load_records(results) == {
        results / "records" / task / "mixed-seed1.json": record
    }
    assert record.status == "complete" and record.budget is not None
    assert set(record.metrics) == {"valid", "test"}
    assert set(record.metrics["test"]) == test_metrics
    assert record.sites["decoder_ffn"]["name"] == "batch"
    assert record.sees_future_tokens is (None if task == "toy_translation" else False)
    model = weights(run_folder(results, task, "mixed-seed1") / "checkpoints/checkpoint_last.pt")
    assert record.num_parameters == sum(
        value.numel()
        for key, value in model.items()
        if not any(part in key for part in ("running_", "nu", "step", "version", "_float"))
        and key != "decoder.output_projection.weight"  # tied to the embeddings
        and key != "decoder.embed_tokens.weight"
    ) + (0 if task == "toy_translation" else model["decoder.embed_tokens.weight"].numel())
    steps = [v for k, v in model.items() if k.endswith(".step")]
    assert steps and all(step == record.num_updates for step in steps)
    folder = run_folder(results, task, "mixed-seed1")
    assert OmegaConf.load(folder / "config.yaml").norm.sites.decoder_ffn == "batch"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert {line["tag"] for line in lines} == {"train_inner", "train", "valid", "diagnostics"}
    assert any("/nu_norm" in key for line in lines for key in line)
    if task == "toy_translation":
        assert len((folder / "hypotheses/test.txt").read_text().split("\n")) == 13

    # the same again does nothing, and evaluating again gives the same numbers
    before = (folder / "checkpoints/checkpoint_last.pt").stat().st_mtime_ns
    assert pipeline.run(cfg) == record
    assert (folder / "checkpoints/checkpoint_last.pt").stat().st_mtime_ns == before
    again = run_script("evaluate.py", str(folder))
    assert again.returncode == 0, again.stderr
    rows = [line.split("│")[1:-1] for line in again.stdout.split("\n") if line.startswith("│")]
    assert rows and all(now.strip() == then.strip() for _, _, now, then in rows)


def test_run_walks_through_streams(small, tmp_path) -> None:
    streams = (
        "fairseq.task._name=normexp_language_modeling",
        "+fairseq.task.streams=40",
        "+fairseq.dataset.batch_size=20",
        "fairseq.dataset.max_tokens=16000",
    )
    record = pipeline.run(composed(*small("toy_language_model", "norm=power", *streams)))
    length = record.config["fairseq"]["task"]["tokens_per_sample"]
    (num_tokens,) = record.corpus["counts"]["train"]["tokens"].values()
    longest = -(-num_tokens // 40)
    assert record.num_updates == 2 * 2 * -(-longest // length)  # epochs, halves of the streams
    # what is scored does not depend on it
    assert record.metrics["test"].keys() == {
        "loss_per_token_nats",
        "perplexity_per_token",
        "perplexity_per_word",
    }
    assert not record.sees_future_tokens


def kill_in_the_third_epoch() -> None:
    """SIGKILL of this process at the second update of that epoch."""
    log, epochs, updates = MetricsFile.__call__, [], []

    def logged(self: MetricsFile, tag: str, step: int, values: dict[str, float]) -> None:
        log(self, tag, step, values)
        if tag == "train":
            epochs.append(step)
        elif tag == "train_inner" and len(epochs) == 2:
            updates.append(step)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.__call__ = logged


# Its rate falls after every second epoch, for no loss is a thousandth of the one before.
PLATEAU = [
    "fairseq.lr_scheduler._name=reduce_lr_on_plateau",
    "fairseq.lr_scheduler.warmup_updates=0",
    "~fairseq.lr_scheduler.total_num_update",
    "+fairseq.lr_scheduler.lr_patience=1",
    "+fairseq.lr_scheduler.lr_shrink=0.5",
    "+fairseq.lr_scheduler.lr_threshold=0.999",
]


@pytest.mark.parametrize(
    ("task", "schedule"),
    [("toy_translation", []), ("toy_language_model", []), ("toy_language_model", PLATEAU)],
    ids=["toy_translation", "toy_language_model", "reduce_lr_on_plateau"],
)
def test_killed_run_resumes_as_if_nothing_had_happened(task, schedule, small, tmp_path) -> None:
    """SIGKILL in the third epoch; data order, dropout, optimizer and norm state go on as before."""
    settings = small(
        task,
        "norm=power",
        "task.norm_warmup_steps=30",
        "fairseq.optimization.max_epoch=4",
        "fairseq.model.dropout=0.3",
        "evaluation.splits=[test]",
        *schedule,
    )
    straight = pipeline.run(composed(*settings))
    folder = run_folder(tmp_path / "results", task, "PN-seed1")
    (tmp_path / "results").rename(tmp_path / "straight")

    killed = run(script("train.py", *settings, prepare=kill_in_the_third_epoch))
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "metrics.jsonl").read_text().count('"tag": "train"') == 2
    assert not (folder / "record.json").exists()

    torch.manual_seed(12345)  # whatever the process did before must not matter
    resumed = pipeline.run(composed(*settings))
    assert_same_weights(
        weights(folder / "checkpoints/checkpoint_last.pt"),
        weights(
            tmp_path
            / "straight"
            / folder.relative_to(tmp_path / "results")
            / "checkpoints/checkpoint_last.pt"
        ),
    )
    assert resumed.metrics == straight.metrics
    assert (resumed.num_updates, resumed.num_epochs) == (straight.num_updates, 4)
    logged = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    steps = [line["step"] for line in logged if line["tag"] == "train_inner"]
    assert steps == list(range(1, straight.num_updates + 1))


def test_two_trainings_in_one_process_do_not_touch_each_other(
    small, few_sentences_dir, tmp_path
) -> None:
    """After a task with low losses the next one must still write checkpoint_best.pt."""
    lm = small("toy_language_model", "norm=layer")
    mt = small("toy_translation", "norm=batch", "evaluation.checkpoint=best")
    catalogue = few_sentences_dir / "catalogue.yaml"
    alone = script_process(
        "train.py", *mt, f"results_dir={tmp_path / 'alone'}", catalogue=catalogue
    )
    assert alone.returncode == 0, alone.stderr
    pipeline.run(composed(*lm, "evaluation.splits=[test]"))
    record = pipeline.run(composed(*mt))
    name = "runs/toy_translation/BN-seed1/checkpoints"
    for checkpoint in ("checkpoint_best.pt", "checkpoint_last.pt"):
        assert_same_weights(
            weights(tmp_path / "results" / name / checkpoint),
            weights(tmp_path / "alone" / name / checkpoint),
        )
    (other,) = records.load_records(tmp_path / "alone").values()
    assert record.metrics == other.metrics


def test_divergence_is_a_result(small, tmp_path) -> None:
    diverging = small(
        "toy_translation",
        "norm=power_v",
        "fairseq.optimization.lr=[1e35]",
        "fairseq.lr_scheduler.warmup_updates=0",
    )
    shown = train_script(*diverging)
    assert shown.returncode == 1
    (record,) = records.load_records(tmp_path / "results").values()
    assert record.status == "diverged"
    assert record.diverged_at_update == record.num_updates + 1 >= 2
    assert f"in update {record.diverged_at_update}" in record.reason
    assert "PN-V seed 1: diverged" in shown.stdout and "Traceback" not in shown.stderr


def test_early_stopping_survives_an_interruption(small, tmp_path) -> None:
    """The epochs without a better loss before the interruption count after it."""
    settings = small(
        "toy_language_model",
        "fairseq.optimization.lr=[1e-9]",
        "evaluation.splits=[valid]",
        "fairseq.checkpoint.patience=3",
        "fairseq.optimization.max_epoch=2",
    )
    folder = run_folder(tmp_path / "results", "toy_language_model", "LN-seed1")
    pipeline.run(composed(*settings))
    # As if it had been interrupted after two epochs of an unbounded training.
    for name in ("record.json", "training_finished.json"):
        (folder / name).unlink()
    shutil.rmtree(tmp_path / "results" / "records")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("max_epoch: 2", "max_epoch: 50"))
    record = pipeline.run(composed(*settings, "fairseq.optimization.max_epoch=50"))
    losses = [
        json.loads(line)["loss"]
        for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]
        if '"tag": "valid"' in line
    ]
    # an uninterrupted run stops at the third validation in a row that is not better
    best, since = losses[0], 0
    for epoch, loss in enumerate(losses[1:], start=2):  # noqa: B007
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == 3:
            break
    assert since == 3 and epoch == len(losses) == record.num_epochs


@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_damaged_last_checkpoint_costs_at_most_an_epoch(damage, small, tmp_path) -> None:
    settings = small(
        "toy_language_model",
        "norm=power_v",
        "evaluation.checkpoint=average",
        "evaluation.average_last=2",
        "evaluation.splits=[test]",
    )
    straight = pipeline.run(composed(*settings))
    folder = run_folder(tmp_path / "results", "toy_language_model", "PN-V-seed1")
    last = folder / "checkpoints/checkpoint_last.pt"
    expected = weights(last)
    last.write_bytes(b"" if damage == "empty" else last.read_bytes()[: last.stat().st_size // 2])
    for path in (
        folder / "record.json",
        folder / "training_finished.json",
        folder / "checkpoints/checkpoint2.pt",
        folder / "checkpoints/checkpoint_best.pt",
        records.record_path(tmp_path / "results", straight),
    ):
        path.unlink()
    again = pipeline.run(composed(*settings))
    assert_same_weights(weights(last), expected)
    assert again.metrics == straight.metrics
    assert "cannot be read; resuming from" in (folder / "log.txt").read_text()


def test_scripts_answer_bad_input_in_one_line(overrides, tmp_path) -> None:
    for arguments, message in (
        (["norm=powr"], "Available options in 'norm'"),
        (["task=iwslt"], "Available options in 'task'"),
        (["fairsek.common.cpu=true"], "did you mean fairseq.common.cpu?"),
        (["seed=0"], "error: seed=0 must be an integer"),
        (overrides("toy_translation", "+fairseq.common.sead=3"), "sead"),
    ):
        shown = train_script(*arguments)
        assert shown.returncode == 1, arguments
        assert message in shown.stdout + shown.stderr
        assert "Traceback" not in shown.stderr
    shown = run_script("evaluate.py", str(tmp_path))
    assert shown.returncode == 1 and "is no run folder" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_help_and_config_are_readable() -> None:
    shown = script_process("train.py", "--help")
    assert shown.returncode == 0
    for text in ("task: ", "norm: ", "power_v", "python scripts/train.py", "seed: 1"):
        assert text in shown.stdout
    shown = script_process("train.py", "--cfg", "job", "task=ptb", "norm=power", "--resolve")
    cfg = OmegaConf.create(shown.stdout)
    assert cfg.norm.options.warmup_steps == cfg.task.norm_warmup_steps


def test_sweep_goes_on_after_a_run_that_cannot(small, tmp_path) -> None:
    settings = small("toy_language_model", "evaluation.splits=[test]")
    swept = "norm.options.eps=-1,1e-5", "seed=1,2", "label=LN-${norm.options.eps}"
    shown = train_script("-m", *settings, "norm=layer", *swept)
    assert shown.returncode == 1
    assert shown.stderr.count("error: norm at decoder_attention") >= 2 or "eps" in shown.stderr
    assert len(records.load_records(tmp_path / "results")) == 2


def test_missing_corpus_names_what_to_put_where(overrides, tmp_path, monkeypatch) -> None:
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setattr(pipeline, "prepare", partial(prepare, catalogue=CATALOGUE))
    (tmp_path / "nothing").mkdir()
    cfg = composed(
        "task=multi30k",
        f"results_dir={tmp_path}",
        f"data.dir={tmp_path / 'data'}",
        f"data.local={tmp_path / 'nothing'}",
        "tracking=disabled",
    )
    with pytest.raises(UserError, match=r"train\.de\.gz"):
        pipeline.run(cfg)


def test_full_disk_is_named_and_loses_nothing(small, tmp_path) -> None:
    """Checkpoints meet a file system of 4 MB; with more room the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        settings = small(
            "toy_translation",
            "fairseq.model.encoder.embed_dim=64",
            "fairseq.model.decoder.embed_dim=64",
            "evaluation.splits=[valid]",
            "evaluation.average_last=1",
        )
        settings.append(f"results_dir={disk}")
        shown = train_script(*settings)
        assert shown.returncode == 1
        assert "error: no space left on the disk" in shown.stderr
        assert "Traceback" not in shown.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        shown = train_script(*settings)
        assert shown.returncode == 0, shown.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
