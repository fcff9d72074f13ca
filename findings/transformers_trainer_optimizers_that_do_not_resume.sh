#!/usr/bin/env bash
# Runs of transformers.Trainer with some of its `optim` names cannot be resumed: the state is not in optimizer.pt, or is not read again.
#
# Libraries: transformers 5.23.0, torch 2.13.0, galore-torch 1.0, apollo-torch 1.0.3, grokadamw 0.1.2; adamw_torch as the control.
# Expected: a run that goes on from checkpoint-3 has the weights of one that was not interrupted, on a CPU bit for bit.
# What happens: `galore_adamw_layerwise`, `apollo_adamw_layerwise` and `grokadamw` write an optimizer.pt without usable state, and
#   resume without a word: moments, steps and projections start anew in the middle of the schedule. `galore_adamw` and
#   `apollo_adamw` write objects into optimizer.pt, which Trainer itself then refuses to read (weights_only=True): every checkpoint
#   of such a run is one that cannot go on.
# Why it matters: GaLore and APOLLO are chosen for long runs on small machines, the ones that are interrupted.
# Way round: adamw_torch_8bit (torchao) or adafactor, which resume exactly; or save_only_model=True, so that nobody counts on it.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
install() {
  "${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check "$@"
}
install torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0
install --no-deps galore-torch==1.0 apollo-torch==1.0.3 grokadamw==0.1.2 bitsandbytes==0.50.2
cd "$dir"
"$dir/venv/bin/python" - <<'PY' 2>/dev/null
import pickle
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

names = ("transformers", "torch", "galore-torch", "apollo-torch", "grokadamw")
print(*(f"{name} {version(name)}" for name in names))
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": row, "labels": row} for row in torch.randint(28, (32, 8), generator=generator)]
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def trained(optim: str, folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
    """Weights after six steps, of which the first three may be those of a checkpoint."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=28, **sizes))
    low_rank = {"optim_target_modules": "all-linear"} if optim[:6] in ("galore", "apollo") else {}
    arguments = TrainingArguments(
        folder, max_steps=6, save_steps=3, learning_rate=1e-3, optim=optim, per_device_train_batch_size=4,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", **low_rank,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
    return model.state_dict()


def outcome(optim: str) -> str:
    """What becomes of a run that goes on from its third step."""
    straight = trained(optim, f"{optim}-a")
    try:
        resumed = trained(optim, f"{optim}-b", f"{optim}-a/checkpoint-3")
    except pickle.UnpicklingError:
        return "refuses its own checkpoint"
    apart = max((straight[name] - resumed[name]).abs().max().item() for name in straight)
    return "the same bits" if apart == 0 else f"other weights, by up to {apart:.1e}"


expected = {
    "adamw_torch": "the same bits",
    "adafactor": "the same bits",
    "galore_adamw": "refuses its own checkpoint",
    "apollo_adamw": "refuses its own checkpoint",
    "galore_adamw_layerwise": "other weights",
    "apollo_adamw_layerwise": "other weights",
    "grokadamw": "other weights",
}
for optim, start in expected.items():
    seen = outcome(optim)
    print(f"{optim:24} {seen}", flush=True)
    assert seen.startswith(start), (optim, seen)
PY
