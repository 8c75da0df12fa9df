"""fairseq's Transformer layers with a chosen normalization at each of their sites."""

from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from normexp.norms.replace import padding_mask_for, replace_norm

Norms = dict[str, dict[str, Any]]  # what normexp.sites.resolve_sites returns


class NormEncoderLayer(TransformerEncoderLayerBase):
    """Encoder layer with the norms of the sites encoder_attention and encoder_ffn."""

    def __init__(self, cfg: Any, return_fc: bool = False, *, norms: Norms):
        super().__init__(cfg, return_fc=return_fc)
        replace_norm(self, "self_attn_layer_norm", norms["encoder_attention"])
        replace_norm(self, "final_layer_norm", norms["encoder_ffn"])

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None
    ) -> Any:
        """Return fairseq's result for x (T, B, C) with encoder_padding_mask (B, T).

        The mask is True, or nonzero, at padding; the layer's norms get it too.
        """
        norms = (self.self_attn_layer_norm, self.final_layer_norm)
        with padding_mask_for(*norms, padding_mask=encoder_padding_mask):
            return super().forward(x, encoder_padding_mask, attn_mask)


class NormDecoderLayer(TransformerDecoderLayerBase):
    """Decoder layer with the norms of decoder_attention, decoder_cross and decoder_ffn."""

    def __init__(self, cfg: Any, no_encoder_attn: bool = False, *, norms: Norms):
        super().__init__(cfg, no_encoder_attn)
        replace_norm(self, "self_attn_layer_norm", norms["decoder_attention"])
        if not no_encoder_attn:
            replace_norm(self, "encoder_attn_layer_norm", norms["decoder_cross"])
        replace_norm(self, "final_layer_norm", norms["decoder_ffn"])

    def forward(
        self, x: Tensor, *args: Any, self_attn_padding_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Return fairseq's result for x (T, B, C) with self_attn_padding_mask (B, T).

        Every norm, also the one before cross attention, normalizes the decoder's states, so all
        get the decoder's mask.
        """
        norms = (self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm)
        with padding_mask_for(*norms, padding_mask=self_attn_padding_mask):
            return super().forward(
                x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs
            )


def wrap_layer(layer: nn.Module, cfg: Any) -> nn.Module:
    """Apply activation checkpointing and FSDP as the configuration asks for."""
    if not cfg.checkpoint_activations:
        return fsdp_wrap(layer, min_num_params=cfg.min_params_to_wrap)
    layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0)  # with checkpointing every layer is wrapped
