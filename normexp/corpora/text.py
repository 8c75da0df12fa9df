"""The text stage: the recipe's steps, the held-out lines, and BPE."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, product
from pathlib import Path

from normexp.corpora.bpe import learn_codes
from normexp.corpora.catalogue import CLEAN, STEP_TEXTS, Corpus
from normexp.corpora.cleaning import Cleaner
from normexp.corpora.parallel_text import (
    Block,
    Columns,
    Row,
    block_of,
    block_writer,
    columns_of,
    open_text,
    read_blocks,
)
from normexp.corpora.process_pool import map_blocks
from normexp.corpora.segmentation import BpeSegmenter, SentencePieceSegmenter, joined
from normexp.corpora.tokenization import TOKENIZERS, apply_step
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
            blocks = read_blocks(paths, f"{corpus.name} {split}", progress)
            with contextlib.ExitStack() as stack:
                blocks = _apply_steps(corpus, split, blocks, workers, folder, stack)
                _write_split(corpus, split, blocks, folder)
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


Part = Callable[[Columns], Columns]


@dataclass
class _Parts:
    """Parts of a recipe, one after the other, over a block.

    returned: numbers of the parts whose text is returned; the last one's always is, as last.
    """

    parts: list[Part]
    returned: tuple[int, ...] = ()

    def __call__(self, block: Block) -> list[Block]:
        columns, blocks = columns_of(block), []
        for number, part in enumerate(self.parts):
            columns = part(columns)
            if number in self.returned:
                blocks.append(block_of(columns))
        return [*blocks, block_of(columns)]

    def over(self, blocks: Iterable[Block], workers: int) -> Iterator[list[Block]]:
        """What becomes of every block, in order."""
        blocks = iter(blocks)
        # What the first pair decides for all others has to be known before they are distributed.
        cleaners = [part for part in self.parts if isinstance(part, Cleaner)]
        while any(cleaner.factored is None for cleaner in cleaners):
            if (block := next(blocks, None)) is None:
                return
            yield self(block)
        yield from map_blocks(self, blocks, workers)


def _apply_steps(
    corpus: Corpus,
    split: str,
    blocks: Iterable[Block],
    workers: int,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Iterator[Block]:
    """The text after the steps. That between steps is written where the catalogue has its hash."""
    parts: list[Part] = [partial(_join_pieces, corpus.segmented)] if corpus.segmented else []
    writers = {}
    for step in corpus.splits[split].steps:
        if step == CLEAN:
            parts.append(Cleaner(**corpus.clean.model_dump()))
        else:
            parts.append(partial(_apply_step, step, corpus.languages))
        names = [f"{split}.{step}.{language}" for language in corpus.languages]
        if corpus.kept_step_texts.intersection(names):
            paths = [folder / STEP_TEXTS / name for name in names]
            writers[len(parts) - 1] = stack.enter_context(block_writer(paths))
    if not set(TOKENIZERS).isdisjoint(corpus.splits[split].steps):
        parts.append(partial(_with_single_blanks, len(corpus.languages)))
    for *between, block in _Parts(parts, tuple(writers)).over(blocks, workers):
        for write, text in zip(writers.values(), between, strict=True):
            write(text[: len(corpus.languages)])
        yield block


def _join_pieces(marks: str, columns: Columns) -> Columns:
    return [[joined(text, marks) for text in texts] for texts in columns]


def _apply_step(step: str, languages: list[str], columns: Columns) -> Columns:
    """The step applied to the first columns; the others pass."""
    changed = [
        apply_step(step, texts, language)
        for texts, language in zip(columns, languages, strict=False)
    ]
    return changed + columns[len(changed) :]


def _with_single_blanks(number: int, columns: Columns) -> Columns:
    """Remove the blanks that the tokenizer leaves behind some last words of the first columns."""
    changed = [
        [" ".join(text.split()) if text.strip() else text for text in texts]
        for texts in columns[:number]
    ]
    return changed + columns[number:]


def _paths(corpus: Corpus, split: str, folder: Path) -> list[Path]:
    """Where the columns of a split go: the texts and, for translation, the reference."""
    texts = [folder / TOKENIZED / f"{split}.{language}" for language in corpus.languages]
    return texts + [folder / REFERENCE / f"{split}.{target}" for target in corpus.languages[1:]]


def _write_split(corpus: Corpus, split: str, blocks: Iterable[Block], folder: Path) -> None:
    """Write a split; lines of train that other splits hold out are written there."""
    every = {name: recipe.every for name, recipe in corpus.splits.items() if recipe.every}
    held_out = every if split == "train" else {}
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(block_writer(_paths(corpus, name, folder)))
            for name in [split, *held_out]
        }
        numbers = count(1)
        for block in blocks:
            if not held_out:
                writers[split](block)
                continue
            chosen: dict[str, list[Row]] = {name: [] for name in writers}
            for row in zip(*columns_of(block), strict=True):
                number = next(numbers)
                name = next((name for name, n in held_out.items() if number % n == 0), split)
                chosen[name].append(row)
            for name, rows in chosen.items():
                if rows:
                    writers[name](block_of(zip(*rows, strict=True)))


def _segment(
    corpus: Corpus,
    split: str,
    segmenter: Part,
    folder: Path,
    workers: int,
    progress: bool,
) -> None:
    paths = _paths(corpus, split, folder)
    blocks = read_blocks(paths, f"{corpus.name} {split} BPE", progress)
    targets = [folder / SEGMENTED / f"{split}.{language}" for language in corpus.languages]
    if not corpus.splits[split].after_bpe:
        with block_writer(targets) as write:
            for (block,) in _Parts([segmenter]).over(blocks, workers):
                write(block[: len(targets)])
        return
    # Cleaning drops rows, so the files that were read have to be written anew.
    kept = [path.with_name(path.name + ".kept") for path in paths]
    parts = _Parts([segmenter, Cleaner(**corpus.clean.model_dump())])
    with block_writer(targets + kept) as write:
        for (block,) in parts.over(blocks, workers):
            write(block)
    for path, new in zip(paths, kept, strict=True):
        os.replace(new, path)


def _words(corpus: Corpus, split: str, folder: Path) -> dict[str, int]:
    counts = {}
    for language in corpus.languages:
        with open_text(folder / TOKENIZED / f"{split}.{language}") as file:
            counts[language] = sum(len(line.split()) for line in file)
    return counts
