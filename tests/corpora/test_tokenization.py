"""The text steps against outputs of the Perl scripts they stand for.

GOLDEN was recorded with Perl 5.36 from tokenizer.perl (the rule of 2018-11-07 for the last dot
included) and normalize-punctuation.perl; outer blanks of the latter's output are cut off.
"""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacremoses import MosesTokenizer

from normexp.corpora.tokenization import STEPS, _Tokenizer, tokenize

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
]


@pytest.mark.parametrize(("step", "language", "line", "expected"), GOLDEN)
def test_equals_perl(step: str, language: str, line: str, expected: str) -> None:
    assert STEPS[step](line, language) == expected


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


DOTTED = st.text(alphabet="aZé1.§日", max_size=6) | st.sampled_from(["z.B.", "1.2.", "Dr.", "20."])


@given(st.lists(DOTTED).map(" ".join))
def test_faster_character_classes_change_nothing(line: str) -> None:
    """Up to the last dot, the tokenizer is sacremoses's."""
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
