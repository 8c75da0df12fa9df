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

HERE = Path(__file__).parent

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


def test_kernels() -> None:
    """All of triton_kernels.py."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    output = run("-m", "pytest", "-p", "no:cacheprovider", "triton_kernels.py", **interpreted)
    assert " passed" in output


def test_kernels_compile_for_a_gpu() -> None:
    assert "compiled" in run("triton_compilation.py")


def test_load_tells_what_is_missing() -> None:
    """Without a GPU and without the interpreter: one line, or an error where triton is chosen."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = "from normexp.norms import triton; print(triton.load(), triton.load())"
    assert run("-c", program).split() == ["False", "False"]
    chosen = f"""
try:
    {program.replace("; ", chr(10) + "    ")}
except RuntimeError as error:
    print(error)
"""
    assert "there is no GPU" in run("-c", chosen, NORMEXP_KERNELS="triton")
    assert run("-c", program, NORMEXP_KERNELS="plain", TRITON_INTERPRET="1").split()[0] == "False"
    assert run("-c", program, TRITON_INTERPRET="1").split() == ["True", "True"]
