"""Lines of a corpus that do not fit into the model or a batch, found before anything is computed.

By itself fairseq leaves them out of training in silence, and stops at the first validation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import Dictionary, data_utils

from normexp.errors import UserError

_WORDS_SHOWN = 6


@dataclass(frozen=True)
class _Limit:
    """The most tokens that something may have, and the full key of the setting that says so."""

    key: str
    tokens: int | None


def refuse_long_lines(
    cfg: Any, split: str, max_tokens: int | None, key: str, folder: Path | None = None
) -> None:
    """Raise UserError that names the first line with more tokens than the configuration allows.

    cfg: fairseq's complete configuration, with the folder of the data and the languages. split:
    "train", "valid", "test" or a further test set. max_tokens: of a batch of this split; key: its
    full name. folder: of the split's data, where that is another one. A sentence end counts as a
    token.
    """
    folder = folder or Path(cfg.task.data)
    of_batch = _Limit(key, max_tokens)
    for name, limits in _texts(cfg, split):
        limits = [limit for limit in (*limits, of_batch) if limit.tokens]
        lowest = min(limits, key=lambda limit: limit.tokens, default=None)
        if lowest is None:
            continue
        if _cuts_anywhere(cfg):
            _refuse_blocks(cfg, lowest)
            continue
        dictionary = Dictionary.load(str(folder / _dictionary(name)))
        text = data_utils.load_indexed_dataset(str(folder / name), dictionary)
        too_long = np.flatnonzero(np.asarray(text.sizes) > lowest.tokens)
        if not len(too_long):
            continue
        line = int(too_long[0])
        words = dictionary.string(text[line]).split(" ")
        shown = " ".join(words[:_WORDS_SHOWN]) + (" ..." if len(words) > _WORDS_SHOWN else "")
        more = f", and {len(too_long) - 1} more lines do" if len(too_long) > 1 else ""
        raise UserError(
            f"line {line + 1} of {name} ({shown!r}) has {int(text.sizes[line])} tokens, more than "
            f"{lowest.key}={lowest.tokens}{more}: {_cure(cfg, lowest)}"
        )


def _texts(cfg: Any, split: str) -> Iterator[tuple[str, list[_Limit]]]:
    """Yield the name of each text of a split below the folder, and what limits its lines."""
    if cfg.task.get("source_lang") is None:
        positions = ("tokens_per_sample", "max_target_positions")
        yield split, [_Limit(f"fairseq.task.{name}", cfg.task.get(name)) for name in positions]
        return
    pair = cfg.task.source_lang, cfg.task.target_lang
    for side, language in zip(("source", "target"), pair, strict=True):
        name = f"max_{side}_positions"
        limits = [
            _Limit(f"fairseq.{group}.{name}", getattr(cfg[group], name, None))
            for group in ("task", "model")
        ]
        yield f"{split}.{'-'.join(pair)}.{language}", limits


def _dictionary(name: str) -> str:
    """Return the file name of the dictionary of a text."""
    language = name.rpartition(".")[2] if "." in name else ""
    return f"dict.{language}.txt" if language else "dict.txt"


def _cuts_anywhere(cfg: Any) -> bool:
    """Return whether the text is cut into blocks of equal length, wherever lines end."""
    is_text = cfg.task.get("source_lang") is None
    return is_text and cfg.task.get("sample_break_mode") in (None, "none")


def _refuse_blocks(cfg: Any, lowest: _Limit) -> None:
    tokens = cfg.task.tokens_per_sample
    if tokens > lowest.tokens:
        raise UserError(
            f"fairseq.task.tokens_per_sample={tokens} makes blocks of more tokens than "
            f"{lowest.key}={lowest.tokens}: lower the first, or raise the second"
        )


def _cure(cfg: Any, lowest: _Limit) -> str:
    if lowest.key == "fairseq.task.tokens_per_sample":
        return "raise it, cut lines by fairseq.task.sample_break_mode=none, or shorten the line"
    return "raise it, or shorten the line in the corpus; it would be left out"
