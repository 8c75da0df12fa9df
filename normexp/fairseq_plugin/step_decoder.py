"""The decoder of a translation model, position by position, for beam search.

fairseq's incremental decoding copies all keys and values twice a step: once to append the new ones
and once to follow the beams. Here they are written once and stay where they are. A table says for
every beam in which beam each of its earlier positions was computed.

Matrix products in float32 on a CPU use weights packed for oneDNN, whose kernels are 1.5 to 3 times
as fast on AMD's processors as those of MKL, which F.linear uses.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models.transformer import (
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerModel,
    TransformerModelBase,
)
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayer, TransformerDecoderLayerBase
from torch import Tensor, nn

from normexp.fairseq_plugin.decoder_attention import attend_to_past, attend_to_source
from normexp.fairseq_plugin.fast_attention import FastAttention
from normexp.fairseq_plugin.layers import NormDecoderLayer
from normexp.fairseq_plugin.stacks import NormDecoder
from normexp.fairseq_plugin.transformer import NormTransformerModel

_MODELS = (TransformerModel, TransformerModelBase, NormTransformerModel)
_DECODERS = (TransformerDecoder, TransformerDecoderBase, NormDecoder)
_LAYERS = (TransformerDecoderLayer, TransformerDecoderLayerBase, NormDecoderLayer)
_ATTENTIONS = (MultiheadAttention, FastAttention)
# Parts of fairseq's decoders that are not computed here; None in models without them.
_DECODER_EXTRAS = ("adaptive_softmax", "quant_noise")
_LAYER_EXTRAS = ("c_attn", "attn_ln", "ffn_layernorm", "w_resid")
_FIRST_POSITIONS = 32


class Past:
    """What the beams of a batch have computed so far.

    Attributes, for B sentences, K beams, S source positions, C channels, by layer where lists:
        keys, values: (B, room for positions, K, C).
        ancestors: (B, K, room for positions), the beam that computed a beam's earlier position.
        source_keys, source_values: (B, S, C), those of the encoder's states.
        source_padding: (B, S) bool, True = padding; None without any.
        length: number of positions computed.
    """

    def __init__(
        self,
        source_keys: list[Tensor],
        source_values: list[Tensor],
        source_padding: Tensor | None,
        beam: int,
    ):
        self.source_keys, self.source_values = source_keys, source_values
        self.source_padding = source_padding
        sentences, _, channels = source_keys[0].shape
        shape = (sentences, _FIRST_POSITIONS, beam, channels)
        self.keys = [keys.new_empty(shape) for keys in source_keys]
        self.values = [keys.new_empty(shape) for keys in source_keys]
        self.ancestors = torch.zeros(
            sentences, beam, _FIRST_POSITIONS, dtype=torch.long, device=source_keys[0].device
        )
        self.length = 0

    def follow(self, parents: Tensor) -> None:
        """Continue beam parents[b, k] of sentence b, as its beam k. parents: (B, K)."""
        self.ancestors = self.ancestors.gather(1, parents.unsqueeze(-1).expand_as(self.ancestors))

    def keep(self, sentences: Tensor) -> None:
        """Leave out all sentences but those of these indices (B',), in their order."""
        for states in (self.keys, self.values, self.source_keys, self.source_values):
            states[:] = [state.index_select(0, sentences) for state in states]
        self.ancestors = self.ancestors.index_select(0, sentences)
        if self.source_padding is not None:
            self.source_padding = self.source_padding.index_select(0, sentences)

    def make_room(self) -> None:
        """Have room for the next position, computed by each beam for itself."""
        room = self.ancestors.size(2)
        if self.length == room:
            for states in (self.keys, self.values):
                states[:] = [_with_twice_the_room(state) for state in states]
            self.ancestors = F.pad(self.ancestors, (0, room))
        own = torch.arange(self.ancestors.size(1), device=self.ancestors.device)
        self.ancestors[:, :, self.length] = own


def _with_twice_the_room(states: Tensor) -> Tensor:
    sentences, room, beam, channels = states.shape
    larger = states.new_empty(sentences, 2 * room, beam, channels)
    larger[:, :room] = states
    return larger


class StepDecoder:
    """The decoder of a model in eval mode, for inference; its weights must not change meanwhile.

    Several threads may use one object.
    """

    def __init__(self, model: nn.Module):
        """Raises ValueError where `why_not` has a reason."""
        reason = why_not(model)
        if reason is not None:
            raise ValueError(reason)
        decoder = model.decoder
        self._decoder = decoder
        self._layers = [_StepLayer(layer) for layer in decoder.layers]
        self._project_in = _linear(decoder.project_in_dim)
        self._project_out = _linear(decoder.project_out_dim)
        self._output = _Linear([decoder.output_projection])

    def start(self, encoder_out: dict[str, Any], beam: int) -> Past:
        """Prepare the search of a batch from what fairseq's encoder returns for it."""
        states = encoder_out["encoder_out"][0].transpose(0, 1).contiguous()
        masks = encoder_out["encoder_padding_mask"]
        padding = masks[0] if masks and bool(masks[0].any()) else None
        attentions = [layer.source_attention for layer in self._layers]
        return Past(
            [attention.k_proj(states) for attention in attentions],
            [attention.v_proj(states) for attention in attentions],
            padding,
            beam,
        )

    def positions(self, number: int) -> Tensor | None:
        """Embeddings (number, C) of the first positions of a sentence; None in a model without."""
        embed = self._decoder.embed_positions
        if embed is None:
            return None
        device = self._decoder.embed_tokens.weight.device
        some_token = torch.full((1, number), self._decoder.padding_idx + 1, device=device)
        return embed(some_token)[0]

    def logits(self, tokens: Tensor, position: Tensor | None, past: Past) -> Tensor:
        """Return logits (B, K', V) for what follows the last tokens (B, K') of the beams.

        K' is 1 for the first position, which all beams share, else K. position: its embedding
        (C,). The keys and values of the new position are added to `past`.
        """
        decoder = self._decoder
        x = decoder.embed_scale * decoder.embed_tokens(tokens)
        if self._project_in is not None:
            x = self._project_in(x)
        if position is not None:
            x = x + position
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        past.make_room()
        # The norms get (T, B, C): one position of B K' sentences.
        x = x.view(1, -1, x.size(-1))
        for index, layer in enumerate(self._layers):
            x = layer(x, past, index)
        past.length += 1
        if decoder.layer_norm is not None:
            x = decoder.layer_norm(x)
        if self._project_out is not None:
            x = self._project_out(x)
        return self._output(x).view(*tokens.shape, -1)


class _StepLayer:
    def __init__(self, layer: nn.Module):
        attention, source_attention = layer.self_attn, layer.encoder_attn
        self.source_attention = source_attention
        self._num_heads = attention.num_heads, source_attention.num_heads
        self._pre_norm = layer.normalize_before
        self._norms = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm
        self._final_norm = layer.final_layer_norm
        self._qkv = _Linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _Linear([attention.out_proj])
        self._source_query = _Linear([source_attention.q_proj])
        self._source_out = _Linear([source_attention.out_proj])
        self._fc1, self._fc2 = _Linear([layer.fc1]), _Linear([layer.fc2])
        self._activation = torch.relu_ if layer.activation_fn is F.relu else layer.activation_fn

    def __call__(self, x: Tensor, past: Past, index: int) -> Tensor:
        """Return the layer's output (1, B K', C) for x, likewise."""
        own_heads, source_heads = self._num_heads
        own_norm, source_norm = self._norms

        def to_past(h: Tensor, x: Tensor) -> Tensor:
            mixed = attend_to_past(
                self._qkv(h),
                past.keys[index],
                past.values[index],
                past.ancestors,
                past.length,
                own_heads,
            )
            return self._out.added(mixed, x)

        def to_source(h: Tensor, x: Tensor) -> Tensor:
            mixed = attend_to_source(
                self._source_query(h),
                past.source_keys[index],
                past.source_values[index],
                past.source_padding,
                source_heads,
            )
            return self._source_out.added(mixed, x)

        def feed_forward(h: Tensor, x: Tensor) -> Tensor:
            return self._fc2.added(self._activation(self._fc1(h)), x)

        for norm, block in (
            (own_norm, to_past),
            (source_norm, to_source),
            (self._final_norm, feed_forward),
        ):
            x = block(norm(x), x) if self._pre_norm else norm(block(x, x))
        return x


class _Linear:
    """One or several linear layers of the same input as one, whose outputs stand side by side."""

    def __init__(self, layers: Sequence[nn.Linear]):
        weights = [layer.weight.detach() for layer in layers]
        biases = [
            torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.detach()
            for layer, weight in zip(layers, weights, strict=True)
        ]
        several = len(layers) > 1
        self._weight = torch.cat(weights) if several else weights[0]
        self._bias: Tensor | None = torch.cat(biases) if several else biases[0]
        if all(layer.bias is None for layer in layers):
            self._bias = None
        self._packed = _packed(self._weight)
        if self._packed is not None:
            self._weight = self._packed

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs for x (..., C)."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the residual plus the outputs for x."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self._packed, self._bias, "add"
            )
        return residual + F.linear(x, self._weight, self._bias)


