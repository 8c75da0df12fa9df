"""Translations as files, and their BLEU without the model that made them."""

from pathlib import Path
from typing import Any

import torch

from normexp.corpora import PreparedCorpus
from normexp.corpora.tokenization import tokenize
from normexp.errors import UserError
from normexp.evaluation import bleu
from normexp.files import whole_file

TOKENISED = "{split}.tokenised.txt"
DETOKENISED = "{split}.txt"


def plain_text(corpus: PreparedCorpus, hypotheses: list[str]) -> list[str]:
    """Return hypotheses in the form of the raw references: detokenised if tokenized here."""
    if corpus.text == "moses":
        return bleu.detokenise(hypotheses, corpus.target_language)
    return hypotheses


def write(folder: Path, split: str, tokenised: list[str], detokenised: list[str]) -> None:
    """Write <split>.tokenised.txt and <split>.txt, one sentence per line, in the corpus's order."""
    for name, lines in ((TOKENISED, tokenised), (DETOKENISED, detokenised)):
        with whole_file(folder / name.format(split=split)) as file:
            file.writelines(line + "\n" for line in lines)


def bleu_of(
    corpus: PreparedCorpus,
    tokenised: list[str],
    references: list[str],
    detokenised: list[str],
    raw: list[str],
    compound_split: bool,
) -> dict[str, float | str]:
    """Return BLEU in every convention: tokenised text by `references`, plain text by `raw`.

    A corpus that came tokenized has its own tokens as plain text, which sacreBLEU leaves as they
    are, and one of plain text is tokenised here.
    """
    language = corpus.target_language
    sacre, signature = bleu.sacre_bleu(
        detokenised, raw, corpus.lowercase, language, tokenized=corpus.text == "tokenized"
    )
    if corpus.text == "plain":
        tokenised, references = (
            [tokenize(line, language) for line in lines] for lines in (detokenised, raw)
        )
    metrics: dict[str, float | str] = {
        "bleu_tokenised": bleu.tokenised_bleu(tokenised, references),
        "sacrebleu": sacre,
        "sacrebleu_signature": signature,
    }
    if compound_split:
        text = detokenised, raw, language
        metrics |= {
            "bleu_compound_split": bleu.compound_split_bleu(*text),
            "bleu_compound_split_published": bleu.published_compound_split_bleu(*text),
        }
    return metrics


def rescore(
    corpus: PreparedCorpus, folder: Path, split: str, compound_split: bool
) -> dict[str, float | str]:
    """Return `bleu_of` the translations in a folder, written by `write`.

    Raises UserError where they are missing or not those of the corpus.
    """
    from fairseq.data import Dictionary, data_utils

    tokenised, detokenised = (
        _lines(folder / name.format(split=split)) for name in (TOKENISED, DETOKENISED)
    )
    source, target = corpus.source_language, corpus.target_language
    data_bin = corpus.data_bin_of(split)
    dictionary = Dictionary.load(str(data_bin / f"dict.{target}.txt"))
    path = data_bin / f"{split}.{source}-{target}.{target}"
    dataset = data_utils.load_indexed_dataset(str(path), dictionary)
    if not len(tokenised) == len(detokenised) == len(dataset):
        raise UserError(
            f"{folder}: {len(tokenised)} and {len(detokenised)} translations of {split}, which has "
            f"{len(dataset)} sentences"
        )
    references = [to_text(dictionary, line, corpus.bpe, reference=True) for line in dataset]
    raw = raw_references(corpus, split, len(detokenised))
    return bleu_of(corpus, tokenised, references, detokenised, raw, compound_split)


def to_text(dictionary: Any, tokens: torch.Tensor, bpe: str | None, reference: bool = False) -> str:
    """Return tokenised text without BPE; in a reference, unknown words never match."""
    return dictionary.string(tokens.int(), bpe, escape_unk=reference)


def raw_references(corpus: PreparedCorpus, split: str, sentences: int) -> list[str]:
    """Return the untokenised references of a split. Raises UserError if there are not as many."""
    raw = _lines(corpus.raw_reference(split))
    if len(raw) != sentences:
        raise UserError(
            f"{corpus.raw_reference(split)} has {len(raw)} lines for {sentences} sentences; remove "
            f"{corpus.data_bin.parent} to prepare the corpus again"
        )
    return raw


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode()  # no universal newlines: a line may hold a CR
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    return text.removesuffix("\n").split("\n")
