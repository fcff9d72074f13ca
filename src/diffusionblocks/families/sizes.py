"""Sizes in the configs of models: what a config may ask for, and what goes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.fields import MOST_LABELS, MOST_LAYERS, MOST_LENGTH, MOST_PIXELS, MOST_TOKENS, MOST_WIDTH

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "num_core_layers", "mean_recurrence", "backprop_depth")
_COUNTS = ("num_attention_heads", "num_key_value_heads", "n_heads")
_WIDTHS = ("hidden_size", "dim", "head_dim", "attention_head_dim", "embedding_size")
_CHANNELS = ("num_channels", "in_channels", "out_channels")

#: Config values that are sizes of a model's weights or inputs -> (lowest, highest). A pretrained model has its own.
SIZES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys((*_DEPTHS, *_COUNTS), (1, MOST_LAYERS)),
    **dict.fromkeys(("num_prelude_layers", "num_coda_layers"), (0, MOST_LAYERS)),
    **dict.fromkeys(_WIDTHS, (1, MOST_WIDTH)),
    **dict.fromkeys(("intermediate_size", "mlp_size", "hidden_dim"), (1, 16 * MOST_WIDTH)),
    **dict.fromkeys(("image_size", "sample_size", "patch_size"), (1, MOST_PIXELS)),
    **dict.fromkeys(_CHANNELS, (1, MOST_LABELS)),
    "vocab_size": (2, MOST_TOKENS),
    "sequence_length": (1, MOST_LENGTH),
    "max_position_embeddings": (1, 2**27),  # of rotary positions, which cost nothing
    "num_labels": (2, MOST_LABELS),
    "num_classes": (0, MOST_LABELS),
    "num_embeds_ada_norm": (1, MOST_LABELS),
}
_BY_AXIS = ("patch_size",)  # Wan has three: of frames, rows and columns
_MOST = 2**31 - 1  # of any other whole number


def check_sizes(values: Mapping[str, Any], where: str = "model.config") -> None:
    """Refuse sizes out of range before a config is made of them: some classes list their layers or labels there.

    Args:
        values: plain config values.
        where: what messages call them.

    Raises:
        ValueError: a size that is no whole number, or out of its range; or any number beyond 2^31.
    """
    for name, value in values.items():
        if name.endswith("_config") and isinstance(value, Mapping):  # a part's, of a model of several
            check_sizes(value, f"{where}.{name}")
        if name in _BY_AXIS and isinstance(value, list | tuple) and len(value) == 3:
            for number in value:
                check_sizes({name: number}, where)
            continue
        low, high = SIZES.get(name, (-_MOST, _MOST))
        if name in SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{where}.{name} = {value!r}: must be a whole number from {low} to {high}")
        if isinstance(value, int) and not low <= value <= high:
            raise ValueError(f"{where}.{name} = {value}: must be from {low} to {high}")


def check_shape(config: Any, where: str = "model.config") -> None:
    """Refuse sizes that do not go together.

    Raises:
        ValueError: heads that do not divide the width, or keys that do not divide the heads; patches that do not
            divide the image.
    """

    def size(*names: str) -> tuple[str, int | None]:
        name = next((name for name in names if getattr(config, name, None) is not None), names[0])
        return name, getattr(config, name, None)

    (_, width), (_, heads), (_, keys) = size("hidden_size"), size("num_attention_heads"), size("num_key_value_heads")
    if width and heads and getattr(config, "head_dim", None) in (None, width // heads) and width % heads:
        raise ValueError(
            f"{where}.hidden_size = {width} does not divide into num_attention_heads = {heads}: set "
            f"{where}.hidden_size to {-(-width // heads) * heads}"
        )
    if heads and keys and heads % keys:
        raise ValueError(
            f"{where}.num_attention_heads = {heads} do not share num_key_value_heads = {keys} evenly: set "
            f"{where}.num_key_value_heads to one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
        )
    (image, pixels), (_, patch) = size("image_size", "sample_size"), size("patch_size")
    if isinstance(pixels, int) and isinstance(patch, int) and pixels % patch:
        fitting = [n for n in range(1, pixels + 1) if pixels % n == 0]
        raise ValueError(
            f"{where}.patch_size = {patch} does not divide {image} = {pixels}: set {where}.patch_size to one of "
            f"{fitting}"
        )
