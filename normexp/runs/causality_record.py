"""The record of a causality test: how a trained language model predicts without future tokens.

One JSON file per tested run, `causality/<task>/<label>-seed<k>.json` beside the runs' records.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError, invalid_fields
from normexp.files import Unreadable, read_json, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CausalityRecord:
    """The result of `scripts/audit.py` for one run.

    Attributes:
        config_hash: Of the tested run, as in its record.
        checkpoint: Which one was tested, such as "best".
        blocks: Number of blocks drawn from the split with draw_seed.
        changed: Share of the positions, 0 to 1, whose prediction depends on later tokens.
        largest_nats: Largest change of a log-probability when later tokens change, in nats.
        perplexity_visible: Per token over the blocks, with later tokens as they are.
            None where it is infinite, as of the next two.
        perplexity_random: The same with later tokens replaced at random.
        perplexity_hidden: The same with later tokens replaced by padding.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    schema_version: Literal[1] = SCHEMA_VERSION
    task: str
    label: str
    seed: int
    config_hash: str
    checkpoint: str
    split: str
    blocks: int
    draw_seed: int
    sees_future_tokens: bool
    changed: float
    largest_nats: float
    perplexity_visible: float | None
    perplexity_random: float | None
    perplexity_hidden: float | None
    code_commit: str
    code_dirty: bool | None
    versions: dict[str, str]
    command: str
    finished_at: str


_CAUSALITY_RECORD = TypeAdapter(CausalityRecord)


def write_causality_record(path: Path, record: CausalityRecord) -> None:
    """Write the record atomically; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record))


def load_causality_records(results_dir: Path) -> dict[Path, CausalityRecord]:
    """Read all causality records below `results_dir`, in the order of their paths.

    Raises UserError that names the first invalid file.
    """
    records = {}
    for path in sorted((results_dir / "causality").rglob("*.json")):
        records[path] = read_causality_record(path)
    return records


def read_causality_record(path: Path) -> CausalityRecord:
    """Read a causality record. Raises UserError that names the file and its invalid fields."""
    try:
        return _CAUSALITY_RECORD.validate_json(json.dumps(read_json(path)))
    except Unreadable as error:
        raise UserError(f"{error}; restore it or test the run again") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: {invalid_fields(error)}; restore it or test the run again"
        ) from None
