"""The plugin's Transformer layers with the sublayers of sublayers.py, for training on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.fairseq_plugin import sublayers
from normexp.fairseq_plugin.dropout import Draws
from normexp.fairseq_plugin.layers import NormDecoderLayer, NormEncoderLayer
from normexp.fairseq_plugin.sublayers import Heads, Rows
from normexp.norms.registry import available_norms, norm_class
from normexp.norms.replace import padding_mask_for

# Norms whose outputs and gradients at tokens do not depend on the values at padding.
_INDIFFERENT_TO_PADDING = (
    *("layer", "rms", "scale", "group", "adaptive", "dynamic_tanh", "instance", "none"),
    *("batch", "power", "power_v", "regularized_batch"),
)
_WIDE = (torch.float32, torch.float64)


class _FastLayer:
    """What both layers share; a mixin before a layer of this plugin."""

    computes_padding: bool  # because a norm of the model takes it for tokens

    def _normed(self, norm: nn.Module, x: Tensor, *, before: bool) -> Tensor:
        return norm(x) if self.normalize_before == before else x

    def _self_attention(self, x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        attention, norm = self.self_attn, self.self_attn_layer_norm
        states = sublayers.self_attention(
            self._normed(norm, x, before=True),
            x,
            _parameters(attention.q_proj, attention.k_proj, attention.v_proj),
            _parameters(attention.out_proj),
            rows,
            Heads(attention.num_heads, attention.scaling, bias),
            Draws.new(attention.dropout_module.p),
            Draws.new(self.dropout_module.p),
        )
        return self._normed(norm, states, before=False)

    def _feed_forward(self, x: Tensor, rows: Rows) -> Tensor:
        norm = self.final_layer_norm
        states = sublayers.feed_forward(
            self._normed(norm, x, before=True),
            x,
            _parameters(self.fc1),
            _parameters(self.fc2),
            rows,
            Draws.new(self.activation_dropout_module.p),
            Draws.new(self.dropout_module.p),
        )
        return self._normed(norm, states, before=False)


class FastEncoderLayer(_FastLayer, NormEncoderLayer):
    """Encoder layer that computes training passes here and others by the class before it."""

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None
    ) -> Any:
        """As NormEncoderLayer.forward."""
        if not _computes_here(self, x) or attn_mask is not None:
            return super().forward(x, encoder_padding_mask, attn_mask)
        rows = Rows.of(x, encoder_padding_mask, with_padding=self.computes_padding)
        norms = (self.self_attn_layer_norm, self.final_layer_norm)
        with padding_mask_for(*norms, padding_mask=encoder_padding_mask):
            return self._feed_forward(self._self_attention(x, rows, None), rows)


class FastDecoderLayer(_FastLayer, NormDecoderLayer):
    """Decoder layer that computes training passes here and others by the class before it.

    It does not return the weights of the attention, which no loss of this plugin uses.
    """

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        *args: Any,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As NormDecoderLayer.forward."""
        if not _computes_here(self, x) or incremental_state is not None or args:
            return super().forward(
                x,
                encoder_out,
                encoder_padding_mask,
                incremental_state,
                *args,
                self_attn_mask=self_attn_mask,
                self_attn_padding_mask=self_attn_padding_mask,
                **kwargs,
            )
        rows = Rows.of(x, self_attn_padding_mask, with_padding=self.computes_padding)
        norms = (self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm)
        with padding_mask_for(*norms, padding_mask=self_attn_padding_mask):
            # fairseq cuts it out of the largest mask so far.
            mask = None if self_attn_mask is None else self_attn_mask.contiguous()
            x = self._self_attention(x, rows, mask)
            if self.encoder_attn is not None and encoder_out is not None:
                memory_rows = Rows.of(
                    encoder_out, encoder_padding_mask, with_padding=self.computes_padding
                )
                x = self._cross_attention(x, encoder_out, rows, memory_rows)
            return self._feed_forward(x, rows), None, None

    def _cross_attention(self, x: Tensor, memory: Tensor, rows: Rows, memory_rows: Rows) -> Tensor:
        attention, norm = self.encoder_attn, self.encoder_attn_layer_norm
        states = sublayers.cross_attention(
            self._normed(norm, x, before=True),
            memory,
            x,
            _parameters(attention.q_proj, attention.k_proj, attention.v_proj),
            _parameters(attention.out_proj),
            rows,
            memory_rows,
            Heads(attention.num_heads, attention.scaling, None),
            Draws.new(attention.dropout_module.p),
            Draws.new(self.dropout_module.p),
        )
        return self._normed(norm, states, before=False)


def use_fast_layers(model: nn.Module) -> None:
    """Turn the Transformer layers of a model of this plugin into fast ones, in place.

    Layers with what the sublayers do not have (another activation, scaled heads, quantization
    noise, ...) and wrapped ones stay as they are, and all of them where there is no compiler.
    """
    if not sublayers.compiled():
        return
    computes_padding = _takes_padding_for_tokens(model)
    for module in model.modules():
        if type(module) in _FAST and _has_only_what_is_here(module):
            module.__class__ = _FAST[type(module)]
            module.computes_padding = computes_padding


_FAST = {NormEncoderLayer: FastEncoderLayer, NormDecoderLayer: FastDecoderLayer}


def _computes_here(layer: nn.Module, x: Tensor) -> bool:
    return (
        layer.training
        and x.device.type == "cpu"
        and x.dtype in _WIDE
        and not (
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16
        )
        and sublayers.compiled()
    )


def _takes_padding_for_tokens(model: nn.Module) -> bool:
    """Return whether what a norm of the model does to tokens depends on the values at padding."""
    names = set(available_norms()) - set(_INDIFFERENT_TO_PADDING)
    classes = {norm_class(name) for name in names}
    return any(type(module) in classes for module in model.modules())


def _has_only_what_is_here(layer: nn.Module) -> bool:
    attentions = [a for a in (layer.self_attn, getattr(layer, "encoder_attn", None)) if a]
    linear = [layer.fc1, layer.fc2]
    for a in attentions:
        if a.bias_k is not None or a.add_zero_attn or a.use_xformers:
            return False
        linear += [a.q_proj, a.k_proj, a.v_proj, a.out_proj]
    extras = ("attn_ln", "c_attn", "ffn_layernorm", "w_resid")
    return (
        all(type(part) is nn.Linear and part.bias is not None for part in linear)
        and not any(part._forward_pre_hooks for part in linear)  # quantization noise
        and layer.activation_fn is F.relu
        and not getattr(layer, "return_fc", False)
        and not getattr(layer, "cross_self_attention", False)
        and all(getattr(layer, name, None) is None for name in extras)
    )


def _parameters(*layers: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))
