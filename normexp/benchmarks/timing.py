"""Interleaved timing: in each round every candidate once, so that disturbances hit all alike."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

_BLOCK_SECONDS = 0.5  # the clock of /proc/stat ticks every 10 ms
_OTHERS_AT_MOST = 0.03
_ATTEMPTS = 4
_CANDIDATE_SECONDS, _MOST_CALLS = 0.005, 100


@dataclass(frozen=True)
class Timings:
    """Times of several candidates, and what was left out of them.

    seconds: of a call of each candidate, round by round.
    dropped: number of rounds left out because other processes used more than 3 % of the
        processors meanwhile.
    disturbed: there were so many of these that all rounds were kept; then dropped is 0.
    """

    seconds: dict[str, list[float]]
    dropped: int
    disturbed: bool

    def quartiles(self, name: str) -> list[float]:
        """Lower quartile, median and upper quartile of a candidate's seconds."""
        return quartiles(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """Quartiles of the ratio between two candidates' seconds, computed round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return quartiles([own / other for own, other in pairs])

    @property
    def rounds(self) -> dict[str, int | bool]:
        """What a record says of the rounds: how many were kept and dropped, and `disturbed`."""
        kept = len(next(iter(self.seconds.values())))
        return {
            "rounds_kept": kept, "rounds_dropped": self.dropped, "disturbed": self.disturbed
        }  # fmt: skip


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, progress: bool
) -> Timings:
    """Time every candidate once in each of `rounds` rounds, after two rounds of warm-up.

    What is timed is one call, or the mean of as many as take five milliseconds: the time of a
    single short call would depend on whether its code is still in the processor's caches, which
    the candidate before may have left there. On a GPU a call lasts until its work is done. Rounds
    disturbed by other processes are repeated, up to four times as many in all; where less than a
    quarter of `rounds` is undisturbed even so, all are kept.
    """
    calls = {name: 1 for name in candidates}
    for _ in range(2):
        for name, call in candidates.items():
            seconds = _mean_seconds(call, 1)
            calls[name] = min(_MOST_CALLS, max(1, round(_CANDIDATE_SECONDS / seconds)))
    quiet: list[dict[str, float]] = []
    noisy: list[dict[str, float]] = []
    with tqdm(total=rounds, desc="rounds", leave=False, disable=not progress or None) as bar:
        while len(quiet) < rounds and len(quiet) + len(noisy) < _ATTEMPTS * rounds:
            block, share = _block(candidates, calls, rounds - len(quiet))
            (quiet if share <= _OTHERS_AT_MOST else noisy).extend(block)
            bar.update(len(block) if share <= _OTHERS_AT_MOST else 0)
    disturbed = len(quiet) < max(2, rounds // 4)
    kept = quiet + noisy if disturbed else quiet
    return Timings(
        {name: [round_[name] for round_ in kept] for name in candidates},
        dropped=0 if disturbed else len(noisy),
        disturbed=disturbed,
    )


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def _mean_seconds(call: Callable[[], object], times: int) -> float:
    """Mean seconds of a call over `times` calls, on a GPU by its own clock."""
    if torch.cuda.is_available():
        return _mean_device_seconds(call, times)
    start = _now()
    for _ in range(times):
        call()
    return (_now() - start) / times


def _mean_device_seconds(call: Callable[[], object], times: int) -> float:
    """As `_mean_seconds`, between events in the device's stream, which has nothing else to do."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def _block(
    candidates: Mapping[str, Callable[[], object]], calls: Mapping[str, int], most: int
) -> tuple[list[dict[str, float]], float]:
    """Rounds for half a second, at most `most`, and the processors' share that others had then."""
    block: list[dict[str, float]] = []
    started, own, busy = time.perf_counter(), _own_seconds(), _busy_seconds()
    while len(block) < most and time.perf_counter() - started < _BLOCK_SECONDS:
        block.append({name: _mean_seconds(call, calls[name]) for name, call in candidates.items()})
    elapsed = time.perf_counter() - started
    by_others = (_busy_seconds() - busy) - (_own_seconds() - own)
    return block, by_others / (elapsed * (os.cpu_count() or 1))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float:
    """Processor seconds of all processes and of other guests of the host; 0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _now() -> float:
    return time.perf_counter()
