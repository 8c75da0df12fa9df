"""BLEU in the conventions of the field; the name of each function says which.

`tokenised_bleu` scores tokenised text as fairseq and multi-bleu do, `compound_split_bleu` splits
compounds, which papers on WMT14 English-German do, `published_compound_split_bleu` is the whole
convention of their scripts, `sacre_bleu` scores plain text and says how.
"""

import re

from sacrebleu.metrics import BLEU

from normexp.corpora.tokenization import (
    detokenize,
    replace_unicode_punctuation,
    tokenize,
    tokenize_before_2018_11,
)


def tokenised_bleu(hypotheses: list[str], references: list[str]) -> float:
    """Return fairseq's BLEU of tokenised text: multi-bleu's, but an empty line counts as a word.

    Words are split at blanks; case counts; no smoothing; one reference.
    """
    from fairseq.data import Dictionary
    from fairseq.scoring.bleu import BleuConfig, Scorer

    dictionary = Dictionary()
    scorer = Scorer(BleuConfig(pad=dictionary.pad(), eos=dictionary.eos(), unk=dictionary.unk()))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        scorer.add(
            dictionary.encode_line(reference, add_if_not_exist=True),
            dictionary.encode_line(hypothesis, add_if_not_exist=True),
        )
    return scorer.score()


def compound_split_bleu(hypotheses: list[str], references: list[str], language: str) -> float:
    """Return `tokenised_bleu` of plain text, tokenised here, with compounds split.

    hypotheses and references are plain text. It has to be tokenised anew because fairseq's WMT
    recipes tokenise with -a, which makes " @-@ " of the hyphens that the split looks for: splitting
    that text instead would give "@ ##AT##-##AT## @" and another score.
    """
    return tokenised_bleu(
        *(
            [split_compounds(tokenize(line, language)) for line in lines]
            for lines in (hypotheses, references)
        )
    )


def published_compound_split_bleu(
    hypotheses: list[str], references: list[str], language: str
) -> float:
    """Return BLEU of plain text by the scripts with which WMT14 English-German was published.

    tensor2tensor's get_ende_bleu.sh with the reference that belongs to it (tensor2tensor issue
    317): Unicode punctuation becomes ASCII's, German opening quotes included; tokenizer.perl of
    before 2018-11, which keeps the last dot after abbreviations; compounds split; multi-bleu.perl.
    `compound_split_bleu` differs in all but the split: a model that was trained on normalised text
    cannot write the quotes of the reference, which costs it more than a point.
    """
    prepared = [
        [split_compounds(_as_published(line, language)) for line in lines]
        for lines in (hypotheses, references)
    ]
    return multi_bleu(*prepared)


def _as_published(line: str, language: str) -> str:
    line = replace_unicode_punctuation(line, language).replace("„", '"')
    return tokenize_before_2018_11(line, language)


def multi_bleu(hypotheses: list[str], references: list[str]) -> float:
    """Return multi-bleu.perl's BLEU of tokenised text: no smoothing, an empty line has no words."""
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return metric.corpus_score(hypotheses, [references]).score


def split_compounds(line: str) -> str:
    """Make every hyphen between two characters that are no blanks a word of its own.

    Left to right without overlap, neighbours included, as in the scripts of tensor2tensor and
    fairseq: of "a-b-c" only the first hyphen is split.
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line)


def sacre_bleu(
    hypotheses: list[str],
    references: list[str],
    lowercase: bool,
    language: str = "",
    tokenized: bool = False,
) -> tuple[float, str]:
    """Return sacreBLEU and its signature, which names the tokenizer.

    Of plain text by sacreBLEU's tokenizer for the language (characters where that one is not
    installed), of tokenized text by its blanks.
    """
    tokenizer = "none" if tokenized else _sacre_tokenizer(language)
    metric = BLEU(lowercase=lowercase, tokenize=tokenizer, force=tokenized)
    value = metric.corpus_score(hypotheses, [references]).score
    return value, metric.get_signature().format()


def _sacre_tokenizer(language: str) -> str:
    """sacreBLEU's own choice for a language; characters where its package is not installed."""
    name = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(language, "13a")
    try:
        BLEU(tokenize=name)
    except RuntimeError:
        return "char"
    return name


def detokenise(lines: list[str], language: str) -> list[str]:
    """Undo Moses tokenization, escapes and the hyphens of -a included."""
    return [detokenize(line, language) for line in lines]
