"""fairseq's Transformer encoder and decoder built from the layers of this plugin."""

from typing import Any

from fairseq.models.transformer import (
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerEncoderBase,
)
from torch import Tensor, nn

from normexp.fairseq_plugin.layers import NormDecoderLayer, NormEncoderLayer, Norms, wrap_layer
from normexp.norms.replace import padding_mask_for, replace_norm


class NormEncoder(TransformerEncoderBase):
    """Encoder with the norms of the encoder's sites."""

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Module, *, norms: Norms):
        self.norms = norms  # the stock constructor calls build_encoder_layer
        super().__init__(cfg, dictionary, embed_tokens)
        if self.layer_norm is not None:
            replace_norm(self, "layer_norm", norms["encoder_final"])

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """Build one layer."""
        return wrap_layer(NormEncoderLayer(cfg, norms=self.norms), cfg)

    def forward(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return fairseq's encoder_out for src_tokens (B, T); the final norm gets their mask."""
        padding_mask = src_tokens.eq(self.padding_idx)
        with padding_mask_for(self.layer_norm, padding_mask=padding_mask):
            return super().forward(src_tokens, *args, **kwargs)


class _DecoderNorms:
    """The part that both decoders share; a mixin before a decoder of fairseq."""

    def __init__(self, *args: Any, norms: Norms, **kwargs: Any):
        self.norms = norms  # the stock constructor calls build_decoder_layer
        super().__init__(*args, **kwargs)
        if self.layer_norm is not None:
            replace_norm(self, "layer_norm", norms["decoder_final"])

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        """Build one layer."""
        return wrap_layer(NormDecoderLayer(cfg, no_encoder_attn, norms=self.norms), cfg)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, Any] | None = None,
        incremental_state: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return fairseq's features (B, T, C) and extras for prev_output_tokens (B, T).

        forward and scoring call this method, so the final norm gets its mask here.
        """
        # Incremental decoding computes the states of the last position only.
        tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        with padding_mask_for(self.layer_norm, padding_mask=tokens.eq(self.padding_idx)):
            return super().extract_features(
                prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
            )


class NormDecoder(_DecoderNorms, TransformerDecoderBase):
    """Decoder of a translation model, with the norms of the decoder's sites."""


class NormLanguageModelDecoder(_DecoderNorms, TransformerDecoder):
    """Decoder of a language model; takes the flat configuration of fairseq's language models."""
