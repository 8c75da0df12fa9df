"""Another evaluation of a trained model is evaluated from its run folder, never trained again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_runs import composed

from normexp import pipeline
from normexp.config.identity import is_same_training
from normexp.errors import UserError
from normexp.runs.records import Record
from normexp.training import loop

AVERAGE = ("evaluation.checkpoint=average", "evaluation.average_last=2")


@pytest.fixture
def run(overrides, little_text: Path) -> Callable[..., Record]:
    def train(*more: str) -> Record:
        small = overrides(
            "toy_translation",
            f"data.dir={little_text}",
            "fairseq.optimization.max_epoch=3",
            "evaluation.splits=[valid]",
            "label=LN",
            *more,
        )
        return pipeline.run(composed(*small))

    return train


@pytest.fixture
def no_training(monkeypatch) -> Callable[[], None]:
    """From the call of this function on a training fails."""

    def train(*_: object, **__: object) -> None:
        raise AssertionError("the training began")

    return lambda: monkeypatch.setattr(loop, "train", train)


@pytest.mark.parametrize(
    "mended",
    [
        ["evaluation.beam=2", *AVERAGE],
        ["evaluation.length_penalty=0.5", *AVERAGE],
        ["evaluation.checkpoint=best"],
        ["evaluation.checkpoint=average", "evaluation.average_last=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_trained_run_is_evaluated_otherwise(mended, run, no_training, tmp_path: Path) -> None:
    first = run(*AVERAGE)
    no_training()
    again = run(*mended)
    assert again.status == "complete" and again.config_hash != first.config_hash
    assert again.num_updates == first.num_updates and again.curve == first.curve
    # what was there is not lost
    kept = [json.loads(path.read_text()) for path in tmp_path.rglob("*LN-seed1*.json")]
    assert {first.config_hash, again.config_hash} <= {record["config_hash"] for record in kept}


def test_an_evaluation_that_failed_is_mended(run, no_training, monkeypatch) -> None:
    from normexp.evaluation import evaluate_run

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("something")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="something"):
        patch.setattr(evaluate_run, "evaluate_run", out_of_memory)
        run(*AVERAGE, "evaluation.beam=3")
    no_training()
    assert run("evaluation.checkpoint=best").status == "complete"


def test_an_evaluation_that_this_version_refuses_is_mended(
    run, no_training, tmp_path: Path
) -> None:
    run(*AVERAGE)
    (config,) = tmp_path.rglob("config.yaml")
    config.write_text(config.read_text().replace("beam: 1\n", "beam: 1000000000\n"))
    for path in (config.with_name("record.json"), *tmp_path.rglob("records/*/*.json")):
        path.unlink()
    no_training()
    assert run(*AVERAGE).status == "complete"


def test_epochs_that_were_not_kept_are_another_training(run, tmp_path: Path) -> None:
    first = run(*AVERAGE)
    for needed in (["evaluation.checkpoint=average", "evaluation.average_last=3"],):
        with pytest.raises(UserError, match="is of another configuration"):
            run(*needed)
    (path,) = tmp_path.rglob("records/*/*.json")
    assert json.loads(path.read_text())["config_hash"] == first.config_hash


def test_which_training_serves_which_evaluation() -> None:
    best = composed("evaluation.checkpoint=best")
    two, three = (
        composed("evaluation.checkpoint=average", f"evaluation.average_last={n}") for n in (2, 3)
    )
    assert is_same_training(three, two) and not is_same_training(two, three)
    assert is_same_training(two, best) and not is_same_training(best, two)
    other = composed("evaluation.checkpoint=best", "fairseq.optimization.lr=[0.1]")
    assert not is_same_training(best, other)
    assert not is_same_training(best, composed("evaluation.checkpoint=best", "seed=2"))
