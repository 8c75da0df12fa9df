"""Every registered normalization against its reference, from the first step to inference."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.batches import (
    OPTION_VALUES,
    Batch,
    C,
    batch_sequences,
    like,
    many_examples,
    option_sets,
    random_batch,
)
from support.norm_steps import LayerSteps

from normexp.norms import available_norms, norm_options
from normexp.norms.reference import REFERENCES, Reference, build_reference
from normexp.norms.registry import _NORMS

STEPS = 7


def assert_equal(obtained: np.ndarray, expected: np.ndarray, what: str) -> None:
    size = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(obtained, expected, rtol=1e-8, atol=1e-10 * size, err_msg=what)


def random_parameters(layer: LayerSteps, reference: Reference) -> None:
    """The same random parameters in both, which must have the same ones at the same start."""
    assert set(layer.parameters) == set(reference.parameters)
    rng = np.random.default_rng(3)
    for name, expected in reference.parameters.items():
        np.testing.assert_allclose(layer.parameters[name], expected, rtol=1e-6)  # from float32
        value = rng.uniform(0.3, 2.0, expected.shape) * rng.choice([-1, 1], expected.shape)
        layer.parameters[name][...] = reference.parameters[name] = value


def compare_state(layer: LayerSteps, reference: Reference, when: str) -> None:
    state = layer.state()
    if reference.state:
        assert state.pop("num_rejected") == 0, when
    assert set(state) == set(reference.state)
    for name, expected in reference.state.items():
        assert_equal(state[name], expected, f"{name} {when}")


def visible(reference: Reference, values: np.ndarray, batch: Batch) -> np.ndarray:
    """values (T, B, C) where the layer promises something."""
    return values if reference.padding_takes_part else values[batch.token_mask]


@pytest.mark.parametrize("name", available_norms())
@many_examples
@given(data=st.data())
def test_layer_equals_reference(name: str, data: st.DataObject) -> None:
    """Outputs, gradients, penalty and state of each step, then inference.

    Warm-ups end within these steps; the jump of the step counter leads to what a layer does only
    after a thousand steps.
    """
    options = data.draw(option_sets(name), label="options")
    batches = data.draw(batch_sequences(STEPS + 1), label="batches")
    jump = data.draw(st.sampled_from([0, 0, 1000]), label="jump")
    compare_run(name, options, batches, jump)


def compare_run(name: str, options: dict, batches: list[Batch], jump: int) -> Reference:
    """Train on all batches but the last, infer on the last; the reference as it is at the end.

    The step counters jump by `jump` after the fourth step.
    """
    layer, reference = LayerSteps(name, C, **options), build_reference(name, C, **options)
    random_parameters(layer, reference)
    for step, batch in enumerate(batches[:-1]):
        if step == 4 and "step" in reference.state:
            layer.norm.step += jump
            reference.state["step"] = reference.state["step"] + jump
        gy = batch.gy if reference.padding_takes_part else batch.gy * batch.token_mask[..., None]
        obtained = layer.train_step(batch.x, batch.pad, gy)
        expected = reference.train_step(batch.x, batch.pad, gy)
        for what in ("y", "gx"):
            assert_equal(
                visible(reference, getattr(obtained, what), batch),
                visible(reference, getattr(expected, what), batch),
                f"{what} of step {step}",
            )
        for parameter, gradient in expected.gradients.items():
            assert_equal(obtained.gradients[parameter], gradient, f"{parameter} of step {step}")
        assert_equal(obtained.penalty, expected.penalty, f"penalty of step {step}")
        compare_state(layer, reference, f"after step {step}")
    x, pad = batches[-1].x, batches[-1].pad
    assert_equal(
        visible(reference, layer.infer(x, pad), batches[-1]),
        visible(reference, reference.infer(x, pad), batches[-1]),
        "inference",
    )
    compare_state(layer, reference, "after inference")
    return reference


@pytest.mark.parametrize("scales", [(50.0,) * 6, (0.02,) * 6, (3.0, 0.3, 1.0, 2.0, 0.5, 1.0)])
def test_unified_gradient_factor_is_clamped(scales: tuple[float, ...]) -> None:
    """After a thousand steps: r at its upper bound, at its lower bound, and between them."""
    batches = [random_batch(3, 2, seed, scale) for seed, scale in enumerate((1.0,) * 4 + scales)]
    compare_run("unified", {"warmup_steps": 5}, batches, jump=1000)


def test_unified_filters_outliers() -> None:
    """Some batches after the warm-up are skipped, some are not."""
    scales = (1.0, 1.5, 0.6, 1.0, 1.1, 30.0, 1.0, 0.9, 0.01, 1.2, 1.0, 0.8, 1.1)
    batches = [random_batch(4, 3, seed, scale, c=C) for seed, scale in enumerate(scales)]
    options = {"warmup_steps": 5, "outlier_filtration": True}
    reference = compare_run("unified", options, batches, jump=1000)
    assert 2 <= reference.state["skipped"] <= 6


@pytest.mark.parametrize("name", available_norms())
def test_defaults_are_those_of_the_reference(name: str) -> None:
    build_reference(name, C)
    parameters = list(inspect.signature(REFERENCES[name]).parameters.values())
    assert {p.name: p.default for p in parameters[1:]} == norm_options(name)


@pytest.mark.parametrize("name", available_norms())
def test_options_are_tried_with_several_values(name: str) -> None:
    for option, default in norm_options(name).items():
        tried = OPTION_VALUES.get(option) or like(default)
        assert option == "sync" or len(tried) > 1, f"add values to OPTION_VALUES: {option}"


def test_norm_without_reference_fails_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new normalization sees that forgot its reference."""
    monkeypatch.setitem(_NORMS, "forgotten", _NORMS["none"])
    assert "forgotten" in available_norms()
    with pytest.raises(
        LookupError, match=r"'forgotten' has no reference: write one in normexp/norms/reference/"
    ):
        build_reference("forgotten", C)
