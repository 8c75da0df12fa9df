#!/usr/bin/env python
"""Make a checkpoint of the PowerNorm authors' code usable with this project's fairseq plugin.

    python scripts/import_checkpoint.py checkpoint_best.pt imported.pt
    fairseq-generate DATA --user-dir normexp/fairseq_plugin --path imported.pt --beam 5 \\
        --required-batch-size-multiple 1

IN is a translation model trained with github.com/sIncerass/powernorm, with any mixture of its
`layer`, `batch` and `power`; DATA is binarized with the dictionaries that it was trained with.
Nothing that IN holds is executed, and OUT appears whole or not at all. To train further, start
fairseq-train with --finetune-from-model OUT and the model's own settings: the normalizations go
on where they were, the optimizer starts anew.
"""

from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.config.terminal import show_own_warnings
from normexp.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, import, print what was found."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of the authors' code")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args()
    show_own_warnings()

    from normexp.checkpoints.released import import_checkpoint

    print(import_checkpoint(**vars(arguments)))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
