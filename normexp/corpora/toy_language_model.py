"""English-like text with topics and agreement, for language models that train in a minute.

Lines form documents of 10 to 30 lines. A document has a topic, which chooses nine of ten of its
nouns, verbs and adjectives, and a protagonist, whose name and pronoun return. So the words of two
batches differ more than chance would have it: statistics over a batch fluctuate, as they do in
real text. What a model can learn, besides words and their frequencies (Zipf):

* the topic and the protagonist of the document from the lines before, within its context;
* agreement of a verb with a subject up to ten words earlier, past nouns of the other number;
* he/she/they after a name or a plural, and quotation marks and brackets that must close.

What remains is chance: which construction, noun, verb and adjective comes next.
"""

from random import Random

from normexp.corpora.zipf import Zipf

SHORTEST, LONGEST = 10, 30  # lines of a document
ON_TOPIC = 0.9  # share of the content words that the topic chooses

# nouns (singular), verbs (plural form), adjectives; most frequent first
TOPICS = {
    "sea": (
        "ship sailor wave harbour captain island storm anchor fisherman sail lighthouse net "
        "gull beach whale pilot rope deck current shell",
        "sail sink drift float swim row anchor vanish turn arrive",
        "deep blue salty calm rough wet distant wooden",
    ),
    "court": (
        "judge lawyer witness law trial jury crime prison thief verdict court clerk prisoner "
        "charge oath appeal fine guard sentence document",
        "argue lie object confess appeal wait testify protest hesitate agree",
        "guilty innocent strict legal fair secret honest severe",
    ),
    "kitchen": (
        "cook soup bread knife oven guest plate onion cake recipe spoon apple waiter pot cheese "
        "table pepper butter sauce dinner",
        "cook bake taste boil smell eat burn melt cool cut",
        "hot sweet fresh bitter salted crisp raw tender",
    ),
    "forest": (
        "tree wolf hunter river path bear leaf bird stone fox branch owl camp trail root deer "
        "shadow meadow nest spring",
        "grow howl hide sing fall climb run sleep wander jump",
        "green dark tall wild old quiet thick hollow",
    ),
    "school": (
        "teacher pupil book lesson exam class pencil desk question answer library grade poem "
        "chapter board note map essay bell student",
        "read write study answer learn whisper laugh fail pass listen",
        "clever difficult bored young careful lazy patient famous",
    ),
    "factory": (
        "worker machine engine wheel boss strike wage tool belt metal furnace pipe shift union "
        "manager spark gear crane inspector lever",
        "work break start stop rust turn hum shake rest slow",
        "heavy loud broken modern grey dangerous cheap steel",
    ),
}
NAMES = {
    "he": "John Peter Thomas David Henry Paul Martin George Oscar Victor",
    "she": "Mary Anna Sarah Julia Emma Clara Laura Alice Helen Nora",
}
PREPOSITIONS = "near behind beside under above beyond"
SPEECH = "says thinks believes insists whispers"
TIMES = "today again now slowly often there soon together"
IRREGULAR = {"fisherman": "fishermen", "wolf": "wolves", "leaf": "leaves", "knife": "knives",
             "deer": "deer"}  # fmt: skip


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Make text: sizes maps a split to its number of lines; returns its lines, raw and untokenized.

    The same seed and sizes give the same text on every machine. No document continues from one
    split into the next.
    """
    rng = Random(seed)
    text = {}
    for split, size in sizes.items():
        lines: list[str] = []
        while len(lines) < size:
            lines += _document(rng)
        text[split] = lines[:size]
    return text


class _Words:
    """Words of one part of speech, drawn from the document's topic or from all topics."""

    def __init__(self, part: int, topic: str) -> None:
        topics = {name: words[part].split() for name, words in TOPICS.items()}
        self._of_topic = Zipf(topics[topic], 1)
        self._of_all = Zipf(sorted({word for words in topics.values() for word in words}), 20)

    def draw(self, rng: Random) -> str:
        return (self._of_topic if rng.random() < ON_TOPIC else self._of_all).draw(rng)


