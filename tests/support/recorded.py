"""Outputs recorded from the original authors' layers: the golden files, in this project's names."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "norms" / "golden"
NORMS = {
    "batch": "batch_released",
    "power": "power_released",
    "unified": "unified",
    "regularized_batch": "regularized_batch",
}
OPTIONS = {
    "eps": "eps",
    "momentum": "momentum",
    "alpha_fwd": "alpha_fwd",
    "alpha_bkw": "alpha_bwd",
    "warmup_iters": "warmup_steps",
    "group_num": "num_groups",
    "window_size": "window_size",
    "outlier_filtration": "outlier_filtration",
    "penalty_mean": "penalty_mean",
    "penalty_var": "penalty_var",
}
STATE = {
    "batch_released": {"running_mean": "running_mean", "running_var": "running_var"},
    "power_released": {"running_phi": "running_psi2", "ema_gz": "e", "iters": "step"},
    "unified": {
        "running_var": "running_psi2",
        "ema_gz": "e",
        "buffer_x2": "psi2_window",
        "buffer_gz": "lambda_window",
        "iters": "step",
        "skip_counter": "skipped",
    },
    "regularized_batch": {"running_mean": "running_mean", "running_var": "running_var"},
}


class Recording:
    """One golden file: a layer's options and, step by step, its inputs and results."""

    def __init__(self, path: Path):
        self._arrays = np.load(path, allow_pickle=False)
        self.config = json.loads(str(self._arrays["config"]))
        self.norm = NORMS[self.config["kind"]]
        self.num_features, self.steps = self.config["num_features"], self.config["steps"]
        self.options = {
            ours: self.config[theirs] for theirs, ours in OPTIONS.items() if theirs in self.config
        }
        self.parameters = {name: self._arrays[name] for name in ("weight", "bias")}

    def inputs(self, step: int | str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """x (T, B, C), pad (B, T) bool, and gy of a training step; step "_eval" has no gy."""
        pad = self._arrays[f"pad{step}"].astype(bool)
        return self._arrays[f"x{step}"], pad, self._arrays.get(f"gy{step}")

    def results(self, step: int | str) -> Iterator[tuple[str, np.ndarray]]:
        """What was recorded, named y, gx, weight, bias, penalty and as the layer's buffers."""
        names = {"y": "y", "gx": "gx", "gw": "weight", "gb": "bias", "penalty": "penalty"}
        for theirs, ours in (names | STATE[self.norm]).items():
            if f"{theirs}{step}" in self._arrays:
                yield ours, self._arrays[f"{theirs}{step}"]

    @property
    def tokens_only(self) -> bool:
        """Whether y and gx were recorded at real tokens only."""
        return self.norm == "regularized_batch"


def recordings() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.npz"))


def load(stem: str) -> Recording:
    return Recording(GOLDEN / f"{stem}.npz")
