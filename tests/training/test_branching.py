"""Trunk and branch: the copy is exact, training takes over what it says, and stops and starts without a trace."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DIT_FAMILIES,
    HIDDEN,
    IMAGE,
    NUM_LABELS,
    POLICIES,
    convert,
    fresh_dit,
    noise_batch,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.branching import copied_layers, trunk_name
from diffusionblocks.core.soup import soup
from diffusionblocks.data import ImageBatches, ImageData, digits
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.experiments.recipe_changes import trunk_recipe
from diffusionblocks.training import TrainConfig, Trainer
from diffusionblocks.training.checkpoint import checkpoints
from diffusionblocks.training.run_log import Logger
from diffusionblocks.training.step import Stepper
from diffusionblocks.training.trainer import Interrupted

DEPTH, BLOCKS = 2, 3


def trunk_of(family: str, shared: str = "replicated", *, layers: int = DEPTH, **config: Any) -> db.DiffusionBlocks:
    """A trunk none of whose parameters follows from its config."""
    trunk = convert(family, layers=layers, num_blocks=1, shared=shared, **config).eval()
    randomise_adaptive(trunk)
    g = seeded(8)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return trunk


# ---- the copy is exact --------------------------------------------------------------------------------------


def test_branches_and_their_soup_have_the_precision_of_each_tensor_and_what_is_frozen() -> None:
    original = tiny("llama", layers=DEPTH).to(torch.bfloat16)
    for name, parameter in original.named_parameters():
        if "norm" in name:
            parameter.data = torch.full(parameter.shape, 1.001)  # no number of bfloat16
        parameter.requires_grad_("q_proj" not in name)
    trunk = db.convert(original, db.BlocksConfig(num_blocks=1))
    model = db.branch(trunk, BLOCKS)
    expected = {name: (p.dtype, p.requires_grad) for name, p in trunk.block(0).named_parameters()}
    assert {dtype for dtype, _ in expected.values()} == {torch.float32, torch.bfloat16}
    for branched in (model, soup(model)):
        for b, block in enumerate(branched.blocks):
            for name, parameter in block.named_parameters():
                own = trunk_name(branched, b, name, DEPTH)
                assert (parameter.dtype, parameter.requires_grad) == expected[own], name
                if "input_layernorm" in name:
                    assert torch.equal(parameter, trunk.block(0).get_parameter(own))


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", ["vit", "dinov2", *DIT_FAMILIES])
def test_every_block_computes_what_the_trunk_does(family: str, shared: str) -> None:
    trunk = trunk_of(family, shared)
    state = copy.deepcopy(trunk.state_dict())
    model = db.branch(trunk, BLOCKS)
    assert model.partition.layers == (DEPTH,) * BLOCKS
    assert not model.training
    batch = noise_batch()
    shape = (6, 3, IMAGE, IMAGE) if family in DIT_FAMILIES else (6, HIDDEN)
    inputs = {name: batch[name] for name in model.block(0).input_names}
    for b, block in enumerate(model.blocks):
        level = torch.linspace(*model.partition.interval(b), 7)[1:]
        z = level.view(6, *[1] * (len(shape) - 1)) * torch.randn(shape, generator=seeded(b))
        with torch.no_grad():
            expected = trunk.blocks[0](inputs, z, level)
            assert torch.equal(block(inputs, z, level), expected)
            # The positive control: at the same z another level gives something else.
            assert not torch.allclose(trunk.blocks[0](inputs, z, level * 0.9), expected, atol=1e-4)
        mine, of_trunk = (m.loss(batch, block=i, generator=seeded(), level=level) for m, i in ((model, b), (trunk, 0)))
        assert torch.equal(mine, of_trunk)
    # A copy, apart from the trunk and (but for what the policy shares) block from block.
    assert same_states(trunk.state_dict(), state)
    ids = [{id(p) for p in block.parameters()} for block in model.blocks]
    assert not set.union(*ids) & {id(p) for p in trunk.parameters()}
    assert (set.intersection(*ids) != set()) == (shared == "joint")


# ---- blocks of fewer layers ---------------------------------------------------------------------------------


def test_layers_of_a_shorter_block_are_evenly_spaced() -> None:
    assert [copied_layers(6, count) for count in range(1, 7)] == [
        [0],
        [0, 5],
        [0, 2, 5],
        [0, 1, 3, 5],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    for depth in range(1, 40):
        for count in range(2, depth + 1):
            layers = copied_layers(depth, count)
            assert (layers[0], layers[-1]) == (0, depth - 1)
            steps = {b - a for a, b in itertools.pairwise(layers)}
            assert min(steps) >= 1
            assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("family", ["vit", "dinov2", *DIT_FAMILIES])
def test_a_shorter_block_computes_what_the_trunk_without_some_layers_does(family: str, tmp_path: Path) -> None:
    trunk = trunk_of(family, layers=4)
    model = db.branch(trunk, 3, layers=(2, 4, 3))
    assert (model.partition.layers, model.blocks_config.layers) == ((2, 4, 3), (2, 4, 3))
    path = {"vit": "vit.layers", "dinov2": "dinov2.layer", "dit": "layers", "diffusers-dit": "transformer_blocks"}
    theirs = trunk.block(0).state_dict()
    prefix = next(n for n in theirs if f"{path[family].split('.')[-1]}.3." in n).partition(".3.")[0]
    shape = (6, 3, IMAGE, IMAGE) if family in DIT_FAMILIES else (6, HIDDEN)
    inputs = {name: noise_batch()[name] for name in model.block(0).input_names}
    level = torch.linspace(0.5, 2.0, 6)
    z = level.view(6, *[1] * (len(shape) - 1)) * torch.randn(shape, generator=seeded())

    def pruned(layers: list[int]) -> Tensor:
        """What the trunk computes with some of its layers alone."""
        short = convert(family, layers=len(layers), num_blocks=1).eval()
        source = {
            name: name.replace(f"{prefix}.{place}.", f"{prefix}.{layer}.", 1)
            for place, layer in enumerate(layers)
            for name in short.block(0).state_dict()
            if name.startswith(f"{prefix}.{place}.")
        }
        assert source
        short.block(0).load_state_dict({name: theirs[source.get(name, name)] for name in short.block(0).state_dict()})
        with torch.no_grad():
            return short.blocks[0](inputs, z, level)  # type: ignore[no-any-return]

    for block, layers in zip(model.blocks, ([0, 3], [0, 1, 2, 3], [0, 1, 3]), strict=True):
        with torch.no_grad():
            assert torch.equal(block(inputs, z, level), pruned(layers))
            assert not torch.equal(pruned([1, 2, 3][: len(layers)]), pruned(layers))  # the positive control
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert loaded.partition == model.partition
    assert same_states(loaded.state_dict(), model.state_dict())
    assert len(db.convert(model.export_initialisation(), db.BlocksConfig(num_blocks=9)).blocks) == 9


@pytest.mark.parametrize("average", [True, False])
def test_shorter_blocks_take_over_moments_and_averages_of_their_layers(average: bool) -> None:
    trunk = trainer_of(trunk_of("dit", layers=4), steps=5)
    trunk.train()
    blocks = trainer_of(db.branch(trunk.model, 2, layers=(2, 4)))  # type: ignore[arg-type]
    blocks.inherit(trunk, optimizer=True, average=average)
    of_trunk = owned(trunk)
    for name, (group, i) in owned(blocks).items():
        _, b, rest = name.split(".", 2)
        for ours, theirs in ((0, 0), (1, 3)) if b == "0" else ((2, 0), (3, 1), (4, 2), (5, 3)):
            if rest.startswith(f"network.layers.{ours}."):
                rest = rest.replace(f".{ours}.", f".{theirs}.", 1)
                break
        source, place = of_trunk[f"blocks.0.{rest}"]
        assert torch.equal(group.parameters[i], source.parameters[place])
        assert all(torch.equal(group.moments[i][key], value) for key, value in source.moments[place].items())
        assert torch.equal(group.ema[i], source.ema[place] if average else group.parameters[i].detach())
    blocks.train()


# ---- the chain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_sampling_a_fresh_branch_is_sampling_the_trunk(family: str, solver: str) -> None:
    trunk = trunk_of(family)
    model = db.branch(trunk, BLOCKS)
    arguments: dict[str, Any] = {"labels": [0, 3, NUM_LABELS], "steps": 6, "solver": solver, "guidance": 2.0}
    expected = trunk.sample(**arguments)
    assert torch.equal(model.sample(**arguments), expected)
    with torch.no_grad():
        next(p for n, p in model.blocks[2].named_parameters() if n.endswith("bias")).add_(1.0)
    assert not torch.equal(model.sample(**arguments), expected)  # the positive control: the last block takes part


def test_the_blocks_of_a_fresh_branch_vote_as_the_trunk_does() -> None:
    """Blocks that see no noise say at every level what their trunk says, and so does the mean of them."""
    trunk = trunk_of("vit", target={"kind": "label", "noise_input": False})
    blocks = db.branch(trunk, BLOCKS)
    images = noise_batch()["pixel_values"]
    ours, theirs = (model.inference.context_logits(images, seeded()) for model in (blocks, trunk))  # type: ignore[attr-defined]
    torch.testing.assert_close(ours, theirs)


def test_predicting_with_a_fresh_branch_is_predicting_with_the_trunk() -> None:
    for shared in POLICIES:
        trunk = trunk_of("vit", shared)
        images = noise_batch()["pixel_values"]
        ours, theirs = (
            m.predict(images, steps=5, seeds=1, generator=seeded()) for m in (db.branch(trunk, BLOCKS), trunk)
        )
        assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("family", ["vit", *DIT_FAMILIES, "masked"])
def test_names_map_to_the_trunks(family: str) -> None:
    trunk = trunk_of(family)
    model = db.branch(trunk, BLOCKS)
    path = {"vit": "vit.layers", "dit": "layers", "diffusers-dit": "transformer_blocks", "masked": "layers"}[family]
    theirs = trunk.block(0).state_dict()
    for b, block in enumerate(model.blocks):
        mapped = {name: trunk_name(model, b, name, DEPTH) for name in block.state_dict()}
        assert set(mapped.values()) == set(theirs)
        assert all(torch.equal(block.state_dict()[ours], theirs[name]) for ours, name in mapped.items())
        for i in range(DEPTH):
            of_layer = {n: m for n, m in mapped.items() if n.startswith(f"network.{path}.{b * DEPTH + i}.")}
            assert len(of_layer) > 5
            for name, in_trunk in of_layer.items():
                assert in_trunk == name.replace(f"{path}.{b * DEPTH + i}.", f"{path}.{i}.", 1)
        others = {n for n in mapped if not n.startswith(f"network.{path}.")}
        assert all(mapped[n] == n for n in others)
    if family == "diffusers-dit":
        # The head's embedder has the name of layer 0 in every block; in the trunk it is layer 0's too.
        shared, own = (f"network.transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight" for i in (0, 4))
        state = model.block(2).state_dict()
        assert {shared, own} <= set(state)
        assert trunk_name(model, 2, shared, DEPTH) == trunk_name(model, 2, own, DEPTH) == shared
        assert state[shared].data_ptr() != state[own].data_ptr()


def test_branch_keeps_the_trunks_settings_and_changes_the_levels_alone() -> None:
    noise = db.EDM(p_mean=-0.8, p_std=1.0, sigma_data=0.4)
    trunk = trunk_of("dit", noise=noise, target={"kind": "image", "label_dropout": 0.3}, seed=5, overlap=0.0).train()
    model = db.branch(trunk, BLOCKS, partition="log-uniform", overlap=0.2)
    assert model.training
    kept = ("noise", "shared", "target", "seed", "conditioning_dim")
    assert all(getattr(model.blocks_config, k) == getattr(trunk.blocks_config, k) for k in kept)
    assert model.partition == db.Partition.build(noise, 6, 3, strategy="log-uniform", overlap=0.2)
    assert model.config.num_layers == 6
    assert trunk.config.num_layers == 2
    assert db.branch(trunk, BLOCKS).blocks_config.overlap == 0.05
    assert db.branch(trunk, 1).partition.layers == (2,)
    half = db.branch(trunk.bfloat16(), BLOCKS)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("partition", ["equi-probability", "log-uniform", "uniform"])
def test_a_branch_is_read_where_its_blocks_train(partition: str) -> None:
    """At the levels of a conversion of that partition: else no chain would ever call the blocks at the ends."""
    branched = db.branch(trunk_of("vit"), 6, partition=partition)
    converted = convert("vit", layers=6, num_blocks=6, partition=partition)
    assert branched.noise == converted.noise
    assert branched.partition.block_of(branched.noise.levels(1)[0]) == 0
    chosen = db.EDM(coverage=(0.1, 0.9))
    assert db.branch(trunk_of("vit", noise=chosen), 6, partition=partition).noise == chosen


@pytest.mark.each_value
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", ["vit", "dinov2", *DIT_FAMILIES, "masked"])
def test_a_branch_saves_loads_and_exports(family: str, shared: str, tmp_path: Path) -> None:
    model = db.branch(trunk_of(family, shared), BLOCKS)
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.partition == model.partition
    exported = model.export_initialisation()
    assert len(db.convert(exported, db.BlocksConfig(num_blocks=6)).blocks) == 6


def test_a_branchs_config_is_one_of_its_depth() -> None:
    """DINOv2's config lists a stage for every layer."""
    model = db.branch(trunk_of("dinov2"), BLOCKS)
    values, expected = (m.config.to_dict() for m in (model, tiny("dinov2", layers=DEPTH * BLOCKS)))
    assert len(values["stage_names"]) == DEPTH * BLOCKS + 1
    assert all(values[name] == expected[name] for name in ("stage_names", "out_features", "out_indices"))


