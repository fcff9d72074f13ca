"""Numbers of a config, by what they count: each kind has one range, and `true` and `false` are no numbers.

The maxima are far above what anybody trains, and low enough that a slip of the keyboard is refused at once instead of
taking hours or all memory. What a particular model, its data and the machine allow is checked later (`preflight.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field

#: Layers, blocks, heads.
MOST_LAYERS = 1024
#: Width of a residual stream, or of a noise embedding.
MOST_WIDTH = 2**16
#: Labels of a classifier or a diffusion model.
MOST_LABELS = 100_000
#: Tokens of a vocabulary.
MOST_TOKENS = 2**21
#: Height and width of an image or a latent.
MOST_PIXELS = 2**14
#: Tokens or characters of a text.
MOST_LENGTH = 2**21
#: Optimizer steps of a unit.
MOST_STEPS = 10**8
#: Levels of a grid: steps of a solver or of a denoising chain, levels of a measurement.
MOST_LEVELS = 10_000
#: Examples of a batch, generated samples, test examples.
MOST_SAMPLES = 10**7
#: Calls of a block, an example each, that one evaluation may take; and how many are said before it begins.
MOST_CALLS, MANY_CALLS = 10**11, 10**8
#: What seeds generators of torch, numpy and scikit-learn alike.
MOST_SEED = 2**32 - 1


def check_count(name: str, value: Any, most: int) -> None:
    """Refuse a number of things below 1, or beyond all use: the one check of a function's argument.

    Args:
        name: of the argument.
        value: a whole number.
        most: a limit of this module.

    Raises:
        ValueError: no whole number from 1 to `most`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()} (nor yes, no, on, off)")
    return value


IsNumber = BeforeValidator(_number)

_T = TypeVar("_T")

Int = Annotated[int, IsNumber]
#: A number whose range is checked by whoever has it.
Number = Annotated[float, IsNumber]
Float = Annotated[float, Field(allow_inf_nan=False), IsNumber]

Blocks = Annotated[int, Field(ge=1, le=MOST_LAYERS), IsNumber]
BlockIndex = Annotated[int, Field(ge=0, lt=MOST_LAYERS), IsNumber]
Width = Annotated[int, Field(ge=1, le=MOST_WIDTH), IsNumber]
Labels = Annotated[int, Field(ge=2, le=MOST_LABELS), IsNumber]
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS), IsNumber]
Length = Annotated[int, Field(ge=1, le=MOST_LENGTH), IsNumber]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS), IsNumber]
Epochs = Annotated[float, Field(gt=0, le=MOST_STEPS, allow_inf_nan=False), IsNumber]
Levels = Annotated[int, Field(ge=1, le=MOST_LEVELS), IsNumber]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES), IsNumber]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED), IsNumber]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), IsNumber]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), IsNumber]
Share = Annotated[float, Field(ge=0, le=1), IsNumber]
#: What logits are divided by: beyond these, its square, or they, leave what float32 can hold.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3), IsNumber]
#: A list of settings, every combination of which is measured.
Many = Annotated[tuple[_T, ...], Field(min_length=1, max_length=100)]

#: What a prediction feeds to the next step; `bridge` is the name in recipes and saved models of earlier versions.
FEEDBACK_NAMES = AliasChoices("feedback", "bridge")

#: What a prediction of labels feeds to the next denoising step, and what one of tokens does.
LabelFeedback = Literal["soft", "hard"]
TokenFeedback = Literal["soft", "hard", "sampled", "top-k"]

#: How what a classifier's blocks say is combined (`DiffusionBlocks.predict`).
Combination = Literal["mean", "product", "probabilities", "chain"]
#: How what several networks say of one target is averaged: their logits, or their probabilities.
LogitCombination = Literal["mean", "probabilities"]

#: How what an autoregressive model's blocks say of a token is combined (`DiffusionBlocks.generate`).
TokenCombination = Literal["mean", "probabilities", "chain"]
