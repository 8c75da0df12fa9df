"""Language modelling on the text in order, in parallel streams."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import tasks
from hypothesis import given
from hypothesis import strategies as st

from normexp.fairseq_plugin.streams import stream_slices

PAD, END_OF_LINE = 1, 2


@given(st.data())
def test_slices_walk_through_equal_parts_side_by_side(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 300))
    streams = data.draw(st.integers(1, num_tokens))
    length = data.draw(st.integers(1, 40))
    parts: list[list[int]] = [[] for _ in range(streams)]
    rounds: list[list[int]] = []
    for begin, end in stream_slices(num_tokens, streams, length).tolist():
        part = next(number for number in count() if begin < (number + 1) * num_tokens // streams)
        if not rounds or part <= rounds[-1][-1]:
            rounds.append([])
        rounds[-1].append(part)
        parts[part] += range(begin, end)
    assert [token for part in parts for token in part] == list(range(num_tokens))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # every round but the last one has a segment of every stream
    assert all(len(parts_of) == streams for parts_of in rounds[:-1])
    assert len(rounds) == -(-max(map(len, parts)) // length)


@pytest.fixture
def build_task(structured_config: Callable, language_model_data: Path) -> Callable[..., Any]:
    def build(name: str = "normexp_language_modeling", **values: Any) -> Any:
        settings = {"_name": name, "data": str(language_model_data), "tokens_per_sample": 8}
        dataset = {"batch_size": values.pop("batch_size", None)}
        config = structured_config(task=settings | values, dataset=dataset)
        task = tasks.setup_task(config.task)
        task.load_dataset("train")
        return task

    return build


def batches(task: Any, epoch: int = 1, shards: tuple[int, int] = (1, 0)) -> Any:
    return task.get_batch_iterator(
        task.dataset("train"),
        max_tokens=10_000,
        max_sentences=task.args.batch_size,
        num_shards=shards[0],
        shard_id=shards[1],
        epoch=epoch,
        disable_iterator_cache=True,
    )


def text_of(task: Any, split: str = "train") -> torch.Tensor:
    lines = task.dataset(split).dataset.dataset
    return torch.cat([lines[index] for index in range(len(lines))])


def test_batch_is_the_next_segment_of_every_stream(build_task: Callable) -> None:
    task = build_task(streams=6, batch_size=6)
    text = text_of(task)
    inputs = torch.cat([torch.tensor([END_OF_LINE]), text[:-1]])
    bounds = [part * len(text) // 6 for part in range(7)]
    seen = 0
    for step, batch in enumerate(batches(task).next_epoch_itr(shuffle=True)):
        for row in range(6):
            begin = bounds[row] + 8 * step
            end = min(begin + 8, bounds[row + 1])
            width = end - begin
            assert batch["target"][row, :width].equal(text[begin:end])
            assert batch["target"][row, width:].eq(PAD).all()
            assert batch["net_input"]["src_tokens"][row, :width].equal(inputs[begin:end])
            seen += width
    assert seen == len(text)


def test_order_is_the_same_in_every_epoch_and_after_resuming(build_task: Callable) -> None:
    task = build_task(streams=6, batch_size=3)

    def ids(iterator: Any) -> list[list[int]]:
        return [batch["id"].tolist() for batch in iterator]

    in_order = np.arange(len(task.dataset("train")))
    first = batches(task)
    assert np.concatenate(ids(first.next_epoch_itr(shuffle=True))).tolist() == in_order.tolist()
    assert ids(first.next_epoch_itr(shuffle=True)) == ids(batches(task, 5).next_epoch_itr())
    running = batches(task, 2)
    steps = running.next_epoch_itr(shuffle=True)
    for _ in range(7):
        next(steps)
    resumed = batches(task, 2)
    resumed.load_state_dict(running.state_dict())
    assert ids(resumed.next_epoch_itr(shuffle=True)) == ids(steps)


def test_ranks_divide_the_streams_among_them(build_task: Callable) -> None:
    together = build_task(streams=6, batch_size=6)
    shared = build_task(streams=6, batch_size=3)
    whole = [batch["id"].tolist() for batch in batches(together).next_epoch_itr()]
    ranks = [
        [batch["id"].tolist() for batch in batches(shared, 1, (2, rank)).next_epoch_itr()]
        for rank in range(2)
    ]
    assert [left + right for left, right in zip(*ranks, strict=True)] == whole


def test_other_splits_and_no_streams_are_fairseqs_own(build_task: Callable) -> None:
    ours = build_task(streams=6, batch_size=6)
    stock = build_task("language_modeling")
    ours.load_dataset("valid")
    stock.load_dataset("valid")
    without = build_task(streams=0, batch_size=6)
    for split, task in (("valid", ours), ("train", without)):
        assert type(task.dataset(split)) is type(stock.dataset(split))
        assert len(task.dataset(split)) == len(stock.dataset(split))
        for index in range(len(stock.dataset(split))):
            assert task.dataset(split)[index]["target"].equal(stock.dataset(split)[index]["target"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streams": 6, "batch_size": 4}, "streams=6 need a batch_size that divides them, not 4"),
        ({"streams": 6}, "divides them, not None"),
        ({"streams": -2, "batch_size": 2}, "streams=-2"),
        ({"streams": 6, "batch_size": 6, "sample_break_mode": "complete"}, "must be none"),
        ({"streams": 10**6, "batch_size": 10**6}, "at most the .* tokens of the text"),
    ],
)
def test_impossible_streams_are_refused(values: dict, message: str, build_task: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(**values)
