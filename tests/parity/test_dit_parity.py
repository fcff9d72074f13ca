"""Diffusion transformers against their own classes: one block is the original under EDM; more blocks are its layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    DIT_FAMILIES,
    NUM_LABELS,
    POLICIES,
    convert,
    fresh_dit,
    image_batch,
    noise_batch,
    parameter_names,
    same_states,
    seeded,
    tiny,
)
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.models import DiT

NOISE = db.EDM()
LEVELS = torch.tensor([80.0, 5.0, 0.7, 0.3, 0.02, 0.002])


def raw(original: nn.Module, z: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """The class's own forward."""
    output = original(z, timestep=timestep, class_labels=labels)
    return output if isinstance(output, Tensor) else output.sample


def layers_of(original: nn.Module) -> nn.ModuleList:
    return original.layers if isinstance(original, DiT) else original.transformer_blocks


def run_layer(original: nn.Module, layer: nn.Module, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
    """A layer as its class calls it; `original` gives the condition where that is not the layer's own."""
    if isinstance(original, DiT):
        return layer(x, original.condition(c_noise, labels))
    return layer(x, timestep=c_noise, class_labels=labels)


# ---- one block is the original ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("dit", {}), ("dit", {"num_classes": 0}), ("dit", {"patch_size": 4}), ("diffusers-dit", {})],
)
@pytest.mark.parametrize("shared", POLICIES)
def test_one_block_is_the_original_with_edm_preconditioning(family: str, overrides: dict, shared: str) -> None:
    original = tiny(family, **overrides)
    model = db.convert(original, db.BlocksConfig(num_blocks=1, shared=shared)).eval()
    labels = None if overrides.get("num_classes") == 0 else torch.tensor([0, 1, 2, 3, NUM_LABELS, 0])
    z = LEVELS[:, None, None, None] * noise_batch()["pixel_values"]
    c = NOISE.precondition(LEVELS)
    c_skip, c_out, c_in = (v[:, None, None, None] for v in (c.c_skip, c.c_out, c.c_in))
    with torch.no_grad():
        f = raw(original, c_in * z, c.c_noise, labels)
        denoised = model.blocks[0]({} if labels is None else {"labels": labels}, z, LEVELS)
    assert denoised.dtype == torch.float32
    assert (f.abs().flatten(1).mean(1) > 0.05).all()  # the network takes part
    assert torch.equal(denoised, c_skip * z + c_out * f)
    # The coefficients themselves, by hand (EDM table 1).
    sigma = LEVELS.double()
    torch.testing.assert_close(c.c_skip.double(), 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c.c_out.double(), sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c.c_in.double(), 1 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c.c_noise.double(), sigma.log() / 4)


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_level_and_label_change_what_is_denoised(family: str) -> None:
    model = convert(family, num_blocks=1).eval()
    z = noise_batch(1)["pixel_values"].expand(NUM_LABELS + 1, -1, -1, -1)
    with torch.no_grad():
        outputs = model.denoise({"labels": torch.arange(NUM_LABELS + 1)}, z, 0.5)
        c = NOISE.precondition(torch.tensor([0.5, 0.6]))
        f = [
            (model.denoise({"labels": torch.zeros(5, dtype=torch.int64)}, z * s, s) - k * z * s)
            for s, k in ((0.5, c.c_skip[0]), (0.6, c.c_skip[1]))
        ]
    # Every class, the null class among them, has its own output.
    distance = (outputs[:, None] - outputs[None]).abs().flatten(2).mean(-1)
    assert (distance + torch.eye(NUM_LABELS + 1) > 1e-3).all()
    assert not torch.allclose(f[0] / c.c_out[0], f[1] / c.c_out[1], atol=1e-4)


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_samples_do_not_see_each_other(family: str) -> None:
    model = convert(family).eval()
    batch = image_batch()
    before = model.loss(batch, block=1, generator=seeded())
    images, labels = batch["pixel_values"].clone(), batch["labels"].clone()
    images[3] += 0.1
    labels[5] = (labels[5] + 1) % NUM_LABELS
    after = model.loss({"pixel_values": images, "labels": labels}, block=1, generator=seeded())
    assert ((before - after).abs() > 1e-6).tolist() == [False, False, False, True, False, True]


