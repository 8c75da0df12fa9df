"""Corpora: from a name in data/catalogue.yaml to data that fairseq trains on."""

from normexp.corpora.preparation import available_corpora, prepare
from normexp.corpora.prepared import PreparedCorpus

__all__ = ["PreparedCorpus", "available_corpora", "prepare"]
