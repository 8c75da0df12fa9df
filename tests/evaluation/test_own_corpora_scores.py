"""Scores of own corpora, computed a second time from the user's own files alone."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_cli import preprocess
from sacremoses import MosesTokenizer
from support.own_text import PAIRS, parallel, sides, write

from normexp.corpora import PreparedCorpus
from normexp.corpora.adding import add_corpus
from normexp.corpora.own_request import Request
from normexp.evaluation import bleu, scores, translations

PARTS = {"train": PAIRS[:250], "valid": PAIRS[250:280], "test": PAIRS[280:]}
# Written as in a newspaper: tokenizing it changes it, and detokenizing changes it back.
PLAIN = {
    split: [
        (a.replace(" .", "."), b.replace("J' ai", "Qu'ils aient").replace(" .", f" ({i})."))
        for i, (a, b) in enumerate(part)
    ]
    for split, part in PARTS.items()
}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMEXP_OWN_CORPORA", str(tmp_path / "own"))


def split_files(folder: Path, parts: dict[str, list[tuple[str, str]]]) -> dict[str, list[Path]]:
    files = {}
    for split, pairs in parts.items():
        (folder / split).mkdir(parents=True)
        files[split] = parallel(folder / split, pairs)
    return files


def added(tmp_path: Path, parts: dict, **options: Any) -> PreparedCorpus:
    files = split_files(tmp_path / "given", parts)
    request = Request("mine", files["train"], files["valid"], files["test"],
                      data_dir=tmp_path / "data", **options)  # fmt: skip
    return add_corpus(request).prepared


def wrong_lines(number: int) -> list[int]:
    """A "translation" of test: the reference of the same line, or at every third of the next."""
    return [(i + 1) % number if i % 3 == 0 else i for i in range(number)]


def measured(
    corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[str]]:
    """The metrics of a model that translates test by `wrong_lines`, and its translations."""
    task = TranslationTask.setup_task(
        TranslationConfig(
            data=str(corpus.data_bin), source_lang="cs", target_lang="fr", dataset_impl="mmap"
        )
    )
    task.load_dataset("test")

    def translate(loaded: Any, split: str, *_: Any) -> list[torch.Tensor]:
        data = task.dataset(split)
        return [data[i]["target"] for i in wrong_lines(len(data))]

    monkeypatch.setattr(scores, "translate", translate)
    monkeypatch.setattr(scores, "score", lambda *_: (100.0, 50))
    settings = SimpleNamespace(
        splits=["test"], max_tokens=0, beam=1, length_penalty=1.0, compound_split=False
    )
    loaded = scores.LoadedModel(None, task, None, torch.device("cpu"))
    metrics = scores.evaluate_translation(loaded, corpus, settings, tmp_path / "h", progress=False)
    again = translations.rescore(corpus, tmp_path / "h", "test", compound_split=False)
    assert again.items() <= metrics["test"].items()
    written = (tmp_path / "h" / "test.txt").read_text("utf-8").removesuffix("\n").split("\n")
    return metrics["test"], written


def word_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU of words between blanks, without smoothing."""
    return sacrebleu.corpus_bleu(
        hypotheses, [references], smooth_method="none", tokenize="none", force=True
    ).score


