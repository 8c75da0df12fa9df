"""The moving average of the weights (fairseq.ema) of models whose norms count their steps."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.trainer import Trainer
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.config.settings import RunSettings
from normexp.errors import UserError
from normexp.evaluation import scores
from normexp.norms import available_norms, norm_class
from normexp.norms.running_norm import RunningNorm
from normexp.runs.folder import RunFolder
from normexp.runs.records import record_path

DECAY = 0.75
COUNTING = [name for name in available_norms() if issubclass(norm_class(name), RunningNorm)]


@pytest.fixture
def chosen(overrides, little_text: Path) -> Callable[..., RunSettings]:
    def build(*more: str) -> RunSettings:
        return composed(
            *overrides("toy_language_model", f"data.dir={little_text}"),
            "fairseq.optimization.max_epoch=0",
            "fairseq.optimization.max_update=5",
            "fairseq.dataset.max_tokens=700",
            "evaluation.splits=[valid]",
            "+fairseq.ema.store_ema=true",
            f"+fairseq.ema.ema_decay={DECAY}",
            *more,
        )

    return build


def last(settings: RunSettings) -> dict[str, Any]:
    return store.load(RunFolder(settings.run_dir).checkpoints / store.LAST)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The model's state after each update."""
    seen = []
    train_step = Trainer.train_step

    def step(self: Trainer, samples: Any, **kwargs: Any) -> Any:
        output = train_step(self, samples, **kwargs)
        seen.append(copy.deepcopy(self.get_model().state_dict()))
        return output

    monkeypatch.setattr(Trainer, "train_step", step)
    return seen


def averaged(weights: list[dict[str, torch.Tensor]], every: int) -> dict[str, torch.Tensor]:
    """The average by hand: it begins with the weights after the first update."""
    average = {name: value.double() for name, value in weights[0].items()}
    for update, state in enumerate(weights, 1):
        if update % every == 0:
            for name, value in state.items():
                average[name] = DECAY * average[name] + (1 - DECAY) * value.double()
    newest = len(weights) // every * every
    return {
        name: value if weights[0][name].is_floating_point() else weights[newest - 1][name]
        for name, value in average.items()
    }


@pytest.mark.parametrize(("every", "fp32"), [(1, False), (2, True)])
def test_the_average_is_that_of_the_weights_and_counters_are_the_newest(
    every: int,
    fp32: bool,
    chosen: Callable[..., RunSettings],
    weights: list[dict[str, torch.Tensor]],
) -> None:
    """Tied embeddings and the norm after the stack too, which fairseq averages twice and loses."""
    settings = chosen(
        *("norm=power", f"+fairseq.ema.ema_update_freq={every}", f"+fairseq.ema.ema_fp32={fp32}"),
        "evaluation.checkpoint=ema",
    )
    assert pipeline.run(settings).status == "complete"
    assert len(weights) == 5
    average = last(settings)["extra_state"]["ema"]
    expected = averaged(weights, every)
    assert average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value.double(), rtol=1e-5, atol=1e-6)
    steps = {int(value) for name, value in average.items() if name.endswith(".step")}
    assert steps == {5 // every * every}


@pytest.mark.parametrize("norm", COUNTING)
def test_every_norm_can_be_averaged(norm: str, chosen: Callable[..., RunSettings]) -> None:
    settings = chosen(f"norm={norm}", "fairseq.optimization.max_update=2")
    assert pipeline.run(settings).status == "complete"
    average = last(settings)["extra_state"]["ema"]
    assert all(value.isfinite().all() for value in average.values())


def test_a_resumed_run_goes_on_with_the_same_average(chosen: Callable[..., RunSettings]) -> None:
    settings = chosen(
        "norm=power",
        "+fairseq.checkpoint.save_interval_updates=3",  # within a period of the average
        "+fairseq.ema.ema_update_freq=2",
    )
    record = pipeline.run(settings)
    folder, without_break = RunFolder(settings.run_dir), last(settings)
    for path in (folder.finished, folder.record, record_path(settings.results_dir, record)):
        path.unlink()
    for path in folder.checkpoints.iterdir():
        if path.name != "checkpoint_1_3.pt":
            path.unlink()
    shutil.copy(folder.checkpoints / "checkpoint_1_3.pt", folder.checkpoints / store.LAST)
    pipeline.run(settings)
    for one, other in (
        (last(settings)["model"], without_break["model"]),
        (last(settings)["extra_state"]["ema"], without_break["extra_state"]["ema"]),
    ):
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_the_average_is_evaluated_where_it_is_asked_for_and_the_run_says_which(
    chosen: Callable[..., RunSettings], little_text: Path, capsys: pytest.CaptureFixture
) -> None:
    from normexp.corpora import prepare

    usual = pipeline.run(settings := chosen("norm=power"))
    assert "evaluation.checkpoint=best is of the weights themselves" in capsys.readouterr().out
    of_average = pipeline.run(chosen("norm=power", "label=ema", "evaluation.checkpoint=ema"))
    assert "weights themselves" not in capsys.readouterr().out
    assert of_average.metrics != usual.metrics
    # By hand: the average in the place of the weights.
    state = last(settings)
    path = settings.run_dir / "by_hand.pt"
    store.save(path, {**state, "model": state["extra_state"]["ema"]})
    corpus = prepare(settings.task.corpus, little_text)
    nll, tokens = scores.score(scores.load_model(path, corpus.data_bin), "valid", 16000, False)
    assert of_average.metrics["valid"]["loss_per_token_nats"] == pytest.approx(nll / tokens)


def test_a_run_without_an_average_has_none_to_evaluate(
    chosen: Callable[..., RunSettings], tmp_path: Path
) -> None:
    settings = chosen("fairseq.ema.store_ema=false", "fairseq.optimization.max_update=1")
    pipeline.run(settings)
    with pytest.raises(UserError, match=r"no moving average: fairseq\.ema\.store_ema was off"):
        store.select(RunFolder(settings.run_dir).checkpoints, "ema", 1)
