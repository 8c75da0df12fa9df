"""Norms in transformers' models: loading, saving, training with Trainer, weight decay."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stateful import assert_same
from torch import Tensor, nn

from normexp.norms import (
    available_norms,
    build_norm,
    norm_options,
    norm_parameters,
    padding_mask_for,
    replace_layer_norms,
)
from normexp.norms.power import PowerNorm
from normexp.norms.running_norm import RunningNorm

transformers = pytest.importorskip("transformers", reason="needs normexp[huggingface]")
every_norm = pytest.mark.parametrize("name", available_norms())
SHAPE = {"vocab_size": 12, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
CONFIG = transformers.GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=0)


class WithNorms(transformers.GPT2LMHeadModel):
    """Replaces its norms in its constructor, as from_pretrained wants it."""

    def __init__(self, config: Any):
        super().__init__(config)
        options = {"warmup_steps": 3} if "warmup_steps" in norm_options(config.norm) else {}
        replace_layer_norms(self, config.norm, batch_first=True, **options)


def config_with(name: str) -> Any:
    return transformers.GPT2Config(**{**CONFIG.to_dict(), "norm": name})


@pytest.fixture(autouse=True)
def offline_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def fresh_memory_holds_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers allocates and does not fill; real memory often is zero by chance."""
    allocate = torch.empty_like

    def dirty(like: Tensor, **options: Any) -> Tensor:
        memory = allocate(like, **options)
        return memory if memory.is_meta else memory.fill_(77)

    monkeypatch.setattr(torch, "empty_like", dirty)


def counting() -> tuple[Tensor, Tensor]:
    """Sequences (B, T) to learn, and their attention mask."""
    tokens = (torch.randint(0, 11, (8, 1)) + torch.arange(12)) % 11 + 1
    mask = (torch.arange(12) >= torch.randint(0, 8, (8, 1))).long()
    return tokens * mask, mask


def learn(model: nn.Module, steps: int) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        tokens, mask = counting()
        optimizer.zero_grad()
        with padding_mask_for(model, padding_mask=mask == 0):
            loss = model(tokens, attention_mask=mask, labels=tokens).loss
        penalties = [norm.penalty() for norm in model.modules() if hasattr(norm, "penalty")]
        (loss + sum(penalties)).backward()
        optimizer.step()


def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    tokens, mask = counting()
    with torch.no_grad(), padding_mask_for(model, padding_mask=mask == 0):
        return model.eval()(tokens, attention_mask=mask).logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# --- from_pretrained


@every_norm
def test_a_model_comes_back_from_its_own_checkpoint(name: str, tmp_path: Path) -> None:
    """Every parameter and buffer, those that are not saved included; weights stay tied."""
    torch.manual_seed(0)
    model = WithNorms(config_with(name))
    learn(model, 4)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = WithNorms.from_pretrained(tmp_path)
    assert_same(tensors(loaded), tensors(model))
    assert_same(logits(loaded), expected)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    learn(loaded.train(), 2)
    learn(model.train(), 2)
    assert_same(tensors(loaded), tensors(model))


@every_norm
def test_what_a_stock_checkpoint_does_not_hold_starts_as_in_a_new_model(
    name: str, tmp_path: Path
) -> None:
    stock = transformers.GPT2LMHeadModel(CONFIG)
    for parameter in stock.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    stock.save_pretrained(tmp_path)
    loaded = tensors(WithNorms.from_pretrained(tmp_path, config=config_with(name)))
    held, new = stock.state_dict(), tensors(WithNorms(config_with(name)))
    assert_same(loaded, {key: held.get(key, value) for key, value in new.items()})
    sites = sum("ln_" in key and key.endswith("weight") for key in held)
    assert sites == 5


