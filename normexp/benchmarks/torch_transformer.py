"""What a user of torch alone would train: nn.Transformer, compiled, in bfloat16 by autocast."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "nn.Transformer, torch.compile, bfloat16"


class _Translator(nn.Module):
    """nn.Transformer between tied embeddings, with the positions and dropouts of fairseq's."""

    def __init__(self, shape: dict[str, Any], vocabulary: int, padding: int, **dropout: float):
        super().__init__()
        channels = shape["embed_dim"]
        self.embedding = nn.Embedding(vocabulary, channels, padding)
        nn.init.normal_(self.embedding.weight, std=channels**-0.5)
        self.transformer = nn.Transformer(
            channels,
            shape["attention_heads"],
            shape["layers"],
            shape["layers"],
            shape["ffn_embed_dim"],
            dropout["dropout"],
            norm_first=shape["normalize_before"],
            batch_first=True,
        )
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = dropout["attention_dropout"]
            elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = dropout["activation_dropout"]
        self.padding, self.dropout = padding, dropout["dropout"]

    def forward(self, source: Tensor, shifted: Tensor, target: Tensor) -> Tensor:
        """Sum of the label-smoothed losses of target (B, T), in nats."""
        hidden = torch.full((target.shape[1],) * 2, -torch.inf).triu(1)
        of_source, of_target = source == self.padding, shifted == self.padding
        states = self.transformer(
            self._embedded(source),
            self._embedded(shifted),
            tgt_mask=hidden,
            src_key_padding_mask=of_source.float().masked_fill(of_source, -torch.inf),
            tgt_key_padding_mask=of_target.float().masked_fill(of_target, -torch.inf),
            memory_key_padding_mask=of_source.float().masked_fill(of_source, -torch.inf),
            tgt_is_causal=True,
        )
        logits = F.linear(states, self.embedding.weight)
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            target.flatten(),
            ignore_index=self.padding,
            label_smoothing=0.1,
            reduction="sum",
        )

    def _embedded(self, tokens: Tensor) -> Tensor:
        channels = self.embedding.embedding_dim
        rates = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000) / channels))
        angles = torch.arange(tokens.shape[1])[:, None] * rates
        positions = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedded = math.sqrt(channels) * self.embedding(tokens) + positions
        return F.dropout(embedded, self.dropout, self.training)


def compiled_update(
    batch: dict[str, Any], shape: dict[str, Any], vocabulary: int, padding: int, **dropout: float
) -> Callable[[], float]:
    """A call that does one update on a batch of fairseq's and returns its loss in nats per token.

    The first call compiles, for a minute, and raises what torch.compile raises where it cannot.
    """
    torch.manual_seed(1)
    model = _Translator(shape, vocabulary, padding, **dropout)
    optimizer = torch.optim.AdamW(
        model.parameters(), 5e-4, betas=(0.9, 0.98), weight_decay=1e-4, fused=True
    )
    compiled = torch.compile(model)
    inputs, target = batch["net_input"], batch["target"]

    def update() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(inputs["src_tokens"], inputs["prev_output_tokens"], target)
        (loss / batch["ntokens"]).backward()
        optimizer.step()
        return loss.item() / batch["ntokens"]

    return update
