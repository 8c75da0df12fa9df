"""C++ kernels for the CPU: compiled on first use and kept; plain torch where that fails.

    python -m normexp.norms.kernels      # compile all of them now and print where they are

A source file registers its operators with TORCH_LIBRARY_FRAGMENT(normexp, ...) and uses nothing of
Python. What is compiled lies in $XDG_CACHE_HOME/normexp/kernels (else ~/.cache/...), one file per
source, named by a hash of everything that it depends on: the source and the headers beside it,
PyTorch's version, the processor, the compiler's options. So it never fits by accident; every
environment with the same PyTorch uses the same file, wherever it lies; and a machine without a
compiler can use what another one with the same processor has compiled in a shared home folder.

Loading a library runs its code, hence a folder or file that somebody else owns or may write to is
not used, nor is a file whose content is not what was compiled.
"""

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from normexp.norms.kernels.choice import chosen_kernels

logger = logging.getLogger(__name__)

NATIVE_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fopenmp"),
    # What vectorizing needs; infinities and NaN keep their meaning, and so do parentheses.
    *("-fno-math-errno", "-fno-trapping-math"),
)
_SECONDS_TO_COMPILE = 600


class Unavailable(Exception):
    """A library cannot be loaded; the message says why in one line."""


def load(source: Path) -> bool:
    """Make the operators of a C++ source file available as torch.ops.normexp.*, if possible.

    The first call compiles, which takes half a minute. Where there is no compiler, or it fails, or
    the cache cannot be trusted, logs one line, once per process, and returns False. False also
    where plain kernels are chosen (kernels/choice.py). Raises RuntimeError instead where native
    ones are chosen.
    """
    if chosen_kernels() == "plain":
        return False
    failure = _load_once(source)
    if failure and chosen_kernels() == "native":
        raise RuntimeError(f"native kernels are chosen, but cannot be had: {failure}")
    return not failure


@functools.cache
def _load_once(source: Path) -> str:
    """Load a source's library; why that failed, or an empty string."""
    try:
        torch.ops.load_library(str(_compiled(source)))
    except (Unavailable, OSError, RuntimeError) as error:
        failure = str(error).strip().split("\n")[0]
        _notice_once(failure)
        return failure
    return ""


@functools.cache
def _notice_once(failure: str) -> None:
    logger.warning("plain kernels instead of compiled ones, slower but the same: %s", failure)


def cache_folder() -> Path:
    """Where compiled libraries are kept. Raises Unavailable for a user without a home folder."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise Unavailable(
            "the user has no home folder to keep them in; set XDG_CACHE_HOME"
        ) from None
    return Path(base) / "normexp" / "kernels"


def _compiled(source: Path) -> Path:
    """The library of a source. Raises Unavailable, or OSError where the disk refuses."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_if_others_may_write(folder)
    name = f"{source.stem}-{_key(source)}"
    library, digest = folder / f"{name}.so", folder / f"{name}.sha256"
    if library.exists() and digest.exists():
        _refuse_if_others_may_write(library)
        if hashlib.sha256(library.read_bytes()).hexdigest() == digest.read_text():
            return library
    _compile(source, library, digest)
    return library


def _refuse_if_others_may_write(path: Path) -> None:
    facts = path.stat()
    if facts.st_uid != os.getuid():
        raise Unavailable(f"{path} belongs to another user; remove it")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others may write to {path}; remove it, or: chmod -R go-w {path}")


def _options() -> list[str]:
    """The compiler's options that decide what it makes; none names a path."""
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return [*_FLAGS, tuned, abi]


def _key(source: Path) -> str:
    """Hash of everything that the library depends on but the compiler, which may be missing.

    PyTorch's headers and libraries count by the version and the commit that they were built from.
    """
    facts = [
        # This file's, too: the way in which libraries are made.
        *(p.read_text() for p in [source, *sorted(source.parent.glob("*.h")), Path(__file__)]),
        *_options(),
        torch.__version__,
        str(torch.version.git_version),
        sysconfig.get_platform(),
        _processor(),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _processor() -> str:
    """Kind and instruction sets of the processor, as far as the system knows them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split("\n")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(wanted))


def _compile(source: Path, library: Path, digest: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("g++") or shutil.which("c++") or shutil.which("clang++") or ""
    ]
    if not shutil.which(compiler[0]):
        raise Unavailable("no C++ compiler (on Debian and Ubuntu: apt-get install g++)")
    logger.warning("compiling %s for this processor, once; half a minute", source.name)
    # In a folder of its own, so that processes that compile the same do not meet.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / "library.so"
        torch_headers = [f"-isystem{path}" for path in include_paths()]
        options = [*_options(), *torch_headers]
        _run([*compiler, *options, "-c", str(source), "-o", f"{folder}/object.o"])
        # Without -fopenmp: OpenMP's functions are found in the runtime that torch has brought
        # along. A second runtime would have threads of its own, and both would wait by spinning.
        torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        _run([*compiler, "-shared", f"{folder}/object.o", "-o", str(made), *torch_libraries])
        checked = Path(folder) / "digest"
        checked.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.chmod(0o600)
        # A reader between the two sees a library with another one's digest, and compiles too.
        os.replace(made, library)
        os.replace(checked, digest)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_COMPILE)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"compiling took more than {_SECONDS_TO_COMPILE} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.split("\n") if "error" in line.lower()]
        raise Unavailable(
            f"{command[0]} failed: {(errors or [done.stderr or 'silently'])[0].strip()}"
        )


def sources() -> list[Path]:
    """All C++ sources of the package."""
    return sorted(Path(__file__).parents[2].rglob("*.cpp"))


def main() -> None:
    """Compile all sources and print where the libraries are. A failure is no error: plain torch."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # The longest first, so that none is left alone at the end.
    ordered = sorted(sources(), key=lambda source: -source.stat().st_size)
    usable = getattr(os, "sched_getaffinity", None)
    with ThreadPoolExecutor(len(usable(0)) if usable else os.cpu_count()) as pool:
        made = list(pool.map(load, ordered))
    ready = sorted(source.stem for source, works in zip(ordered, made, strict=True) if works)
    print(f"compiled kernels in {cache_folder()}: {', '.join(ready) or 'none'}")
