#!/usr/bin/env bash
# Builds the environment; called by `make` with PYTHON, VENV, TORCH, FAIRSEQ and CACHE set.
#   install.sh        what training, evaluation and reports need
#   install.sh dev    also what the tests need, an extra of pyproject.toml
# A plain `pip install` of everything does not do: fairseq demands torchaudio, and PyTorch's usual
# packages bring CUDA along.
set -euo pipefail
extra=${1:-}

fail() { printf 'make install: %s\n' "$*" >&2; exit 1; }

# Measured for the CPU; PyTorch with CUDA and what it needs take several GB more.
needed=1300 download=350
[ -z "$extra" ] || needed=1400 download=350

scratch=$(mktemp -d)
end_jobs() {
    local pid
    for pid in $(jobs -p); do kill -- "-$pid" 2>/dev/null || true; done
    rm -rf "$scratch"
}
trap end_jobs EXIT
trap 'exit 130' INT TERM

# begin NAME COMMAND...: runs a command in the background, in a process group of its own, so that
# all of it can be ended.
begin() {
    local name=$1
    shift
    set -m
    "$@" >"$scratch/$name.log" 2>&1 </dev/null &
    set +m
    echo $! >"$scratch/$name.pid"
}
# finish NAME WHAT: waits for it, says every 10 seconds that it still runs and how much there is on
# the disk, and shows what it printed if it fails.
finish() {
    local pid started=$SECONDS said=$SECONDS
    pid=$(cat "$scratch/$1.pid")
    printf '%s\n' "$2"
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if [ $((SECONDS - said)) -ge 10 ]; then
            said=$SECONDS
            printf '  %d s, %s MB in %s\n' $((SECONDS - started)) "$(megabytes)" "$VENV"
        fi
    done
    wait "$pid" || { cat "$scratch/$1.log" >&2; return 1; }
}
# step WHAT COMMAND...: both.
step() {
    local what=$1
    shift
    begin step "$@"
    finish step "$what"
}
megabytes() { du -sm "$VENV" 2>/dev/null | cut -f 1 || echo 0; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# fairseq's metadata is never satisfied (torchaudio), and pip would complain of it at each step.
# Python compiles what it imports; all modules of all packages would take a minute and 200 MB.
install() { pip install --no-warn-conflicts --no-compile "$@"; }

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

# In a folder of its own, because it runs beside the other installations. Without PyTorch: see
# scripts/build_fairseq.
build_fairseq() {
    local tools="$scratch/tools"
    pip install --no-compile --target "$tools" "setuptools>=68,<81" wheel cython "numpy>=1.26"
    PYTHONPATH="$PWD/scripts/build_fairseq:$tools" pip wheel --no-deps --no-build-isolation \
        --wheel-dir "$scratch/wheels" "$FAIRSEQ"
    mkdir -p "$wheels"
    cp "$scratch"/wheels/*.whl "$wheels/.part$$"
    mv "$wheels/.part$$" "$wheels/$(basename "$scratch"/wheels/*.whl)"
}
wheels="$CACHE/wheels/$tag" fairseq=present
"$VENV/bin/python" -c 'import fairseq.libbleu' 2>/dev/null || fairseq=missing
if [ $fairseq = missing ] && ! compgen -G "$wheels/fairseq_fixed-*.whl" >/dev/null; then
    command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
        [ "$tag" = py312 ] ||
        fail "needs a C++ compiler to build fairseq on Python 3.11;" \
            "on Debian and Ubuntu: apt-get install g++ python3-dev."
    fairseq=building
    begin fairseq build_fairseq
fi

cpu_torch() {
    install "numpy>=1.26" "torch==$TORCH+cpu" || install "numpy>=1.26" "torch==$TORCH+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu
}
if ! "$VENV/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH'" \
    2>/dev/null; then
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
        step "PyTorch $TORCH, with CUDA on Linux: several GB" \
            install "numpy>=1.26" "torch==$TORCH"
    else
        # Without a GPU the CUDA packages would be several GB for nothing.
        step "PyTorch $TORCH for the CPU: 200 MB to download, 700 on the disk" cpu_torch ||
            fail "could not install PyTorch $TORCH for the CPU (network?); see the lines above."
    fi
fi
# They need nothing but PyTorch.
[ -n "$extra" ] || begin kernels "$VENV/bin/python" -m normexp.norms.kernels

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
step "normexp and the packages it needs: 450 MB" editable . ||
    fail "could not install the packages (network?); see the lines above."
[ $fairseq != building ] ||
    finish fairseq "fairseq: a wheel, compiled beside the rest; kept in $wheels" ||
    fail "building fairseq failed; see the lines above."
[ $fairseq = present ] ||
    step "fairseq from $wheels: 30 MB" install --no-deps "$wheels"/fairseq_fixed-*.whl
"$VENV/bin/python" -c 'import logging; logging.disable(); import fairseq, normexp.norms' ||
    fail "the environment does not work."
finish kernels "kernels for this processor"
cat "$scratch/kernels.log"
echo "done: $VENV ($("$VENV/bin/python" --version), PyTorch $TORCH), $(megabytes) MB"
