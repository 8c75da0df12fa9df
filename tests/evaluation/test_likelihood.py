"""The likelihood of an evaluation is the model's, whatever criterion it was trained with."""

from pathlib import Path

import pytest
import torch
from support.small_runs import composed

from normexp import pipeline
from normexp.checkpoints import store
from normexp.corpora import prepare
from normexp.evaluation import scores
from normexp.runs.folder import RunFolder

RDROP = {
    "_name": "label_smoothed_cross_entropy_with_rdrop",
    "rdrop_alpha": 5.0,
    "label_smoothing": 0.1,
}
PREFIX = {"_name": "label_smoothed_cross_entropy", "ignore_prefix_size": 1, "label_smoothing": 0.1}
FUSED = {"_name": "normexp_label_smoothed_cross_entropy", "fused": True, "label_smoothing": 0.3}


@torch.no_grad()
def by_hand(loaded: scores.LoadedModel, split: str) -> tuple[float, int]:
    """Negative log-likelihood in nats and number of tokens, one sentence after the other."""
    loaded.task.load_dataset(split)
    dataset, total, tokens = loaded.task.dataset(split), 0.0, 0
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        output = loaded.model(**sample["net_input"])
        log_probs = loaded.model.get_normalized_probs(output, log_probs=True, sample=sample)[0]
        target = sample["target"][0]
        total -= float(log_probs.double()[torch.arange(len(target)), target].sum())
        tokens += len(target)
    return total, tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory, little_text: Path) -> tuple[Path, Path]:
    """The last checkpoint of a short translation run, and the data."""
    from support.small_runs import SMALL

    settings = composed(
        *("task=toy_translation", f"data.dir={little_text}", "norm=power", "tracking=disabled"),
        *(f"results_dir={tmp_path_factory.mktemp('results')}", *SMALL["toy_translation"]),
        *("fairseq.optimization.max_update=2", "evaluation.splits=[valid]"),
    )
    pipeline.run(settings)
    corpus = prepare("toy_translation", little_text)
    return RunFolder(settings.run_dir).checkpoints / store.LAST, corpus.data_bin


@pytest.mark.parametrize("criterion", [RDROP, PREFIX, FUSED], ids=lambda c: c["_name"][-20:])
def test_criteria_that_fool_the_count_of_tokens_do_not_fool_the_evaluation(
    criterion: dict, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, data_bin = trained
    state = store.load(checkpoint)
    state["cfg"]["criterion"] = {**criterion, "sentence_avg": True}
    store.save(tmp_path / "checkpoint.pt", state)
    loaded = scores.load_model(tmp_path / "checkpoint.pt", data_bin, cpu=True)
    total, tokens = scores.score(loaded, "valid", 4000, progress=False)
    expected, number = by_hand(loaded, "valid")
    assert tokens == number
    assert total == pytest.approx(expected, rel=1e-5)
