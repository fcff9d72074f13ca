#!/usr/bin/env bash
# Quantising GPT-2 with torchao makes it larger: its layers are passed by, and the head is untied from the embedding.
#
# Libraries: torchao 0.18.0 (`quantize_`), transformers 5.23.0 (`GPT2LMHeadModel`), torch 2.13.0; `LlamaForCausalLM` as the control.
# Expected: quantize_(model, Int8WeightOnlyConfig()) keeps the weights of linear layers in a byte, or says what it could not do.
# What happens: GPT-2's projections are transformers' `Conv1D`, a linear layer with its weight transposed, and no `nn.Linear`. None is quantised. The one
#   `nn.Linear` is the head, whose weight is the embedding's: it becomes an 8-bit copy, and the embedding stays. No warning.
# Why it matters: GPT-2 is what small experiments are made of. Memory is measured as "8 bits", losses as "without harm", and neither is of a quantised
#   model. Training goes on with two tables where there was one.
# Way round: make `nn.Linear` layers of the `Conv1D` first, and leave the head out by a filter (run below). Look at the types of the parameters.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0 torchao==0.18.0
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

print("torch", torch.__version__, "torchao", version("torchao"), "transformers", version("transformers"))


def bytes_of(model) -> int:
    """The bytes of all parameters, each counted once."""
    parts = []
    for parameter in model.parameters():
        names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        parts += [getattr(parameter, name) for name in names] or [parameter]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))


def quantised(model) -> list[str]:
    """The names of the weights that are kept in 8 bits."""
    return [name for name, parameter in model.named_parameters() if type(parameter) is not torch.nn.Parameter]


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 512}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


torch.manual_seed(0)
model = gpt2()
before, tied = bytes_of(model), model.lm_head.weight is model.transformer.wte.weight
quantize_(model, Int8WeightOnlyConfig())
print("GPT-2:", quantised(model), "in 8 bits; bytes", before, "->", bytes_of(model))
print("head tied to the embedding:", tied, "->", model.lm_head.weight is model.transformer.wte.weight)
assert quantised(model) == ["lm_head.weight"] and bytes_of(model) > before
assert tied and model.lm_head.weight is not model.transformer.wte.weight

llama = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)).eval()
before = bytes_of(llama)
quantize_(llama, Int8WeightOnlyConfig())
print("Llama:", len(quantised(llama)), "weights in 8 bits; bytes", before, "->", bytes_of(llama))
assert len(quantised(llama)) == 15 and bytes_of(llama) < before

model, tokens = gpt2(), torch.arange(32)[None]
with torch.no_grad():
    logits = model(tokens).logits
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Conv1D):
                linear = torch.nn.Linear(*layer.weight.shape)
                linear.weight.copy_(layer.weight.T)
                linear.bias.copy_(layer.bias)
                setattr(module, name, linear)
    assert torch.allclose(model(tokens).logits, logits, atol=1e-5)
    before = bytes_of(model)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda layer, name: isinstance(layer, torch.nn.Linear) and name != "lm_head")
    print("GPT-2 of nn.Linear:", len(quantised(model)), "weights in 8 bits; bytes", before, "->", bytes_of(model))
assert len(quantised(model)) == 8 and bytes_of(model) < before
print("as described")
PY
