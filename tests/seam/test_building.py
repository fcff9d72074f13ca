"""Building block by block: a block depends on nothing else, equals what conversion makes, and is all that is held."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building_helpers import CLASSES, LAYERS, each_family, fresh, policies_of, reference, same, saved, tensors
from helpers import (
    DIT_FAMILIES,
    FAMILIES,
    POLICIES,
    noise_batch,
    same_states,
    seeded,
    tiny,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
from diffusionblocks import families as families
from diffusionblocks.core.block import Block
from diffusionblocks.core.conversion import assemble
from diffusionblocks.core.materialise import build, empty, materialise, materialise_added, materialise_buffers
from diffusionblocks.core.weights import Fresh, WeightSource, pretrained_source
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe
from diffusionblocks.training import EndToEnd

# ---- a block depends on nothing else ------------------------------------------------------------------------


@pytest.mark.slow
@each_family
def test_a_block_depends_neither_on_the_others_nor_on_the_order(family: str) -> None:
    source, config = fresh(family), db.BlocksConfig()
    whole = build(source, config)
    torch.manual_seed(12)  # nor on the global random state
    backwards = empty(fresh(family), config)
    for b in (2, 0, 1):
        materialise(backwards, b, source)
    some = build(fresh(family), config, blocks=[2])
    for b in range(3):
        assert same(whole.block(b), backwards.block(b))
    assert same(whole.block(2), some.block(2))
    assert all(t.is_meta for b in (0, 1) for t in tensors(some.block(b)).values())
    other = build(fresh(family, seed=1), config)
    assert not any(same(whole.block(b), other.block(b)) for b in range(3))


@each_family
def test_building_leaves_the_global_random_state_alone(family: str) -> None:
    before = torch.get_rng_state()
    build(fresh(family), db.BlocksConfig())
    assert torch.equal(before, torch.get_rng_state())


@each_family
def test_layers_are_drawn_apart_and_shared_parts_start_equal(family: str) -> None:
    model = build(fresh(family), db.BlocksConfig())
    states = [model.block(b).state_dict() for b in range(3)]
    common = set(states[0]) & set(states[1]) & set(states[2])
    layers = {f"network.{path}" for b in range(3) for path in model.block(b).layer_paths}
    shared = {n for n in common if not n.startswith("adaptive.")}
    assert any(n.startswith("network.") for n in shared)
    for name in shared:
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[0][name], states[2][name])
    for b in range(3):
        assert {n.split(".")[0] for n in states[b]} >= {"network"}
        for name in states[b].keys() - common:
            assert any(name.startswith(path) for path in layers) or name.startswith("adaptive.")
    # Two layers of one block, and the same place in two blocks, have weights of their own.
    drawn = []
    for b in range(3):
        for layer in model.block(b).layers():
            matrices = [p for p in layer.parameters() if p.dim() == 2 and bool(p.any())]
            drawn.append(matrices[-1])
    assert len(drawn) == LAYERS
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.each_value
@each_family
@pytest.mark.parametrize("policy", POLICIES)
def test_no_two_tensors_share_memory_but_the_jointly_trained(family: str, policy: str) -> None:
    if policy not in policies_of(family):
        pytest.skip("refused")
    model = build(fresh(family), db.BlocksConfig(shared=policy))
    everything = [t for b in range(3) for t in tensors(model.block(b)).values()]
    by_object = {id(t): t for t in everything}
    assert len({t.untyped_storage().data_ptr() for t in by_object.values()}) == len(by_object)
    several = len(everything) - len(by_object)
    assert bool(several) == (policy == "joint")
    assert bool(model.shared_parameters()) == (policy == "joint")


def test_jointly_trained_parts_are_built_once_and_not_built_again() -> None:
    source = fresh("vit")
    model = empty(source, db.BlocksConfig(shared="joint"))
    materialise(model, 1, source)
    shared = model.shared_parameters()
    assert shared
    assert not any(p.is_meta for p in shared)
    assert any(t.is_meta for t in tensors(model.block(0)).values())
    with torch.no_grad():
        shared[0].fill_(7.0)  # as if block 1 had trained
    materialise(model, 0, source)
    assert bool((model.shared_parameters()[0] == 7.0).all())
    assert model.shared_parameters()[0] is shared[0]


@each_family
def test_parameters_stay_the_same_objects(family: str) -> None:
    """What referred to a parameter before its block was built refers to the built one."""
    source = fresh(family)
    model = empty(source, db.BlocksConfig())
    before = list(model.parameters())
    for b in range(3):
        materialise(model, b, source)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    batch = noise_batch()
    model.loss(batch, 1, generator=seeded()).mean().backward()
    assert {id(p) for p in before if p.grad is not None} <= {id(p) for p in model.block(1).parameters()}
    assert any(p.grad is not None for p in before)


# ---- it is what conversion makes ----------------------------------------------------------------------------


@pytest.mark.each_value
@each_family
@pytest.mark.parametrize("policy", POLICIES)
def test_what_conversion_adds_and_computes_is_the_same(family: str, policy: str) -> None:
    if policy not in policies_of(family):
        pytest.skip("refused")
    config = db.BlocksConfig(shared=policy, seed=5)
    built = build(fresh(family), config)
    converted = db.convert(tiny(family, layers=LAYERS), config)
    mine, theirs = tensors(built), tensors(converted)
    assert mine.keys() == theirs.keys()
    drawn = {f"blocks.{b}.{name}" for b in range(3) for name in built.block(b).state_dict() if "network." in name}
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        assert mine[name].requires_grad == theirs[name].requires_grad
        assert name in drawn or torch.equal(mine[name], theirs[name]), name
    converted.load_state_dict(built.state_dict())
    batch = noise_batch()
    for b in range(3):
        ours = built.loss(batch, b, generator=seeded(1))
        assert torch.equal(ours, converted.loss(batch, b, generator=seeded(1)))
    assert built.training
    assert built.partition == converted.partition
    assert built.blocks_config == converted.blocks_config


@pytest.mark.each_value
@pytest.mark.parametrize("family", [*DIT_FAMILIES, "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_no_file_holds(family: str, dtype: torch.dtype) -> None:
    """For loading: parameters are assigned from elsewhere, frequencies and positions follow from the config."""
    converted = db.convert(nn.Module.to(tiny(family, layers=LAYERS), dtype=dtype))
    original = nn.Module.to(families.outline(CLASSES[family], converted.config), dtype=dtype)
    model = assemble(original, converted.blocks_config)
    for b in range(3):
        model.block(b).load_state_dict(converted.block(b).state_dict(), assign=True)
        buffers = dict(model.block(b).named_buffers())
        assert buffers
        assert all(t.is_meta for t in buffers.values())
        materialise_buffers(model, b)
        assert same_states(dict(model.block(b).named_buffers()), dict(converted.block(b).named_buffers()))
        assert same(model.block(b), converted.block(b))


def test_added_parts_alone() -> None:
    model = empty(fresh("vit"), db.BlocksConfig(seed=3))
    materialise_added(model, 1)
    converted = db.convert(tiny("vit", layers=LAYERS), db.BlocksConfig(seed=3))
    mine, theirs = tensors(model.block(1)), tensors(converted.block(1))
    for name, tensor in mine.items():
        assert tensor.is_meta == name.startswith("network."), name
        assert tensor.is_meta or torch.equal(tensor, theirs[name])


@each_family
def test_a_model_on_the_meta_device_is_converted_there(family: str) -> None:
    config = tiny(family, layers=LAYERS).config
    before = torch.get_rng_state()
    model = db.convert(families.outline(CLASSES[family], config), db.BlocksConfig())
    assert torch.equal(before, torch.get_rng_state())
    converted = db.convert(tiny(family, layers=LAYERS), db.BlocksConfig())
    mine, theirs = tensors(model), tensors(converted)
    assert all(t.is_meta for t in mine.values())
    about = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in x.items()} for x in (mine, theirs)]
    assert about[0] == about[1]
    for b in range(3):
        materialise(model, b, Fresh(CLASSES[family], config, seed=0))
    assert same(model, build(fresh(family), db.BlocksConfig()))


@pytest.mark.each_value
@each_family
@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_may_take_the_models_own_layers(family: str, policy: str) -> None:
    config = db.BlocksConfig(shared=policy)
    converted = db.convert(tiny(family, layers=LAYERS), config)
    original = tiny(family, layers=LAYERS)
    theirs = {id(p) for p in original.parameters()}
    taken = assemble(original, config, take=True)
    assert same(taken, converted)
    own = {id(p) for b in range(3) for layer in taken.block(b).layers() for p in layer.parameters()}
    assert len(own & theirs) > len(own) // 2
    batch = noise_batch()
    for b in range(3):
        assert torch.equal(taken.loss(batch, b, generator=seeded(1)), converted.loss(batch, b, generator=seeded(1)))


@each_family
def test_initialisation_depends_neither_on_depth_nor_on_place(family: str) -> None:
    """What `Fresh` relies on: a weight has the same spread in a model of one layer and in all layers of a deep one."""
    config = tiny(family, hidden_size=64) if family in (*FAMILIES, "dit") else tiny(family, attention_head_dim=32)
    shallow, deep = (
        families.instantiate(CLASSES[family], families.with_depth(CLASSES[family], config.config, n)) for n in (1, 8)
    )
    family = families.family_named(CLASSES[family])
    path = family.layers_path(shallow)
    (one,) = shallow.get_submodule(path).children()
    for layer in deep.get_submodule(path).children():
        for (name, a), (other, b) in zip(one.named_parameters(), layer.named_parameters(), strict=True):
            assert name == other
            if a.numel() >= 1000:  # enough for a standard deviation to a few per cent
                assert float(b.detach().std()) == pytest.approx(float(a.detach().std()), rel=0.15), name
            elif float(a.detach().std()) == 0:
                assert torch.equal(a, b), name
    for part in family.shared_paths(shallow):
        if part.startswith(path):
            continue
        for (name, a), (_, b) in zip(
            shallow.get_submodule(part).named_parameters(), deep.get_submodule(part).named_parameters(), strict=True
        ):
            if a.numel() >= 1000:
                assert float(b.detach().std()) == pytest.approx(float(a.detach().std()), rel=0.15), name


def test_a_zero_head_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"shared = frozen would freeze final_layer\.linear, which is zero"):
        build(fresh("dit"), db.BlocksConfig(shared="frozen"))


def test_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="block must be an integer from 0 to 2, got 3"):
        build(fresh("vit"), db.BlocksConfig(), blocks=[0, 3])


# ---- host memory -------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the CPU tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())


def size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors(module).values()}.values())


def sources_of(family: str, tmp_path: Path) -> dict[str, Callable[[], WeightSource]]:
    saved(tmp_path, family)
    return {
        "fresh": lambda: fresh(family),
        "in-files": lambda: pretrained_source(CLASSES[family], tmp_path, {}, seed=0, dtype=None),
    }


@pytest.mark.each_value
@pytest.mark.slow
@each_family
@pytest.mark.parametrize("kind", ["fresh", "in-files"])
def test_building_holds_one_block_besides_the_finished(family: str, kind: str, tmp_path: Path) -> None:
    make = sources_of(family, tmp_path)[kind]
    source = make()
    with Live() as live:
        model = build(source, db.BlocksConfig())
    block = size(model.block(0))
    assert size(model) <= live.peak <= size(model) + block
    with Live() as live:
        handed_away = empty(source, db.BlocksConfig())
        for b in range(3):
            materialise(handed_away, b, source)
            assert same(handed_away.block(b), model.block(b))
            handed_away.block(b).to("meta")
    assert block <= live.peak <= 1.5 * block
    assert live.now() == 0


@each_family
def test_only_the_blocks_asked_for_are_held(family: str) -> None:
    source = fresh(family)
    with Live() as live:
        model = build(source, db.BlocksConfig(), blocks=[1])
    assert live.now() == size(model.block(1))
    assert live.peak <= 1.5 * size(model.block(1))


_MEASURE = """
import torch
import diffusionblocks as db
from diffusionblocks.core.materialise import build, empty, materialise
from diffusionblocks.core.weights import Fresh
from diffusionblocks.families import rebuild_config
torch.set_num_threads(1)

