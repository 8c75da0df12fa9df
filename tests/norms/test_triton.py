"""The Triton kernels, in processes of their own: from its import triton knows what it runs on.

On a machine without a GPU they run in triton's interpreter, and that they are programs for a GPU
at all is seen by compiling them for one.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normexp.norms.kernels import triton
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

HERE = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*command: str, **environment: str) -> str:
    """Output of a Python process that has to succeed."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


THOROUGH = pytest.param(True, marks=pytest.mark.thorough)


@pytest.mark.parametrize("thorough", [False, THOROUGH])
def test_kernels(thorough: bool) -> None:
    """All of triton_kernels.py, in two parts."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    part = "thorough" if thorough else "not thorough"
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-m", part, "triton_kernels.py")
    assert " passed" in run(*command, **interpreted)


@pytest.mark.parametrize("thorough", [False, THOROUGH])
def test_kernels_compile_for_a_gpu(thorough: bool) -> None:
    """For a masked batch in float32; thorough: for batches of other types, shapes and groups."""
    assert "compiled" in run("triton_compilation.py", *["others"] * thorough)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_load_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU and without the interpreter: no kernels, an error where they are chosen."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = chosen_kernels()
    try:
        for choice in ("auto", "plain", "native"):
            use_kernels(choice)
            assert not triton.load()
        use_kernels("triton")
        with pytest.raises(RuntimeError, match="there is no GPU"):
            triton.load()
    finally:
        use_kernels(before)
