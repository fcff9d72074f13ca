#!/usr/bin/env bash
# A CPU generator of torch reads only the low 32 bits of its seed: seeds that differ above them give the same numbers.
#
# Libraries: torch 2.13.0, numpy 2.4.6.
# Expected: `manual_seed` takes 64 bits, `initial_seed` gives them back, and a hash of (run, block, step) makes a stream of its own.
# What happens: torch.Generator().manual_seed(5) and manual_seed(5 + 2**32) draw the same numbers.
#   NumPy's generators read all bits of a seed.
# Why it matters: keyed randomness (64-bit hashes as seeds) has 2^32 streams on a CPU. Among 100,000 keys one pair is expected to share its
#   stream, and of keys that keep what tells them apart in the upper half all do.
# Way round: keep what must differ in the low 32 bits; mix the upper half into them before seeding.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)


def drawn(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    assert generator.initial_seed() == seed
    return torch.randn(64, generator=generator)


def mixed(seed: int) -> int:
    """The way round: both halves in the lower one."""
    return (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF


def of_numpy(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(64)


keys = [5 + (step << 32) for step in range(8)]
streams = {
    "torch": {tuple(drawn(key).tolist()) for key in keys},
    "torch, halves mixed": {tuple(drawn(mixed(key)).tolist()) for key in keys},
    "numpy": {tuple(of_numpy(key).tolist()) for key in keys},
}
for name, different in streams.items():
    print(f"{name:20s}: {len(different)} streams of {len(keys)} seeds that differ above bit 32")
assert [len(different) for different in streams.values()] == [1, 8, 8]
print("as described")
PY
