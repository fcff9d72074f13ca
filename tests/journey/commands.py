"""The small models that the tests of the command line train, and their commands."""

from __future__ import annotations

from pathlib import Path

from diffusionblocks.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
DIGITS = str(RECIPES / "dit" / "digits.yaml")
VIT = str(RECIPES / "vit" / "digits.yaml")
LATENTS = str(RECIPES / "dit" / "imagenet-latents.yaml")


def sets(**changes: object) -> list[str]:
    """`--set` arguments; `__` stands for the dot."""
    return [part for name, value in changes.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]


TINY = sets(
    device="cpu",
    model__config__hidden_size=16,
    model__config__num_layers=3,
    model__config__num_attention_heads=2,
    trunk__steps=6,
    train__steps=4,
    train__batch_size=16,
    train__warmup_steps=0,
    evaluate__samples=40,
    evaluate__steps="[3]",
    evaluate__batch_size=25,
    evaluate__features="null",
)


#: the digits' classifier, without a number of steps
TINY_VIT = sets(
    device="cpu",
    model__config__hidden_size=16,
    model__config__num_hidden_layers=3,
    train__batch_size=16,
    train__warmup_steps=0,
    evaluate__steps="[1, 3]",
    evaluate__seeds="[2]",
)


def sample(run: Path, out: Path, *arguments: str) -> int:
    return main(["sample", DIGITS, "--model", str(run / "model"), "--out", str(out), "--quiet", *TINY, *arguments])
