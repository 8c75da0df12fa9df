"""What a resumed training does at its end, where fairseq by itself would go one update too far."""

from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.runs.folder import RunFolder
from normexp.runs.records import record_path


@pytest.mark.parametrize("updates", [4, 7])  # 7 updates are an epoch
def test_a_training_that_has_reached_its_limit_does_no_further_update(
    updates: int, overrides, little_text: Path
) -> None:
    settings = composed(
        *overrides("toy_language_model", f"data.dir={little_text}", "norm=power"),
        "fairseq.optimization.max_epoch=0",
        f"fairseq.optimization.max_update={updates}",
        "fairseq.dataset.max_tokens=700",
        "evaluation.splits=[valid]",
    )
    record = pipeline.run(settings)
    assert record.num_updates == updates
    folder = RunFolder(settings.run_dir)
    before = store.load(folder.checkpoints / store.LAST)["model"]
    # As if killed at the end of training, before it could say that it has ended.
    for path in (folder.finished, folder.record, record_path(settings.results_dir, record)):
        path.unlink()
    again = pipeline.run(settings)
    assert (again.num_updates, again.metrics) == (updates, record.metrics)
    after = store.load(folder.checkpoints / store.LAST)["model"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