def test_branching_leaves_the_global_generator_alone() -> None:
    trunk = trunk_of("dit")
    before = torch.get_rng_state()
    db.branch(trunk, BLOCKS)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    ("several blocks", lambda: db.branch(convert("dit"), 2), ("one block", "has 3")),
    (
        "shared",
        lambda: db.branch(trunk_of("dit"), 2, shared="joint"),
        ("cannot change ['shared']", "overlap", "partition"),
    ),
    ("noise", lambda: db.branch(trunk_of("dit"), 2, noise=db.EDM(), seed=1), ("cannot change ['noise', 'seed']",)),
    ("target", lambda: db.branch(trunk_of("vit"), 2, target=None), ("cannot change ['target']",)),
    (
        "growth",
        lambda: db.branch(trunk_of("dit"), 2, layers=(1, 3)),
        ("block of 3 layers", "trunk of 2", "at most 2 layers"),
    ),
    ("layers of other blocks", lambda: db.branch(trunk_of("dit"), 2, layers=(1, 1, 2)), ("names 3 blocks",)),
    ("layers of experts", lambda: db.branch(trunk_of("dit"), 2, layers=(2, 2), split="experts"), ("all layers",)),
    ("no block", lambda: db.branch(trunk_of("dit"), 0), ("num_blocks", "greater than or equal to 1")),
    ("negative", lambda: db.branch(trunk_of("dit"), -1), ("num_blocks", "-1")),
    ("partition", lambda: db.branch(trunk_of("dit"), 2, partition="equal"), ("partition", "'equal'", "'log-uniform'")),
    ("overlap", lambda: db.branch(trunk_of("dit"), 2, overlap=1.0), ("overlap", "less than 1")),
    (
        "frozen from a fresh start",
        lambda: db.convert(fresh_dit(), db.BlocksConfig(num_blocks=1, shared="frozen")),
        ("frozen", "zero"),
    ),
]


