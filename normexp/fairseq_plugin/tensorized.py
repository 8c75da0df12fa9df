"""`normexp_tensorized_lm`: the Tensorized Transformer LM that the paper's Table 2 builds on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from fairseq.dataclass import ChoiceEnum
from fairseq.models import FairseqDecoder, FairseqLanguageModel, register_model
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from omegaconf import II, OmegaConf
from torch import Tensor, nn

from normexp.fairseq_plugin.norm_config import NormConfig
from normexp.fairseq_plugin.tensorized_attention import TensorizedAttention
from normexp.norms import build_norm
from normexp.sites import resolve_sites

ATTENTIONS = ChoiceEnum(["published", "causal"])


@dataclass
class TensorizedConfig(NormConfig):
    """Shape of the model. The defaults are the publication's for PTB, except for the attention."""

    attention: ATTENTIONS = field(
        default="causal",
        metadata={
            "help": "published: as in the public code, every position sees its whole segment, "
            "future tokens included; causal: a position sees earlier ones and itself"
        },
    )
    cores: int = field(default=1, metadata={"help": "vectors averaged to the core of the tensor"})
    decoder_layers: int = field(default=3, metadata={"help": "number of layers"})
    decoder_embed_dim: int = field(default=256, metadata={"help": "width"})
    decoder_head_dim: int = field(default=40, metadata={"help": "size of query, key and value"})
    decoder_ffn_embed_dim: int = field(default=2100, metadata={"help": "inner width of the FFN"})
    decoder_normalize_before: bool = field(
        default=False, metadata={"help": "normalize before attention and FFN, not after"}
    )
    no_decoder_final_norm: bool = field(
        default=True, metadata={"help": "must be true: the published model has no final norm"}
    )
    dropout: float = field(default=0.3, metadata={"help": "dropout probability everywhere"})
    adaptive_softmax_cutoff: Optional[str] = field(  # noqa: UP045 (fairseq's flags need it)
        default=None,
        metadata={"help": "cutoffs of tied adaptive input and softmax, as 20000,60000"},
    )
    adaptive_softmax_factor: int = field(
        default=4, metadata={"help": "narrowing from band to band"}
    )
    tokens_per_sample: int = II("task.tokens_per_sample")


