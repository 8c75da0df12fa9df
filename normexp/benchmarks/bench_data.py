"""Time of reading a batch of training data, beside that of the training step on it."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from normexp.benchmarks.benchmark_record import write_record
from normexp.benchmarks.timing import interleave
from normexp.benchmarks.toy import toy_task

TASKS = ("toy_translation", "toy_language_model")
_BATCHES = 8  # of a round
_PARTS = ("reading", "training step")


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Time reading batches of both toy corpora, and the training steps on them.

    Writes to `record`, and returns, for each of the two the quartiles of milliseconds per batch and
    of the ratio to the step, and medians of batches and of target tokens per second. Reading is
    fairseq's iterator in this process, shuffled, with the batches of the project's configuration;
    the model is the configuration's, in float32.
    """
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            measured += _rows(task, Path(folder), rounds, progress)
    result = {
        "what": "reading of a batch from the prepared corpus, and the training step on it",
        "quartiles": "lower, median, upper",
        "measured": measured,
    }
    return write_record(record, "data", {"rounds": rounds}, result)


def _rows(name: str, folder: Path, rounds: int, progress: bool) -> list[dict[str, Any]]:
    from fairseq.trainer import Trainer

    cfg, task = toy_task(name, folder)
    cfg.common.cpu = not torch.cuda.is_available()
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    trainer = Trainer(cfg, task, model, criterion)
    epochs = trainer.get_train_iterator(epoch=1)
    trainer.begin_epoch(1)
    batches = _endless(epochs)
    read: list[Any] = []

    def reading() -> None:
        read[:] = itertools.islice(batches, _BATCHES)

    def step() -> None:
        for batch in read:
            trainer.train_step([batch])

    timings = interleave(dict(zip(_PARTS, (reading, step), strict=True)), rounds, progress)
    dataset = task.dataset("train")
    sizes = dataset.tgt_sizes if hasattr(dataset, "tgt_sizes") else dataset.sizes
    tokens = int(sizes.sum()) / len(epochs)
    rows = []
    for part in _PARTS:
        seconds = [value / _BATCHES for value in timings.quartiles(part)]
        rows.append(
            {
                "task": name,
                "part": part,
                "tokens_per_batch": round(tokens),
                "milliseconds_per_batch": [round(1e3 * value, 3) for value in seconds],
                "batches_per_second": round(1 / seconds[1], 1),
                "tokens_per_second": round(tokens / seconds[1]),
                "ratio_to_step": [round(r, 4) for r in timings.ratios(part, "training step")],
                **timings.rounds,
            }
        )
    return rows


def _endless(epochs: Any) -> Iterator[Any]:
    while True:
        yield from epochs.next_epoch_itr(shuffle=True)
