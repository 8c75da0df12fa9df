"""A slow float64 twin of every registered normalization, for tests only.

Each is written token by token in plain loops over numpy arrays, from the published equations and
not from the layers in normexp/norms, so that an error in either shows as a difference. A new
normalization needs one here: subclass `Reference` (own backward) or `ExactReference` (backward =
derivative of the forward) in a module of this folder and decorate it with `reference_of(name)`.
"""

import importlib
import pkgutil

from normexp.norms.reference.base import REFERENCES, Reference, Step

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def build_reference(name: str, num_features: int, **options: object) -> Reference:
    """The reference of the normalization `name`. Raises LookupError saying how to write one."""
    if name not in REFERENCES:
        raise LookupError(
            f"normalization {name!r} has no reference: write one in normexp/norms/reference/ "
            f"from its published equations (not from the layer), decorated with "
            f"@reference_of({name!r}); its package docstring says how"
        )
    return REFERENCES[name](num_features, **options)


__all__ = ["REFERENCES", "Reference", "Step", "build_reference"]
