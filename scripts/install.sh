#!/usr/bin/env bash
# Builds the environment; called by `make` with PYTHON, VENV, TORCH, FAIRSEQ and CACHE set.
#   install.sh        what training, evaluation and reports need
#   install.sh dev    also what the tests need, an extra of pyproject.toml
# fairseq has to be compiled against the torch that is already there and without its torchaudio
# dependency, which is why a plain `pip install` of everything does not do.
set -euo pipefail
extra=${1:-}

fail() { printf 'make install: %s\n' "$*" >&2; exit 1; }

# Measured for the CPU; PyTorch with CUDA and what it needs take several GB more.
needed=1500 download=350
[ -z "$extra" ] || needed=1400 download=350

# step WHAT COMMAND...: runs a command, says every 10 seconds that it still does and how much there
# is on the disk, and shows what it printed if it fails.
step() {
    local what=$1 log started=$SECONDS said=$SECONDS pid
    shift
    log=$(mktemp)
    printf '%s\n' "$what"
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if [ $((SECONDS - said)) -ge 10 ]; then
            said=$SECONDS
            printf '  %d s, %s MB in %s\n' $((SECONDS - started)) "$(megabytes)" "$VENV"
        fi
    done
    trap - INT TERM
    if wait "$pid"; then
        rm -f "$log"
    else
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
}
megabytes() { du -sm "$VENV" 2>/dev/null | cut -f 1 || echo 0; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# fairseq's metadata is never satisfied (torchaudio), and pip would complain of it at each step.
install() { pip install --no-warn-conflicts "$@"; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
    fail "needs Python 3.11 or 3.12, but '$PYTHON' is $("$PYTHON" --version 2>&1 || true)." \
        "Install one and say 'make install PYTHON=python3.11'."
tag=$("$PYTHON" -c 'import sys; print("py%d%d" % sys.version_info[:2])')

# Interrupted while making the environment: nothing in there can be trusted.
[ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || rm -rf "$VENV"

free=$(df -Pm "$(dirname "$VENV")" | awk 'NR == 2 { print $4 }')
present=$([ -d "$VENV" ] && megabytes || echo 0)
[ -n "$extra" ] || present=$((present < needed ? present : needed))
[ -n "$extra" ] && present=0
echo "${extra:+for the tests, }about $needed MB on this disk (free: $free MB) and at most" \
    "$download MB to download; some minutes"
[ "$free" -ge $((needed - present)) ] ||
    fail "needs about $((needed - present)) MB in $VENV, and the disk has $free MB left."

[ -d "$VENV" ] || step "Python environment in $VENV" "$PYTHON" -m venv "$VENV" ||
    fail "'$PYTHON -m venv' failed; on Debian and Ubuntu install the package python3-venv."

cpu_torch() {
    install "torch==$TORCH+cpu" ||
        install "torch==$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
}
if ! "$VENV/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH'" \
    2>/dev/null; then
    step "NumPy" install "numpy>=1.26"
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
        step "PyTorch $TORCH, with CUDA on Linux: several GB" install "torch==$TORCH"
    else
        # Without a GPU the CUDA packages would be several GB for nothing.
        step "PyTorch $TORCH for the CPU: 200 MB to download, 750 on the disk" cpu_torch ||
            fail "could not install PyTorch $TORCH for the CPU (network?); see the lines above."
    fi
fi

build_fairseq() {
    install "setuptools>=68,<81" wheel cython "numpy>=1.26"
    mkdir -p "$wheels"
    pip wheel --no-deps --no-build-isolation --wheel-dir "$wheels.part$$" "$FAIRSEQ" &&
        mv "$wheels.part$$"/*.whl "$wheels" && rmdir "$wheels.part$$"
}
if ! "$VENV/bin/python" -c 'import fairseq.libbleu' 2>/dev/null; then
    wheels="$CACHE/wheels/$tag-torch$TORCH"
    if ! compgen -G "$wheels/fairseq_fixed-*.whl" >/dev/null; then
        command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
            [ "$tag" = py312 ] ||
            fail "needs a C++ compiler to build fairseq on Python 3.11;" \
                "on Debian and Ubuntu: apt-get install g++ python3-dev."
        step "fairseq: a wheel, or some minutes of compiling; kept in $wheels" build_fairseq ||
            { rm -rf "$wheels.part$$"; fail "building fairseq failed; see the lines above."; }
    fi
    step "fairseq from $wheels: 60 MB" install --no-deps "$wheels"/fairseq_fixed-*.whl
fi

# torch is there already: the constraint keeps pip from replacing it by another build.
printf 'torch==%s\n' "$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')" \
    > "$VENV/constraints.txt"
editable() {
    install "setuptools>=68,<81" wheel
    install --no-build-isolation --constraint "$VENV/constraints.txt" --editable "$1"
}
if [ -n "$extra" ]; then
    step "what the tests need: Triton, transformers, Selenium and others" editable ".[$extra]" ||
        fail "could not install what the tests need (network?); see the lines above."
    echo "done: $VENV, $(megabytes) MB"
    exit
fi
step "normexp and the packages it needs: 600 MB" editable . ||
    fail "could not install the packages (network?); see the lines above."
"$VENV/bin/python" -c 'import logging; logging.disable(); import fairseq, normexp.norms' ||
    fail "the environment does not work."
step "kernels for this processor" "$VENV/bin/python" -m normexp.norms.kernels
echo "done: $VENV ($("$VENV/bin/python" --version), PyTorch $TORCH), $(megabytes) MB"
