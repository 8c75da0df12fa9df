"""The toy translation corpus, judged by rules of German that the generator does not share."""

import hashlib
import math
import re
from collections import Counter, defaultdict

import pytest
import sacrebleu

from normexp.corpora.toy.translation import generate

SIZES = {"train": 20_000, "valid": 500, "test": 500}
SUBORDINATORS = ["weil", "wenn", "obwohl", "während", "bevor", "nachdem", "damit", "sobald", "dass"]
GOLDEN = "9da44f85c1532432ad97579d193495d2de173fdfdecf601d396354ce056ce4e2"
NAMES = ["Anna", "Paul", "Maria", "Peter", "Lena", "Max", "Julia", "Felix", "Sophie", "Jonas"]


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module")
def corpus():
    return generate(1, SIZES)


@pytest.fixture(scope="module")
def german(corpus):
    return [pair[0] for pair in corpus["train"]]


def test_equal_seeds_give_the_same_text_everywhere():
    sample = generate(7, {"train": 200, "test": 20})
    text = "\n".join("\t".join(pair) for split in sample.values() for pair in split)
    # Guards against anything that depends on the machine, the Python version or its hash seed.
    # Recompute it when the grammar changes.
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN
    assert sample == generate(7, {"train": 200, "test": 20})


def test_other_seeds_give_other_text():
    first, second = (
        {german for german, _ in generate(seed, {"train": 1000})["train"]} for seed in (1, 2)
    )
    assert len(first & second) < 100


