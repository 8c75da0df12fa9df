"""The text steps against outputs of the Perl scripts they stand for.

GOLDEN was recorded with Perl 5.36 from tokenizer.perl (the rule of 2018-11-07 for the last dot
included), detokenizer.perl and normalize-punctuation.perl, of mosesdecoder 34452895; outer blanks
of the last one's output are cut off. moses_characters.jsonl.gz has 2,500 lines with a character
each in one of five contexts, and what tokenizer.perl makes of them.
"""

import gzip
import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from sacremoses import MosesTokenizer

from normexp.corpora import chunk_tokenizer, tokenization
from normexp.corpora.chunk_tokenizer import ChunkTokenizer
from normexp.corpora.tokenization import (
    STEPS,
    TOKENIZERS,
    _Normalizer,
    _Tokenizer,
    apply_step,
    detokenize,
    tokenize,
)

GOLDEN = [
    ("tokenize", "en", "He works for the U.S.", "He works for the U.S ."),
    ("tokenize", "en", "I met Dr. Smith and Mr. Jones Jr.", "I met Dr. Smith and Mr. Jones Jr ."),
    ("tokenize", "en", "See No. 5 and No. five.", "See No. 5 and No. five ."),
    ("tokenize", "en", "It costs $1,000.50, not 3,5!", "It costs $ 1,000.50 , not 3,5 !"),
    ("tokenize", "en", "Wait... what?!", "Wait ... what ? !"),
    (
        "tokenize",
        "en",
        "\"Don't,\" she said; 'tis 50% off.",
        "&quot; Don &apos;t , &quot; she said ; &apos; tis 50 % off .",
    ),
    (
        "tokenize",
        "en",
        "The well-known e-mail (a@b.org) is here.",
        "The well-known e-mail ( a @ b.org ) is here .",
    ),
    ("tokenize", "en", "a|b [c] <d> & e", "a &#124; b &#91; c &#93; &lt; d &gt; &amp; e"),
    ("tokenize", "en", "x\xa0y\tz\u2028end.", "x y z end ."),
    ("tokenize", "en", "  spaced   out  ", "spaced out"),
    ("tokenize", "en", "In 1998 Prof. X. Y. left Oct. 5.", "In 1998 Prof. X. Y. left Oct. 5 ."),
    (
        "tokenize",
        "en",
        "O'Neil's 90's rock'n'roll",
        "O &apos;Neil &apos;s 90 &apos;s rock &apos;n&apos;roll",
    ),
    ("tokenize", "en", "He said: 'It is 10'.", "He said : &apos; It is 10 &apos; ."),
    ("tokenize", "en", "", ""),
    ("tokenize", "en", "and so on etc.", "and so on etc ."),
    ("tokenize", "en", "Version 2.0.1. is out", "Version 2.0.1. is out"),
    ("tokenize", "en", "A\x1fB control\x07char", "AB controlchar"),
    ("tokenize", "en", "trailing CR\r", "trailing CR"),
    ("tokenize", "en", "Yes.)", "Yes . )"),
    ("tokenize", "en", "J.R.R. Tolkien, Ph.D.", "J.R.R. Tolkien , Ph.D ."),
    (
        "tokenize_aggressive",
        "en",
        "The well-known e-mail (a@b.org) is here.",
        "The well @-@ known e @-@ mail ( a @ b.org ) is here .",
    ),
    ("tokenize", "de", "Er wohnt in der Hauptstr. 5, usw.", "Er wohnt in der Hauptstr . 5 , usw ."),
    (
        "tokenize",
        "de",
        "Am 20. Mai, z.B. um 3.30 Uhr, kam Hr. Maier.",
        "Am 20. Mai , z.B. um 3.30 Uhr , kam Hr . Maier .",
    ),
    ("tokenize", "de", "Das ist die Nr. 28.", "Das ist die Nr. 28 ."),
    ("tokenize", "de", "„Geht's?“ fragte sie – ja!", "„ Geht &apos; s ? “ fragte sie – ja !"),
    (
        "tokenize",
        "de",
        "Das SPD-nahe Institut (1.000 Mitglieder) u.a.",
        "Das SPD-nahe Institut ( 1.000 Mitglieder ) u.a .",
    ),
    ("tokenize", "de", "Wir haben 3,5 Mio. Euro.", "Wir haben 3,5 Mio. Euro ."),
    ("tokenize", "de", "Ab dem 1.", "Ab dem 1 ."),
    (
        "tokenize",
        "de",
        "Straße 'rauf' und 'runter'...",
        "Straße &apos; rauf &apos; und &apos; runter &apos; ...",
    ),
    ("tokenize", "de", "etc.", "etc ."),
    ("tokenize", "de", "Dr.", "Dr ."),
    (
        "tokenize_aggressive",
        "de",
        "Das SPD-nahe Institut (1.000 Mitglieder) u.a.",
        "Das SPD @-@ nahe Institut ( 1.000 Mitglieder ) u.a .",
    ),
    (
        "normalize_punctuation",
        "en",
        "He said “yes”, «no» – it’s 5 % .",
        'He said "yes," "no" - it\'s 5% .',
    ),
    ("normalize_punctuation", "en", "(a ) b( c )", "(a) b (c)"),
    ("normalize_punctuation", "en", "\xab\xa0x\xa0\xbb \u2026 \xb4y\xb4", "\"x\" ... 'y'"),
    ("normalize_punctuation", "en", '1\xa0000 \u2014 done".', '1.000 - done."'),
    ("normalize_punctuation", "de", '„Ja“, sagte sie. "Gut."', '"Ja", sagte sie. "Gut".'),
    ("normalize_punctuation", "de", 'Er sagte "Nein".', 'Er sagte "Nein".'),
    ("normalize_punctuation", "de", "1\xa0000 \xbbWort\xab", '1,000 "Wort"'),
    ("normalize_punctuation", "de", '"Was", fragte er,"ist?"', '"Was", fragte er",ist?"'),
    (
        "tokenize",
        "fr",
        "L'été, qu'il l'a dit 'ainsi' aujourd'hui.",
        "L&apos; été , qu&apos; il l&apos; a dit &apos; ainsi &apos; aujourd&apos; hui .",
    ),
    (
        "tokenize",
        "it",
        "L'Italia dell'arte, 'sì'.",
        "L&apos; Italia dell&apos; arte , &apos; sì &apos; .",
    ),
    ("tokenize", "ga", "d'ith sé 'ubh'", "d&apos; ith sé &apos; ubh&apos;"),
    ("tokenize", "ca", "l'home d'avui 'bo'", "l&apos; home d&apos; avui &apos; bo&apos;"),
    ("tokenize", "so", "Ka'aay lo'da 'x' 5'6", "Ka&apos;aay lo&apos;da &apos; x &apos; 5 &apos; 6"),
    (
        "tokenize",
        "cs",
        "„Je to 5,5 e-mailu,“ řekl 'on' tzv. dnes, atd.",
        "„ Je to 5,5 e-mailu , “ řekl &apos; on &apos; tzv. dnes , atd .",
    ),
    (
        "tokenize",
        "fi",
        "EU:n 20:een USA:ssa: 5:3 Klo:X ja:9.",
        "EU:n 20:een USA:ssa : 5 : 3 Klo : X ja : 9 .",
    ),
    ("tokenize", "sv", "USA:s S:t Eriks: 5:e 3:1", "USA:s S:t Eriks : 5:e 3 : 1"),
    ("tokenize", "zh", "中文，日本語。한국 a中文b", "中文 ， 日本語 。 한국 a中文b"),
    ("tokenize", "ko", "한국, 한국어.", "한국 , 한국어 ."),
    ("tokenize", "hi", "नमस्ते 5,५", "नमस ् ते 5,५"),
    (
        "tokenize",
        "en",
        "a中文b 'კარგი' კ. ქართული. 中's",
        "a中文b &apos; კარგი &apos; კ. ქართული . 中 &apos;s",
    ),
    ("tokenize", "de", "von 日. auf 日本. straße. x", "von 日. auf 日本. straße. x"),
    ("tokenize", "en", "\x1c", ""),
    ("tokenize", "en", "x٣,٣ ٣'s ½'s Ⅷ's", "x٣,٣ ٣ &apos;s ½ &apos; s Ⅷ &apos;s"),
    ("normalize_punctuation", "en", "1\xa0٣ 5\xa0000 ٣ % 5 %", "1\xa0٣ 5.000 ٣ % 5%"),
    ("normalize_punctuation", "cs", "1\xa0000 „x“, ٣ %", '1,000 "x", ٣ %'),
    (
        "normalize_punctuation",
        "fr",
        '« oui » 5\xa0% «\xa0x\xa0» ."\u2003a',
        '" oui " 5% "x" ".\u2003a',
    ),
]


