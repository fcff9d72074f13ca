#!/usr/bin/env bash
# A LoRA initialised with "pissa_niter_4" computes something else after it was saved and loaded: the base weights it needs are drawn anew.
#
# Libraries: peft 0.21.2, torch 2.13.0.
# Expected: save_pretrained, then PeftModel.from_pretrained on the same base model, gives the outputs of the trained model.
# What happens: PiSSA takes the leading directions out of the base weights and trains them; the folder holds A and B alone. Loading
#   repeats the decomposition on the base model and then puts the saved A and B in place. With "pissa" (an exact SVD) what is left of the base
#   comes out the same. "pissa_niter_N" is a randomised SVD of another draw: A and B meet a base that they were not trained with.
#   No error, no warning. Where singular values fall as 1/k, 4 iterations lose a tenth of what training changed; weights as PyTorch
#   initialises them have no leading directions, and there 16 iterations lose two fifths.
# Why it matters: the fast form is the one for large models, where an exact SVD takes minutes a layer. The model that is measured in training is not
#   the one that is shared, and every load gives another one.
# Way round: "pissa", or save the base as it is after the initialisation too, or set the seed of get_peft_model before loading as well (all run below).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import copy
import tempfile

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

print("torch", torch.__version__, "peft", peft.__version__)
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.GELU(), torch.nn.Linear(128, 128))
falling = copy.deepcopy(base)
for layer in (falling[0], falling[2]):  # the same directions and size, with singular values that fall as 1 / k
    u, s, v = torch.linalg.svd(layer.weight.detach())
    rank = 1 / torch.arange(1, 129)
    layer.weight.data = u @ torch.diag(rank * s.norm() / rank.norm()) @ v
x, target = torch.randn(64, 128), torch.randn(64, 128)


def loaded(kind: str, base: torch.nn.Module = base, own_base: bool = False, seed: int = 2) -> float:
    """How far outputs are from the trained model's after saving and loading, as a part of what training changed."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, init_lora_weights=kind, target_modules=["0", "2"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        after, before = model(x), base(x)
        model.save_pretrained(folder)
        torch.manual_seed(seed)
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        if own_base:  # what initialisation left of the base weights, saved by hand
            again.load_state_dict({n: w for n, w in model.state_dict().items() if "base_layer" in n}, strict=False)
        return float((again(x) - after).norm() / (after - before).norm())


kinds = ("pissa", "pissa_niter_1", "pissa_niter_4", "pissa_niter_16")
for name, weights in (("initialised", base), ("falling as 1/k", falling)):
    apart = {kind: loaded(kind, weights) for kind in kinds}
    print(name, ": error after loading, in parts of what training changed:", {kind: round(e, 3) for kind, e in apart.items()})
    assert apart["pissa"] < 1e-3 and apart["pissa_niter_1"] > apart["pissa_niter_4"] > 0.03
    assert apart["pissa_niter_16"] > (0.2 if weights is base else 0.001)
ways = loaded("pissa_niter_4", own_base=True), loaded("pissa_niter_4", seed=1)
print("pissa_niter_4 with the base saved too, and with the seed set:", [round(e, 6) for e in ways])
assert max(ways) < 1e-3
print("as described")
PY
