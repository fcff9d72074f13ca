"""The seams: training, saving, routing and prediction use the same blocks; gradients stay in their block."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    NUM_LABELS,
    POLICIES,
    convert,
    image_batch,
    noise_batch,
    parameter_names,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    token_batch,
    toy_batch,
    train_blocks,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffusionblocks as db

TEST = toy_batch(200, seed=999)


@pytest.fixture(scope="module")
def trained() -> Callable[[str], db.DiffusionBlocks]:
    """A model trained on the toy problem under each policy, once; every test gets a copy."""
    models: dict[str, db.DiffusionBlocks] = {}

    def get(shared: str) -> db.DiffusionBlocks:
        if shared not in models:
            models[shared] = convert("vit", shared=shared)
            train_blocks(models[shared])
            models[shared].eval()
        return copy.deepcopy(models[shared])

    return get


def accuracy(model: db.DiffusionBlocks, **options: Any) -> float:
    prediction = model.predict(TEST["pixel_values"], generator=seeded(), **options)
    return (prediction.probabilities.argmax(-1) == TEST["labels"]).float().mean().item()


def first_reading(model: db.DiffusionBlocks) -> float:
    """Cross-entropy at the highest level read, where z carries next to nothing: the figure to rank by."""
    logits = model.predict(TEST["pixel_values"], steps=1, seeds=1, generator=seeded()).logits
    return nn.functional.nll_loss(logits, TEST["labels"]).item()


def record_calls(model: db.DiffusionBlocks) -> list[tuple[int, float]]:
    """(place in model.blocks, level) of every call of a block from now on, seen from outside through hooks."""
    calls: list[tuple[int, float]] = []
    for place, block in enumerate(model.blocks):

        def hook(module: nn.Module, args: tuple, output: Tensor, place: int = place) -> None:
            level = args[2].unique()
            assert level.numel() == 1
            calls.append((place, level.item()))

        block.register_forward_hook(hook)
    return calls


# ---- the whole journey --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shared", POLICIES)
def test_train_save_load_route_predict(shared: str, trained: Callable, tmp_path: Path) -> None:
    model = trained(shared)
    model.save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model").eval()
    assert loaded.partition == model.partition
    for steps in (1, 3, 7):
        ours = model.predict(TEST["pixel_values"], steps=steps, seeds=1, generator=seeded())
        theirs = loaded.predict(TEST["pixel_values"], steps=steps, seeds=1, generator=seeded())
        assert torch.equal(ours.logits, theirs.logits)
    calls = record_calls(loaded)
    loaded.predict(TEST["pixel_values"], steps=3, seeds=1, generator=seeded())
    assert [place for place, _ in calls] == [0, 1, 2]
    assert accuracy(loaded) > 0.8
    assert accuracy(loaded, steps=1) > 0.8
    assert accuracy(loaded, combine="chain", seeds=1) > 0.7  # a chain samples: it is less accurate than the mean


@pytest.mark.parametrize("shared", POLICIES)
def test_blocks_in_the_wrong_order_predict_worse(shared: str, trained: Callable) -> None:
    """Positive control of the seam: were the map from level to block reversed, accuracy would show it."""
    model = trained(shared)
    right = [
        first_reading(model),
        model.predict(TEST["pixel_values"], combine="chain", steps=3, seeds=1, generator=seeded()).probabilities,
    ]
    model.blocks = nn.ModuleList(reversed(list(model.blocks)))
    wrong = [
        first_reading(model),
        model.predict(TEST["pixel_values"], combine="chain", steps=3, seeds=1, generator=seeded()).probabilities,
    ]
    assert wrong[0] > 2 * right[0]
    assert (wrong[1] - right[1]).abs().max() > 0.2


@pytest.mark.parametrize("grid", ["equal-quantile", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("config", [{}, {"num_blocks": 2}, {"num_blocks": 6, "overlap": 0.0}, {"layers": (1, 1, 4)}])
def test_predict_calls_the_block_that_trains_on_the_level(config: dict, steps: int, grid: str) -> None:
    model = db.convert(tiny("vit", layers=6), db.BlocksConfig(**config)).eval()
    calls = record_calls(model)
    prediction = model.predict(noise_batch(2)["pixel_values"], steps=steps, grid=grid, seeds=1, generator=seeded())
    assert [level for _, level in calls] == pytest.approx(prediction.levels, rel=1e-6)
    for place, level in calls:
        assert place == model.partition.block_of(level) == model.blocks[place].index
        low, high = model.partition.training_interval(place)
        assert low * (1 - 1e-6) <= level <= high * (1 + 1e-6)
        assert model.blocks[place].interval == (low, high)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_calls_the_block_at_levels_that_predict_would_give_it(family: str) -> None:
    model = convert(family, overlap=0.0)
    seen: list[tuple[int, Tensor]] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, place=place: seen.append((place, args[2])))
    for b in range(3):
        model.loss(noise_batch(64), block=b, generator=seeded(b))
    assert [place for place, _ in seen] == [0, 1, 2]
    for place, level in seen:
        assert (model.partition.block_of(level) == place).all()


def test_loss_falls_in_every_block_by_training() -> None:
    """With the likelihood added there would be nothing to learn where z gives the label away."""
    untrained, model = (convert("vit", target={"likelihood": "learned"}).eval() for _ in range(2))
    train_blocks(model)
    model.eval()
    for b in range(3):
        before, after = (m.loss(TEST, block=b, generator=seeded()).mean().item() for m in (untrained, model))
        assert after < 0.6 * before


# ---- gradients stay in their block ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_stay_in_the_block(family: str, shared: str, block: int) -> None:
    model = convert(family, shared=shared)
    randomise_adaptive(model)
    model.loss(noise_batch(), block=block, generator=seeded()).mean().backward()
    reached = parameter_names(model, with_grad=True)
    common = {id(p) for p in model.shared_parameters()}
    if shared != "joint":
        assert not common
    outside = {
        n
        for n, p in model.named_parameters(remove_duplicate=False)
        if n in reached and not n.startswith(f"blocks.{block}.") and id(p) not in common
    }
    assert not outside
    # What must be trained is: all of the block's layers and adaptive norms ...
    layers = tuple(f"blocks.{block}.network.{path}." for path in model.blocks[block].layer_paths)
    for n, p in model.blocks[block].named_parameters(prefix=f"blocks.{block}"):
        if n.startswith((*layers, f"blocks.{block}.adaptive.")):
            assert n in reached
            if not n.endswith("k_proj.bias"):  # attention is invariant to it: its gradient is zero up to rounding
                assert bool((p.grad != 0).any()), n
    # ... and the shared parts, unless they are frozen.
    of_shared = {n for n in reached if not n.startswith((*layers, f"blocks.{block}.adaptive."))}
    if shared == "frozen":
        assert not of_shared
    else:
        assert any(n.endswith("classifier.weight") for n in of_shared)
        assert any("patch_embeddings" in n for n in of_shared)
        assert any("noise_embedding" in n for n in of_shared)
    assert any("target.embedding" in n for n in of_shared) == (shared == "joint")


def test_frozen_shared_parts_do_not_move_in_training(trained: Callable) -> None:
    start, model = convert("vit", shared="frozen"), trained("frozen")
    for before, after in zip(start.blocks, model.blocks, strict=True):
        assert same_states(before.shared.state_dict(), after.shared.state_dict())
        for name, tensor in before.network.state_dict().items():
            of_layer = name.startswith(tuple(f"{path}." for path in before.layer_paths))
            assert torch.equal(tensor, after.network.state_dict()[name]) != of_layer, name


@pytest.mark.parametrize("shared", ["replicated", "frozen"])
def test_training_one_block_does_not_move_the_others(shared: str) -> None:
    model = convert("vit", shared=shared)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        model.loss(toy_batch(16, step), block=1, generator=seeded(step)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {
        name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])
    }
    assert changed == {"1"}


def test_z_lives_in_one_space_for_all_blocks_whatever_the_policy(trained: Callable) -> None:
    for shared in POLICIES:
        tables = [block.target.table for block in trained(shared).blocks]
        assert all(torch.equal(table, tables[0]) for table in tables)


# ---- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["extra", "linear", "replace-cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_per_sample_float32(family: str, token: str) -> None:
    model = convert(family, target={"token": token})
    loss = model.loss(noise_batch(5), block=2, generator=seeded())
    assert loss.shape == (5,)
    assert loss.dtype == torch.float32
    assert loss.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_see_each_other(family: str) -> None:
    model = convert(family).eval()
    randomise_adaptive(model)
    batch = noise_batch(6)
    before = model.loss(batch, block=1, generator=seeded())
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][3] = torch.randn(3, 8, 8, generator=seeded(9))
    after = model.loss(changed, block=1, generator=seeded())
    moved = (before - after).abs() > 1e-6
    assert moved.tolist() == [False, False, False, True, False, False]


def test_changing_one_label_changes_one_loss() -> None:
    model = convert("vit").eval()
    batch = noise_batch(6)
    labels = batch["labels"].clone()
    labels[2] = (labels[2] + 1) % NUM_LABELS
    before = model.loss(batch, block=1, generator=seeded())
    after = model.loss({**batch, "labels": labels}, block=1, generator=seeded())
    assert ((before - after).abs() > 1e-6).tolist() == [False, False, True, False, False, False]


def test_loss_follows_its_generator_alone() -> None:
    model = convert("vit").eval()
    batch = noise_batch()
    first = model.loss(batch, block=0, generator=seeded(1))
    torch.rand(5)
    assert torch.equal(first, model.loss(batch, block=0, generator=seeded(1)))
    assert not torch.equal(first, model.loss(batch, block=0, generator=seeded(2)))


@pytest.mark.parametrize("block", range(3))
def test_edm_weight_multiplies_the_loss_of_each_level(block: int) -> None:
    plain, weighted = convert("vit"), convert("vit", target={"weight": "edm"})
    low, high = plain.partition.training_interval(block)
    level = torch.linspace(low, high, 6)
    losses = [m.eval().loss(noise_batch(), block=block, generator=seeded(), level=level) for m in (plain, weighted)]
    torch.testing.assert_close(losses[1], losses[0] * plain.noise.weight(level))


def test_loss_by_hand() -> None:
    """The loss is the cross-entropy of the block's logits on y + sigma * eps, with D read out by the head."""
    model = convert("vit").eval()
    batch, block = noise_batch(), model.blocks[1]
    level = torch.full((6,), 0.3)
    y = block.target.table[batch["labels"]]
    eps = torch.randn(y.shape, generator=seeded())
    logits = block({"pixel_values": batch["pixel_values"]}, y + 0.3 * eps, level)
    expected = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(model.loss(batch, block=1, generator=seeded(), level=level), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", POLICIES)
def test_bfloat16_model_has_a_float32_loss_near_the_float32_models(family: str, shared: str) -> None:
    full = convert(family, shared=shared).eval()
    half = db.convert(tiny(family).bfloat16(), db.BlocksConfig(shared=shared)).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for b in range(3):
        expected = full.loss(noise_batch(), block=b, generator=seeded())
        loss = half.loss(noise_batch(dtype=torch.bfloat16), block=b, generator=seeded())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.25, rtol=0.1)
        loss.mean().backward()
    prediction = half.predict(noise_batch(dtype=torch.bfloat16)["pixel_values"], steps=3, seeds=1, generator=seeded())
    assert prediction.probabilities.dtype == torch.float32