# ---- more blocks are its layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_layers_compute_what_the_original_layers_do(family: str, shared: str) -> None:
    original = tiny(family, layers=6)
    model = db.convert(original, db.BlocksConfig(shared=shared, layers=(1, 2, 3))).eval()
    x, c_noise = torch.randn(6, 16, 32, generator=seeded()), NOISE.precondition(LEVELS).c_noise
    labels = torch.tensor([0, 1, 2, 3, NUM_LABELS, 0])
    converted = [layer for block in model.blocks for layer in block.layers()]
    assert len(converted) == len(layers_of(original)) == 6
    outputs = []
    with torch.no_grad():
        for theirs, ours in zip(layers_of(original), converted, strict=True):
            outputs.append(run_layer(original, theirs, x, c_noise, labels))
            assert torch.equal(run_layer(original, ours, x, c_noise, labels), outputs[-1])
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(outputs, [x, *outputs], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_a_block_is_the_original_with_its_layers_alone(family: str) -> None:
    """The whole block, by the class's own forward: an original whose other layers are cut out."""
    original = tiny(family, layers=6)
    model = convert(family, layers=6).eval()
    labels = torch.tensor([0, 1, 2, 3, NUM_LABELS, 0])
    for b, block in enumerate(model.blocks):
        cut = copy.deepcopy(original)
        kept = nn.ModuleList(copy.deepcopy(layers_of(original)[i]) for i in model.partition.layer_range(b))
        if isinstance(cut, DiT):
            cut.layers = kept
        else:
            cut.transformer_blocks = kept
            # The head is conditioned by the original's layer 0, whichever layers run.
            of_head = original.transformer_blocks[0].norm1.emb.state_dict()
            assert same_states(kept[0].norm1.emb.state_dict(), of_head) == (b == 0)
            calls: list[nn.Module] = []

            def exchange(module: nn.Module, args: Any, kwargs: Any, calls: Any = calls, of_head: Any = of_head) -> None:
                calls.append(module)
                if len(calls) == 2:  # the first call is its layer's, the second the head's
                    module.load_state_dict(of_head)

            kept[0].norm1.emb.register_forward_pre_hook(exchange, with_kwargs=True)
        level = torch.linspace(*model.partition.interval(b), 7)[1:]
        c = NOISE.precondition(level)
        c_skip, c_out, c_in = (v[:, None, None, None] for v in (c.c_skip, c.c_out, c.c_in))
        z = level[:, None, None, None] * noise_batch()["pixel_values"]
        with torch.no_grad():
            expected = c_skip * z + c_out * raw(cut, c_in * z, c.c_noise, labels)
            assert torch.equal(block({"labels": labels}, z, level), expected)


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_gradients_stay_in_the_block(family: str, shared: str, block: int) -> None:
    model = convert(family, shared=shared)
    model.loss(image_batch(), block=block, generator=seeded()).mean().backward()
    reached = parameter_names(model, with_grad=True)
    common = {id(p) for p in model.shared_parameters()}
    assert bool(common) == (shared == "joint")
    prefix = f"blocks.{block}."
    for n, p in model.named_parameters(remove_duplicate=False):
        if n in reached and not n.startswith(prefix):
            assert id(p) in common, n
    head_embedder = "transformer_blocks.0.norm1.emb."  # of diffusers' class: in the layers, and yet shared
    layers = tuple(f"{prefix}network.{path}." for path in model.blocks[block].layer_paths)
    trained, shared_reached = set(), set()
    for n, p in model.blocks[block].named_parameters(prefix=prefix.rstrip(".")):
        of_layer = n.startswith(layers) and head_embedder not in n
        if of_layer:
            assert n in reached
            if not n.endswith("to_k.bias"):  # attention is invariant to it
                assert bool((p.grad != 0).any()), n
            trained.add(n)
        elif n in reached:
            assert bool((p.grad != 0).any()), n
            shared_reached.add(n)
    assert trained
    if shared == "frozen":
        assert not shared_reached
    else:
        for part in ("patch_embedder.proj", "timestep_embedder", "label_embedder", "final_layer.linear"):
            theirs = {
                "patch_embedder.proj": "pos_embed.proj",
                "timestep_embedder": f"{head_embedder}timestep_embedder",
                "label_embedder": f"{head_embedder}class_embedder",
                "final_layer.linear": "proj_out_2",
            }
            wanted = part if family == "dit" else theirs[part]
            assert any(wanted in n for n in shared_reached), wanted


# ---- weights go in and come out -----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_every_original_weight_survives_under_its_name(family: str, shared: str) -> None:
    original = tiny(family)
    state = original.state_dict()
    model = db.convert(original, db.BlocksConfig(shared=shared))
    seen: dict[str, int] = dict.fromkeys(state, 0)
    for block in model.blocks:
        for name, tensor in block.network.state_dict().items():
            assert torch.equal(tensor, state[name])
            seen[name] += 1
    shared_names = {n for n, count in seen.items() if count == 3}
    assert {seen[n] for n in state if n not in shared_names} == {1}
    layer = "layers." if family == "dit" else "transformer_blocks."
    of_layers = {n for n in shared_names if n.startswith(layer)}
    assert all(n.startswith("transformer_blocks.0.norm1.emb.") for n in of_layers)
    assert bool(of_layers) == (family == "diffusers-dit")
    assert not any("adaptive" in n or "noise_embedding" in n for n in model.state_dict())  # nothing is added


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_export_of_an_untrained_conversion_is_the_original(family: str, shared: str, blocks: int) -> None:
    original = tiny(family, layers=6)
    exported = db.convert(original, db.BlocksConfig(num_blocks=blocks, shared=shared)).eval().export_initialisation()
    assert type(exported) is type(original)
    assert not exported.training
    assert same_states(exported.state_dict(), original.state_dict())
    batch, level = noise_batch(), torch.linspace(-1.0, 1.0, 6)
    with torch.no_grad():
        ours, theirs = (raw(m, batch["pixel_values"], level, batch["labels"]) for m in (exported, original))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_export_takes_every_weight_from_its_owner(family: str) -> None:
    model = convert(family, layers=6, shared="replicated")
    with torch.no_grad():
        for b, block in enumerate(model.blocks):
            for parameter in block.network.parameters():
                parameter.fill_(float(b + 1))
    state = model.export_initialisation().state_dict()
    layer, head = (
        ("layers", ("final_layer",)) if family == "dit" else ("transformer_blocks", ("proj_out_1", "proj_out_2"))
    )
    for n, t in state.items():
        of_layer = n.startswith(f"{layer}.")  # two layers a block
        owner = int(n.split(".")[1]) // 2 if of_layer else 2 if n.startswith(head) else 0
        assert t.unique().item() == owner + 1, n
    exported = model.export_initialisation()
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert {p.unique().item() for p in model.blocks[0].network.parameters()} == {1.0}  # a copy


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_convert_leaves_the_original_untouched(family: str, shared: str) -> None:
    original = tiny(family)
    state = copy.deepcopy(original.state_dict())
    config = dict(original.config)
    dropouts = label_dropouts(original)
    rng = torch.get_rng_state()
    model = db.convert(original, db.BlocksConfig(shared=shared))
    assert torch.equal(rng, torch.get_rng_state())
    assert not original.training
    model.loss(image_batch(), block=0, generator=seeded()).mean().backward()
    model.sample([0, 1], steps=3, guidance=2.0)
    assert same_states(original.state_dict(), state)
    assert dict(original.config) == config
    assert label_dropouts(original) == dropouts
    assert all(p.grad is None and p.requires_grad for p in original.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in original.modules())


# ---- label dropout ------------------------------------------------------------------------------------------


def label_dropouts(model: nn.Module) -> list[float]:
    return [m.dropout_prob for m in model.modules() if type(m).__name__ == "LabelEmbedding"]


def test_diffusers_own_label_dropout_is_switched_off_in_the_copies_alone() -> None:
    original = tiny("diffusers-dit")
    assert label_dropouts(original) == [0.1] * 3
    for shared in POLICIES:
        model = db.convert(original, db.BlocksConfig(shared=shared))
        assert set(label_dropouts(model)) == {0.0}
        assert label_dropouts(original) == [0.1] * 3
        assert label_dropouts(model.export_initialisation()) == [0.1] * 3


@pytest.mark.parametrize("label_dropout", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_a_dropped_label_is_dropped_in_the_whole_block(family: str, label_dropout: float) -> None:
    """In training mode, where diffusers' layers would drop labels each on its own."""
    model = convert(family, layers=2, num_blocks=1, target={"kind": "image", "label_dropout": label_dropout}).train()
    block = model.blocks[0]
    given: list[Tensor] = []
    looked_up: list[tuple[nn.Module, Tensor]] = []
    block.register_forward_pre_hook(lambda m, args: given.append(args[0]["labels"]))
    for module in block.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda m, args: looked_up.append((m, args[0])))
    batch = image_batch(800)
    loss = model.loss(batch, block=0, generator=seeded())
    assert loss.shape == (800,)
    (labels,) = given
    dropped = labels == NUM_LABELS
    assert torch.equal(labels[~dropped], batch["labels"][~dropped])
    assert dropped.float().mean().item() == pytest.approx(label_dropout, abs=4 * (label_dropout * 0.9 / 800) ** 0.5)
    # Every embedding (of each layer, and of the head) looks up these very labels.
    assert len(looked_up) == (1 if family == "dit" else 3)
    assert all(torch.equal(indices, labels) for _, indices in looked_up)
    # Which are dropped follows the generator alone.
    batch = image_batch(64)
    del given[:]
    model.loss(batch, block=0, generator=seeded())
    torch.rand(3)
    model.loss(batch, block=0, generator=seeded())
    model.loss(batch, block=0, generator=seeded(1))
    assert torch.equal(given[1], given[0])
    assert torch.equal(given[2], given[0]) == (label_dropout == 0.0)


def test_an_unconverted_diffusers_model_drops_labels_apart() -> None:
    """The positive control: what the test above would see without conversion's change."""
    original = tiny("diffusers-dit").train()
    looked_up: list[Tensor] = []
    for module in original.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda m, args: looked_up.append(args[0]))
    batch = noise_batch(200)
    original(batch["pixel_values"], timestep=torch.zeros(200), class_labels=batch["labels"])
    assert len(looked_up) == 4
    assert not all(torch.equal(indices, looked_up[0]) for indices in looked_up)


