"""The toy language-model corpus: its structure is found again without the generator's help."""

import hashlib
import math
import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from normexp.corpora.toy import language_model
from normexp.corpora.toy.language_model import entropy_bound, generate

SIZES = {"train": 12_000, "valid": 600, "test": 600}
GOLDEN = "7ab6c4c7fbc3d4a7ff6a97772a25d799b34353148c640ce4b1e78958aef38d75"
WOMEN = {"Clara", "Emma", "Alice", "Ruth", "Helen", "Martha", "Nora"}
MEN = {"Henry", "Paul", "Oscar", "Simon", "Martin", "Arthur", "Felix"}
# Some nouns with plurals that are told apart, from all topics and none.
SINGULARS = set(
    re.findall(
        r"\w+",
        """boat sailor net wave captain knife pan onion cook rose gardener hedge pupil teacher book
        violin singer song king knight sword climber peak hammer carpenter man woman child friend
        house dog""",
    )
)
PLURALS = set(
    re.findall(
        r"\w+",
        """boats sailors nets waves captains knives pans onions cooks roses gardeners hedges pupils
        teachers books violins singers songs kings knights swords climbers peaks hammers carpenters
        men women children friends houses dogs""",
    )
)


def tokens(line):
    return re.findall(r"\w+|[^\w\s]", line)


@pytest.fixture(scope="module")
def corpus():
    return generate(1, SIZES)


@pytest.fixture(scope="module")
def documents(corpus):
    """Lines of the training set, cut where two people are introduced."""
    found = []
    for line in corpus["train"]:
        if re.search(r" friend\.$", line) and re.match(r"\w+ (was|is) an? \w+ \w+, and \w+ ", line):
            found.append([])
        found[-1].append(line)
    return found


def test_equal_seeds_give_the_same_text_everywhere():
    sample = generate(7, {"train": 200, "test": 20})
    text = "\n".join(line for split in sample.values() for line in split)
    # Guards against anything that depends on the machine, the Python version or its hash seed.
    # Recompute it when the grammar changes.
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN
    assert sample == generate(7, {"train": 200, "test": 20})


def test_other_seeds_give_other_text():
    first, second = (set(generate(seed, {"train": 1000})["train"]) for seed in (1, 2))
    assert len(first & second) < 50


def test_sizes_are_kept_and_splits_share_no_line(corpus):
    assert {split: len(lines) for split, lines in corpus.items()} == SIZES
    lines = [line for split in corpus.values() for line in split]
    assert len(set(lines)) == len(lines)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        generate(1, {"train": -1})
    with pytest.raises(ValueError, match="empty"):
        entropy_bound(1, {"train": 0})


def test_raw_text_form(corpus):
    for line in corpus["train"]:
        assert re.fullmatch(r'"?[A-Z].*\.', line), line
        assert not re.search(r"\s[,.?)\]]|[(\[]\s|\s\s|,\S(?<!\")|[,.][,.]", line), line
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", line.lower()), line
        assert 3 <= len(tokens(line)) <= 40, line


def test_vocabulary_is_some_hundreds_of_words_with_a_zipfian_head(corpus):
    counts = Counter(word for line in corpus["train"] for word in tokens(line))
    assert 600 < len(counts) < 1000
    frequencies = [math.log(count) for _, count in counts.most_common(400)]
    ranks = [math.log(rank) for rank in range(1, 401)]
    mean_rank, mean_frequency = sum(ranks) / 400, sum(frequencies) / 400
    slope = sum(
        (r - mean_rank) * (f - mean_frequency) for r, f in zip(ranks, frequencies, strict=True)
    ) / sum((r - mean_rank) ** 2 for r in ranks)
    assert -1.3 < slope < -0.6


def test_documents_have_ten_to_thirty_lines(documents):
    lengths = [len(document) for document in documents[:-1]]  # the last may be cut short
    assert min(lengths) >= 10 and max(lengths) <= 30
    assert 18 < sum(lengths) / len(lengths) < 22


def test_splits_begin_with_a_new_document(corpus):
    for lines in corpus.values():
        assert lines[0].endswith(" friend.")


