"""What a user gives as a corpus: which files, splits, columns and languages it consists of."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normexp.corpora.parallel_text import Row
from normexp.corpora.source_text import SourceText, aligned
from normexp.corpora.tables import SPLIT_NAMES, Table, find_tables, is_table
from normexp.errors import UserError

LANGUAGE = re.compile(r"(?!(gz|zip|tar|tgz)$)[a-z]{2,3}")  # not what packed files end with


@dataclass(frozen=True)
class GivenSplit:
    """The rows of one split. where: for messages; files: what is read."""

    where: str
    files: tuple[Path, ...]
    rows: Callable[[], Iterator[Row]]
    texts: tuple[SourceText, ...] = ()


@dataclass
class GivenTexts:
    """A corpus as given. sides: 1 for a language model; notes: what the user should know."""

    sides: int
    languages: list[str]
    splits: dict[str, GivenSplit]
    notes: list[str] = field(default_factory=list)


def find_texts(
    sources: list[Path],
    valid: list[Path],
    test: list[Path],
    languages: list[str],
    columns: list[str],
) -> GivenTexts:
    """The texts in files or in one folder.

    sources: one file or folder, or two aligned files; valid, test: likewise, or empty; languages,
    columns: as far as the user has said. Raises UserError where it is not clear what is meant.
    """
    texts = _found(sources, valid, test, languages, columns)
    codes, sides = texts.languages, texts.sides
    if len(codes) != sides:
        needed = "one is needed: there is one text" if sides == 1 else "two are needed"
        raise UserError(f"--languages {' '.join(codes)}: {needed}")
    if len(set(codes)) != sides:
        raise UserError(
            f"source and target have the same code {codes[0]}, by which their files are named; "
            f"give one side another, such as --languages {codes[0]} qaa (tokenized as English is)"
        )
    return texts


def _found(
    sources: list[Path],
    valid: list[Path],
    test: list[Path],
    languages: list[str],
    columns: list[str],
) -> GivenTexts:
    for path in [*sources, *valid, *test]:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
    if sources[0].is_dir():
        if len(sources) > 1 or valid or test:
            raise UserError(
                f"{sources[0]} is a folder: it is given alone and holds the splits, in files whose "
                "names begin with train, valid and test"
            )
        return _in_folder(sources[0], languages, columns)
    given = (
        {"train": sources} | ({"valid": valid} if valid else {}) | ({"test": test} if test else {})
    )
    if is_table(sources[0]):
        tables = {}
        for split, paths in given.items():
            if len(paths) != 1 or not is_table(paths[0]):
                raise UserError(f"{split}: one file with rows is expected, as {sources[0]} is")
            tables[split] = Table(tuple(paths))
        return _of_tables(tables, languages, columns)
    if columns:
        raise UserError("--columns is for rows (JSON lines, CSV, Parquet, Arrow), not plain text")
    return _of_files(given, languages)


def _of_files(given: dict[str, list[Path]], languages: list[str]) -> GivenTexts:
    sides = len(given["train"])
    if sides > 2:
        raise UserError(
            f"{sides} files: give one for a language model or two aligned ones for translation"
        )
    for split, paths in given.items():
        if len(paths) != sides:
            raise UserError(f"{split} has {len(paths)} files and train has {sides}")
        if any(path.is_dir() for path in paths):
            raise UserError(f"{split}: a folder is given alone, for all splits")
    notes = []
    if not languages:
        languages = [_suffix(path) for path in given["train"]]
        if sides == 1 and not LANGUAGE.fullmatch(languages[0]):
            languages = ["en"]
            notes.append("language en, as none is said by --languages or the file's name")
        elif sides == 2 and not all(map(LANGUAGE.fullmatch, languages)):
            names = " and ".join(path.name for path in given["train"])
            raise UserError(
                f"which languages are {names}? Add --languages SOURCE TARGET, such as "
                "--languages cs fr, or let the names end with .cs and .fr"
            )
    for split, paths in given.items():
        found = [_suffix(path) for path in paths]
        if sides == 2 and found != languages and sorted(found) == sorted(languages):
            raise UserError(
                f"{split}: {paths[0].name} and {paths[1].name} are in the other order than the "
                f"languages, {languages[0]} and {languages[1]}"
            )
    splits = {split: _files(paths) for split, paths in given.items()}
    return GivenTexts(sides, languages, splits, notes)


def _files(paths: list[Path]) -> GivenSplit:
    texts = tuple(map(SourceText, paths))
    where = " and ".join(map(str, paths))
    return GivenSplit(where, tuple(paths), lambda: aligned(list(texts)), texts)


def _suffix(path: Path) -> str:
    """The language that a file's name ends with; "" if it may be something else."""
    end = path.name.removesuffix(".gz").rpartition(".")[2]
    return end if re.fullmatch("[a-z]{2}", end) else ""


