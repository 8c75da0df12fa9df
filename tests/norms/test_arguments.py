"""Wrong options, shapes and masks are refused by name, by every registered normalization."""

import pytest
import torch

from normexp.norms import available_norms, build_norm, norm_options

C = 4
# For each option values that no layer may accept; of an option of a new name no layer but its own
# knows them, so that they belong into this list.
REFUSED = {
    "eps": (0.0, -1e-5, "small", None, True, float("nan")),
    "momentum": (-0.1, 1.5, "fast", float("nan")),
    "alpha": (-0.1, "steep", float("nan")),
    "alpha_fwd": (1.0, -0.1, None, float("nan")),
    "alpha_bwd": (1.0, -0.1, None, float("nan")),
    "warmup_steps": (-1, 2.5, True, "4000"),
    "num_groups": (0, 3, -2, 2.0),
    "window_size": (0, -1, 2.5),
    "outlier_filtration": (1, "yes", None),
    "bound_nu": (1, "yes", None),
    "sync": (1, "yes", None),
    "penalty_mean": (-0.1, "much", float("nan")),
    "penalty_var": (-0.1, "much", float("nan")),
    "k": ("much", None, float("nan")),
    "scale": (0.0, -1.0, "much", float("nan")),
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, value)
        for name in available_norms()
        for option in norm_options(name)
        for value in REFUSED.get(option, ())
    ],
)
def test_bad_value_is_refused_by_name(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option}\b"):
        build_norm(name, C, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lyer", {}, "unknown normalization 'lyer'; known: .*batch.*power_v"),
        ("power", {"alpha": 0.9}, "no option 'alpha'; its options: eps, alpha_fwd"),
        ("none", {"eps": 1e-5}, "no option 'eps'; its options: none"),
        ("power", {"alpha_fwd": 1.0}, r"alpha_fwd must lie in \[0, 1\)"),
        ("power", {"warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        ("power", {"eps": 0.0}, "eps must be greater than 0"),
        ("batch", {"momentum": 0.0}, r"momentum must lie in \(0, 1\]"),
        ("power_released", {"num_groups": 3}, "num_groups=3 does not divide 4"),
        ("power_v", {"alpha": 1.0}, r"alpha must lie in \[0, 1\)"),
        ("unified", {"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ("dynamic_tanh", {"alpha": 0.0}, "alpha must be greater than 0"),
    ],
)
def test_error_names_the_choice(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_norm(name, C, **options)


@pytest.mark.parametrize("num_features", [0, -3, 2.0, "512"])
def test_number_of_channels_is_checked(num_features: object) -> None:
    with pytest.raises(ValueError, match="num_features must be a positive integer"):
        build_norm("power", num_features)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", available_norms())
def test_wrong_mask_or_shape_is_refused(name: str, training: bool) -> None:
    """And nothing of the state has changed by then."""
    norm = build_norm(name, C).train(training)
    before = {what: buffer.clone() for what, buffer in norm.named_buffers()}
    x = torch.randn(5, 3, C)
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        norm(x, torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        norm(x[:, 0], torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        norm(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\(T, B, 4\)"):
        norm(torch.randn(5, 3, 6))
    with pytest.raises(ValueError, match=r"\(T, B, 4\)"):
        norm(torch.randn(2, C, 5))  # channels in the middle
    images = torch.randn(2, 5, 3, C)
    with pytest.raises(ValueError, match=r"shape \(5, 2\) or \(2, 5, 3\)|which dimensions"):
        norm(images, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="floating-point"):
        norm(torch.ones(5, 3, C, dtype=torch.long))
    for what, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[what]), what
