"""`normexp_transformer_lm`: fairseq's causal Transformer LM with chosen normalizations."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from fairseq.models import register_model
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from normexp.fairseq_plugin.norm_config import NormConfig
from normexp.fairseq_plugin.patches import language_model_decoder
from normexp.fairseq_plugin.stacks import NormLanguageModelDecoder
from normexp.sites import resolve_sites


@dataclass
class NormLanguageModelConfig(NormConfig, TransformerLanguageModelConfig):
    """fairseq's TransformerLanguageModelConfig and the choice of normalizations."""


@register_model("normexp_transformer_lm", dataclass=NormLanguageModelConfig)
class NormLanguageModel(TransformerLanguageModel):
    """Causal Transformer LM; with `layer` everywhere it is fairseq's own, bit for bit."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "NormLanguageModel":
        """Build the model. Raises ValueError on an impossible choice of normalizations."""
        decoder = partial(NormLanguageModelDecoder, norms=resolve_sites("language_model", args))
        # The stock method builds the embeddings in three variants and then the decoder class
        # that it finds under this name; it offers no other way to put in a subclass.
        with language_model_decoder(decoder):
            return super().build_model(args, task)
