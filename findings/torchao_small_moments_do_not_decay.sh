#!/usr/bin/env bash
# torchao's 8-bit Adam keeps the moments of small bfloat16 weights in bfloat16, where they cannot decay: a norm's step stays small for good.
#
# Libraries: torchao 0.18.0 (`AdamW8bit`; `Adam8bit`, and those of 4 bits and fp8 share the code), torch 2.13.0.
# Expected: small tensors (below 4,096 elements) are left unquantised because they need the precision, so their state is at least as exact.
# What happens: the state of such a tensor is made by `zeros_like`, in the dtype of the weight. A bfloat16 number times 0.999 is rounded to
#   itself: after one gradient of 1 and 2,000 of 0 the second moment is 0.00099945, where 0.000135 is right. That of a tensor of 4,096
#   elements, in 8 bits, is right, as each block of 256 has a float32 scale.
# Why it matters: norms, biases and small heads of a bfloat16 model are below 4,096 elements. One large gradient, such as those at the
#   beginning, divides all later steps of these weights, with no error and no difference in memory.
#   torch's own AdamW does the same to every bfloat16 weight; here it is the small ones alone, which one would think are the exact ones.
# Way round: float32 weights where they are small (run below).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 torchao==0.18.0
"$dir/venv/bin/python" - 2>"$dir/remarks" <<'PY'
from importlib.metadata import version

import torch
from torchao.optim import AdamW8bit

print("torch", torch.__version__, "torchao", version("torchao"))
torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")  # the same arithmetic, without a compiler
QUIET, BETA = 2000, 0.999


def second_moment(elements: int, dtype: torch.dtype) -> float:
    """After one gradient of 1 and many of 0."""
    weight = torch.nn.Parameter(torch.zeros(elements, dtype=dtype))
    optimizer = AdamW8bit([weight], lr=1e-3, betas=(0.9, BETA), weight_decay=0.0)
    for step in range(QUIET + 1):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    state = optimizer.state[weight]["exp_avg_sq"]
    return float((state.dequantize() if hasattr(state, "dequantize") else state).float().mean())


right = (1 - BETA) * BETA**QUIET
moments = {
    "4,096 elements, bfloat16": second_moment(4096, torch.bfloat16),
    "2,048 elements, bfloat16": second_moment(2048, torch.bfloat16),
    "2,048 elements, float32": second_moment(2048, torch.float32),
}
print(f"second moment that is right: {right:.6f}")
for name, value in moments.items():
    print(f"{name}: {value:.6f}")
large, small, small32 = moments.values()
assert abs(large / right - 1) < 0.01 and abs(small32 / right - 1) < 0.01
assert small > 7 * right
print("as described")
PY
