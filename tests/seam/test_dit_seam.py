"""The seams of a diffusion model: training, saving and sampling use the same blocks, labels and levels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    same_states,
    seeded,
    tiny,
    train_a_little,
)
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.sampling import SOLVERS, euler, heun, prior_of_seeds

NULL = NUM_LABELS
NO_DROPOUT = {"kind": "image", "label_dropout": 0.0}
UNCONDITIONAL = "unconditional"


def made(family: str = "dit", *, depth: int = 3, **config: Any) -> db.DiffusionBlocks:
    """A converted random DiT in evaluation mode; `config` goes to BlocksConfig."""
    original = tiny("dit", layers=depth, num_classes=0) if family == UNCONDITIONAL else tiny(family, layers=depth)
    return db.convert(original, db.BlocksConfig(**config)).eval()


def record_calls(model: db.DiffusionBlocks) -> list[tuple[int, float, int, list[int] | None]]:
    """(place in model.blocks, level, rows, labels) of every call of a block from now on."""
    calls: list[tuple[int, float, int, list[int] | None]] = []
    for place, block in enumerate(model.blocks):

        def hook(module: nn.Module, args: Any, output: Tensor, place: int = place) -> None:
            inputs, z, level = args
            (value,) = level.unique().tolist()
            labels = inputs["labels"].tolist() if "labels" in inputs else None
            assert level.shape == (len(z),)
            assert output.shape == z.shape
            calls.append((place, value, len(z), labels))

        block.register_forward_hook(hook)
    return calls


# ---- the whole journey --------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", [*DIT_FAMILIES, UNCONDITIONAL])
def test_convert_train_save_load_sample(family: str, shared: str, tmp_path: Path) -> None:
    model = made(family, shared=shared)
    start = copy.deepcopy(model.state_dict())
    train_a_little(model, image_batch)
    moved = {name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {"0", "1", "2"}
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert not loaded.training
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.blocks_config == model.blocks_config
    assert loaded.partition == model.partition
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    for b in range(3):
        ours, theirs = (m.loss(image_batch(), block=b, generator=seeded()) for m in (model, loaded))
        assert torch.equal(ours, theirs)
    arguments: dict[str, Any] = {"seeds": [3, 4, 5], "steps": 5}
    if family != UNCONDITIONAL:
        arguments |= {"labels": [0, 2, NULL], "guidance": 2.0}
    calls = record_calls(loaded)
    images = loaded.sample(**arguments)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert torch.equal(images, model.sample(**arguments))
    levels = loaded.noise.sampling_levels(5, "karras")[:-1]
    assert [level for _, level, _, _ in calls] == pytest.approx(levels)
    assert [place for place, *_ in calls] == [loaded.partition.block_of(level) for level in levels]


@pytest.mark.parametrize("shared", ["replicated", "joint"])
def test_a_fresh_dit_trains_saves_and_loads(shared: str, tmp_path: Path) -> None:
    model = db.convert(fresh_dit(), db.BlocksConfig(shared=shared))
    train_a_little(model, image_batch)
    model.save_pretrained(tmp_path / "m")
    assert same_states(db.load(tmp_path / "m").state_dict(), model.state_dict())


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = db.convert(tiny("dit").bfloat16()).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.sample([0, 1], steps=3), model.sample([0, 1], steps=3))


# ---- which block runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", ["karras", "equal-quantile"])
@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("config", [{}, {"num_blocks": 6, "overlap": 0.0}, {"layers": (1, 1, 4)}])
def test_sample_calls_the_block_that_trains_on_the_level(config: dict, steps: int, grid: str, solver: str) -> None:
    model = made(depth=6, **config)
    calls = record_calls(model)
    model.sample([1], steps=steps, grid=grid, solver=solver)
    levels = model.noise.sampling_levels(steps, grid)
    expected = levels[:-1]
    if solver == "heun":  # the correction of each step but the last runs at the step's lower level
        expected = [level for pair in itertools.pairwise(levels) for level in pair if level]
    assert [level for _, level, _, _ in calls] == pytest.approx(expected, rel=1e-6)
    for place, level, _, _ in calls:
        assert place == model.partition.block_of(level) == model.blocks[place].index
        low, high = model.partition.interval(place)
        assert low * (1 - 1e-6) <= level <= high * (1 + 1e-6)
        train_low, train_high = model.blocks[place].interval
        assert train_low * (1 - 1e-6) <= level <= train_high * (1 + 1e-6)
    if steps == 9 and grid == "equal-quantile":
        assert {place for place, *_ in calls} == set(range(model.partition.num_blocks))


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_blocks_in_the_wrong_order_sample_other_images(family: str) -> None:
    """Positive control of the seam: were the map from level to block reversed, the images would show it."""
    model = made(family)
    right = model.sample([0, 1], steps=6)
    model.blocks = nn.ModuleList(reversed(list(model.blocks)))
    assert (model.sample([0, 1], steps=6) - right).abs().mean() > 0.05


def test_heuns_correction_across_a_boundary_runs_the_lower_block() -> None:
    """On this grid every inner level is a boundary, which is the lower block's."""
    model = made(overlap=0.0)
    calls = record_calls(model)
    model.sample([1], steps=4, grid="equal-quantile", solver="heun")
    levels = model.noise.sampling_levels(4, "equal-quantile")
    assert levels[1:3] == pytest.approx(model.partition.boundaries[1:3][::-1])
    assert [place for place, *_ in calls] == [0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("family", [*DIT_FAMILIES, UNCONDITIONAL])
def test_a_sample_is_a_chain_of_its_blocks_by_hand(family: str, solver: str) -> None:
    model = made(family)
    labels = None if family == UNCONDITIONAL else torch.tensor([3, 0])
    inputs = {} if labels is None else {"labels": labels}

    def denoise(z: Tensor, level: float) -> Tensor:
        return model.blocks[model.partition.block_of(level)](inputs, z, torch.full((2,), level))

    z = torch.stack([80.0 * torch.randn(3, 8, 8, generator=seeded(s)) for s in (7, 9)])
    levels = model.noise.sampling_levels(5, "karras")
    with torch.no_grad():
        expected = {"euler": euler, "heun": heun}[solver](denoise, z, levels, model.noise)
    assert torch.equal(model.sample(labels, seeds=[7, 9], steps=5, solver=solver), expected)


# ---- what a sample depends on -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_an_image_depends_on_its_label_and_seed_alone(family: str, guidance: float) -> None:
    model = made(family)
    labels, seeds = [2, 0, 3, 0, NULL], [5, 6, 7, 8, 5]
    arguments: dict[str, Any] = {"steps": 6, "solver": "heun", "guidance": guidance}
    together = model.sample(labels, seeds=seeds, **arguments)
    torch.rand(11)  # not the global generator
    assert torch.equal(model.sample(torch.tensor(labels), seeds=seeds, **arguments), together)
    for i in range(5):
        alone = model.sample([labels[i]], seeds=[seeds[i]], **arguments)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    order = [4, 2, 0, 3, 1]
    shuffled = model.sample([labels[i] for i in order], seeds=[seeds[i] for i in order], **arguments)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-4)
    # Each of label and seed matters.
    assert (together[1] - together[3]).abs().mean() > 0.05  # another seed
    assert (together[0] - together[4]).abs().mean() > 1e-3  # another label


