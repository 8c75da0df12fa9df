"""The three fields that choose the normalization of a model."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass


@dataclass
class NormConfig(FairseqDataclass):
    """Base of every model's configuration; normexp.sites resolves the fields to layers."""

    norm: str = field(
        default="layer",
        metadata={
            "help": "normalization: at the encoder's sites of a translation model, "
            "at every site of a language model"
        },
    )
    norm_options: str = field(
        default="{}", metadata={"help": "options of that normalization, a JSON object"}
    )
    norm_sites: str = field(
        default="{}",
        metadata={
            "help": "other normalizations at single sites, a JSON object: "
            'site -> NAME or {"name": NAME, option: value}'
        },
    )
