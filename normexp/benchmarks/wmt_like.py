"""Made-up English-German text that costs a preparation as much work as WMT14's does.

It has no meaning. It shares with the real text what decides time and memory: lengths of sentences
and words, a vocabulary whose rare words keep coming, punctuation for the tokenizer's rules, and a
few pairs that the length filter drops.
"""

from collections.abc import Iterator
from random import Random

from normexp.corpora.toy.zipf import Zipf

# Distinct words to draw from; most of them turn up in a million sentences.
VOCABULARY = {"en": 300_000, "de": 800_000}
_SYLLABLES = [
    onset + vowel + coda
    for vowel in "aeiou"
    for onset in ("b", "d", "f", "g", "h", "k", "l", "m", "n", "r", "s", "st", "t", "v", "w", "z")
    for coda in ("", "n", "r")
]
_UMLAUTS = str.maketrans("aou", "äöü")
_ENDS = Zipf([".", "?", "!", ":", " usw.", ".\u201d"])


def word(rank: int, language: str) -> str:
    """The word of a rank (from 0); rarer words are longer, and no two ranks share one."""
    syllables = []
    number = rank
    while number >= 0:
        number, digit = divmod(number, len(_SYLLABLES))
        # Multiplied by a number without common factor, so that neighbours in rank look different.
        syllables.append(_SYLLABLES[digit * 77 % len(_SYLLABLES)])
        number -= 1
    text = "".join(syllables)
    if language == "de" and rank % 3 == 0:
        text = text.capitalize()
    if language == "de" and rank % 7 == 0:
        text = text.translate(_UMLAUTS)
    return text


def pairs(seed: int, number: int) -> Iterator[tuple[str, str]]:
    """Pairs (English, German), without line ends; the same for the same arguments."""
    rng = Random(seed)
    words = {language: Zipf(range(size), offset=2.7) for language, size in VOCABULARY.items()}
    for _ in range(number):
        # As in Europarl and news: 25 words on average, one sentence in a hundred above 80.
        length = max(1, int(rng.lognormvariate(3.05, 0.6)))
        ratio = rng.uniform(0.75, 1.2) if rng.random() > 0.01 else rng.uniform(0, 20)
        yield (
            _sentence(rng, words["en"], "en", length),
            _sentence(rng, words["de"], "de", int(length * ratio)),
        )


def _sentence(rng: Random, words: Zipf[int], language: str, length: int) -> str:
    if length == 0:
        return ""
    texts = [_decorated(rng, word(words.draw(rng), language)) for _ in range(length)]
    texts[0] = texts[0][0].upper() + texts[0][1:]
    return " ".join(texts) + _ENDS.draw(rng)


def _decorated(rng: Random, text: str) -> str:
    """The word, sometimes changed into something that the tokenizer has a rule for."""
    point = rng.random()
    if point > 0.15:
        return text
    if point > 0.09:
        return f"{text},"
    if point > 0.07:
        return f"{rng.randrange(10_000):,}"
    if point > 0.05:
        return f"{text}-{text}" if point > 0.06 else f"{text.capitalize()}\u2019s"
    if point > 0.03:
        return f"\u201e{text}\u201c" if point > 0.04 else f"({text})"
    if point > 0.01:
        return "Dr." if point > 0.02 else f"{text} \u2013"
    return "&" if point > 0.002 else f"{text[:2]}\u00ad{text[2:]}"
