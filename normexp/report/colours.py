"""The colour of every norm, the same in all figures and charts, for light and for dark pages.

Any two differ by at least 10 (CIE 1976), those of the paper's norms and as released by at least 20,
to normal eyes and with each of the three kinds of dichromacy, on white and on the dark page; all
have a contrast of at least 4.5 with it. tests/report/test_colours.py measures that.
"""

import zlib

_PALETTE = {  # on light, on dark
    "layer": ("#667960", "#e4f1e0"),
    "batch": ("#bb521d", "#fd6001"),
    "power_v": ("#012a08", "#50e16f"),
    "power": ("#4d5afe", "#7c74fd"),
    "power_released": ("#563956", "#fbb1fa"),
    "batch_released": ("#a53eb6", "#979197"),
    "regularized_batch": ("#88472a", "#c77753"),
    "unified": ("#8b6690", "#b77dbf"),
    "rms": ("#3e4c3d", "#a7dba4"),
    "scale": ("#7c0079", "#cfbfcd"),
    "group": ("#a90a05", "#cb8a7a"),
    "instance": ("#6617a4", "#ce94f7"),
    "adaptive": ("#0f8445", "#90b99a"),
    "dynamic_tanh": ("#413f22", "#d5d33d"),
    "none": ("#222322", "#3db730"),
}
_OF_NEW_NORMS = (("#420a4c", "#c561d5"), ("#645f64", "#f7d7f3"), ("#596297", "#728ef9"))
PALETTE = (*_PALETTE.values(), *_OF_NEW_NORMS)
"""(colour on light, colour on dark) by `number_of`."""


def number_of(norm: str) -> int:
    """Return the number of a norm's colour; norms that are not listed share three colours."""
    if norm in _PALETTE:
        return list(_PALETTE).index(norm)
    return len(_PALETTE) + zlib.crc32(norm.encode()) % len(_OF_NEW_NORMS)


def on_light(norm: str) -> str:
    """Return the colour of a norm on a white background, as in "#4d5afe"."""
    return PALETTE[number_of(norm)][0]


def as_css() -> str:
    """Return the definitions of the variables --c0, --c1, ... for light and for dark pages."""
    light, dark = (
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours))
        for colours in zip(*PALETTE, strict=True)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