@pytest.mark.parametrize(("step", "language", "line", "expected"), GOLDEN)
def test_equals_perl(step: str, language: str, line: str, expected: str) -> None:
    assert STEPS[step](line, language) == expected


DETOKENIZED = [
    ("cs", "má číslo 28 .", "má číslo 28."),
    ("cs", "stojí 5 , 5 korun a 3 . 4 . 5 bodů", "stojí 5,5 korun a 3.4.5 bodů"),
    ("cs", "pošli e - mail dnes , je - li čas", "pošli e-mail dnes, je-li čas"),
    ("cs", "řekl je' - li čas", "řekl je' - li čas"),
    ("cs", "„ Ano , “ řekla .", "„Ano,“ řekla."),
    ("fr", "l' été , qu' il a 5 % ? « oui »", "l'été, qu'il a 5 % ? « oui »"),
    ("fr", "x ა' ბ", "x ა'ბ"),
    ("en", "კ 'ბ ₿ 5 it 's don 't 日 本 's", "კ'ბ ₿5 it's don't 日本's"),
    ("en", "a &amp; b @-@ c &#91; d &#93; &quot; q &quot; 10 &apos; .", 'a & b-c [d] "q" 10 \'.'),
    ("de", "„ Ja “ , sagte er , &quot; nein &quot; &apos; s", '„Ja“, sagte er, "nein" \'s'),
    ("en", "( ₿ 5 ) , $ 6", "(₿5), $6"),
]


