"""What follows from the config keeps its digits when a model is cast: in memory as after saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers_models import batch_for, tiny_diffuser
from helpers import CAUSAL_FAMILIES, DIT_FAMILIES, tiny
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.loading import load
from diffusionblocks.models import DiT, RecurrentDepth
from diffusionblocks.models.masked_transformer import RotaryPositions

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda model: nn.Module.to(model, torch.bfloat16),
}


#: classes of text to image and video with positions that no file holds -> further values of their tiny configs
CONDITIONED = {
    "PixArtTransformer2DModel": {},
    "SanaTransformer2DModel": {"interpolation_scale": 2.0},
    "WanTransformer3DModel": {},
}


def of(family: str) -> nn.Module:
    if family in CONDITIONED:
        return tiny_diffuser(family, **CONDITIONED[family])  # type: ignore[no-any-return]
    if family != "recurrent":
        return tiny(family, layers=2)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "mlp_size": 16, "vocab_size": 27, "sequence_length": 12}
    return RecurrentDepth(**sizes, num_prelude_layers=1, num_core_layers=1, num_coda_layers=1)


def converted(model: nn.Module) -> db.DiffusionBlocks:
    one = isinstance(model, RecurrentDepth)
    return db.convert(model, db.BlocksConfig(num_blocks=1 if one else 2))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that no file holds."""
    files = model.state_dict()
    return {name: tensor for name, tensor in model.named_buffers() if name not in files}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.each_value
@pytest.mark.parametrize("family", [*DIT_FAMILIES, *CAUSAL_FAMILIES, *CONDITIONED, "masked", "recurrent", "vit"])
@pytest.mark.parametrize("how", CASTS)
def test_a_cast_rounds_weights_alone(family: str, how: str, tmp_path: Path) -> None:
    exact, cast = buffers(converted(of(family))), CASTS[how](converted(of(family)))
    assert exact or family == "masked"
    assert isinstance(cast, db.DiffusionBlocks)
    assert {p.dtype for p in cast.parameters()} == {torch.float16 if how == "half" else torch.bfloat16}
    assert same(buffers(cast), exact)
    assert same(buffers(cast.float()), exact)
    low = CASTS[how](of(family))
    before = converted(low)  # one that was cast before it was converted, and then written
    before.save_pretrained(tmp_path)
    assert same(buffers(before), exact)
    assert same(buffers(load(tmp_path)), exact)
    assert same(buffers(converted(low.float())), exact)


def test_a_model_of_ours_alone() -> None:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "num_layers": 1}
    model = DiT(**sizes, num_attention_heads=2, num_classes=4)
    exact = {name: tensor.clone() for name, tensor in buffers(model).items()}
    assert exact
    low = nn.Module.to(model, torch.bfloat16)
    assert same(buffers(low), exact)
    with torch.no_grad():
        images = low(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), torch.rand(2), torch.tensor([0, 1]))
    assert (images if isinstance(images, Tensor) else images.sample).dtype == torch.bfloat16
    assert list(nn.Module.to(RotaryPositions(8), torch.bfloat16).buffers()) == []  # made anew in every pass


def test_positions_of_the_librarys_model_are_its_own() -> None:
    """The positive control: the embedding that stands in for diffusers' computes the same, and at other sizes too."""
    original = of("diffusers-dit")
    theirs, ours = original.get_submodule("pos_embed"), converted(original).block(0).network.get_submodule("pos_embed")
    for side in (8, 12):
        images = torch.randn(2, 3, side, side)
        assert torch.equal(theirs(images), ours(images))
    assert type(theirs) is not type(ours)
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("lora", [None, db.LoraConfig(rank=2)])
@pytest.mark.parametrize("name", CONDITIONED)
def test_a_half_precision_model_samples_as_before_it_was_saved(
    name: str, lora: db.LoraConfig | None, tmp_path: Path
) -> None:
    """One block has no file of common weights, and the first tensors in its own are float32 updates."""
    model = db.convert(of(name).to(torch.bfloat16), db.BlocksConfig(num_blocks=1, lora=lora)).eval()
    batch = batch_for(model, name)
    sizes = batch.pop("pixel_values").shape[2:]
    options: dict = {"seeds": [0, 1], "steps": 2, "inputs": batch, "sizes": tuple(sizes)}
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).sample(**options), model.sample(**options))
