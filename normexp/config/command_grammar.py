"""The grammar of the commands: key=value sets a key of a run's configuration, --option the rest."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """argparse's parser, which keeps the lines of a description that has several.

    An argument `option=value` for one of its options, or of its subcommands', is an error that
    names the right form, `--option value`.
    """

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        if "\n" in (description or ""):
            settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **settings)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does: exit with status 2 and a message where an argument is wrong."""
        args = sys.argv[1:] if args is None else args
        for argument in args:
            name, equals, value = argument.partition("=")
            option = f"--{name.replace('_', '-')}"
            action = self._option_string_actions.get(option)
            if equals and action is not None:
                form = option if action.nargs == 0 else f"{option} {value}"
                self.error(f"{argument}: this command has an option for it; write {form}")
        return super().parse_known_args(args, namespace)
