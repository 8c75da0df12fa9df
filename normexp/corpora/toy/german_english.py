"""The German-English lexicon of the toy translation corpus: its words and their forms.

The words stand in german_english.yaml. Here they become entries that know their forms in both
languages, in lists from which they are drawn by Zipf's law.
"""

from pathlib import Path
from typing import NamedTuple

import yaml

from normexp.corpora.toy.english import with_ed, with_s
from normexp.corpora.toy.german import (
    ACCUSATIVE,
    CASES,
    DATIVE,
    FIRST,
    HABEN,
    SECOND,
    SEIN,
    THEY,
    THIRD,
    conjugate_present,
    decline,
)
from normexp.corpora.toy.zipf import Zipf

# Kinds of noun: P(erson), A(nimal), T(hing), F(ood), L = place.
ANIMATE, INANIMATE = "PA", "TFL"
PERSONS = {"first": FIRST, "second": SECOND, "third": THIRD, "they": THEY}
# German forms, English auxiliary or None, English verb that needs do-support (or None)
MODALS = (
    (("kann", "kannst", "kann", "können"), "can", None),
    (("muss", "musst", "muss", "müssen"), "must", "have"),  # `muss nicht`: does not have to
    (("will", "willst", "will", "wollen"), None, "want"),
    (("soll", "sollst", "soll", "sollen"), "should", None),
    (("darf", "darfst", "darf", "dürfen"), "may", None),
)


class Noun(NamedTuple):
    """A noun of the lexicon; `gender` is m, f or n, `kind` a letter as in the verbs' tables."""

    german: str
    gender: str
    german_plural: str
    english: str
    english_plural: str
    kind: str

    def form(self, gender: str, case: int) -> str:
        """German form; `gender` is the noun's own or PLURAL."""
        return decline(self.german, self.german_plural, gender, case)


class Verb(NamedTuple):
    """A verb of the lexicon, with what it governs."""

    particle: str
    infinitive: str  # without the particle
    third: str  # without the particle
    participle: str
    perfect: tuple[str, ...]  # forms of haben or sein
    english: list[str]
    english_past: list[str]
    kinds: str
    preposition: str
    case: int

    def present(self, person: int) -> str:
        """German present without the particle."""
        return conjugate_present(self.infinitive, self.third, person)


class Adjective(NamedTuple):
    """An adjective of the lexicon; `stem` is what endings are added to."""

    german: str
    stem: str
    english: str


class Phrase(NamedTuple):
    """A constituent in both languages.

    `person` inflects a verb it is the subject of; `gender` is that of its noun, or PLURAL; a
    `human` one may have a relative clause. A `light` phrase is a pronoun: German puts it before
    adverbs.
    """

    german: list[str]
    english: list[str]
    person: int = THIRD
    gender: str = ""
    human: bool = False
    light: bool = False


def _split(entries: list[str]) -> list[list[str]]:
    return [entry.split() for entry in entries]


def _phrases(entries: list[str]) -> list[Phrase]:
    return [Phrase(german.split("_"), english.split("_")) for german, english in _split(entries)]


def _nouns(entries: list[str], kind: str) -> list[Noun]:
    return [
        Noun(german, gender, plural, english, irregular[0] if irregular else with_s(english), kind)
        for german, gender, plural, english, *irregular in _split(entries)
    ]


def _verbs(entries: list[str], object_case: int = ACCUSATIVE) -> list[Verb]:
    verbs = []
    for infinitive, third, participle, english, *government in _split(entries):
        particle, _, base = infinitive.rpartition("+")
        base_words, _, past = english.partition("/")
        first, *rest = base_words.split("_")
        kinds, preposition, case = [*government, "", "", ""][:3]
        verbs.append(
            Verb(
                particle,
                base,
                third,
                particle + participle.rstrip("*"),
                SEIN if participle.endswith("*") else HABEN,
                [first, *rest],
                past.split("_") if past else [with_ed(first), *rest],
                kinds,
                preposition,
                CASES.get(case, object_case),
            )
        )
    return verbs


