"""Types that torch.load(weights_only=True) accepts in a fairseq checkpoint.

torch's default refuses every type but tensors and plain containers, because a pickle can run
code. fairseq's tools load checkpoints with this default, so the types that they write themselves
are allowed here: the argparse namespace of models trained by old-style architectures, and the
numpy arrays in which the validation meters keep BLEU's n-gram counts.
"""

import argparse

import numpy as np
import torch

_COUNTS = np.zeros(1, dtype=np.int64)
CHECKPOINT_TYPES = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(_COUNTS.dtype),
    # numpy's own reconstruction function, whose module has another name in numpy 1 than in 2
    _COUNTS.__reduce__()[0],
]

torch.serialization.add_safe_globals(CHECKPOINT_TYPES)
