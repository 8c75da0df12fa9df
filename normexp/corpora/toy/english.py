"""English inflection as far as the toy corpora need it."""

import re

_VOWELS = "aeiou"
# Forms with I, you, he, they.
BE = ("am", "are", "is", "are")
BE_PAST = ("was", "were", "was", "were")
DO = ("do", "do", "does", "do")


def with_s(word: str) -> str:
    """Regular plural of a noun, or third person singular of a verb."""
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) or word == "go" else "s")


def with_ed(verb: str) -> str:
    """Regular past; a verb that doubles its last consonant is not regular here."""
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def with_article_an(text: str) -> str:
    """The text with "a" turned into "an" before a vowel letter.

    Goes by spelling: a lexicon with "hour" or "university" would be treated wrongly.
    """
    return re.sub(rf"\b([Aa]) (?=[{_VOWELS}])", r"\1n ", text)
