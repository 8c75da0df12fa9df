"""Which modules are norms of tokens, by name and by trying them; BatchNorm as another kind."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from support.stateful import assert_same
from torch import Tensor, nn

from normexp.norms import (
    available_norms,
    build_norm,
    norm_options,
    padding_mask_for,
    replace_layer_norms,
)
from normexp.norms.batch import BatchNorm
from normexp.norms.power import PowerNorm

B, T, C = 4, 9, 6
LENGTHS = torch.tensor([9, 3, 6, 1])
PADDING = torch.arange(T) >= LENGTHS[:, None]


# --- Norms as models define them


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int = C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean + 1e-6)


class GemmaRMSNorm(LlamaRMSNorm):
    """The weight is added to 1."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class LayerNormWithGamma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((C,), 2.0))
        self.register_buffer("beta", torch.zeros(C))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class OlmoLayerNorm(nn.Module):
    """Without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape = (C,)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape)


class CastingNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Rescaled(nn.LayerNorm):
    pass


# --- What is called so and is not one


class LayerNorm2d(nn.LayerNorm):
    """Channels in the middle, as in ConvNeXt and SAM."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    def __init__(self, size: int = C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T)
        return nn.functional.layer_norm(x.mT, self.weight.shape, self.weight).mT


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class NoNorm(nn.Module):
    """As MobileBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class SequenceNorm(LlamaRMSNorm):
    """Over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class UnweightedRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class PerHeadNorm(LlamaRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, C))


