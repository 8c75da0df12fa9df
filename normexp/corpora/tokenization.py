"""Text steps of the recipes, line by line, equal to the Moses scripts since 2018-11-07.

sacremoses 0.2.0 does the work; where it differs from the Perl scripts it is corrected here. This
matters because every published split of IWSLT14 depends on the tokenizer through the length
filter (see data/README.md).
"""

from collections.abc import Callable
from functools import cache

import regex
from sacremoses import MosesPunctNormalizer, MosesTokenizer


class _Tokenizer(MosesTokenizer):
    """sacremoses's tokenizer with tokenizer.perl's rule for the last dot.

    Since 2018-11-07 (mosesdecoder 9fc964da7) the dot of a line's last token is always split off;
    sacremoses keeps it after an abbreviation ("usw.", "U.S.", "20."). On IWSLT14 this alone
    decides between 160,239 and 160,215 training pairs.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language)
        # sacremoses makes these sets anew for every word with a dot, the larger from 10,000
        # characters.
        self._lowercase, self._letters = frozenset(self.IsLower), frozenset(self.IsAlpha)

    def islower(self, text: str) -> bool:
        return self._lowercase.issuperset(text)

    def isanyalpha(self, text: str) -> bool:
        return not self._letters.isdisjoint(text)

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        text = super().handles_nonbreaking_prefixes(text)
        # Runs of dots are placeholders at this point, so "..." is not affected.
        return regex.sub(r"(?<=\S)\.\Z", " .", text)


@cache
def _tokenizer(language: str) -> _Tokenizer:
    return _Tokenizer(language)


@cache
def _normalizer(language: str) -> MosesPunctNormalizer:
    return MosesPunctNormalizer(language, perl_parity=True)


# Perl's \s lacks these four, so tokenizer.perl deletes them as control characters; Python's \s
# has them, so sacremoses would make blanks of them.
_INFORMATION_SEPARATORS = dict.fromkeys(range(0x1C, 0x20))


def _tokenize(line: str, language: str, aggressive: bool) -> str:
    if not line.strip():
        return line
    line = line.translate(_INFORMATION_SEPARATORS)
    return " ".join(_tokenizer(language).tokenize(line, aggressive_dash_splits=aggressive))


def tokenize(line: str, language: str) -> str:
    """tokenizer.perl -l LANGUAGE, with escaping; a blank line stays as it is."""
    return _tokenize(line, language, aggressive=False)


def tokenize_aggressive(line: str, language: str) -> str:
    """tokenizer.perl -a -l LANGUAGE: hyphens inside words become ``@-@`` as well."""
    return _tokenize(line, language, aggressive=True)


def normalize_punctuation(line: str, language: str) -> str:
    """normalize-punctuation.perl -l LANGUAGE."""
    # One of the script's rules wants a character after a closing quote and gets the line end.
    return _normalizer(language).normalize(line + "\n")


def remove_non_printing(line: str, language: str) -> str:
    """remove-non-printing-char.perl: a blank for each character of category C."""
    return regex.sub(r"\p{C}", " ", line)


def lowercase(line: str, language: str) -> str:
    """lowercase.perl: unlike Python, Perl has no final form of sigma."""
    return line.replace("Σ", "σ").lower()


def ascii_apostrophe(line: str, language: str) -> str:
    """A typewriter apostrophe for U+2019, which fairseq's scripts do in evaluation sets only."""
    return line.replace("\u2019", "'")


Step = Callable[[str, str], str]
STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (tokenize, tokenize_aggressive, normalize_punctuation, remove_non_printing,
                 lowercase, ascii_apostrophe)
}  # fmt: skip