def test_seeds_default_to_the_first_numbers() -> None:
    model = made()
    assert torch.equal(model.sample([1, 1, 2], steps=3), model.sample([1, 1, 2], seeds=[0, 1, 2], steps=3))
    assert torch.equal(model.sample(steps=3), model.sample([NULL], seeds=[0], steps=3))


def test_sample_is_repeatable_whatever_the_mode_and_leaves_it_as_it_was() -> None:
    model = made("diffusers-dit")
    expected = model.sample([0, 1], steps=3)
    model.train()
    assert torch.equal(model.sample([0, 1], steps=3), expected)
    assert model.training
    assert all(block.training for block in model.blocks)
    model.eval().sample([0], steps=2)
    assert not model.training


def test_callback_sees_the_chain() -> None:
    model = made()
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    last: list[Tensor] = []

    def callback(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        seen.append((step, level, tuple(z.shape)))
        last[:] = [denoised]

    images = model.sample([0, 1], steps=4, callback=callback)
    levels = model.noise.sampling_levels(4, "karras")[:-1]
    assert seen == [(i, level, (2, 3, 8, 8)) for i, level in enumerate(levels)]
    assert torch.equal(images, last[0])  # a chain that ends at 0 ends with D


# ---- guidance and labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 7.5])
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_guidance_is_its_formula_in_one_call_of_twice_the_rows(family: str, guidance: float) -> None:
    model = made(family)
    labels = torch.tensor([3, 0])

    def denoise(z: Tensor, level: float) -> Tensor:
        with_label, without = (model.denoise({"labels": given}, z, level) for given in (labels, torch.full((2,), NULL)))
        return without + guidance * (with_label - without)

    levels = model.noise.sampling_levels(5, "karras")
    with torch.no_grad():
        expected = euler(denoise, prior_of_seeds(model.noise, (3, 8, 8), [1, 2]), levels, model.noise)
    calls = record_calls(model)
    images = model.sample(labels, seeds=[1, 2], steps=5, guidance=guidance)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert [(rows, given) for _, _, rows, given in calls] == [(4, [3, 0, NULL, NULL])] * 5
    if guidance > 1:
        assert (images - model.sample(labels, seeds=[1, 2], steps=5)).abs().mean() > 1e-3


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_guidance_one_is_none_and_costs_n_rows(family: str) -> None:
    model = made(family)
    calls = record_calls(model)
    model.sample([3, 0], steps=4, guidance=1.0)
    assert [(rows, given) for _, _, rows, given in calls] == [(2, [3, 0])] * 4


def test_no_labels_are_the_null_class() -> None:
    model = made()
    calls = record_calls(model)
    images = model.sample(seeds=[5, 6], steps=3)
    assert all(given == [NULL, NULL] for *_, given in calls)
    assert torch.equal(images, model.sample([NULL, NULL], seeds=[5, 6], steps=3))
    assert not torch.equal(images, model.sample([0, 0], seeds=[5, 6], steps=3))
    # Guidance 0 ignores the labels.
    torch.testing.assert_close(model.sample([0, 1], seeds=[5, 6], steps=3, guidance=0.0), images, atol=1e-5, rtol=1e-4)


def test_an_unconditional_model_has_no_labels_anywhere() -> None:
    model = made(UNCONDITIONAL)
    assert model.block(0).input_names == ()
    assert not any("label" in name for name in model.state_dict())
    calls = record_calls(model)
    assert model.sample(seeds=[0, 1, 2], steps=3).shape == (3, 3, 8, 8)
    assert [given for *_, given in calls] == [None] * 3
    model = made(UNCONDITIONAL)
    batch = image_batch()
    images = {"pixel_values": batch["pixel_values"]}
    # Labels that come with the data are left alone.
    with_labels, without = (model.loss(b, block=1, generator=seeded()) for b in (batch, images))
    assert torch.equal(with_labels, without)
    assert torch.isfinite(model(**images).loss)


# ---- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["edm", "none"])
@pytest.mark.parametrize("num_classes", [0, NUM_LABELS])
def test_loss_of_a_zero_network_by_hand(num_classes: int, weight: str) -> None:
    """A fresh DiT has F = 0, D = c_skip * z: its loss needs no network to compute."""
    config = db.BlocksConfig(target={"kind": "image", "weight": weight})
    model = db.convert(fresh_dit(num_classes=num_classes), config)
    batch = image_batch(6)
    y = batch["pixel_values"].double()
    for b in range(3):
        level = torch.linspace(*model.partition.training_interval(b), 6)
        eps = torch.randn(6, 3, 8, 8, generator=seeded(3)).double()  # the first draw, levels being given
        sigma = level.double()[:, None, None, None]
        denoised = 0.25 / (sigma**2 + 0.25) * (y + sigma * eps)
        w = (level.double() ** 2 + 0.25) / (level.double() * 0.5) ** 2 if weight == "edm" else torch.ones(6)
        expected = w * (denoised - y).square().mean(dim=(1, 2, 3))
        loss = model.loss(batch, block=b, generator=seeded(3), level=level)
        assert loss.shape == (6,)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=2e-4)