@pytest.mark.slow
def test_one_block_is_one_denoiser_over_all_levels() -> None:
    model = convert("vit", num_blocks=1)
    assert model.partition.training_interval(0) == (0.002, 80.0)
    train_blocks(model, steps=80)
    assert accuracy(model.eval(), steps=4) > 0.8


# ---- copies and states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
def test_a_deep_copy_equals_the_original_and_trains_apart(shared: str) -> None:
    model = convert("vit", shared=shared)
    randomise_adaptive(model)
    clone = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    assert same_states(clone.state_dict(), state)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in clone.parameters()}
    for b in range(3):
        ours, theirs = (m.eval().loss(noise_batch(), block=b, generator=seeded()) for m in (model, clone))
        assert torch.equal(ours, theirs)
    train_blocks(clone, steps=2)
    assert same_states(model.state_dict(), state)
    assert not same_states(clone.state_dict(), state)
    randomise_adaptive(clone, seed=77)  # the clone's norms listen to the clone's adaptive norms
    ours, theirs = (m.eval().loss(noise_batch(), block=1, generator=seeded()) for m in (model, clone))
    assert not torch.allclose(ours, theirs, atol=1e-3)
    again = convert("vit", shared=shared)
    again.load_state_dict(state)
    assert torch.equal(ours, again.eval().loss(noise_batch(), block=1, generator=seeded()))
    if shared == "joint":
        assert len({id(block.shared) for block in clone.blocks}) == 1


