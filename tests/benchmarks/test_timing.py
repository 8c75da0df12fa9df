"""Candidates are timed in turn, and rounds that others disturbed are left out."""

from collections.abc import Callable

import pytest

from normexp.benchmarks import timing
from normexp.benchmarks.timing import Timings, interleave, quartiles


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A clock that only calls move, and the share of other processes in each block."""

    def set_clocks(others: list[float]) -> dict[str, Callable[[], None]]:
        now = {"wall": 0.0}
        shares = iter(others)

        def call(seconds: float) -> None:
            now["wall"] += seconds

        def block(*arguments: object) -> object:
            share = next(shares)
            result, _ = original(*arguments)
            return result, share

        original = timing._block
        monkeypatch.setattr(timing, "_block", block)
        monkeypatch.setattr(timing, "_now", lambda: now["wall"])
        monkeypatch.setattr(timing.time, "perf_counter", lambda: now["wall"])
        return {"slow": lambda: call(2.0), "fast": lambda: call(1.0)}

    return set_clocks


def test_candidates_interleave(clocks) -> None:
    calls: list[str] = []
    candidates = {
        name: lambda name=name, call=call: (calls.append(name), call())
        for name, call in clocks([0.0] * 9).items()
    }
    timings = interleave(candidates, 4, progress=False)
    assert calls == ["slow", "fast"] * 6
    assert timings == Timings({"slow": [2.0] * 4, "fast": [1.0] * 4}, dropped=0, disturbed=False)


def test_short_calls_are_made_several_times(clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five milliseconds a round, of which the mean counts; at most a hundred calls."""
    count, now = {"short": 0, "tiny": 0}, {"wall": 0.0}
    clocks([0.0] * 9)
    monkeypatch.setattr(timing, "_now", lambda: now["wall"])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 10 * now["wall"])

    def call(name: str, seconds: float) -> None:
        count[name] += 1
        now["wall"] += seconds

    candidates = {"short": lambda: call("short", 0.001), "tiny": lambda: call("tiny", 1e-6)}
    timings = interleave(candidates, 3, progress=False)
    assert count == {"short": 2 + 3 * 5, "tiny": 2 + 3 * 100}
    assert timings.seconds["short"] == pytest.approx([0.001] * 3)


def test_disturbed_rounds_are_dropped(clocks) -> None:
    timings = interleave(clocks([0.0, 0.5, 0.02, 0.04, 0.0, 0.0]), 4, progress=False)
    assert (timings.dropped, timings.disturbed, len(timings.seconds["fast"])) == (2, False, 4)


def test_a_machine_that_is_never_quiet_is_reported(clocks) -> None:
    timings = interleave(clocks([0.5] * 99), 4, progress=False)
    assert (timings.dropped, timings.disturbed, len(timings.seconds["fast"])) == (0, True, 16)


def test_time_of_others_is_all_but_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors for a second: one of them ours, half of the other somebody else's."""
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    ticks = {
        "wall": iter([0.0, 0.1, 1.0, 1.0]),
        "own": iter([5.0, 6.0]),
        "busy": iter([100.0, 101.5]),
    }
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks["wall"]))
    monkeypatch.setattr(timing, "_now", lambda: 0.0)
    monkeypatch.setattr(timing, "_own_seconds", lambda: next(ticks["own"]))
    monkeypatch.setattr(timing, "_busy_seconds", lambda: next(ticks["busy"]))
    block, share = timing._block({"a": lambda: None}, {"a": 1}, 5)
    assert len(block) == 1 and share == pytest.approx(0.25)


def test_the_clock_of_the_machine_runs_with_ours() -> None:
    own, busy = timing._own_seconds(), timing._busy_seconds()
    while timing._own_seconds() - own < 0.3:
        sum(range(10_000))
    assert timing._busy_seconds() - busy > 0.25


def test_quartiles_and_ratios_by_round() -> None:
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == [2.0, 3.0, 4.0]
    timings = Timings({"slow": [2.0, 8.0, 3.0], "fast": [1.0, 2.0, 3.0]}, 0, False)
    assert timings.ratios("slow", "fast") == [1.5, 2.0, 3.0]
    assert timings.quartiles("fast") == [1.5, 2.0, 2.5]


def test_rounds_of_a_record() -> None:
    timings = Timings({"slow": [2.0] * 3, "fast": [1.0] * 3}, dropped=2, disturbed=False)
    assert timings.rounds == {"rounds_kept": 3, "rounds_dropped": 2, "disturbed": False}
