"""Options are --option value; option=value is refused with the right form."""

import pytest

from normexp.config.command_grammar import Parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser(description="Examples:\n\n    one\n    two")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--beam-size", type=int)
    parser.add_argument("--fold", action="store_true")
    return parser


def test_options_and_keys_of_the_configuration(parser: Parser) -> None:
    arguments = ["task=ptb", "evaluation.beam-size=3", "--beam-size", "4", "--fold"]
    found = parser.parse_args(arguments)
    assert found.overrides == arguments[:2]
    assert (found.beam_size, found.fold) == (4, True)


@pytest.mark.parametrize(
    ("argument", "form"),
    [
        ("beam-size=4", "--beam-size 4"),
        ("beam_size=4", "--beam-size 4"),
        ("fold=true", "--fold"),
    ],
)
@pytest.mark.parametrize("parse", ["parse_args", "parse_intermixed_args"])
def test_the_error_names_the_right_form(parser, capsys, argument, form, parse) -> None:
    with pytest.raises(SystemExit, match="2"):
        getattr(parser, parse)(["task=ptb", argument])
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {argument}: " in message and message.endswith(f"write {form}")


def test_subcommands_follow_the_grammar(capsys: pytest.CaptureFixture) -> None:
    parser = Parser()
    parser.add_subparsers().add_parser("norms").add_argument("--rounds")
    assert parser.parse_args(["norms", "--rounds", "3"]).rounds == "3"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["norms", "rounds=3"])
    assert "write --rounds 3" in capsys.readouterr().err


def test_lines_of_the_description_stay(parser: Parser) -> None:
    assert "\n    one\n    two\n" in parser.format_help()