@pytest.mark.parametrize("shared", POLICIES)
def test_state_dict_repeats_no_tensor_and_round_trips_through_safetensors(shared: str, tmp_path: Path) -> None:
    model = convert("vit", shared=shared)
    state = model.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    assert {id(p) for p in model.parameters()} == {
        id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in state
    }
    save_file(state, tmp_path / "state.safetensors")
    other = convert("vit", seed=1, shared=shared)
    assert not same_states(other.state_dict(), state)
    result = other.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same_states(other.state_dict(), state)
    for b in range(3):
        ours, theirs = (m.eval().loss(noise_batch(), block=b, generator=seeded()) for m in (model, other))
        assert torch.equal(ours, theirs)


def test_joint_blocks_hold_the_same_tensors_and_only_they_do() -> None:
    joint = convert("vit", shared="joint")
    common = set.intersection(*({id(p) for p in block.parameters()} for block in joint.blocks))
    assert common == {id(p) for p in joint.shared_parameters()}
    names = {n for n, p in joint.blocks[0].named_parameters() if id(p) in common}
    assert {"network.classifier.weight", "network.vit.embeddings.cls_token", "shared.target.embedding"} <= names
    assert not any("layers" in n or n.startswith("adaptive") for n in names)
    assert joint.state_dict().keys() < convert("vit", shared="replicated").state_dict().keys()


