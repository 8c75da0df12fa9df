"""Norms inside models that call `norm(x)`: they know the padding, and no model bypasses them."""

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normexp.norms import available_norms, build_norm, norm_class, norm_options
from normexp.norms.layer import LayerNorm
from normexp.norms.power import PowerNorm
from normexp.norms.replace import padding_mask_for, replace_layer_norms
from normexp.norms.running_norm import RunningNorm

B, T, C = 3, 7, 8
# On the right, as torch's fast path wants it; the last sentence is full.
PADDING = torch.arange(T) >= torch.tensor([[4], [2], [7]])
# method.md and the docstrings name what of the padding enters the others' statistics.
INDEPENDENT_OF_PADDING = sorted(
    set(available_norms()) - {"batch_released", "power_released", "unified"}
)
MIXING = [name for name in available_norms() if hasattr(norm_class(name), "mixes_positions")]


def short(name: str) -> dict[str, Any]:
    """Options with which running statistics decide from the second step on."""
    values = {"warmup_steps": 1, "window_size": 1, "alpha_fwd": 0.1}
    return {option: values[option] for option in values if option in norm_options(name)}


def stock_encoder(
    batch_first: bool = True, norm_first: bool = False, layers: int = 2
) -> nn.TransformerEncoder:
    """What torch runs on its fast path in eval mode, if batch_first and not norm_first."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        C, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    nested = batch_first and not norm_first
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(C), enable_nested_tensor=nested)
    for parameter in encoder.parameters():  # clones are equal, and weights 1 would hide much
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder.double()


def encoder_with(name: str, batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    encoder = stock_encoder(batch_first, norm_first)
    replace_layer_norms(encoder, name, batch_first=batch_first, **short(name))
    return encoder


def states(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, T, C, generator=generator, dtype=torch.float64) + 0.5


def run(encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, T, C) -> (B, T, C), in the encoder's own layout in between."""
    first = encoder.layers[0].self_attn.batch_first
    with padding_mask_for(encoder, padding_mask=mask):
        y = encoder(x if first else x.transpose(0, 1), src_key_padding_mask=mask)
    return y if first else y.transpose(0, 1)


