"""Lines that occur in more than one split, so that a score measures what was seen in training."""

from pathlib import Path

from normexp.corpora.held_out import digest
from normexp.corpora.parallel_text import Row, read_rows
from normexp.errors import UserError


def overlaps(files: dict[str, list[Path]]) -> list[str]:
    """Say how much of valid and test also occurs in train, and of test in valid.

    files: of each split, one for each language. Blank lines do not count. Raises UserError where a
    whole split occurs in another.
    """
    keys = {
        split: [_key(row) for row in read_rows(files[split]) if "".join(row).strip()]
        for split in ("valid", "test")
    }
    wanted = {*keys["valid"], *keys["test"]}
    seen = {
        "train": wanted.intersection(map(_key, read_rows(files["train"]))),
        "valid": set(keys["valid"]),
    }
    what = "sentence pairs" if len(files["train"]) > 1 else "lines"
    notes = []
    for split, other in (("valid", "train"), ("test", "train"), ("test", "valid")):
        count, whole = sum(key in seen[other] for key in keys[split]), len(keys[split])
        if count == whole > 0:
            raise UserError(
                f"all {count:,} {what} of {split} are also in {other}: a {split} set that has been "
                "seen measures nothing; give other text"
            )
        if count:
            notes.append(
                f"{count:,} of {whole:,} {what} of {split} ({count / whole:.1%}) are also in "
                f"{other}"
            )
    return notes


def _key(row: Row) -> int:
    return digest("\n".join(row))
