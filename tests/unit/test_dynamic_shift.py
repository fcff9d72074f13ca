"""A shift that follows the resolution: training, sampling and routing are at the levels of diffusers' scheduler."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers_models import batch_for, tiny_diffuser

import diffusionblocks as db
from diffusionblocks.data.encode import bucket_sizes
from diffusionblocks.data.image_decoder import crop_to

KIND = "FluxTransformer2DModel"
NOISE = db.FlowMatching(base_shift=0.5, max_shift=1.15)


@pytest.fixture(scope="module")
def model() -> db.DiffusionBlocks:
    noise = db.FlowMatching(base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=32)
    return db.convert(tiny_diffuser(KIND), db.BlocksConfig(num_blocks=2, split="experts", noise=noise))


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
def test_the_shift_of_a_resolution_is_that_of_diffusers(tokens: int) -> None:
    process = NOISE.for_tokens(tokens)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert process.shift == pytest.approx(math.exp(mu), rel=1e-12)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)  # type: ignore[no-untyped-call]
    steps = 20
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels = torch.tensor(process.sampling_levels(steps, "uniform"))
    torch.testing.assert_close(process.shifted(levels).float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)


def test_boundaries_and_draws_do_not_depend_on_the_resolution(model: db.DiffusionBlocks) -> None:
    plain = db.convert(tiny_diffuser(KIND), db.BlocksConfig(num_blocks=2, split="experts", noise=db.FlowMatching()))
    assert model.partition == plain.partition
    assert NOISE.boundaries(3) == db.FlowMatching().boundaries(3)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 8)])
def test_a_loss_is_that_of_the_resolutions_own_shift(model: db.DiffusionBlocks, sizes: tuple[int, int]) -> None:
    tokens = sizes[0] * sizes[1] // 4
    static = model.noise.for_tokens(tokens)
    config = model.blocks_config.model_copy(update={"noise": static})
    other = db.convert(tiny_diffuser(KIND), config)
    batch = batch_for(model, KIND)
    batch["pixel_values"] = torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0))
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    losses = [m.loss(batch, block=1, generator=g) for m, g in zip((model, other), draws, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    at_level = [m.block(0).losses_at(batch, 0.7, torch.Generator().manual_seed(2)).z for m in (model, other)]
    torch.testing.assert_close(*at_level)
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    images = [m.sample(seeds=[0, 1], steps=3, inputs=inputs, sizes=sizes) for m in (model, other)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


def test_resolutions_differ(model: db.DiffusionBlocks) -> None:
    """The positive control: another resolution is another shift, and so another z."""
    assert model.noise.for_tokens(4) != model.noise.for_tokens(16)


def experts_that_run(transformer: Any, options: dict[str, Any]) -> list[int]:
    """Which of a transformer's experts a call runs."""
    asked: list[int] = []
    experts = list(enumerate(transformer.experts))
    hooks = [part.register_forward_pre_hook(lambda *_, b=b: asked.append(b)) for b, part in experts]
    transformer(**options)
    for hook in hooks:
        hook.remove()
    return asked


@pytest.mark.parametrize("sizes", [(4, 4), (8, 8)])
def test_a_pipelines_transformer_routes_by_the_resolution(model: db.DiffusionBlocks, sizes: tuple[int, int]) -> None:
    transformer: Any = copy.deepcopy(model).as_transformer()
    tokens = sizes[0] * sizes[1] // 4
    process: Any = model.noise.for_tokens(tokens)
    states = {name: value[:1] for name, value in batch_for(model, KIND).items() if name != "pixel_values"}
    ids = {"img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(5, 3)}
    options = {"hidden_states": torch.zeros(1, tokens, 16), **states, **ids}
    for level in (0.3, 0.49, 0.51, 0.8):
        time = process.shifted(torch.tensor([level]))
        asked = experts_that_run(transformer, {**options, "timestep": time})
        assert asked == [model.partition.block_of(level)]


def test_compiled_it_is_the_same(model: db.DiffusionBlocks) -> None:
    batch = batch_for(model, KIND)
    plain = model.loss(batch, block=0, generator=torch.Generator().manual_seed(0))
    compiled = copy.deepcopy(model)
    compiled.block(0).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled.loss(batch, block=0, generator=torch.Generator().manual_seed(0)), plain)


def test_no_level_has_a_place_without_a_resolution(model: db.DiffusionBlocks) -> None:
    with pytest.raises(ValueError, match="the shift of this process follows the resolution: ask for_tokens"):
        NOISE.shifted(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="follows the resolution"):
        NOISE.unshifted(0.5)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base_shift": 0.5}, "give both, or neither"),
        ({"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}, "give one of them"),
        ({"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 5000}, "the second larger"),
        ({"base_shift": math.inf, "max_shift": 1.15}, "must be finite"),
    ],
)
def test_shifts_that_do_not_go_together_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        db.FlowMatching(**values)


# ---- sizes that keep proportions -----------------------------------------------------------------------------


def test_bucket_sizes_are_multiples_of_a_step_and_no_larger_than_the_square() -> None:
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes
    assert {(768, 320), (320, 768)} & set(sizes) == set(), "no side is twice the other's"
    assert all(h % 64 == w % 64 == 0 and h * w <= 512 * 512 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert (448, 576) in sizes


def test_a_picture_is_cut_to_a_size_from_its_middle() -> None:
    from PIL import Image

    values = np.zeros((40, 120, 3), dtype=np.uint8)
    values[:, 40:80] = 255  # the middle third
    assert crop_to(Image.fromarray(values), 20, 20).size == (20, 20)
    assert np.asarray(crop_to(Image.fromarray(values), 40, 40)).min() == 255
    assert crop_to(Image.fromarray(values), 64, 32).size == (32, 64)