def nats_saved(block, context, background):
    """By how many nats per token the words of `context` help to foresee those of `block`."""
    seen = Counter(word for line in context for word in tokens(line))
    words = [word for line in block for word in tokens(line)]
    total, weight = sum(background.values()), sum(seen.values())
    saved = 0.0
    for word in words:
        usual = background[word] / total
        saved += math.log((seen[word] + weight * usual) / (2 * weight) / usual)
    return saved / len(words)


def test_topics_persist_in_a_document_and_differ_between_documents(documents, corpus):
    background = Counter(word for line in corpus["train"] for word in tokens(line))
    halves = [(document[:10], document[10:20]) for document in documents if len(document) > 15]
    same = [nats_saved(later, earlier, background) for earlier, later in halves]
    other = [nats_saved(halves[i - 7][1], halves[i][0], background) for i in range(len(halves))]
    assert sum(same) / len(same) > 0.2
    assert sum(other) / len(other) < 0
    assert sum(value > 0 for value in same) > 0.95 * len(same)


def test_each_document_has_two_characters_whose_names_recur(documents):
    for document in documents:
        hero, friend = re.match(r"(\w+) \w+ an? \w+ \w+, and (\w+) ", document[0]).groups()
        names = Counter(word for line in document for word in tokens(line) if word in WOMEN | MEN)
        assert set(names) <= {hero, friend}
        # of different gender, or pronouns would not tell them apart
        assert len({hero, friend} & WOMEN) < 2 and len({hero, friend} & MEN) < 2


def test_pronouns_agree_with_the_hero_of_the_document(documents):
    pronouns = Counter()
    for document in documents:
        hero = document[0].split()[0]
        if hero not in WOMEN | MEN:
            continue
        subject, other = ("she", "he") if hero in WOMEN else ("he", "she")
        for line in document:
            spoken = [word.lower() for word in tokens(line)]
            pronouns[hero in WOMEN] += spoken.count(subject)
            assert other not in spoken, document
    assert min(pronouns.values()) > 300


def test_reflexives_agree_with_their_subject_far_back(documents):
    distances = []
    for document in documents:
        for line in document:
            if match := re.fullmatch(r"(\w+)(?:, who [^,]+,)? \w+ (himself|herself)[ \w]*\.", line):
                subject, reflexive = match.groups()
                feminine = reflexive == "herself"
                if subject in WOMEN | MEN:
                    assert (subject in WOMEN) == feminine, line
                    distances.append(line.count(" "))
                elif subject in ("He", "She"):
                    assert (subject == "She") == feminine, line
    assert len(distances) > 100 and max(distances) > 8


def test_verbs_agree_with_the_head_of_a_long_subject(corpus):
    number = {**dict.fromkeys(SINGULARS, "s"), **dict.fromkeys(PLURALS, "p")}
    far = Counter()
    for line in corpus["train"]:
        # head noun right after determiner and at most one word; then whatever may follow a noun,
        # up to the only finite form of "be"
        match = re.match(
            r"(?:The|A|An|This|Every|Another|Some|Many|These|Two|Several|Three) (?:\w+ )?(\w+)"
            r"((?: (?:near|behind|beside|under|with|that|\(not) [^,\"]*)?)"
            r" (is|was|are|were) [^,]*\.$",
            line,
        )
        if match and match[1] in number:
            assert (number[match[1]] == "s") == (match[3] in ("is", "was")), line
            far[len(match[2].split()) > 3] += 1
    assert far[True] > 50 and far[False] > 200


def test_present_tense_verbs_agree(documents):
    no_verb = {"is", "are", "near", "behind", "beside", "under", "with"}
    seen = Counter()
    for document in documents:
        if " is " not in document[0]:
            continue
        for line in document:
            match = re.match(
                r"(?:The|A|An|This|Every|Another|Some|Many|These|Two|Several|Three) (?:\w+ )?(\w+)"
                r" (\w+) (?:the|a|an|some|many|these|this|every|both|either|neither|him|her)\b",
                line,
            )
            if match and match[1] in SINGULARS | PLURALS and match[2] not in no_verb:
                assert bool(re.search("[^s]s$", match[2])) == (match[1] in SINGULARS), line
                seen[match[1] in SINGULARS] += 1
    assert min(seen.values()) > 20


