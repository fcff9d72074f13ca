"""Blocks in diffusers' own pipelines give the latents of our sampler, each step by the block that owns it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY, batch_for, tiny_diffuser
from helpers import same_states, seeded, tiny
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.formats import read_json
from diffusionblocks.common.modules import tensors_of
from diffusionblocks.sampling import sample_images

WAN, SD3, FLUX = "WanTransformer3DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"


def experts(name: str, shift: float = 3.0, **options: Any) -> db.DiffusionBlocks:
    """Experts that differ from each other."""
    noise = db.FlowMatching(shift=shift)
    config = db.BlocksConfig(**({"num_blocks": 2, "split": "experts", "noise": noise} | options))
    model = db.convert(tiny_diffuser(name), config).eval()
    with torch.no_grad():
        for b, block in enumerate(model.blocks):
            for p in block.parameters():
                p.mul_(1 + 0.02 * b)
    return model


def told(model: db.DiffusionBlocks, seed: int = 1) -> dict[str, Tensor]:
    return {n: v for n, v in batch_for(model, model.model_class, seed=seed).items() if n != "pixel_values"}


def starting_noise(model: db.DiffusionBlocks) -> Tensor:
    tiny_class = TINY[model.model_class]
    return torch.randn(2, tiny_class.channels, *tiny_class.sizes, generator=torch.Generator().manual_seed(5))


def ours(model: db.DiffusionBlocks, scheduler: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Our sampler at the levels of a pipeline's scheduler, and which blocks it calls."""
    levels = [model.noise.unshifted(min(sigma, 1.0)) for sigma in scheduler.sigmas.tolist()]
    calls: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda block, _: calls.append(block.index)) for b in model.blocks]
    z = sample_images(lambda z, level: model.denoise(inputs, z, level), starting_noise(model), levels, model.noise)
    for hook in hooks:
        hook.remove()
    return z, calls


