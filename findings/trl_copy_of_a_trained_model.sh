#!/usr/bin/env bash
# A copy of a model that was given to trl's SFTTrainer computes with the weights of the original.
#
# Libraries: trl 1.16.0, transformers 5.23.0, torch 2.13.0.
# Expected: copy.deepcopy(model), torch's AveragedModel(model) and other copies (a teacher, a reference, an exponential average)
#   compute with the weights they hold.
# What happens: SFTTrainer puts a `forward` of its own on the instance, a closure over the bound forward of that very model. A copy
#   has the same closure: whatever its own weights, its logits are those of the original, and gradients go to the original's
#   parameters. No error, no warning. With the copy's weights all zero the logits are bit-equal to the original's.
# Why it matters: weight averages are evaluated as if they were the last weights; a frozen reference follows the student; a copy
#   that is fine-tuned further trains the original. save_pretrained of the copy writes the copy's weights, so figures measured
#   on it are of another model than the one saved.
# Way round: vars(copy).pop("forward", None), or save the model and load it again.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 trl==1.16.0
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import copy
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")))
letters = {"<pad>": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(26)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [])), pad_token="<pad>", eos_token="<eos>"
)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=28, **sizes))
tokens = torch.tensor([[2, 3, 4, 5]])


def copies_that_follow_the_original() -> list[str]:
    """Names of the ways to copy whose copies, with weights of zero, do not give logits of zero."""
    found = []
    for name, copied in (("deepcopy", copy.deepcopy(model)), ("AveragedModel", AveragedModel(model))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
            logits = copied(input_ids=tokens).logits
            if torch.equal(logits, model(input_ids=tokens).logits):
                found.append(name)
            else:
                assert not logits.any()
    return found


assert copies_that_follow_the_original() == [], "before, a copy computes with its own weights"
data = Dataset.from_list([{"prompt": "abc", "completion": "defg"}] * 8)
arguments = SFTConfig("out", max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
found = copies_that_follow_the_original()
print("copies that compute with the original's weights, after SFTTrainer:", found)
assert found == ["deepcopy", "AveragedModel"]

student = copy.deepcopy(model)
model.zero_grad()
student(input_ids=tokens, labels=tokens).loss.backward()
mine = sum(p.grad is not None for p in student.parameters())
theirs = sum(p.grad is not None for p in model.parameters())
print(f"a backward pass of the copy gives gradients to {mine} of its own parameters and {theirs} of the original's")
assert mine == 0 < theirs

vars(model).pop("forward")  # the way round
assert copies_that_follow_the_original() == []
print("without the attribute `forward` copies compute with their own weights")
PY
