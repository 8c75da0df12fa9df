"""How much of the code that oneDNN compiles for matrix products of bfloat16 is kept."""

import os

# One capacity of oneDNN's cache, one of torch's own before it; in shapes, of 0.7 MB each.
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_SHAPES = 128


def keep_little() -> None:
    """Let torch, which must not be loaded yet, keep code for 128 shapes instead of 1024.

    The sublayers of the plugin meet fewer; where they are not used, every batch has new shapes, and
    what is kept is hardly met again. A user's own values are left alone.
    """
    for variable in _VARIABLES:
        os.environ.setdefault(variable, str(_SHAPES))
