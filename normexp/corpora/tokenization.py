"""Text steps of the recipes, line by line, equal to the Moses scripts since 2018-11-07.

sacremoses 0.2.0 does the work; where it differs from the Perl scripts it is corrected here. This
matters because every published split of IWSLT14 depends on the tokenizer through the length
filter (see data/README.md).
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

import regex
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from normexp.corpora.chunk_tokenizer import ChunkTokenizer

# What Perl calls IsAlpha, IsAlnum and IsLower are properties of Unicode, in Perl 5.36 those of
# Unicode 14. `regex` follows the newest Unicode, in whose versions 15 to 17 38 marks became letters
# and 6 letters changed their case. Characters that Unicode 14 lacks are what `regex` says.
_LETTERS_SINCE_15 = r"[\u0363-\u036F\u0C04\u0F82\u0F83\u1DD3-\u1DE6\U00011080\U00011081]"
_ALPHA = rf"[\p{{Alphabetic}}--{_LETTERS_SINCE_15}]"
_ALNUM = rf"[[\p{{Alphabetic}}\p{{Nd}}]--{_LETTERS_SINCE_15}]"
_LOWER = r"[[\p{Lowercase}\u0295]--[\u10FC\uA7F2-\uA7F4\uAB69]]"


def _pattern(pattern: str) -> regex.Pattern:
    return regex.compile(pattern, regex.VERSION1)  # the syntax that has [a--b]


def _rules(*rules: tuple[str, str]) -> list[tuple[regex.Pattern, str]]:
    return [(_pattern(pattern), replacement) for pattern, replacement in rules]


_ENGLISH_APOSTROPHES = _rules(
    (rf"([^{_ALPHA}])'([^{_ALPHA}])", r"\1 ' \2"),
    (rf"([^{_ALPHA}\p{{N}}])'({_ALPHA})", r"\1 ' \2"),
    (rf"({_ALPHA})'([^{_ALPHA}])", r"\1 ' \2"),
    (rf"({_ALPHA})'({_ALPHA})", r"\1 '\2"),
    (r"(\p{N})'(s)", r"\1 '\2"),
)
_SOMALI_APOSTROPHES = _rules(
    (rf"([^{_ALPHA}])'([^{_ALPHA}])", r"\1 ' \2"),
    (rf"([^{_ALPHA}])'({_ALPHA})", r"\1 ' \2"),
    (rf"({_ALPHA})'([^{_ALPHA}])", r"\1 ' \2"),
)
_ROMANCE_APOSTROPHES = [*_SOMALI_APOSTROPHES, *_rules((rf"({_ALPHA})'({_ALPHA})", r"\1' \2"))]
# In other languages every apostrophe is a word.
_APOSTROPHES = {"en": _ENGLISH_APOSTROPHES, "so": _SOMALI_APOSTROPHES} | dict.fromkeys(
    ("fr", "it", "ga", "ca"), _ROMANCE_APOSTROPHES
)


class _EarlierTokenizer(MosesTokenizer):
    """sacremoses's tokenizer with the character classes of tokenizer.perl before 2018-11-07.

    sacremoses has lists of characters for the classes. They lack 150,000 letters, Chinese and
    Korean among them, and have marks that are none, so it would split "中文" and join "नमस्ते".
    """

    COMMA_SEPARATE_1, COMMA_SEPARATE_2, COMMA_SEPARATE_3 = _rules(
        (r"(\P{N}),", r"\1 , "),
        (r",(\P{N})", r" , \1"),
        (r"(\p{N}),$", r"\1 , "),
    )
    _LOWERCASE = _pattern(f"{_LOWER}+")
    _LETTER = _pattern(_ALPHA)

    def __init__(self, language: str) -> None:
        super().__init__(language)
        # On the object, since there sacremoses puts lists for Chinese, Japanese and Korean.
        self.PAD_NOT_ISALNUM, self.AGGRESSIVE_HYPHEN_SPLIT = _rules(
            (rf"([^{_ALNUM}\s.'`,\-])", r" \1 "),
            (rf"(?<={_ALNUM})-(?={_ALNUM})", " @-@ "),
        )
        if language in ("fi", "sv"):
            # A colon before an ending stays: "EU:n", "USA:s".
            (self.PAD_NOT_ISALNUM,) = _rules(
                (rf"(:(?![\p{{Ll}}\u0295])|[^{_ALNUM}\s.:'`,\-])", r" \1 ")
            )
        if language in _APOSTROPHES:
            # sacremoses has a list of rules for "en" and one for "fr": one place is enough.
            self.lang, self.FR_IT_SPECIFIC_APOSTROPHE = "fr", _APOSTROPHES[language]

    def islower(self, text: str) -> bool:
        return self._LOWERCASE.fullmatch(text) is not None

    def isanyalpha(self, text: str) -> bool:
        return self._LETTER.search(text) is not None


class _Tokenizer(_EarlierTokenizer):
    """tokenizer.perl since 2018-11-07 (mosesdecoder 9fc964da7).

    The dot of a line's last token is always split off; it stayed after an abbreviation ("usw.",
    "U.S.", "20."). On IWSLT14 this alone decides between 160,239 and 160,215 training pairs.
    """

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        text = super().handles_nonbreaking_prefixes(text)
        # Runs of dots are placeholders at this point, so "..." is not affected.
        return regex.sub(r"(?<=\S)\.\Z", " .", text)


class _Detokenizer(MosesDetokenizer):
    """sacremoses's detokenizer with the character classes and the Czech of detokenizer.perl.

    It still joins neighbouring words in Tangut and in historic kana, which the script does not.
    """

    IS_CURRENCY_SYMBOL = _pattern(r"^[\p{Sc}(\[{¿¡]+$")
    IS_ENGLISH_CONTRACTION = _pattern(rf"^'{_ALPHA}")
    IS_FRENCH_CONRTACTION = _pattern(rf"{_ALPHA}'$")
    STARTS_WITH_ALPHA = _pattern(rf"^{_ALPHA}")

    # sacremoses looks for the neighbours of a Czech number or dash at the wrong places, and fails
    # in a rule for dashes that Moses does not have. What Moses joins is joined before instead.
    _CZECH = _rules(
        (r"(?<![^ ])([0-9]+) ([.,])(?: (?=[0-9]+(?: |$))|(?=$))", r"\1\2"),
        (rf"(?<={_ALPHA}) ([-–]) (?=(?i:li|mail\S*) \S)", r"\1"),
    )

    def __init__(self, language: str) -> None:
        super().__init__(language)
        if language == "cs":
            self.IS_FRENCH_CONRTACTION = _pattern(r"(?!)")

    def detokenize_line(self, line: str) -> str:
        line = line.strip(" ")
        if self.lang == "cs":
            for pattern, replacement in self._CZECH:
                line = pattern.sub(replacement, line)
        return self.detokenize(line.split(" "))


@cache
def _tokenizer(language: str) -> _Tokenizer:
    return _Tokenizer(language)


@cache
def _earlier_tokenizer(language: str) -> _EarlierTokenizer:
    return _EarlierTokenizer(language)


@cache
def _detokenizer(language: str) -> _Detokenizer:
    return _Detokenizer(language)


# What a line must contain for a rule of normalize-punctuation.perl to change it; for the rules
# that are not here, the text that they replace.
_REQUIRED = {
    r"\r": "\r",
    r" +": "  ",
    r"\) ([.!:?;,])": ") ",
    r"(\d) %": " %",
    "([a-zA-Z])‘([a-zA-Z])": "‘",
    "([a-zA-Z])’([a-zA-Z])": "’",
    r'"([,.]+)': '"',
    r'(\.+)"(\s*[^<])': '."',
    "(\\d)\u00a0(\\d)": "\u00a0",
}


class _Normalizer(MosesPunctNormalizer):
    """normalize-punctuation.perl, each rule only where it changes something.

    required: of each rule, a text without which the rule changes nothing.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language, perl_parity=True)
        # The scripts read bytes, so that their digits and blanks are those of ASCII.
        for name in ("substitutions", "REPLACE_UNICODE_PUNCTUATION"):
            rules = [(re.compile(pattern, re.ASCII), by) for pattern, by in getattr(self, name)]
            setattr(self, name, rules)
        self.required = [
            _REQUIRED.get(rule.pattern) or re.sub(r"\\(\W)", r"\1", rule.pattern)
            for rule, _ in self.substitutions
        ]
        self._rules = [
            (text, rule.sub, by)
            for text, (rule, by) in zip(self.required, self.substitutions, strict=True)
        ]

    def normalize(self, text: str) -> str:
        for required, substitute, by in self._rules:
            if required in text:
                text = substitute(by, text)
        return text.strip()