@pytest.mark.parametrize(("language", "line", "expected"), DETOKENIZED)
def test_detokenizer_equals_perl(language: str, line: str, expected: str) -> None:
    assert detokenize(line, language) == expected


def test_characters_of_every_kind_are_tokenized_as_perl_does() -> None:
    path = Path(__file__).with_name("moses_characters.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        recorded = [json.loads(line) for line in file]
    assert len(recorded) == 2_500
    for language in ("en", "de"):
        for option, step in (("", "tokenize"), ("-a", "tokenize_aggressive")):
            expected = [line[language + option] for line in recorded]
            assert [STEPS[step](line["line"], language) for line in recorded] == expected


needs_unicode_14 = pytest.mark.skipif(
    unicodedata.unidata_version != "14.0.0",
    reason="the list of the characters of Unicode 14, Perl 5.36's, is that of Python 3.11",
)


def characters_of_unicode_14(*without: str) -> list[str]:
    """All of them, without surrogates and the categories given."""
    without = ("Cn", "Cs", *without)
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in without]


@needs_unicode_14
@pytest.mark.parametrize(
    ("characters", "sha256"),
    [
        ("_ALPHA", "1aa7fd76ac709006bf9f2a951072c9d2a38964a064167d23a5fa70434746fc15"),
        ("_ALNUM", "4a35310c8ae4420f55a17609cbb75302ca75755708786b9d886fa81b5515fd87"),
        ("_LOWER", "ac85bf34dc85a1cf1210665af6e144e0dd8572dbd0fe2d0e86338b4b9a3d1524"),
    ],
)
def test_classes_are_those_of_perl(characters: str, sha256: str) -> None:
    """sha256 of one digit for each character of Unicode 14: whether Perl 5.36 finds it in
    IsAlpha, IsAlnum, IsLower."""
    pattern = regex.compile(getattr(tokenization, characters), regex.VERSION1)
    digits = "".join("01"[bool(pattern.match(c))] for c in characters_of_unicode_14())
    assert len(digits) == 282_230
    assert hashlib.sha256(digits.encode()).hexdigest() == sha256


