"""normexp: the reproduction of "PowerNorm: Rethinking Batch Normalization in Transformers"."""

__version__ = "0.1.0"