@cache
def _normalizer(language: str) -> _Normalizer:
    return _Normalizer(language)


@cache
def _chunk_tokenizer(step: str, language: str) -> ChunkTokenizer:
    # In Finnish and Swedish a colon can be inside a word.
    kept = ":" if language in ("fi", "sv") else ""
    return ChunkTokenizer(
        lambda line: STEPS[step](line, language), _tokenizer(language).islower, kept
    )


# Perl's \s lacks these four, so tokenizer.perl deletes them as control characters; Python's \s
# has them, so sacremoses would make blanks of them.
_INFORMATION_SEPARATORS = dict.fromkeys(range(0x1C, 0x20))


def _tokenize(line: str, tokenizer: MosesTokenizer, aggressive: bool = False) -> str:
    line = line.translate(_INFORMATION_SEPARATORS)
    if not line.strip():
        return line
    return tokenizer.tokenize(line, aggressive, return_str=True)


def tokenize(line: str, language: str) -> str:
    """tokenizer.perl -l LANGUAGE, with escaping; a blank line stays as it is.

    As the script does it, byte for byte: an English line that ends in ``.'`` gets a blank behind it
    and, if there was one before the dot, another there.
    """
    return _tokenize(line, _tokenizer(language))


def tokenize_aggressive(line: str, language: str) -> str:
    """tokenizer.perl -a -l LANGUAGE: hyphens inside words become ``@-@`` as well."""
    return _tokenize(line, _tokenizer(language), aggressive=True)


