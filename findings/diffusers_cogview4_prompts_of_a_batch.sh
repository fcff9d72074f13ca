#!/usr/bin/env bash
# A prompt of CogView 4 has other states beside a longer prompt than alone: padding is attended to, and there is more of it.
#
# Libraries: diffusers 0.42.1 (`CogView4Pipeline.encode_prompt`), transformers 5.23.0 (`GlmModel`), torch 2.13.0.
# Expected: what a prompt is encoded as depends on the prompt. Pipelines that pad to a fixed length give that; so do those that hand the
#   tokenizer's mask to the encoder.
# What happens: prompts are padded to the longest of the batch, then on the left to a multiple of 16, and the encoder gets no mask. Its
#   words attend to the padding before them. Two words change by a third here (random weights, so only that they change means something),
#   and the transformer is given 32 states for the prompt instead of 16.
# Why it matters: states are cached once and used for many steps of training; which batch a prompt was encoded in is then part of the data.
#   One image a call and a batch of images differ for the same prompt and seed.
# Way round: encode prompts one at a time (run below), in training and in sampling alike.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0
"$dir/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

warnings.filterwarnings("ignore")
print("torch", torch.__version__, "diffusers", version("diffusers"), "transformers", version("transformers"))
torch.set_num_threads(1)
torch.manual_seed(0)

words = ["<pad>", "a", "cat", "dog", "on", "the", "moon", "painting", "of", "very", "old", "house"]
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", padding_side="left")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
encoder = GlmModel(GlmConfig(vocab_size=len(words), head_dim=16, pad_token_id=0, **sizes)).eval()
pipe = CogView4Pipeline(tokenizer, encoder, None, None, FlowMatchEulerDiscreteScheduler())

short, long = "a cat", "a very old painting of the moon on the house " * 3


@torch.no_grad()
def states(prompts: list[str]) -> torch.Tensor:
    """Of the first prompt."""
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0][0]


alone, beside = states([short]), states([short, long])
print("states of 'a cat': alone", tuple(alone.shape), "beside a longer prompt", tuple(beside.shape))
words_alone, words_beside = alone[-2:], beside[-2:]
change = ((words_alone - words_beside).norm() / words_alone.norm()).item()
print(f"its two words' states change by {change:.0%}")

# The way round: prompts one at a time.
again = torch.cat([pipe.encode_prompt([short], do_classifier_free_guidance=False)[0] for _ in range(2)])
assert torch.equal(again[0], again[1]) and torch.equal(again[0], alone)

# The positive control: with the tokenizer's mask a left-padded batch gives each prompt its own states.
def masked(prompts: list[str]) -> torch.Tensor:
    inputs = tokenizer(prompts, padding="longest", return_tensors="pt")
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = encoder(inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=positions, output_hidden_states=True)
    return out.hidden_states[-2][0, -2:]


torch.testing.assert_close(masked([short]), masked([short, long]), rtol=1e-4, atol=1e-5)
assert alone.shape[0] == 16 and beside.shape[0] == 32, "CogView4Pipeline pads otherwise now"
assert change > 0.05, "a prompt's states no longer depend on its neighbours"
print("as described")
PY
