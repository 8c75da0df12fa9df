"""The map over several processes: order, memory, failures."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from normexp.corpora.process_pool import map_blocks

ROWS = [(str(number), "x") for number in range(5_500)]


def double(row: tuple[str, ...]) -> tuple[str, ...]:
    return (row[0] * 2, row[1])


def fail(row: tuple[str, ...]) -> tuple[str, ...]:
    if row[0] == "3000":
        raise ValueError("a bad row")
    return row


def die(row: tuple[str, ...]) -> tuple[str, ...]:
    if row[0] == "3000":
        os.kill(os.getpid(), signal.SIGKILL)
    return row


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 1000, 1001, 2000, 5500])
def test_is_map(workers: int, number: int) -> None:
    rows = ROWS[:number]
    assert list(map_blocks(double, iter(rows), workers)) == [double(row) for row in rows]


def test_reads_no_further_ahead_than_needed() -> None:
    read = 0

    def rows():
        nonlocal read
        for number in range(100_000):
            read += 1
            yield (str(number), "x")

    results = map_blocks(double, rows(), 2)
    next(results)
    assert read < 10_000
    results.close()


def test_exception_in_a_worker_arrives() -> None:
    with pytest.raises(ValueError, match="a bad row"):
        list(map_blocks(fail, ROWS, 2))


def test_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(BrokenProcessPool):
        list(map_blocks(die, ROWS, 2))
