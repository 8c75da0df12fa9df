"""Time of the normalization layers over the number of tokens, channels and groups."""

from pathlib import Path
from typing import Any

from normexp.benchmarks.bench_norms import BASELINE, Layer, measure_layers
from normexp.benchmarks.benchmark_record import write_record

TOKENS = (256, 1024, 4096, 8192, 16384, 32768)  # with 512 channels
CHANNELS = (128, 256, 512, 1024, 2048)  # with 4096 tokens
GROUPS = (1, 2, 4, 8, 16)  # of power_released, with 4096 tokens and 512 channels
LAYERS = {
    "power": Layer("power", {"warmup_steps": 0}),
    "power_released": Layer("power_released", {"warmup_steps": 0, "num_groups": 4}),
    "batch": Layer("batch", {}),
}
_BATCH = 32


def measure(rounds: int, record: Path, progress: bool) -> dict[str, Any]:
    """Forward and backward in training at every size and type; write to `record`.

    Padding and types are those of the benchmark `norms`. Returns what it writes: for every layer
    quartiles of nanoseconds per element of x, and of the ratio to nn.LayerNorm at the same size.
    """
    measured = []
    for sweep, tokens, channels, layers in _sizes():
        shape = (tokens // _BATCH, _BATCH, channels)
        for one in measure_layers(shape, layers, (BASELINE,), rounds, progress):
            layer = layers.get(one.row["layer"])
            per_element = [seconds / (tokens * channels) for seconds in one.seconds]
            size = {
                "sweep": sweep,
                "tokens": tokens,
                "channels": channels,
                "groups": layer.options.get("num_groups") if layer else None,
                "nanoseconds_per_element": [round(1e9 * seconds, 4) for seconds in per_element],
            }
            measured.append(one.row | size)
    result = {
        "what": "forward and backward of a normalization layer in training over its size",
        "quartiles": "lower, median, upper",
        "measured": measured,
    }
    return write_record(record, "scaling", {"rounds": rounds}, result)


def _sizes() -> list[tuple[str, int, int, dict[str, Layer]]]:
    """Of each measurement: the quantity that is varied, tokens, channels and layers."""
    by_groups = {
        f"power_released, {groups} groups": Layer(
            "power_released",
            {"warmup_steps": 0, "num_groups": groups},
        )
        for groups in GROUPS
    }
    return [
        *(("tokens", tokens, 512, LAYERS) for tokens in TOKENS),
        *(("channels", 4096, channels, LAYERS) for channels in CHANNELS),
        ("groups", 4096, 512, by_groups),
    ]