# ---- our DiT itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [0, NUM_LABELS])
def test_a_fresh_dit_returns_c_skip_z(num_classes: int) -> None:
    model = db.convert(fresh_dit(num_classes=num_classes), db.BlocksConfig(num_blocks=3)).eval()
    inputs = {"labels": torch.arange(6) % 5} if num_classes else {}
    for b, block in enumerate(model.blocks):
        level = torch.linspace(*model.partition.interval(b), 6)
        z = level[:, None, None, None] * noise_batch()["pixel_values"]
        c_skip = NOISE.precondition(level).c_skip[:, None, None, None]
        assert torch.equal(block(inputs, z, level), c_skip * z)


def test_a_fresh_layer_is_the_identity_and_learns_its_gates_first() -> None:
    original = fresh_dit()
    x, condition = torch.randn(2, 16, 32, generator=seeded()), torch.randn(2, 32, generator=seeded(1))
    for layer in original.layers:
        assert torch.equal(layer(x, condition), x)
    # adaLN-zero still learns: the gates get a gradient although they are zero.
    layer = original.layers[0]
    layer(x, condition).square().sum().backward()
    _, _, gate_a, _, _, gate_m = layer.modulation.weight.grad.chunk(6)
    assert bool((gate_a != 0).any())
    assert bool((gate_m != 0).any())
    assert not bool((layer.attn.qkv.weight.grad != 0).any())


