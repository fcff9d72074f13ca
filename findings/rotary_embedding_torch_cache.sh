#!/usr/bin/env bash
# rotary-embedding-torch: one bfloat16 call spoils later float32 calls, and the second axis of a 2-D grid ignores its offset.
#
# Library: rotary-embedding-torch 0.9.1 (einops 0.8.2, torch 2.13.0).
# Expected: a rotation depends on position and frequency. rotate_queries_or_keys and get_axial_freqs give what their
#   arguments say, whatever was called before.
# What happens: angles are cached (by default) with the length as the only key.
#   1. Positions are counted in the dtype of the queries. bfloat16 has eight bits, so positions 256 and 257 are one, and of
#      1,024 positions about half are left.
#   2. A bfloat16 call on a float32 module (a half-precision evaluation, say) leaves those angles in the cache: float32
#      calls afterwards rotate by them too.
#   3. get_axial_freqs(h, w, offsets=(0, 4)) gives the second axis the cached angles of the first: the offset is lost.
# Why it matters: it is the rotary package of many small diffusion and vision transformers. Crops, windows and blocks of
#   positions are where offsets are used, and nothing but the numbers shows that they did nothing.
# Way round: RotaryEmbedding(..., cache_if_possible=False), and rotate in float32: rotate(q.float()).to(q.dtype).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 einops==0.8.2 rotary-embedding-torch==0.9.1
"$dir/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from rotary_embedding_torch import RotaryEmbedding

print("rotary-embedding-torch", version("rotary-embedding-torch"), "torch", torch.__version__)
length, dim = 1024, 32
queries = torch.ones(1, 1, length, dim)
right = RotaryEmbedding(dim, cache_if_possible=False).rotate_queries_or_keys(queries)

rotary = RotaryEmbedding(dim)
low = rotary.rotate_queries_or_keys(queries.bfloat16())[0, 0]
assert low.dtype == torch.bfloat16
distinct = low.unique(dim=0).shape[0]
print(f"1. bfloat16 queries: {distinct} distinct rotations for {length} positions;"
      f" 256 and 257 equal: {torch.equal(low[256], low[257])}")
assert torch.equal(low[256], low[257]) and distinct < 600
assert right[0, 0].to(torch.bfloat16).unique(dim=0).shape[0] == length  # bfloat16 itself can tell them apart

after = rotary.rotate_queries_or_keys(queries)
off = (after - right).abs().max().item()
print(f"2. float32 queries after that call: off by up to {off:.2f} (rotated ones are at most 1.42)")
assert after.dtype == torch.float32 and off > 1

grid = RotaryEmbedding(dim).get_axial_freqs(8, 8, offsets=(0, 4))
plain = RotaryEmbedding(dim).get_axial_freqs(8, 8)
exact = RotaryEmbedding(dim, cache_if_possible=False).get_axial_freqs(8, 8, offsets=(0, 4))
print(f"3. positions of the second axis with offset 4: {grid[0, :, dim].tolist()}, without the cache: {exact[0, :, dim].tolist()}")
assert torch.equal(grid, plain) and not torch.equal(grid, exact)

# The way round: no cache, float32 rotation, then the dtype of the model.
safe = RotaryEmbedding(dim, cache_if_possible=False).rotate_queries_or_keys(queries.bfloat16().float()).bfloat16()
assert (safe.float() - right).abs().max() < 0.01
print("as described")
PY
