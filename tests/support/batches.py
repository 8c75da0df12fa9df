"""Random batches and options for the tests of normalizations."""

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st

from normexp.norms import norm_options

# Divisible by every num_groups below.
C = 4
few_examples = settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # explaining a failure takes minutes
)
many_examples = settings(few_examples, max_examples=25)

# What each option is tried with; sync needs several processes and is tested elsewhere.
OPTION_VALUES: dict[str, list[object]] = {
    "eps": [1e-5, 1e-2],
    "momentum": [0.05, 0.6],
    "alpha": [0.4, 0.9],
    "alpha_fwd": [0.0, 0.5, 0.9],
    "alpha_bwd": [0.0, 0.5, 0.9],
    "warmup_steps": [0, 1, 3, 4, 9],
    "num_groups": [1, 2, 4],
    "window_size": [2, 3],
    "outlier_filtration": [False, True],
    "bound_nu": [False, True],
    "penalty_mean": [0.0, 0.1, 60.0],
    "penalty_var": [0.0, 0.01, 2.0],
    "k": [0.0, 0.1, 0.7],
    "scale": [1.0, 2.5],
    "sync": [False],
}


class Batch:
    """x, gy (T, B, C) float64; pad (B, T), True = padding."""

    def __init__(self, x: np.ndarray, pad: np.ndarray, gy: np.ndarray):
        self.x, self.pad, self.gy = x, pad, gy

    def __repr__(self) -> str:
        return f"<{self.x.shape}, rms {np.sqrt((self.x**2).mean()):.3g}, {self.pad.sum()} padded>"

    @property
    def token_mask(self) -> np.ndarray:
        """(T, B) bool, True = real token."""
        return ~self.pad.T


def random_batch(t: int, b: int, seed: int, scale: float = 1.0, c: int = C) -> Batch:
    """Padding anywhere, at least one real token, channels of different mean and spread."""
    rng = np.random.default_rng(seed)
    spread, shift = rng.uniform(0.3, 3.0, c), rng.uniform(-1.5, 1.5, c)
    x = scale * (rng.standard_normal((t, b, c)) * spread + shift)
    pad = rng.random((b, t)) < rng.choice([0.0, 0.3, 0.7])
    pad[rng.integers(b), rng.integers(t)] = False
    return Batch(x, pad, rng.standard_normal((t, b, c)))


@st.composite
def batch_sequences(draw: st.DrawFn, length: int, same_scale: bool = False) -> list[Batch]:
    """Batches of differing shapes and, unless same_scale, of differing magnitude."""
    seed = draw(st.integers(0, 10**6))
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=length, max_size=length)
    )
    spread = 0.0 if same_scale else draw(st.sampled_from([0.0, 0.3, 1.0]))
    rng = np.random.default_rng(seed)
    return [
        random_batch(t, b, seed + i, scale=10 ** (spread * rng.standard_normal()))
        for i, (t, b) in enumerate(shapes)
    ]


@st.composite
def option_sets(draw: st.DrawFn, name: str) -> dict[str, object]:
    """Options of the normalization `name`, all of them given."""
    return {
        option: draw(st.sampled_from(OPTION_VALUES.get(option) or like(default)))
        for option, default in norm_options(name).items()
    }


def like(default: object) -> list[object]:
    """Values of an option that `OPTION_VALUES` does not have: its default and one beside it."""
    if isinstance(default, bool):
        return [default, not default]
    if isinstance(default, int | float):
        return [default, default + 1 if isinstance(default, int) else default / 2]
    return [default]


def quick_options(name: str) -> dict[str, object]:
    """Options that let warm-ups end within a few steps, and groups have several channels."""
    wanted = {"warmup_steps": 2, "num_groups": 2}
    return {option: wanted[option] for option in norm_options(name) if option in wanted}
