"""Text-to-image and text-to-video classes of diffusers: a block is the class itself, on its own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY, batch_for, tiny_diffuser, velocity
from helpers import parameter_names, same_states, seeded
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import Fresh, InFiles, pretrained_source

NAMES = list(TINY)
#: two kinds of layers; a last layer of another kind; tables that are no buffers; one kind
KINDS = ["FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"]


def levels_of(model: db.DiffusionBlocks, block: int, count: int = 2) -> Tensor:
    low, high = model.partition.interval(block)
    return torch.linspace(low, high, count + 2)[1:-1]


def denoised(model: db.DiffusionBlocks, original: nn.Module, z: Tensor, level: Tensor, told: dict) -> Tensor:
    """D by the class's own forward, called as its pipeline calls it."""
    c = model.noise.precondition(level)  # type: ignore[attr-defined]
    c_skip, c_out, c_in = (v.view(-1, *[1] * (z.dim() - 1)) for v in (c.c_skip, c.c_out, c.c_in))
    time = c.c_noise / 1000 if model.noise.kind == "ddpm" else c.c_noise
    return c_skip * z + c_out * velocity(original, model.model_class, c_in * z, time, told)


def cut(original: Any, model: db.DiffusionBlocks, block: int) -> nn.Module:
    """The class with the layers of one block alone."""
    paths = model.block(block).layer_paths
    short = copy.deepcopy(original)
    for name in (model.family.layers, *model.family.more_layers):
        own = [path for path in paths if path.rpartition(".")[0] == name]
        setattr(short, name, nn.ModuleList(original.get_submodule(path) for path in own))
    return short


@pytest.mark.parametrize("name", NAMES)
def test_one_block_is_the_class(name: str) -> None:
    original = tiny_diffuser(name)
    model = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    batch = batch_for(model, name)
    z, level = batch.pop("pixel_values"), levels_of(model, 0)
    with torch.no_grad():
        theirs, ours = denoised(model, original, z, level, dict(batch)), model.block(0)(batch, z, level)
        assert torch.equal(ours, theirs)
        assert (ours - z).abs().flatten(1).mean(1).min() > 1e-3  # the network takes part
        for entry, told in batch.items():  # and is told each condition
            if told.is_floating_point():
                assert not torch.equal(model.block(0)({**batch, entry: told + 1}, z, level), ours), entry


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_the_class_with_its_layers_alone(name: str) -> None:
    """Blocks of one layer and of three: of two kinds of layers the second block has both."""
    original = tiny_diffuser(name)
    model = db.convert(original, db.BlocksConfig(num_blocks=2, layers=(1, 3))).eval()
    batch = batch_for(model, name)
    z = batch.pop("pixel_values")
    assert sum(len(block.layer_paths) for block in model.blocks) == 4
    for b, block in enumerate(model.blocks):
        level, short = levels_of(model, b), cut(original, model, b)
        with torch.no_grad():
            ours = block(batch, z, level)
            assert torch.equal(ours, denoised(model, short, z, level, dict(batch)))
            assert not torch.allclose(ours, denoised(model, original, z, level, dict(batch)))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_block_leaves_the_others_alone_and_lowers_its_loss(name: str) -> None:
    original = tiny_diffuser(name)
    stem = [f"network.{path}" for path in db.families.family_for(original).stem_paths(original)]
    model = db.convert(original, db.BlocksConfig(num_blocks=2))
    batch = batch_for(model, name)
    for b, block in enumerate(model.blocks):
        model.zero_grad()
        before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        loss = model.loss(batch, block=b, generator=seeded())
        loss.mean().backward()
        reached = parameter_names(model, with_grad=True)
        assert all(n.startswith(f"blocks.{b}.") for n in reached)
        for path in block.layer_paths:
            assert any(n.startswith(f"blocks.{b}.network.{path}.") for n in reached)
        assert any(path in n for n in reached for path in stem)
        norm = sum(float(p.grad.square().sum()) for p in block.parameters() if p.grad is not None)
        torch.optim.SGD(block.parameters(), lr=0.02 * float(loss.mean().detach()) / norm).step()
        assert model.loss(batch, block=b, generator=seeded()).mean() < loss.mean()
        after = model.state_dict()
        changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
        assert changed <= reached


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_computes_the_same(name: str) -> None:
    gradients = []
    for again in (False, True):
        model = db.convert(tiny_diffuser(name), db.BlocksConfig(num_blocks=2))
        if again:
            model.gradient_checkpointing_enable()
        calls = []
        model.block(1).layers()[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.loss(batch_for(model, name), block=1, generator=seeded()).mean().backward()
        assert len(calls) == 1 + again
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][n]), n


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_in_and_come_out(name: str, tmp_path: Path) -> None:
    original = tiny_diffuser(name)
    model = db.convert(original, db.BlocksConfig(num_blocks=2)).eval()
    exported = model.export_initialisation()
    assert type(exported) is type(original)
    assert same_states(exported.state_dict(), original.state_dict())
    batch = batch_for(model, name)
    z = batch.pop("pixel_values")
    model.save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model").eval()
    for b in range(2):
        level = levels_of(model, b)
        with torch.no_grad():
            ours = model.block(b)(batch, z, level)
            assert torch.equal(loaded.block(b)(batch, z, level), ours)
        short = model.export_block(b)  # a model of the class by itself
        with torch.no_grad():
            torch.testing.assert_close(denoised(model, short, z, level, dict(batch)), ours)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_built_block_by_block(name: str, tmp_path: Path) -> None:
    """From files, which read as the library reads them; and afresh, of which every weight is drawn."""
    original = tiny_diffuser(name)
    original.save_pretrained(tmp_path / "pretrained")
    config = db.BlocksConfig(num_blocks=2, layers=(1, 3))
    source = pretrained_source(name, tmp_path / "pretrained", {}, seed=0)
    assert isinstance(source, InFiles)
    model, whole = build(source, config).eval(), db.convert(original, config).eval()
    assert same_states(model.state_dict(), whole.state_dict())
    batch = batch_for(model, name)
    z = batch.pop("pixel_values")
    for b in range(2):
        with torch.no_grad():
            args = batch, z, levels_of(model, b)
            assert torch.equal(model.block(b)(*args), whole.block(b)(*args))
    fresh = build(Fresh(name, original.config, seed=3), config)
    one = build(Fresh(name, original.config, seed=3), config, blocks=[1])
    assert not any(p.is_meta for p in fresh.parameters())
    assert same_states(one.block(1).state_dict(), fresh.block(1).state_dict())
    assert fresh.loss(batch_for(model, name), block=1, generator=seeded()).isfinite().all()


