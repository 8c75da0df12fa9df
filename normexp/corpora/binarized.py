"""Data that fairseq-preprocess has made already: a folder with dictionaries and .bin/.idx files.

Its text is recovered from the numbers: references and numbers of words come from there.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from normexp.corpora.catalogue import SPLITS, Corpus
from normexp.errors import UserError

if TYPE_CHECKING:
    from fairseq.data import Dictionary

# In place of an unknown token in recovered text: a model can write <unk>, which must not match.
UNKNOWN = "\u2047"


@dataclass(frozen=True)
class DataBin:
    """The layout of a data folder. languages: source and target; None for a language model."""

    folder: Path
    languages: tuple[str, str] | None

    @classmethod
    def find(cls, folder: Path) -> "DataBin | None":
        """The layout of a folder, None if it has no dictionary of fairseq's.

        Raises UserError if files are missing, or several language pairs are there, or a second part
        of train, which fairseq would read behind the first.
        """
        if not list(folder.glob("dict*.txt")):
            return None
        pairs = {
            tuple(found[1].split("-"))
            for path in folder.glob("train.*.idx")
            if (found := re.fullmatch(r"train\.([^.-]+-[^.-]+)\.[^.]+\.idx", path.name))
        }
        if len(pairs) > 1:
            shown = ", ".join(sorted("-".join(pair) for pair in pairs))
            raise UserError(f"{folder} has several language pairs ({shown}); give each a folder")
        if parts := sorted(folder.glob("train1.*")):
            raise UserError(
                f"{folder} has train in several parts ({parts[0].name}), which fairseq reads as "
                "one; join the texts and binarize them again"
            )
        found = cls(folder, pairs.pop() if pairs else None)
        missing = [name for name in found.files() if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {', '.join(missing[:4])}; train, valid and test are needed: "
                "fairseq-preprocess --srcdict, with a dictionary that is there, makes another split"
            )
        return found

    def sides(self) -> tuple[str, ...]:
        """Suffixes of the dictionaries: ``.<language>`` of each, or the empty one."""
        return tuple(f".{language}" for language in self.languages) if self.languages else ("",)

    def prefix(self, split: str, side: str) -> Path:
        """The path of a split's data without .bin and .idx."""
        pair = f".{'-'.join(self.languages)}" if self.languages else ""
        return self.folder / f"{split}{pair}{side}"

    def files(self) -> list[str]:
        """Names of all files that are read."""
        data = [self.prefix(split, side).name for split in SPLITS for side in self.sides()]
        dictionaries = [f"dict{side}.txt" for side in self.sides()]
        return dictionaries + [f"{name}.{end}" for name in data for end in ("bin", "idx")]

    def dictionary(self, side: str) -> "Dictionary":
        """fairseq's dictionary of a side. Raises UserError if it is damaged."""
        from fairseq.data import Dictionary

        path = self.folder / f"dict{side}.txt"
        try:
            return Dictionary.load(str(path))
        except (ValueError, RuntimeError, UnicodeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path} is not a dictionary of fairseq's: {reason}") from None

    def sentences(self, split: str, side: str, dictionary: "Dictionary") -> Iterator[np.ndarray]:
        """The numbers of every sentence, the end of sentence last.

        Raises UserError for numbers that the dictionary does not have, and where the end of
        sentence is missing: perplexity and BLEU count on it.
        """
        path = self.prefix(split, side)
        for number, tokens in enumerate(_items(path), 1):
            if not len(tokens) or tokens[-1] != dictionary.eos() or tokens.max() >= len(dictionary):
                raise UserError(
                    f"{path}.bin, sentence {number}: it does not end with the end of sentence, or "
                    f"has numbers beyond the {len(dictionary)} of dict{side}.txt; binarize the "
                    "text with fairseq-preprocess and this dictionary"
                )
            yield tokens

    def lines(self, split: str, side: str, dictionary: "Dictionary") -> Iterator[str]:
        """The text of every sentence, in pieces as it was binarized."""
        symbols = np.array(
            [UNKNOWN if i == dictionary.unk() else s for i, s in enumerate(dictionary.symbols)],
            dtype=object,
        )
        for tokens in self.sentences(split, side, dictionary):
            yield " ".join(symbols[tokens[:-1]])


def decoded(corpus: Corpus, split: str, progress: bool) -> Iterator[tuple[str, ...]]:
    """The rows of a binarized corpus as text. Raises UserError if sides differ in length."""
    data = _data_of(corpus, corpus.folder)
    columns = [data.lines(split, side, data.dictionary(side)) for side in data.sides()]
    rows = zip(*columns, strict=True)
    try:
        yield from tqdm(rows, f"{corpus.name} {split} text", disable=not progress)
    except ValueError:
        raise UserError(f"{data.folder}: the sides of {split} differ in their lengths") from None


def copy_binary(corpus: Corpus, folder: Path, progress: bool) -> dict:
    """Copy the data of a binarized corpus into `folder`; return counts as `build_binary` does."""
    for files in tqdm(corpus.archives.values(), f"{corpus.name} copy", disable=not progress):
        shutil.copyfile(corpus.folder / files[0].file, folder / files[0].file)
    data = _data_of(corpus, folder)
    types, splits = {}, {}
    for language, side in zip(corpus.languages, data.sides(), strict=True):
        dictionary = data.dictionary(side)
        types[language] = len(dictionary)
        for split in SPLITS:
            counts = _counts(data.sentences(split, side, dictionary), dictionary.unk())
            record = splits.setdefault(split, {"sentences": counts.pop("sentences")})
            for quantity, value in counts.items():
                record.setdefault(quantity, {})[language] = value
    return {"dictionary_types": types, "splits": splits}


def _data_of(corpus: Corpus, folder: Path) -> DataBin:
    return DataBin(folder, tuple(corpus.languages) if corpus.is_parallel else None)


def _counts(sentences: Iterable[np.ndarray], unknown: int) -> dict[str, Any]:
    lengths, unknowns = [], 0
    for tokens in sentences:
        lengths.append(len(tokens))
        unknowns += int((tokens == unknown).sum())
    lengths = np.array(lengths, dtype="<i4")
    return {
        "sentences": len(lengths),
        "tokens": int(lengths.sum()),
        "unknown": unknowns,
        "longest": int(lengths.max(initial=0)),
        "lengths_sha256": hashlib.sha256(lengths.tobytes()).hexdigest(),
    }


def _items(path: Path) -> Iterator[np.ndarray]:
    from fairseq.data.indexed_dataset import infer_dataset_impl, make_dataset

    try:
        form = infer_dataset_impl(str(path))
        # The older form is read from memory by training, and item by item here.
        dataset = form and make_dataset(
            str(path), "lazy" if form == "cached" else form, fix_lua_indexing=True
        )
        items = len(dataset) if dataset else 0
        for i in range(items):
            yield dataset[i].numpy()
    except (AssertionError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}.idx and .bin cannot be read: {error}") from None
    if not items:
        raise UserError(f"{path}.idx has no sentence that fairseq reads")
