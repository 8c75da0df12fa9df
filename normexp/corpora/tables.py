"""Rows of data sets as Hugging Face's `datasets` saves or exports them.

Arrow (`save_to_disk`), Parquet (needs pyarrow), JSON lines and CSV.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normexp.corpora.source_text import SourceText, open_source
from normexp.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
_ENDS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
Cells = dict[str, Any]


def is_table(path: Path) -> bool:
    """Whether a file holds rows with named cells, by its name; it may be gzipped."""
    return path.name.lower().removesuffix(".gz").endswith(_ENDS)


@dataclass(frozen=True)
class Table:
    """The rows of one split, from one or several files in their order."""

    files: tuple[Path, ...]

    def rows(self) -> Iterator[tuple[str, Cells]]:
        """(where it stands, cells by column) of each row. Raises UserError for damaged files."""
        for path in self.files:
            read = _READERS[Path(path.name.lower().removesuffix(".gz")).suffix]
            for number, row in enumerate(read(path), 1):
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: not an object with named cells")
                yield f"{path}, row {number}", row

    def columns(self) -> Cells:
        """The first row. Raises UserError if there is none."""
        for _, row in self.rows():
            return row
        raise UserError(f"{self.files[0]} has no rows")


def find_tables(folder: Path) -> tuple[dict[str, Table], list[str]] | None:
    """The splits of a folder and the names of parts that are none; None if it holds no tables.

    Raises UserError where it is not clear which files belong to which split.
    """
    if (folder / "state.json").is_file():
        return {"train": _saved(folder)}, []
    if (folder / "dataset_dict.json").is_file():
        try:
            names = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'dataset_dict.json'} is damaged: {error}") from None
        found = {SPLIT_NAMES.get(name, name): _saved(folder / name) for name in names}
    else:
        files: dict[str, list[Path]] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            # train.jsonl, train-00000-of-00001.parquet, my.validation.csv, test/0000.parquet
            relative = path.relative_to(folder).as_posix().lower()
            words = re.findall(r"[a-z]+", relative)
            if is_table(path):
                name = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), relative)
                files.setdefault(name, []).append(path)
        if not files:
            return None
        for name, paths in files.items():
            kinds = {path.name.lower().removesuffix(".gz").rpartition(".")[2] for path in paths}
            if name in SPLIT_NAMES.values() and len(kinds) > 1:
                raise UserError(
                    f"{folder} has {name} in several forms ({', '.join(sorted(kinds))}); leave one"
                )
        found = {name: Table(tuple(paths)) for name, paths in files.items()}
        if len(found) == 1 and "train" not in found:
            found = {"train": next(iter(found.values()))}
    if "train" not in found:
        raise UserError(f"{folder} has no split `train`, only {', '.join(found)}")
    known = {name: table for name, table in found.items() if name in SPLIT_NAMES.values()}
    return known, sorted(found.keys() - known.keys())


def _saved(folder: Path) -> Table:
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        files = tuple(folder / entry["filename"] for entry in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not what save_to_disk writes: {error}") from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder} is a selection of rows saved by an old version of datasets; save "
            "dataset.flatten_indices() instead"
        )
    for path in files:
        if path.parent != folder or not path.is_file():
            raise UserError(f"{folder / 'state.json'} names {path.name}, which is not there")
    return Table(files)


def _arrow(path: Path) -> Iterator[Cells]:
    arrow = _pyarrow(path)
    with arrow.memory_map(str(path)) as file:
        try:
            batches = arrow.ipc.open_stream(file)
        except arrow.ArrowInvalid:
            file.seek(0)
            reader = arrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def _parquet(path: Path) -> Iterator[Cells]:
    _pyarrow(path)
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow  # optional
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            f"reading {path} needs pyarrow, which is not installed: {sys.executable} -m pip "
            "install pyarrow; or export the splits without it: dataset.to_json('train.jsonl')"
        ) from None
    return pyarrow


def _explained(read: Callable[[Path], Iterator[Cells]]) -> Callable[[Path], Iterator[Cells]]:
    def explained(path: Path) -> Iterator[Cells]:
        try:
            yield from read(path)
        except (ValueError, OSError) as error:  # pyarrow's errors are one or the other
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None

    return explained


def _json(path: Path) -> Iterator[Any]:
    with open_source(path) as file:
        array = file.read(1) == b"["
    if array:
        try:
            yield from json.loads("\n".join(SourceText(path)))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        return
    for number, line in enumerate(SourceText(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not a JSON object: {error}") from None


def _csv(path: Path) -> Iterator[Cells]:
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    csv.field_size_limit(1 << 30)  # cells may be whole documents
    with open_source(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: not as many cells as the heading"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".arrow": _explained(_arrow),
    ".parquet": _explained(_parquet),
    ".jsonl": _json,
    ".json": _json,
    ".csv": _explained(_csv),
    ".tsv": _explained(_csv),
}
