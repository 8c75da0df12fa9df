"""Times of competitors, measured in turn so that whatever else the machine does hits them alike."""

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
_TURN_SECONDS, _MOST_CALLS = 0.005, 100


@dataclass(frozen=True)
class Turns:
    """seconds: of each competitor, round by round; the three counts say what was left out.

    dropped: rounds in which other processes used more than 3 % of the processors. Where a quarter
    of the rounds was not to be had otherwise, all are kept, dropped is 0 and disturbed is true.
    """

    seconds: dict[str, list[float]]
    dropped: int
    disturbed: bool

    def quartiles(self, name: str) -> list[float]:
        """Lower quartile, median and upper quartile of the seconds of a competitor."""
        return quartiles(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """Quartiles of the ratios between two competitors, taken round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return quartiles([own / other for own, other in pairs])


def take_turns(
    competitors: Mapping[str, Callable[[], object]], rounds: int, progress: bool
) -> Turns:
    """Give each competitor a turn in every round, after two unmeasured rounds.

    A turn is one call, or as many as take five milliseconds, whose mean counts: a single short call
    would be judged by whether its code is still in the processor's caches, which it is for whoever
    shares code with the competitor before. On a GPU a call lasts until its work is done.
    """
    calls = {name: 1 for name in competitors}
    for _ in range(2):
        for name, call in competitors.items():
            seconds = _turn(call, 1)
            calls[name] = min(_MOST_CALLS, max(1, round(_TURN_SECONDS / seconds)))
    clean: list[dict[str, float]] = []
    others: list[dict[str, float]] = []
    with tqdm(total=rounds, desc="rounds", leave=False, disable=not progress or None) as bar:
        while len(clean) < rounds and len(clean) + len(others) < _ATTEMPTS * rounds:
            block, share = _block(competitors, calls, rounds - len(clean))
            (clean if share <= _OTHERS_AT_MOST else others).extend(block)
            bar.update(len(block) if share <= _OTHERS_AT_MOST else 0)
    disturbed = len(clean) < max(2, rounds // 4)
    kept = clean + others if disturbed else clean
    return Turns(
        {name: [round_[name] for round_ in kept] for name in competitors},
        dropped=0 if disturbed else len(others),
        disturbed=disturbed,
    )


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def _turn(call: Callable[[], object], times: int) -> float:
    """Mean seconds of so many calls."""
    start = _now()
    for _ in range(times):
        call()
    return (_now() - start) / times


def _block(
    competitors: Mapping[str, Callable[[], object]], calls: Mapping[str, int], most: int
) -> tuple[list[dict[str, float]], float]:
    """Rounds of half a second, at most so many, and the share of other processes meanwhile."""
    block: list[dict[str, float]] = []
    started, own, busy = time.perf_counter(), _own_seconds(), _busy_seconds()
    while len(block) < most and time.perf_counter() - started < _BLOCK_SECONDS:
        block.append({name: _turn(call, calls[name]) for name, call in competitors.items()})
    elapsed = time.perf_counter() - started
    by_others = (_busy_seconds() - busy) - (_own_seconds() - own)
    return block, by_others / (elapsed * (os.cpu_count() or 1))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float:
    """Processor time of all processes together, time stolen by the host included; 0 if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
