"""A sweep on a real SLURM: jobs cancelled, preempted and requeued, a node drained, and the rest."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from support import cluster
from support.small_runs import LABEL

from normexp import pipeline
from normexp.config.departures import settings_of
from normexp.runs import records
from normexp.runs.folder import RunFolder
from normexp.sweeps.slurm import SlurmLauncher

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = "toy_language_model"
RUNS = ("LN-seed1", "LN-seed2", "PN-seed1", "PN-seed2")  # in the order of the array
ARRAY = 1  # the cluster's first job
SMALL = [
    f"task={TASK}",
    LABEL,
    "results_dir=results",
    "tracking=disabled",
    "evaluation.splits=[test]",
    "evaluation.max_tokens=16000",
    "fairseq.model.decoder_embed_dim=16",
    "fairseq.model.decoder_ffn_embed_dim=16",
    "fairseq.model.decoder_layers=1",
    "fairseq.model.dropout=0.3",
    "fairseq.dataset.max_tokens=1200",
    "fairseq.common.log_interval=1",
    "fairseq.optimization.max_update=150",
]
LAUNCHER = [
    "hydra/launcher=slurm",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=15",
]


class Commands:
    """The project's scripts on the cluster's login node, with relative folders."""

    def __init__(self, slurm: cluster.Cluster, home: Path):
        self.home = home
        self.environment = slurm.environment | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "7",  # of the login node; jobs have their own
        }

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *self._command(arguments)],
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        script, *rest = arguments
        return [str(REPOSITORY / "scripts" / script), *rest]


def updates_of(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"train_inner"') if metrics.exists() else 0


def test_interrupted_sweep_is_completed_by_the_same_command(slurm, tmp_path) -> None:
    commands = Commands(slurm, tmp_path)
    runs = tmp_path / "results" / "runs" / TASK
    sweep = [*SMALL, "norm=layer,power", "seed=1,2", *LAUNCHER]
    sweeping = commands.start("train.py", "-m", *sweep, "hydra.launcher.array_parallelism=3")
    try:
        _disturb(slurm, commands, runs, sweep)
        output, _ = sweeping.communicate(timeout=300)
    finally:
        sweeping.kill()
    assert sweeping.returncode == 1, output
    assert "4 runs: 3 done, 1 interrupted" in output
    states = {name: slurm.ended(f"{ARRAY}_{number}") for number, name in enumerate(RUNS)}
    assert states["LN-seed1"]["JobState"] == "CANCELLED"
    assert {name: states[name]["Restarts"] for name in RUNS[1:]} == {
        "LN-seed2": "1",  # by scontrol requeue
        "PN-seed1": "1",  # by itself, at SIGUSR2
        "PN-seed2": "0",  # waited for the node
    }
    resumed = [
        name for name in RUNS if "resuming after update" in (runs / name / "log.txt").read_text()
    ]
    assert resumed == ["LN-seed2", "PN-seed1"]

    again, output = commands.run("train.py", "-m", *sweep)
    assert again == 0, output
    assert "3 of 4 runs are done or under way already" in output
    assert output.count("SLURM job") == 1 and "norm=layer seed=1" in output
    assert "resuming after update" in (runs / "LN-seed1" / "log.txt").read_text()
    assert commands.run("sweep_status.py", *sweep)[0] == 0

    made = records.load_records(tmp_path / "results")
    assert {path.stem for path in made} == set(RUNS)
    for path, record in made.items():
        straight = _without_slurm(record, tmp_path)
        assert (record.metrics, record.curve) == (straight.metrics, straight.curve), path
        assert record.config_hash == straight.config_hash
        assert record.hardware["num_threads"] == 1
        assert record.command.startswith(f"python scripts/train.py task={TASK} ")
        assert f" norm={record.norm} " in record.command
    _check_table(commands, list(made.values()))


def _disturb(slurm: cluster.Cluster, commands: Commands, runs: Path, sweep: list[str]) -> None:
    """Drain the node, cancel the first run, requeue the second, signal the third, let go on."""
    slurm.wait_for(lambda: len(slurm.jobs()) == 4, "submission", 120)
    slurm.wait_for(lambda: list(slurm.jobs().values()).count("RUNNING") == 3, "start of three jobs")
    slurm.run("scontrol", "update", f"nodename={slurm.host}", "state=drain", "reason=test")
    disturbances = {
        "LN-seed1": ("scancel", f"{ARRAY}_0"),
        "LN-seed2": ("scontrol", "requeue", f"{ARRAY}_1"),
        "PN-seed1": ("scancel", "--signal=USR2", f"{ARRAY}_2"),
    }
    undisturbed = dict(disturbances)

    def disturb_those_that_train() -> bool:
        for name in [name for name in undisturbed if updates_of(runs / name) >= 3]:
            slurm.run(*undisturbed.pop(name))
        return not undisturbed

    slurm.wait_for(disturb_those_that_train, "training", 240)
    slurm.wait_for(lambda: not _working(slurm), "drained node", 120)
    for name in disturbances:
        folder = RunFolder(runs / name)
        assert not folder.in_use() and (folder.checkpoints / "checkpoint_last.pt").exists()
    assert not (runs / "PN-seed2").exists()
    code, shown = commands.run("sweep_status.py", "-m", *sweep)
    assert code == 3 and "4 runs: 3 waiting, 1 interrupted" in shown
    slurm.run("scontrol", "update", f"nodename={slurm.host}", "state=resume")


def _working(slurm: cluster.Cluster) -> bool:
    return any(state != "PENDING" for state in slurm.jobs().values())


def _without_slurm(record: records.Record, home: Path) -> records.Record:
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        own = [f"norm={record.norm}", f"seed={record.seed}"]
        folders = [f"results_dir={home / 'straight'}", f"data.dir={home / 'data'}"]
        cfg = compose("train", [*SMALL, *own, *folders], return_hydra_config=True)
        return pipeline.run(settings_of(cfg, cfg.hydra.runtime.choices))


def _check_table(commands: Commands, made: list[records.Record]) -> None:
    code, shown = commands.run("report.py", "--results", "results", "--console-only")
    assert code == 0
    for label in ("LN", "PN"):
        values = [r.metrics["test"]["perplexity_per_word"] for r in made if r.label == label]
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [label]][:1]
        assert len(values) == 2 and f"{sum(values) / 2:.2f}" in line


def test_failed_run_is_a_failed_job(slurm, tmp_path) -> None:
    commands = Commands(slurm, tmp_path)
    bad = [*SMALL, "norm.options.eps=-1", "label=bad", *LAUNCHER]
    code, output = commands.run("train.py", "-m", *bad)
    assert code == 1 and "Traceback" not in output
    assert "failed" in output and "eps must be greater than 0" in " ".join(output.split())
    job = slurm.ended("1")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    nowhere = [*bad, "hydra.launcher.partition=nowhere"]
    code, output = commands.run("train.py", "-m", *nowhere)
    assert code == 1 and "error: SLURM does not take the jobs" in output
    assert ("Traceback" not in output and "nowhere" in output) or "partition" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")
def test_job_whose_gpu_pytorch_cannot_use_ends_at_once() -> None:
    with pytest.raises(SystemExit, match=r"asked for a GPU, and PyTorch .* sees none"):
        SlurmLauncher(gpus_per_node=1)()