@pytest.mark.parametrize(("act", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


# ---- what the blocks' training takes over --------------------------------------------------------------------


def random_images(n: int = 40) -> ImageData:
    pixels = torch.randint(0, 256, (n, 3, IMAGE, IMAGE), generator=seeded(), dtype=torch.uint8)
    return ImageData(pixels, torch.arange(n) % NUM_LABELS, tuple("abcd"))


def trainer_of(model: nn.Module, folder: Path | None = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 3e-3, "ema_half_life": 30, "ema_ramp_up": 0.5}
    batches = ImageBatches(random_images(), mean=(0.5,) * 3, std=(0.5,) * 3, augment=None, device=torch.device("cpu"))
    snapshot = changes.pop("snapshot", None)
    config = TrainConfig.model_validate(values | changes)
    return Trainer(model.train(), batches, config, folder=folder, progress=False, snapshot=snapshot)


def owned(run: Trainer) -> dict[str, tuple[Any, int]]:
    """Name in the model -> (parameter set, place in it) of every trained parameter."""
    places = {id(p): (group, i) for group in run.sets.values() for i, p in enumerate(group.parameters)}
    named = run.model.named_parameters(remove_duplicate=False)
    return {name: places[id(p)] for name, p in named if p.requires_grad}


@pytest.mark.each_value
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("vit", "replicated"),
        ("vit", "joint"),
        ("dit", "frozen"),
        ("dit", "joint"),
        ("diffusers-dit", "replicated"),
        ("diffusers-dit", "frozen"),
    ],
)
def test_optimizer_and_average_are_the_trunks_or_fresh(
    family: str, shared: str, optimizer: bool, average: bool
) -> None:
    trunk = trainer_of(trunk_of(family, shared), steps=5)
    trunk.train()
    blocks = trainer_of(db.branch(trunk.model, BLOCKS))  # type: ignore[arg-type]
    blocks.inherit(trunk, optimizer=optimizer, average=average)
    of_trunk = owned(trunk)
    compared, moments_seen = 0, 0
    for name, (group, i) in owned(blocks).items():
        _, b, rest = name.split(".", 2)
        in_trunk = f"blocks.0.{trunk_name(blocks.model, int(b), rest, DEPTH)}"  # type: ignore[arg-type]
        if in_trunk not in of_trunk:
            # The trunk's head is conditioned by its layer 0, whose embedder is frozen with it. In a later block the
            # copy is of a layer alone, and trains: it starts afresh.
            assert (family, shared) == ("diffusers-dit", "frozen")
            assert rest.startswith(f"network.transformer_blocks.{DEPTH * int(b)}.norm1.emb.")
            assert not any(bool(value.any()) for value in group.moments[i].values())
            assert torch.equal(group.ema[i], group.parameters[i].detach())
            continue
        source, place = of_trunk[in_trunk]
        assert torch.equal(group.parameters[i], source.parameters[place])
        theirs, ours = source.moments[place], group.moments[i]
        used = bool(theirs["step"].any())  # by any step of the trunk: [MASK] never is
        assert ours.keys() == theirs.keys() >= {"exp_avg", "exp_avg_sq", "step"}
        assert not used or float(theirs["step"]) == 5
        if optimizer:
            for key, value in theirs.items():
                assert torch.equal(ours[key], value)
                assert ours[key].data_ptr() != value.data_ptr()
            moments_seen += used
        else:
            assert not any(bool(value.any()) for value in ours.values())
        start = source.ema[place] if average else group.parameters[i].detach()
        assert torch.equal(group.ema[i], start)
        assert group.ema[i].data_ptr() not in (source.ema[place].data_ptr(), group.parameters[i].data_ptr())
        assert group.inherited_steps == (5 if average else 0)
        assert group.steps == 0
        # The positive control: average and weights of the trunk differ (but for what nothing uses: [MASK]).
        compared += not torch.equal(source.ema[place], source.parameters[place].detach())
    assert compared > 20
    assert (moments_seen > 20) == optimizer
    if shared == "joint":
        assert "shared" in blocks.sets
    # And the blocks train from there: their own learning-rate schedule, the average's decay of all steps so far.
    group = blocks.sets["block 1"]
    blocks.schedule = [1]
    before = [e.clone() for e in group.ema]
    blocks.train()
    decay = blocks.config.average_decay(5 if average else 0)
    assert (decay > 0.5) == average
    assert blocks.residency.learning_rate(1) == pytest.approx(3e-3)
    for e, start, p in zip(group.ema, before, group.parameters, strict=True):
        torch.testing.assert_close(e, decay * start + (1 - decay) * p.detach())
    steps = [float(moments["step"]) for moments in group.moments if bool(moments["step"].any())]
    assert max(steps) == (6.0 if optimizer else 1.0)
    assert (min(steps) == 1.0) == (not optimizer or (family, shared) == ("diffusers-dit", "frozen"))