def tokenize_before_2018_11(line: str, language: str) -> str:
    """tokenizer.perl -l LANGUAGE before the rule of the last dot; for scores, not a step."""
    return _tokenize(line, _earlier_tokenizer(language))


def detokenize(line: str, language: str) -> str:
    """detokenizer.perl -l LANGUAGE, with escapes and the hyphens of -a undone; not a step."""
    return _detokenizer(language).detokenize_line(line)


def normalize_punctuation(line: str, language: str) -> str:
    """normalize-punctuation.perl -l LANGUAGE."""
    # One of the script's rules wants a character after a closing quote and gets the line end.
    return _normalizer(language).normalize(line + "\n")


def replace_unicode_punctuation(line: str, language: str) -> str:
    """replace-unicode-punctuation.perl; not a step."""
    return _normalizer(language).replace_unicode_punct(line)


def remove_non_printing(line: str, language: str) -> str:
    """remove-non-printing-char.perl: a blank for each character of category C."""
    if line.isprintable():
        return line
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
TOKENIZERS = ("tokenize", "tokenize_aggressive")


def apply_step(step: str, lines: Sequence[str], language: str) -> list[str]:
    """``STEPS[step]`` of every line, none of which has a line end in it; fast for many lines."""
    if step in TOKENIZERS:
        return _chunk_tokenizer(step, language)(lines)
    return [STEPS[step](line, language) for line in lines]