# Context, and the sha256 of tokenizer.perl's output for every character in it, in English without
# options and in German with -a; runs of blanks are one blank.
EVERY_CHARACTER = [
    (
        "a{c}{c}b",
        "92ac7d8a637c2f0331d206821f01145cfcddb4373a449f141f36ec473aa49592",
        "92ac7d8a637c2f0331d206821f01145cfcddb4373a449f141f36ec473aa49592",
    ),
    (
        "{c}a, 1{c},{c}2",
        "aa83262c47dfd329eab7d9a3373423301f7fcf730ec20a86ee9627345c9ff504",
        "904fb19b1d71607f5ae15087dd30c4d7e655393074e1a4cdcebf49785e4a57ab",
    ),
    (
        "x{c}-{c}y {c}.",
        "40ce93ad894fa3e6c19554aa04a998a19a0110bdc7587be4182354eb50ff7065",
        "01d8a1257fe185ef8e4197fb0b937a7e01726893fdf39d3828032e0fd2cda521",
    ),
    (
        "it{c}'{c}s {c}/{c}",
        "a882b9f1fa2748d33f7a0a875dab44772025e428808b677a2de0084d25ac0e2d",
        "f820a300aad5afad2004eee25c4f3a761aef81cd03e99a92599422da702f4e1b",
    ),
    (
        "{c}{c} ({c}{c}). {c}.",
        "f157552c99e13b9552cff422a7eb16f4c66678eea757b0efd7f4fa14030b0ac7",
        "f157552c99e13b9552cff422a7eb16f4c66678eea757b0efd7f4fa14030b0ac7",
    ),
    (
        "Foo. {c}bar etc. {c} {c}.{c}. x",
        "e6990dd71d579928dbb0e62334e8ea776344de8d847fc59089f5154d7a837a59",
        "7fcd83fbed02901aefeba7232a23fde9ad5a985285405029c2111cf9d13fd448",
    ),
    (
        "'{c}' 1'{c} {c},'s,{c} {c}'",
        "4ab44e3be5bb1d5c709e466e5e4e6d01876a45e3055f1aa43569cb56c98f5a42",
        "a6fce6017d27edb026722427fe60058c6e918d9a0d4750b04057544fee99b911",
    ),
    (
        "w:{c} {c}:{c} ..{c} {c}..",
        "d921d934f056b476d634547729504f082b2e19389e4ba9f60eb16e5920b79773",
        "d921d934f056b476d634547729504f082b2e19389e4ba9f60eb16e5920b79773",
    ),
    (
        "No. {c} {c} a.{c}. B {c},",
        "a163432dba8de78f83131c29a7e7fe3607e6827f7fb68ee4f63244a9b54da49b",
        "bdfb2b8df78ab053ae2bf6aa10acbc59f7d5122cfc1ed3ffc75a714281c6bbfd",
    ),
]


