"""What fairseq's setup.py imports of PyTorch, so that fairseq can be built without it.

Of fairseq's extensions, those that use PyTorch take minutes to compile. They are of models that are
neither trained nor tested here: Levenshtein transformers (libnat), layers of experts (libbase),
simultaneous translation (alignment_train_cpu_binding). These are left out; the others, which
prepare batches and compute BLEU, are compiled at once.
"""

import os

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class CppExtension(Extension):
    """An extension that uses PyTorch."""


class BuildExtension(build_ext):
    """Builds the other extensions, in parallel."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.extensions = [each for each in self.extensions if not isinstance(each, CppExtension)]
        self.parallel = os.cpu_count()