def _adjectives(entries: list[str]) -> list[Adjective]:
    adjectives = []
    for german, english in _split(entries):
        form, _, stem = german.partition("/")
        adjectives.append(Adjective(form, stem or form, english))
    return adjectives


# Not yaml.safe_load: all words are strings, `no` and `on` too.
_WORDS = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader
)
_PERSONS = _nouns(_WORDS["nouns"]["persons"], "P")

# The second argument grows with the list, so that its last items still occur often enough.
NOUNS = {
    "P": Zipf(_PERSONS, 5),
    "A": Zipf(_nouns(_WORDS["nouns"]["animals"], "A"), 5),
    "T": Zipf(_nouns(_WORDS["nouns"]["things"], "T"), 8),
    "F": Zipf(_nouns(_WORDS["nouns"]["foods"], "F"), 5),
    "L": Zipf(_nouns(_WORDS["nouns"]["places"], "L"), 5),
    # owners, in the genitive
    "O": Zipf([noun for noun in _PERSONS if noun.gender != "f"], 5),
}
MODIFIERS = Zipf(_split(_WORDS["modifiers"]), 5)
NAMES = Zipf([Phrase([name], [name]) for name in _WORDS["names"]], 5)
CITIES = Zipf(_phrases(_WORDS["cities"]), 4)
ANIMATE_ADJECTIVES = Zipf(_adjectives(_WORDS["adjectives"]["animate"]), 6)
INANIMATE_ADJECTIVES = Zipf(_adjectives(_WORDS["adjectives"]["inanimate"]), 6)
VERBS = {
    "transitive": Zipf(_verbs(_WORDS["verbs"]["transitive"]), 5),
    "intransitive": Zipf(_verbs(_WORDS["verbs"]["intransitive"]), 5),
    "motion": Zipf(_verbs(_WORDS["verbs"]["motion"]), 4),
    "ditransitive": Zipf(_verbs(_WORDS["verbs"]["ditransitive"]), 4),
    "dative": Zipf(_verbs(_WORDS["verbs"]["dative"], DATIVE), 4),
    "prepositional": Zipf(_verbs(_WORDS["verbs"]["prepositional"]), 4),
    "clausal": Zipf(_verbs(_WORDS["verbs"]["clausal"]), 3),
}
(COPULA,) = _verbs(_WORDS["verbs"]["copula"])
_PAST_TIMES = _phrases(_WORDS["times"]["any"] + _WORDS["times"]["past"])
_FUTURE_TIMES = _phrases(_WORDS["times"]["any"] + _WORDS["times"]["future"])
TIMES = {
    "present": Zipf(_phrases(_WORDS["times"]["any"]), 4),
    "perfect": Zipf(_PAST_TIMES, 4),
    "modal": Zipf(_FUTURE_TIMES, 4),
    "future": Zipf(_FUTURE_TIMES, 4),
}
FREQUENCIES = Zipf(_phrases(_WORDS["frequencies"]), 3)
MANNERS = Zipf(_phrases(_WORDS["manners"]), 4)
SUBORDINATORS = Zipf(_phrases(_WORDS["subordinators"]), 3)
COORDINATORS = Zipf(_phrases(_WORDS["coordinators"]), 1)
QUESTION_WORDS = Zipf(_split(_WORDS["question_words"]), 2)
PLACE_PREPOSITIONS = Zipf(_split(_WORDS["place_prepositions"]), 1)
COMPANION_PREPOSITIONS = Zipf(_split(_WORDS["companion_prepositions"]), 1)
SUBJECT_PRONOUNS = Zipf(
    [
        Phrase([german], [english], PERSONS[person], light=True)
        for german, english, person in _split(_WORDS["subject_pronouns"])
    ],
    3,
)
OBJECT_PRONOUNS = {
    CASES[case]: Zipf([phrase._replace(light=True) for phrase in _phrases(entries)], 2)
    for case, entries in _WORDS["object_pronouns"].items()
}
POSSESSIVES = Zipf(_split(_WORDS["possessives"]), 2)
NUMERALS = Zipf(_split(_WORDS["numerals"]), 3)
UNDECLINED = {german for german, _ in NUMERALS.items}
QUANTIFIERS = Zipf(_split(_WORDS["quantifiers"]), 2)