@needs_unicode_14
@pytest.mark.thorough
@pytest.mark.parametrize(("context", "english", "german"), EVERY_CHARACTER)
def test_every_character_is_tokenized_as_perl_does(context: str, english: str, german: str) -> None:
    characters = [c for c in characters_of_unicode_14("Co") if c != "\n"]
    characters += ["\ue000", "\uf8ff", "\U000f0000", "\U0010fffd"]  # some for private use
    lines = [context.replace("{c}", character) for character in characters]
    for step, language, sha256 in (
        ("tokenize", "en", english),
        ("tokenize_aggressive", "de", german),
    ):
        output = "\n".join(" ".join(STEPS[step](line, language).split()) for line in lines)
        assert hashlib.sha256(output.encode()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("step", "line", "expected"),
    [
        ("lowercase", "ÄÖÜ ẞ ΣΑΣ", "äöü ß σασ"),
        ("remove_non_printing", "a\u00adb\tc\u200bd", "a b c d"),
        ("ascii_apostrophe", "it\u2019s \u2018so\u2019", "it's \u2018so'"),
        ("normalize_punctuation", "so \u2019\u00ab\u00a0a", 'so ""a'),
        ("tokenize", " \u00a0 ", " \u00a0 "),
        ("tokenize", "", ""),
        ("tokenize", "a\u00a0b\u0085c\u2028d\re", "a b c d e"),
        ("tokenize", "a\x1cb\x1dc\x1ed\x1fe", "abcde"),
        ("tokenize", "Es sind 10'", "Es sind 10 &apos;"),
    ],
    ids=[
        "no final sigma",
        "a blank each",
        "only U+2019",
        "as Perl, not as sacremoses",
        "blank line",
        "empty line",
        "any blank is one",
        "separators of information go",
        "last apostrophe",
    ],
)
def test_rules(step: str, line: str, expected: str) -> None:
    assert STEPS[step](line, "de") == expected


@pytest.mark.parametrize(
    ("language", "line", "new", "old"),
    [
        ("de", "Das ist Nr.", "Nr .", "Nr."),
        ("de", "Am 20.", "20 .", "20."),
        ("de", "und so weiter, usw.", "usw .", "usw."),
        ("en", "in the U.S.", "U.S .", "U.S."),
        ("en", "Hello Mr.", "Mr .", "Mr."),
        ("en", "So ...", "...", "..."),
        ("en", "So it is.", "is .", "is ."),
    ],
)
def test_last_dot(language: str, line: str, new: str, old: str) -> None:
    """The one rule by which sacremoses differs from Moses since 2018-11-07."""
    assert tokenize(line, language).endswith(f" {new}")
    assert MosesTokenizer(language).tokenize(line, return_str=True).endswith(f" {old}")


def test_prefixes_with_windows_line_ends_match_nothing() -> None:
    """What makes 7,284 validation pairs of IWSLT14: the CR stays part of every prefix."""
    tokenizer = _Tokenizer("de")
    assert len(tokenizer.NONBREAKING_PREFIXES) == 307
    assert len(_Tokenizer("en").NONBREAKING_PREFIXES) == 105
    line = "Dr. Maier kam am 20. Mai."
    assert " ".join(tokenizer.tokenize(line)) == "Dr. Maier kam am 20. Mai ."
    prefixes = [f"{prefix}\r" for prefix in tokenizer.NONBREAKING_PREFIXES]
    tokenizer.NONBREAKING_PREFIXES = tokenizer.NUMERIC_ONLY_PREFIXES = prefixes
    assert " ".join(tokenizer.tokenize(line)) == "Dr . Maier kam am 20 . Mai ."


DOTTED = st.text(alphabet="aZé1.§", max_size=6) | st.sampled_from(["z.B.", "1.2.", "Dr.", "20."])


@given(st.lists(DOTTED).map(" ".join))
def test_rules_about_dots_are_those_of_sacremoses(line: str) -> None:
    """Up to the last dot, the tokenizer is sacremoses's for characters that its lists have."""
    line = f"{line} x"
    assert tokenize(line, "de").split() == MosesTokenizer("de").tokenize(line)


