#!/usr/bin/env bash
# Triton's interpreter computes with the bits of bfloat16 numbers as if they were integers, and says nothing.
#
# Library: triton 3.6.0 (torch 2.13.0, numpy 2.4.6), TRITON_INTERPRET=1, which needs no GPU.
# Expected: a kernel that is right on a GPU is right in the interpreter, up to rounding; or what it cannot do is refused.
#   (The debugging guide says that bfloat16 is not supported, and gives a cast as the way round.)
# What happens: NumPy has no bfloat16, so tensors are held as their 16 bits. Loads, stores, casts and the maximum are right.
#   Sums, products, `tl.sum`, comparisons and `tl.dot` are of the bits: a product of two 32x32 matrices is off by a factor of
#   a billion. Only a number written in the kernel (`a * 2.0`) ends in an error.
# Why it matters: kernels for training take bfloat16, and the interpreter is how they are tested where there is no GPU. A
#   test that compares two such kernels, or asks for finite and repeatable numbers, passes; a right kernel looks wrong, and a
#   search for the fault ends nowhere.
# Way round: test with float16 and float32 operands, or cast to float32 in the kernel before any arithmetic.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
pip() { "${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.6
pip --no-deps --target "$dir/triton" triton==3.6.0
cat > "$dir/kernels.py" <<'PY'
import torch
import triton
import triton.language as tl

print("triton", triton.__version__, "torch", torch.__version__)


@triton.jit
def elementwise(x, y, out, N: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    if WHAT == "sum of two":
        result = a + b
    if WHAT == "product of two":
        result = a * b
    if WHAT == "the larger by a comparison":
        result = tl.where(a > b, a, b)
    if WHAT == "the larger by tl.maximum":
        result = tl.maximum(a, b)
    if WHAT == "sum of all":
        result = tl.sum(a, 0) + tl.zeros([N], tl.float32)
    if WHAT == "sum of two, cast first":
        result = a.to(tl.float32) + b.to(tl.float32)
    tl.store(out + i, result)


@triton.jit
def matmul(x, y, out, N: tl.constexpr, CAST: tl.constexpr):
    i = tl.arange(0, N)
    places = i[:, None] * N + i[None, :]
    a, b = tl.load(x + places), tl.load(y + places)
    if CAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out + places, tl.dot(a, b))


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.double(), expected.double()
    return float(((value - expected).norm() / expected.norm()).nan_to_num(float("inf")))


generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(64, generator=generator) for _ in range(2))
m, n = (torch.randn(32, 32, generator=generator) for _ in range(2))
expected = {
    "sum of two": lambda a, b: a + b,
    "product of two": lambda a, b: a * b,
    "the larger by a comparison": torch.maximum,
    "the larger by tl.maximum": torch.maximum,
    "sum of all": lambda a, b: a.sum().expand(64),
    "sum of two, cast first": lambda a, b: a + b,
}
right = {"the larger by tl.maximum", "sum of two, cast first", "matrix product, cast first"}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    errors = {}
    for what, reference in expected.items():
        x, y, out = a.to(dtype), b.to(dtype), torch.empty(64)
        elementwise[(1,)](x, y, out, 64, what)
        errors[what] = error(out, reference(x.double(), y.double()))
    for name, cast in (("matrix product", False), ("matrix product, cast first", True)):
        x, y, out = m.to(dtype), n.to(dtype), torch.empty(32, 32)
        matmul[(1,)](x, y, out, 32, cast)
        errors[name] = error(out, x.double() @ y.double())
    for name, value in errors.items():
        print(f"{str(dtype):15} {name:28} relative error {value:.2g}")
        wrong = dtype == torch.bfloat16 and name not in right
        assert value > 0.5 if wrong else value < 2e-3, (dtype, name, value)
print("as described")
PY
TRITON_INTERPRET=1 PYTHONPATH="$dir/triton" "$dir/venv/bin/python" "$dir/kernels.py"