def test_a_layer_by_hand() -> None:
    """adaLN: shift, scale and gate of attention, then of the MLP, from SiLU of the condition (DiT, section 3.2)."""
    original = tiny("dit")
    layer = original.layers[1]
    x, condition = torch.randn(2, 16, 32, generator=seeded()), torch.randn(2, 32, generator=seeded(1))
    with torch.no_grad():
        parts = layer.modulation(torch.nn.functional.silu(condition)).view(2, 6, 1, 32).unbind(1)

        def norm(x: Tensor) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

        h = norm(x) * (1 + parts[1]) + parts[0]
        q, k, v = (layer.attn.qkv(h)[..., i * 32 : (i + 1) * 32].view(2, 16, 2, 16).transpose(1, 2) for i in range(3))
        mixed = ((q @ k.transpose(-1, -2)) / 16**0.5).softmax(-1) @ v
        x1 = x + parts[2] * layer.attn.proj(mixed.transpose(1, 2).reshape(2, 16, 32))
        expected = x1 + parts[5] * layer.mlp(norm(x1) * (1 + parts[4]) + parts[3])
        torch.testing.assert_close(layer(x, condition), expected, atol=1e-5, rtol=1e-4)


def test_patches_go_to_their_places_and_back() -> None:
    """Patch embedding as the convolution of diffusers' class, the read-out as its inverse, positions as its buffer."""
    from diffusers.models.embeddings import PatchEmbed

    from diffusionblocks.models.diffusion_transformer import unpatchify

    ours = tiny("dit").patch_embedder
    theirs = PatchEmbed(8, 8, 2, 3, 32)
    assert torch.equal(ours.position, theirs.pos_embed)
    assert len({tuple(row) for row in ours.position[0].tolist()}) == 16
    with torch.no_grad():
        theirs.proj.weight.copy_(ours.proj.weight.view(32, 3, 2, 2))
        theirs.proj.bias.copy_(ours.proj.bias)
        images = noise_batch()["pixel_values"]
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(6, 16, 12)
    assert torch.equal(unpatchify(patches, 2, 3), images)


