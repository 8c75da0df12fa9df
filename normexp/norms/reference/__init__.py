"""The paper's equations, token by token: a slow float64 twin of every registered normalization.

    from normexp.norms.reference import build_reference
    reference = build_reference("power", num_features=4, warmup_steps=2)
    step = reference.train_step(x, pad, gy)   # numpy: x, gy (T, B, C); pad (B, T), True = padding
    step.y, step.gx, step.gradients["weight"], reference.state["nu"]

They are the oracle of the tests and the place to read an equation as code: plain loops over numpy
arrays in float64, written from the published equations and not from the layers in normexp/norms,
so that an error in either shows as a difference. They take milliseconds where a layer takes
microseconds, and nothing but tests and readers uses them. `import normexp.norms` does not load
them.

A new normalization adds one file here, named like the file of the layer: subclass

- `TokenReference` where every token is normalized by itself,
- `ExactReference` where the backward is the derivative of the forward,
- `Reference` where it is not, and write the backward out,

all in base.py, and decorate the class with `reference_of(name)`. It takes the layer's options with
the same defaults. tests/norms/test_references.py then compares it with the layer.
"""

import importlib
import pkgutil

from normexp.norms.reference.base import REFERENCES, Reference, Step

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def build_reference(name: str, num_features: int, **options: object) -> Reference:
    """Build the reference of the normalization `name` for C = `num_features` channels.

    options: those of the layer. Raises LookupError, saying how to write one, where there is no
    reference of that name, and TypeError for an unknown option.
    """
    if name not in REFERENCES:
        raise LookupError(
            f"normalization {name!r} has no reference: write one in normexp/norms/reference/ "
            f"from its published equations (not from the layer), decorated with "
            f"@reference_of({name!r}); its package docstring says how"
        )
    return REFERENCES[name](num_features, **options)


__all__ = ["REFERENCES", "Reference", "Step", "build_reference"]
