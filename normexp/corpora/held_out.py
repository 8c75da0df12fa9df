"""Lines of the train text for valid and test, where a user's corpus has no splits of its own.

The choice depends on the text alone: the same text gives the same splits.
"""

import hashlib
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from normexp.corpora.parallel_text import Row, read_rows, row_writer
from normexp.errors import UserError

PART = 20  # one line in so many for each split
MOST = 2000  # lines


def wanted(lines: int) -> int:
    """How many of `lines` lines a split gets."""
    return max(1, min(MOST, lines // PART))


def chosen_by_hash(rows: Iterable[Row], splits: list[str]) -> dict[str, set[int]]:
    """Numbers (from 0) of the rows of each split: those of the smallest hashes, none like another.

    Neither the source nor the target of a row that is held out occurs anywhere else, so that
    nothing of valid and test is seen in training. Raises UserError if too few rows are so.
    """
    digests, sides = array("Q"), 1
    for row in rows:
        sides = len(row)
        digests.extend(map(digest, row))
    keys = np.array(digests, dtype=np.uint64).reshape(-1, sides)
    unique = np.ones(len(keys), dtype=bool)
    for column in keys.T:
        _, first, counts = np.unique(column, return_inverse=True, return_counts=True)
        unique &= counts[first] == 1
    candidates = np.flatnonzero(unique)
    number = wanted(len(keys)) * len(splits)
    if len(candidates) < number or len(keys) <= number:
        raise UserError(
            f"of {len(keys):,} lines only {len(candidates):,} occur once on both sides, too few to "
            f"hold out {number:,} for {' and '.join(splits)}: give --valid FILES and --test FILES"
        )
    # Not every n-th: texts can have a period.
    chosen = candidates[np.argsort(keys[candidates, 0])[:number]]
    return {split: set(chosen[i :: len(splits)].tolist()) for i, split in enumerate(splits)}


def last(lines: int, splits: list[str]) -> dict[str, range]:
    """Numbers (from 0) of the lines of each split: the text's end, test behind valid.

    A language model predicts tokens from those before, so its splits are stretches of the text.
    Raises UserError where too few lines are left.
    """
    number = wanted(lines)
    if lines <= 2 * number * len(splits):
        raise UserError(
            f"the text has {lines} lines, too few to hold out some for {' and '.join(splits)}; one "
            "sentence or paragraph a line is usual (`fold -s -w 1000` breaks a longer one), or "
            "give --valid FILE and --test FILE"
        )
    ends = {split: lines - number * i for i, split in enumerate(reversed(splits))}
    return {split: range(ends[split] - number, ends[split]) for split in splits}


def digest(text: str) -> int:
    """A number of 64 bits that, for practical purposes, tells one text from another."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def hold_out(train: list[Path], others: dict[str, list[Path]]) -> str:
    """Move lines of train's files into the files of other splits; return what was done, in words.

    train: a file for each language. Raises UserError as `chosen_by_hash` and `last` do.
    """
    whole = [path.with_name(f"all.{path.name}") for path in train]
    for path, everything in zip(train, whole, strict=True):
        path.rename(everything)
    splits = list(others)
    if len(train) > 1:
        chosen = chosen_by_hash(read_rows(whole), splits)
        how = "chosen by a hash, none of them with a side that occurs twice"
    else:
        chosen = last(sum(1 for _ in read_rows(whole)), splits)
        how = "the last ones of the text"
    with ExitStack() as stack:
        write = {
            split: stack.enter_context(row_writer(paths))
            for split, paths in {"train": train, **others}.items()
        }
        for number, row in enumerate(read_rows(whole)):
            split = next((name for name in splits if number in chosen[name]), "train")
            write[split](row)
    for everything in whole:
        everything.unlink()
    taken = " and ".join(f"{len(chosen[split]):,} lines for {split}" for split in splits)
    return f"held out of train: {taken}, {how}"