class TensorizedLayer(nn.Module):
    """Attention and FFN, each with residual and norm."""

    def __init__(self, cfg: Any, norms: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        width, inner = cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim
        self.normalize_before, self.dropout = cfg.decoder_normalize_before, cfg.dropout
        self.self_attn = TensorizedAttention(
            width,
            cfg.decoder_head_dim,
            cfg.tokens_per_sample,
            cfg.cores,
            causal=cfg.attention == "causal",
        )
        self.self_attn_layer_norm = build_norm(num_features=width, **norms["decoder_attention"])
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = build_norm(num_features=width, **norms["decoder_ffn"])

    def forward(
        self, x: Tensor, r: Tensor, u: Tensor, t: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """Return (L, B, C) for x (L, B, C).

        r: position encodings (L, C). u, t: the model's attention biases (d_head,). padding_mask:
        (B, L), True = padding, or None.
        """

        def attend(x: Tensor) -> Tensor:
            return self._dropped(self.self_attn(x, r, u, t, padding_mask))

        def feed_forward(x: Tensor) -> Tensor:
            return self._dropped(self.fc2(self._dropped(F.relu(self.fc1(x)))))

        for norm, part in (
            (self.self_attn_layer_norm, attend),
            (self.final_layer_norm, feed_forward),
        ):
            if self.normalize_before:
                x = x + part(norm(x, padding_mask))
            else:
                x = norm(x + part(x), padding_mask)
        return x

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TensorizedDecoder(FairseqDecoder):
    """Embedding, layers and softmax of the Tensorized Transformer LM (Ma et al., 2019).

    Embeddings are multiplied by sqrt(C) and tied with the softmax, which has a bias. The position
    encoding of position j in a segment of L tokens is [sin(p f), cos(p f)], p = L - 1 - j,
    f_i = 10000^(-2i/C). The published model is post-norm; the pre-norm one has no final norm. With
    adaptive_softmax_cutoff embedding and softmax are fairseq's adaptive ones, tied, without bias.
    Weights start as normal draws with standard deviation 0.02; the publication gives no rule.
    """

    def __init__(self, cfg: Any, vocab_size: int, padding_idx: int | None, dictionary: Any = None):
        super().__init__(dictionary)
        width = cfg.decoder_embed_dim
        norms = resolve_sites("language_model", cfg)
        self.padding_idx, self.segment_len = padding_idx, cfg.tokens_per_sample
        self.dropout, self.embed_scale = cfg.dropout, math.sqrt(width)
        if cfg.adaptive_softmax_cutoff is None:
            self.embed_tokens: nn.Module = nn.Embedding(vocab_size, width, padding_idx)
            self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        else:
            cutoff = [int(size) for size in cfg.adaptive_softmax_cutoff.split(",")]
            self.embed_tokens = AdaptiveInput(
                vocab_size, padding_idx, width, cfg.adaptive_softmax_factor, width, cutoff
            )
            self.adaptive_softmax = AdaptiveSoftmax(
                vocab_size,
                width,
                cutoff,
                dropout=0.0,
                factor=cfg.adaptive_softmax_factor,
                adaptive_inputs=self.embed_tokens,
                tie_proj=True,
            )
        self.content_bias = nn.Parameter(torch.zeros(cfg.decoder_head_dim))
        self.position_bias = nn.Parameter(torch.zeros(cfg.decoder_head_dim))
        self.layers = nn.ModuleList(TensorizedLayer(cfg, norms) for _ in range(cfg.decoder_layers))
        self.register_buffer("encodings", _encodings(self.segment_len, width), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for parameter in (self.content_bias, self.position_bias):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])
            elif isinstance(module, TensorizedAttention):
                nn.init.normal_(module.cores, std=0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the hidden states (L, B, C) of tokens (L, B).

        Raises ValueError for a segment longer than the model's.
        """
        padding_mask = None
        if self.padding_idx is not None and tokens.eq(self.padding_idx).any():
            padding_mask = tokens.t().eq(self.padding_idx)
        x = self._dropped(self.embed_tokens(tokens) * self.embed_scale)
        r = self._dropped(self.encodings.to(x.dtype))
        for layer in self.layers:
            x = layer(x, r, self.content_bias, self.position_bias, padding_mask)
        return self._dropped(x)

    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood (L, B), in nats, of targets (L, B) given tokens."""
        logits = self.output_layer(self.features(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            targets
        )

    def extract_features(
        self, prev_output_tokens: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return features (B, L, C) of prev_output_tokens (B, L) and an empty dict of extras."""
        return self.features(prev_output_tokens.t()).transpose(0, 1), {}

    def output_layer(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Return logits (B, L, V); the features themselves where an adaptive softmax follows."""
        if self.adaptive_softmax is not None:
            return features
        return F.linear(features, self.embed_tokens.weight, self.output_bias)

    def max_positions(self) -> int:
        """Return the length of the longest segment, in tokens."""
        return self.segment_len

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @classmethod
    def from_published(
        cls,
        params: Mapping[str, Tensor],
        *,
        vocab: int,
        layers: int,
        heads: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        segment_len: int,
        cores: int,
        pre_norm: bool,
        attention: str = "published",
    ) -> "TensorizedDecoder":
        """Build the decoder, in eval mode and without dropout, from parameters of the public code.

        params: the parameters under that code's names. The other arguments are its configuration;
        `segment_len` is in tokens, `cores` the number of averaged vectors, `attention` as in
        TensorizedConfig. Raises ValueError where parameters and configuration do not fit.
        """
        if heads != 1:
            raise ValueError(f"the published attention has one head, got heads={heads}")
        shape = TensorizedConfig(
            attention=attention,
            cores=cores,
            decoder_layers=layers,
            decoder_embed_dim=d_model,
            decoder_head_dim=d_head,
            decoder_ffn_embed_dim=d_inner,
            decoder_normalize_before=pre_norm,
            dropout=0.0,
            tokens_per_sample=segment_len,
        )
        cfg = OmegaConf.structured(shape)
        decoder = cls(cfg, vocab, padding_idx=None)
        state = {_own_name(name): value for name, value in params.items()}
        for name in ("content_bias", "position_bias"):
            state[name] = state[name].flatten()
        try:
            decoder.to(next(iter(state.values())).dtype).load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the parameters do not fit the configuration: {error}") from None
        return decoder.eval()


_OWN_NAMES = {
    "r_w_bias": "content_bias",
    "r_r_bias": "position_bias",
    "word_emb.emb_layers.0.": "embed_tokens.",
    "crit.out_layers.0.bias": "output_bias",
    "dec_attn.core_value": "self_attn.cores",
    "dec_attn.qkv_net.": "self_attn.qkv.",
    "dec_attn.r_net.": "self_attn.positions.",
    "dec_attn.o_net.": "self_attn.out.",
    "dec_attn.layer_norm.": "self_attn_layer_norm.",
    "pos_ff.CoreNet.0.": "fc1.",
    "pos_ff.CoreNet.3.": "fc2.",
    "pos_ff.layer_norm.": "final_layer_norm.",
}


def _own_name(published: str) -> str:
    name = published.removeprefix("param.")
    for theirs, ours in _OWN_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _encodings(segment_len: int, width: int) -> Tensor:
    """Return the position encodings (L, C), in float64."""
    p = torch.arange(segment_len - 1, -1, -1, dtype=torch.float64)
    f = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = p[:, None] * f
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@register_model("normexp_tensorized_lm", dataclass=TensorizedConfig)
class TensorizedLanguageModel(FairseqLanguageModel):
    """The Tensorized Transformer LM as a model of fairseq's language_modeling task.

    Train and evaluate it with sample_break_mode none: blocks of tokens_per_sample tokens of one
    contiguous stream, as published. No state passes from a block to the next.
    """

    def __init__(self, decoder: TensorizedDecoder, sees_future: bool):
        super().__init__(decoder)
        self.sees_future = sees_future

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "TensorizedLanguageModel":
        """Build the model. Raises ValueError on an impossible configuration."""
        if not args.no_decoder_final_norm:
            raise ValueError("the Tensorized Transformer has no final norm: no_decoder_final_norm")
        dictionary = task.source_dictionary
        decoder = TensorizedDecoder(args, len(dictionary), dictionary.pad(), dictionary)
        return cls(decoder, sees_future=args.attention == "published")
