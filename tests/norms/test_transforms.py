"""torch.func, exported and traced programs: they work in eval mode and are refused in training."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.batches import C, quick_options
from support.stateful import WITH_STATE, assert_same, state, train
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from normexp.norms import available_norms, build_norm
from normexp.norms.running_norm import RunningNorm

every_norm = pytest.mark.parametrize("name", available_norms())
stateful = pytest.mark.parametrize("name", WITH_STATE)


def trained(name: str) -> nn.Module:
    norm = build_norm(name, C, **quick_options(name))
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    if isinstance(norm, RunningNorm):
        train(norm, range(4))
    return norm


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(0))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "grad": lambda norm, x: grad(lambda x: norm(x).sin().sum())(x),
    "grad of parameters": lambda norm, x: grad(
        lambda p: functional_call(norm, p, (x,)).sin().sum()
    )(dict(norm.named_parameters())),
    "vmap": lambda norm, x: vmap(norm)(torch.stack([x, 2 * x])),
    "jacrev": lambda norm, x: jacrev(norm)(x),
    "jvp": lambda norm, x: jvp(norm, (x,), (torch.ones_like(x),)),
}


@every_norm
def test_transforms_in_eval_mode(name: str) -> None:
    """Gradients and derivatives are autograd's, vmap is a loop."""
    norm, x = trained(name).eval().double(), inputs(5).double()
    leaf = x.clone().requires_grad_()
    parameters = list(norm.parameters())
    loss = norm(leaf).sin().sum()
    expected, *of_parameters = torch.autograd.grad(loss, [leaf, *parameters])
    assert_same(TRANSFORMS["grad"](norm, x), expected, 1e-5)
    if parameters:
        obtained = TRANSFORMS["grad of parameters"](norm, x)
        assert_same(list(obtained.values()), of_parameters, 1e-5)
    assert_same(TRANSFORMS["vmap"](norm, x), torch.stack([norm(x), norm(2 * x)]), 1e-5)
    jacobian = torch.autograd.functional.jacobian(norm, x)
    assert_same(TRANSFORMS["jacrev"](norm, x), jacobian, 1e-9)
    _, tangent = TRANSFORMS["jvp"](norm, x)
    assert_same(tangent, jacobian.sum((-2, -1)), 1e-9)


@every_norm
def test_functional_call_trains_on_the_state_it_is_given(name: str) -> None:
    norm, twin = trained(name), trained(name)
    twin.load_state_dict(norm.state_dict())
    before = state(norm)
    given = {key: value.clone() for key, value in norm.state_dict().items()}
    y = functional_call(norm, given, (inputs(5),))
    assert_same(y, twin(inputs(5)), 1e-6)
    expected = twin.state_dict()
    assert_same({key: given[key] for key in expected}, dict(expected), 1e-6)
    kept = {key: value for key, value in before.items() if key in expected}
    assert_same({key: state(norm)[key] for key in kept}, kept)


@pytest.mark.parametrize("transform", TRANSFORMS)
@stateful
def test_transforms_in_training_mode_name_the_cure(name: str, transform: str) -> None:
    norm = trained(name)
    before = state(norm)
    with pytest.raises(RuntimeError, match=r"training mode.*torch\.func.*call eval\(\)"):
        TRANSFORMS[transform](norm, inputs(5))
    assert_same(state(norm), before)


@pytest.mark.parametrize("name", sorted({*available_norms()} - {*WITH_STATE}))
def test_transforms_of_norms_without_state_work_in_training_mode_too(name: str) -> None:
    norm, x = build_norm(name, C), inputs(5)
    for transform in TRANSFORMS.values():
        assert_same(transform(norm.train(), x), transform(norm.eval(), x))


# --- Exports


def to_onnx(norm: nn.Module, x: Tensor) -> None:
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    torch.onnx.export(norm, (x,), dynamo=True, verbose=False)


EXPORTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch.export": lambda norm, x: torch.export.export(norm, (x,)),
    "torch.export, strict": lambda norm, x: torch.export.export(norm, (x,), strict=True),
    "torch.jit.trace": lambda norm, x: torch.jit.trace(norm, (x,)),
    "torch.onnx.export": to_onnx,
}


@pytest.mark.parametrize("how", EXPORTS)
@stateful
def test_exports_in_training_mode_are_refused_with_the_cure(name: str, how: str) -> None:
    """A program would normalize every batch by its own statistics, or by those of one batch."""
    norm = trained(name)
    before = state(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=r"call model\.eval\(\) before you export"):
            EXPORTS[how](nn.Sequential(norm), inputs(5))
    assert_same(state(norm), before)


@pytest.mark.parametrize("name", ["power", "batch"])
def test_torchs_older_onnx_exporter_takes_eval_mode_by_itself(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    norm, file = trained(name), tmp_path / "norm.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(norm, (inputs(5),), file, dynamo=False)
    session = runtime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: inputs(5).numpy()})
    assert norm.training
    assert_same(torch.from_numpy(y), norm.eval()(inputs(5)).detach(), 1e-5)


# --- Programs of other runtimes


class Model(nn.Module):
    """An encoder with the norm at all its sites, and padding as an input."""

    def __init__(self, name: str):
        super().__init__()
        self.layer_in, self.norm, self.layer_out = nn.Linear(C, C), trained(name), nn.Linear(C, C)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return x + self.layer_out(self.norm(self.layer_in(x), padding_mask).relu())


def padded(t: int, b: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(b, t, dtype=torch.bool)
    mask[0, t // 2 :] = True
    return inputs(t, b), mask


def real(y: Tensor, mask: Tensor) -> Tensor:
    return y[~mask.t()]


@every_norm
def test_onnx_runtime_computes_eval_mode(name: str) -> None:
    """One program for all lengths and numbers of sentences."""
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model = Model(name).eval()
    t, b = torch.export.Dim("t", min=2, max=64), torch.export.Dim("b", min=2, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            *(model, padded(5, 3)),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: t, 1: b}, {0: b, 1: t}),
        )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    for x, mask in (padded(5, 3), padded(9, 4)):
        given = dict(zip(["x", "padding_mask"], (x.numpy(), mask.numpy()), strict=True))
        (y,) = session.run(None, {key: given[key] for key in names})
        expected = model(x, mask).detach()
        assert_same(real(torch.from_numpy(y), mask), real(expected, mask), 1e-5)


@every_norm
def test_openvino_computes_eval_mode(name: str) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    model = Model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = openvino.convert_model(model, example_input=padded(5, 3))
        compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x, mask in (padded(5, 3), padded(9, 4)):
        y = torch.from_numpy(compiled([x.numpy(), mask.numpy()])[0])
        assert_same(real(y, mask), real(model(x, mask).detach(), mask), 1e-5)
