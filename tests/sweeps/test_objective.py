"""What train.py returns to Hydra's sweepers, and how it refuses half a sweep."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobStatus
from support.small_runs import composed, train_script

from normexp import pipeline
from normexp.paths import CONFIGS
from normexp.runs import records
from normexp.sweeps import slurm
from normexp.sweeps.objective import RunFailed, objective
from normexp.sweeps.slurm import SlurmLauncher

TASK = "toy_language_model"


@pytest.fixture
def settings(overrides, little_text) -> list[str]:
    return overrides(TASK, f"data.dir={little_text}", "fairseq.optimization.max_epoch=1")


def test_a_sweeper_gets_the_loss_of_a_complete_run_and_the_failure_of_others(
    settings, tmp_path: Path
) -> None:
    seen = tmp_path / "jobs.jsonl"
    done = train_script(
        *("-m", *settings, "norm=layer,power", "norm.options.eps=1e-5,-1"),
        "label=${norm.name}${norm.options.eps}",
        "+hydra.callbacks.seen._target_=support.job_returns.JobReturns",
        f"+hydra.callbacks.seen.path={seen}",
    )
    jobs = [json.loads(line) for line in seen.read_text(encoding="utf-8").splitlines()]
    assert [status for status, _ in jobs] == ["COMPLETED", "FAILED"] * 2, done.stderr
    made = records.load_records(tmp_path / "results")
    losses = {r.label: r.metrics["valid"]["loss_per_token_nats"] for r in made.values()}
    assert [jobs[0][1], jobs[2][1]] == [losses["layer1e-05"], losses["power1e-05"]]
    assert "eps" in jobs[1][1] and "eps" in jobs[3][1]
    assert done.returncode == 1  # and the runs after the failed one were done
    assert done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr


def test_a_single_run_that_fails_says_so_in_one_line(settings) -> None:
    failed = train_script(*settings, "norm.options.eps=-1")
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ") and "eps" in line


def test_the_objective_never_looks_at_the_test_set(make_record) -> None:
    valid = {"loss_per_token_nats": 2.5}
    test = {"loss_per_token_nats": 1.0}
    assert objective(make_record(metrics={"valid": valid, "test": test}, curve=[(1, 2.0)])) == 2.5
    curve = [(1, 3.0), (2, 2.0), (3, 2.25)]
    assert objective(make_record(metrics={"test": test}, curve=curve)) == 2.0
    assert objective(make_record(metrics={"test": test})) is None
    assert objective(make_record(metrics={"valid": {"loss_per_token_nats": None}})) is None


class Context:
    """Hydra's context, as far as the launcher looks at it."""

    def __init__(self, by_override: dict):
        self.config_loader = self
        self.by_override = by_override

    def load_sweep_config(self, _, overrides):
        return self.by_override[overrides[0]]


def test_a_sweep_on_slurm_returns_the_same(settings, tmp_path: Path, monkeypatch, capsys) -> None:
    record = pipeline.run(composed(*settings))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        every = {
            seed: compose("train", [*settings, seed], return_hydra_config=True)
            for seed in ("seed=1", "seed=0", "seed=2")
        }
    launcher = SlurmLauncher()
    launcher.config = every["seed=1"]
    launcher.hydra_context = Context(every)
    monkeypatch.setattr(SlurmLauncher, "_submit", lambda *_: {})  # whose jobs come to nothing
    monkeypatch.setattr(SlurmLauncher, "_wait_for", lambda *_: None)
    monkeypatch.setattr(slurm.slurm_queue, "in_queue", dict)
    first, invalid, missing = launcher.launch([["seed=1"], ["seed=0"], ["seed=2"]], 0)
    assert first.return_value == record.metrics["valid"]["loss_per_token_nats"]
    for returned, reason in (invalid, "seed=0 must be"), (missing, "not done"):
        assert returned.status is JobStatus.FAILED
        with pytest.raises(RunFailed, match=reason):
            _ = returned.return_value
    assert "error: seed=0: seed=0 must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "number", "missing"),
    [
        ([], 18, "norm=... seed=..."),
        (["norm=power"], 3, "seed=..."),
        (["seed=2"], 6, "norm=..."),
    ],
)
def test_an_experiment_without_m_is_refused_with_the_number_of_runs(given, number, missing) -> None:
    refused = train_script("+experiment=table1_iwslt14", *given)
    assert refused.returncode == 1 and not refused.stdout
    command = " ".join(["train.py -m +experiment=table1_iwslt14", *given])
    for part in (f"a sweep of {number} runs", f"{command};", f"add {missing}"):
        assert part in refused.stderr


def test_one_run_of_an_experiment_is_no_sweep(tmp_path: Path) -> None:
    """It gets as far as a run without the sweep does: to a setting that is invalid."""
    one = "+experiment=table1_iwslt14", "norm=power", "seed=2", "evaluation.beam=0"
    refused = train_script(*one, f"results_dir={tmp_path}")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: evaluation.beam=0 must be")
    swept = train_script("-m", "+experiment=table1_iwslt14", "evaluation.beam=0")
    assert swept.stderr.count("error: evaluation.beam=0 must be") == 18


def test_a_list_of_runs_without_m_is_told_from_a_list(tmp_path: Path) -> None:
    refused = train_script("seed=1,2", f"results_dir={tmp_path}")
    assert refused.returncode == 1 and "need -m" in refused.stderr