def test_a_joint_model_inside_another_module_saves_and_loads() -> None:
    wrapped = nn.ModuleDict({"model": convert("vit", shared="joint")})
    state = wrapped.state_dict()
    assert all(name.startswith("model.") for name in state)
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    other = nn.ModuleDict({"model": convert("vit", seed=1, shared="joint")})
    other.load_state_dict(state)
    assert same_states(other.state_dict(), state)


def test_a_block_trains_and_moves_alone() -> None:
    model = convert("vit", shared="replicated")
    block = model.blocks[1]
    alone = copy.deepcopy(block)
    expected = model.loss(noise_batch(), block=1, generator=seeded())
    del model
    assert torch.equal(alone.loss(noise_batch(), seeded()), expected)
    alone.loss(noise_batch(), seeded()).mean().backward()


def test_a_block_called_under_activation_checkpointing_has_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model = convert("vit")
    randomise_adaptive(model)
    block = model.blocks[1]
    inputs, level = {"pixel_values": noise_batch()["pixel_values"]}, torch.full((6,), 0.3)
    z = torch.randn(6, 32, generator=seeded())
    grads = []
    for call in (block, lambda *args: checkpoint(block, *args, use_reentrant=False)):
        model.zero_grad()
        call(inputs, z, level).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


# ---- prediction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["soft", "hard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_sum_to_one_and_are_repeatable(family: str, feedback: str) -> None:
    model = convert(family).eval()
    images = noise_batch()["pixel_values"]
    options = {"combine": "chain", "steps": 4, "seeds": 2, "feedback": feedback}
    first = model.predict(images, **options, generator=seeded(), return_trajectory=True)
    assert first.probabilities.shape == first.logits.shape == (6, NUM_LABELS)
    assert first.probabilities.dtype == torch.float32
    torch.testing.assert_close(first.probabilities.sum(-1), torch.ones(6))
    torch.testing.assert_close(first.logits.exp(), first.probabilities)
    assert first.trajectory.shape == (4, 6, NUM_LABELS)
    torch.testing.assert_close(first.trajectory.sum(-1), torch.ones(4, 6))
    assert torch.equal(first.trajectory[-1], first.probabilities)
    assert first.levels == tuple(model.noise.levels(4)[:-1])
    torch.rand(3)
    again = model.predict(images, **options, generator=seeded(), return_trajectory=True)
    assert torch.equal(again.trajectory, first.trajectory)
    other = model.predict(images, **options, generator=seeded(1))
    assert not torch.equal(other.probabilities, first.probabilities)
    assert other.trajectory is None