def test_plain_text_tokenized_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = added(tmp_path, PLAIN)
    metrics, written = measured(corpus, tmp_path, monkeypatch)
    references = sides(PLAIN["test"])[1]
    hypotheses = [references[i] for i in wrong_lines(len(references))]
    assert written == hypotheses
    tokenizer = MosesTokenizer("fr")
    tokens = [[" ".join(tokenizer.tokenize(line)) for line in lines]
              for lines in (hypotheses, references)]  # fmt: skip
    assert metrics["bleu_tokenised"] == pytest.approx(word_bleu(*tokens), abs=1e-4)
    assert metrics["sacrebleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert "tok:13a" in metrics["sacrebleu_signature"]
    assert 30 < metrics["sacrebleu"] < 95


def test_plain_text_of_a_sentencepiece_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("sentencepiece")
    text = write(tmp_path / "both", [line for pair in PLAIN["train"] for line in pair])
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=80, minloglevel=2
    )
    corpus = added(tmp_path, PLAIN, sentencepiece=tmp_path / "m.model")
    metrics, written = measured(corpus, tmp_path, monkeypatch)
    references = sides(PLAIN["test"])[1]
    hypotheses = [references[i] for i in wrong_lines(len(references))]
    assert written == hypotheses
    assert metrics["sacrebleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    tokenizer = MosesTokenizer("fr")
    tokens = [[" ".join(tokenizer.tokenize(line)) for line in lines]
              for lines in (hypotheses, references)]  # fmt: skip
    assert metrics["bleu_tokenised"] == pytest.approx(word_bleu(*tokens), abs=1e-4)


def in_pieces(pair: tuple[str, str], marks: str) -> tuple[str, str]:
    def cut(word: str) -> str:
        if marks == "sentencepiece":
            return f"\u2581{word[:3]} {word[3:]}".strip()
        return f"{word[:3]}@@ {word[3:]}" if word[3:] else word

    return tuple(" ".join(map(cut, line.split())) for line in pair)


def made_by_fairseq(tmp_path: Path, parts: dict) -> PreparedCorpus:
    files = split_files(tmp_path / "given", parts)
    prefixes = [f"--{split}pref={paths[0].with_suffix('')}" for split, paths in files.items()]
    arguments = [*prefixes, f"--destdir={tmp_path / 'bin'}", "--source-lang=cs", "--target-lang=fr"]
    preprocess.main(preprocess.options.get_preprocessing_parser().parse_args(arguments))
    return add_corpus(Request("mine", [tmp_path / "bin"], data_dir=tmp_path / "data")).prepared


@pytest.mark.parametrize("kind", ["tokenized", "tokenized, BPE", "segmented", "words", "data"])
def test_text_that_came_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its own tokens are scored, by blanks."""
    pieces = {s: [in_pieces(p, "subword_nmt") for p in part] for s, part in PARTS.items()}
    corpus = {
        "tokenized": lambda: added(tmp_path, PARTS, tokenized=True, bpe_merges=0),
        "tokenized, BPE": lambda: added(tmp_path, PARTS, tokenized=True, bpe_merges=40),
        "segmented": lambda: added(tmp_path, pieces, segmented="subword_nmt"),
        "words": lambda: made_by_fairseq(tmp_path, PARTS),
        "data": lambda: made_by_fairseq(tmp_path, pieces),
    }[kind]()
    metrics, written = measured(corpus, tmp_path, monkeypatch)
    references = sides(PARTS["test"])[1]
    hypotheses = [references[i] for i in wrong_lines(len(references))]
    assert written == hypotheses
    assert metrics["bleu_tokenised"] == pytest.approx(word_bleu(hypotheses, references), abs=1e-4)
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score
    assert metrics["sacrebleu"] == expected
    assert "tok:none" in metrics["sacrebleu_signature"]


def test_plain_text_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {s: [in_pieces(p, "sentencepiece") for p in part] for s, part in PLAIN.items()}
    corpus = added(tmp_path, pieces, segmented="sentencepiece")
    metrics, written = measured(corpus, tmp_path, monkeypatch)
    references = sides(PLAIN["test"])[1]
    hypotheses = [references[i] for i in wrong_lines(len(references))]
    assert written == hypotheses
    assert metrics["sacrebleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score


def test_unknown_words_of_binarized_references_never_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = [(a, f"{b} neuf{i}") for i, (a, b) in enumerate(PARTS["test"])]  # unknown to train
    corpus = made_by_fairseq(tmp_path, PARTS | {"test": test})
    metrics, written = measured(corpus, tmp_path, monkeypatch)
    lines = sides(PARTS["test"])[1]
    hypotheses = [f"{lines[i]} <unk>" for i in wrong_lines(len(lines))]
    assert written == hypotheses
    references = [f"{line} never" for line in lines]
    assert metrics["bleu_tokenised"] == pytest.approx(word_bleu(hypotheses, references), abs=1e-4)
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score
    assert metrics["sacrebleu"] == pytest.approx(expected)


@pytest.mark.parametrize(("language", "tokenizer"), [("zh", "zh"), ("ja", "char"), ("de", "13a")])
def test_tokenizer_of_the_language(language: str, tokenizer: str) -> None:
    """Chinese and Japanese have no blanks: 13a would score whole sentences as words."""
    if language == "ja":
        try:
            sacrebleu.metrics.BLEU(trg_lang="ja")
        except RuntimeError:
            pass
        else:
            tokenizer = "ja-mecab-"
    value, signature = bleu.sacre_bleu(["我们去学校了"], ["我们去学校吧"], False, language)
    assert f"tok:{tokenizer}" in signature
    assert (value > 50) == (language != "de")


WAYS = ["BPE", "words", "pieces", "sentencepiece", "data"]


@pytest.mark.parametrize("way", WAYS)
def test_perplexity_per_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The likelihood is shared by the words of the user's text and its ends of lines."""
    texts = {split: [a for a, _ in part] for split, part in PARTS.items()}
    marks = "sentencepiece" if way == "sentencepiece" else "subword_nmt"
    given = texts
    if way in ("pieces", "sentencepiece", "data"):
        given = {s: [in_pieces((t, ""), marks)[0] for t in part] for s, part in texts.items()}
    files = {split: write(tmp_path / f"{split}.cs", part) for split, part in given.items()}
    options: dict[str, Any] = {"BPE": {}, "words": {"bpe_merges": 0}}.get(way, {"segmented": marks})
    sources = [files["train"]]
    if way == "data":
        prefixes = [f"--{split}pref={path}" for split, path in files.items()]
        arguments = [*prefixes, f"--destdir={tmp_path / 'bin'}", "--only-source"]
        preprocess.main(preprocess.options.get_preprocessing_parser().parse_args(arguments))
        sources, options = [tmp_path / "bin"], {}
    else:
        options |= {"valid": [files["valid"]], "test": [files["test"]]}
    corpus = add_corpus(Request("mine", sources, data_dir=tmp_path / "data", **options)).prepared
    monkeypatch.setattr(scores, "score", lambda _, split, *__: (700.0, corpus.tokens(split)))
    settings = SimpleNamespace(splits=["valid", "test"], max_tokens=0, context_window=0)
    metrics = scores.evaluate_language_model(None, corpus, settings, causal=True, progress=False)
    for split in ("valid", "test"):
        words = sum(len(line.split()) + 1 for line in texts[split])
        assert metrics[split]["perplexity_per_word"] == pytest.approx(math.exp(700 / words))
        if way in ("pieces", "sentencepiece", "data"):
            tokens = sum(len(line.split()) + 1 for line in given[split])
            assert metrics[split]["perplexity_per_token"] == pytest.approx(math.exp(700 / tokens))
