"""Layers and references against outputs recorded from the authors' code, in float64.

Equality of the references with the recordings is what makes them an oracle elsewhere.
"""

import numpy as np
import pytest
from support.norm_steps import LayerSteps
from support.recorded import Recording, load, recordings

from normexp.norms.reference import Step, build_reference


class ReferenceSteps:
    """A reference behind the same interface as LayerSteps."""

    def __init__(self, name: str, num_features: int, **options: object):
        self.reference = build_reference(name, num_features, **options)
        self.parameters = self.reference.parameters
        self.train_step, self.infer = self.reference.train_step, self.reference.infer

    def state(self) -> dict[str, np.ndarray]:
        return self.reference.state


def compare(recording: Recording, step: int | str, obtained: dict[str, np.ndarray]) -> set[str]:
    """Assert that everything recorded in a step was obtained; returns the names compared."""
    token_mask = ~recording.inputs(step)[1].T
    compared = set()
    for name, expected in recording.results(step):
        value = np.asarray(obtained[name], dtype=np.float64)
        if name in ("y", "gx") and recording.tokens_only:
            value, expected = value[token_mask], expected[token_mask]
        np.testing.assert_allclose(
            value.reshape(expected.shape),
            expected,
            rtol=1e-9,
            atol=1e-9,
            err_msg=f"{name}, step {step}",
        )
        compared.add(name)
    return compared


@pytest.mark.parametrize("kind", ["layer", "reference"])
@pytest.mark.parametrize("stem", recordings())
def test_equals_recorded_outputs(stem: str, kind: str) -> None:
    recording = load(stem)
    build = LayerSteps if kind == "layer" else ReferenceSteps
    twin = build(recording.norm, recording.num_features, **recording.options)
    for name, value in recording.parameters.items():
        twin.parameters[name][...] = value
    for s in range(recording.steps):
        x, pad, gy = recording.inputs(s)
        step: Step = twin.train_step(x, pad, gy)
        everything = {"y": step.y, "gx": step.gx, "penalty": step.penalty} | step.gradients
        compared = compare(recording, s, everything | twin.state())
        assert {"y", "gx", "weight", "bias"} < compared, "state or penalty went uncompared"
    x, pad, _ = recording.inputs("_eval")
    assert compare(recording, "_eval", {"y": twin.infer(x, pad)}) == {"y"}


def test_every_recording_is_there() -> None:
    recorded = {load(stem).norm for stem in recordings()}
    assert recorded == {"batch_released", "power_released", "unified", "regularized_batch"}
    assert len(recordings()) == 10