def test_sizes_are_kept_and_splits_share_no_sentence(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == SIZES
    for side in (0, 1):
        sentences = [pair[side] for pairs in corpus.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        generate(1, {"train": -1})


def test_the_english_sentence_is_a_function_of_the_german_one():
    translations = {}
    pairs = [pair for seed in range(10, 15) for pair in generate(seed, {"train": 10_000})["train"]]
    for german, english in pairs:
        assert translations.setdefault(german, english) == english
    assert len(translations) < len(pairs)  # some sentences did come twice


def test_raw_text_form(corpus):
    for german, english in corpus["train"]:
        for text in (german, english):
            assert re.fullmatch(r"[A-ZÄÖÜ].*[^\W\d_][.?]", text), text
            assert not re.search(r"\s[,.?]|\s\s|[,.?][,.?]|,\S", text), text
            assert 4 <= len(words(text)) <= 20, text
        assert german[-1] == english[-1]


def test_vocabulary_is_some_hundreds_of_words_with_a_zipfian_head(corpus):
    for side, low, high in ((0, 1500, 2500), (1, 600, 1000)):
        counts = Counter(w for pair in corpus["train"] for w in words(pair[side]))
        assert low < len(counts) < high
        frequencies = [math.log(count) for _, count in counts.most_common(400)]
        ranks = [math.log(rank) for rank in range(1, 401)]
        mean_rank, mean_frequency = sum(ranks) / 400, sum(frequencies) / 400
        slope = sum(
            (r - mean_rank) * (f - mean_frequency) for r, f in zip(ranks, frequencies, strict=True)
        ) / sum((r - mean_rank) ** 2 for r in ranks)
        assert -1.3 < slope < -0.6


def test_every_english_word_of_the_test_set_can_be_learned(corpus):
    seen = Counter(w.lower() for _, english in corpus["train"] for w in words(english))
    assert min(seen.values()) >= 8
    assert all(seen[w.lower()] for _, english in corpus["test"] for w in words(english))


def test_length_is_moderate(corpus):
    for side in (0, 1):
        lengths = [len(words(pair[side])) for pair in corpus["train"]]
        assert 8 <= sum(lengths) / len(lengths) <= 10


# ------------------------------------------------------------------------ agreement in German

# singular, genitive, plural, dative plural
NOUNS = {
    "m": """Mann Mannes Männer Männern, Hund Hundes Hunde Hunden, Tisch Tisches Tische Tischen,
        Lehrer Lehrers Lehrer Lehrern, Garten Gartens Gärten Gärten, Apfel Apfels Äpfel Äpfeln,
        Brief Briefes Briefe Briefen, Onkel Onkels Onkel Onkeln, Fuchs Fuchses Füchse Füchsen""",
    "f": """Frau Frau Frauen Frauen, Katze Katze Katzen Katzen, Tür Tür Türen Türen,
        Mutter Mutter Mütter Müttern, Stadt Stadt Städte Städten, Lampe Lampe Lampen Lampen,
        Köchin Köchin Köchinnen Köchinnen, Maus Maus Mäuse Mäusen""",
    "n": """Kind Kindes Kinder Kindern, Buch Buches Bücher Büchern, Haus Hauses Häuser Häusern,
        Mädchen Mädchens Mädchen Mädchen, Auto Autos Autos Autos, Pferd Pferdes Pferde Pferden,
        Fenster Fensters Fenster Fenstern, Zimmer Zimmers Zimmer Zimmern""",
}
# Declension as grammar books print it: what may stand before a noun of that gender and form.
PARADIGMS = {
    ("m", "singular"): """der alte, den alten, dem alten, im alten, vom alten, beim alten,
        zum alten, dieser alte, diesen alten, diesem alten, jeder alte, jeden alten, jedem alten,
        ein alter, einen alten, einem alten, kein alter, keinen alten""",
    ("m", "genitive"): "des alten, dieses alten, eines alten",
    ("f", "singular"): """die alte, der alten, zur alten, diese alte, dieser alten, jede alte,
        jeder alten, eine alte, einer alten, keine alte, keiner alten""",
    ("n", "singular"): """das alte, dem alten, im alten, ins alte, vom alten, beim alten,
        zum alten, dieses alte, diesem alten, jedes alte, jedem alten, ein altes, einem alten,
        kein altes""",
    ("n", "genitive"): "des alten, dieses alten, eines alten",
    ("p", "plural"): """die alten, diese alten, keine alten, zwei alte, drei alte, vier alte,
        fünf alte, zehn alte, viele alte, einige alte""",
    (
        "p",
        "dative plural",
    ): """den alten, diesen alten, keinen alten, zwei alten, drei alten, vier alten,
        fünf alten, zehn alten, vielen alten, einigen alten""",
}


def allowed_before_nouns():
    """Noun form → set of (determiner, ending of an adjective on the stem "alt")."""
    allowed = defaultdict(set)
    for gender, table in NOUNS.items():
        for entry in table.split(","):
            singular, genitive, plural, dative_plural = entry.split()
            forms = {
                (gender, "singular"): singular,
                (gender, "genitive"): genitive,
                ("p", "plural"): plural,
                ("p", "dative plural"): dative_plural,
            }
            for key, form in forms.items():
                for phrase in PARADIGMS.get(key, "").split(","):
                    if not phrase.strip():
                        continue
                    determiner, adjective = phrase.split()
                    ending = adjective.removeprefix("alt")
                    allowed[form].add((determiner, ending))
                    if match := re.fullmatch("(k?)ein(|e|en|em|er|es)", determiner):
                        stems = ["mein", "dein", "sein", "unser"]
                        allowed[form] |= {(stem + match[2], ending) for stem in stems}
    return allowed


def test_articles_and_adjectives_agree_with_nouns(german):
    allowed = allowed_before_nouns()
    determiners = {determiner for pairs in allowed.values() for determiner, _ in pairs}
    checked = Counter()
    for sentence in german:
        tokens = words(sentence[0].lower() + sentence[1:])
        for before, previous, noun in zip(["", *tokens], tokens, tokens[1:], strict=False):
            if noun not in allowed:
                continue
            if previous in determiners:
                assert previous in {determiner for determiner, _ in allowed[noun]}, sentence
                checked["determiner"] += 1
            else:
                ending = re.search("(e|en|er|es)$", previous)
                assert ending and (before, ending[0]) in allowed[noun], sentence
                checked["adjective"] += 1
    assert checked["determiner"] > 5000
    assert checked["adjective"] > 1000


# ---------------------------------------------------------------------------------- word order

# All finite singular forms but these end in -t.
SINGULAR_WITHOUT_T = {"kann", "muss", "will", "soll", "darf", "wird", "war", "weiß"}


def is_third_singular(verb):
    return verb in SINGULAR_WITHOUT_T or verb.endswith("t")


def is_third_plural(verb):
    return verb.endswith("n") or verb == "sind"


def clauses_with_conjunction(german):
    """Words between a subordinating conjunction and the comma or full stop that ends its clause."""
    pattern = rf"(?:^|, )(?:{'|'.join(SUBORDINATORS)}) ([^,.?]*)[,.?]"
    for sentence in german:
        for match in re.finditer(pattern, sentence[0].lower() + sentence[1:]):
            yield match[1].split()


def test_subordinate_clauses_end_with_a_finite_verb_that_agrees(german):
    singular = plural = 0
    for clause in clauses_with_conjunction(german):
        if clause[0] not in NAMES:
            continue
        if clause[1] == "und":
            assert is_third_plural(clause[-1]), clause
            plural += 1
        else:
            assert is_third_singular(clause[-1]), clause
            singular += 1
    assert singular > 300 and plural > 200


def test_the_verb_at_the_end_tells_she_from_they(corpus):
    conjunctions = {"weil": "because", "dass": "that", "obwohl": "although", "während": "while"}
    seen = Counter()
    for german, english in corpus["train"]:
        for conjunction, translation in conjunctions.items():
            for match in re.finditer(rf"\b{conjunction} sie ([^,.?]*)[,.?]", german.lower()):
                pronoun = "she" if is_third_singular(match[1].split()[-1]) else "they"
                assert f"{translation} {pronoun} " in english.lower(), german
                seen[pronoun] += 1
    assert seen["she"] > 50 and seen["they"] > 50


def test_main_clauses_have_the_finite_verb_second(german):
    adverbs = "Heute|Gestern|Morgen|Abends|Bald|Jetzt|Wieder|Am Montag|Im Sommer"
    named = fronted = 0
    for sentence in german:
        first = re.match(rf"({'|'.join(NAMES)}) (und \w+ )?(\w+)", sentence)
        if first and first[2]:
            assert is_third_plural(first[3]), sentence
        elif first:
            assert is_third_singular(first[3]), sentence
            named += 1
        inverted = re.match(rf"(?:{adverbs}) (\w+) ({'|'.join(NAMES)})( und)?", sentence)
        if inverted:
            assert (is_third_plural if inverted[3] else is_third_singular)(inverted[1]), sentence
            fronted += 1
    assert named > 1000 and fronted > 100


def test_separable_verbs_are_split_in_main_clauses_and_joined_in_others(corpus):
    verbs = {
        ("ruft", "an"): "calls",
        ("macht", "auf"): "opens",
        ("macht", "zu"): "closes",
        ("holt", "ab"): "collects",
        ("lädt", "ein"): "invites",
        ("steht", "auf"): "gets up",
    }
    for (verb, particle), translation in verbs.items():
        seen = Counter()
        for german, english in corpus["train"]:
            if not re.search(rf"\b{translation}\b", english):
                continue
            joined = any(
                clause[-1] == particle + verb for clause in clauses_with_conjunction([german])
            )
            split = re.search(rf"\b{verb}\b[^.]* {particle}[,.?]", german)
            relative = re.search(rf", d(?:er|ie|as) [^,]*{particle}{verb}[,.]", german)
            assert joined or split or relative, german
            seen.update(joined=joined, split=bool(split))
        assert seen["joined"] and seen["split"]


def test_case_decides_who_acts_on_whom(corpus):
    pattern = rf"(?:Den|Einen|Diesen|Meinen) (?:\w+ )?[A-Z]\w+ \w+ ({'|'.join(NAMES)}) (?!und)"
    matches = 0
    for german, english in corpus["train"]:
        if match := re.match(pattern, german):
            assert english.startswith(match[1]), german
            matches += 1
    assert matches > 15


def test_a_phrase_that_could_be_subject_or_object_opens_a_clause_as_the_subject(corpus):
    determiners = "Die|Das|Eine|Ein|Diese|Dieses|Jede|Meine|Mein|Zwei|Drei|Vier|Fünf|Zehn"
    pattern = rf"(?:{determiners}) (?:[a-z]\w+ )?[A-Z]\w+ \w+ ({'|'.join(NAMES)})\b"
    matches = 0
    for german, english in corpus["train"]:
        if match := re.match(pattern, german):
            assert not english.startswith(match[1]), german
            matches += 1
    assert matches > 50


def test_case_decides_between_in_and_into(corpus):
    seen = Counter()
    for german, english in corpus["train"]:
        for form, translation in (("ins", "into the"), ("im", "in the")):
            for match in re.finditer(rf"\b{form} (\w+)", german.replace("Im ", "im ")):
                if match[1] not in ("Sommer", "Winter"):
                    assert translation in english.lower(), german
                    seen[form] += 1
    assert seen["ins"] > 50 and seen["im"] > 50


def test_english_verbs_agree_with_their_subjects(corpus):
    name = "|".join(NAMES)
    seen = Counter()
    for german, english in corpus["train"]:
        # Simple present in German and, as nothing is denied, in English.
        if "nicht" in german or not (
            match := re.match(rf"(?:{name}) (?:und (\w+) )?(\w+)", german)
        ):
            continue
        first, *rest = words(english.partition(" and ")[2] if match[1] else english)[1:]
        verb = rest[0] if first in ("often", "always", "never", "sometimes", "rarely") else first
        if match[1] and match[2].endswith("en") and verb not in ("will", "can", "must", "may"):
            seen["plural"] += 1
            assert not verb.endswith("s"), english
        if not match[1] and match[2].endswith("t") and match[2] not in ("hat", "ist"):
            seen["singular"] += 1
            assert verb.endswith("s"), english
    assert seen["plural"] > 100 and seen["singular"] > 300


def test_compounds_are_translated_part_by_part_and_new_ones_turn_up_in_the_test_set(corpus):
    modifiers = {"Haus": "house", "Garten": "garden", "Küchen": "kitchen", "Holz": "wood"}
    heads = {"tür": "door", "tisch": "table", "auto": "car", "buch": "book", "lampe": "lamp"}
    pattern = rf"({'|'.join(modifiers)})({'|'.join(heads)})\b"
    compounds = 0
    for german, english in corpus["train"]:
        for modifier, head in re.findall(pattern, german):
            assert f"{modifiers[modifier]} {heads[head]}" in english
            compounds += 1
    assert compounds > 25
    known = {word for german, _ in corpus["train"] for word in words(german)}
    parts = rf"(?:{'|'.join(modifiers)})[a-zäöü]{{3,}}"
    unseen = {
        word
        for split in ("valid", "test")
        for german, _ in corpus[split]
        for word in words(german)
        if word not in known and re.fullmatch(parts, word)
    }
    assert len(unseen) >= 3


# ------------------------------------------------------------------- what a lookup table cannot do


def word_translation_model(pairs, rounds=4):
    """IBM model 1 without empty word: German word → English word → probability."""
    model = defaultdict(lambda: defaultdict(lambda: 1.0))
    for _ in range(rounds):
        counts = defaultdict(lambda: defaultdict(float))
        for german, english in pairs:
            for target in english:
                total = sum(model[source][target] for source in german)
                for source in german:
                    counts[source][target] += model[source][target] / total
        model = {
            source: defaultdict(float, {target: c / sum(row.values()) for target, c in row.items()})
            for source, row in counts.items()
        }
    return model


def test_word_order_has_to_be_learned(corpus):
    """Neither the best word for each word nor the right words in German order get far."""
    pairs = [(words(german), words(english)) for german, english in corpus["train"][:3000]]
    model = word_translation_model(pairs)
    lookup, right_words, references = [], [], []
    for german, english in corpus["test"]:
        source, target = words(german), words(english)
        best = {word: max(row, key=row.get) for word, row in model.items() if word in source}
        lookup.append(" ".join(best.get(word, word) for word in source))

        def position(word, source=source):
            return max(range(len(source)), key=lambda i: model.get(source[i], {}).get(word, 0.0))

        right_words.append(" ".join(sorted(target, key=position)))
        references.append(" ".join(target))
    bleu = {
        name: sacrebleu.corpus_bleu(output, [references], tokenize="none", force=True).score
        for name, output in (("lookup", lookup), ("right words", right_words))
    }
    assert bleu["lookup"] < 45
    assert bleu["right words"] < 60