@pytest.mark.parametrize("split", ["layers", "experts"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_wan_pipeline_loads_a_pair_and_gives_our_latents(split: str, shift: float, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    model = experts(WAN, shift, split=split)
    model.export_pipeline(tmp_path / "pipeline")
    pipeline: Any = WanPipeline.from_pretrained(tmp_path / "pipeline", text_encoder=None, tokenizer=None, vae=None)
    calls: list[int] = []
    for b, transformer in enumerate((pipeline.transformer, pipeline.transformer_2)):
        assert same_states(transformer.state_dict(), model.export_block(b).state_dict())
        transformer.register_forward_pre_hook(lambda *_, b=b: calls.append(b))
    pipeline.set_progress_bar_config(disable=True)
    inputs = told(model)
    latents = pipeline(
        prompt_embeds=inputs["encoder_hidden_states"],
        latents=starting_noise(model),
        num_inference_steps=9,
        guidance_scale=1.0,
        height=64,
        width=64,
        num_frames=9,
        output_type="latent",
    ).frames
    expected, ours_called = ours(model, pipeline.scheduler, inputs)
    assert calls == ours_called
    assert {*calls} == {0, 1}
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_a_level_at_the_boundary_goes_to_the_expert_below_in_both(tmp_path: Path) -> None:
    """Of t' * 1000 the pipeline tells the expert from `boundary_ratio` on; the boundary itself is not above it."""
    model = experts(WAN, 3.0, boundaries=(0.5,))
    for _ in range(2):  # the second replaces the first
        model.export_pipeline(tmp_path / "pipeline")
    ratio = read_json(tmp_path / "pipeline" / "model_index.json")["boundary_ratio"]
    boundary = 3 * 0.5 / (1 + 2 * 0.5)
    assert boundary < ratio < boundary * (1 + 1e-5)
    assert model.partition.block_of(0.5) == 1
    assert torch.tensor(boundary * 1000, dtype=torch.float32) < ratio * 1000


@pytest.mark.parametrize("blocks", [2, 4])
def test_sd3_pipeline_routes_by_time(blocks: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model = experts(SD3, num_blocks=blocks, split="layers")
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    none |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = StableDiffusion3Pipeline(transformer=model.as_transformer(), scheduler=scheduler, **none)
    pipeline.set_progress_bar_config(disable=True)
    inputs = told(model)
    calls: list[int] = []
    for b, network in enumerate(pipeline.transformer.experts):
        network.register_forward_pre_hook(lambda *_, b=b: calls.append(b))
    latents = pipeline(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        latents=starting_noise(model),
        num_inference_steps=10,
        guidance_scale=1.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    routed = list(calls)
    expected, ours_called = ours(model, scheduler, inputs)
    assert routed == ours_called
    assert {*routed} == {*range(blocks)}
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_flux_pipeline_routes_by_time_with_one_block_at_a_time() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = experts(FLUX, shift=1.0)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    transformer = model.as_transformer(low_memory=True, device="cpu")
    pipeline: Any = FluxPipeline(transformer=transformer, scheduler=scheduler, **none)
    pipeline.set_progress_bar_config(disable=True)
    inputs = told(model)
    inputs["guidance"] = torch.full((2,), 3.5)
    z = starting_noise(model)
    latents = pipeline(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        latents=FluxPipeline._pack_latents(z, 2, 4, 8, 8),
        num_inference_steps=6,
        guidance_scale=3.5,
        height=64,
        width=64,
        output_type="latent",
    ).images
    expected, calls = ours(model, scheduler, inputs)
    assert {*calls} == {0, 1}
    torch.testing.assert_close(FluxPipeline._unpack_latents(latents, 64, 64, 8), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [FLUX, "AuraFlowTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_a_boundary_stays_one_where_a_pipeline_rounds_times(name: str) -> None:
    """In bfloat16 the boundary 0.75 is told as 0.7539 (752 of 1000), which is a level of the block above."""
    model = experts(name, split="layers", boundaries=(0.5,)).to(torch.bfloat16)
    transformer: Any = model.as_transformer()
    calls: list[int] = []
    for b, network in enumerate(transformer.experts):
        network.register_forward_pre_hook(lambda *_, b=b: calls.append(b))
    inputs = {n: v if v.dtype == torch.bool else v.bfloat16() for n, v in told(model).items()}
    for steps in (4, 20, 50):
        calls.clear()
        levels = model.noise.levels(steps, "uniform")[:-1]
        for level in levels:
            time = model.noise.shifted(torch.tensor(level)) * 1000
            time = {  # as each pipeline has it
                FLUX: lambda t: t.to(torch.bfloat16) / 1000,
                "AuraFlowTransformer2DModel": lambda t: (t / 1000).to(torch.bfloat16),
            }.get(name, lambda t: t.to(torch.bfloat16))(time)
            options = model.family.options(model.config, starting_noise(model).bfloat16(), time.expand(2), inputs)
            with torch.no_grad():
                transformer(**options)
        assert calls == [model.partition.block_of(level) for level in levels]


def at_level(model: db.DiffusionBlocks, level: float) -> dict[str, Any]:
    """What the class's `forward` is told at a level."""
    family: Any = model.family
    time = family.time(model.noise.shifted(torch.tensor([level] * 2)))
    options: dict[str, Any] = family.options(model.config, starting_noise(model), time, told(model))
    return options | {"return_dict": False}


def resident(model: db.DiffusionBlocks, b: int) -> list[bool]:
    """Of each layer of a block, whether the device has it (its last tensor)."""
    turns: Any = model._turns
    originals = {id(entries[name]): t for (_, name), (entries, t) in turns._originals.items()}
    tensors = [list(layer.parameters())[-1] for layer in model.block(b).layers()]
    return [id(originals.get(id(tensor), tensor)) in turns._copies for tensor in tensors]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("lora", [None, db.LoraConfig(rank=2)])
def test_the_next_expert_comes_layer_by_layer_in_the_last_call_before_its_own(calls: int, lora: Any) -> None:
    model = experts(WAN, boundaries=(0.55,), lora=lora)
    transformer: Any = model.as_transformer(low_memory=True, device="cpu")
    turns: Any = model._turns
    most = sum({id(t): t.numel() for t in tensors_of(model.block(0).network)}.values())
    seen: list[tuple[list[bool], list[bool]]] = []
    for b in range(2):
        for layer in model.block(b).layers():
            layer.register_forward_pre_hook(lambda *_: seen.append((resident(model, 0), resident(model, 1))))
    there, layers = [True] * 4, len(list(model.block(0).layers()))
    assert layers == 4
    plain = experts(WAN, boundaries=(0.55,), lora=lora)
    for level in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.9, 0.8):
        for call in range(calls):
            seen.clear()
            with torch.no_grad():
                image = transformer(**at_level(model, level))[0]
                expected = plain.block(int(level < 0.55)).network(**at_level(plain, level))[0]
            assert torch.equal(image, expected)
            assert sum(copy.numel() for copy in turns._copies.values()) <= most
            last = level == 0.6 and call == calls - 1
            b = int(level < 0.55)
            if last:  # while layer i runs, those before it are the next expert's already
                assert seen == [([i > j - 1 for i in range(4)], [i < j for i in range(4)]) for j in range(4)]
                assert resident(model, 1) == there
            else:
                assert [pair[b] for pair in seen] == [there] * 4
                assert not any(pair[1 - b][-1] for pair in seen)


def test_an_expert_that_comes_in_vain_is_copied_again() -> None:
    """Uneven levels: the other expert was foreseen, and the same one is called once more."""
    model, plain = experts(WAN, boundaries=(0.55,)), experts(WAN, boundaries=(0.55,))
    transformer: Any = model.as_transformer(low_memory=True, device="cpu")
    for level in (0.9, 0.7, 0.65, 0.6, 0.3):
        with torch.no_grad():
            image = transformer(**at_level(model, level))[0]
            expected = plain.block(int(level < 0.55)).network(**at_level(plain, level))[0]
        assert torch.equal(image, expected)


def test_a_model_is_saved_while_its_blocks_take_turns(tmp_path: Path) -> None:
    """With what experts share in one file, as ever: the copies of the present one are no weights of its own."""
    model = experts(FLUX, lora=db.LoraConfig(rank=2))
    model.save_pretrained(tmp_path / "before")
    transformer: Any = model.as_transformer(low_memory=True, device="cpu")
    with torch.no_grad():
        first = transformer(**at_level(model, 0.9))[0]
        model.save_pretrained(tmp_path / "after")
        assert torch.equal(transformer(**at_level(model, 0.9))[0], first)
    for file in (tmp_path / "before").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    states = (db.load(tmp_path / name).state_dict() for name in ("before", "after"))
    assert same_states(*states)


def test_weights_are_the_models_own_while_its_blocks_take_turns() -> None:
    """Told once where experts share them; and those that are loaded are computed with, not older copies."""
    model, other = (experts(FLUX, lora=db.LoraConfig(rank=2)) for _ in range(2))
    for update in (p for p in other.parameters() if p.requires_grad):
        torch.nn.init.normal_(update, std=0.5, generator=seeded())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transformer: Any = model.as_transformer(low_memory=True, device="cpu")
    with torch.no_grad():
        first = transformer(**at_level(model, 0.9))[0]
        assert same_states(model.state_dict(), before)
        model.load_state_dict(other.state_dict())
        loaded = transformer(**at_level(model, 0.9))[0]
        assert torch.equal(loaded, other.as_transformer()(**at_level(other, 0.9))[0])
    assert not torch.equal(loaded, first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_copy_at_the_seam_overlaps_the_last_call() -> None:
    """Of blocks whose call takes about as long as their copy: the two calls at the seam, with and without foresight."""
    from diffusers import WanTransformer3DModel

    config = {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 8, "ffn_dim": 8192, "text_dim": 64}
    original = WanTransformer3DModel(**config).to(torch.bfloat16)
    noise = db.FlowMatching(shift=1.0)
    model = db.convert(original, db.BlocksConfig(num_blocks=2, split="experts", noise=noise, boundaries=(0.55,))).eval()
    transformer: Any = model.as_transformer(low_memory=True)
    inputs = {
        "hidden_states": torch.randn(1, 16, 9, 60, 104, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 64, 64, device="cuda", dtype=torch.bfloat16),
    }

    def seconds(levels: list[float]) -> tuple[float, torch.Tensor]:
        for level in levels[:-2]:
            transformer(timestep=torch.tensor([level * 1000.0], device="cuda"), **inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for level in levels[-2:]:
            y = transformer(timestep=torch.tensor([level * 1000.0], device="cuda"), **inputs).sample
        torch.cuda.synchronize()
        return time.perf_counter() - start, y

    with torch.no_grad():
        seconds([0.9, 0.8, 0.6, 0.5])
        foreseen, y = seconds([0.8, 0.7, 0.6, 0.5])
        plain, again = seconds([0.61, 0.605, 0.6, 0.5])
    assert torch.equal(y, again)
    assert foreseen < 0.9 * plain


@pytest.mark.parametrize("name", [name for name in TINY if name != "PixArtTransformer2DModel"])
def test_every_class_is_routed_by_what_its_pipeline_tells_it(name: str) -> None:
    noise = db.FlowMatching(shift=2.0)
    model = db.convert(tiny_diffuser(name), db.BlocksConfig(num_blocks=2, noise=noise)).eval()
    transformer: Any = model.as_transformer()
    assert isinstance(transformer, type(tiny_diffuser(name)))
    family: Any = model.family
    for b in range(2):
        low, high = model.partition.interval(b)
        level = torch.tensor([(low + high) / 2] * 2)
        options = family.options(model.config, starting_noise(model), family.time(noise.shifted(level)), told(model))
        with torch.no_grad():
            theirs = model.block(b).network(**options, return_dict=False)[0]
            assert torch.equal(transformer(**options, return_dict=False)[0], theirs)
    options["timestep"] = options["timestep"] * torch.tensor([1.0, 0.5])
    with pytest.raises(ValueError, match="one time for all its rows"):
        transformer(**options)


def test_what_no_stock_pipeline_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this WanTransformer3DModel has 3 blocks: give a pipeline model.as_trans"):
        experts(WAN, num_blocks=3).export_pipeline(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="stock pipelines take one transformer"):
        experts(SD3).export_pipeline(tmp_path / "pipeline")
    with pytest.raises(
        ValueError, match=r"DiT is none of them: sample it with .* with `export --block`, or model.export_block"
    ):
        db.convert(tiny("dit"), db.BlocksConfig(num_blocks=1)).as_transformer()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is of a FluxPipeline, not of a WanPipeline"):
        experts(WAN).export_pipeline(tmp_path / "pipeline", source=tmp_path / "source")
    assert not (tmp_path / "pipeline").exists()
