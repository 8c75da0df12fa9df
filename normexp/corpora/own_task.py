"""The configuration of a task on an own corpus: model and training by the corpus's size.

The sizes follow the project's own tasks: toy corpora, Multi30k and PTB on a CPU, IWSLT14 on a GPU.
"""

import math
from dataclasses import dataclass
from string import Template

from normexp.corpora.catalogue import Corpus
from normexp.corpora.own_corpora import pinned
from normexp.corpora.prepared import PreparedCorpus

MOST_EPOCHS = 100
PADDING = 1.2  # a batch of sentences has so many times fewer real tokens than its limit


@dataclass(frozen=True)
class Size:
    """A model and its training for corpora of up to `limit` pairs, or tokens of a language model.

    merges: of BPE, where the user says nothing. updates: about so many are trained.
    """

    limit: float
    model: str
    merges: int
    max_tokens: int
    updates: int
    lr: float
    patience: int = -1
    tokens_per_sample: int = 64


TRANSLATION = (
    Size(5_000, "translation_tiny", 1_000, 1_200, 1_000, 0.004),
    Size(100_000, "translation_small_cpu", 4_000, 2_048, 2_500, 0.003),
    Size(1_000_000, "iwslt_small", 10_000, 4_096, 50_000, 0.0015, patience=5),
    Size(math.inf, "iwslt_small", 32_000, 4_096, 100_000, 0.0015, patience=5),
)
LANGUAGE_MODEL = (
    Size(200_000, "lm_tiny", 500, 1_024, 1_000, 0.004),
    Size(5_000_000, "lm_ptb_cpu", 4_000, 1_024, 3_000, 0.002),
    Size(math.inf, "lm_ptb", 10_000, 4_096, 50_000, 0.0005, patience=5, tokens_per_sample=128),
)


def size_for(parallel: bool, amount: int) -> Size:
    """The size for so many sentence pairs, or words of a language model's text."""
    return next(size for size in (TRANSLATION if parallel else LANGUAGE_MODEL)
                if amount <= size.limit)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How long a corpus is trained on. updates: about so many in all."""

    epochs: int
    updates: int
    warmup: int
    max_tokens: int


def schedule(prepared: PreparedCorpus, size: Size) -> Schedule:
    """Epochs and warm-up for about size.updates updates, in batches that hold every sentence."""
    record = prepared.manifest["splits"]
    tokens = max(record["train"]["tokens"].values())
    max_tokens = size.max_tokens
    if prepared.kind == "translation":
        longest = max(max(record[split]["longest"].values()) for split in ("train", "valid"))
        max_tokens = max(max_tokens, longest)
        tokens *= PADDING
    per_epoch = max(1, round(tokens / max_tokens))
    epochs = min(MOST_EPOCHS, math.ceil(size.updates / per_epoch))
    updates = epochs * per_epoch
    return Schedule(epochs, updates, max(1, min(4000, updates // 6)), max_tokens)


_TRANSLATION = Template("""\
# @package _global_
# Written by scripts/add_corpus.py for $amount; change it as you like.
defaults:
  - override /model: $model

task:
  name: $name
  kind: translation
  corpus: $corpus   # which version of the text; `add_corpus.py --replace` changes it
  budget: own corpus, $amount    # there is no setting of the paper for it
  norm_warmup_steps: $warmup
  attention_heads: $${fairseq.model.encoder.attention_heads}

evaluation:
  average_last: $average

fairseq:
$dictionaries  task:
    _name: translation
  criterion:
    _name: normexp_label_smoothed_cross_entropy
    label_smoothing: 0.1
  optimization:
    lr: [$lr]
    max_epoch: $epochs               # about $updates updates
    clip_norm: 1.0
  optimizer:
    weight_decay: 0.0001
  lr_scheduler:
    warmup_updates: $warmup
    warmup_init_lr: 1.0e-7
  dataset:
    max_tokens: $max_tokens
  checkpoint:
    patience: $patience
""")

_SEPARATE = """\
  model:                         # a dictionary for each language
    share_all_embeddings: false
    share_decoder_input_output_embed: true
"""

_LANGUAGE_MODEL = Template("""\
# @package _global_
# Written by scripts/add_corpus.py for $amount; change it as you like.
defaults:
  - override /model: $model

task:
  name: $name
  kind: language_model
  corpus: $corpus   # which version of the text; `add_corpus.py --replace` changes it
  budget: own corpus, $amount    # there is no setting of the paper for it
  norm_warmup_steps: $warmup
  attention_heads: $${oc.select:fairseq.model.decoder_attention_heads,1}

evaluation:
  checkpoint: best

fairseq:
  task:
    _name: language_modeling
    tokens_per_sample: $tokens_per_sample
    sample_break_mode: none
  criterion:
    _name: normexp_cross_entropy
  optimization:
    lr: [$lr]
    max_epoch: $epochs               # about $updates updates
    clip_norm: 0.5
  lr_scheduler:
    warmup_updates: $warmup
    warmup_init_lr: 1.0e-7
  dataset:
    max_tokens: $max_tokens
  checkpoint:
    patience: $patience
""")


def task_config(corpus: Corpus, prepared: PreparedCorpus, size: Size) -> str:
    """The text of configs/task/<name>.yaml for an own corpus."""
    plan = schedule(prepared, size)
    parallel = corpus.is_parallel
    return (_TRANSLATION if parallel else _LANGUAGE_MODEL).substitute(
        name=corpus.name,
        corpus=pinned(corpus),
        amount=amount(prepared),
        model=size.model,
        warmup=plan.warmup,
        average=min(5, max(1, plan.epochs // 3)),
        dictionaries="" if corpus.joined_dictionary else _SEPARATE,
        lr=size.lr,
        epochs=plan.epochs,
        updates=plan.updates,
        max_tokens=plan.max_tokens,
        patience=size.patience,
        tokens_per_sample=size.tokens_per_sample,
    )


def amount(prepared: PreparedCorpus) -> str:
    """How large the train text is, in words."""
    if prepared.kind == "translation":
        return f"{prepared.sentences('train'):,} sentence pairs"
    return f"{prepared.tokens('train'):,} tokens"