def test_gaussian_data_at_its_best_denoiser_has_loss_one_at_every_level() -> None:
    """c_skip * z is the posterior mean of Gaussian data; its variance is c_out^2, so the EDM weight makes it 1."""
    model = db.convert(fresh_dit(layers=6), db.BlocksConfig(num_blocks=6))
    losses = [model.loss(image_batch(64, seed=b), block=b, generator=seeded(b)).mean().item() for b in range(6)]
    assert losses == pytest.approx([1.0] * 6, abs=5 * (2 / (64 * 192)) ** 0.5)


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_loss_by_hand(family: str) -> None:
    """Draws in order: levels, noise, dropped labels, all from the generator given."""
    model = made(family, target={"kind": "image", "label_dropout": 0.5})
    batch = image_batch(12)
    for b, block in enumerate(model.blocks):
        g = seeded(b)
        level = model.noise.sample(12, model.partition.training_interval(b), generator=g)
        eps = torch.randn(12, 3, 8, 8, generator=g)
        labels = torch.where(torch.rand(12, generator=g) < 0.5, NULL, batch["labels"])
        assert 0 < (labels == NULL).sum() < 12
        z = batch["pixel_values"] + level[:, None, None, None] * eps
        error = block({"labels": labels}, z, level) - batch["pixel_values"]
        weight = (level**2 + 0.25) / (0.5 * level) ** 2
        expected = weight * error.square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(model.loss(batch, block=b, generator=seeded(b)), expected)


