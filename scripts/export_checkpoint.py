#!/usr/bin/env python
"""Write a translation model with LN everywhere as a checkpoint that CTranslate2 converts.

    python scripts/export_checkpoint.py results/own/runs/TASK/LN-seed1/checkpoints/average.pt OUT
    ct2-fairseq-converter --model_path exported.pt --data_dir DATA --output_dir ct2 \\
        --user_dir normexp/fairseq_plugin

DATA is the folder of binarized data, for its dictionaries. OUT is a checkpoint of fairseq's arch
`transformer`, with the settings in the form that converters read; --user_dir makes PyTorch accept
that form. Models with another norm at any site are refused: CTranslate2 computes LN only.
"""

from pathlib import Path

from normexp.config.command_grammar import Parser
from normexp.config.terminal import show_own_warnings
from normexp.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, export, print what was written."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of a run with LN")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args()
    show_own_warnings()

    from normexp.checkpoints.stock import export_checkpoint

    print(export_checkpoint(**vars(arguments)))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