def test_a_subset_inherits_as_in_the_whole() -> None:
    trunk = trainer_of(trunk_of("dit"), steps=5)
    trunk.train()
    whole = trainer_of(db.branch(trunk.model, BLOCKS))  # type: ignore[arg-type]
    part = trainer_of(db.branch(trunk.model, BLOCKS), blocks=[BLOCKS - 1])  # type: ignore[arg-type]
    for run in (whole, part):
        run.inherit(trunk, optimizer=True, average=True)
    (name,) = part.sets
    found, expected = part.sets[name].state(), whole.sets[name].state()
    assert float(found["0.step"]) == 5
    assert differing(found, expected) == []


def test_inherited_state_survives_a_checkpoint(tmp_path: Path) -> None:
    trunk = trainer_of(trunk_of("dit"), steps=3)
    trunk.train()

    def made() -> Trainer:
        run = trainer_of(db.branch(trunk.model, BLOCKS), tmp_path)  # type: ignore[arg-type]
        run.inherit(trunk, optimizer=True, average=True)
        return run

    first = made()
    first.train(until=0)
    first.save_checkpoint()
    plain = trainer_of(db.branch(trunk.model, BLOCKS))  # type: ignore[arg-type]
    plain.load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert differing(everything(plain), everything(first)) == []
    assert plain.sets["block 2"].inherited_steps == 3


