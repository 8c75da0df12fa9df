"""What a fault is."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One line replaced.

    Attributes:
        file: Below normexp/.
        old: Part of the file that occurs once in it.
        what: The fault in words.
        tests: What should notice it, below tests/: files without .py, or `FILE::TEST`.
    """

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]
