#!/usr/bin/env bash
# Builds the environment; called by `make install` with PYTHON, VENV, TORCH, FAIRSEQ and CACHE set.
# fairseq has to be compiled against the torch that is already there and without its torchaudio
# dependency, which is why a plain `pip install` of everything does not do.
set -euo pipefail

fail() { printf 'make install: %s\n' "$*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
    fail "needs Python 3.11 or 3.12, but '$PYTHON' is $("$PYTHON" --version 2>&1 || true)." \
        "Install one and say 'make install PYTHON=python3.11'."
tag=$("$PYTHON" -c 'import sys; print("py%d%d" % sys.version_info[:2])')

# Interrupted while making the environment: nothing in there can be trusted.
[ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || rm -rf "$VENV"
[ -d "$VENV" ] || "$PYTHON" -m venv "$VENV" ||
    fail "'$PYTHON -m venv' failed; on Debian and Ubuntu install the package python3-venv."
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# fairseq's metadata is never satisfied (torchaudio), and pip would complain of it at each step.
install() { pip install --quiet --no-warn-conflicts "$@"; }

if ! "$VENV/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH'" \
    2>/dev/null; then
    echo "PyTorch $TORCH"
    install "numpy>=1.26"
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
        install "torch==$TORCH"
    else
        # Without a GPU the CUDA packages would be several GB for nothing.
        install "torch==$TORCH+cpu" 2>/dev/null ||
            install "torch==$TORCH+cpu" \
                --extra-index-url https://download.pytorch.org/whl/cpu ||
            fail "could not install PyTorch $TORCH for the CPU (network?); see the lines above."
    fi
fi

if ! "$VENV/bin/python" -c 'import fairseq.libbleu' 2>/dev/null; then
    wheels="$CACHE/wheels/$tag-torch$TORCH"
    if ! compgen -G "$wheels/fairseq_fixed-*.whl" >/dev/null; then
        echo "fairseq: a wheel, or some minutes of compiling; kept in $wheels"
        command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
            [ "$tag" = py312 ] ||
            fail "needs a C++ compiler to build fairseq on Python 3.11;" \
                "on Debian and Ubuntu: apt-get install g++ python3-dev."
        install "setuptools>=68,<81" wheel cython "numpy>=1.26"
        mkdir -p "$wheels"
        pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels.part$$" "$FAIRSEQ" ||
            { rm -rf "$wheels.part$$"; fail "building fairseq failed; see the lines above."; }
        mv "$wheels.part$$"/*.whl "$wheels" && rmdir "$wheels.part$$"
    fi
    install --no-deps "$wheels"/fairseq_fixed-*.whl
fi

echo "normexp and the packages it needs"
# torch is there already: the constraint keeps pip from replacing it by another build.
printf 'torch==%s\n' "$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')" \
    > "$VENV/constraints.txt"
install "setuptools>=68,<81" wheel
install --no-build-isolation --constraint "$VENV/constraints.txt" --editable '.[dev]'
"$VENV/bin/python" -c 'import logging; logging.disable(); import fairseq, normexp.norms' || fail "the environment does not work."
echo "kernels for this processor"
"$VENV/bin/python" -m normexp.norms.kernels
echo "done: $VENV ($("$VENV/bin/python" --version), PyTorch $TORCH)"
