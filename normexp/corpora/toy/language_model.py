"""English-like text made up by a small grammar, for language models that train in a minute.

One sentence a line; 10 to 30 consecutive lines form a document, with nothing between documents.
What a model can learn, from near to far:

* words follow Zipf's law and sentences a small grammar;
* agreement across a distance: of a verb with the head of a long subject ("The nets near the boat
  that hauled the captain were heavy."), of `himself` or `her` with a person named much earlier,
  of `neither` with `nor`, of quotation marks and brackets, which nest, with their partners;
* a latent topic for each document, from which most nouns, verbs, adjectives and places come, so
  that neighbouring lines share vocabulary and batches differ from each other more than random
  sentences would;
* a hero and a friend for each document: no other names occur, `she` or `he` means the hero, and
  the document keeps one tense.

`entropy_bound` says how far learning can go. Per token, the end of a line counted as one, the
perplexity of unigrams is about 180, and that of a reader who knows the grammar at most about 7:
the rest is choice that nobody can foresee.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

import yaml

from normexp.corpora.toy.english import with_article_an, with_ed, with_s
from normexp.corpora.toy.zipf import Zipf

T = TypeVar("T")

MIN_LINES, MAX_LINES = 10, 30  # of a document
MAX_TOKENS = 40  # of a line
TOKEN = re.compile(r"\w+|[^\w\s]")


class Person(NamedTuple):
    """A character; the pronouns go with the gender."""

    name: str
    subject: str
    object: str
    possessive: str
    reflexive: str


class Subject(NamedTuple):
    """A subject and what agrees with it."""

    text: str
    plural: bool = False
    person: Person | None = None


class Vocabulary(NamedTuple):
    """Words of one topic, or of none."""

    nouns: Zipf[tuple[str, str]]  # singular, plural
    verbs: Zipf[tuple[str, str]]  # base, past
    adjectives: Zipf[str]
    places: Zipf[str]


@dataclass
class Document:
    """What all lines of a document share."""

    words: Vocabulary
    jobs: Zipf[str]
    past: bool
    hero: Person
    friend: Person


def _inflected(entries: list[str], regular: Callable[[str], str]) -> list[tuple[str, str]]:
    pairs = [entry.partition("/") for entry in entries]
    return [(base, irregular or regular(base)) for base, _, irregular in pairs]


def _vocabulary(words: dict[str, list[str]]) -> Vocabulary:
    return Vocabulary(
        Zipf(_inflected(words["nouns"], with_s), 3),
        Zipf(_inflected(words["verbs"], with_ed), 2),
        Zipf(words["adjectives"], 2),
        Zipf(words["places"], 1),
    )


# Not yaml.safe_load: all words are strings, `no` and `on` too.
_WORDS = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader
)
_TOPICS = Zipf(
    [(_vocabulary(topic), Zipf(topic["jobs"])) for topic in _WORDS["topics"].values()], 20
)
_GENERAL = _vocabulary(_WORDS["general"])
_WOMEN = Zipf([Person(name, "she", "her", "her", "herself") for name in _WORDS["women"]], 8)
_MEN = Zipf([Person(name, "he", "him", "his", "himself") for name in _WORDS["men"]], 8)
_PREPOSITIONS = Zipf(_WORDS["prepositions"])
_CONJUNCTIONS = Zipf(_WORDS["conjunctions"], 1)
_COORDINATORS = Zipf(_WORDS["coordinators"])
_CORRELATIVES = Zipf([entry.split() for entry in _WORDS["correlatives"]])
_PLURAL_DETERMINERS = Zipf(_WORDS["determiners"]["plural"], 0.5)
_SINGULAR_DETERMINERS = Zipf(_WORDS["determiners"]["singular"], 0.3)
_TIMES = Zipf(_WORDS["times"], 1)
_SUBJECTS = Zipf(["noun", "pronoun", "hero", "friend"], 0.5)
_PREDICATES = Zipf(["transitive", "adjective", "place", "correlative"], 0.5)
_OBJECTS = Zipf(["noun", "own noun", "reflexive"], 0.3)


class _Draws:
    """Random choices, with an account of how much information they hold."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.nats = 0.0  # -log probability of all draws so far

    def chance(self, probability: float) -> bool:
        yes = self.rng.random() < probability
        self.nats -= log(probability if yes else 1 - probability)
        return yes

    def draw(self, choices: Zipf[T]) -> T:
        index = choices.index(self.rng)
        self.nats -= log(choices.probabilities[index])
        return choices.items[index]

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included, all equally likely."""
        self.nats += log(high - low + 1)
        return low + int(self.rng.random() * (high - low + 1))

    def document(self) -> Document:
        words, jobs = self.draw(_TOPICS)
        # Of different gender, so that pronouns tell them apart.
        heroes, friends = (_WOMEN, _MEN) if self.chance(0.5) else (_MEN, _WOMEN)
        return Document(words, jobs, self.chance(0.6), self.draw(heroes), self.draw(friends))


class _Grammar:
    """Draws the lines of one document."""

    def __init__(self, draws: _Draws, document: Document) -> None:
        self.chance, self.draw = draws.chance, draws.draw
        self.draws = draws
        self.document = document

    def words(self) -> Vocabulary:
        return self.document.words if self.chance(0.85) else _GENERAL

    def verb(self, plural: bool) -> str:
        base, past = self.draw(self.words().verbs)
        if self.document.past:
            return past
        return base if plural else with_s(base)

    def be(self, plural: bool) -> str:
        if self.document.past:
            return "were" if plural else "was"
        return "are" if plural else "is"

    def noun_phrase(self, depth: int = 0, brackets: str = "()") -> Subject:
        """Noun phrase with its number; what follows the noun does not change that."""
        plural = self.chance(0.4)
        determiner = self.draw(_PLURAL_DETERMINERS if plural else _SINGULAR_DETERMINERS)
        text = f"{determiner} {self.noun(plural)}"
        if depth == 2:
            return Subject(text, plural)
        if self.chance(0.2):
            text += f" {self.draw(_PREPOSITIONS)} {self.noun_phrase(depth + 1, brackets).text}"
        elif self.chance(0.12):
            text += f" that {self.verb(plural)} {self.noun_phrase(depth + 1, brackets).text}"
        elif self.chance(0.1):
            left, right = brackets
            text += f" {left}not {self.noun_phrase(depth + 1, '[]').text}{right}"
        return Subject(text, plural)

    def noun(self, plural: bool) -> str:
        """Noun, sometimes with an adjective."""
        form = self.draw(self.words().nouns)[plural]
        return f"{self.draw(self.words().adjectives)} {form}" if self.chance(0.35) else form

    def subject(self) -> Subject:
        kind = self.draw(_SUBJECTS)
        if kind == "noun":
            return self.noun_phrase()
        person = self.document.friend if kind == "friend" else self.document.hero
        if kind == "pronoun":
            return Subject(person.subject, person=person)
        if self.chance(0.15):
            relative = f"{self.verb(plural=False)} {self.noun_phrase(1).text}"
            return Subject(f"{person.name}, who {relative},", person=person)
        return Subject(person.name, person=person)

    def object(self, subject: Subject) -> str:
        kind = self.draw(_OBJECTS)
        if kind == "noun":
            return self.noun_phrase().text
        if subject.person is None:  # a thing or group: it acts on the hero
            return self.document.hero.object
        if kind == "reflexive":
            return subject.person.reflexive
        return f"{subject.person.possessive} {self.noun(self.chance(0.3))}"

    def clause(self) -> str:
        subject = self.subject()
        kind = self.draw(_PREDICATES)
        if kind == "transitive":
            predicate = f"{self.verb(subject.plural)} {self.object(subject)}"
            if self.chance(0.2):
                predicate += " " + self.draw(self.words().places if self.chance(0.5) else _TIMES)
        elif kind == "correlative":
            first, second = self.draw(_CORRELATIVES)
            one, other = self.noun_phrase(1).text, self.noun_phrase(1).text
            predicate = f"{self.verb(subject.plural)} {first} {one} {second} {other}"
        else:
            words = self.words()
            complement = self.draw(words.adjectives if kind == "adjective" else words.places)
            predicate = f"{self.be(subject.plural)} {complement}"
        return f"{subject.text} {predicate}"

    def introduction(self) -> str:
        hero, friend = self.document.hero, self.document.friend
        be = self.be(plural=False)
        job = f"{self.draw(self.words().adjectives)} {self.draw(self.document.jobs)}"
        return f"{hero.name} {be} a {job}, and {friend.name} {be} {hero.possessive} friend."

    def simple(self) -> str:
        return f"{self.clause()}."

    def subordinate(self) -> str:
        return f"{self.draw(_CONJUNCTIONS)} {self.clause()}, {self.clause()}."

    def coordinated(self) -> str:
        return f"{self.clause()}, {self.draw(_COORDINATORS)} {self.clause()}."

    def quotation(self) -> str:
        """Speech is in the present, whatever the document's tense."""
        present = _Grammar(self.draws, replace(self.document, past=False))
        if self.chance(0.3):
            subject = present.noun_phrase()
            verb = "asked" if self.document.past else "asks"
            speech = f"where {present.be(subject.plural)} {subject.text}?"
        else:
            verb = "said" if self.document.past else "says"
            speech = f"{present.clause()},"
        speaker = self.document.friend if self.chance(0.7) else self.document.hero
        return f'"{_capitalised(speech)}" {verb} {speaker.name}.'

    def line(self) -> str:
        return self.draw(_LINES)(self)


