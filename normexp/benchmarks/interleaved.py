"""Times of competitors, measured in turn so that whatever else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

Seconds = dict[str, list[float]]


def take_turns(
    competitors: Mapping[str, Callable[[], object]], rounds: int, progress: bool
) -> Seconds:
    """Seconds of each call: in every round each competitor is called once, after two unmeasured
    rounds. On a GPU a call lasts until its work is done."""
    seconds: Seconds = {name: [] for name in competitors}
    for round_ in tqdm(range(-2, rounds), "rounds", leave=False, disable=not progress or None):
        for name, call in competitors.items():
            started = _now()
            call()
            if round_ >= 0:
                seconds[name].append(_now() - started)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(seconds: Seconds, name: str, competitor: str) -> list[float]:
    """Quartiles of the ratios, round by round."""
    pairs = zip(seconds[name], seconds[competitor], strict=True)
    return quartiles([own / other for own, other in pairs])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
