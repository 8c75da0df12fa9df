"""`normexp_transformer`: fairseq's translation Transformer with chosen normalizations."""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from torch import nn

from normexp.fairseq_plugin.norm_config import NormConfig
from normexp.fairseq_plugin.stacks import NormDecoder, NormEncoder
from normexp.sites import resolve_sites


@dataclass
class NormTransformerConfig(NormConfig, TransformerConfig):
    """fairseq's TransformerConfig and the choice of normalizations."""


@register_model("normexp_transformer", dataclass=NormTransformerConfig)
class NormTransformerModel(TransformerModelBase):
    """Encoder-decoder Transformer; with `layer` everywhere it is fairseq's own, bit for bit."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Offer every field as a flag, nested ones under flat names (--encoder-embed-dim)."""
        # Without defaults, so that an architecture can tell which flags were given.
        gen_parser_from_dataclass(
            parser, NormTransformerConfig(), delete_default=True, with_prefix=""
        )

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "NormTransformerModel":
        """Build the model. Raises ValueError on an impossible choice of normalizations."""
        if cfg.quant_noise.scalar:
            # fairseq looks for it in flat configurations only, and would silently ignore it.
            raise ValueError("quant_noise.scalar has no effect on this model; leave it at 0")
        return super().build_model(cfg, task)

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Module) -> NormEncoder:
        """Build the encoder."""
        norms = resolve_sites("translation", cfg)
        return NormEncoder(cfg, src_dict, embed_tokens, norms=norms)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Module) -> NormDecoder:
        """Build the decoder."""
        return NormDecoder(
            cfg,
            tgt_dict,
            embed_tokens,
            no_encoder_attn=cfg.no_cross_attention,
            norms=resolve_sites("translation", cfg),
        )
