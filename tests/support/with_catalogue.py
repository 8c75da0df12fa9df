"""Runs a script of the project with another catalogue of corpora than its own.

python with_catalogue.py CATALOGUE SCRIPT [ARGUMENT ...]
"""

import runpy
import sys
from pathlib import Path

from normexp.corpora import prepare

if __name__ == "__main__":
    catalogue = Path(sys.argv.pop(1))
    sys.argv.pop(0)
    *others, _ = prepare.__defaults__
    prepare.__defaults__ = (*others, catalogue)
    runpy.run_path(sys.argv[0], run_name="__main__")