def _linear(layer: nn.Linear | None) -> _Linear | None:
    return None if layer is None else _Linear([layer])


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in the order that oneDNN's products read it, where these are to be had."""
    usable = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
    return torch.ops.mkldnn._reorder_linear_weight(weight) if usable else None


def why_not(model: nn.Module) -> str | None:
    """The reason why a model's decoder cannot be a StepDecoder, None if it can."""
    decoder = getattr(model, "decoder", None)
    if type(model) not in _MODELS or type(decoder) not in _DECODERS:
        return f"{type(model).__name__} is not one of fairseq's or normexp's Transformers"
    for extra in _DECODER_EXTRAS:
        if getattr(decoder, extra) is not None:
            return f"its decoder has {extra}"
    if decoder.training:
        return "it is in training mode"
    layers = list(decoder.layers)
    others = [decoder.project_in_dim, decoder.project_out_dim, decoder.output_projection]
    for layer in layers:
        reason = _why_not_layer(layer)
        if reason is not None:
            return reason
        for attention in (layer.self_attn, layer.encoder_attn):
            others += [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
        others += [layer.fc1, layer.fc2]
    for linear in others:
        if linear is not None and (type(linear) is not nn.Linear or _has_hooks(linear)):
            return f"{linear} is not a plain linear layer"
    if any(getattr(m, "apply_during_inference", False) for m in decoder.modules()):
        return "it applies dropout at inference"
    return None if layers else "its decoder has no layers"


def _why_not_layer(layer: nn.Module) -> str | None:
    if type(layer) not in _LAYERS:
        return f"its decoder has a {type(layer).__name__}"
    if layer.cross_self_attention or layer.encoder_attn is None:
        return "a layer of its decoder does not attend to the encoder's states by themselves"
    for extra in _LAYER_EXTRAS:
        if getattr(layer, extra) is not None:
            return f"a layer of its decoder has {extra}"
    for attention in (layer.self_attn, layer.encoder_attn):
        plain = (
            type(attention) in _ATTENTIONS
            and attention.bias_k is None
            and not attention.add_zero_attn
            and not attention.use_xformers
        )
        if not plain:
            return "an attention of its decoder is not plain multi-head attention"
    return "a layer of its decoder has hooks" if _has_hooks(layer) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
