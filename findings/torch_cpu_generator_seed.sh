#!/usr/bin/env bash
# torch 2.13.0: the CPU's generator uses 32 of a seed's 64 bits.
#
# Expected: manual_seed takes 64 bits, initial_seed() returns all of them, so two seeds that differ
# give two streams. numpy's default_rng behaves so.
# Seen: seeds that differ by a multiple of 2**32 give the same stream (the upper half is dropped),
# although initial_seed() shows two numbers.
# Why it matters: who derives seeds for (run, worker, epoch) by a 64-bit hash and keeps the upper half
# for one part, or counts runs by seed + (run << 32), trains the same dropout masks and batch orders
# in "independent" runs, and the standard deviation over seeds in the table is too small. Among
# hashes of 64 bits the first repetition comes after 65,000 streams, not after 4 billion.
#
# Takes a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch

seeds = [7, 7 + (1 << 32), 7 + (5 << 32), 8]
streams = [torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist() for seed in seeds]
shown = [torch.Generator().manual_seed(seed).initial_seed() for seed in seeds]
by_numpy = [np.random.default_rng(seed).random(4).tolist() for seed in seeds]
print("torch", torch.__version__)
for seed, stream in zip(shown, streams):
    print(f"initial_seed {seed:>12}:", [round(value, 4) for value in stream])
assert shown == seeds
assert streams[0] == streams[1] == streams[2] != streams[3]
assert len({tuple(stream) for stream in by_numpy}) == 4
PY
