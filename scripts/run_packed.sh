#!/usr/bin/env bash
# Runs the GPU benchmark from what scripts/pack.py has packed; no network is used.
#   bash run.sh [--rehearsal]
# $PYTHON (python3) must have torch, triton and sacrebleu. The record goes to $OUT, or to results/
# beside this file. A second call uses the environment that the first one made.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
out=${OUT:-$here/results}
venv=$here/venv

if [ ! -e "$venv/.installed" ]; then
    rm -rf "$venv"
    "$python" -m venv --system-site-packages --without-pip "$venv"
    # Where $PYTHON is of a virtual environment itself, its packages are not the system's.
    "$python" - "$venv" <<'EOF'
import pathlib, sys
own = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
(own / "packages_of_the_machine.pth").write_text("\n".join(folders) + "\n")
EOF
    pip=("$venv/bin/python" "$(echo "$here"/wheels/pip-*.whl)/pip" --disable-pip-version-check
        install --quiet --no-index --find-links "$here/wheels")
    "${pip[@]}" --requirement "$here/requirements.txt"
    # These demand more than is used, so without what they need.
    for wheel in "$here"/wheels/{fairseq_fixed,liger_kernel}-*.whl; do
        [ ! -e "$wheel" ] || "${pip[@]}" --no-deps "$wheel"
    done
    touch "$venv/.installed"
fi
cd "$here/normexp"
PYTHONPATH=$PWD exec "$venv/bin/python" scripts/benchmark.py gpu --output "$out/gpu.json" "$@"