def test_training_levels_are_the_blocks_own() -> None:
    model = made(overlap=0.0)
    seen: list[tuple[int, Tensor]] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, place=place: seen.append((place, args[2])))
    for b in range(3):
        model.loss(image_batch(32), block=b, generator=seeded(b))
    assert [place for place, _ in seen] == [0, 1, 2]
    for place, level in seen:
        assert (model.partition.block_of(level) == place).all()


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_a_blocks_loss_does_not_depend_on_the_others(family: str, shared: str) -> None:
    model = made(family, shared=shared)
    common = {id(p) for p in model.shared_parameters()}
    for b in range(3):
        before = model.loss(image_batch(), block=b, generator=seeded())
        spoiled = copy.deepcopy(model)
        own = {id(p) for p in spoiled.blocks[b].parameters()}
        assert bool(common) == (shared == "joint")
        with torch.no_grad():
            others = [p for p in spoiled.parameters() if id(p) not in own]
            for parameter in others:
                parameter.fill_(float("nan"))
        assert others
        assert torch.equal(spoiled.loss(image_batch(), block=b, generator=seeded()), before)
        # The positive control: any layer of its own does matter.
        for layer in model.blocks[b].layer_paths:
            touched = copy.deepcopy(model)
            with torch.no_grad():
                next(touched.blocks[b].network.get_submodule(layer).parameters()).add_(0.3)
            assert not torch.equal(touched.loss(image_batch(), block=b, generator=seeded()), before)


@pytest.mark.parametrize("family", [*DIT_FAMILIES, UNCONDITIONAL])
def test_a_plain_call_returns_a_loss_in_both_modes(family: str) -> None:
    model = made(family)
    batch = image_batch()
    if family == UNCONDITIONAL:
        batch.pop("labels")
    # Evaluation: the mean over blocks, drawn one after the other.
    output = model(**batch, generator=seeded(2))
    assert output.logits is None
    g = seeded(2)
    expected = torch.stack([model.block(b).loss(batch, g).mean() for b in range(3)]).mean()
    torch.testing.assert_close(output.loss, expected)
    # Training: one block, drawn; all draws from the generator given.
    model.train()
    calls = record_calls_of_training(model)
    losses = [model(**batch, generator=seeded(s)).loss for s in range(30)]
    assert all(loss.shape == () for loss in losses)
    assert len(calls) == 30
    assert set(calls) == {0, 1, 2}
    torch.rand(5)
    assert [model(**batch, generator=seeded(s)).loss.item() for s in range(3)] == [v.item() for v in losses[:3]]
    g = seeded(4)
    drawn = int(torch.randint(3, (1,), generator=g))
    torch.testing.assert_close(losses[4], model.block(drawn).loss(batch, g).mean())


def record_calls_of_training(model: db.DiffusionBlocks) -> list[int]:
    calls: list[int] = []
    for place, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, o, place=place: calls.append(place))
    return calls


# ---- transformers.Trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*DIT_FAMILIES, UNCONDITIONAL])
def test_transformers_trainer_trains_and_evaluates(family: str, tmp_path: Path) -> None:
    model = made(family)
    start = copy.deepcopy(model.state_dict())
    batch = image_batch(16)
    examples = [
        {"pixel_values": image} if family == UNCONDITIONAL else {"pixel_values": image, "labels": label}
        for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        prediction_loss_only=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples)
    result = trainer.train()
    assert result.global_step == 3
    assert np.isfinite(result.training_loss)
    assert not same_states(model.state_dict(), start)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


# ---- bad input ----------------------------------------------------------------------------------------------

_models: dict[str, db.DiffusionBlocks] = {}


def model_for(kind: str = "dit") -> db.DiffusionBlocks:
    """One converted model of each kind for all cases: refusals must not change it."""
    if kind not in _models:
        if kind == "vit":
            _models[kind] = convert("vit").eval()
        elif kind == "no null class":
            _models[kind] = made(target=NO_DROPOUT)
        else:
            _models[kind] = made(kind)
    return _models[kind]


