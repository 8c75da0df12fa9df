"""`recompute_statistics` and `reset_statistics`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from support.batches import C
from support.stateful import CASES, assert_same, batch, state, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from normexp.norms import (
    build_norm,
    norm_options,
    padding_mask_for,
    recompute_statistics,
    replace_layer_norms,
    reset_statistics,
)

every_case = pytest.mark.parametrize("case", CASES)
# With these the running statistics after one step are those of its batch.
FORGETFUL = {"momentum": 1.0, "alpha": 0.0, "alpha_fwd": 0.0, "warmup_steps": 3}


def forgetful(name: str) -> nn.Module:
    known = norm_options(name)
    options = {option: value for option, value in FORGETFUL.items() if option in known}
    if name == "unified":
        options["momentum"] = 0.0  # here the share of the past
    return build_norm(name, C, **options).double()


class Masked(nn.Module):
    """A norm as the whole model, with batches that are pairs of x and mask."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.norm(x, pad)


def pairs(seeds: range) -> list[dict[str, Tensor]]:
    batches = [batch(seed) for seed in seeds]
    return [{"x": torch.from_numpy(of.x), "pad": torch.from_numpy(of.pad)} for of in batches]


def running(norm: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in state(norm).items() if name.startswith("running_")}


def test_equal_to_update_bn_of_torchs_batch_norms() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)]
    stock = nn.Sequential(*layers, nn.BatchNorm1d(4)).double()
    ours = copy.deepcopy(stock)
    ours[1], ours[4] = (build_norm("batch", 4).double() for _ in range(2))
    loader = [(3 + 2 * torch.randn(16, 4, dtype=torch.float64), "a label") for _ in range(7)]
    models = {model: method for model, method in ((stock, update_bn), (ours, recompute_statistics))}
    for model, method in models.items():
        torch.manual_seed(1)
        model.eval()
        method(loader, model, torch.device("cpu"))
        assert not any(module.training for module in model.modules())
    for i in (1, 4):
        assert_same(ours[i].running_mean, stock[i].running_mean, 1e-12)
        assert_same(ours[i].running_var, stock[i].running_var, 1e-12)


@every_case
def test_the_mean_over_the_batches_and_nothing_else(case: str) -> None:
    norm = CASES[case].build()
    train(norm, range(4))
    others = {name: value for name, value in state(norm).items() if name not in running(norm)}
    recompute_statistics(pairs(range(10, 17)), Masked(norm))
    expected = []
    for inputs in pairs(range(10, 17)):
        fresh = forgetful(CASES[case].name)
        fresh(inputs["x"], inputs["pad"])
        expected.append(running(fresh))
    means = {name: torch.stack([each[name] for each in expected]).mean(0) for name in expected[0]}
    assert_same(running(norm), means, 1e-9)
    assert_same({name: state(norm)[name] for name in others}, others)
    assert norm.training
    train(norm, range(20, 22))  # options and hooks are as before
    twin = CASES[case].build()
    saved = {name: value for name, value in others.items() if name != "num_rejected"}
    twin.load_state_dict({**saved, **means, **dict(twin.named_parameters())})
    train(twin, range(20, 22))
    assert_same(state(norm), state(twin), 1e-9)


def test_one_layer_after_the_other_sees_what_the_batch_made_of_the_first() -> None:
    """Like BN in update_bn, PN normalizes by the batch, also after its warm-up."""
    torch.manual_seed(0)
    model = nn.Sequential(build_norm("power", 4, warmup_steps=0), build_norm("power", 4)).double()
    loader = [torch.randn(16, 4, dtype=torch.float64) * 5 for _ in range(3)]
    recompute_statistics(loader, model)
    expected = torch.stack([x.square().mean(0) for x in loader]).mean(0)
    assert_same(model[0].running_psi2, expected, 1e-9)
    assert_same(model[1].running_psi2, torch.ones(4).double(), 1e-6)


def test_batches_without_tokens_or_without_numbers_do_not_count() -> None:
    norm, other = (build_norm("batch", C).double() for _ in range(2))
    usable = pairs(range(3))
    empty = {"x": usable[0]["x"], "pad": torch.ones_like(usable[0]["pad"])}
    broken = {"x": usable[0]["x"] * torch.nan, "pad": usable[0]["pad"]}
    recompute_statistics([empty, *usable, broken], Masked(norm))
    recompute_statistics(usable, Masked(other))
    assert_same(state(norm), state(other))


@pytest.mark.parametrize("loader", [[], [torch.full((4, C), torch.nan, dtype=torch.float64)]])
def test_a_loader_without_usable_batches_is_refused_and_costs_nothing(loader: list) -> None:
    model = nn.Sequential(CASES["power"].build())
    before = state(model)
    with pytest.raises(ValueError, match="no usable batch for 1 of 1 norms"):
        recompute_statistics(loader, model.eval())
    assert_same(state(model), before)
    assert not model.training


def test_an_exception_of_the_model_or_the_loader_costs_nothing() -> None:
    def failing() -> Iterator[Tensor]:
        yield torch.ones(4, C, dtype=torch.float64)
        raise OSError("disk")

    model = nn.Sequential(CASES["power"].build())
    before, warmup = state(model), model[0].warmup_steps
    with pytest.raises(OSError, match="disk"):
        recompute_statistics(failing(), model)
    assert_same(state(model), before)
    assert model[0].warmup_steps == warmup and not model[0]._forward_hooks


def test_a_replaced_norm_knows_the_padding_by_the_forward_given() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True)
    replace_layer_norms(layer, "power", batch_first=True)
    x, mask = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[3], [5], [2]])

    def forward(x: Tensor) -> None:
        with padding_mask_for(layer, padding_mask=mask):
            layer(x, src_key_padding_mask=mask)

    recompute_statistics([x], layer, forward=forward)
    assert_same(layer.norm1.running_psi2, x[~mask].square().mean(0), 1e-5)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("name", ["batch", "power", "unified"])
def test_averaged_models_take_integer_buffers_and_new_statistics(
    name: str, average: object, use_buffers: bool
) -> None:
    """torch's SWA and EMA, as for nn.BatchNorm1d; the averaged weights then get statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), build_norm(name, 4))
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    loader = [torch.randn(8, 4) for _ in range(4)]
    for x in loader:
        model(x).sin().sum().backward()
        averaged.update_parameters(model)
    assert averaged.module[1].step.dtype == torch.long
    recompute_statistics(loader, averaged)
    activations = [averaged.module[0](x) for x in loader]
    if name == "batch":
        expected = torch.stack([a.mean(0) for a in activations]).mean(0)
        assert_same(averaged.module[1].running_mean, expected.detach(), 1e-5)
    else:
        expected = torch.stack([a.square().mean(0) for a in activations]).mean(0)
        assert_same(averaged.module[1].running_psi2, expected.detach(), 1e-5)


@every_case
def test_a_norm_starts_over(case: str) -> None:
    """Statistics, counters and warm-up; parameters stay, and reset_parameters resets these too."""
    norm, new = CASES[case].build(), build_norm(CASES[case].name, C, **CASES[case].options).double()
    train(norm, range(4))
    norm.num_rejected += 3
    parameters = [parameter.clone() for parameter in norm.parameters()]
    reset_statistics(nn.ModuleList([norm]))
    assert_same(state(norm), state(new))
    assert_same(list(norm.parameters()), parameters)
    train(norm, range(4))
    norm.reset_parameters()
    assert_same(state(norm), state(new))
    assert_same(list(norm.parameters()), list(new.parameters()))
