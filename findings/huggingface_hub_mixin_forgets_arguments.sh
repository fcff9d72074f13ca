#!/usr/bin/env bash
# PyTorchModelHubMixin writes the class's default into config.json where the argument given was not plain JSON.
#
# Library: huggingface_hub 2.4.0 (safetensors 0.8.0, torch 2.13.0, numpy 2.4.6).
# Expected: save_pretrained records the arguments of the model, or says which it could not; from_pretrained refuses a file
#   that lacks some of the model's tensors.
# What happens: 1. sigma_data=np.float32(0.25), a torch.dtype or an activation class is left out as "not JSON", and then the
#   signature's default takes its place: config.json says 0.5. The loaded model is another function with the same
#   weights. 2. A missing tensor stays at its random initialisation, another one at every load, since the default is
#   strict=False. Neither gives a warning.
# Why it matters: numbers computed from data (mean, std, sigma_data, noise levels) ARE NumPy or torch scalars, and
#   hand-written diffusion transformers on the hub use this mixin. Every noise level is then scaled wrongly.
# Way round: pass plain numbers (`.item()`), or register `coders=`; load with from_pretrained(..., strict=True).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 huggingface_hub==2.4.0
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - "$dir/model" <<'PY'
import json
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn

print("huggingface_hub", huggingface_hub.__version__, "torch", torch.__version__)


class Denoiser(nn.Module, PyTorchModelHubMixin):
    """A denoiser that scales its input as EDM does."""

    def __init__(self, width: int = 4, sigma_data: float = 0.5, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.sigma_data, self.activation, self.linear = sigma_data, activation(), nn.Linear(width, width)

    def forward(self, z: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.activation(self.linear(z / (sigma**2 + float(self.sigma_data) ** 2) ** 0.5))


folder = Path(sys.argv[1])
images = np.array([-0.25, 0.25], dtype=np.float32)
model = Denoiser(width=8, sigma_data=images.std(), activation=nn.SiLU)
model.save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
loaded = Denoiser.from_pretrained(folder)
print(f"1. saved with sigma_data {model.sigma_data}, {type(model.activation).__name__}; config.json: {config};"
      f" loaded: {loaded.sigma_data}, {type(loaded.activation).__name__}")
z = torch.randn(64, 8)
print(f"   outputs differ by up to {(model(z, 0.1) - loaded(z, 0.1)).abs().max().item():.2f}")
assert config == {"width": 8, "sigma_data": 0.5} and loaded.sigma_data == 0.5 and isinstance(loaded.activation, nn.ReLU)
assert torch.equal(model.linear.weight, loaded.linear.weight)

file = folder / "model.safetensors"
save_file({name: tensor for name, tensor in load_file(file).items() if name != "linear.bias"}, file)
first, second = Denoiser.from_pretrained(folder), Denoiser.from_pretrained(folder)
print(f"2. without linear.bias in the file, two loads agree: {torch.equal(first.linear.bias, second.linear.bias)}")
assert not torch.equal(first.linear.bias, second.linear.bias)

# The way round.
try:
    Denoiser.from_pretrained(folder, strict=True)
except RuntimeError as error:
    assert "linear.bias" in str(error)
else:
    raise AssertionError("strict=True accepted a file without linear.bias")
Denoiser(sigma_data=images.std().item()).save_pretrained(folder)
assert Denoiser.from_pretrained(folder).sigma_data == 0.25
print("as described")
PY