# ---- averages ------------------------------------------------------------------------------------------------


def test_edm_average_decay_in_closed_form() -> None:
    config = TrainConfig(steps=1, batch_size=50, accumulation=2, ema_half_life=1000, ema_ramp_up=0.05)
    assert config.keeps_average
    assert config.average_decay(0) == 0.0  # the first step forgets the start
    # Ramping up: half-life = 0.05 x the images seen before the step, 100 a step.
    assert config.average_decay(20) == pytest.approx(0.5 ** (100 / 100))
    assert config.average_decay(100) == pytest.approx(0.5 ** (100 / 500))
    # From 20,000 images on the half-life is 1,000: ten steps halve what was there.
    assert config.average_decay(200) == config.average_decay(10**6) == pytest.approx(0.5**0.1)
    assert config.average_decay(199) < config.average_decay(200)
    assert config.average_decay(10**6) ** 10 == pytest.approx(0.5)
    decays = [config.average_decay(step) for step in range(300)]
    assert decays == sorted(decays)
    # The other average, and none.
    other = TrainConfig(steps=1, ema_decay=0.999)
    assert [other.average_decay(s) for s in (0, 10, 10**6)] == pytest.approx([0.1, 11 / 20, 0.999])
    assert not TrainConfig(steps=1).keeps_average
    with pytest.raises(ValueError, match=r"either ema_decay or ema_half_life, got 0\.9 and 100"):
        TrainConfig(steps=1, ema_decay=0.9, ema_half_life=100)


def test_edm_average_follows_its_recursion_and_moves_with_its_block_alone() -> None:
    run = trainer_of(db.convert(tiny("dit"), db.BlocksConfig()), steps=6, accumulation=2, ema_half_life=20)
    run.schedule = [0, 2, 0, 0, 2, 0, 0, 0]
    config = run.config
    expected = {name: [p.detach().double() for p in group.parameters] for name, group in run.sets.items()}
    steps = dict.fromkeys(run.sets, 0)
    run.model.train()
    for unit in run.schedule:
        before = {name: [e.clone() for e in group.ema] for name, group in run.sets.items()}
        run.step(unit)
        moved = run.units[unit].name
        # EDM: beta = 0.5^(batch / half-life), half-life at most ramp-up x images seen.
        half_life = min(20.0, 0.5 * steps[moved] * 8)
        decay = 0.5 ** (8 / max(half_life, 1e-8))
        assert config.average_decay(steps[moved]) == pytest.approx(decay)
        steps[moved] += 1
        weights = [p.detach().double() for p in run.sets[moved].parameters]
        expected[moved] = [decay * e + (1 - decay) * w for e, w in zip(expected[moved], weights, strict=True)]
        for name, group in run.sets.items():
            still = all(torch.equal(e, b) for e, b in zip(group.ema, before[name], strict=True))
            assert still == (name != moved)
    assert steps == {"block 0": 6, "block 1": 0, "block 2": 2}
    for name, group in run.sets.items():
        for e, hand in zip(group.ema, expected[name], strict=True):
            torch.testing.assert_close(e.double(), hand, atol=1e-6, rtol=1e-5)
    # The average lags behind the weights, and is what `averaged` shows.
    group = run.sets["block 0"]
    assert any(not torch.allclose(e, p.detach(), atol=1e-4) for e, p in zip(group.ema, group.parameters, strict=True))
    kept = [e.clone() for e in group.ema]
    with run.averaged():
        assert all(torch.equal(p.detach(), e) for p, e in zip(group.parameters, kept, strict=True))
    assert all(torch.equal(e, k) for e, k in zip(group.ema, kept, strict=True))


# ---- whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> dict[str, ImageData]:
    return {"train": digits("train")}


def recipe(family: str = "dit", shared: str = "replicated", train: Any = None, **trunk: Any) -> Recipe:
    """Trunk and branch on the digits; every size tiny."""
    model: dict[str, Any] = {
        "dit": {
            "type": "DiT",
            "config": {
                "sample_size": 8,
                "patch_size": 4,
                "in_channels": 1,
                "hidden_size": 16,
                "num_layers": 4,
                "num_attention_heads": 2,
                "num_classes": 10,
            },
        },
        "diffusers-dit": {
            "type": "DiTTransformer2DModel",
            "config": {
                "sample_size": 8,
                "patch_size": 4,
                "in_channels": 1,
                "attention_head_dim": 8,
                "num_layers": 4,
                "num_attention_heads": 2,
                "num_embeds_ada_norm": 10,
            },
        },
        "vit": {
            "type": "ViTForImageClassification",
            "config": {
                "image_size": 8,
                "patch_size": 4,
                "num_channels": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_labels": 10,
                "hidden_dropout_prob": 0.1,
            },
        },
    }[family]
    values: dict[str, Any] = {
        "name": "tiny",
        "model": model,
        "blocks": {"num_blocks": 2, "shared": shared},
        "data": {"kind": "digits", "mean": [0.305], "std": [0.75]},
        "trunk": {"steps": 5, "weights": "raw", "optimizer": "copied", "average": "copied"} | trunk,
        "train": {
            "steps": 3,
            "batch_size": 6,
            "lr": 3e-3,
            "warmup_steps": 2,
            "ema_half_life": 40,
            "ema_ramp_up": 0.5,
            "seed": 11,
        }
        | (train or {}),
        "evaluate": {"kind": "accuracy"} if family == "vit" else {"kind": "samples", "features": None},
        "device": "cpu",
    }
    return parse_recipe(values, "test")