class Tower(nn.Module):
    """A norm of tokens, and another module `norm`."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm = nn.LayerNorm(C), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


FOUND = (
    *(nn.LayerNorm(C), nn.LayerNorm(C, elementwise_affine=False), nn.RMSNorm(C), Rescaled(C)),
    *(LlamaRMSNorm(), GemmaRMSNorm(), LayerNormWithGamma(), OlmoLayerNorm(), CastingNorm()),
    *(LlamaRMSNorm(1), LlamaRMSNorm(3), LlamaRMSNorm(2)),
)
LEFT_OUT = {
    LayerNorm2d(C): "does not normalize each token",
    ChannelsFirstNorm(): "does not normalize each token",
    ChannelsFirstNorm(3): "does not normalize each token",
    ChannelsFirstNorm(2): "does not normalize each token",
    GatedRMSNorm(): "takes more than the hidden states: gate",
    NoNorm(): "does not normalize each token",
    SequenceNorm(): "does not normalize each token",
    UnweightedRMSNorm(): "has no weight that says how many channels",
    PerHeadNorm(): "normalizes 2 dimensions",
}


def id_of(norm: object) -> str | None:
    return type(norm).__name__ if isinstance(norm, nn.Module) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", FOUND, ids=id_of)
def test_norms_of_tokens_are_found(norm: nn.Module, dtype: torch.dtype) -> None:
    model = Tower(copy.deepcopy(norm)).to(dtype)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace_layer_norms(model, "power", batch_first=True) == ["first", "norm"]
    assert torch.equal(torch.random.get_rng_state(), before)
    size = next((p.numel() for p in norm.parameters()), C)
    assert type(model.norm) is PowerNorm and model.norm.num_features == size


def test_norms_without_storage_are_found() -> None:
    with torch.device("meta"):
        model = Tower(LlamaRMSNorm())
    assert replace_layer_norms(model, "power", batch_first=True) == ["first", "norm"]
    assert model.norm.weight.is_meta


@pytest.mark.parametrize(("norm", "why"), LEFT_OUT.items(), ids=id_of)
def test_others_are_left_and_the_reason_is_told(norm: nn.Module, why: str) -> None:
    model = Tower(copy.deepcopy(norm).train())
    if isinstance(norm, PerHeadNorm):
        with pytest.raises(ValueError, match=f"norm {why}"):
            replace_layer_norms(model, "power", batch_first=True)
    else:
        with pytest.warns(UserWarning, match=f"left as they were: norm: {why}"):
            assert replace_layer_norms(model, "power", batch_first=True) == ["first"]
    assert type(model.norm) is type(norm) and model.norm.training


@pytest.mark.parametrize(("norm", "why"), LEFT_OUT.items(), ids=id_of)
def test_others_are_refused_where_they_are_asked_for(norm: nn.Module, why: str) -> None:
    model = Tower(copy.deepcopy(norm))
    with pytest.raises(ValueError, match=f"norm .*{why}.*{type(norm).__name__}"):
        replace_layer_norms(model, "power", batch_first=True, kind=type(norm))
    assert type(model.first) is nn.LayerNorm and type(model.norm) is type(norm)


def test_several_kinds() -> None:
    model = nn.Sequential(nn.LayerNorm(C), LlamaRMSNorm(), GemmaRMSNorm())
    assert replace_layer_norms(
        model, "rms", batch_first=True, kind=(nn.LayerNorm, GemmaRMSNorm)
    ) == ["0", "2"]


def test_what_has_been_replaced_is_not_found_again_unless_asked_for() -> None:
    model = nn.Sequential(LlamaRMSNorm(), nn.BatchNorm1d(C))
    replace_layer_norms(model, "power", batch_first=True)
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d)
    with pytest.raises(ValueError, match=r"kind=\.\.\.: 0 \(PowerNorm\), 1"):
        replace_layer_norms(model, "rms", batch_first=True)
    replace_layer_norms(model, "batch", batch_first=True, kind=PowerNorm, only="0")
    replace_layer_norms(model, "power_v", batch_first=True, kind=BatchNorm, only="1")
    with padding_mask_for(model, padding_mask=None):
        assert model[0](torch.randn(2, T, C)).shape == (2, T, C)
        assert model[1](torch.randn(2, C, T)).shape == (2, C, T)  # as its first predecessor


def test_a_model_calls_its_norm_with_a_keyword_or_too_much() -> None:
    model = Tower(LlamaRMSNorm())
    replace_layer_norms(model, "rms", batch_first=True)
    x = torch.randn(2, T, C)
    with padding_mask_for(model, padding_mask=None):
        assert torch.equal(model.norm(hidden_states=x), model.norm(x))
        with pytest.raises(TypeError, match=r"takes the hidden states only.* only="):
            model.norm(x, x)


# --- Norms of queries and keys


class Attention(nn.Module):
    def __init__(self, names: list[str]):
        super().__init__()
        for name in names:
            setattr(self, name, LlamaRMSNorm(3))


QK_NAMES = [
    *("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layer_norm", "qk_norm"),
    *("norm_q", "norm_k", "norm_added_k", "q_ln", "ln_k", "q_head_norm"),
]
OTHER_NAMES = ["norm", "kv_a_layernorm", "q_a_layernorm", "input_layernorm", "ln_1", "sk_norm"]


def test_qk_norms_are_left_out_and_said_so() -> None:
    model = nn.Sequential(Attention([*QK_NAMES, *OTHER_NAMES]))
    with pytest.warns(UserWarning, match="0.q_norm, .*queries or keys.*only="):
        replaced = replace_layer_norms(model, "power", batch_first=True)
    assert replaced == [f"0.{name}" for name in OTHER_NAMES]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("q_norm", ["0.q_norm", "1.q_norm"]),
        (r"^0\.[qk]_norm$", ["0.q_norm", "0.k_norm"]),
        (r"q_norm|^0.norm", ["0.norm", "1.q_norm"]),  # 0.q_norm is asked for as if called norm
        (r"^1\.", ["1.norm"]),
        ("norm", ["0.norm", "1.norm"]),
    ],
)
def test_qk_norms_are_replaced_where_they_are_named(only: str, expected: list[str]) -> None:
    model = nn.Sequential(*(Attention(["q_norm", "k_norm", "norm"]) for _ in range(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert replace_layer_norms(model, "power", batch_first=True, only=only) == expected


def test_a_kind_of_which_only_qk_norms_are_there() -> None:
    model = nn.Sequential(Attention(["q_norm"]))
    with pytest.raises(ValueError, match=r"no LlamaRMSNorm to replace; 0\.q_norm: .*only="):
        replace_layer_norms(model, "power", batch_first=True, kind=LlamaRMSNorm)


# --- What is said where nothing is found


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(C)), None, r"another kind=\.\.\.: 0 \(BatchNorm1d\)"),
        (nn.Sequential(LlamaRMSNorm()), nn.LayerNorm, r"another kind=\.\.\.: 0 \(LlamaRMSNorm\)"),
        (nn.Sequential(nn.LayerNorm(C)), nn.BatchNorm1d, r"no BatchNorm1d.*0 \(LayerNorm\)"),
        (nn.Sequential(NoNorm()), None, "no LayerNorm to replace; 0: does not normalize"),
        (nn.LayerNorm(C), None, "to be a norm itself: give the module that it belongs to"),
        (nn.Sequential(*[nn.GroupNorm(2, C)] * 20), None, r"0 \(GroupNorm\)$"),
        (nn.Sequential(*[nn.GroupNorm(2, C) for _ in range(20)]), None, r"7 \S+ and 12 others$"),
    ],
)
def test_the_message_says_what_there_is(
    model: nn.Module, kind: type[nn.Module] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace_layer_norms(model, "power", batch_first=True, kind=kind)


# --- BatchNorm


class ConvolutionModule(nn.Module):
    """As in a Conformer: (B, T, C) -> (B, T, C), with BatchNorm on (B, C, T) in between."""

    def __init__(self, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Conv1d(C, C, 1), nn.Conv1d(C, C, 1)
        self.norm = nn.BatchNorm1d(C, **options)
        if options.get("affine", True):
            self.norm.weight.data += 0.3 * torch.randn(C)
            self.norm.bias.data += 0.3 * torch.randn(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x.mT)).relu()).mT


def states(seed: int, t: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, t, C, generator=generator, dtype=torch.float64) * 2 + 0.5


def train(model: nn.Module, mask: Tensor | None, t: int = T, steps: int = 3) -> list[Tensor]:
    """Outputs at real tokens."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    real = slice(None) if mask is None else ~mask
    outputs = []
    for seed in range(steps):
        optimizer.zero_grad()
        with padding_mask_for(model, padding_mask=mask):
            y = model(states(seed, t))[real]
        y.sin().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def values(model: nn.Module) -> dict[str, Tensor]:
    renamed = {"norm.num_batches_tracked": "norm.step"}
    return {renamed.get(key, key): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("t", [T, C, B, 1])  # T = C: nothing tells the dimensions apart
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 0.01}, {"affine": False}])
def test_masked_batch_norm_without_padding_is_the_stock_one(
    t: int, options: dict[str, Any]
) -> None:
    """In training and inference, also continued from a trained one."""
    stock = ConvolutionModule(**options).double()
    train(stock, None, t)
    model = copy.deepcopy(stock)
    assert replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d) == ["norm"]
    assert isinstance(model.norm, BatchNorm)
    assert_same(train(model, None, t), train(stock, None, t), 1e-9)
    obtained = values(model)
    if not options.get("affine", True):
        for name, value in (("weight", 1.0), ("bias", 0.0)):  # there are some, but frozen
            assert torch.equal(obtained.pop(f"norm.{name}"), torch.full((C,), value).double())
    assert_same(obtained, values(stock), 1e-9)
    assert_same(model.eval()(states(9, t)), stock.eval()(states(9, t)), 1e-9)


