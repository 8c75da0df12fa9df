"""A German-English corpus made up by a small grammar, for experiments that last a minute.

Every pair is derived from one clause structure, so the English sentence is a function of the
German one and a perfect model scores 100 BLEU. What such a model has to learn, beyond a lexicon
of some 350 words a side:

* word order: verb second after any fronted phrase (English keeps subject-verb-object), verb last
  in subordinate and relative clauses, infinitives and participles at the end of the clause;
* words in two pieces: `ruft ... an` is one English word, joined (`anruft`) in subordinate clauses;
* meaning carried by morphology: case decides who acts on whom (`Den Hund sieht Anna`) and
  whether `in` is "in" or "into", verb endings whether `sie` is "she" or "they";
* compounds: `Gartentisch` is "garden table"; test sentences hold compounds never seen in training;
* English of its own: do-support, irregular pasts and plurals, a/an.

Words follow Zipf's law, but no listed word is so rare that 20,000 sentences do not teach it.
"""

import re
from dataclasses import dataclass, field
from random import Random

from normexp.corpora.toy import german_english as lexicon
from normexp.corpora.toy.english import BE, BE_PAST, DO, with_article_an, with_s
from normexp.corpora.toy.german import (
    ACCUSATIVE,
    ADJECTIVE_ENDINGS,
    CASES,
    DATIVE,
    DEFINITE,
    DETERMINER_ENDINGS,
    EIN_ENDINGS,
    GENITIVE,
    NOMINATIVE,
    PLURAL,
    SEIN,
    SEIN_PAST,
    THEY,
    THIRD,
    WERDEN,
    after_preposition,
)
from normexp.corpora.toy.german_english import ANIMATE, INANIMATE, Noun, Phrase, Verb
from normexp.corpora.toy.zipf import Zipf

MIN_TOKENS, MAX_TOKENS = 4, 20  # on either side, punctuation included
_TOKEN = re.compile(r"\w+|[^\w\s]")

# A sentence to be written: German words, English words, final punctuation
Draft = tuple[list[str], list[str], str]

_FRAMES = Zipf(
    ["transitive", "intransitive", "copula", "motion", "ditransitive", "dative", "prepositional"], 1
)
_TENSES = Zipf(["present", "perfect", "modal", "future"], 1)
_MODALS = Zipf(lexicon.MODALS, 3)
_SUBJECTS = Zipf(["noun", "pronoun", "name", "pair"], 0.5)
_SINGULAR_DETERMINERS = Zipf(["the", "a", "possessive", "this", "every"], 0.5)
_PLURAL_DETERMINERS = Zipf(["the", "possessive", "numeral", "this", "quantifier"], 1)
_NEGATIVE_DETERMINER = Zipf(["no"])
_DEFINITE_DETERMINERS = Zipf(["the", "possessive", "this"], 0.5)


@dataclass
class Clause:
    """A clause before its words are put in order."""

    subject: Phrase
    finite: str  # German finite verb of a main clause
    bracket: list[str]  # German particle, participle or infinitive that ends a main clause
    final: list[str]  # German verbs that end a subordinate clause
    auxiliary: list[str]  # English; at most one word
    verb: list[str]  # English; the other words
    slots: dict[str, Phrase] = field(default_factory=dict)

    def _words(self, language: str, order: str, fronted: str = "") -> list[str]:
        names = [name for name in order.split() if name in self.slots and name != fronted]
        if language == "german":
            names.sort(key=lambda name: not self.slots[name].light)
        return [word for name in names for word in getattr(self.slots[name], language)]

    def _middle_field(self, fronted: str = "") -> list[str]:
        order = "time frequency recipient object negation manner companion place about complement"
        return self._words("german", order, fronted)

    def german_main(self, fronted: str = "") -> list[str]:
        """Verb second after the `fronted` slot or "subject", or first where none is named."""
        opening = self.subject if fronted == "subject" else self.slots.get(fronted)
        first = opening.german if opening else []
        subject = [] if fronted == "subject" else self.subject.german
        return [*first, self.finite, *subject, *self._middle_field(fronted), *self.bracket]

    def german_subordinate(self) -> list[str]:
        """Verbs last."""
        return [*self.subject.german, *self._middle_field(), *self.final]

    def _predicate(self, auxiliary: list[str], fronted: str = "") -> list[str]:
        after = "complement object about recipient manner companion place time"
        adverbs = self._words("english", "negation frequency")
        return [*auxiliary, *adverbs, *self.verb, *self._words("english", after, fronted)]

    def english_statement(self, fronted: str = "") -> list[str]:
        """Subject first, except after an adverbial that German fronts too."""
        if fronted not in ("time", "place"):
            return [*self.subject.english, *self._predicate(self.auxiliary)]
        first = self.slots[fronted].english
        return [*first, *self.subject.english, *self._predicate(self.auxiliary, fronted)]

    def english_question(self) -> list[str]:
        """Auxiliary first."""
        return [*self.auxiliary, *self.subject.english, *self._predicate([])]