class Watch:
    """Every step of every trainer, seen from outside; can raise a signal at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int, list[int], int, int]] = []
        self.stop_at: int | None = None
        run = Stepper.run

        def watched(
            stepper: Stepper, unit: int, step: int, indices: Tensor, keys: tuple[int, int], following: int | None
        ) -> None:
            self.steps.append((unit, step, indices.flatten().tolist(), *keys))
            if len(self.steps) == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            run(stepper, unit, step, indices, keys, following)

        monkeypatch.setattr(Stepper, "run", watched)


def run(made: Recipe, folder: Path, data: dict[str, ImageData], **arguments: Any) -> runs.RunResult:
    return runs.train(Experiment(made, data), folder, progress=False, measure=False, **arguments)  # type: ignore[arg-type]


def everything(trained: Trainer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": t.clone() for name, t in trained.model.state_dict().items()}
    for name, group in trained.sets.items():
        tensors |= {f"{name}.{k}": t.clone() for k, t in group.state().items()}
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def left_by(folder: Path) -> dict[str, Tensor]:
    """All tensors of a finished run: newest checkpoints and saved models, of trunk and blocks."""
    found: dict[str, Tensor] = {}
    for phase in (folder / "trunk", folder):
        for place in (checkpoints(phase / "checkpoints")[-1], phase / "model"):
            for file in place.glob("*.safetensors"):
                found |= {f"{phase == folder}/{file.name}/{place.name}/{n}": t for n, t in load_file(file).items()}
    return found


@pytest.mark.parametrize(
    ("family", "shared", "options"),
    [
        ("dit", "replicated", {}),
        ("dit", "joint", {"weights": "averaged"}),
        ("dit", "replicated", {"optimizer": "fresh", "lr": 1e-3, "lr_schedule": "cosine"}),
        ("diffusers-dit", "frozen", {"average": "fresh"}),
        ("diffusers-dit", "replicated", {"weights": "averaged", "optimizer": "fresh", "average": "fresh"}),
        ("vit", "replicated", {}),
        ("vit", "joint", {"optimizer": "fresh", "warmup": "again"}),
    ],
)
def test_a_run_is_the_trunk_then_the_blocks(
    family: str, shared: str, options: dict[str, Any], data: dict[str, ImageData], tmp_path: Path
) -> None:
    """Against the same phases put together by hand."""
    made = recipe(family, shared, **options)
    result = run(made, tmp_path / "run", data)
    assert result.iterations == 5 + 2 * 3

    def batches() -> ImageBatches:
        return ImageBatches(
            data["train"],
            mean=(0.305,),
            std=(0.75,),
            augment=made.data.augment,
            device=torch.device("cpu"),  # type: ignore[union-attr]
        )

    alone = trunk_recipe(made)
    one = {"num_blocks": 1, "layers": None, "overlap": 0.0}
    assert alone.blocks == made.blocks.model_copy(update=one)
    assert alone.train.seed == made.train.seed
    assert alone.train.lr == options.get("lr", 3e-3)
    assert alone.train.lr_schedule == options.get("lr_schedule", "constant")
    trunk = Trainer(Experiment(alone).build(), batches(), alone.train, progress=False)
    assert isinstance(trunk.model, db.DiffusionBlocks)
    assert trunk.model.partition.layers == (2,)
    assert trunk.model.partition.training_interval(0) == (0.002, 80.0)
    trunk.train()
    assert trunk.iteration == 5
    if options.get("weights") == "averaged":
        with trunk.averaged():
            model = db.branch(trunk.model, 2)
    else:
        model = db.branch(trunk.model, 2)
    assert made.train.warmup_steps == 2
    warmup = 2 if options.get("warmup") == "again" else 0
    after = made.train.model_copy(update={"seed": 12, "warmup_steps": warmup})
    blocks = Trainer(model, batches(), after, progress=False)
    blocks.inherit(
        trunk,
        optimizer=options.get("optimizer") != "fresh",
        average=options.get("average") != "fresh",
    )
    blocks.train()
    with blocks.averaged():
        expected = copy.deepcopy(model.state_dict())
    saved = db.load(tmp_path / "run" / "model")
    assert same_states(saved.state_dict(), expected)
    assert saved.partition.layers == (2, 2)
    assert same_states(result.model.state_dict(), expected)
    with trunk.averaged():
        assert same_states(db.load(tmp_path / "run" / "trunk" / "model").state_dict(), trunk.model.state_dict())


def test_the_options_change_the_run(data: dict[str, ImageData], tmp_path: Path) -> None:
    """The positive control of the test above: no two of these come out the same."""
    options: list[dict[str, Any]] = [{}, {"weights": "averaged"}, {"optimizer": "fresh"}, {"average": "fresh"}]
    found = []
    for i, option in enumerate(options):
        run(recipe(**option), tmp_path / str(i), data)
        found.append(db.load(tmp_path / str(i) / "model").state_dict())
    for i in range(4):
        for j in range(i):
            assert not same_states(found[i], found[j])


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        pytest.param("dit", [2], marks=pytest.mark.exhaustive),
        pytest.param("dit", [7], marks=pytest.mark.exhaustive),
        ("dit", [5]),
        ("dit", [3, 6, 9]),
        ("vit", [4, 8]),
    ],
)
def test_a_run_stopped_in_either_phase_resumes_bit_for_bit(
    family: str, stops: list[int], data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 5 are the trunk's, 6 to 11 the blocks'."""
    made = recipe(family, "joint" if family == "vit" else "replicated")
    run(made, tmp_path / "whole", data)
    watch = Watch(monkeypatch)
    for stop in stops:
        watch.stop_at = stop
        with pytest.raises(Interrupted) as stopped:
            run(made, tmp_path / "split", data)
        assert stopped.value.signum == signal.SIGTERM
        assert len(watch.steps) == stop  # nothing is done twice
        assert (tmp_path / "split" / "trunk" / "model").is_dir() == (stop > 5)
        assert not (tmp_path / "split" / "model").exists()
    watch.stop_at = None
    result = run(made, tmp_path / "split", data)
    assert len(watch.steps) == result.iterations == 11
    assert differing(left_by(tmp_path / "whole"), left_by(tmp_path / "split")) == []


