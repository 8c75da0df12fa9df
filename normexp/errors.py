"""UserError, the exception whose message is for the user, and what prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something the user can fix; the message names the cause and the cure.

    The scripts print it as one line on standard error and exit with status 1; anything else
    that escapes is a defect of this project and keeps its traceback.
    """

    def __init__(self, message: str = ""):
        # A message may quote what a damaged file holds, and half a character cannot be printed.
        super().__init__(str(message).encode("utf-8", "backslashreplace").decode())


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a UserError as one line on standard error and exit with status 1."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")


def invalid_fields(error: ValidationError, most: int = 3) -> str:
    """Name the first `most` invalid fields, as in "values.0.metric: Field required; ..."."""
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}".removeprefix(": ")
        for detail in error.errors()[:most]
    )
