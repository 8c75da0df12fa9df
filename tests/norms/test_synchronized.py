"""Statistics of data-parallel training: several processes against one with all their tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import norm_ranks
from support.batches import C
from support.norm_ranks import LEARNING_RATE, STEPS, SYNC_CASES, batch_of, concatenated
from support.stateful import CASES, CHANGED_IN_BACKWARD, assert_same, forward, no_warnings, state
from support.thorough import default_cases
from torch import nn

from normexp.norms import average_statistics, build_norm

every_case = pytest.mark.parametrize("case", SYNC_CASES)
TOLERANCE = 1e-9

Results = list[dict[str, dict]]


def alone(norm: nn.Module, rank: int, world: int, steps: Sequence[int]) -> list[dict]:
    """State after each step of a rank that knows of no other."""
    states = []
    for step in steps:
        forward(norm, batch_of(rank, step, world))[1].backward()
        states.append(state(norm))
    return states


@pytest.fixture(
    scope="module", params=default_cases(["2-native", "3-native", "2-plain"], {"2-native"})
)
def setting(request: pytest.FixtureRequest) -> tuple[int, str]:
    """Number of ranks and what computes."""
    world, kernels = request.param.split("-")
    return int(world), kernels


@pytest.fixture(scope="module")
def kernels(setting: tuple[int, str]) -> str:
    return setting[1]


@pytest.fixture(scope="module")
def results(setting: tuple[int, str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of every scenario, by rank. Starting processes takes seconds, so they run all of them."""
    return norm_ranks.run_all(*setting, tmp_path_factory.mktemp("ranks"))


def test_every_layer_with_the_option_is_tried() -> None:
    assert {CASES[case].name for case in SYNC_CASES} == {
        *("batch", "regularized_batch", "power_v", "power", "power_released", "unified")
    }


@every_case
def test_equal_to_one_process_with_all_tokens(results: Results, case: str) -> None:
    """Outputs, gradients, parameter gradients summed over the ranks, state; then inference."""
    world = len(results)
    batches, sizes = zip(*(concatenated(world, step) for step in range(STEPS)), strict=True)
    expected = norm_ranks.train_and_record(CASES[case].build(sync=True), list(batches))
    obtained = [of_rank["training"][case] for of_rank in results]
    for step in range(STEPS):
        one = expected["steps"][step]
        many = [of_rank["steps"][step] for of_rank in obtained]
        for what in ("y", "gx"):
            parts = one[what].split(sizes[step])
            for rank, part in enumerate(parts):
                assert_same(many[rank][what], part, TOLERANCE)
        for name, gradient in one["parameters"].items():
            total = sum(of_rank["parameters"][name] for of_rank in many)
            assert_same(total, gradient, TOLERANCE)
        # The penalty counts once in the sum of the ranks' losses.
        assert_same(sum(of_rank["loss"] for of_rank in many), one["loss"], TOLERANCE)
        for of_rank in many:
            assert_same(of_rank["state"], one["state"], TOLERANCE)
    parts = expected["y_eval"].split(sizes[-1])
    assert_same([of_rank["y_eval"] for of_rank in obtained], list(parts), TOLERANCE)


@every_case
def test_state_is_the_same_on_all_ranks_to_the_bit(results: Results, case: str) -> None:
    for step in range(STEPS):
        first, *others = [of_rank["training"][case]["steps"][step]["state"] for of_rank in results]
        for other in others:
            assert_same(other, first)
    for other in results[1:]:
        assert_same(other["half_precision"][case], results[0]["half_precision"][case])


def test_differentiable_gradient_is_the_same(results: Results) -> None:
    """Of the losses of all ranks, too: both ways of computing it sum what the ranks found."""
    for of_rank in results:
        for case, (written_out, by_autograd) in of_rank["differentiable"].items():
            for obtained, expected in zip(by_autograd, written_out, strict=True):
                torch.testing.assert_close(obtained, expected, rtol=1e-9, atol=1e-9, msg=case)


@every_case
def test_one_collective_per_pass(results: Results, kernels: str, case: str) -> None:
    """PN past its warm-up: one of both passes, which begins when they are over; inference: none."""
    warmup = getattr(CASES[case].build(sync=True), "warmup_steps", 0)
    packs = CASES[case].name == "power" and kernels == "native"
    for of_rank in results:
        recorded = of_rank["training"][case]
        before = 0
        for step in recorded["steps"]:
            past = packs and before >= warmup
            assert step["collectives"] == ([0, 1] if past else [1, 1])
            before = int(step["state"]["step"])
        assert before > warmup
        assert recorded["collectives_eval"] == 0


