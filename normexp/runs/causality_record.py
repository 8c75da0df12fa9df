"""The record of an audit: what a trained language model does without the tokens it predicts.

One JSON file per audited run, `audits/<task>/<label>-seed<k>.json` beside the runs' records.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from normexp.errors import UserError
from normexp.files import write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `scripts/audit.py` found.

    Attributes:
        config_hash: Of the audited run, as in its record.
        checkpoint: Which one, such as "best".
        blocks: Number of blocks drawn from the split with draw_seed.
        changed: Share of positions whose prediction answered to later tokens.
        largest_nats: Largest answer of a log-probability.
        perplexity_visible, perplexity_random, perplexity_hidden: Per token over the blocks, with
            later tokens as they are, replaced at random, and made padding.
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
    perplexity_visible: float
    perplexity_random: float
    perplexity_hidden: float
    code_commit: str
    code_dirty: bool | None
    versions: dict[str, str]
    command: str
    finished_at: str


_AUDIT = TypeAdapter(Audit)


def write_audit(path: Path, audit: Audit) -> None:
    """Write, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(audit))


def load_audits(results_dir: Path) -> dict[Path, Audit]:
    """All audits below `results_dir`, in the order of their paths; UserError for a bad file."""
    audits = {}
    for path in sorted((results_dir / "audits").rglob("*.json")):
        try:
            audits[path] = _AUDIT.validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {where}: {first['msg']}; audit again or restore it") from None
    return audits