def test_one_step_reads_the_label_off_at_the_highest_level() -> None:
    model = convert("vit").eval()
    images = noise_batch()["pixel_values"]
    highest = model.noise.read_max
    z = highest * torch.randn(6, 32, generator=seeded())
    with torch.no_grad():
        logits = model.blocks[0]({"pixel_values": images}, z, torch.full((6,), highest))
    prediction = model.predict(images, combine="chain", steps=1, seeds=1, generator=seeded())
    torch.testing.assert_close(prediction.probabilities, logits.softmax(-1))
    assert prediction.levels == (highest,)


@pytest.mark.parametrize("feedback", ["soft", "hard"])
def test_two_steps_by_hand(feedback: str) -> None:
    model = convert("vit").eval()
    inputs = {"pixel_values": noise_batch()["pixel_values"]}
    high, low, _ = model.noise.levels(2)
    table = model.blocks[0].target.table
    z = high * torch.randn(6, 32, generator=seeded())
    with torch.no_grad():
        first = model.blocks[0](inputs, z, torch.full((6,), high)).softmax(-1)
        denoised = first @ table if feedback == "soft" else table[first.argmax(-1)]
        z = z + (low - high) * (z - denoised) / high
        second = model.blocks[model.partition.block_of(low)](inputs, z, torch.full((6,), low)).softmax(-1)
    prediction = model.predict(
        **inputs, steps=2, feedback=feedback, seeds=1, generator=seeded(), return_trajectory=True
    )
    torch.testing.assert_close(prediction.trajectory, torch.stack([first, second]), rtol=1e-4, atol=1e-5)


def test_seeds_average_independent_chains() -> None:
    model = convert("vit").eval()
    images = noise_batch()["pixel_values"]
    g = seeded()
    chains = [model.predict(images, combine="chain", seeds=1, generator=g).probabilities for _ in range(5)]
    averaged = model.predict(images, combine="chain", seeds=5, generator=seeded()).probabilities
    torch.testing.assert_close(averaged, torch.stack(chains).mean(0))
    assert not torch.allclose(chains[0], chains[1], atol=1e-4)


def test_bridge_defaults_to_the_configs() -> None:
    images = noise_batch()["pixel_values"]
    hard = convert("vit", target={"feedback": "hard"}).eval()
    default, explicit, soft = (
        hard.predict(images, steps=3, seeds=1, generator=seeded(), **kwargs).probabilities
        for kwargs in ({}, {"feedback": "hard"}, {"feedback": "soft"})
    )
    assert torch.equal(default, explicit)
    assert not torch.equal(default, soft)


def test_predict_keeps_no_graph_and_changes_no_state() -> None:
    model = convert("vit").eval()
    state = copy.deepcopy(model.state_dict())
    assert not model.predict(noise_batch()["pixel_values"], seeds=1, generator=seeded()).logits.requires_grad
    assert same_states(model.state_dict(), state)


DEFAULTS = {
    "added": {"combine": "mean", "steps": 3, "seeds": 1},
    "learned": {"combine": "chain", "steps": 1, "seeds": 8},
}


@pytest.mark.parametrize("likelihood", DEFAULTS)
def test_evaluation_forward_is_the_default_prediction(likelihood: str) -> None:
    model = convert("vit", target={"likelihood": likelihood}).eval()
    batch = noise_batch()
    output = model(**batch, generator=seeded())
    prediction = model.predict(batch["pixel_values"], **DEFAULTS[likelihood], generator=seeded())
    assert torch.equal(output.logits, prediction.logits)
    assert torch.equal(model.predict(batch["pixel_values"], generator=seeded()).logits, prediction.logits)
    # Labels decide nothing, and without a generator the draws follow from the images.
    assert torch.equal(model(batch["pixel_values"]).logits, model(**batch).logits)
    torch.testing.assert_close(output.loss, -prediction.logits[range(6), batch["labels"]].mean())
    assert model(batch["pixel_values"]).loss is None


def test_training_forward_draws_every_block() -> None:
    model = convert("vit")
    calls: list[int] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, o, place=place: calls.append(place))
    for _ in range(60):
        output = model(**noise_batch(2))
        assert output.loss.shape == ()
        assert output.logits is None
    assert min(calls.count(b) for b in range(3)) >= 10


# ---- regressions ----------------------------------------------------------------------------------------------------


