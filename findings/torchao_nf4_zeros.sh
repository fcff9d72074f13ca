#!/usr/bin/env bash
# A weight that is zero is not zero in torchao's NF4, although the format has an exact zero.
#
# Libraries: torchao 0.18.0 (`NF4Tensor`), torch 2.13.0.
# Expected: NF4 (QLoRA, arXiv 2305.14314) has 16 values, one of them 0, so a block of zeros comes back as zeros.
# What happens: a block of 64 zeros has the scale 0, and 0 / 0 is given the first code, which stands for -1. The scale is itself kept
#   in 8 bits, as a difference from the mean of scales, and does not come back as 0. So the zeros come back as 0.005, all alike,
#   where other blocks of the tensor are of unit variance. Where all blocks have one largest value, the factor of the scales is infinite.
# Why it matters: rows of zeros are common where layers are grown, pruned or padded (vocabularies padded to a multiple of 64,
#   zero-initialised projections of diffusion transformers). Such a projection is silent by design, and in 4 bits it is not.
# Way round: leave layers with zeros in 16 bits, or put the zeros back after quantising (this project corrects scales and codes).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 torchao==0.18.0
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
from torchao.quantization import NF4Tensor

print("torch", torch.__version__, "torchao", version("torchao"))
torch.manual_seed(0)

weight = torch.zeros(8, 64)
weight[3:] = torch.randn(5, 64)
nf4 = NF4Tensor.from_tensor(weight, 64, 8)
back = nf4.get_original_weight()
print("values of the format:", [round(v, 3) for v in nf4.nf4.tolist()])
print("zeros come back as", sorted({round(v, 4) for v in back[:3].flatten().tolist()}))
print("largest weight of the others:", round(float(weight.abs().max()), 2))
assert 0.0 in nf4.nf4.tolist()
codes = nf4.quantized_data.flatten()[: 3 * 32].unique().tolist()  # two in a byte
print("their codes:", codes)
assert (back[:3] != 0).all() and back[:3].unique().numel() == 1 and codes == [0]

even = NF4Tensor.from_tensor(torch.full((8, 64), 0.5), 64, 8)
print("factor of equal scales:", even.quantization_factor.tolist())
assert torch.isinf(even.quantization_factor).all()
kept = torch.where(weight == 0, 0.0, back)  # the way round: which are zero is known when they are quantised
assert (kept[:3] == 0).all() and torch.equal(kept[3:], back[3:])
print("as described: zeros are not kept, unless they are put back")
PY
