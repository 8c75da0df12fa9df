"""Training on several ranks: real processes on the CPU against one process with all their data."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.trainer import Trainer
from support.rank_processes import train_on_ranks
from support.small_runs import REPOSITORY, composed, script_command

from normexp import pipeline
from normexp.checkpoints import store
from normexp.config.identity import identity
from normexp.config.seeding import Seeds
from normexp.config.validation import validate
from normexp.errors import UserError
from normexp.runs import records
from normexp.runs.metrics_file import MetricsFile
from normexp.training import data_parallel, loop

# Batches of which an epoch has an odd number, so that the last update has none for rank 1.
SENTENCES = ["fairseq.dataset.max_tokens=750"]
BLOCKS = ["fairseq.dataset.max_tokens=520"]  # 9 batches


@pytest.fixture
def settings(overrides: Callable[..., list[str]], little_text: Path) -> Callable[..., list[str]]:
    """Overrides of a run on little text."""
    return lambda task, *more: overrides(task, f"data.dir={little_text}", *more)


def run_folder(results: Path) -> Path:
    (found,) = results.glob("runs/*/*/config.yaml")
    return found.parent


def trained(results: Path, name: str = "checkpoint_last") -> dict[str, torch.Tensor]:
    return store.load(run_folder(results) / f"checkpoints/{name}.pt")["model"]


def metrics(results: Path, tag: str) -> list[dict[str, Any]]:
    lines = (run_folder(results) / "metrics.jsonl").read_text().split("\n")[:-1]
    return [entry for line in lines if (entry := json.loads(line))["tag"] == tag]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def append(path: Path, line: object) -> None:
    with open(path, "a") as file:
        file.write(f"{json.dumps(line)}\n")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_two_ranks_equal_two_batches_per_update(settings, tmp_path) -> None:
    """LN without dropout, to the bit; and rank 0 alone leaves traces, all of them once."""
    chosen = settings(
        "toy_translation",
        "norm=layer",
        *SENTENCES,
        "+fairseq.dataset.max_tokens_valid=80",
        "evaluation.splits=[valid]",
    )

    def note_what_each_rank_does(rank: int) -> None:
        validate, without_tokens = Trainer.valid_step, data_parallel._padding_alone

        def valid_step(self: Trainer, sample: dict, **kwargs: Any) -> Any:
            append(tmp_path / f"validated{rank}", sample["id"].tolist() if sample else [])
            return validate(self, sample, **kwargs)

        def padding_alone(model: Any) -> Any:
            append(tmp_path / "without_tokens", rank)
            return without_tokens(model)

        # Every update takes one second.
        loop.time = SimpleNamespace(perf_counter=itertools.count().__next__)
        Trainer.valid_step, data_parallel._padding_alone = valid_step, padding_alone

    two = tmp_path / "two"
    ended = train_on_ranks(
        tmp_path / "printed", *chosen, f"results_dir={two}", prepare=note_what_each_rank_does
    )
    assert ended.codes == [0, 0], ended.err
    assert "toy_translation LN seed 1: tokenised BLEU" in ended.out[0]
    assert ended.out[1] == ended.err[0] == ended.err[1] == ""

    single = pipeline.run(composed(*chosen, "fairseq.optimization.update_freq=[2]"))
    assert_same(trained(two), trained(tmp_path / "results"))
    ((_, record),) = records.load_records(two).items()
    assert (record.ranks, record.statistics) == (2, "synchronized")
    assert (single.ranks, single.statistics) == (1, None)
    assert record.config_hash != single.config_hash
    assert record.metrics == single.metrics

    # The last update of each epoch has a batch for rank 0 alone, and counts the same tokens.
    assert lines(tmp_path / "without_tokens") == [1, 1]
    one = metrics(tmp_path / "results", "train_inner")
    updates = metrics(two, "train_inner")
    assert [entry["step"] for entry in updates] == list(range(1, record.num_updates + 1))
    for name in ("loss", "wpb", "bsz", "gnorm"):
        assert [entry[name] for entry in updates] == [entry[name] for entry in one], name

    tokens = sum(entry["wpb"] for entry in updates)
    assert record.tokens_per_second == tokens / record.num_updates

    # Every sentence of the validation is scored once, by whichever rank.
    scored = [lines(tmp_path / f"validated{rank}") for rank in (0, 1)]
    assert len(scored[0]) == len(scored[1]) == 2 * 3 and scored[1][-1] == []
    sentences = sorted(i for of_rank in scored for batch in of_rank for i in batch)
    assert sentences == sorted(2 * list(range(20)))
    losses = [
        [entry["loss"] for entry in metrics(results, "valid")]
        for results in (two, tmp_path / "results")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2

    folder = run_folder(two)
    assert (folder / "log.txt").read_text().count("begin training epoch 1") == 1
    assert (folder / "command.txt").read_text().count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "command.txt", "environment.json", "metrics.jsonl", "log.txt", ".lock"),
        *("checkpoints", "hypotheses", "training_finished.json", "record.json"),
    }


def test_two_ranks_average_over_sentences_as_one_does(settings, tmp_path) -> None:
    """A rank without a batch counts no sentence: with sentence_avg its padding would be one."""
    chosen = settings(
        "toy_translation",
        "norm=layer",
        *SENTENCES,
        "+fairseq.optimization.sentence_avg=true",
        "evaluation.splits=[valid]",
    )
    two = tmp_path / "two"
    ended = train_on_ranks(tmp_path / "printed", *chosen, f"results_dir={two}")
    assert ended.codes == [0, 0], ended.err
    pipeline.run(composed(*chosen, "fairseq.optimization.update_freq=[2]"))
    assert_same(trained(two), trained(tmp_path / "results"))


def test_synchronized_statistics_are_those_of_one_large_batch(
    settings, tmp_path, monkeypatch
) -> None:
    """PN, BN and RBN with its penalty: two ranks against one process with both their batches."""
    chosen = settings(
        "toy_translation",
        "norm=power",
        "norm.sites.encoder_ffn=batch",
        "norm.sites.decoder_ffn=regularized_batch",
        "task.norm_warmup_steps=4",
        *SENTENCES,
        "fairseq.optimizer._name=nag",  # Adam turns rounding of small gradients into whole steps
        *("~fairseq.optimizer.adam_betas", "~fairseq.optimizer.adam_eps"),
        *("fairseq.optimization.lr=[0.1]", "fairseq.lr_scheduler.warmup_updates=0"),
        "evaluation.splits=[valid]",
    )
    two = tmp_path / "two"
    ended = train_on_ranks(tmp_path / "printed", *chosen, f"results_dir={two}")
    assert ended.codes == [0, 0], ended.err
    ((_, record),) = records.load_records(two).items()
    batch_norms = {site for site, norm in record.sites.items() if norm["name"] != "layer"}
    assert batch_norms == {"encoder_attention", "encoder_ffn", "encoder_final", "decoder_ffn"}
    assert all(record.sites[site]["sync"] is True for site in batch_norms)

    train_step = Trainer.train_step

    def with_one_batch(self: Trainer, samples: list[dict], *args: Any, **kwargs: Any) -> Any:
        dataset = self.task.dataset("train")
        sentences = torch.cat([sample["id"] for sample in samples]).tolist()
        batch = dataset.collater([dataset[i] for i in sentences])
        return train_step(self, [batch], *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", with_one_batch)
    pipeline.run(composed(*chosen, "fairseq.optimization.update_freq=[2]"))
    for name in ("loss", "penalty"):
        of_two, of_one = (
            [entry[name] for entry in metrics(results, "train_inner")]
            for results in (two, tmp_path / "results")
        )
        assert of_two == pytest.approx(of_one, rel=0.01, abs=2e-5), name
    obtained, expected = trained(two), trained(tmp_path / "results")
    assert obtained.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(obtained[key], value, rtol=1e-4, atol=1e-5, msg=key)
        else:
            assert torch.equal(obtained[key], value), key


def test_local_statistics_are_pooled_where_they_are_saved(settings, tmp_path) -> None:
    """The checkpoint has the mean over the ranks, and a resumed run continues from it exactly."""
    chosen = settings(
        "toy_language_model",
        *BLOCKS,
        "norm=power",
        "task.norm_warmup_steps=7",  # forwards, of which rank 1 has one less in an epoch
        "norm.sites.decoder_ffn=batch",
        "distributed.statistics=local",
        *("evaluation.checkpoint=average", "evaluation.average_last=2"),
        "evaluation.splits=[valid]",
    )

    def note_statistics(rank: int) -> None:
        pool, calls = data_parallel.average_statistics, []

        def noting(model: Any) -> None:
            calls.append({name: value.clone() for name, value in model.state_dict().items()})
            torch.save(calls, tmp_path / f"statistics{rank}.pt")
            pool(model)

        data_parallel.average_statistics = noting

    def train(prepare: Any = lambda rank: None) -> None:
        ended = train_on_ranks(tmp_path / "printed", *chosen, prepare=prepare)
        assert ended.codes == [0, 0] and ended.err[1] == "", ended.err

    train(note_statistics)
    results = tmp_path / "results"
    ((_, record),) = records.load_records(results).items()
    assert (record.ranks, record.statistics) == (2, "local")
    assert not any(norm["sync"] for norm in record.sites.values())
    final = trained(results)
    first, second = (torch.load(tmp_path / f"statistics{rank}.pt") for rank in (0, 1))
    # before the validation and again before the checkpoint, in each of two epochs
    assert len(first) == len(second) == 4
    running = [key for key in final if "running_" in key or key.endswith("nu")]
    assert len(running) == 6
    for key in running:
        assert not torch.equal(first[2][key], second[2][key]), key
        torch.testing.assert_close(final[key], (first[2][key] + second[2][key]) / 2)
        assert torch.equal(first[3][key], second[3][key]), key

    # as if it had been interrupted after the first epoch
    folder = run_folder(results)
    saved = folder / "checkpoints"
    for path in (
        folder / "record.json",
        folder / "training_finished.json",
        records.record_path(results, record),
    ):
        path.unlink()
    (saved / "checkpoint1.pt").replace(saved / "checkpoint_last.pt")
    for name in ("checkpoint2.pt", "checkpoint_best.pt"):
        (saved / name).unlink()
    train()
    assert "resuming after update" in (folder / "log.txt").read_text()
    assert_same(trained(results), final)


def signal_all_at(tag: str, step: int, number: int, folder: Path) -> Callable[[int], None]:
    """Prepares ranks of which rank 0, when it has logged this, sends all a signal."""

    def prepare(rank: int) -> None:
        (folder / f"process{rank}").write_text(str(os.getpid()))
        log = MetricsFile.__call__

        def logged(self: MetricsFile, at: str, update: int, values: Any) -> None:
            log(self, at, update, values)
            if (at, update) == (tag, step):
                for each in (1, 0):
                    os.kill(int((folder / f"process{each}").read_text()), number)

        MetricsFile.__call__ = logged

    return prepare


def test_killed_ranks_resume_as_if_nothing_had_happened(
    settings, few_sentences_dir, tmp_path
) -> None:
    """SIGTERM in the first epoch, SIGKILL in the third; then torchrun, as users start it."""
    chosen = settings(
        "toy_language_model",
        *BLOCKS,
        "norm=power",
        "task.norm_warmup_steps=12",
        "fairseq.optimization.max_epoch=6",
        "fairseq.model.dropout=0.3",
        "evaluation.splits=[valid]",
    )

    def note_seeds(rank: int) -> None:
        from fairseq import utils

        seed = utils.set_torch_seed

        def noting(value: int) -> Any:
            append(tmp_path / f"seeds{rank}", value)
            return seed(value)

        utils.set_torch_seed = noting

    straight = tmp_path / "straight"
    ended = train_on_ranks(
        tmp_path / "printed", *chosen, f"results_dir={straight}", prepare=note_seeds
    )
    assert ended.codes == [0, 0], ended.err
    ((_, expected),) = records.load_records(straight).items()

    # The masks of dropout differ between ranks and updates; rank 0 has those of a single process.
    seeds = [lines(tmp_path / f"seeds{rank}")[1:] for rank in (0, 1)]  # the first is the model's
    own = Seeds(1, "separated")
    for rank in (0, 1):
        assert seeds[rank] == [own.masks(update, rank) for update in range(expected.num_updates)]
    masks = {
        tuple((torch.rand(64, generator=torch.Generator().manual_seed(seed)) < 0.3).tolist())
        for seed in seeds[0] + seeds[1]
    }
    assert len(masks) == 2 * expected.num_updates

    ended = train_on_ranks(
        tmp_path / "terminated",
        *chosen,
        prepare=signal_all_at("train_inner", 3, signal.SIGTERM, tmp_path),
    )
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended.err
    results = tmp_path / "results"
    saved = store.load(run_folder(results) / "checkpoints" / store.LAST)
    update = saved["optimizer_history"][-1]["num_updates"]
    assert f"SIGTERM: saved after update {update}\n" in ended.out[0]
    assert ended.out[1] == ended.err[1] == "" and update in (3, 4)

    third_epoch = 2 * (expected.num_updates // 6) + 3
    ended = train_on_ranks(
        tmp_path / "printed",
        *chosen,
        prepare=signal_all_at("train_inner", third_epoch, signal.SIGKILL, tmp_path),
    )
    assert ended.codes == [-signal.SIGKILL] * 2
    assert len(metrics(results, "train")) == 2
    catalogue = few_sentences_dir / "catalogue.yaml"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    shown = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", *script_command("train.py", catalogue), *chosen],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
    )
    assert shown.returncode == 0, shown.stderr
    assert "WARNING: resuming after update" in shown.stderr
    assert shown.stdout.count("perplexity per word") == shown.stderr.count("resuming") == 1
    assert_same(trained(results), trained(straight))
    ((_, record),) = records.load_records(results).items()
    assert record.metrics == expected.metrics
    steps = [entry["step"] for entry in metrics(results, "train_inner")]
    assert steps == list(range(1, record.num_updates + 1))


class Failing(RuntimeError):
    """An error that no handler expects."""


@pytest.mark.parametrize("failing", [0, 1])
def test_error_of_one_rank_ends_all(failing, settings, tmp_path) -> None:
    """With one message, and a record of the failure."""

    def fail_in_update_3(rank: int) -> None:
        train_step = Trainer.train_step

        def failing_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            if rank == failing and self.get_num_updates() == 2:
                raise Failing("out of luck")
            return train_step(self, *args, **kwargs)

        Trainer.train_step = failing_step

    chosen = settings("toy_language_model", "norm=power", "task.norm_warmup_steps=3", *BLOCKS)
    ended = train_on_ranks(tmp_path / "printed", *chosen, prepare=fail_in_update_3)
    assert ended.codes == [1, 1]
    assert ended.err[1] == ended.out[1] == ""
    ((_, record),) = records.load_records(tmp_path / "results").items()
    assert record.status == "failed"
    log = (run_folder(tmp_path / "results") / "log.txt").read_text()
    assert "in failing_step" in log
    if failing == 1:
        assert ended.err[0] == "error: rank 1: Failing: out of luck\n"
        assert record.reason == "rank 1: Failing: out of luck"
    else:
        assert ended.err[0].count("Failing: out of luck") == 1
        assert record.reason == "Failing: out of luck"


def test_killed_rank_ends_the_other_without_a_record(settings, tmp_path) -> None:
    def die_in_update_3(rank: int) -> None:
        train_step = Trainer.train_step

        def dying(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and self.get_num_updates() == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(self, *args, **kwargs)

        Trainer.train_step = dying

    chosen = settings("toy_language_model", "norm=power", "task.norm_warmup_steps=3", *BLOCKS)
    ended = train_on_ranks(tmp_path / "printed", *chosen, prepare=die_in_update_3)
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.err[0].startswith("error: another rank of this training was killed")
    assert ended.err[0].count("\n") == 1
    assert records.load_records(tmp_path / "results") == {}


def test_divergence_is_a_result_of_all_ranks(settings, tmp_path) -> None:
    chosen = settings(
        "toy_language_model",
        *BLOCKS,
        "norm=power_v",
        "fairseq.optimization.lr=[1e35]",
        "fairseq.lr_scheduler.warmup_updates=0",
    )
    ended = train_on_ranks(tmp_path / "printed", *chosen)
    assert ended.codes == [1, 1]
    assert "PN-V seed 1: diverged" in ended.out[0]
    assert ended.out[1] == ended.err[1] == ""
    ((_, record),) = records.load_records(tmp_path / "results").items()
    assert record.status == "diverged"
    assert record.diverged_at_update == record.num_updates + 1 >= 2
    assert f"in update {record.diverged_at_update}" in record.reason


def test_impossible_choices_are_refused_once(settings, tmp_path) -> None:
    chosen = settings("toy_language_model", "norm=batch_released")
    ended = train_on_ranks(tmp_path / "printed", *chosen)
    assert ended.codes == [1, 1]
    assert ended.err[0].startswith("error: norm 'batch_released' (decoder_attention) has no")
    assert "distributed.statistics=local" in ended.err[0] and ended.err[0].count("\n") == 1
    assert ended.err[1] == "" and not (tmp_path / "results").exists()
    two = [*chosen, "distributed.ranks=2"]
    validate(composed(*two, "distributed.statistics=local"))
    for more, message in (
        (["distributed.ranks=0"], "distributed.ranks=0 must be an integer of at least 1"),
        (["distributed.statistics=mine"], "known: synchronized, local"),
        (
            ["distributed.ranks=2", "+fairseq.distributed_training.ddp_backend=slowmo"],
            "ddp_backend is set by normexp",
        ),
        (["distributed.ranks=3"], "number of processes started is 1"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.run(composed(*chosen, "norm=layer", *more))


def test_one_process_is_the_experiment_that_it_was(settings) -> None:
    """The hash of a configuration does not change by settings that say nothing on one rank."""
    chosen = settings("toy_language_model", "norm=power")
    alone = identity(composed(*chosen))
    assert alone == identity(composed(*chosen, "distributed.statistics=local"))
    assert "distributed" not in alone
    several = [
        identity(composed(*chosen, "distributed.ranks=2", f"distributed.statistics={s}"))
        for s in ("synchronized", "local")
    ]
    assert alone != several[0] != several[1]


def test_synchronized_is_the_default_of_sites_and_local_is_local(settings) -> None:
    chosen = settings(
        "toy_translation",
        "norm=power",
        "distributed.ranks=2",
        "norm.sites.encoder_ffn={name: power_v, sync: false}",
        "norm.sites.decoder_ffn={name: batch, sync: true}",
        "norm.sites.decoder_attention=batch",
    )

    def sync(*more: str) -> dict[str, bool | None]:
        sites = validate(composed(*chosen, *more)).sites
        return {site: norm.get("sync") for site, norm in sites.items()}

    layer = {"decoder_cross": None, "decoder_final": None}
    assert sync() == layer | {
        "encoder_attention": True,
        "encoder_ffn": False,
        "encoder_final": True,
        "decoder_attention": True,
        "decoder_ffn": True,
    }
    assert set(sync("distributed.statistics=local").values()) == {None, False}
    assert sync("distributed.ranks=1")["decoder_attention"] is False