def test_statistics_of_different_layers_are_not_added_up(results: Results) -> None:
    """As where each rank leaves out layers at random; on every rank, before its sums are used."""
    for of_rank in results:
        said = dict(of_rank["other_layers"])
        assert said.pop("before") == said.pop("after") == ""
        assert said.keys() == {*norm_ranks.SYNC_CASES, "deferred"}
        for case, message in said.items():
            assert message.startswith("ranks add up the statistics of different"), case


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_several_layers_share_a_collective(
    results: Results, kernels: str, shared: bool, frozen: bool
) -> None:
    """One a step for all layers; and as one process, also after a forward without backward."""
    world = len(results)
    batches, sizes = zip(*(concatenated(world, step) for step in range(STEPS)), strict=True)
    expected = norm_ranks.iterate(norm_ranks.stack(shared, frozen), list(batches))["steps"]
    for rank, of_rank in enumerate(results):
        obtained = of_rank["several_layers"][f"{shared}-{frozen}"]["steps"]
        for number, (one, many) in enumerate(zip(expected, obtained, strict=True)):
            if number == 2:
                assert many["gx"] is None  # nothing has to have arrived yet
                continue
            assert_same(many["gx"], one["gx"].split(sizes[number])[rank], TOLERANCE)
            assert_same(many["state"], one["state"], TOLERANCE)
            if kernels == "native" and not shared:
                # that of the forward without backward comes with the next forward
                assert many["collectives"] == (2 if number == 3 else 1)


@every_case
def test_nan_on_one_rank_is_rejected_on_all(results: Results, case: str) -> None:
    """In a token: no trace in the state. In a gradient: none of the backward pass."""
    in_backward = CHANGED_IN_BACKWARD.get(CASES[case].name, set())
    for of_rank in results:
        recorded = of_rank["not_finite"][case]
        assert_same(recorded, results[0]["not_finite"][case])
        before, token, gradient = (recorded[what] for what in ("before", "x", "gy"))
        assert before["num_rejected"] == 0
        assert token["num_rejected"] == (2 if in_backward else 1)
        assert gradient["num_rejected"] == (3 if in_backward else 1)
        for what in set(before) - {"num_rejected"}:
            assert_same(token[what], before[what])
            if what in in_backward:
                assert_same(gradient[what], before[what])
        assert gradient["step"] == before["step"] + 1
        assert recorded["after"]["step"] == before["step"] + 2
        for value in recorded["after"].values():
            assert value.isfinite().all()


@every_case
def test_checkpointing_neither_waits_forever_nor_changes_anything(
    results: Results, case: str
) -> None:
    for of_rank in results:
        recorded = of_rank["checkpointing"][case]
        assert_same(recorded["False-True"], recorded["None-True"], 1e-12)
        assert_same(recorded["True-False"], recorded["None-False"], 1e-12)
        for kind, of_first in results[0]["checkpointing"][case].items():
            assert_same(recorded[kind]["state"], of_first["state"])


@every_case
@pytest.mark.parametrize("broadcast", [True, False])
def test_data_parallel_model_equals_one_process(
    results: Results, case: str, broadcast: bool
) -> None:
    """Parameters and state after every step; broadcasting rank 0's buffers does no harm."""
    world = len(results)
    model = norm_ranks.small_model(case, sync=True)
    batches = [concatenated(world, step)[0] for step in (0, 1, 2, 3, 4, 6)]
    expected = norm_ranks.descend(model, model, batches, LEARNING_RATE)
    for of_rank in results:
        assert_same(of_rank["data_parallel"][f"{case}-{broadcast}"], expected, TOLERANCE)


def test_reading_on_one_rank_changes_no_training(results: Results) -> None:
    """Saving, copying, evaluating on one rank only; and what is read is the state of that step."""
    for rank, of_rank in enumerate(results):
        for broadcast in (True, False):
            unread = of_rank["reading"][f"{broadcast}-None-by_state_dict"]
            for key, obtained in of_rank["reading"].items():
                _, reader, way = key.split("-")
                assert_same(obtained["last"], unread["last"])
                if reader != str(rank):
                    continue
                for read, model in zip(obtained["read"], unread["read"], strict=True):
                    psi2, nu = model["norm.running_psi2"], model["norm.nu"]
                    scale = torch.rsqrt(psi2 + 1e-5) * model["norm.weight"]
                    expected = {
                        "by_state_dict": model,
                        "by_moving": model,
                        "by_statistics": {"psi2": psi2, "nu": nu},
                        "by_inference": {"scale": scale, "shift": model["norm.bias"]},
                        "by_copy": {"norm.running_psi2": psi2, "norm.nu": nu},
                        "by_pickle": {"running_psi2": psi2, "nu": nu, "step": model["norm.step"]},
                    }[way]
                    assert_same({name: read[name] for name in expected}, expected)