@pytest.mark.parametrize("t", [T, C])
def test_masked_batch_norm_is_the_stock_one_of_the_real_frames(t: int) -> None:
    """A list of them (N, C) has no padding."""
    mask = torch.arange(t) >= LENGTHS.clamp(max=t)[:, None]

    class Packed(ConvolutionModule):
        def forward(self, x: Tensor) -> Tensor:
            frames = self.norm(self.before(x.mT).mT[~mask]).relu()
            y = x.new_zeros(x.shape)
            y[~mask] = self.after(frames.T[None])[0].T
            return y

    stock, model = Packed().double(), ConvolutionModule().double()
    replace_layer_norms(model, "batch", batch_first=False, kind=nn.BatchNorm1d)
    assert_same(train(model, mask, t), train(stock, mask, t), 1e-9)
    assert_same(values(model), values(stock), 1e-9)
    with torch.no_grad():
        y, expected = model.eval()(states(9, t)), stock.eval()(states(9, t))
    assert_same(y[~mask], expected[~mask], 1e-9)


@pytest.mark.parametrize("name", available_norms())
def test_every_norm_stands_in_for_batch_norm(name: str) -> None:
    """On (B, C, T) as on (T, B, C), T = C included."""
    options = {"warmup_steps": 1} if "warmup_steps" in norm_options(name) else {}
    if "num_groups" in norm_options(name):
        options["num_groups"] = 2
    mask = torch.arange(C) >= LENGTHS.clamp(max=C)[:, None]
    model = nn.Sequential(nn.BatchNorm1d(C)).double()
    replace_layer_norms(model, name, batch_first=True, kind=nn.BatchNorm1d, **options)
    given = build_norm(name, C, **options).double()
    if name == "batch":
        given.momentum = 0.1
    for seed in range(3):
        x = states(seed, C).requires_grad_()  # (B, T, C)
        other = x.detach().transpose(0, 1).requires_grad_()
        with padding_mask_for(model, padding_mask=mask):
            y = model(x.mT)
        expected = given(other, mask)
        assert y.is_contiguous()
        assert_same(y.mT[~mask], expected.transpose(0, 1)[~mask], 1e-10)
        (y.mT[~mask]).sin().sum().backward()
        expected.transpose(0, 1)[~mask].sin().sum().backward()
        assert_same(x.grad[~mask], other.grad.transpose(0, 1)[~mask], 1e-10)
        for norm in (model[0], given):
            if hasattr(norm, "penalty"):
                norm.penalty()
    with padding_mask_for(model.eval(), padding_mask=mask):
        y = model(states(9, C).mT)
    expected = given.eval()(states(9, C).transpose(0, 1), mask).transpose(0, 1)
    assert_same(y.mT[~mask], expected[~mask], 1e-10)


