"""German inflection as far as the toy translation corpus needs it."""

import re

NOMINATIVE, ACCUSATIVE, DATIVE, GENITIVE = range(4)
CASES = {"accusative": ACCUSATIVE, "dative": DATIVE}
PLURAL = "p"  # takes the place of a gender: German tells genders apart in the singular only
# Persons of the verb; the third index covers er, sie, es and every singular noun.
FIRST, SECOND, THIRD, THEY = range(4)

# One row per gender or plural, one form per case. The genitive of feminines and plurals is not
# generated: `der Frau` would be "of the woman" or "to the woman".
DEFINITE = {
    "m": ("der", "den", "dem", "des"),
    "f": ("die", "die", "der"),
    "n": ("das", "das", "dem", "des"),
    "p": ("die", "die", "den"),
}
# dies-, jed-
DETERMINER_ENDINGS = {
    "m": ("er", "en", "em", "es"),
    "f": ("e", "e", "er"),
    "n": ("es", "es", "em", "es"),
    "p": ("e", "e", "en"),
}
# ein, kein, mein, ...
EIN_ENDINGS = {
    "m": ("", "en", "em", "es"),
    "f": ("e", "e", "er"),
    "n": ("", "", "em", "es"),
    "p": ("e", "e", "en"),
}
ADJECTIVE_ENDINGS = {
    "weak": {
        "m": ("e", "en", "en", "en"),
        "f": ("e", "e", "en"),
        "n": ("e", "e", "en", "en"),
        "p": ("en", "en", "en"),
    },
    "mixed": {
        "m": ("er", "en", "en", "en"),
        "f": ("e", "e", "en"),
        "n": ("es", "es", "en", "en"),
        "p": ("en", "en", "en"),
    },
    "strong": {"p": ("e", "e", "en")},
}
CONTRACTIONS = {
    ("in", "dem"): "im", ("in", "das"): "ins", ("zu", "dem"): "zum", ("zu", "der"): "zur",
    ("von", "dem"): "vom", ("bei", "dem"): "beim",
}  # fmt: skip

# One form per person.
HABEN = ("habe", "hast", "hat", "haben")
SEIN = ("bin", "bist", "ist", "sind")
SEIN_PAST = ("war", "warst", "war", "waren")
WERDEN = ("werde", "wirst", "wird", "werden")


def decline(singular: str, plural: str, gender: str, case: int) -> str:
    """Form of a noun in a case; `gender` is the noun's own or PLURAL."""
    if gender == PLURAL:
        adds_n = case == DATIVE and not plural.endswith(("n", "s"))
        return plural + ("n" if adds_n else "")
    if case == GENITIVE and gender != "f":
        syllables = len(re.findall("[aeiouyäöü]+", singular.lower()))
        return singular + ("es" if syllables == 1 or singular.endswith("s") else "s")
    return singular


def conjugate_present(infinitive: str, third: str, person: int) -> str:
    """Present tense of a verb without its particle; `third` is its third person singular."""
    regular = third.endswith("t")  # otherwise like `weiß`
    if person == THEY:
        return infinitive
    if person == THIRD or (person == FIRST and not regular):
        return third
    if person == FIRST:
        stem = infinitive.removesuffix("n")
        if stem.endswith("el"):
            return stem.removesuffix("el") + "le"
        return stem if stem.endswith("e") else stem + "e"
    stem = third.removesuffix("t")
    return stem + ("t" if stem.endswith(("s", "ß", "z")) else "st")


def after_preposition(preposition: str, words: list[str]) -> list[str]:
    """The preposition and a noun phrase, contracted where German contracts: im, zur, ..."""
    first, *rest = words
    contraction = CONTRACTIONS.get((preposition, first))
    return [contraction, *rest] if contraction else [preposition, *words]
