"""Conversion against transformers: a converted layer is the original layer, and the original is left alone."""

import copy
import itertools

import pytest
import torch
from helpers import FAMILIES, POLICIES, convert, noise_batch, randomise_adaptive, same_states, seeded, tiny
from torch import Tensor, nn

import diffusionblocks as db

TOKENS = ("extra", "linear", "replace-cls")


def original_layers(model: nn.Module) -> nn.ModuleList:
    (layers,) = (
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    return layers


def only(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def adaptive_layers(model: db.DiffusionBlocks) -> list[tuple[nn.Module, nn.Module, int]]:
    """(adaptive norms, layer, width of the condition) of each layer of the network, in order."""
    return [
        (adaptive, layer, adaptive.linear.in_features)
        for block in model.blocks
        for adaptive, layer in zip(block.adaptive, block.layers(), strict=True)
    ]


def hook_count(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_layers_compute_the_original_layers_bit_for_bit(family: str, shared: str, attention: str) -> None:
    original = tiny(family, attn_implementation=attention)
    model = db.convert(original, db.BlocksConfig(shared=shared)).eval()
    x = torch.randn(2, 6, 32, generator=seeded())
    converted = adaptive_layers(model)
    assert len(converted) == len(original_layers(original)) == 3
    for layer, (adaptive, converted_layer, width) in zip(original_layers(original), converted, strict=True):
        expected = only(layer(x))
        assert not torch.equal(expected, x)
        for scale in (0.0, 1.0, 100.0):
            condition = scale * torch.randn(2, width, generator=seeded(1))
            assert torch.equal(only(adaptive(converted_layer, condition, x)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_layers_are_exact_in_bfloat16(family: str) -> None:
    original = tiny(family).bfloat16()
    model = db.convert(original).eval()
    x = torch.randn(2, 6, 32, generator=seeded()).bfloat16()
    for layer, (adaptive, converted_layer, width) in zip(
        original_layers(original), adaptive_layers(model), strict=True
    ):
        condition = torch.randn(2, width, generator=seeded(1)).bfloat16()
        assert torch.equal(only(adaptive(converted_layer, condition, x)), only(layer(x)))


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_final_norm_is_the_original_final_norm(family: str) -> None:
    original = tiny(family)
    model = db.convert(original).eval()
    x = torch.randn(2, 6, 32, generator=seeded())
    for block in model.blocks:
        norm = block.network.get_submodule(original.base_model_prefix).layernorm
        final = block.shared.final_norms
        condition = torch.randn(2, final.linear.in_features, generator=seeded(1))
        assert torch.equal(final(norm, condition, x), original.base_model.layernorm(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_norms_act_once_their_weights_are_not_zero(family: str) -> None:
    """Positive control: the parity above is not because the condition is never used."""
    model = db.convert(tiny(family)).eval()
    randomise_adaptive(model)
    x = torch.randn(2, 6, 32, generator=seeded())
    for adaptive, layer, width in adaptive_layers(model):
        a, b = torch.randn(2, 2, width, generator=seeded(1))
        assert not torch.allclose(only(adaptive(layer, a, x)), only(adaptive(layer, b, x)), atol=1e-3)
        # Each sample is modulated by its own condition.
        mixed = only(adaptive(layer, torch.stack([a[0], b[1]]), x))
        torch.testing.assert_close(mixed[0], only(adaptive(layer, a, x))[0])
        torch.testing.assert_close(mixed[1], only(adaptive(layer, b, x))[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_norms_scale_and_shift_each_norm_by_hand(family: str) -> None:
    original = tiny(family)
    model = db.convert(original).eval()
    randomise_adaptive(model)
    x = torch.randn(2, 6, 32, generator=seeded())
    final = model.blocks[0].shared.final_norms
    norm = model.blocks[0].network.get_submodule(original.base_model_prefix).layernorm
    condition = torch.randn(2, final.linear.in_features, generator=seeded(1))
    scale, shift = final.linear(nn.functional.silu(condition))[:, None].chunk(2, dim=-1)
    plain = original.base_model.layernorm(x)
    torch.testing.assert_close(final(norm, condition, x), plain * (1 + scale) + shift)

    # In a layer the two norms have their own scale and shift: record them as the layer runs.
    adaptive, layer, width = adaptive_layers(model)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    names = [n for n in ("layernorm_before", "layernorm_after", "norm1", "norm2") if hasattr(layer, n)]
    for name in names:  # this hook runs after the adaptive one and sees what the layer sees
        layer.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    condition = torch.randn(2, width, generator=seeded(1))
    adaptive(layer, condition, x)
    parts = adaptive.linear(nn.functional.silu(condition))[:, None].chunk(4, dim=-1)
    for i, (name, (given, out)) in enumerate(zip(names, seen, strict=True)):
        norm = original_layers(original)[0].get_submodule(name)
        torch.testing.assert_close(out, norm(given) * (1 + parts[2 * i]) + parts[2 * i + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_level_changes_the_logits_through_the_condition(family: str) -> None:
    model = db.convert(tiny(family)).eval()
    batch, z = noise_batch(2), torch.zeros(2, 32)  # with z = 0 only the condition and c_out carry the level
    inputs = {"pixel_values": batch["pixel_values"][:2]}
    before = model.blocks[1](inputs, z, torch.tensor([0.2, 0.5]))
    randomise_adaptive(model)
    assert not torch.allclose(before, model.blocks[1](inputs, z, torch.tensor([0.2, 0.5])), atol=1e-3)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_original_weight_survives_under_its_name(family: str, shared: str, token: str) -> None:
    original = tiny(family)
    state = original.state_dict()
    model = db.convert(original, db.BlocksConfig(shared=shared, target={"token": token}))
    seen: dict[str, int] = dict.fromkeys(state, 0)
    for block in model.blocks:
        for name, tensor in block.network.state_dict().items():
            assert torch.equal(tensor, state[name])
            seen[name] += 1
    layers = {n: c for n, c in seen.items() if ".layers." in n or ".layer." in n}
    assert len(layers) > 10 * 3
    assert set(layers.values()) == {1}  # a layer belongs to one block
    assert {c for n, c in seen.items() if n not in layers} == {3}  # a shared part is in every block
    own = {id(p) for block in model.blocks for p in block.parameters()}
    assert not own & {id(p) for p in original.parameters()}


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_convert_leaves_the_original_untouched(family: str, shared: str) -> None:
    original = tiny(family)
    images = noise_batch()["pixel_values"]
    with torch.no_grad():
        output = original(images).logits
    state = copy.deepcopy(original.state_dict())
    modules = {name: type(m) for name, m in original.named_modules()}
    grads = [p.requires_grad for p in original.parameters()]
    config = original.config.to_dict()
    hooks, rng = hook_count(original), torch.get_rng_state()

    model = db.convert(original, db.BlocksConfig(shared=shared))
    assert torch.equal(rng, torch.get_rng_state())
    assert not original.training
    randomise_adaptive(model)
    model.loss(noise_batch(), block=1, generator=seeded()).mean().backward()
    model.predict(images, steps=3, seeds=1, generator=seeded())

    assert hook_count(original) == hooks
    assert {name: type(m) for name, m in original.named_modules()} == modules
    assert [p.requires_grad for p in original.parameters()] == grads
    assert all(p.grad is None for p in original.parameters())
    assert original.config.to_dict() == config
    assert same_states(original.state_dict(), state)
    with torch.no_grad():
        assert torch.equal(original(images).logits, output)


def test_what_conversion_adds_depends_on_the_seed_of_the_config_alone() -> None:
    torch.manual_seed(1)
    first = convert(seed=3).state_dict()
    torch.manual_seed(2)
    assert same_states(first, convert(seed=3).state_dict())
    other = db.convert(tiny(seed=3), db.BlocksConfig(seed=1)).state_dict()
    assert first.keys() == other.keys()
    assert not same_states(first, other)


def test_replicated_blocks_start_equal_and_hold_the_same_target_table() -> None:
    model = convert("vit", shared="replicated")
    first = model.blocks[0]
    for block in list(model.blocks)[1:]:
        assert same_states(first.shared.state_dict(), block.shared.state_dict())
        assert not {id(p) for p in first.parameters()} & {id(p) for p in block.parameters()}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_an_untrained_conversion_is_the_original(family: str, shared: str, token: str, blocks: int) -> None:
    original = tiny(family)
    config = db.BlocksConfig(num_blocks=blocks, shared=shared, target={"token": token})
    exported = db.convert(original, config).eval().export_initialisation()
    assert type(exported) is type(original)
    assert not exported.training
    assert same_states(exported.state_dict(), original.state_dict())
    images = noise_batch()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(exported(images).logits, original(images).logits)


def test_export_carries_the_trained_weights_of_their_owners() -> None:
    model = convert("vit", shared="replicated")
    with torch.no_grad():
        for b, block in enumerate(model.blocks):
            for parameter in block.network.parameters():
                parameter.fill_(float(b + 1))
    state = model.export_initialisation().state_dict()
    for i in range(3):
        assert {t.unique().item() for n, t in state.items() if n.startswith(f"vit.layers.{i}.")} == {i + 1.0}
    assert {t.unique().item() for n, t in state.items() if "embeddings" in n} == {1.0}  # the stem: block 0
    for n, t in state.items():
        if n.startswith(("vit.layernorm", "classifier")):  # the head: the last block
            assert t.unique().item() == 3.0
    # A copy: what is done to the export does not reach the blocks.
    exported = model.export_initialisation()
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert {p.unique().item() for p in model.blocks[0].network.parameters()} == {1.0}


def test_the_older_name_of_the_export_says_what_it_gives() -> None:
    model = convert("vit")
    for old in (model.export, lambda: db.export(model)):
        with pytest.warns(UserWarning, match="an initialisation of the original class .* not the trained model"):
            found = old()
        assert same_states(found.state_dict(), model.export_initialisation().state_dict())


def test_a_converted_export_converts_again_with_the_same_weights() -> None:
    model = convert("vit")
    again = db.convert(model.export_initialisation(), model.blocks_config)
    assert same_states(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("layers", [(1, 2, 3), (4, 1, 1)])
def test_layers_run_in_the_blocks_that_the_partition_names(layers: tuple[int, ...]) -> None:
    model = db.convert(tiny("vit", layers=6), db.BlocksConfig(num_blocks=3, layers=layers))
    ran: list[str] = []
    for block in model.blocks:
        for path, layer in zip(block.layer_paths, block.layers(), strict=True):
            layer.register_forward_hook(lambda m, a, o, path=path: ran.append(path))
    model.eval().predict(noise_batch()["pixel_values"], steps=3, seeds=1, generator=seeded())
    assert ran == [f"vit.layers.{i}" for i in range(6)]
    assert [len(block.layer_paths) for block in model.blocks] == list(layers)
    owned = list(itertools.chain.from_iterable(model.partition.layer_range(b) for b in range(3)))
    assert owned == list(range(6))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_of_the_label_is_added_or_takes_the_place_of_cls(family: str) -> None:
    lengths = {}
    for token in TOKENS:
        model = convert(family, target={"token": token}).eval()
        seen: list[int] = []
        model.blocks[0].layers()[0].register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].shape[1]))
        model.predict(noise_batch()["pixel_values"], seeds=1, generator=seeded())
        lengths[token] = seen[0]
    assert lengths["extra"] == lengths["linear"] == lengths["replace-cls"] + 1


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_context_logits_see_the_noised_label_and_the_image(family: str, token: str) -> None:
    """Context logits, since what is added to them follows z without the network."""
    model = convert(family, target={"token": token}).eval()
    images, level = noise_batch(2)["pixel_values"], torch.full((2,), 0.3)
    z = torch.randn(2, 32, generator=seeded())

    def differ() -> tuple[bool, bool]:
        with torch.no_grad():
            given, other_z, other_images = (
                model.blocks[1]({"pixel_values": x}, v, level, context=True)
                for x, v in ((images, z), (images, -z), (-images, z))
            )
        return tuple(not torch.allclose(given, other, atol=1e-3) for other in (other_z, other_images))

    if token == "linear":
        assert differ() == (False, True)  # its map starts at zero
        randomise_adaptive(model)
    assert differ() == (True, True)


def test_a_subclass_of_a_supported_class_converts() -> None:
    from transformers import ViTForImageClassification

    class Mine(ViTForImageClassification):
        pass

    original = Mine(tiny().config)
    exported = db.convert(original).export_initialisation()
    assert type(exported) is ViTForImageClassification
    assert same_states(exported.state_dict(), original.state_dict())


# ---- regressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_model_takes_float32_images_as_the_original_does(family: str) -> None:
    # Regression: ViTModel and DeiTModel cast pixel_values to the dtype of the patch
    # projection before the embeddings; the family calls the embeddings itself and does not.
    original = tiny(family).bfloat16()
    batch = noise_batch()
    assert original(batch["pixel_values"]).logits.dtype == torch.bfloat16
    assert db.convert(original).loss(batch, block=1, generator=seeded()).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_right_with_transformers_own_gradient_checkpointing(use_reentrant: bool) -> None:
    # Regression: transformers checkpoints *inside* `module(*args)`; when the layer is
    # run again in backward, `_modulation` is None, so the norms are not adapted. Re-entrant: adaptive norms get
    # no gradient at all, silently. Not re-entrant: CheckpointError.
    plain = tiny().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    grads = []
    for original in (plain, checkpointed):
        model = db.convert(original)
        randomise_adaptive(model)
        model.loss(noise_batch(), block=1, generator=seeded()).mean().backward()
        grads.append({n: p.grad for n, p in model.blocks[1].named_parameters() if p.requires_grad})
    for name, expected in grads[0].items():
        if expected is None:  # [MASK] and the like, which nothing uses
            continue
        assert grads[1][name] is not None, f"{name} got no gradient"
        torch.testing.assert_close(grads[1][name], expected)
