"""Models of the transformers library, tiny and with random weights: which norms are replaced."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normexp.norms import padding_mask_for, replace_layer_norms
from normexp.norms.batch import BatchNorm
from normexp.norms.running_norm import RunningNorm

transformers = pytest.importorskip("transformers", reason="needs normexp[huggingface]")

B, T, LAYERS = 3, 6, 2
PADDING = torch.arange(T) >= torch.tensor([[4], [6], [3]])
SIZES = {
    **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2},
    **{"num_hidden_layers": LAYERS, "max_position_embeddings": 32, "pad_token_id": 0},
}
DECODER = {
    **SIZES,
    **{"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2},
}
GPT2 = {
    **{"vocab_size": 20, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
T5 = {
    **{"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": LAYERS},
    **{"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0},
}


def of_text(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    keep = (~mask).long()
    return model(input_ids=tokens, attention_mask=keep)[0]


def of_translation(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    keep = (~mask).long()
    return model(
        input_ids=tokens,
        attention_mask=keep,
        decoder_input_ids=tokens,
        decoder_attention_mask=keep,
    )[0]


@dataclass(frozen=True)
class Model:
    name: str  # of the class in transformers; its configuration is called alike
    options: dict[str, Any]
    at_layers: int  # norms per layer of hidden states
    besides: int  # and elsewhere
    qk: int = 0  # norms of queries and keys per layer
    run: Callable[[nn.Module, Tensor, Tensor], Tensor] = of_text

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        stem = self.name.removesuffix("Model").removesuffix("ForCausalLM")
        stem = stem.removesuffix("ForConditionalGeneration").removesuffix("LMHead")
        model = getattr(transformers, self.name)(
            getattr(transformers, f"{stem}Config")(**self.options)
        )
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


TEXT = [
    Model("GPT2LMHeadModel", GPT2, at_layers=2, besides=1),
    # Encoder: 2 a layer; decoder: 3; and the two final ones.
    Model("T5ForConditionalGeneration", T5, at_layers=5, besides=2, run=of_translation),
    Model("LlamaForCausalLM", DECODER, at_layers=2, besides=1),
    Model("MistralForCausalLM", DECODER, at_layers=2, besides=1),
    Model("Qwen3ForCausalLM", DECODER, at_layers=2, besides=1, qk=2),
    Model("GemmaForCausalLM", DECODER, at_layers=2, besides=1),
    Model("Gemma2ForCausalLM", DECODER, at_layers=4, besides=1),
    Model("BertModel", SIZES, at_layers=2, besides=1),
]


@pytest.mark.parametrize("of", TEXT, ids=lambda of: of.name)
def test_text_models_are_replaced_and_their_padding_does_not_count(of: Model) -> None:
    def trained(padding: int) -> nn.Module:
        model = of.build()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            replaced = replace_layer_norms(model, "power", batch_first=True, warmup_steps=1)
        assert len(replaced) == of.at_layers * LAYERS + of.besides
        left_out = [str(one.message) for one in caught if "left as they were" in str(one.message)]
        assert len(left_out) == (of.qk > 0) and all("queries or keys" in one for one in left_out)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            tokens = torch.randint(3, 20, (B, T), generator=generator)
            with padding_mask_for(model, padding_mask=PADDING):
                y = of.run(model, tokens.masked_fill(PADDING, padding), PADDING)
            optimizer.zero_grad()
            y[~PADDING].sin().mean().backward()
            optimizer.step()
        return model

    one, other = trained(0), trained(5)
    norms = [norm for norm in one.modules() if isinstance(norm, RunningNorm)]
    assert len(norms) == of.at_layers * LAYERS + of.besides
    assert all(norm.step == 2 for norm in norms)
    for key, value in one.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(
                dict(other.named_buffers())[key], value, rtol=1e-4, atol=1e-5, msg=key
            )
    others = {
        type(module).__name__
        for path, module in one.named_modules()
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, RunningNorm)
        and not path.endswith(("q_norm", "k_norm"))
    }
    assert not others


def test_qk_norms_by_name() -> None:
    """(B, T, heads, head size) with a mask (B, T)."""
    model = next(of for of in TEXT if of.qk).build()
    replaced = replace_layer_norms(model, "batch", batch_first=True, only="[qk]_norm$")
    assert len(replaced) == 2 * LAYERS
    seen: list[Tensor] = []
    norm = model.model.layers[0].self_attn.q_norm
    norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with padding_mask_for(model, padding_mask=PADDING):
        of_text(model, torch.randint(3, 20, (B, T)), PADDING)
    (x,) = seen
    assert x.shape == (B, T, 2, 8)
    real = x.detach()[~PADDING].reshape(-1, 8)
    torch.testing.assert_close(norm.running_mean, 0.05 * real.mean(0), rtol=1e-4, atol=1e-6)


def test_images() -> None:
    options = {
        **{"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
        **{"intermediate_size": 20, "image_size": 8, "patch_size": 4},
    }
    model = transformers.ViTModel(transformers.ViTConfig(**options))
    assert len(replace_layer_norms(model, "power", batch_first=True)) == 2 * LAYERS + 1
    with padding_mask_for(model, padding_mask=None):
        model(torch.randn(B, 3, 8, 8)).last_hidden_state.sum().backward()
    assert all(norm.step == 1 for norm in model.modules() if isinstance(norm, RunningNorm))


def test_channels_first_norms_of_images_are_left() -> None:
    options = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "image_size": 32}
    model = transformers.ConvNextModel(transformers.ConvNextConfig(**options))
    with pytest.warns(UserWarning, match="embeddings.layernorm, .*: does not normalize each"):
        replaced = replace_layer_norms(model, "batch", batch_first=True)
    assert len(replaced) == 4 + 1  # a block of each stage, on (B, H, W, C), and the pooled one
    with padding_mask_for(model, padding_mask=None):
        model(torch.randn(B, 3, 32, 32)).last_hidden_state.sum().backward()


def test_a_conformer_with_a_mask_of_its_frames() -> None:
    """BatchNorm1d on (B, C, T) is replaced by its masked form: padding takes no part."""
    options = {
        **{"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
        **{"intermediate_size": 20, "conv_dim": (8, 8), "conv_stride": (5, 2)},
        **{"conv_kernel": (10, 3), "num_feat_extract_layers": 2, "conv_depthwise_kernel_size": 3},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        **{"apply_spec_augment": False, "layerdrop": 0.0},
    }
    config = transformers.Wav2Vec2ConformerConfig(**options)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ConformerModel(config)
    replaced = replace_layer_norms(model, "batch", batch_first=True, kind=nn.BatchNorm1d)
    assert replaced == [f"encoder.layers.{i}.conv_module.batch_norm" for i in range(LAYERS)]
    samples = torch.tensor([200, 120])
    frames = model._get_feat_extract_output_lengths(samples)
    mask = torch.arange(int(frames.max())) >= frames[:, None]
    seen: list[Tensor] = []
    norm = model.encoder.layers[0].conv_module.batch_norm
    assert isinstance(norm, BatchNorm) and norm.momentum == 0.1
    norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    audio = torch.randn(2, 200)
    with padding_mask_for(model, padding_mask=mask):
        attention_mask = (torch.arange(200) < samples[:, None]).long()
        model(audio, attention_mask=attention_mask).last_hidden_state.sum().backward()
    real = seen[0].detach()[~mask]  # the norm itself gets (B, T, C)
    torch.testing.assert_close(norm.running_mean, 0.1 * real.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * real.var(0), rtol=1e-4, atol=1e-6)
