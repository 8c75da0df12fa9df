"""Batches that are worked on in several threads: results, errors and interruptions."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from normexp.evaluation.side_by_side import Interrupted, side_by_side

Check = Callable[[], None]


def squares() -> Callable[[int, Check], int]:
    return lambda number, check: number * number


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 40])
def test_every_item_once(num_threads: int, number: int, two_threads: None) -> None:
    found = list(side_by_side(squares, iter(range(number)), num_threads))
    assert sorted(found) == [(i, i * i) for i in range(number)]
    assert torch.get_num_threads() == 2


def test_each_thread_has_its_own_function_and_one_core(two_threads: None) -> None:
    both_at_work = threading.Barrier(2)

    def make() -> Callable[[int, Check], tuple[int, int, bool]]:
        mine = object()

        def work(item: int, check: Check) -> tuple[int, int, bool]:
            both_at_work.wait(30)
            return id(mine), torch.get_num_threads(), torch.is_inference_mode_enabled()

        return work

    (_, one), (_, other) = side_by_side(make, iter([1, 2]), 2)
    assert one[0] != other[0] and one[1:] == other[1:] == (1, True)
    assert torch.get_num_threads() == 2


def test_an_error_ends_the_work_of_others(two_threads: None) -> None:
    interrupted = threading.Event()

    def make() -> Callable[[int, Check], int]:
        def work(item: int, check: Check) -> int:
            if item == 1:
                raise KeyError("of one thread")
            try:
                while True:
                    check()
                    time.sleep(0.001)
            except Interrupted:
                interrupted.set()
                raise

        return work

    with pytest.raises(KeyError, match="of one thread") as caught:
        list(side_by_side(make, iter([0, 1, 2, 3]), 2))
    assert caught.traceback[-1].name == "work"
    assert interrupted.is_set() and torch.get_num_threads() == 2


@pytest.mark.parametrize("where", ["items", "make"])
def test_errors_outside_the_work_come_through(where: str, two_threads: None) -> None:
    def items() -> Iterator[int]:
        yield 1
        if where == "items":
            raise OSError("cannot be read")

    def make() -> Callable[[int, Check], int]:
        if where == "make":
            raise OSError("cannot be read")
        return lambda number, check: number

    with pytest.raises(OSError, match="cannot be read"):
        list(side_by_side(make, items(), 2))


def test_a_caller_that_leaves_ends_the_threads(two_threads: None) -> None:
    """As KeyboardInterrupt does, which is raised where the caller waits."""
    before = threading.active_count()
    results = side_by_side(squares, itertools.count(), 2)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before and torch.get_num_threads() == 2