@every_case
def test_data_parallel_without_sync(results: Results, case: str) -> None:
    """Each rank by itself; or with broadcast_buffers, torch's default, all start from rank 0's.

    Then a rank's state is that of rank 0 before the step, moved on by the rank's own batch: what
    ranks other than 0 saw is forgotten with the next forward.
    """
    world, steps = len(results), (0, 2, 4)
    rank0 = [state(CASES[case].build()), *alone(CASES[case].build(), 0, world, steps)]
    for rank, of_rank in enumerate(results):
        obtained = of_rank["data_parallel_private"]
        by_itself = alone(CASES[case].build(), rank, world, steps)
        assert_same(obtained[f"{case}-False"], by_itself, 1e-12)
        for i, step in enumerate(steps):
            norm = CASES[case].build()
            for name, buffer in norm.named_buffers():
                buffer.copy_(rank0[i][name])
            (after,) = alone(norm, rank, world, [step])
            assert_same(obtained[f"{case}-True"][i], after, 1e-12)


def test_private_statistics_are_warned_of_once(results: Results) -> None:
    """Although many layers ran many times."""
    for of_rank in results:
        (message,) = [text for text in of_rank["private"]["warnings"] if "private" in text]
        assert "sync=True" in message and "average_statistics" in message


def test_pooling_averages_over_the_ranks(results: Results) -> None:
    """Running statistics of this package's layers; counters and other modules stay as they are."""
    before = [of_rank["private"]["before"] for of_rank in results]
    foreign = f"{len(SYNC_CASES) + 1}."
    pooled = {
        name: sum(of_rank[name] for of_rank in before) / len(before)
        for name, value in before[0].items()
        if value.is_floating_point() and not name.startswith(foreign)
    }
    assert not torch.equal(before[0]["0.running_mean"], before[1]["0.running_mean"])
    for rank, of_rank in enumerate(results):
        after = of_rank["private"]["after"]
        assert_same(after, {**before[rank], **pooled}, 1e-12)
        for name in pooled:
            assert_same(after[name], results[0]["private"]["after"][name])
        assert of_rank["private"]["collectives"] == 1


@every_case
def test_without_sync_each_rank_is_by_itself(results: Results, case: str) -> None:
    position = SYNC_CASES.index(case)
    for rank, of_rank in enumerate(results):
        *_, expected = alone(CASES[case].build(), rank, len(results), range(4))
        obtained = of_rank["private"]["before"]
        for name, value in expected.items():
            assert_same(obtained[f"{position}.{name}"], value, 1e-12)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@every_case
def test_sync_has_no_effect_without_a_process_group(case: str) -> None:
    assert not dist.is_initialized()
    assert_alone_is_alone(case)


@every_case
def test_sync_has_no_effect_on_a_single_rank(case: str, group_of_one: None) -> None:
    assert_alone_is_alone(case)


def assert_alone_is_alone(case: str) -> None:
    """The same with and without sync, without a warning and without a collective."""
    recorded = []
    for sync in (True, False):
        norm = CASES[case].build(sync=sync)
        with no_warnings():
            recorded.append(
                norm_ranks.train_and_record(norm, [batch_of(0, step, 2) for step in range(STEPS)])
            )
            before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
            average_statistics(norm)
            assert_same(dict(norm.named_buffers()), before)
    assert all(step["collectives"] == [0, 0] for step in recorded[0]["steps"])
    assert_same(recorded[0], recorded[1])


@every_case
def test_frozen_steps_leave_no_trace_and_recomputed_statistics_are_those_of_all_ranks(
    results: Results, case: str
) -> None:
    alone = CASES[case].build()
    world = len(results)
    norm_ranks.recompute(alone, [concatenated(world, step)[0] for step in range(STEPS)])
    expected = {key: value for key, value in state(alone).items() if key.startswith("running_")}
    for of_rank in results:
        without, with_frozen, recomputed = of_rank["second_forwards"][case]
        assert_same(with_frozen, without)
        assert_same({key: recomputed[key] for key in expected}, expected, TOLERANCE)
        others = {key: value for key, value in without.items() if key not in expected}
        assert_same({key: recomputed[key] for key in others}, others)


@pytest.mark.parametrize("case", ["batch", "power"])
def test_fully_sharded_models_train_as_replicated_ones(results: Results, case: str) -> None:
    """torch's fully_shard of a model built without memory: its start, and DDP's end."""
    new = build_norm(CASES[case].name, C, **CASES[case].options).double()
    for of_rank in results:
        recorded = of_rank["fully_sharded"][case]
        started = {f"norm.{key}": value for key, value in new.state_dict().items()}
        assert_same(recorded["started"], started)
        # Rank 0 collects the whole model.
        if recorded["fsdp"]:
            assert_same(dict(recorded["fsdp"]), recorded["ddp"], 1e-12)
    assert results[0]["fully_sharded"][case]["fsdp"]