def test_published_counts_of_multi30k_are_those_before_the_last_dot_rule(local_data) -> None:
    """The corpus's own tokenized test set has 12,103 words; one sentence ends in "nummer 10."."""
    content = gzip.decompress((local_data / "multi30k" / "test_2016_flickr.de.gz").read_bytes())
    lines = content.decode().lower().split("\n")[:-1]
    normalized = [STEPS["normalize_punctuation"](line, "de") for line in lines]
    old = MosesTokenizer("de")
    assert sum(len(old.tokenize(line)) for line in normalized) == 12_103
    assert sum(len(tokenize(line, "de").split()) for line in normalized) == 12_104


# What the rules tell apart, alone or in a row: letters, digits, marks, blanks, control characters,
# abbreviations, and what tokenization itself uses.
PIECES = st.sampled_from(
    [*"aAsé中1½५.,'-`\"(:_&ßⓐ", *" \u00a0\t\x1c\x07\u200b", "  ", " '", "' ", "..", "Dr.", "No.",
     "z.B.", "20.", "DOTMULTI", chunk_tokenizer._SEPARATOR]
)  # fmt: skip
LINES = st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=10)


@example(["1' '2", "'2 x", ",5 x", "x 2'", "x 2.'"], "tokenize", "en")
@given(
    LINES,
    st.sampled_from(TOKENIZERS),
    st.sampled_from(["en", "de", "fr", "fi", "so", "zh"]),
)
def test_many_lines_are_tokenized_as_each_alone(lines: list[str], step: str, language: str) -> None:
    assert apply_step(step, lines, language) == [STEPS[step](line, language) for line in lines]


@pytest.mark.parametrize("step", ["normalize_punctuation", "remove_non_printing", *TOKENIZERS])
@pytest.mark.parametrize("language", ["de", "en"])
def test_steps_on_real_text(local_data, step: str, language: str) -> None:
    content = gzip.decompress((local_data / "multi30k" / f"val.{language}.gz").read_bytes())
    lines = content.decode().split("\n")[:-1]
    assert apply_step(step, lines, language) == [STEPS[step](line, language) for line in lines]


@pytest.mark.parametrize("full", [False, True])
def test_words_are_tokenized_once(monkeypatch, full: bool) -> None:
    """By the rules go only new chunks that are not letters alone, and lines that must be whole."""
    if full:
        monkeypatch.setattr(chunk_tokenizer, "MAX_CHUNKS", 3)
    tokenized = []

    def by_rules(line: str) -> str:
        tokenized.append(line)
        return tokenize(line, "en")

    tokenizer = ChunkTokenizer(by_rules, str.islower)
    lines = ["Dr. A met x-y, z.", "Well, x-y is 5,000.", "'Tis x-y."]
    expected = [tokenize(line, "en") for line in lines]
    assert tokenizer(lines) == expected
    new, whole = tokenized
    assert set(new.split(" \ue000 ")) == {"a", "Dr. A", "x-y", ",", ".", "5,000"}
    assert whole == "'Tis x-y."
    assert tokenizer(lines) == expected
    assert (tokenized[2:] == ["'Tis x-y."]) is not full


MARKS = st.text(alphabet="a1 .,%()':;`\"<–—‘’«»…nºCcm?!\u00a0\r\t", max_size=30)


@given(MARKS, st.sampled_from(["en", "de", "cs", "fi"]))
def test_normalizer_leaves_out_only_rules_without_effect(line: str, language: str) -> None:
    normalizer = _Normalizer(language)
    expected = line
    for (rule, by), required in zip(normalizer.substitutions, normalizer.required, strict=True):
        changed = rule.sub(by, expected)
        assert changed == expected or required in expected, rule
        expected = changed
    assert normalizer.normalize(line) == expected.strip()


def test_printable_characters_are_not_of_category_c() -> None:
    """Python's Unicode, which is asked first, may be older than that of regex."""
    for character in map(chr, range(0x110000)):
        if character.isprintable():
            assert not regex.match(r"\p{C}", character)


def test_what_python_calls_letters_stays_whole() -> None:
    letters = "".join(filter(str.isalpha, map(chr, range(0x110000))))
    assert tokenize(letters, "en") == letters
