#!/usr/bin/env bash
# triton 3.9.0: the interpreter (TRITON_INTERPRET=1) cuts float32 to bfloat16 instead of rounding.
#
# Expected: a kernel's conversion to bfloat16 rounds to nearest even, as torch's and the GPU's do.
# Seen: the interpreter drops the lower 16 bits of every value; about half of all values are one step
# nearer to zero than torch's, and the mean relative error is twice that of rounding.
# Why it matters: the interpreter is how kernels are tested where there is no GPU. A bfloat16 kernel
# that is right fails a test with the tolerance of rounding there, one that truncates by mistake passes
# a test with the interpreter's, and sums of many outputs are biased towards zero in the interpreter
# only.
#
# Takes a minute. Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6 \
    triton==3.9.0
cat > "$folder/convert.py" <<'PY'  # a kernel's source is read from its file
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x, y, n: tl.constexpr):
    place = tl.arange(0, n)
    tl.store(y + place, tl.load(x + place).to(tl.bfloat16))


torch.manual_seed(0)
x, y = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
convert[(1,)](x, y, 1024)
rounded = (y == x.bfloat16()).float().mean().item()
truncated = (y.view(torch.int16) == (x.view(torch.int32) >> 16).to(torch.int16)).float().mean().item()
print(f"triton {triton.__version__}, torch {torch.__version__}: {rounded:.0%} of 1,024 values are rounded "
      f"as torch rounds them, {truncated:.0%} are cut")
assert truncated == 1.0
assert 0.4 < rounded < 0.6
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/convert.py"