def test_blocks_resume_only_with_the_branch_they_had(data: dict[str, ImageData], tmp_path: Path) -> None:
    """Their checkpoints do not tell how they branched."""
    run(recipe(), tmp_path / "run", data)
    before = left_by(tmp_path / "run")
    with pytest.raises(ValueError, match=r"trunk\.average = copied, this run has fresh: set it back"):
        run(recipe(average="fresh"), tmp_path / "run", data)
    assert differing(left_by(tmp_path / "run"), before) == []
    run(recipe(average="fresh"), tmp_path / "run", data, resume=False)
    assert differing(left_by(tmp_path / "run"), before) != []


def test_a_finished_run_is_read_back_and_a_new_start_trains_both_phases_again(
    data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe()
    run(made, tmp_path / "run", data)
    before = left_by(tmp_path / "run")
    watch = Watch(monkeypatch)
    run(made, tmp_path / "run", data)
    assert watch.steps == []
    assert differing(left_by(tmp_path / "run"), before) == []
    run(made, tmp_path / "run", data, resume=False)
    assert len(watch.steps) == 11
    assert differing(left_by(tmp_path / "run"), before) == []


def test_blocks_do_not_see_the_trunks_draws_again(
    data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    run(recipe(), tmp_path / "run", data)
    trunk, blocks = watch.steps[:5], watch.steps[5:]
    assert sorted((unit, step) for unit, step, *_ in trunk) == [(0, step) for step in range(5)]
    assert sorted((unit, step) for unit, step, *_ in blocks) == [(u, step) for u in range(2) for step in range(3)]
    keys = [k for *_, noise_key, dropout_key in watch.steps for k in (noise_key, dropout_key)]
    assert len(set(keys)) == len(keys)
    indices = [tuple(i) for _, _, i, _, _ in watch.steps]
    assert len(set(indices)) == len(indices)
    # The positive control: with one seed for both phases block 0 would repeat the trunk.
    again = Watch(monkeypatch)
    for name, seed in (("a", 11), ("b", 11)):
        plain = recipe(train={"seed": seed}).model_copy(update={"trunk": None})
        run(plain, tmp_path / name, data)
    assert again.steps[:6] == again.steps[6:]


class Kept(Logger):
    """A log in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def test_each_phase_keeps_its_own_log_and_the_result_counts_both(data: dict[str, ImageData], tmp_path: Path) -> None:
    log = Kept()
    result = run(recipe(train={"log_every": 1}), tmp_path / "run", data, loggers=(log,))
    assert [r["iteration"] for r in log.records] == [1, 2, 3, 4, 5, 6]
    assert {r["unit"] for r in log.records} == {"block 0", "block 1"}
    assert len((tmp_path / "run" / "trunk" / "log.jsonl").read_text().splitlines()) == 5
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6
    assert result.iterations == 11
    assert result.seconds > 0


def test_a_trunk_needs_layers_that_divide_and_a_known_depth() -> None:
    made = recipe()
    uneven = made.model_copy(update={"blocks": made.blocks.model_copy(update={"num_blocks": 3})})
    with pytest.raises(ValueError, match="4 layers, 3 blocks"):
        trunk_recipe(uneven)
    config = {name: value for name, value in made.model.config.items() if name != "num_layers"}
    unknown = made.model_copy(update={"model": made.model.model_copy(update={"config": config})})
    with pytest.raises(ValueError, match=r"model\.config\.num_layers"):
        trunk_recipe(unknown)
    with pytest.raises(ValueError, match="both be given in steps, or both in epochs"):
        recipe(train={"steps": None, "epochs": 1})


# ---- snapshots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [{}, {"ema_half_life": None}, {"ema_half_life": None, "ema_decay": 0.9}])
def test_snapshots_are_the_averaged_model_and_leave_no_trace(
    average: dict[str, Any], data: dict[str, ImageData], tmp_path: Path
) -> None:
    plain, kept = recipe(train=average), recipe(train={"snapshot_every": 2} | average)
    run(plain, tmp_path / "plain", data)
    run(kept, tmp_path / "kept", data)
    assert differing(left_by(tmp_path / "plain"), left_by(tmp_path / "kept")) == []
    assert not (tmp_path / "plain" / "snapshots").exists()
    names = {folder: sorted(p.name for p in (folder / "snapshots").iterdir()) for folder in phases(tmp_path / "kept")}
    assert list(names.values()) == [
        ["iteration-000000002", "iteration-000000004"],
        ["iteration-000000002", "iteration-000000004", "iteration-000000006"],
    ]
    # The last one is what the run saved.
    last = db.load(tmp_path / "kept" / "snapshots" / "iteration-000000006")
    assert same_states(last.state_dict(), db.load(tmp_path / "kept" / "model").state_dict())
    # The others: the averages of a run that stopped there.
    alone = trunk_recipe(plain)
    stopped = Experiment(alone, data).trainer(progress=False)
    stopped.train(until=2)
    with stopped.averaged() as model:
        expected = copy.deepcopy(model.state_dict())
    first = db.load(tmp_path / "kept" / "trunk" / "snapshots" / "iteration-000000002")
    assert same_states(first.state_dict(), expected)
    if average != {"ema_half_life": None}:
        assert not same_states(expected, stopped.model.state_dict())


def phases(folder: Path) -> tuple[Path, Path]:
    return folder / "trunk", folder


def test_a_snapshot_sees_averages_and_the_run_goes_on_with_the_weights() -> None:
    seen: list[tuple[int, dict[str, Tensor], bool]] = []

    def snapshot(model: nn.Module, iteration: int) -> None:
        seen.append((iteration, copy.deepcopy(model.state_dict()), model.training))

    watched = trainer_of(convert("dit"), snapshot_every=5, snapshot=snapshot)
    plain = trainer_of(convert("dit"))
    watched.train()
    plain.train()
    assert [iteration for iteration, *_ in seen] == [5, 10]
    assert differing(everything(watched), everything(plain)) == []
    until = trainer_of(convert("dit"))
    until.train(until=10)
    with until.averaged():
        assert same_states(seen[1][1], until.model.state_dict())
    assert not same_states(seen[1][1], until.model.state_dict())


# ---- a golden run --------------------------------------------------------------------------------------------


def test_a_tiny_dit_learns_two_digits() -> None:
    """Trunk and branch on zeros and ones: loss below the best that ignores the data, samples towards the classes."""
    full = digits("train")
    two = full.labels < 2
    pictures = ImageData(full.images[two], full.labels[two], full.class_names[:2])
    original = {"in_channels": 1, "patch_size": 4, "num_classes": 2}
    batches = ImageBatches(pictures, mean=(0.305,), std=(0.75,), augment=None, device=torch.device("cpu"))
    batch = batches(torch.arange(len(pictures)), None)
    assert batch["pixel_values"].std().item() == pytest.approx(0.5, abs=0.02)
    values: dict[str, Any] = {"batch_size": 64, "lr": 5e-3, "warmup_steps": 10, "weight_decay": 0.0}
    average = {"ema_half_life": 2000, "ema_ramp_up": 0.1}

    def untrained(num_blocks: int, layers: int) -> db.DiffusionBlocks:
        torch.manual_seed(0)
        fresh = fresh_dit(layers=layers, **original)
        return db.convert(fresh, db.BlocksConfig(num_blocks=num_blocks, overlap=0.0))

    trunk = Trainer(
        untrained(1, 1), batches, TrainConfig(steps=250, lr_schedule="constant", **values, **average), progress=False
    )
    trunk.train()
    model = db.branch(trunk.model, 3)  # type: ignore[arg-type]
    blocks = Trainer(model, batches, TrainConfig(steps=100, seed=1, **values, **average), progress=False)
    blocks.inherit(trunk, optimizer=True, average=True)
    blocks.train()
    before = untrained(3, 3).eval()
    means = torch.stack([batch["pixel_values"][batch["labels"] == label].mean(0) for label in range(2)])

    def distances(model: db.DiffusionBlocks) -> Tensor:
        """Distance of each label's mean sample (rows) to each class's mean image (columns)."""
        samples = model.sample([0, 1] * 32, steps=12, guidance=1.5).view(32, 2, 1, 8, 8).mean(0)
        return (samples[:, None] - means[None]).square().flatten(2).mean(-1).sqrt()

    with blocks.averaged():
        model.eval()
        for b, share in enumerate((0.5, 0.5, 0.75)):  # of the loss of c_skip * z; least is to be gained at low noise
            loss, baseline = (m.loss(batch, block=b, generator=seeded()).mean().item() for m in (model, before))
            assert baseline == pytest.approx(1.0, abs=0.05)
            assert loss < share * baseline
        trained, fresh = distances(model), distances(before)
    assert (trained.diagonal() < 0.4 * fresh.diagonal()).all()
    assert (trained.diagonal() < 0.4 * trained.fliplr().diagonal()).all()  # each label has its own digit
    assert (fresh.diagonal() > 0.8 * fresh.fliplr().diagonal()).all()