def test_a_document_keeps_its_tense(documents):
    for document in documents:
        outside_speech = [re.sub('".*"', "", line) for line in document]
        forms = {word for line in outside_speech for word in tokens(line)}
        assert not (forms & {"is", "are", "says"} and forms & {"was", "were", "said"}), document
        speech = {w for line in document for w in tokens("".join(re.findall('".*"', line)))}
        assert not speech & {"was", "were", "said"}


def test_brackets_and_quotes_close_and_correlatives_come_in_pairs(corpus):
    seen = Counter()
    partners = {")": "(", "]": "["}
    for line in corpus["train"]:
        stack = []
        for mark in re.findall(r"[()\[\]]", line):
            if mark in "([":
                stack.append(mark)
                seen[len(stack)] += 1
            else:
                assert stack and stack.pop() == partners[mark], line
        assert not stack, line
        assert line.count('"') in (0, 2), line
        seen["quoted"] += '"' in line
        found = tokens(line)
        # "and" and "or" also join clauses, but each "neither", "both", "either" needs its partner
        assert found.count("neither") == found.count("nor"), line
        assert found.count("either") == found.count("or"), line
        assert found.count("both") <= found.count("and"), line
        seen["neither"] += "neither" in found
    assert seen[1] > 500 and seen[2] > 10 and seen["quoted"] > 1000 and seen["neither"] > 100


# ------------------------------------------------------------------------------- entropy


def test_draws_account_for_their_own_probability():
    draws = language_model._Draws(0)
    for choose in (
        lambda: draws.chance(0.2),
        lambda: draws.draw(language_model._OBJECTS),
        lambda: draws.integer(3, 6),
    ):
        outcomes, claimed = Counter(), {}
        for _ in range(20_000):
            draws.nats = 0.0
            outcome = choose()
            outcomes[outcome] += 1
            claimed[outcome] = math.exp(-draws.nats)
        assert sum(claimed.values()) == pytest.approx(1.0)
        for outcome, count in outcomes.items():
            assert count / 20_000 == pytest.approx(claimed[outcome], abs=0.02)


def test_every_random_number_is_accounted_for(monkeypatch):
    """Doubling as a check that the grammar draws from nowhere else."""
    calls = Counter()

    class Counting(Random):
        def random(self):
            calls["random"] += 1
            return super().random()

    monkeypatch.setattr(language_model, "Random", Counting)
    for name in ("chance", "draw", "integer"):
        original = getattr(language_model._Draws, name)

        def counted(self, *args, original=original):
            calls["accounted"] += 1
            return original(self, *args)

        monkeypatch.setattr(language_model._Draws, name, counted)
    generate(3, {"train": 500})
    assert calls["random"] == calls["accounted"] > 0


def bigram_perplexity(train, test):
    """Witten-Bell interpolation of bigrams with add-one unigrams, per token with line ends."""
    sentences = [["\n", *tokens(line), "\n"] for line in train]
    unigrams = Counter(word for sentence in sentences for word in sentence[1:])
    total, types = sum(unigrams.values()), len(unigrams) + 1
    following = {}
    for sentence in sentences:
        for previous, word in pairwise(sentence):
            following.setdefault(previous, Counter())[word] += 1
    nats = {"unigram": 0.0, "bigram": 0.0}
    length = 0
    for line in test:
        sentence = ["\n", *tokens(line), "\n"]
        for previous, word in pairwise(sentence):
            unigram = (unigrams[word] + 1) / (total + types)
            row = following.get(previous, Counter())
            bigram = (row[word] + len(row) * unigram) / (sum(row.values()) + len(row) or 1)
            nats["unigram"] -= math.log(unigram)
            nats["bigram"] -= math.log(bigram or unigram)
            length += 1
    return {name: math.exp(value / length) for name, value in nats.items()}


def test_there_is_much_to_learn_beyond_words_and_word_pairs(corpus):
    bound = math.exp(entropy_bound(1, SIZES)["test"])
    perplexity = bigram_perplexity(corpus["train"], corpus["test"])
    assert 100 < perplexity["unigram"] < 300
    assert perplexity["bigram"] < perplexity["unigram"] / 3
    assert 5 < bound < perplexity["bigram"] / 2
