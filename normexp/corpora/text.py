"""The text stage: the recipe's steps, the held-out lines, and BPE."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, product
from pathlib import Path

from tqdm import tqdm

from normexp.corpora.bpe import learn_codes
from normexp.corpora.catalogue import CLEAN, STEP_TEXTS, Corpus
from normexp.corpora.cleaning import clean_rows
from normexp.corpora.parallel_text import Row, open_text, read_rows, row_writer, write_rows
from normexp.corpora.process_pool import map_rows
from normexp.corpora.segmentation import BpeSegmenter, SentencePieceSegmenter, joined
from normexp.corpora.tokenization import STEPS, TOKENIZERS
from normexp.errors import UserError

TOKENIZED, SEGMENTED, REFERENCE, CODES = "tokenized", "bpe", "reference", "bpe.codes"
MODEL = "sentencepiece.model"


def build_text(
    corpus: Corpus,
    raw: Path,
    folder: Path,
    workers: int,
    progress: bool,
    trained: Path | None = None,
) -> dict:
    """Make `folder` from the plain text in `raw`; return the number of words per split.

    ``tokenized/<split>.<language>`` is the text after the steps, ``bpe/<split>.<language>`` after
    BPE, ``reference/<split>.<target>`` the untouched target text. All files of one split have the
    same lines in the same order. Of text that comes in pieces, ``bpe/`` has the pieces and the
    other two the words they make. BPE codes and sentencepiece models that the corpus brings lie in
    `raw` under the name of their archive.

    trained: a finished text stage whose BPE codes are taken instead of those of the train split.
    """
    tokenize_splits(corpus, raw, folder, workers, progress)
    if corpus.segmented:
        (folder / SEGMENTED).mkdir()
        for split, language in product(corpus.splits, corpus.languages):
            pieces = final_text(corpus, split, language, folder)
            shutil.copyfile(raw / pieces.name, pieces)
    elif corpus.bpe:
        if corpus.sentencepiece:
            shutil.copyfile(raw / corpus.sentencepiece, folder / MODEL)
        elif corpus.bpe_codes:
            shutil.copyfile(raw / corpus.bpe_codes, folder / CODES)
        elif trained:
            shutil.copyfile(trained / CODES, folder / CODES)
        else:
            learn_bpe(corpus, folder, progress)
        segment_splits(corpus, folder, workers, progress)
    return {split: _words(corpus, split, folder) for split in corpus.splits}


def tokenize_splits(corpus: Corpus, raw: Path, folder: Path, workers: int, progress: bool) -> None:
    """Apply the recipe's steps and hold out the lines that valid or test take from train.

    Where the catalogue has hashes of the text between two steps, that text is kept as
    ``steps/<split>.<step before>.<language>``. Raises UserError if a split is left without a line.
    """
    for split in corpus.splits:
        if not corpus.splits[split].every:
            paths = [raw / f"{split}.{language}" for language in corpus.languages]
            # The raw target is one more column, so that it is kept or dropped with its row.
            paths += paths[1:]
            rows = tqdm(read_rows(paths), f"{corpus.name} {split}", disable=not progress)
            if corpus.segmented:
                rows = (tuple(joined(text, corpus.segmented) for text in row) for row in rows)
            with contextlib.ExitStack() as stack:
                rows = _apply_steps(corpus, split, rows, workers, folder, stack)
                _write_split(corpus, split, rows, folder)
    for split in corpus.splits:
        if not (folder / TOKENIZED / f"{split}.{corpus.languages[0]}").stat().st_size:
            raise UserError(f"corpus {corpus.name}: the recipe leaves no line in {split}")


def learn_bpe(corpus: Corpus, folder: Path, progress: bool) -> None:
    """Learn one BPE on the train texts of all languages, in their order.

    Raises UserError where there is nothing to learn.
    """
    with contextlib.ExitStack() as stack:
        texts = [
            stack.enter_context(open_text(folder / TOKENIZED / f"train.{language}"))
            for language in corpus.languages
        ]
        codes = stack.enter_context(open_text(folder / CODES, "w"))
        if not any(len(word) > 1 for line in chain(*texts) for word in line.split()):
            raise UserError(
                f"corpus {corpus.name}: no word of train has two characters for a BPE to merge; "
                "take words as tokens (bpe_merges: 0, --bpe-merges 0)"
            )
        for text in texts:
            text.seek(0)
        learn_codes(chain(*texts), codes, corpus.bpe_merges, progress)


def segment_splits(corpus: Corpus, folder: Path, workers: int, progress: bool) -> None:
    """Apply the BPE, and what the recipe has `after_bpe`, to every split."""
    columns = len(corpus.languages)
    if corpus.sentencepiece:
        segmenter = SentencePieceSegmenter((folder / MODEL).read_bytes(), columns)
    else:
        segmenter = BpeSegmenter((folder / CODES).read_text(encoding="utf-8"), columns)
    for split in corpus.splits:
        _segment(corpus, split, segmenter, folder, workers, progress)


def final_text(corpus: Corpus, split: str, language: str, folder: Path) -> Path:
    """The file of the text stage that is binarized."""
    return folder / (SEGMENTED if corpus.bpe else TOKENIZED) / f"{split}.{language}"


@dataclass(frozen=True)
class _Steps:
    """Steps applied to the first columns of a row; the others pass."""

    steps: tuple[str, ...]
    languages: tuple[str, ...]

    def __call__(self, row: Row) -> Row:
        texts = []
        for text, language in zip(row, self.languages, strict=False):
            for step in self.steps:
                text = STEPS[step](text, language)
            texts.append(text)
        return (*texts, *row[len(texts) :])


def _apply_steps(
    corpus: Corpus,
    split: str,
    rows: Iterable[Row],
    workers: int,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Iterable[Row]:
    for cleaning, group in groupby(corpus.splits[split].steps, key=CLEAN.__eq__):
        steps = tuple(group)
        if cleaning:
            rows = clean_rows(rows, **corpus.clean.model_dump())
        else:
            rows = map_rows(_Steps(steps, tuple(corpus.languages)), rows, workers)
        names = [f"{split}.{steps[-1]}.{language}" for language in corpus.languages]
        if corpus.kept_step_texts.intersection(names):
            paths = [folder / STEP_TEXTS / name for name in names]
            rows = _copied(rows, stack.enter_context(row_writer(paths)), len(paths))
    if not set(TOKENIZERS).isdisjoint(corpus.splits[split].steps):
        rows = _with_single_blanks(rows, len(corpus.languages))
    return rows


def _with_single_blanks(rows: Iterable[Row], columns: int) -> Iterator[Row]:
    """Remove the blanks that the tokenizer leaves behind some last words."""
    for row in rows:
        texts = (" ".join(text.split()) if text.strip() else text for text in row[:columns])
        yield (*texts, *row[columns:])


def _copied(rows: Iterable[Row], write: Callable[[Row], None], columns: int) -> Iterator[Row]:
    for row in rows:
        write(row[:columns])
        yield row


def _paths(corpus: Corpus, split: str, folder: Path) -> list[Path]:
    """Where the columns of a split go: the texts and, for translation, the reference."""
    texts = [folder / TOKENIZED / f"{split}.{language}" for language in corpus.languages]
    return texts + [folder / REFERENCE / f"{split}.{target}" for target in corpus.languages[1:]]


def _write_split(corpus: Corpus, split: str, rows: Iterable[Row], folder: Path) -> None:
    """Write a split; lines of train that other splits hold out are written there."""
    every = {name: recipe.every for name, recipe in corpus.splits.items() if recipe.every}
    held_out = every if split == "train" else {}
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(row_writer(_paths(corpus, name, folder)))
            for name in [split, *held_out]
        }
        for number, row in enumerate(rows, 1):
            name = next((name for name, n in held_out.items() if number % n == 0), split)
            writers[name](row)


def _segment(
    corpus: Corpus,
    split: str,
    segmenter: Callable[[Row], Row],
    folder: Path,
    workers: int,
    progress: bool,
) -> None:
    paths = _paths(corpus, split, folder)
    rows = tqdm(read_rows(paths), f"{corpus.name} {split} BPE", disable=not progress)
    rows = map_rows(segmenter, rows, workers)
    targets = [folder / SEGMENTED / f"{split}.{language}" for language in corpus.languages]
    if not corpus.splits[split].after_bpe:
        write_rows((row[: len(targets)] for row in rows), targets)
        return
    # Cleaning drops rows, so the files that were read have to be written anew.
    kept = [path.with_name(path.name + ".kept") for path in paths]
    write_rows(clean_rows(rows, **corpus.clean.model_dump()), targets + kept)
    for path, new in zip(paths, kept, strict=True):
        os.replace(new, path)


def _words(corpus: Corpus, split: str, folder: Path) -> dict[str, int]:
    counts = {}
    for language in corpus.languages:
        with open_text(folder / TOKENIZED / f"{split}.{language}") as file:
            counts[language] = sum(len(line.split()) for line in file)
    return counts