def test_options_given_go_before_those_handed_on() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, eps=0.1, momentum=0.5), nn.SyncBatchNorm(C))
    model[0].weight.requires_grad_(False)
    replace_layer_norms(model, "batch", batch_first=True, only="0", kind=nn.BatchNorm1d, eps=0.2)
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.SyncBatchNorm)
    assert (model[0].eps, model[0].momentum, model[0].sync) == (0.2, 0.5, False)
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[1].sync


def test_other_norms_start_afresh() -> None:
    model = ConvolutionModule(momentum=None).double()
    train(model, None)
    replace_layer_norms(model, "power_v", batch_first=True, kind=nn.BatchNorm1d)
    assert torch.equal(model.norm.weight, torch.ones(C).double()) and model.norm.step == 0


def test_cumulative_batch_norm_is_refused_with_the_cure() -> None:
    model = ConvolutionModule(momentum=None)
    with pytest.raises(ValueError, match=r"norm has momentum=None.*momentum=\.\.\."):
        replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d)
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d, momentum=0.2)
    assert model.norm.momentum == 0.2


def test_batch_norm_without_running_statistics_gets_some() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False))
    model[0].weight.data.fill_(3.0)
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d)
    assert torch.equal(model[0].weight, torch.full((C,), 3.0))
    assert torch.equal(model[0].running_var, torch.ones(C))


def test_images_and_lists_of_tokens() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Flatten(2), nn.BatchNorm1d(C)).double()
    stock = copy.deepcopy(model)
    replace_layer_norms(model, "batch", batch_first=True, kind=(nn.BatchNorm1d, nn.BatchNorm2d))
    x = torch.randn(3, C, 4, 5, dtype=torch.float64)
    with padding_mask_for(model, padding_mask=None):
        assert_same(model(x), stock(x), 1e-9)
        assert_same(model[2](x[..., 0, 0]), stock[2](x[..., 0, 0]), 1e-9)


def test_group_norm_has_its_channels_there_too() -> None:
    model = nn.Sequential(nn.GroupNorm(2, C)).double()
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.GroupNorm)
    x = states(0).mT
    with padding_mask_for(model, padding_mask=None):
        assert_same(model(x), nn.BatchNorm1d(C).double()(x), 1e-9)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.InstanceNorm1d(C), "0 has channels in the middle"),
        (nn.LazyBatchNorm1d(), "0 is lazy"),
        (nn.LocalResponseNorm(2), "0 has no weight"),
        (nn.Linear(C, C), "0 normalizes 2 dimensions|0 has no weight|0 does not normalize"),
    ],
    ids=id_of,
)
def test_other_kinds_are_refused(norm: nn.Module, message: str) -> None:
    model = nn.Sequential(norm)
    with pytest.raises(ValueError, match=message):
        replace_layer_norms(model, "power", batch_first=True, kind=type(norm))
    assert model[0] is norm


def test_the_message_of_a_mask_names_the_layout_of_batch_norm() -> None:
    model = ConvolutionModule()
    replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d)
    message = re.escape("does not fit hidden states (4, 6, 9), which are read as (B, C, T)")
    with (
        padding_mask_for(model, padding_mask=PADDING[:, :-1]),
        pytest.raises(ValueError, match=message),
    ):
        model(states(0).float())
