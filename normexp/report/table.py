"""The table that every output format writes in its own way."""

from dataclasses import dataclass, field
from pathlib import Path

from normexp.report.paper import Published


@dataclass(frozen=True)
class Link:
    """A link to the file of a record."""

    text: str
    target: Path


class Number(str):
    """A formatted number.

    Attributes:
        value: The number by which a column is sorted.
        published: The entry of results/paper.yaml it comes from; None for a number of ours.
    """

    value: float
    published: Published | None

    def __new__(cls, text: str, value: float, published: Published | None = None) -> "Number":
        number = super().__new__(cls, text)
        number.value, number.published = value, published
        return number


Cell = str | list[Link]  # a Number is a str


@dataclass(frozen=True)
class Note:
    """A line below a table, with a link to a record if the note is about one."""

    text: str
    link: Link | None = None


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as the header."""

    header: list[str]
    rows: list[list[Cell]]
    notes: list[Note] = field(default_factory=list)