def test_training_forward_follows_its_generator_alone() -> None:
    # Regression: "generator: source of all draws", but the block is drawn from the
    # global generator.
    model = convert("vit").eval()
    model.training = True  # no dropout in the tiny model; only forward's branch matters
    losses = {model(**noise_batch(), generator=seeded()).loss.item() for _ in range(10)}
    assert len(losses) == 1


def test_weighted_loss_is_float32_at_float64_levels() -> None:
    # Regression: with weight = edm a float64 level makes a float64 loss.
    model = convert("vit", target={"weight": "edm"})
    level = torch.full((6,), 0.3, dtype=torch.float64)
    assert model.loss(noise_batch(), block=1, generator=seeded(), level=level).dtype == torch.float32


def test_adaptive_norms_forget_the_condition_when_a_layer_fails() -> None:
    # Regression: no try/finally, so after an error (out of memory, say) the norms
    # stay adapted and the modulation's graph stays in memory.
    model = convert("vit")
    adaptive, layer = model.blocks[0].adaptive[0], model.blocks[0].layers()[0]
    with pytest.raises(RuntimeError):
        adaptive(layer, torch.zeros(2, adaptive.linear.in_features), torch.zeros(2, 5, 31))
    assert layer.get_submodule(adaptive.names[0]).adaptation is None


@pytest.mark.parametrize("family", ["vit", "dit", "llama", "masked"])
def test_a_level_keeps_its_digits_whatever_the_dtype_of_z(family: str) -> None:
    """In bfloat16 the level 0.3137 would be told as 0.314453."""
    model = convert(family).eval()
    randomise_adaptive(model)
    batch = {"llama": token_batch, "masked": token_batch}.get(family, noise_batch)()
    z = model.target.encode(batch)
    low = z.bfloat16() if z.is_floating_point() else z
    told = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: told.append(args[2]))
    with torch.no_grad():
        outputs = [model.denoise(batch, given, 0.3137) for given in (low, low.float() if low is not z else z)]
    torch.testing.assert_close(*outputs)
    assert [level.dtype for level in told] == [torch.float32] * 2
    with torch.no_grad():
        model.denoise(batch, z.double() if z.is_floating_point() else z, 0.3137)
    assert told[-1].dtype == (torch.float64 if z.is_floating_point() else torch.float32)


def test_levels_of_a_dtype_without_digits_are_refused() -> None:
    model = convert("vit")
    with pytest.raises(
        ValueError, match=r"level must be float32 or float64 of shape \(6,\), got torch.bfloat16 \(6,\)"
    ):
        model.loss(noise_batch(), 1, level=torch.full((6,), 0.3).bfloat16())


# ---- losses at a level ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "batch", "level"),
    [
        ("vit", "label", noise_batch(), 0.3),
        ("dit", "image", {"pixel_values": image_batch()["pixel_values"]}, 0.3),
        ("masked", "tokens", token_batch(), 0.6),
        ("llama", "next-token", token_batch(), 0.3),
    ],
)
def test_the_losses_at_a_level_are_those_of_training_without_the_weight(
    family: str, kind: str, batch: dict[str, Tensor], level: float
) -> None:
    config = {"num_blocks": 1, "target": {"kind": kind, "weight": "none"}}
    overrides = {"num_classes": 0} if family == "dit" else {}
    model = db.convert(tiny(family, **overrides), db.BlocksConfig.model_validate(config)).eval()
    block = model.block(0)
    with torch.no_grad():
        result = block.losses_at(batch, level, seeded(3))
        expected = block.loss(batch, seeded(3), torch.full((len(result.z),), level))
        other = block.losses_at(batch, level, noise=block.draw_noise(batch, seeded(4)))
    assert torch.equal(result.losses, expected)
    assert torch.equal(result.output, block({n: batch[n] for n in block.input_names}, result.z, result.level))
    assert not torch.equal(other.z, result.z)


def test_what_the_network_is_shown_is_free_in_the_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    block, seen = convert("vit").block(0), []
    readout = block.family.readout
    monkeypatch.setattr(block.family, "readout", lambda call, *rest: (seen.append(call.z), readout(call, *rest))[1])
    block.loss(image_batch(2), seeded())
    assert [z.numel() for z in seen] == [0]
