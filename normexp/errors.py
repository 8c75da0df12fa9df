"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something the user can fix; the message names the cause and the cure.

    The scripts print it as one line on standard error and exit with status 1; anything else
    that escapes is a defect of this project and keeps its traceback.
    """


def invalid_fields(error: ValidationError, most: int = 3) -> str:
    """Name the first `most` invalid fields, as in "values.0.metric: Field required; ..."."""
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}".removeprefix(": ")
        for detail in error.errors()[:most]
    )