def source(hidden, layers):
    values = {"sample_size": 8, "hidden_size": hidden, "num_layers": layers, "num_attention_heads": 4}
    return Fresh("DiT", rebuild_config("DiT", values), seed=0)

def peak():
    # Not getrusage: its maximum counts the process that started this one.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["VmHWM"].split()[0])

config = db.BlocksConfig(num_blocks=4)
build(source(64, 4), config)  # all that is imported and allocated once
before = peak()
large = source(384, 12)
model = empty(large, config)
block = sum(p.numel() * p.element_size() for p in model.block(0).parameters())
for b in range(4):
    materialise(model, b, large)
    model.block(b).to("meta")
print(peak() - before, block)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_process_grows_by_about_one_block() -> None:
    """A model of 140 MB in four blocks, each handed away before the next."""
    # Left to itself, glibc keeps what was given back, the more of it the more was: one block or two, by chance.
    gives_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", _MEASURE]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=gives_back).stdout
    grown, block = map(int, out.split())
    assert 30e6 < block < 40e6
    assert 0.8 * block < grown < 1.5 * block


# ---- recipes -----------------------------------------------------------------------------------------------


def recipe(family: str = "vit", **changes: Any) -> Recipe:
    config: dict[str, Any] = {
        "vit": {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 6}
        | {"num_attention_heads": 2, "intermediate_size": 32, "num_labels": 10},
        "dit": {"sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_layers": 6}
        | {"num_attention_heads": 2, "num_classes": 10},
    }[family]
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"kind": "digits"},
        "model": {"type": CLASSES[family], "config": config},
        "train": {"steps": 2, "seed": 3},
        "device": "cpu",
    }
    if family == "dit":
        values["evaluate"] = {"kind": "samples"}
    return Recipe.model_validate(values | changes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dit"])
def test_a_recipes_blocks_are_the_same_alone(family: str) -> None:
    whole = Experiment(recipe(family)).build()
    assert isinstance(whole, db.DiffusionBlocks)
    asked = recipe(family, train={"steps": 2, "seed": 3, "blocks": [1]})
    for chosen in (Experiment(recipe(family)).build(blocks=[1]), Experiment(asked).build()):
        assert isinstance(chosen, db.DiffusionBlocks)
        assert same(chosen.block(1), whole.block(1))
        assert all(t.is_meta for b in (0, 2) for t in tensors(chosen.block(b)).values())
    other = Experiment(recipe(family, train={"steps": 2, "seed": 4})).build()
    assert not same(other, whole)
    model = empty(Experiment(recipe(family)).original.weights(), Experiment(recipe(family)).blocks)
    materialise(model, 2, Experiment(recipe(family)).original.weights())
    assert same(model.block(2), whole.block(2))


def test_controls_of_a_recipe() -> None:
    control = Experiment(recipe("dit", method="end-to-end")).build()
    assert isinstance(control, db.DiffusionBlocks)
    assert len(control.blocks) == 1
    assert isinstance(control.blocks[0], Block)
    assert len(control.block(0).layer_paths) == 6
    assert isinstance(Experiment(recipe("vit", method="end-to-end")).build(), EndToEnd)


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
@pytest.mark.parametrize("family", ["vit", "dit", "pretrained"])
def test_the_outline_of_a_recipe_is_its_model_without_memory(family: str, method: str, tmp_path: Path) -> None:
    if family == "pretrained":
        saved(tmp_path, "vit", torch.bfloat16)
        given = recipe(method=method, model={"type": CLASSES["vit"], "pretrained": str(tmp_path), "config": {}})
    else:
        given = recipe(family, method=method)
    with Live() as live:
        found = Experiment(given).outline
    model = Experiment(given).build()
    assert live.peak < 0.1 * size(model)
    mine, theirs = tensors(found), tensors(model)
    assert all(t.is_meta for t in mine.values())
    about = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in x.items()} for x in (mine, theirs)]
    assert about[0] == about[1]
    assert type(found) is type(model)
    described = [families.config_values(given.model.type, Experiment.config_of(m)) for m in (found, model)]
    assert described[0] == described[1]


def test_a_recipe_that_trains_blocks_it_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.blocks = \[1, 3\]: the model has blocks 0 to 2"):
        Experiment(recipe(train={"blocks": [1, 3], "steps": 2})).build()


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_recipes_pretrained_model(method: str, tmp_path: Path) -> None:
    model = saved(tmp_path, "vit")
    values = {"type": CLASSES["vit"], "pretrained": str(tmp_path), "config": {}}
    built = Experiment(recipe(method=method, model=values)).build()
    if isinstance(built, EndToEnd):
        assert same_states(built.model.state_dict(), model.state_dict())
    else:
        assert same(built, reference("vit", tmp_path, db.BlocksConfig()))
