"""The authors' layers, loaded from a user's clone of sIncerass/powernorm.

Their code is under the GPL and no part of this project: it is read from where the user has put it.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from normexp.errors import UserError

_FOLDER = Path("fairseq/modules/norms")
_FILES = {"power": ("mask_powernorm.py", "MaskPowerNorm"),
          "batch": ("mask_syncbatchnorm.py", "MaskSyncBatchNorm")}  # fmt: skip


def authors_layers(clone: Path) -> dict[str, Callable[[int], nn.Module]]:
    """Builders of the authors' `power` and `batch`; each takes the number of channels.

    The modules take x (T, B, C) and a mask (B, T). As in the authors' models, `power` scales the
    tokens by groups of channels first: 4 of them; its warm-up is over from the second step on.
    Only the two files are run, not the fairseq around them. Raises UserError where `clone` lacks
    one of them, or where one does not run with this torch.
    """
    power, batch = (_layer(clone / _FOLDER / file, layer) for file, layer in _FILES.values())
    return {
        "power": lambda channels: power(channels, group_num=4, warmup_iters=1),
        "batch": lambda channels: batch(channels),
    }


def _layer(path: Path, name: str) -> type[nn.Module]:
    if not path.is_file():
        raise UserError(
            f"--authors: {path} is missing; give the folder of a clone of "
            "https://github.com/sIncerass/powernorm"
        )
    try:
        return getattr(_loaded(path), name)
    except Exception as error:  # whatever foreign code raises
        raise UserError(f"--authors: {path} does not run: {error!r}") from error


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"authors_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
