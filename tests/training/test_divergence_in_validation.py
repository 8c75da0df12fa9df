"""A validation loss that is not a number ends the run; the best model stays the best."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import fairseq_cli.train as fairseq_train
import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.runs import records
from normexp.runs.records import Record


class Interrupted(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def validated(overrides, little_text: Path, tmp_path: Path, monkeypatch) -> Callable[..., Record]:
    """Return validated(losses, *more) -> record of a run whose epochs have these losses (bits).

    stop: the epoch in whose validation the process dies, before it is logged.
    """
    original = fairseq_train.get_valid_stats

    def run(losses: list[float], *more: str, name: str = "run", stop: int = 0) -> Record:
        def get_valid_stats(cfg, trainer, stats, tracking_best):
            stats = original(cfg, trainer, stats, tracking_best)
            updates = trainer.get_num_updates()
            assert updates % UPDATES == 0
            epoch = updates // UPDATES
            if epoch == stop:
                raise Interrupted
            return stats | {"loss": losses[epoch - 1]}

        monkeypatch.setattr(fairseq_train, "get_valid_stats", get_valid_stats)
        settings = overrides(
            "toy_language_model",
            f"data.dir={little_text}",
            f"results_dir={tmp_path / name}",
            "fairseq.dataset.max_tokens=1200",
            f"fairseq.optimization.max_epoch={len(losses)}",
            "evaluation.splits=[valid]",
            "norm=power",
            *more,
        )
        return pipeline.run(composed(*settings))

    return run


UPDATES = 4  # in an epoch
SEQUENCE = [4.0, 3.0, math.nan, 5.0, 4.5]


def best(results: Path) -> tuple[int, float, dict[str, torch.Tensor]]:
    (path,) = results.rglob("checkpoint_best.pt")
    state = store.load(path)
    return state["optimizer_history"][-1]["num_updates"], state["extra_state"]["best"], state


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_run_ends_and_keeps_its_best_model(loss: float, validated, tmp_path: Path) -> None:
    losses = [loss if math.isnan(one) else one for one in SEQUENCE]
    record = validated(losses, "evaluation.checkpoint=best")
    assert record.status == "diverged"
    assert record.diverged_at_update == record.num_updates == 3 * UPDATES
    assert f"the validation loss is {loss} after update {3 * UPDATES}" in record.reason
    assert [(at, round(nats / math.log(2), 9)) for at, nats in record.curve] == [
        (UPDATES, 4.0),
        (2 * UPDATES, 3.0),
    ]
    assert best(tmp_path / "run")[:2] == (2 * UPDATES, 3.0)
    # it is a result, and the same command does not repeat it
    assert validated(losses, "evaluation.checkpoint=best") == record


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(validated, tmp_path) -> None:
    straight = validated(SEQUENCE)
    for stop in (2, 3):
        with pytest.raises(Interrupted):
            validated(SEQUENCE, name="resumed", stop=stop)
    resumed = validated(SEQUENCE, name="resumed")
    for name in ("status", "reason", "diverged_at_update", "num_updates", "curve", "notes"):
        assert getattr(resumed, name) == getattr(straight, name), name
    states = [best(tmp_path / name)[2]["model"] for name in ("run", "resumed")]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_a_huge_loss_is_a_number(validated, tmp_path: Path) -> None:
    record = validated([4.0, 3.0, 1e300, 5.0, 4.5], "evaluation.checkpoint=best")
    assert record.status == "complete" and record.num_updates == 5 * UPDATES
    assert best(tmp_path / "run")[:2] == (2 * UPDATES, 3.0)
    assert max(nats for _, nats in record.curve) > 1e299


def test_a_checkpoint_of_an_earlier_version_with_such_a_loss_is_not_trained_on(
    validated, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        validated(SEQUENCE, stop=3)
    (path,) = tmp_path.rglob("checkpoint_last.pt")
    state = store.load(path)
    state["extra_state"]["val_loss"] = math.nan
    store.save(path, state)
    record = validated(SEQUENCE)
    assert (record.status, record.diverged_at_update) == ("diverged", 2 * UPDATES)


def test_a_training_within_its_warmup_says_so(validated, tmp_path: Path, caplog) -> None:
    record = validated([4.0, 3.0], f"norm.options.warmup_steps={2 * UPDATES}")
    (note,) = record.notes
    assert f"never leaves its warm-up of {2 * UPDATES} steps in a training of {2 * UPDATES}" in note
    assert note.endswith("this is PN-V")
    (path,) = (tmp_path / "run/records").rglob("*.json")
    assert json.loads(path.read_text())["notes"] == [note]
    assert records.read_record(path).notes == [note]
    assert note in caplog.messages
    longer = validated([4.0, 3.0], f"norm.options.warmup_steps={2 * UPDATES - 1}", name="longer")
    assert longer.notes == []