def test_dit_s_2_has_the_papers_shape() -> None:
    """DiT-S/2: 12 layers, 384 wide, 6 heads. Counted by hand; the paper's 33M has 1,000 classes and a learned sigma."""
    with torch.device("meta"):
        model = DiT(sample_size=32, patch_size=2, in_channels=3, hidden_size=384, num_layers=12, num_attention_heads=6)
    d = 384
    attention = (d * 3 * d + 3 * d) + (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    layer = attention + mlp + (d * 6 * d + 6 * d)
    stem = (12 * d + d) + (256 * d + d + d * d + d) + 11 * d
    head = (d * 2 * d + 2 * d) + (d * 12 + 12)
    assert sum(p.numel() for p in model.parameters()) == 12 * layer + stem + head == 32_475_660
    from diffusers.models.embeddings import PatchEmbed

    small = DiT(sample_size=32, hidden_size=384, num_layers=1, num_attention_heads=6)
    assert torch.equal(small.patch_embedder.position, PatchEmbed(32, 32, 2, 3, 384).pos_embed)


def test_timesteps_embed_as_diffusers_do() -> None:
    from diffusers.models.embeddings import Timesteps

    embedder = tiny("dit").timestep_embedder
    seen: list[Tensor] = []
    embedder.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    steps = torch.tensor([-1.5, 0.0, 0.3, 1.1])
    embedder(steps)
    # DiT's own frequencies (downscale 0); diffusers' class for DiT has downscale 1.
    torch.testing.assert_close(seen[0], Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(steps))


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_a_bfloat16_model_denoises_in_float32_near_the_float32_model(family: str) -> None:
    full = convert(family).eval()
    half = db.convert(tiny(family).bfloat16()).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for b in range(3):
        expected, loss = (m.loss(image_batch(), block=b, generator=seeded()) for m in (full, half))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.1)
        loss.mean().backward()
    assert half.sample([0, 1], steps=3).dtype == torch.float32