def _in_folder(folder: Path, languages: list[str], columns: list[str]) -> GivenTexts:
    if found := find_tables(folder):
        tables, others = found
        texts = _of_tables(tables, languages, columns)
        if others:
            texts.notes.append(f"not used: {', '.join(others)}")
        return texts
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        words = re.findall(r"[a-z]+", path.name.removesuffix(".gz").lower())
        split = next((SPLIT_NAMES[word] for word in words[:-1] if word in SPLIT_NAMES), None)
        if split:
            files.setdefault(split, {}).setdefault(words[-1], path)
    if "train" not in files:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise UserError(
            f"{folder} holds no corpus ({held}). Known are fairseq's data folders (dict.txt, "
            "train.idx, ...), data sets of Hugging Face's (save_to_disk, or train.jsonl, .csv, "
            ".parquet), and texts named train.cs, train.fr, valid.cs, ..., or train.txt"
        )
    ends = list(files["train"])
    if languages and set(languages) <= set(ends):
        ends = languages
    elif len(ends) > 1:
        raise UserError(
            f"{folder} has train in {', '.join(ends)}: choose by --languages SOURCE TARGET"
        )
    given = {}
    for split, paths in files.items():
        if lacking := [end for end in ends if end not in paths]:
            raise UserError(f"{folder} lacks {split}.{lacking[0]}")
        given[split] = [paths[end] for end in ends]
    return _of_files(given, languages)


def _of_tables(tables: dict[str, Table], languages: list[str], columns: list[str]) -> GivenTexts:
    cells = tables["train"].columns()
    where = tables["train"].files[0]
    nested = isinstance(cells.get("translation"), dict) and "translation" not in columns
    if nested:
        cells = cells["translation"]
    names = [name for name, value in cells.items() if isinstance(value, str)]
    shown = f"{where} has the columns {', '.join(map(str, cells))}"
    if not columns:
        if len(languages) == 2 and set(languages) <= set(cells):
            columns = languages
        elif nested and len(names) == 2:
            columns = names
        elif len(languages) < 2 and "text" in names:
            columns = ["text"]
        elif len(names) == 1:
            columns = names
        else:
            raise UserError(
                f"{shown}: choose by --columns TEXT for a language model, or --columns SOURCE "
                "TARGET"
            )
    if lacking := [name for name in columns if name not in cells]:
        raise UserError(f"{shown}; there is no {lacking[0]!r}")
    if len(columns) > 2:
        raise UserError("--columns takes one column or two")
    notes = [f"columns: {', '.join(columns)}"]
    if not languages:
        if all(map(LANGUAGE.fullmatch, columns)) and len(columns) == 2:
            languages = columns
        elif len(columns) == 2:
            raise UserError(
                f"which languages are the columns {' and '.join(columns)}? Add --languages SOURCE "
                "TARGET"
            )
        else:
            languages = ["en"]
            notes.append("language en, as none is said by --languages")

    def split(name: str, table: Table) -> GivenSplit:
        label = f"{name} ({table.files[0].parent if len(table.files) > 1 else table.files[0]})"
        return GivenSplit(label, table.files, lambda: _cells(table, columns, nested))

    splits = {name: split(name, table) for name, table in tables.items()}
    return GivenTexts(len(columns), languages, splits, notes)


def _cells(table: Table, columns: list[str], nested: bool) -> Iterator[Row]:
    """The text of the columns: one line a row, or all lines of a language model's row."""
    for where, cells in table.rows():
        values: Any = cells.get("translation") if nested else cells
        row = [values.get(name) for name in columns] if isinstance(values, dict) else [None]
        for name, text in zip(columns, row, strict=False):
            if not isinstance(text, str):
                raise UserError(f"{where}: the cell {name!r} holds no text but {text!r}")
        if len(row) == 1:
            yield from ((line,) for line in re.split(r"\r\n|\n|\r", row[0]))
        else:
            yield tuple(re.sub(r"\s*[\r\n]+\s*", " ", text) for text in row)