def loss(kind: str = "dit", **changes: Any) -> Any:
    batch = {name: value for name, value in (image_batch() | changes).items() if value is not None}
    return model_for(kind).loss(batch, block=1, generator=seeded())


def sample(kind: str = "dit", labels: Sequence[int] | Tensor | None = (0, 1), **arguments: Any) -> Any:
    return model_for(kind).sample(labels, **({"steps": 2} | arguments))


def labels_with(value: int) -> Tensor:
    return torch.tensor([0, 1, 2, 3, 0, value])


CASES: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    # losses
    ("label too high", lambda: loss(labels=labels_with(NULL + 1)), ("labels", "[0, 4]", "null class", "0 to 5")),
    ("label negative", lambda: loss(labels=labels_with(-1)), ("labels", "[0, 4]", "-1 to 3")),
    ("labels float", lambda: loss(labels=torch.zeros(6)), ("labels", "int64", "torch.float32")),
    ("labels too few", lambda: loss(labels=torch.zeros(5, dtype=torch.int64)), ("labels", "(6,)", "(5,)")),
    ("labels missing", lambda: loss(labels=None), ("lacks ['labels']", "['pixel_values']")),
    ("images missing", lambda: loss("unconditional", pixel_values=None), ("lacks ['pixel_values']",)),
    (
        "images of another size",
        lambda: loss(pixel_values=torch.randn(6, 3, 16, 16)),
        ("pixel_values", "(6, 3, 8, 8)", "(6, 3, 16, 16)"),
    ),
    (
        "one channel",
        lambda: loss(pixel_values=torch.randn(6, 1, 8, 8)),
        ("pixel_values", "(6, 3, 8, 8)", "(6, 1, 8, 8)"),
    ),
    ("flat images", lambda: loss(pixel_values=torch.randn(6, 192)), ("pixel_values", "(6, 3, 8, 8)", "(6, 192)")),
    (
        "images of whole numbers",
        lambda: loss(pixel_values=torch.zeros(6, 3, 8, 8, dtype=torch.uint8)),
        ("pixel_values", "float", "torch.uint8"),
    ),
    (
        "a level of another block",
        lambda: model_for().loss(image_batch(), block=2, level=torch.full((6,), 20.0)),
        ("level 20", "block 2", "block 0"),
    ),
    # samples
    ("sample: label too high", lambda: sample(labels=[0, 5]), ("labels", "[0, 4]", "null class", "0 to 5")),
    ("sample: label negative", lambda: sample(labels=[-1, 3]), ("labels", "[0, 4]", "-1 to 3")),
    ("sample: half a label", lambda: sample(labels=[0, 0.5]), ("labels", "int64", "torch.float32")),  # type: ignore[list-item]
    ("sample: labels of two dimensions", lambda: sample(labels=[[0], [1]]), ("labels", "(2,)", "(2, 1)")),  # type: ignore[list-item]
    (
        "sample: null class never learned",
        lambda: sample("no null class", labels=[0, NULL]),
        ("labels", "[0, 3]", "0 to 4"),
    ),
    (
        "sample: no labels, no null class",
        lambda: sample("no null class", labels=None),
        ("labels are needed", "[0, 3]", "label dropout"),
    ),
    ("sample: seeds too many", lambda: sample(seeds=[1, 2, 3]), ("2 labels", "3 seeds")),
    ("sample: seeds too few", lambda: sample(seeds=[1]), ("2 labels", "1 seeds")),
    ("sample: no seeds", lambda: sample(labels=None, seeds=[]), ("seeds", "at least one")),
    ("sample: a negative seed", lambda: sample(seeds=[1, -2]), ("seed", "-2", "whole number")),
    (
        "sample: labels to an unconditional model",
        lambda: sample(UNCONDITIONAL),
        ("DiT is unconditional", "no labels", "leave them out"),
    ),
    (
        "guidance of an unconditional model",
        lambda: sample(UNCONDITIONAL, labels=None, guidance=2.0),
        ("guidance = 2.0", "unconditional", "set guidance to 1"),
    ),
    (
        "guidance without a null class",
        lambda: sample("no null class", guidance=1.5),
        ("guidance = 1.5", "null class", "label_dropout", "set guidance to 1"),
    ),
    (
        "guidance without labels",
        lambda: sample(labels=None, guidance=1.5),
        ("guidance = 1.5", "labels", "guidance to 1"),
    ),
    ("guidance negative", lambda: sample(guidance=-1.0), ("guidance", ">= 0", "-1.0")),
    ("guidance nan", lambda: sample(guidance=float("nan")), ("guidance", "finite", "nan")),
    ("steps zero", lambda: sample(steps=0), ("steps", ">= 1", "got 0")),
    ("unknown solver", lambda: sample(solver="ddim"), ("'ddim'", "euler", "heun", "dpmpp-2m")),
    ("unknown grid", lambda: sample(grid="linear"), ("'linear'", "equal-quantile", "karras")),
    # the other family's verbs
    (
        "predict on a DiT",
        lambda: model_for().predict(image_batch()["pixel_values"]),
        ("predict", "classifiers", "DiT", "use sample"),
    ),
    ("sample of a ViT", lambda: sample("vit"), ("sample", "ViTForImageClassification", "use predict")),
    # conversion
    (
        "conditioning_dim",
        lambda: convert("dit", conditioning_dim=16),
        ("conditioning_dim = 16", "DiT", "by itself", "leave it out"),
    ),
    (
        "conditioning_dim, diffusers",
        lambda: convert("diffusers-dit", conditioning_dim=16),
        ("conditioning_dim = 16", "DiTTransformer2DModel"),
    ),
    (
        "a label as a DiT's target",
        lambda: convert("dit", target={"kind": "label"}),
        ("target.kind = label", "DiT denoises images", "leave target out"),
    ),
    (
        "an image as a ViT's target",
        lambda: convert("vit", target={"kind": "image"}),
        ("target.kind = image", "ViTForImageClassification", "denoises labels"),
    ),
    (
        "an unknown target",
        lambda: db.BlocksConfig(target={"kind": "video"}),
        ("target", "'video'", "'label'", "'image'"),
    ),
    (
        "label_dropout of one",
        lambda: db.BlocksConfig(target={"kind": "image", "label_dropout": 1.0}),
        ("label_dropout", "less than 1", "1.0"),
    ),
    (
        "frozen zero head",
        lambda: db.convert(fresh_dit(), db.BlocksConfig(shared="frozen")),
        ("shared = frozen", "final_layer.linear", "zero", "replicated"),
    ),
    (
        "a learned variance",
        lambda: db.convert(fresh_dit("diffusers-dit", out_channels=6)),
        ("out_channels = 6", "in_channels = 3", "noise and its variance", "kind: ddpm", "out_channels: 3"),
    ),
    (
        "diffusers' class without classes",
        lambda: db.convert(fresh_dit("diffusers-dit", num_embeds_ada_norm=0)),
        ("num_embeds_ada_norm = 0", "at least 1", "num_classes=0"),
    ),
    # our class
    ("DiT: patches", lambda: fresh_dit(sample_size=9), ("sample_size", "patch_size", "9 and 2")),
    ("DiT: heads", lambda: fresh_dit(num_attention_heads=3), ("hidden_size", "num_attention_heads = 3", "got 32")),
    ("DiT: width", lambda: fresh_dit(hidden_size=6), ("hidden_size", "of 4", "got 6")),
    ("DiT: no layers", lambda: fresh_dit(layers=0), ("num_layers", "> 0", "got 0")),
    ("DiT: negative classes", lambda: fresh_dit(num_classes=-1), ("num_classes", ">= 0", "-1")),
    (
        "DiT: no labels given",
        lambda: fresh_dit()(torch.zeros(1, 3, 8, 8), torch.zeros(1)),
        ("class_labels", "null class", "num_classes"),
    ),
]


@pytest.mark.parametrize(("act", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_the_null_class_is_a_label_where_it_is_known() -> None:
    """The limits of the refusals above: num_classes itself is allowed."""
    assert torch.isfinite(loss(labels=labels_with(NULL))).all()
    assert torch.isfinite(sample(labels=[NULL, 0])).all()
    assert torch.isfinite(sample("no null class", guidance=1.0)).all()
    assert torch.isfinite(sample(UNCONDITIONAL, labels=None, guidance=1.0)).all()
    # A trained read-out may be frozen; diffusers' class never starts from zero.
    db.convert(tiny("dit"), db.BlocksConfig(shared="frozen"))
    db.convert(fresh_dit("diffusers-dit"), db.BlocksConfig(shared="frozen"))


def test_noise_batches_of_the_helpers_are_what_dits_take() -> None:
    assert torch.isfinite(model_for().loss(noise_batch(), block=0, generator=seeded())).all()