def test_what_a_checkpoint_of_rms_norms_does_not_hold(tmp_path: Path) -> None:
    """PN's bias, which transformers does not know how to initialize either."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

    class PowerLlama(LlamaForCausalLM):
        def __init__(self, config: Any):
            super().__init__(config)
            replace_layer_norms(self, "power", batch_first=True, kind=LlamaRMSNorm)

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=12, **shape, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    norm = PowerLlama.from_pretrained(tmp_path).model.norm
    assert_same(dict(norm.named_buffers()), dict(build_norm("power", 16).named_buffers()))
    assert_same(norm.bias, nn.Parameter(torch.zeros(16)))


def test_statistics_of_a_model_loaded_in_half_precision_keep_their_digits(tmp_path: Path) -> None:
    model = WithNorms(config_with("power"))
    learn(model, 4)
    model.save_pretrained(tmp_path)
    loaded = WithNorms.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.transformer.ln_f.weight.dtype == torch.bfloat16
    assert_same(dict(loaded.named_buffers()), dict(model.named_buffers()))


def test_a_trained_norm_in_a_new_model_is_left_alone() -> None:
    """transformers initializes whatever a new model is made of, if it can."""

    class Wrapper(transformers.PreTrainedModel):
        config_class = transformers.GPT2Config

        def __init__(self, config: Any, norm: nn.Module):
            super().__init__(config)
            self.norm = norm
            self.post_init()

    norm = build_norm("power", 4)
    norm(3 + torch.randn(6, 4)).sum().backward()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    assert_same(
        dict(
            Wrapper(transformers.GPT2Config(attn_implementation="eager"), norm).norm.named_buffers()
        ),
        before,
    )


@every_norm
def test_a_model_built_without_memory_starts_by_reset_parameters(name: str) -> None:
    """As FSDP does it, and everybody who calls to_empty."""
    with torch.device("meta"):
        norm = build_norm(name, 4)
    norm.to_empty(device="cpu")
    for tensor in tensors(norm).values():
        tensor.data.fill_(77)
    if hasattr(norm, "reset_parameters"):
        norm.reset_parameters()
    assert_same(tensors(norm), tensors(build_norm(name, 4)))


# --- Trainer


@every_norm
def test_weight_decay_leaves_out_the_same_for_every_norm(name: str) -> None:
    """As the guide says: Trainer's own choice without the parameters of norms."""

    def decayed(model: nn.Module) -> set[str]:
        trainer = transformers.Trainer.__new__(transformers.Trainer)
        return set(trainer.get_decay_parameter_names(model))

    stock, model = transformers.GPT2LMHeadModel(CONFIG), WithNorms(config_with(name))
    assert norm_parameters(stock) == {name for name in stock.state_dict() if ".ln_" in name}
    assert decayed(stock) == decayed(stock) - norm_parameters(stock)
    assert decayed(model) - norm_parameters(model) == decayed(stock)


class PaddedTrainer(transformers.Trainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
        with padding_mask_for(model, padding_mask=inputs["attention_mask"] == 0):
            return super().training_step(model, inputs, *more)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name not in norm_parameters(model)]


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    tokens, mask = counting()
    return [
        {"input_ids": t, "attention_mask": m, "labels": t.masked_fill(m == 0, -100)}
        for t, m in zip(tokens.repeat(4, 1), mask.repeat(4, 1), strict=True)
    ]


def trainer(folder: Path, model: nn.Module, sentences: list, **more: Any) -> PaddedTrainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.1,
        **more,
    )
    return PaddedTrainer(model=model, args=arguments, train_dataset=sentences)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["power", "batch"])
def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(
    name: str, checkpointing: bool, sentences: list, tmp_path: Path
) -> None:
    """With dropout, through the end of the warm-up; from a checkpoint into a new model."""
    pytest.importorskip("accelerate", reason="needs normexp[huggingface]")
    options = {"gradient_checkpointing": checkpointing}

    def new_model() -> nn.Module:
        torch.manual_seed(0)
        return WithNorms(config_with(name))

    straight = trainer(tmp_path, new_model(), sentences, **options)
    straight.train()
    resumed = trainer(tmp_path, new_model(), sentences, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(tensors(resumed.model), tensors(straight.model))
    norms = [norm for norm in resumed.model.modules() if isinstance(norm, RunningNorm)]
    assert [int(norm.step) for norm in norms] == [6] * 5
    loaded = WithNorms.from_pretrained(tmp_path / "checkpoint-6")
    assert_same(tensors(loaded), tensors(straight.model))


def test_a_trainer_in_half_precision_keeps_statistics_in_float32(
    sentences: list, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="needs normexp[huggingface]")
    run = trainer(tmp_path, WithNorms(config_with("power")), sentences, bf16=True)
    run.train()
    norm = run.model.transformer.ln_f
    assert isinstance(norm, PowerNorm) and norm.running_psi2.dtype == torch.float32
    assert norm.step == 6 and norm.num_rejected == 0


def test_accelerate_builds_without_memory_and_fills_in(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs normexp[huggingface]")
    model = WithNorms(config_with("power"))
    learn(model, 4)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=True):
        empty = WithNorms(config_with("power"))
    file = str(tmp_path / "model.safetensors")
    filled = accelerate.load_checkpoint_and_dispatch(empty, file, device_map={"": "cpu"})
    filled.tie_weights()
    learn(filled.train(), 2)
    learn(model.train(), 2)
    assert_same(tensors(filled), tensors(model))
