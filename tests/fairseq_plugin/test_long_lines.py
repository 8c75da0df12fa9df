"""Lines that fit neither the model nor a batch, against the lengths in the prepared text."""

from pathlib import Path

import pytest
from support.small_runs import composed

from normexp import pipeline
from normexp.config.fairseq_config import trainer_config
from normexp.config.settings import RunSettings
from normexp.config.validation import validate
from normexp.corpora import PreparedCorpus, prepare
from normexp.errors import UserError
from normexp.fairseq_plugin.long_lines import refuse_long_lines
from normexp.runs.folder import RunFolder

KEY = "fairseq.dataset.max_tokens"
COMPLETE = "fairseq.task.sample_break_mode=complete"


def corpus_of(task: str, folder: Path) -> PreparedCorpus:
    return prepare(task, folder)


def lines(corpus: PreparedCorpus, name: str) -> list[list[str]]:
    """The tokens of each line of the text before it was binarized."""
    path = corpus.directory / "text" / "bpe" / name
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()]


def refuse(corpus: PreparedCorpus, split: str, max_tokens: int | None, *overrides: str) -> None:
    settings: RunSettings = composed(f"task={corpus.name}", *overrides)
    languages = None
    if corpus.kind == "translation":
        languages = corpus.source_language, corpus.target_language
    typed = validate(settings).fairseq
    cfg = trainer_config(typed, corpus.data_bin, languages, Path("unused"))
    refuse_long_lines(cfg, split, max_tokens, KEY)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_longest_line_may_be_as_long_as_a_block(split: str, little_text: Path) -> None:
    corpus = corpus_of("toy_language_model", little_text)
    text = lines(corpus, f"{split}.en")
    longest = max(len(words) for words in text) + 1  # and its end
    refuse(corpus, split, None, COMPLETE, f"fairseq.task.tokens_per_sample={longest}")
    number = [len(words) + 1 for words in text].index(longest) + 1
    begin = " ".join(text[number - 1][:6])
    with pytest.raises(UserError) as refused:
        refuse(corpus, split, None, COMPLETE, f"fairseq.task.tokens_per_sample={longest - 1}")
    assert f"line {number} of {split} ('{begin} ...') has {longest} tokens" in str(refused.value)
    assert f"more than fairseq.task.tokens_per_sample={longest - 1}" in str(refused.value)


def test_what_limits_a_line_is_named(little_text: Path) -> None:
    corpus = corpus_of("toy_language_model", little_text)
    for overrides, max_tokens, message in (
        ([COMPLETE], 5, f"more than {KEY}=5, and [0-9]+ more lines do"),
        ([COMPLETE, "+fairseq.task.max_target_positions=4"], 99, "more than fairseq.task.max_targ"),
        ([], 63, rf"tokens_per_sample=64 makes blocks of more tokens than {KEY}=63"),
        (["+fairseq.task.max_target_positions=9"], None, r"fairseq.task.max_target_positions=9"),
    ):
        with pytest.raises(UserError, match=message):
            refuse(corpus, "train", max_tokens, *overrides)
    refuse(corpus, "train", 64)  # blocks are cut wherever lines end


def test_both_sides_of_a_translation_are_looked_at(little_text: Path) -> None:
    corpus = corpus_of("toy_translation", little_text)
    from fairseq.data import data_utils

    sides = {}
    for side, language in (("source", "de"), ("target", "en")):
        text = data_utils.load_indexed_dataset(str(corpus.data_bin / f"train.de-en.{language}"))
        sizes = text.sizes.tolist()
        sides[side] = max(sizes), sizes.index(max(sizes)) + 1
        for group in ("task", "model"):
            key = f"fairseq.{group}.max_{side}_positions"
            refuse(corpus, "train", None, f"+{key}={max(sizes)}")
            with pytest.raises(
                UserError,
                match=rf"line {sizes.index(max(sizes)) + 1} of train\.de-en\.{language} .* has "
                rf"{max(sizes)} tokens, more than {key}={max(sizes) - 1}",
            ):
                refuse(corpus, "train", None, f"+{key}={max(sizes) - 1}")
    longest = max(length for length, _ in sides.values())
    refuse(corpus, "train", longest)
    with pytest.raises(UserError, match=f"has {longest} tokens, more than {KEY}={longest - 1}"):
        refuse(corpus, "train", longest - 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([COMPLETE, "fairseq.task.tokens_per_sample=8"], "line 1 of train .*tokens_per_sample=8"),
        (["+fairseq.dataset.max_tokens_valid=50"], "more tokens than fairseq.dataset.max_tokens_v"),
        (["evaluation.max_tokens=50"], "more tokens than evaluation.max_tokens=50"),
    ],
)
def test_a_run_says_so_before_it_trains(
    more: list[str], message: str, overrides, little_text: Path
) -> None:
    settings = composed(*overrides("toy_language_model", f"data.dir={little_text}", *more))
    with pytest.raises(UserError, match=message):
        pipeline.run(settings)
    assert not list(RunFolder(settings.run_dir).checkpoints.glob("*.pt"))
