"""A block as an ordinary model gives what the block gives, at its level and for its z, in every family that has one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CAUSAL_FAMILIES,
    CAUSAL_VARIANTS,
    HIDDEN,
    LENGTH,
    NUM_LABELS,
    convert,
    noise_batch,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    token_batch,
)
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.common.seeds import keyed_generator
from diffusionblocks.models import RecurrentDepth

#: A classifier -> the class that has a place for the token of z.
HELD = {
    "vit": "DeiTForImageClassification",
    "vit-msn": "DeiTForImageClassification",
    "dinov2": "Dinov2WithRegistersForImageClassification",
    "dinov2-registers": "Dinov2WithRegistersForImageClassification",
    "dinov3": "DINOv3ViTForImageClassification",
}


def trained(family: str, **config: Any) -> db.DiffusionBlocks:
    """A converted model whose every weight has moved, so that level and z count."""
    model = convert(family, **config).eval()
    randomise_adaptive(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(1)))
    return model


def some_z(seed: int = 3) -> Tensor:
    return torch.randn(HIDDEN, generator=seeded(seed))


def of_block(model: db.DiffusionBlocks, block: int, level: float, z: Tensor, images: Tensor) -> Tensor:
    """Context logits of a block that is shown one z."""
    levels = torch.full((len(images),), level)
    with torch.no_grad():
        return model.block(block)({"pixel_values": images}, z.expand(len(images), -1), levels, context=True)  # type: ignore[no-any-return]


def logits(exported: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return exported(inputs).logits  # type: ignore[no-any-return]


# ---- classifiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["extra", "linear", "replace-cls"])
@pytest.mark.parametrize("family", HELD)
def test_a_classifiers_block_at_a_level_is_an_ordinary_classifier(family: str, token: str) -> None:
    model = trained(family, target={"token": token})
    images = noise_batch()["pixel_values"]
    for block in range(3):
        low, high = model.partition.interval(block)
        for level, z in ((high, some_z()), ((low * high) ** 0.5, torch.zeros(HIDDEN))):
            exported: Any = model.export_block(block, level, z=z)
            assert type(exported).__name__ == (type(tiny(family)).__name__ if token == "replace-cls" else HELD[family])
            assert exported.config.num_hidden_layers == 1
            expected = of_block(model, block, level, z, images)
            torch.testing.assert_close(logits(exported, images), expected, rtol=0, atol=5e-6)
    # Control: level and z count, in the model as in the block.
    other_level, other_z = model.export_block(2, low, z=z), model.export_block(2, level, z=some_z(4))
    assert (logits(other_level, images) - expected).abs().max() > 1e-3
    assert (logits(other_z, images) - expected).abs().max() > 1e-3


def test_by_default_it_is_the_noisiest_level_that_is_read_and_noise_of_it() -> None:
    model = trained("vit")
    images = noise_batch()["pixel_values"]
    for block, level in enumerate(model.partition.levels(model.noise)[:-1]):
        z = level * torch.randn(HIDDEN, generator=keyed_generator(model.blocks_config.seed, block, 0, "export"))
        expected = of_block(model, block, level, z, images)
        exported = model.export_block(block)
        torch.testing.assert_close(logits(exported, images), expected, rtol=0, atol=5e-6)
        assert same_states(exported.state_dict(), model.export_block(block).state_dict())


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_blocks_of_other_depths_precisions_and_policies(family: str) -> None:
    config = db.BlocksConfig(num_blocks=2, layers=(1, 2), shared="joint")
    model = db.convert(tiny(family), config).eval()
    randomise_adaptive(model)
    images = noise_batch()["pixel_values"]
    exported: Any = model.export_block(1, z=some_z())
    assert exported.config.num_hidden_layers == 2
    difference = db.export_difference(model, 1, exported, {"pixel_values": images}, z=some_z())
    assert difference.largest < 5e-6
    model = model.to(torch.bfloat16)
    exported = model.export_block(1, z=some_z())
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    difference = db.export_difference(model, 1, exported, {"pixel_values": images.bfloat16()}, z=some_z())
    assert 0 < difference.largest < 0.1


@pytest.mark.parametrize("family", ["deit", "beit", "clip", "siglip2"])
def test_what_a_class_has_no_place_for_is_refused_or_measured(family: str) -> None:
    model, batch = trained(family), noise_batch()
    with pytest.raises(ValueError, match=r"block 1 is more than a \w+ can hold: it has an extra token of z; to leave"):
        model.export_block(1, z=some_z())
    with pytest.warns(UserWarning, match="lacks an extra token of z: log-probabilities differ by up to") as caught:
        exported = model.export_block(1, 0.4, z=some_z(), approximate_on=batch)
    measured = db.export_difference(model, 1, exported, batch, 0.4, z=some_z())
    assert str(measured) in str(caught[-1].message)
    images = batch["pixel_values"]
    ours = of_block(model, 1, 0.4, some_z(), images).double().log_softmax(dim=-1)
    with torch.no_grad():
        theirs = model.family.whole_logits(exported, images).double().log_softmax(dim=-1)  # type: ignore[attr-defined]
    assert measured.largest == pytest.approx((ours - theirs).abs().max().item())
    assert measured.divergence == pytest.approx(
        nn.functional.kl_div(theirs, ours, log_target=True, reduction="batchmean").item()
    )
    assert measured.same == (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    assert measured.largest > 1e-3


def test_what_d_has_of_z_is_no_part_of_a_class() -> None:
    model = trained("vit", target={"likelihood": "learned"})
    with pytest.raises(ValueError, match=r"it has logits of D, .*target.likelihood: learned"):
        model.export_block(1)
    with pytest.warns(UserWarning, match="lacks logits of D"):
        assert type(model.export_block(1, approximate_on=noise_batch())).__name__ == HELD["vit"]


def test_an_exact_export_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("vit").export_block(1, approximate_on=noise_batch())


# ---- models that are told the level ----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [None, {"kind": "flow"}, {"kind": "ddpm"}])
@pytest.mark.parametrize("family", ["dit", "diffusers-dit"])
def test_a_block_of_a_diffusion_transformer_is_one_for_its_interval(family: str, noise: Any, tmp_path: Path) -> None:
    """D = c_skip * z + c_out * F(c_in * z, c_noise), at any of its levels and for every label, the null class too."""
    more = {"out_channels": 6} if noise == {"kind": "ddpm"} and family == "diffusers-dit" else {}
    model = db.convert(tiny(family, **more), db.BlocksConfig(noise=noise)).eval()
    labels = torch.arange(5)
    z = torch.randn(5, 3, 8, 8, generator=seeded(2))
    for block in range(3):
        exported: Any = model.export_block(block)
        assert type(exported) is type(tiny(family))
        assert exported.config.num_layers == (2 if block and family == "diffusers-dit" else 1)
        exported.save_pretrained(tmp_path / str(block))
        exported = type(exported).from_pretrained(tmp_path / str(block))
        low, high = model.partition.interval(block)
        level = torch.linspace(low, high, 7)[1:6]
        c = model.noise.precondition(level)  # type: ignore[attr-defined]
        c_skip, c_out, c_in = (each[:, None, None, None] for each in c[:3])
        with torch.no_grad():
            expected = model.block(block)({"labels": labels}, z, level)
            raw = exported(c_in * z, c.c_noise, labels)
        raw = raw if isinstance(raw, Tensor) else raw.sample
        torch.testing.assert_close(c_skip * z + c_out * raw[:, :3], expected, rtol=1e-6, atol=1e-5)
        assert not torch.equal(expected, expected.flip(0))


def test_a_block_of_masked_text_is_a_masked_transformer() -> None:
    model = trained("masked")
    tokens, level = token_batch(4)["input_ids"], torch.full((4,), 0.5)
    block = model.partition.block_of(0.5)
    with torch.no_grad():
        assert torch.equal(model.export_block(block)(tokens, level), model.block(block)({}, tokens, level))


# ---- language models without noise input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in (*CAUSAL_FAMILIES, *CAUSAL_VARIANTS)),
        *((family, {"sliding_window": 5}) for family in ("mistral", "gemma3")),
    ],
)
def test_a_block_that_reads_one_stream_is_an_ordinary_language_model(family: str, options: dict[str, Any]) -> None:
    """Uneven blocks, so that the kinds of layers go with them; the scale of the logits is in the head."""
    target: Any = {"kind": "next-token", "noise_input": False, "logit_scale": 1.7}
    original = tiny(family, layers=4, **options)
    model = db.convert(original, db.BlocksConfig(num_blocks=3, layers=(1, 2, 1), target=target)).eval()
    tokens = token_batch(4)["input_ids"]
    for block, layers in enumerate((1, 2, 1)):
        exported: Any = model.export_block(block)
        assert type(exported) is type(original)
        assert exported.config.num_hidden_layers == layers
        _, level = model.partition.interval(block)
        z = torch.randn(4, LENGTH - 1, HIDDEN, generator=seeded(block))
        with torch.no_grad():
            context = model.block(block)({"input_ids": tokens}, z, torch.full((4,), level), context=True)
        torch.testing.assert_close(logits(exported, tokens)[:, :-1], context, rtol=0, atol=1e-5)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "options", "words"),
    [
        ("llama", {}, {}, "reads two streams, .*train with target.noise_input: false"),
        ("vit", {}, {"level": 99.0}, r"level = 99: block 1 trains on \[.*; give one of these"),
        ("vit", {}, {"level": float("nan")}, r"level = nan: block 1 trains on"),
        ("vit", {}, {"z": torch.zeros(3)}, "z must be 32 finite numbers, got torch.float32 of shape"),
        ("vit", {}, {"z": torch.full((32,), torch.inf)}, "z must be 32 finite numbers"),
        ("vit", {"target": {"noise_input": False}}, {"level": 0.5}, "sees neither level nor z; leave it out"),
        ("dit", {}, {"level": 0.5}, "is given noise level and z with each input; leave it out"),
        ("vit", {"target": {"self_conditioning": True}}, {}, "shown what other blocks say"),
    ],
)
def test_refused(family: str, config: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(family, **config).export_block(1, **options)


def test_a_recurrence_and_noprops_networks_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "mlp_size": 48, "vocab_size": 27, "sequence_length": 12}
    with pytest.raises(ValueError, match="the recurrence of a RecurrentDepth has z as its state"):
        db.convert(RecurrentDepth(**sizes), db.BlocksConfig(num_blocks=1)).export_block(0)
    from diffusionblocks.models import NoPropCNN

    network = NoPropCNN(num_layers=2, num_labels=NUM_LABELS, image_size=8, hidden_size=16)
    with pytest.raises(ValueError, match="a network of a NoPropCNN maps an image and z to logits"):
        db.convert(network, db.BlocksConfig(num_blocks=2)).export_block(0)


def test_differences_are_of_classifiers() -> None:
    model = convert("masked")
    with pytest.raises(ValueError, match="export_difference compares classifiers"):
        db.export_difference(model, 0, model.export_block(0), token_batch())


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_positions_of_an_export_are_exact_whatever_its_precision(family: str, dtype: torch.dtype) -> None:
    """As where the library loads a model of that precision: rounded frequencies turn by other angles."""
    original = tiny(family, layers=4).to(dtype)  # casts the frequencies, too
    model = db.convert(original, db.BlocksConfig(num_blocks=2, target={"kind": "next-token", "noise_input": False}))  # type: ignore[arg-type]
    rounded = {name for name, buffer in original.named_buffers() if buffer.dtype == dtype}
    assert any("inv_freq" in name for name in rounded)  # the positive control
    for exported in (model.export_block(1), model.export_initialisation()):
        fresh = dict(type(exported)(exported.config).named_buffers())
        for name, buffer in exported.named_buffers():
            assert torch.equal(buffer, fresh[name])
        assert {p.dtype for p in exported.parameters()} == {dtype}
