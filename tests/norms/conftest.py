"""Layers with more than one implementation pass the same tests with each."""

from collections.abc import Iterator

import pytest
from support.recorded import load
from support.stateful import CASES

from normexp.norms import norm_class
from normexp.norms.kernels import native
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

EVERYTHING_TWICE = {
    "test_broken_batches",
    "test_golden",
    "test_invariances",
    "test_known_layers",
    "test_padding",
    "test_precision",
    "test_references",
    "test_runaway_nu",
    "test_state",
}
# Of these, layers with a kernel run by default with one implementation only. That the other one
# computes the same is what test_references and test_golden say.
ONCE_BY_DEFAULT = {
    "test_invariances": "native",
    "test_runaway_nu": "native",
    "test_state": "plain",
}
# But the rules of the state are coded once for each, so these run with both.
TWICE_IN_TEST_STATE = {
    "test_forward_backward_times_k",
    "test_all_forwards_then_all_backwards",
    "test_one_backward_of_a_sum",
    "test_forward_without_backward",
    "test_state_overwritten_before_backward",
    "test_frozen_parameters_do_not_freeze_the_statistics",
    "test_training_forwards_without_gradients",
    "test_batch_of_padding_changes_no_state",
    "test_batch_without_positions",
    "test_second_backward_through_a_kept_graph",
    "test_gradient_of_the_gradient",
    "test_input_without_gradient",
    "test_non_contiguous_input",
    "test_expanded_input_and_gradient",
    "test_list_of_tokens",
    "test_input_is_left_alone",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ in EVERYTHING_TWICE:
        metafunc.parametrize("kernels", ["native", "plain"], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before markers deselect
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.module.__name__ in EVERYTHING_TWICE and _repeats(item):
            item.add_marker(pytest.mark.thorough)


def _repeats(item: pytest.Item) -> bool:
    """Whether the same test with another implementation is enough by default."""
    module, test = item.module.__name__, item.originalname
    given = item.callspec.params
    if given.get("how") == "fairseq" and test != "test_checkpointing_of_a_block":
        return True  # fairseq's checkpointing is a reentrant one too
    layer = _layer_of(given)
    if layer and getattr(norm_class(layer), "native_source", None) is None:
        return given["kernels"] == "native"  # the very same code runs
    if module == "test_state" and test in TWICE_IN_TEST_STATE:
        return False
    if module == "test_state" and test.startswith("test_checkpointing_of_a_"):
        return given["kernels"] == "native" and given["how"] != "non_reentrant"
    return given["kernels"] != ONCE_BY_DEFAULT.get(module, given["kernels"])


def _layer_of(given: dict[str, object]) -> str | None:
    """The layer that a test's parameters name, in one way or another."""
    if "case" in given:
        return CASES[given["case"]].name
    if "stem" in given:
        return load(given["stem"]).norm
    return given.get("name")


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation the test is about; elsewhere what a user would get."""
    before, wanted = chosen_kernels(), getattr(request, "param", "auto")
    if wanted == "native" and not native.load(native.NATIVE_SOURCES / "power.cpp"):
        pytest.skip("no compiled kernels here: see the line that kernels.native has logged")
    use_kernels(wanted)
    yield wanted
    use_kernels(before)