_LINES = Zipf(
    [
        _Grammar.simple,
        _Grammar.simple,
        _Grammar.subordinate,
        _Grammar.quotation,
        _Grammar.coordinated,
    ],
    0.5,
)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _lines(seed: int, sizes: dict[str, int]) -> Iterator[tuple[str, str, float]]:
    """Split, line and the information in nats of the draws behind the line."""
    if any(size < 0 for size in sizes.values()):
        raise ValueError(f"sizes must not be negative, got {sizes}")
    draws = _Draws(seed)
    seen: set[str] = set()
    for split, size in sizes.items():
        left = 0  # lines of the document still to come
        for _ in range(size):
            draws.nats = 0.0
            if not left:
                grammar = _Grammar(draws, draws.document())
                left = draws.integer(MIN_LINES, MAX_LINES)
                write = grammar.introduction
            before = draws.nats
            line = ""
            while not line or line in seen or len(TOKEN.findall(line)) > MAX_TOKENS:
                draws.nats = before
                line = _capitalised(with_article_an(write()))
            seen.add(line)
            left -= 1
            write = grammar.line
            yield split, line, draws.nats


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Lines of raw text, one sentence each: split name → lines in the order of the text.

    `sizes` is the number of lines of each split, such as {"train": 12000, "valid": 600}; a split
    begins with a new document and its last document may be cut short. No line occurs twice,
    within a split or across splits. The same seed and sizes give the same text on every machine.
    Raises ValueError if a size is negative.
    """
    text: dict[str, list[str]] = {split: [] for split in sizes}
    for split, line, _ in _lines(seed, sizes):
        text[split].append(line)
    return text


def entropy_bound(seed: int, sizes: dict[str, int]) -> dict[str, float]:
    """Upper bound on the entropy of each split of `generate(seed, sizes)`, in nats per token.

    Tokens are the matches of TOKEN plus one for the end of each line. The bound is the mean
    -log probability of the choices behind the text. They determine the text and hold a little
    more than it shows (such as the topic before its first word), so a perfect model's loss is at
    most this, up to sampling noise. Raises ValueError if a size is not positive.
    """
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"an empty split has no entropy, got sizes {sizes}")
    nats = dict.fromkeys(sizes, 0.0)
    tokens = dict.fromkeys(sizes, 0)
    for split, line, information in _lines(seed, sizes):
        nats[split] += information
        tokens[split] += len(TOKEN.findall(line)) + 1
    return {split: nats[split] / tokens[split] for split in sizes}