class _Grammar:
    """Draws phrases, clauses and sentences."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def noun(self, kinds: str) -> Noun:
        """A noun of one of the kinds, each as likely as the others; things may be compounds."""
        noun = lexicon.NOUNS[kinds[int(self.rng.random() * len(kinds))]].draw(self.rng)
        if noun.kind != "T" or not self.chance(0.15):
            return noun
        german, english = lexicon.MODIFIERS.draw(self.rng)
        if english == noun.english:
            return noun
        return noun._replace(
            german=german + noun.german.lower(),
            german_plural=german + noun.german_plural.lower(),
            english=f"{english} {noun.english}",
            english_plural=f"{english} {noun.english_plural}",
        )

    def determiner(self, name: str, gender: str, case: int) -> tuple[str, str, str]:
        """German form, English word, declension of a following adjective."""
        if name == "the":
            return DEFINITE[gender][case], "the", "weak"
        if name == "this":
            english = "these" if gender == PLURAL else "this"
            return "dies" + DETERMINER_ENDINGS[gender][case], english, "weak"
        if name == "every":
            return "jed" + DETERMINER_ENDINGS[gender][case], "every", "weak"
        if name == "numeral":
            german, english = lexicon.NUMERALS.draw(self.rng)
            return german, english, "strong"
        if name == "quantifier":
            german, english = lexicon.QUANTIFIERS.draw(self.rng)
            return german + DETERMINER_ENDINGS[gender][case], english, "strong"
        if name == "possessive":
            german, english = lexicon.POSSESSIVES.draw(self.rng)
        else:
            german, english = {"a": ("ein", "a"), "no": ("kein", "no")}[name]
        return german + EIN_ENDINGS[gender][case], english, "mixed"

    def noun_phrase(
        self,
        kinds: str,
        case: int,
        determiners: Zipf[str] | None = None,
        *,
        singular: bool = False,
        bare: bool = False,
    ) -> Phrase:
        """Determiner, adjective, noun, and unless `bare` what follows the noun."""
        noun = self.noun(kinds)
        gender = noun.gender if singular or not self.chance(0.3) else PLURAL
        if determiners is None:
            determiners = _PLURAL_DETERMINERS if gender == PLURAL else _SINGULAR_DETERMINERS
        name = determiners.draw(self.rng)
        german_determiner, english_determiner, declension = self.determiner(name, gender, case)
        german, english = [german_determiner], [english_determiner]
        if self.chance(0.1 if bare else 0.2):
            animate = noun.kind in ANIMATE
            adjectives = lexicon.ANIMATE_ADJECTIVES if animate else lexicon.INANIMATE_ADJECTIVES
            adjective = adjectives.draw(self.rng)
            german.append(adjective.stem + ADJECTIVE_ENDINGS[declension][gender][case])
            english.append(adjective.english)
        german.append(noun.form(gender, case))
        english += (noun.english_plural if gender == PLURAL else noun.english).split()
        if not bare and self.chance(0.08):
            attribute = self.attribute(noun.kind)
            german += attribute.german
            english += attribute.english
        person = THEY if gender == PLURAL else THIRD
        return Phrase(german, english, person, gender, human=noun.kind == "P")

    def attribute(self, kind: str) -> Phrase:
        """What follows a noun of that kind: where a person is from, or a genitive."""
        if kind == "P" and self.chance(0.5):
            return self.adverbial("aus", "from", "L", DATIVE, city="aus")
        owner = self.noun_phrase("O", GENITIVE, _DEFINITE_DETERMINERS, singular=True, bare=True)
        return Phrase(owner.german, ["of", *owner.english])

    def adverbial(
        self, preposition: str, english: str, kinds: str, case: int, city: str = ""
    ) -> Phrase:
        """Preposition and noun phrase; or a city, if given the German preposition for cities."""
        if city and self.chance(0.2):
            name = lexicon.CITIES.draw(self.rng)
            return Phrase([city, *name.german], [*english.split("_"), *name.english])
        phrase = self.noun_phrase(kinds, case, bare=True)
        german = after_preposition(preposition, phrase.german)
        return Phrase(german, [*english.split("_"), *phrase.english])

    def subject(self, kinds: str, bare: bool) -> Phrase:
        """A noun phrase, or where animals and persons are asked for also a pronoun or names."""
        kind = _SUBJECTS.draw(self.rng)
        if kind == "noun" or kinds != ANIMATE:
            return self.noun_phrase(kinds, NOMINATIVE, bare=bare)
        if kind == "pronoun":
            return lexicon.SUBJECT_PRONOUNS.draw(self.rng)
        first, second = lexicon.NAMES.draw(self.rng), lexicon.NAMES.draw(self.rng)
        if kind == "name" or first == second:
            return first
        german, english = [*first.german, "und"], [*first.english, "and"]
        return Phrase([*german, *second.german], [*english, *second.english], THEY)

    def object(self, verb: Verb, determiners: Zipf[str] | None, bare: bool) -> Phrase:
        """What the verb governs; of a verb that takes persons also a pronoun or a name."""
        if "P" in verb.kinds and determiners is not _NEGATIVE_DETERMINER:
            if self.chance(0.15):
                return lexicon.OBJECT_PRONOUNS[verb.case].draw(self.rng)
            if self.chance(0.15):
                return lexicon.NAMES.draw(self.rng)
        return self.noun_phrase(verb.kinds, verb.case, determiners, bare=bare)

    def conjugate(self, verb: Verb, tense: str, subject: Phrase, split: bool) -> Clause:
        """Subject and verb; `split` asks for an English auxiliary, as `not` and questions do."""
        person = subject.person
        if verb is lexicon.COPULA and tense in ("present", "perfect"):
            past = tense == "perfect"  # German prefers `war` to `ist gewesen`
            finite = (SEIN_PAST if past else SEIN)[person]
            return Clause(subject, finite, [], [finite], [(BE_PAST if past else BE)[person]], [])
        if tense == "present":
            finite = verb.present(person)
            bracket = [verb.particle] if verb.particle else []
            final = [verb.particle + finite]
            return Clause(subject, finite, bracket, final, *_english(verb.english, person, split))
        if tense == "perfect":
            finite, last = verb.perfect[person], verb.participle
            auxiliary, words = (["did"], verb.english) if split else ([], verb.english_past)
            return Clause(subject, finite, [last], [last, finite], auxiliary, words)
        last = verb.particle + verb.infinitive
        if tense == "future":
            finite, auxiliary, words = WERDEN[person], ["will"], verb.english
        else:
            forms, modal, lexical = _MODALS.draw(self.rng)
            finite, auxiliary, words = forms[person], [modal], verb.english
            if not modal or (lexical and split):
                auxiliary, words = _english([lexical, "to", *words], person, split)
        return Clause(subject, finite, [last], [last, finite], auxiliary, words)

    def clause(
        self,
        frame: str = "",
        *,
        subject: Phrase | None = None,
        asks: str = "",
        bare: bool = False,
    ) -> Clause:
        """A clause built around a verb of the given or any frame.

        `asks` is what a question is about ("time", "place" or another word), "" in a statement;
        `bare` leaves out attributes of nouns and adverbials that the verb does not need.
        """
        frame = frame or _FRAMES.draw(self.rng)
        verb = lexicon.COPULA if frame == "copula" else lexicon.VERBS[frame].draw(self.rng)
        tense = _TENSES.draw(self.rng)
        inanimate = frame == "copula" and subject is None and self.chance(0.4)
        if subject is None:
            subject = self.subject(INANIMATE if inanimate else ANIMATE, bare)
        # An object may be denied by `kein`; `nicht` denies the rest, with definite objects.
        determiners, split = None, bool(asks)
        negation = "" if asks or not self.chance(0.12) else "nicht"
        if negation and frame == "transitive" and self.chance(0.4):
            negation, determiners = "kein", _NEGATIVE_DETERMINER
        elif negation:
            determiners, split = _DEFINITE_DETERMINERS, True
        clause = self.conjugate(verb, tense, subject, split)
        slots = clause.slots
        if negation == "nicht":
            slots["negation"] = Phrase(["nicht"], ["not"])
        elif not negation and self.chance(0.08):
            slots["frequency"] = lexicon.FREQUENCIES.draw(self.rng)
        if asks != "time" and self.chance(0.2):
            slots["time"] = lexicon.TIMES[tense].draw(self.rng)
        if frame == "copula":
            adjectives = lexicon.INANIMATE_ADJECTIVES if inanimate else lexicon.ANIMATE_ADJECTIVES
            adjective = adjectives.draw(self.rng)
            slots["complement"] = Phrase([adjective.german], [adjective.english])
        elif frame == "motion":
            slots["place"] = self.direction()
        elif frame == "prepositional":
            phrase = self.object(verb, determiners, bare=True)
            german = after_preposition(verb.preposition, phrase.german)
            slots["about"] = Phrase(german, phrase.english)
        elif frame != "clausal":
            if frame in ("transitive", "ditransitive"):
                slots["object"] = self.object(verb, determiners, bare)
            if frame == "dative":
                slots["recipient"] = self.object(verb, determiners, bare)
            if frame == "ditransitive":
                slots["recipient"] = self.recipient(determiners)
            if not bare:
                self.add_adverbial(slots, place=asks != "place")
        return clause

    def direction(self) -> Phrase:
        """Where a motion leads."""
        if self.chance(0.5):
            return self.adverbial("in", "into", "L", ACCUSATIVE)
        return self.adverbial("zu", "to", "LP", DATIVE, city="nach")

    def recipient(self, determiners: Zipf[str] | None) -> Phrase:
        """Indirect object of the verbs of giving."""
        if self.chance(0.2):
            phrase = lexicon.OBJECT_PRONOUNS[DATIVE].draw(self.rng)
        elif self.chance(0.2):
            phrase = lexicon.NAMES.draw(self.rng)
        else:
            phrase = self.noun_phrase("P", DATIVE, determiners, bare=True)
        return phrase._replace(english=["to", *phrase.english])

    def add_adverbial(self, slots: dict[str, Phrase], place: bool) -> None:
        """At most one of place, companion and manner."""
        if place and self.chance(0.2):
            german, english, kinds = lexicon.PLACE_PREPOSITIONS.draw(self.rng)
            city = "in" if german == "in" else ""
            slots["place"] = self.adverbial(german, english, kinds, DATIVE, city)
        elif self.chance(0.08):
            german, english, case = lexicon.COMPANION_PREPOSITIONS.draw(self.rng)
            slots["companion"] = self.adverbial(german, english, ANIMATE, CASES[case])
        elif self.chance(0.08):
            slots["manner"] = lexicon.MANNERS.draw(self.rng)

    def front(self, clause: Clause) -> str:
        """What opens a main clause: "subject" or a slot whose role its German form tells."""
        slots = clause.slots
        if "time" in slots and self.chance(0.5):
            return "time"
        if "place" in slots and self.chance(0.2):
            return "place"
        # Pronouns and names have no gender here. Of accusatives only the masculine singular differs
        # from the nominative; datives differ unless a numeral begins them.
        thing, person = slots.get("object"), slots.get("recipient")
        if thing and thing.gender == "m" and self.chance(0.25):
            return "object"
        if (
            person
            and person.gender
            and person.german[0] not in lexicon.UNDECLINED
            and self.chance(0.25)
        ):
            return "recipient"
        return "subject"

    def relative_subject(self, subject: Phrase) -> Phrase:
        """The subject with a relative clause."""
        pronoun = Phrase([DEFINITE[subject.gender][NOMINATIVE]], ["who"], subject.person)
        relative = self.clause(subject=pronoun, bare=True)
        return subject._replace(
            german=[*subject.german, ",", *relative.german_subordinate(), ","],
            english=[*subject.english, *relative.english_statement()],
        )

    def main(self) -> Draft:
        clause = self.clause()
        if clause.subject.human and self.chance(0.12):
            clause.subject = self.relative_subject(clause.subject)
        front = self.front(clause)
        return clause.german_main(front), clause.english_statement(front), "."

    def question(self) -> Draft:
        if self.chance(0.5):
            clause = self.clause(asks="truth")
            return clause.german_main(), clause.english_question(), "?"
        german, english, asks = lexicon.QUESTION_WORDS.draw(self.rng)
        clause = self.clause(asks=asks)
        return [german, *clause.german_main()], [english, *clause.english_question()], "?"

    def with_subordinate(self) -> Draft:
        conjunction = lexicon.SUBORDINATORS.draw(self.rng)
        clause, subordinate = self.clause(bare=True), self.clause(bare=True)
        german = [*conjunction.german, *subordinate.german_subordinate()]
        english = [*conjunction.english, *subordinate.english_statement()]
        if self.chance(0.5):
            first, second = clause.german_main(), clause.english_statement()
            return [*german, ",", *first], [*english, ",", *second], "."
        front = self.front(clause)
        first, second = clause.german_main(front), clause.english_statement(front)
        return [*first, ",", *german], [*second, *english], "."

    def with_content(self) -> Draft:
        clause, content = self.clause("clausal", bare=True), self.clause(bare=True)
        front = self.front(clause)
        german, english = clause.german_main(front), clause.english_statement(front)
        return (
            [*german, ",", "dass", *content.german_subordinate()],
            [*english, "that", *content.english_statement()],
            ".",
        )

    def coordinated(self) -> Draft:
        conjunction = lexicon.COORDINATORS.draw(self.rng)
        first, second = self.clause(bare=True), self.clause(bare=True)
        front = self.front(first)
        german = [*first.german_main(front), ",", *conjunction.german]
        english = [*first.english_statement(front), ",", *conjunction.english]
        return (
            [*german, *second.german_main("subject")],
            [*english, *second.english_statement()],
            ".",
        )


_SENTENCES = Zipf(
    [
        _Grammar.main,
        _Grammar.main,
        _Grammar.main,
        _Grammar.with_subordinate,
        _Grammar.question,
        _Grammar.with_content,
        _Grammar.coordinated,
    ],
    1,
)


def _english(words: list[str], person: int, split: bool) -> tuple[list[str], list[str]]:
    """Auxiliary and verb of the English present."""
    if split:
        return [DO[person]], words
    first, *rest = words
    return [], [with_s(first) if person == THIRD else first, *rest]


def _text(words: list[str], end: str) -> str:
    text = " ".join(words).replace(" ,", ",") + end
    text = re.sub(",(?=[,.?])", "", text)  # a relative clause may end where its sentence does
    return text[0].upper() + text[1:]


def _english_text(words: list[str], end: str) -> str:
    return with_article_an(_text(words, end).replace("can not", "cannot"))


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[tuple[str, str]]]:
    """German-English sentence pairs as raw text: split name → [(German, English), ...].

    `sizes` is the number of pairs of each split, such as {"train": 20000, "valid": 500}. No
    sentence of either language occurs twice, within a split or across splits. The same seed and
    sizes give the same corpus on every machine. Raises ValueError if a size is negative.
    """
    if any(size < 0 for size in sizes.values()):
        raise ValueError(f"sizes must not be negative, got {sizes}")
    rng = Random(seed)
    grammar = _Grammar(rng)
    seen: set[str] = set()
    corpus: dict[str, list[tuple[str, str]]] = {}
    for split, size in sizes.items():
        pairs = corpus[split] = []
        while len(pairs) < size:
            german_words, english_words, end = _SENTENCES.draw(rng)(grammar)
            german = _text(german_words, end)
            english = _english_text(english_words, end)
            lengths = [len(_TOKEN.findall(text)) for text in (german, english)]
            # German determines English, so English sentences that differ have different sources.
            if min(lengths) < MIN_TOKENS or max(lengths) > MAX_TOKENS or english in seen:
                continue
            seen.add(english)
            pairs.append((german, english))
    return corpus