def run_by_hand(encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The same from the formulas; norms get (T, B, C) and their mask straight, past any hook."""

    def norm(norm: nn.Module, x: Tensor) -> Tensor:
        return norm.forward(x.transpose(0, 1), mask).transpose(0, 1)

    def attention(layer: nn.Module, x: Tensor) -> Tensor:
        theirs = layer.self_attn
        heads = F.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
        q, k, v = heads.unflatten(-1, (3, theirs.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -math.inf)
        return theirs.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def ffn(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(x).relu())

    for layer in encoder.layers:
        if layer.norm_first:
            x = x + attention(layer, norm(layer.norm1, x))
            x = x + ffn(layer, norm(layer.norm2, x))
        else:
            x = norm(layer.norm1, x + attention(layer, x))
            x = norm(layer.norm2, x + ffn(layer, x))
    return norm(encoder.norm, x)


def train(
    forward: Callable[..., Tensor], encoder: nn.Module, mask: Tensor | None, steps: int = 3
) -> None:
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    token_mask = torch.ones(B, T, dtype=torch.bool) if mask is None else ~mask
    for step in range(steps):
        y = forward(encoder.train(), states(step), mask)
        optimizer.zero_grad()
        y[token_mask].sin().mean().backward()
        for norm in encoder.modules():
            if hasattr(norm, "penalty"):
                norm.penalty()
        optimizer.step()


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.fixture
def fast_path_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by each call of torch's fused encoder layer, which computes LN by itself."""
    fused, calls = torch._transformer_encoder_layer_fwd, []

    def record(*args: Any) -> Tensor:
        calls.append(True)
        return fused(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", record)
    return calls


@pytest.mark.parametrize("mask", [PADDING, None], ids=["padded", "unpadded"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", available_norms())
def test_an_encoder_equals_its_formulas_in_training_and_in_inference(
    name: str,
    norm_first: bool,
    batch_first: bool,
    mask: Tensor | None,
    fast_path_calls: list[bool],
) -> None:
    encoder = encoder_with(name, batch_first, norm_first)
    twin = copy.deepcopy(encoder)
    train(run, encoder, mask)
    train(run_by_hand, twin, mask)
    assert_same_state(encoder, twin)
    encoder.eval(), twin.eval()
    token_mask = slice(None) if mask is None else ~mask
    expected = run_by_hand(twin, states(9), mask)[token_mask]
    with torch.no_grad():
        without_grad = run(encoder, states(9), mask)[token_mask]
    with torch.inference_mode():
        inference_mode = run(encoder, states(9), mask)[token_mask]
    for y in (run(encoder, states(9), mask)[token_mask], without_grad, inference_mode):
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert not fast_path_calls


def test_torchs_fast_path_takes_the_stock_encoder_of_these_tests(
    fast_path_calls: list[bool],
) -> None:
    encoder = stock_encoder().eval()
    with torch.no_grad():
        encoder(states(), src_key_padding_mask=PADDING)
    assert len(fast_path_calls) == 2


@pytest.mark.parametrize("name", ["power", "none"])  # `none` has no eps, for which torch asks
def test_layers_that_are_filled_before_they_are_stacked_stay_off_the_fast_path(
    name: str, fast_path_calls: list[bool]
) -> None:
    layer = nn.TransformerEncoderLayer(C, 2, 12, dropout=0.0, batch_first=True).double()
    replace_layer_norms(layer, name, batch_first=True)
    with pytest.warns(UserWarning, match="nested"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        y = run(encoder, states(), PADDING)
    encoder.norm = nn.Identity()
    encoder.norm.forward = lambda x, mask: x
    expected = run_by_hand(encoder, states(), PADDING)
    torch.testing.assert_close(y[~PADDING], expected[~PADDING], rtol=1e-9, atol=1e-11)
    assert not fast_path_calls


def test_a_stock_layer_before_a_filled_one_does_not_hand_it_nested_tensors() -> None:
    encoder = stock_encoder()
    replaced = replace_layer_norms(encoder, "power", batch_first=True, only=r"^layers\.1\.")
    assert replaced == ["layers.1.norm1", "layers.1.norm2"]
    train(run, encoder, PADDING)
    encoder.eval()
    with torch.no_grad():
        y = run(encoder, states(9), PADDING)
    expected = run(encoder, states(9), PADDING)
    torch.testing.assert_close(y[~PADDING], expected[~PADDING], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", available_norms())
def test_nested_tensors_say_themselves_what_is_padding(name: str) -> None:
    encoder = stock_encoder()
    for layer in encoder.layers:  # of the encoder around it nothing can be known
        replace_layer_norms(layer, name, batch_first=True, **short(name))
    train(run, encoder, PADDING)
    shapes: list[bool] = []
    encoder.eval().layers[1].register_forward_pre_hook(lambda _, x: shapes.append(x[0].is_nested))
    expected = run(encoder, states(), PADDING)
    with torch.no_grad():
        y = run(encoder, states(), PADDING)
    torch.testing.assert_close(y[~PADDING], expected[~PADDING], rtol=1e-9, atol=1e-11)
    assert shapes == [False, True]


@pytest.mark.parametrize("training", [True, False])
def test_nested_tensors_of_ones_own_are_refused_with_the_cure(training: bool) -> None:
    layout = torch.strided if training else torch.jagged
    x = torch.nested.nested_tensor([torch.randn(2, C), torch.randn(3, C)], layout=layout)
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        build_norm("power", C).train(training)(x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", INDEPENDENT_OF_PADDING)
def test_content_of_padding_changes_nothing(name: str, batch_first: bool) -> None:
    plain = encoder_with(name, batch_first)
    other = copy.deepcopy(plain)

    def run_with_other_padding(encoder: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return run(encoder, torch.where(mask[..., None], 50 * x + 3, x), mask)

    train(run, plain, PADDING)
    train(run_with_other_padding, other, PADDING)
    assert_same_state(plain, other)


@pytest.mark.parametrize("name", available_norms())
def test_no_mask_is_a_mask_without_padding(name: str) -> None:
    without, empty = encoder_with(name), encoder_with(name)
    train(run, without, None)
    train(run, empty, torch.zeros(B, T, dtype=torch.bool))
    assert_same_state(without, empty)


@pytest.mark.parametrize("name", available_norms())
def test_training_without_a_word_on_padding_is_refused(name: str) -> None:
    encoder = encoder_with(name)
    before = copy.deepcopy(encoder)
    with pytest.raises(RuntimeError, match="padding mask is unknown"):
        encoder(states())
    assert_same_state(encoder, before)
    encoder.eval()
    if name in MIXING:
        with pytest.raises(RuntimeError, match="padding mask is unknown"):
            encoder(states())
    else:
        assert torch.equal(encoder(states()), run(encoder, states(), None))


def test_some_norm_mixes_positions() -> None:
    assert MIXING == ["instance"]


class Spy:
    """Writes down the masks that a model's norm is called with."""

    def __init__(self, model: nn.Module):
        self.masks: list[Tensor | None] = []
        model.norm.register_forward_pre_hook(self._write, with_kwargs=True)

    def _write(self, norm: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        self.masks.append(kwargs["padding_mask"])


class OneNorm(nn.Module):
    def __init__(self, name: str = "batch", **options: Any):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        replace_layer_norms(self, name, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_an_inner_context_goes_before_an_outer_one_and_gives_back() -> None:
    model = OneNorm()
    spy = Spy(model)
    x, other = torch.randn(B, T, C), ~PADDING
    with padding_mask_for(model, padding_mask=PADDING):
        with padding_mask_for(model.norm, padding_mask=other):
            model(x)
            with padding_mask_for(model, padding_mask=None):
                model(x)
        model(x)
    with pytest.raises(RuntimeError, match="unknown"):
        model(x)
    assert torch.equal(spy.masks[0].t(), other) and spy.masks[1] is None
    assert torch.equal(spy.masks[2].t(), PADDING) and len(spy.masks) == 3


def test_an_exception_within_the_context_leaves_it() -> None:
    model = OneNorm()
    with (
        pytest.raises(KeyError),
        padding_mask_for(model, padding_mask=PADDING),
        padding_mask_for(None, model.norm, padding_mask=None),
    ):
        raise KeyError
    with pytest.raises(RuntimeError, match="unknown"):
        model(torch.randn(B, T, C))


def test_two_models_have_each_their_own_mask() -> None:
    one, two = OneNorm(), OneNorm()
    spies, x = (Spy(one), Spy(two)), torch.randn(B, T, C)
    with padding_mask_for(one, padding_mask=PADDING):
        with pytest.raises(RuntimeError, match="unknown"):
            two(x)
        with padding_mask_for(two, padding_mask=~PADDING):
            one(x), two(x)
        one(x)
    assert [torch.equal(mask.t(), PADDING) for mask in spies[0].masks] == [True, True]
    assert [torch.equal(mask.t(), ~PADDING) for mask in spies[1].masks] == [True]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", ["power", "instance"])
def test_a_copy_made_within_the_context_is_on_its_own(
    name: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = encoder_with(name), states()
    with padding_mask_for(model, padding_mask=PADDING):
        twin = duplicate(model)
        with pytest.raises(RuntimeError, match="unknown"):
            twin(x, src_key_padding_mask=PADDING)
    with pytest.raises(RuntimeError, match="unknown"):
        twin(x)
    train(run, twin, PADDING)
    train(run, model, PADDING)
    assert_same_state(model, twin)


def test_names_of_parameters_stay_and_state_comes_back(
    tmp_path: Path,
) -> None:
    encoder, stock = encoder_with("power"), stock_encoder()
    assert [n for n, _ in encoder.named_parameters()] == [n for n, _ in stock.named_parameters()]
    train(run, encoder, PADDING)
    torch.save(encoder.state_dict(), tmp_path / "model.pt")
    other = encoder_with("power")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert_same_state(encoder, other)
    with pytest.raises(RuntimeError, match=r"norm1\.running_psi2"):
        stock.load_state_dict(encoder.state_dict())


def test_a_new_norm_is_like_the_one_before() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(6, elementwise_affine=False))
    model.to(torch.bfloat16)[0].eval()
    assert replace_layer_norms(model, "power", batch_first=True, alpha_fwd=0.5) == ["0", "1"]
    assert [norm.num_features for norm in model] == [C, 6]
    assert [norm.alpha_fwd for norm in model] == [0.5, 0.5]
    assert [norm.training for norm in model] == [False, True]
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].running_psi2.dtype == torch.float32
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(C))
    replace_layer_norms(model, "power", batch_first=True)
    assert model[0].weight.is_meta and model[0].running_psi2.is_meta


def test_a_norm_without_parameters_is_where_its_owner_is() -> None:
    layer = nn.TransformerEncoderLayer(C, 2, 12, dtype=torch.float64, device="meta")
    layer.norm1 = nn.LayerNorm(C, elementwise_affine=False)
    replace_layer_norms(layer, "batch", batch_first=False, only="norm1")
    assert layer.norm1.running_mean.is_meta and layer.norm1.weight.dtype == torch.float64


def test_sites_can_have_different_norms() -> None:
    encoder = stock_encoder()
    replace_layer_norms(encoder, "power", batch_first=True, only=r"norm1$")
    replace_layer_norms(encoder, "layer", batch_first=True)
    kinds = [type(norm) for path, norm in encoder.named_modules() if "norm" in path]
    assert kinds == [PowerNorm, LayerNorm, PowerNorm, LayerNorm, LayerNorm]


def test_other_classes_are_replaced_on_request() -> None:
    model = nn.Sequential(nn.RMSNorm(C), nn.LayerNorm(C))
    assert replace_layer_norms(model, "power", batch_first=True, kind=nn.RMSNorm) == ["0"]
    assert type(model[0]) is PowerNorm and type(model[1]) is nn.LayerNorm


class OwnNorm(nn.Module):
    """As models define their own: a weight, and no word on its shape otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


def test_classes_of_the_models_own_are_replaced_on_request() -> None:
    model = nn.Sequential(OwnNorm(), nn.LayerNorm(C))
    assert replace_layer_norms(model, "rms", batch_first=True, kind=OwnNorm) == ["0"]
    assert model.eval()[0](torch.ones(B, T, C)).shape == (B, T, C)


def shared() -> nn.Module:
    norm = nn.LayerNorm(C)
    return nn.Sequential(nn.LayerNorm(C), nn.Sequential(norm), nn.Sequential(norm))


@pytest.mark.parametrize(
    ("build", "name", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "power", {}, "no LayerNorm; it has none at all"),
        (lambda: nn.LayerNorm(C), "power", {}, "no LayerNorm"),
        (stock_encoder, "power", {"only": "ln_1"}, r"matches 'ln_1'; it has layers\.0\.norm1, "),
        (lambda: nn.Sequential(nn.LayerNorm(C), nn.LayerNorm((4, C))), "power", {}, "1 normal.* 2"),
        (shared, "power", {}, "1.0 and 2.0 are one module"),
        (shared, "power", {"only": "^2"}, "2.0 and 1.0 are one module"),
        (stock_encoder, "power", {"batch_first": False}, "batch_first=False, but layers.0.norm1"),
        (stock_encoder, "strong", {}, "unknown normalization 'strong'"),
        (stock_encoder, "power", {"momentum": 0.1}, "no option 'momentum'"),
        (lambda: nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(6)), "group", {}, "not divide 6"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_nothing_is_changed(
    build: Callable[[], nn.Module], name: str, options: dict[str, Any], message: str
) -> None:
    model = build()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_layer_norms(model, name, **{"batch_first": True, **options})
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


def test_a_layer_that_is_known_by_two_names_is_one_place() -> None:
    block = nn.Sequential(nn.LayerNorm(C))
    model = nn.ModuleDict({"encoder": block, "tied": block})
    replace_layer_norms(model, "power", batch_first=True)
    assert isinstance(block[0], PowerNorm) and model["tied"] is block
    with padding_mask_for(model, padding_mask=PADDING):
        block(torch.randn(B, T, C))
    assert block[0].step == 1


@pytest.mark.parametrize(
    "mask", [PADDING.long(), PADDING.float(), PADDING[:, None], torch.tensor(True)]
)
def test_what_is_no_padding_mask_is_refused(mask: Tensor) -> None:
    with (
        pytest.raises(ValueError, match="attention_mask == 0"),
        padding_mask_for(OneNorm(), padding_mask=mask),
    ):
        pass


@pytest.mark.parametrize(
    "x", [torch.randn(T, B, C), torch.randn(B, 1, C), torch.randn(B, C), torch.randn(B, 2, 4, C)]
)
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_a_mask_of_other_states_is_refused(name: str, x: Tensor) -> None:
    model = OneNorm(name)
    with (
        padding_mask_for(model, padding_mask=PADDING),
        pytest.raises(ValueError, match=r"padding_mask \(3, 7\) does not fit.*batch_first=True"),
    ):
        model(x)


@pytest.mark.parametrize("batch_first", [True, False])
def test_lists_of_tokens_take_the_mask_of_their_sentences(batch_first: bool) -> None:
    def model() -> nn.Module:
        model = nn.Sequential(nn.LayerNorm(C)).double()
        replace_layer_norms(model, "batch", batch_first=batch_first)
        return model

    x = states() if batch_first else states().transpose(0, 1)
    one, other = model(), model()
    with padding_mask_for(one, other, padding_mask=PADDING):
        expected, y = one(x), other(x.reshape(-1, C))
    torch.testing.assert_close(y.view(x.shape), expected, rtol=1e-12, atol=1e-12)
    assert_same_state(one, other)
    with padding_mask_for(other, padding_mask=PADDING.flatten()):  # tokens without sentences
        other(states().reshape(-1, C))


def test_lists_of_tokens_are_refused_where_sentences_matter() -> None:
    model = OneNorm("instance")
    with (
        padding_mask_for(model, padding_mask=PADDING),
        pytest.raises(ValueError, match=r"does not fit hidden states \(21, 8\)"),
    ):
        model(torch.randn(B * T, C))


def test_a_single_sentence_keeps_its_mask() -> None:
    encoder, x, mask = encoder_with("instance"), states()[:1], PADDING[:1]
    expected = run(encoder, x, mask)
    with padding_mask_for(encoder, padding_mask=mask[0]):
        y = encoder(x[0], src_key_padding_mask=mask[0])
    torch.testing.assert_close(y[~mask[0]], expected[~mask], rtol=1e-9, atol=1e-11)


class Checkpointed(nn.Module):
    """An encoder whose layers are run again in the backward pass."""

    def __init__(self, encoder: nn.Module, use_reentrant: bool):
        super().__init__()
        self.layers, self.norm, self.use_reentrant = encoder.layers, encoder.norm, use_reentrant

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, None, src_key_padding_mask, use_reentrant=self.use_reentrant)
        return self.norm(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["batch", "power", "instance"])
def test_activation_checkpointing_changes_nothing_with_backward_in_the_context(
    name: str, use_reentrant: bool
) -> None:
    plain, other = encoder_with(name), encoder_with(name)
    checkpointed = Checkpointed(other, use_reentrant)

    def steps(model: nn.Module, parameters: Iterator[nn.Parameter]) -> None:
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            with padding_mask_for(model, padding_mask=PADDING):
                y = model(states(step), src_key_padding_mask=PADDING)
                y[~PADDING].sin().mean().backward()
            optimizer.step()

    steps(plain, plain.parameters())
    steps(checkpointed, other.parameters())
    assert_same_state(plain, other)
    with padding_mask_for(checkpointed, padding_mask=PADDING):
        y = checkpointed(states(), src_key_padding_mask=PADDING)
    with pytest.raises(RuntimeError, match="backward pass too"):
        y[~PADDING].sum().backward()


@pytest.mark.parametrize("name", ["power", "instance"])
def test_a_compiled_encoder_follows_the_mask(name: str) -> None:
    encoder = encoder_with(name)
    train(run, encoder, PADDING)
    encoder.eval()
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        for mask in (PADDING, PADDING.roll(1, dims=0), PADDING[:2]):
            x = states()[: len(mask)]
            with padding_mask_for(compiled, padding_mask=mask):
                y = compiled(x, src_key_padding_mask=mask)
            expected = run_by_hand(encoder, x, mask)
            torch.testing.assert_close(y[~mask], expected[~mask], rtol=1e-9, atol=1e-11)


def test_hugging_face_models_train_with_checkpointing_and_generate_with_a_cache() -> None:
    transformers = pytest.importorskip("transformers", reason="needs normexp[huggingface]")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=C, n_layer=2, n_head=2, n_positions=16, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double()
        sites = replace_layer_norms(model, "power", batch_first=True, warmup_steps=1)
        assert len(sites) == 5 == sum(isinstance(norm, RunningNorm) for norm in model.modules())
        return model

    tokens = torch.randint(2, 20, (B, T), generator=torch.Generator().manual_seed(0))
    attention_mask = (~PADDING.flip(1)).long()  # padding on the left

    def steps(model: nn.Module, tokens: Tensor) -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        labels = tokens.masked_fill(attention_mask == 0, -100)
        for _ in range(3):
            optimizer.zero_grad()
            with padding_mask_for(model, padding_mask=attention_mask == 0):
                model(tokens, attention_mask=attention_mask, labels=labels).loss.backward()
            optimizer.step()

    plain, checkpointed, otherwise_padded = build(), build(), build()
    checkpointed.gradient_checkpointing_enable()
    steps(plain, tokens)
    steps(checkpointed, tokens)
    steps(otherwise_padded, tokens.masked_fill(attention_mask == 0, 3))
    assert_same_state(plain, checkpointed)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(
            dict(otherwise_padded.named_buffers())[name], value, rtol=1e-9, atol=1e-11, msg=name
        )

    def generate(use_cache: bool) -> Tensor:
        return plain.eval().generate(
            tokens,
            attention_mask=attention_mask,
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )

    cached, uncached = generate(True), generate(False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-6, atol=1e-6
    )


def test_every_option_of_the_replacement_is_distinct_from_options_of_norms() -> None:
    own = set(inspect.signature(replace_layer_norms).parameters) - {"options"}
    for name in available_norms():
        assert not own & set(inspect.signature(build_norm).bind_partial(name).arguments) - {"name"}
        assert not own & set(norm_options(name))


@pytest.mark.parametrize("name", ["power", "batch", "rms"])
def test_a_norm_assigned_by_hand_is_not_taken_for_layer_norm(name: str) -> None:
    """Without gradients torch would compute LN from the norm's parameters."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    layer.norm1, layer.norm2 = build_norm(name, 8), build_norm(name, 8)
    layer(torch.randn(4, 5, 8) * 3 + 1)
    layer.eval()
    x = torch.randn(4, 5, 8) * 3 + 1
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
