"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend; the message names the cause and the cure.

    The scripts print it as one line on standard error and exit with status 1; anything else
    that escapes is a defect of this project and keeps its traceback.
    """
