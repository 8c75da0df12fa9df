"""What malloc does with freed memory; only glibc's can be told, elsewhere nothing happens.

glibc gives large blocks back to the system at once, and the next update takes them anew. The
system fills every page with zeros when it is first touched, which was a tenth of an update.
"""

import ctypes
import os

# malloc.h. mallopt refuses a threshold above half the largest heap of a thread.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _NEVER = 32 << 20, 2**31 - 1


def keep_freed() -> bool:
    """Let this process keep what it frees; return whether it does.

    A user's own settings of malloc, by variables of the environment, are left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = _of_glibc("mallopt")
    return bool(
        mallopt
        and mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )


def release() -> None:
    """Return freed memory to the system."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> ctypes._CFuncPtr | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (musl has another malloc, under the same names)
        return getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