@pytest.mark.parametrize("shared", ["joint", "frozen"])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_shared_parameters_follow_the_policy(name: str, shared: str) -> None:
    model = db.convert(tiny_diffuser(name), db.BlocksConfig(num_blocks=2, shared=shared))
    model.loss(batch_for(model, name), block=1, generator=seeded()).mean().backward()
    reached = {n for n in parameter_names(model, with_grad=True) if n.startswith("blocks.1.")}
    of_layers = tuple(f"blocks.1.network.{path}." for path in model.block(1).layer_paths)
    head = [n for n in reached if not n.startswith(of_layers)]
    assert bool(model.shared_parameters()) == (shared == "joint")
    assert (head == []) == (shared == "frozen") or shared == "joint"


def test_bfloat16_weights_are_run_in_bfloat16() -> None:
    name = "SD3Transformer2DModel"
    original = tiny_diffuser(name).to(torch.bfloat16)
    model = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    batch = batch_for(model, name)
    z, level = batch.pop("pixel_values"), levels_of(model, 0)
    told = {n: t.bfloat16() for n, t in batch.items()}
    with torch.no_grad():
        theirs = velocity(original, name, z.bfloat16(), level, told)
        ours = model.block(0)(batch, z, level)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, z - level.view(-1, 1, 1, 1) * theirs.float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_are_those_of_the_pipelines_scheduler(shift: float, guidance: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    name, steps = "SD3Transformer2DModel", 6
    original = tiny_diffuser(name)
    model = db.convert(original, db.BlocksConfig(num_blocks=1, noise=db.FlowMatching(shift=shift))).eval()
    told, negative = (batch_for(model, name, seed=seed) for seed in (1, 2))
    del told["pixel_values"], negative["pixel_values"]
    chain: dict[str, Any] = {"seeds": [5, 6], "steps": steps, "guidance": guidance, "sizes": (8, 4)}
    ours = model.sample(inputs=told, negative_inputs=negative, **chain)
    sampler = model.sampler(cuda_graph=True)  # calls from memory that stays in place follow each text
    assert torch.equal(
        sampler.sample(inputs=negative, negative_inputs=told, **chain),
        model.sample(inputs=negative, negative_inputs=told, **chain),
    )
    assert torch.equal(sampler.sample(inputs=told, negative_inputs=negative, **chain), ours)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Its own `timesteps` end short of 0; pipelines give these sigmas.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    z = torch.stack([torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    for t in scheduler.timesteps:
        time = (t / 1000).expand(2)
        with torch.no_grad():
            v, n = (velocity(original, name, z, time, rows) for rows in (told, negative))
        z = scheduler.step(n + guidance * (v - n), t, z).prev_sample
    torch.testing.assert_close(ours, z, atol=2e-4, rtol=1e-4)


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_hidden_states": None}, "lacks .'encoder_hidden_states'"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 23)}, r"encoder_hidden_states must be .* \(2, any, 24\), got"),
        ({"pooled_projections": torch.zeros(1, 20)}, r"pooled_projections must be .* \(2, 20\), got"),
        ({"pooled_projections": torch.zeros(2, 20, dtype=torch.int64)}, "must be a float tensor"),
        ({"pixel_values": torch.zeros(2, 4, 7, 8)}, "sizes 7x8, which must be multiples of 2x2"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, r"pixel_values must be a float tensor of shape \(2, 4, any, any\)"),
        ({"guidance": torch.zeros(2)}, "takes no guidance"),
    ],
)
def test_batches_that_the_class_does_not_read_are_refused(change: dict, message: str) -> None:
    model = db.convert(tiny_diffuser("SD3Transformer2DModel"), db.BlocksConfig(num_blocks=1))
    batch = batch_for(model, "SD3Transformer2DModel") | change
    with pytest.raises(ValueError, match=message):
        model.loss({n: t for n, t in batch.items() if t is not None}, block=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {}}, "inputs lacks encoder_hidden_states, pooled_projections"),
        ({"sizes": None}, r"give sizes = \(height, width\)"),
        ({"sizes": (8, 7)}, "multiples of 2x2"),
        ({"sizes": (1, 8, 8)}, "the model's are .any, any."),
        ({"guidance": 2.0}, "guidance = 2.0 needs negative_inputs"),
        ({"labels": [1]}, "takes no labels"),
        ({"seeds": [1, 2, 3]}, r"encoder_hidden_states must be a float tensor of shape \(3, any, 24\)"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(options: dict, message: str) -> None:
    model = db.convert(tiny_diffuser("SD3Transformer2DModel"), db.BlocksConfig(num_blocks=1))
    told = batch_for(model, "SD3Transformer2DModel")
    del told["pixel_values"]
    with pytest.raises(ValueError, match=message):
        model.sample(**({"inputs": told, "sizes": (8, 8), "steps": 1} | options))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("WanTransformer3DModel", {"in_channels": 9}, "reads 9 channels and predicts 4"),
        ("SanaTransformer2DModel", {"guidance_embeds": True}, "guidance_embeds = True: it reads"),
        ("QwenImageTransformer2DModel", {"zero_cond_t": True}, "zero_cond_t = True: it reads"),
        ("HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}, "image_condition_type"),
    ],
)
def test_variants_that_read_something_else_are_refused(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        db.convert(tiny_diffuser(name, **overrides))


def test_another_noise_process_and_a_trunk_are_refused() -> None:
    model = tiny_diffuser("FluxTransformer2DModel")
    with pytest.raises(ValueError, match="predicts by flow"):
        db.convert(model, db.BlocksConfig(num_blocks=1, noise=db.EDM()))
    with pytest.raises(ValueError, match=r"layers .* differ with their place"):
        db.branch(db.convert(model, db.BlocksConfig(num_blocks=1)), 2)
    wan = db.convert(tiny_diffuser("WanTransformer3DModel"), db.BlocksConfig(num_blocks=1))
    assert len(db.branch(wan, 2).blocks) == 2
