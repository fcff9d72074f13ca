"""What well-known classes lack that no family converts: for the refusal, and docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping

_OWN_ATTENTION = "its attention takes no function from outside (transformers' AttentionInterface), to see two streams"
_STAGES = "its layers come in stages of different widths, and blocks denoise at one width"
_NO_STACK = "its layers are no stack: those at its end also read what those at its start gave"
#: Classes that no family can convert as they are -> what is missing.
MISSING: Mapping[str, str] = {
    "GPTJForCausalLM": _OWN_ATTENTION,
    "BloomForCausalLM": _OWN_ATTENTION,
    "FalconForCausalLM": _OWN_ATTENTION,
    "DeepseekV3ForCausalLM": "first_k_dense_replace counts layers from the model's start, which a block may not have",
    "MambaForCausalLM": "it carries a state from token to token, with no keys and values for two streams to share",
    "AlbertForMaskedLM": "its layers are one, run again and again, and blocks that train apart have their own",
    "SwinForImageClassification": _STAGES,
    "ConvNextForImageClassification": _STAGES,
    "ResNetForImageClassification": _STAGES,
    "HieraForImageClassification": _STAGES,
    "PvtV2ForImageClassification": _STAGES,
    "HunyuanDiT2DModel": _NO_STACK,
    "ChromaTransformer2DModel": "one module gives all its layers their modulation, by their number in the whole model",
    "CogVideoXTransformer3DModel": "it predicts v of a schedule of timesteps, for which there is no noise process",
    "UNet2DModel": _NO_STACK,
    "UNet2DConditionModel": _NO_STACK,
}
