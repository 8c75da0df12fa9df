"""The tasks of an srun step train one model, on a real SLURM of one node."""

import subprocess
import sys
from pathlib import Path

from normexp.runs import records

REPOSITORY = Path(__file__).resolve().parents[2]


def test_tasks_of_a_step_are_ranks(slurm, tmp_path) -> None:
    settings = [
        "task=toy_language_model",
        "norm=power",
        f"data.dir={tmp_path / 'data'}",
        f"results_dir={tmp_path / 'results'}",
        "label=PN",
        "tracking=disabled",
        "fairseq.optimization.max_update=8",
        "evaluation.splits=[valid]",
    ]
    shown = subprocess.run(
        ["srun", "-n", "2", sys.executable, "scripts/train.py", *settings],
        env={**slurm.environment, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("toy_language_model PN seed 1: perplexity per word") == 1
    ((_, record),) = records.load_records(tmp_path / "results").items()
    assert (record.status, record.ranks, record.statistics) == ("complete", 2, "synchronized")