class _Document:
    def __init__(self, rng: Random) -> None:
        self.rng = rng
        topic = Zipf(list(TOPICS), 2).draw(rng)
        self.nouns, self.verbs, self.adjectives = (_Words(part, topic) for part in range(3))
        self.pronoun = "he" if rng.random() < 0.5 else "she"
        self.name = Zipf(NAMES[self.pronoun].split(), 2).draw(rng)

    def line(self) -> str:
        words = _CONSTRUCTIONS.draw(self.rng)(self)
        return words[0].upper() + words[1:]

    def described(self) -> str:
        """The {adjective} {noun} {preposition} the {nouns} {verb} {adverb}."""
        plural = self._coin()
        subject = f"the {self._maybe_adjective()}{self._noun(plural)}{self._attractors()}"
        return f"{subject} {self._verb(plural)} {self._pick(TIMES)}."

    def bracketed(self) -> str:
        """The {nouns} (also the {noun}) {verb}."""
        plural = self._coin()
        aside = f"(also the {self._maybe_adjective()}{self._noun(self._coin())})"
        return f"the {self._noun(plural)} {aside} {self._verb(plural)} {self._pick(TIMES)}."

    def quoted(self) -> str:
        """ "The {noun} {verbs}", {name} {says}."""
        plural = self._coin()
        said = f"the {self._noun(plural)}{self._attractors()} {self._verb(plural)}"
        return f'"{said[0].upper()}{said[1:]}", {self._pick(SPEECH)} {self.name}.'

    def because(self) -> str:
        """{Name} {verbs} because {pronoun} {verbs}, or the same of some plural noun."""
        if self._coin():
            subject, pronoun, plural = self.name, self.pronoun, False
        else:
            subject, pronoun, plural = f"the {self._noun(True)}", "they", True
        time = self._pick(TIMES)
        return f"{subject} {self._verb(plural)} {time}, because {pronoun} {self._verb(plural)}."

    def conditional(self) -> str:
        """If the {nouns} {verb}, {name} {verbs} too."""
        plural = self._coin()
        first = f"if the {self._maybe_adjective()}{self._noun(plural)} {self._verb(plural)}"
        return f"{first}, {self.name} {self._verb(False)} too."

    def _coin(self) -> bool:
        return self.rng.random() < 0.5

    def _pick(self, words: str) -> str:
        return Zipf(words.split(), 1).draw(self.rng)

    def _noun(self, plural: bool) -> str:
        noun = self.nouns.draw(self.rng)
        if not plural:
            return noun
        return IRREGULAR.get(noun) or _with_s(noun)

    def _verb(self, plural: bool) -> str:
        verb = self.verbs.draw(self.rng)
        return verb if plural else _with_s(verb)

    def _maybe_adjective(self) -> str:
        return f"{self.adjectives.draw(self.rng)} " if self._coin() else ""

    def _attractors(self) -> str:
        """Up to two phrases between a subject and its verb, with nouns of either number."""
        count = (self.rng.random() < 0.6) + (self.rng.random() < 0.3)
        return "".join(
            f" {self._pick(PREPOSITIONS)} the {self._noun(self._coin())}" for _ in range(count)
        )


_CONSTRUCTIONS = Zipf(
    [
        _Document.described,
        _Document.because,
        _Document.quoted,
        _Document.conditional,
        _Document.bracketed,
    ],
    1,
)


def _document(rng: Random) -> list[str]:
    document = _Document(rng)
    length = SHORTEST + int(rng.random() * (LONGEST - SHORTEST + 1))
    return [document.line() for _ in range(length)]


def _with_s(word: str) -> str:
    """Plural of a regular noun, third person of a regular verb."""
    if word.endswith(("s", "sh", "ch", "x")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
