"""Fitted levels: what is measured, what the blocks then train on, stops and resumes without a trace, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noise_batch, randomise_adaptive, same_states, seeded, tiny
from safetensors.torch import load_file
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.seeds import key
from diffusionblocks.data import ImageBatches, ImageData, TextChunks, TextData, digits
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.baselines import variants
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.identity import describe_blocks
from diffusionblocks.experiments.noise_fit import mean_losses
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.experiments.recipe_changes import fit_recipe
from diffusionblocks.noise import fitted_quantiles
from diffusionblocks.training import Trainer
from diffusionblocks.training.checkpoint import checkpoints
from diffusionblocks.training.step import Stepper
from diffusionblocks.training.trainer import Interrupted

FIT = {"steps": 7, "rounds": 3, "grid": 9, "examples": 40, "batch_size": 16}
TRUNK = {"steps": 2}
MASKED = {"vocab_size": 27, "sequence_length": 16, "num_layers": 4, "num_attention_heads": 2}
CPU = torch.device("cpu")


def values_of(fit: dict[str, Any] | None = FIT, **changes: Any) -> dict[str, Any]:
    """A tiny ViT on the digits as plain values, dropout and all."""
    config = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_labels": 10,
        "hidden_dropout_prob": 0.1,
    }
    train = {"steps": 3, "batch_size": 6, "lr": 3e-3, "warmup_steps": 2, "ema_decay": 0.9, "seed": 11}
    return {
        "name": "tiny",
        "model": {"type": "ViTForImageClassification", "config": config},
        "blocks": {"num_blocks": 2},
        "data": {"kind": "digits"},
        "fit": fit,
        "train": train | changes.pop("train", {}),
        "evaluate": {"steps": [1], "seeds": [1], "limit": 20},
        "device": "cpu",
    } | changes


def recipe(fit: dict[str, Any] | None = FIT, **changes: Any) -> Recipe:
    return parse_recipe(values_of(fit, **changes), "test")


@pytest.fixture(scope="module")
def data() -> dict[str, ImageData]:
    return {"train": digits("train")}


def run(made: Recipe, folder: Path, data: dict[str, ImageData], **arguments: Any) -> runs.RunResult:
    return runs.train(Experiment(made, data), folder, progress=False, measure=False, **arguments)


def levels_of(folder: Path) -> dict[str, Any]:
    """What a fit left, without the times that it took."""
    values: dict[str, Any] = json.loads((folder / "fit" / "levels.json").read_text())
    for done in values["rounds"]:
        del done["train_seconds"], done["measure_seconds"]
    return values


def weights(folder: Path) -> dict[str, Tensor]:
    return {f"{file.name}/{n}": t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def batches_of(made: Recipe, data: dict[str, ImageData]) -> ImageBatches:
    options: Any = made.data
    return ImageBatches(data["train"], mean=options.mean, std=options.std, augment=options.augment, device=CPU)


def measure(model: db.DiffusionBlocks, made: Recipe, data: dict[str, ImageData], levels: list[float]) -> list[float]:
    return mean_losses(
        model.block(0),
        batches_of(made, data),
        levels,
        examples=40,
        batch_size=16,
        precision=made.train.precision,
        seed=made.train.seed,
    )


# ---- what is measured ----------------------------------------------------------------------------------------


class Fixed:
    """Examples by index; counts what it is asked for."""

    num_examples = 10

    def __init__(self) -> None:
        self.all = noise_batch(self.num_examples)
        self.asked: list[int] = []

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        self.asked += indices.tolist()
        return {name: value[indices] for name, value in self.all.items()}

    def compile(self) -> None:
        """Nothing to compile."""


@pytest.mark.parametrize("batch_size", [4, 10])
def test_the_measurement_is_the_blocks_loss_without_its_weight(batch_size: int) -> None:
    config = {"num_blocks": 1, "overlap": 0.0}
    model, weighted = (
        db.convert(tiny(), db.BlocksConfig.model_validate(config | {"target": {"kind": "label", "weight": weight}}))
        for weight in ("none", "edm")
    )
    for made in (model, weighted):
        randomise_adaptive(made)
    levels = [0.002, 0.3, 80.0]
    batches = Fixed()
    options: dict[str, Any] = {"examples": 99, "batch_size": batch_size, "precision": "float32", "seed": 5}
    found = mean_losses(weighted.block(0), batches, levels, **options)
    assert sorted(batches.asked) == list(range(10)), "each example once, and all where there are fewer than asked for"
    model.eval()
    chosen = torch.tensor(batches.asked).split(batch_size)
    for value, mean in zip(levels, found, strict=True):
        losses = []
        for number, indices in enumerate(chosen):
            generator = seeded(key(5, 0, number, "fit noise"))
            batch, level = batches(indices, generator), torch.full((len(indices),), value)
            with torch.no_grad():
                losses.append(model.loss(batch, block=0, generator=generator, level=level))
        assert mean == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert len({round(loss, 4) for loss in found}) == 3
    assert found == mean_losses(model.block(0), Fixed(), levels, **options)
    few = Fixed()
    mean_losses(model.block(0), few, levels, **options | {"examples": 3})
    assert len(set(few.asked)) == len(few.asked) == 3
    in_bfloat16 = mean_losses(model.block(0), Fixed(), levels, **options | {"precision": "bfloat16"})
    assert in_bfloat16 == pytest.approx(found, rel=0.05)
    assert in_bfloat16 != found


def test_levels_go_where_the_label_can_neither_be_read_off_z_nor_be_lost(tmp_path: Path) -> None:
    """Images that say nothing: what the network knows it has from z, and that fades at the noise of unit rows."""
    labels = torch.randint(10, (400,), generator=seeded())
    blank = ImageData(torch.zeros(400, 1, 8, 8, dtype=torch.uint8), labels, tuple("0123456789"))
    made = recipe({"steps": 240, "rounds": 3, "grid": 25, "examples": 200}, train={"batch_size": 32, "steps": 1})
    run(made, tmp_path, {"train": blank})
    noise = db.load(tmp_path / "model").noise
    values = levels_of(tmp_path)
    losses = values["rounds"][-1]["losses"]
    # The grid is even over log sigma: 25 levels from 0.002 to 80, the 13th 0.4, the 16th 1.5.
    assert max(losses[6:10]) < 0.3
    assert min(losses[18:]) > 0.9 * math.log(10)
    inside = noise.cdf(torch.tensor([0.1, 3.0], dtype=torch.float64)).diff().item()
    even = math.log(30) / math.log(80 / 0.002)
    assert inside > 0.75 > 2 * even


def test_levels_of_equal_loss_go_where_z_leaves_the_label_open(data: dict[str, ImageData], tmp_path: Path) -> None:
    """Of the same measured losses, `fit.equal: loss` makes higher levels than `rise`."""
    for equal in ("rise", "loss"):
        run(recipe({**FIT, "rounds": 1, "equal": equal}), tmp_path / equal, data)
    rise, loss = (levels_of(tmp_path / equal)["rounds"][0] for equal in ("rise", "loss"))
    assert rise["losses"] == loss["losses"]
    assert loss["noise"]["quantiles"][64] > 2 * rise["noise"]["quantiles"][64]


# ---- a run is the fit, then the blocks -----------------------------------------------------------------------


def converted(noise: db.EDM) -> db.EDM:
    """As a converted classifier has it: with the coverage that its target takes."""
    return dataclasses.replace(noise, coverage=(0.001, 0.999))


def test_the_fit_is_one_training_whose_levels_change(data: dict[str, ImageData], tmp_path: Path) -> None:
    """Another road to the same levels: one trainer throughout, whose block gets new levels in place."""
    made = recipe()
    result = run(made, tmp_path, data)
    alone = fit_recipe(made)
    assert alone.train.steps == 7
    assert not alone.train.keeps_average
    trainer = Trainer(Experiment(alone).build(), batches_of(made, data), alone.train, progress=False)
    model = trainer.model
    assert isinstance(model, db.DiffusionBlocks)
    assert model.partition.layers == (2,)
    assert model.partition.training_interval(0) == (0.002, 80.0)
    noise = db.EDM()
    grid = noise.boundaries(8, "log-uniform")
    left = levels_of(tmp_path)
    assert left["levels"] == pytest.approx(grid)
    assert [done["iteration"] for done in left["rounds"]] == [2, 5, 7]
    for done in left["rounds"]:
        trainer.train(until=done["iteration"])
        losses = measure(model, made, data, grid)
        assert losses == done["losses"]
        noise = dataclasses.replace(noise, quantiles=fitted_quantiles(grid, losses, floor=0.05))
        assert db.EDM(**done["noise"]) == noise
        model.block(0).noise = converted(noise)
        for shared in trainer.residency.shared_modules:
            shared.module.noise = converted(noise)  # type: ignore[assignment]
    assert len({str(done["losses"]) for done in left["rounds"]}) == 3
    assert (tmp_path / "fit" / "levels.png").read_bytes().startswith(b"\x89PNG")
    assert db.load(tmp_path / "model").noise == converted(noise)
    assert result.iterations == 7 + 2 * 3
    assert result.seconds > trainer.seconds / 10


@pytest.mark.each_value
@pytest.mark.parametrize("trunk", [None, TRUNK])
@pytest.mark.parametrize("shared", ["replicated", "joint"])
def test_trunk_and_blocks_train_on_the_fitted_levels(
    trunk: dict[str, Any] | None, shared: str, data: dict[str, ImageData], tmp_path: Path
) -> None:
    """Against a run whose recipe names these levels, and fits none."""
    blocks = {"num_blocks": 2, "shared": shared}
    made = recipe(trunk=trunk, blocks=blocks)
    result = run(made, tmp_path / "fitted", data)
    noise = levels_of(tmp_path / "fitted")["rounds"][-1]["noise"]
    named = recipe(None, trunk=trunk, blocks=blocks | {"noise": noise})
    other = run(named, tmp_path / "named", data)
    assert same_states(weights(tmp_path / "fitted" / "model"), weights(tmp_path / "named" / "model"))
    if trunk is not None:
        assert same_states(weights(tmp_path / "fitted/trunk/model"), weights(tmp_path / "named/trunk/model"))
        assert db.load(tmp_path / "fitted" / "trunk" / "model").noise == converted(db.EDM(**noise))
    model = result.model
    assert isinstance(model, db.DiffusionBlocks)
    assert model.noise == converted(db.EDM(**noise))
    assert list(model.partition.boundaries) == pytest.approx(db.EDM(**noise).boundaries(2))
    assert model.partition.boundaries[1] != db.EDM().boundaries(2)[1]
    assert result.iterations == other.iterations + 7
    written = json.loads((tmp_path / "fitted" / "recipe.json").read_text())
    assert written == made.model_dump(mode="json") | {"blocks": describe_blocks(made)}  # the target written out
    assert json.loads((tmp_path / "fitted" / "result.json").read_text())["iterations"] == result.iterations
    # The positive control: without the fit the blocks are others.
    run(recipe(None, trunk=trunk, blocks=blocks), tmp_path / "plain", data)
    assert not same_states(weights(tmp_path / "fitted" / "model"), weights(tmp_path / "plain" / "model"))


def test_blocks_that_train_apart_fit_the_same_levels(data: dict[str, ImageData], tmp_path: Path) -> None:
    run(recipe(), tmp_path / "whole", data)
    for block in (0, 1):
        run(recipe(train={"blocks": [block]}), tmp_path / str(block), data)
        name = f"block-0{block}.safetensors"
        ours, whole = (load_file(tmp_path / folder / "model" / name) for folder in (str(block), "whole"))
        assert same_states(ours, whole)


# ---- masked text ---------------------------------------------------------------------------------------------


def masked_recipe(**changes: Any) -> Recipe:
    values = {
        "name": "masked",
        "model": {
            "type": "MaskedTransformer",
            "config": {**MASKED, "embedding_size": 8, "hidden_size": 16, "mlp_size": 16},
        },
        "blocks": {"num_blocks": 2},
        "data": {"kind": "topics", "length": 16},
        "fit": {"steps": 30, "rounds": 2, "grid": 9, "examples": 64, "equal": "loss"},
        "train": {"steps": 2, "batch_size": 32, "lr": 3e-2, "warmup_steps": 1},
        "evaluate": {"kind": "bits", "limit": 8},
        "device": "cpu",
    }
    return parse_recipe(values | changes, "test")


def test_masked_text_is_fitted_saved_resumed_and_read_by_the_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of long runs of a letter: what a masked letter costs rises with what else is masked."""
    letters = torch.randint(2, (300, 1), generator=seeded()).expand(-1, 64).flatten()
    made, text = masked_recipe(), TextChunks(TextData(letters.byte(), 27), 16)
    first = runs.train(Experiment(made, {"train": text}), tmp_path / "whole", progress=False, measure=False)
    rounds = levels_of(tmp_path / "whole")["rounds"]
    assert len(rounds) == 2
    model = db.load(tmp_path / "whole" / "model")
    quantiles = model.noise.to_dict()["quantiles"]
    assert list(quantiles) == rounds[-1]["noise"]["quantiles"] != rounds[0]["noise"]["quantiles"]
    assert quantiles[64] > 0.55  # half of the draws, where without a fit it is 0.5
    assert model.partition.boundaries[1] == pytest.approx(quantiles[64])  # equal probability is equal loss
    levels: list[float] = []
    model.generate(range(2), steps=4, callback=lambda step, level, z, logits: levels.append(level))
    assert levels == pytest.approx([1.0, quantiles[96], quantiles[64], quantiles[32]])
    watch = Watch(monkeypatch)
    watch.stop_at, watch.gently = 22, False
    with pytest.raises(KeyboardInterrupt):
        runs.train(Experiment(made, {"train": text}), tmp_path / "killed", progress=False, measure=False)
    watch.stop_at = None
    runs.train(Experiment(made, {"train": text}), tmp_path / "killed", progress=False, measure=False)
    assert levels_of(tmp_path / "killed") == levels_of(tmp_path / "whole")
    assert same_states(db.load(tmp_path / "killed" / "model").state_dict(), first.model.state_dict())


# ---- stops and starts ----------------------------------------------------------------------------------------


class Watch:
    """Counts the steps of all trainers; ends the run at one of them, by a signal or at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.stop_at: int | None = None
        self.gently = True
        run_step = Stepper.run

        def watched(stepper: Stepper, *arguments: Any) -> None:
            self.steps += 1
            if self.steps == self.stop_at:
                if not self.gently:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)
            run_step(stepper, *arguments)

        monkeypatch.setattr(Stepper, "run", watched)


@pytest.fixture(scope="module")
def whole(data: dict[str, ImageData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trunk that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(trunk=TRUNK), folder, data)
    return folder


@pytest.mark.each_value
@pytest.mark.parametrize("gently", [True, False])
@pytest.mark.parametrize("stop_at", [1, 2, 4, 7, 10])
def test_a_killed_run_ends_with_the_same_levels_and_blocks(
    gently: bool,
    stop_at: int,
    whole: Path,
    data: dict[str, ImageData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fit has steps 1-2, 3-5 and 6-7; the trunk 8-9."""
    made = recipe(trunk=TRUNK)
    watch = Watch(monkeypatch)
    watch.stop_at, watch.gently = stop_at, gently
    with pytest.raises(Interrupted if gently else KeyboardInterrupt):
        run(made, tmp_path, data)
    watch.stop_at = None
    done = watch.steps
    run(made, tmp_path, data)
    assert levels_of(tmp_path) == levels_of(whole)
    assert same_states(weights(tmp_path / "model"), weights(whole / "model"))
    if gently:  # no step twice
        assert watch.steps == 7 + 2 + 6
    else:  # only those since the end of the last round, or phase
        assert watch.steps - done == 15 - max(end for end in (0, 2, 5, 7, 9) if end < stop_at)


def test_a_run_killed_before_it_wrote_the_rounds_measurement_measures_again(
    data: dict[str, ImageData], tmp_path: Path
) -> None:
    made = recipe()
    run(made, tmp_path, data)
    before = levels_of(tmp_path)
    file = tmp_path / "fit" / "levels.json"
    values = json.loads(file.read_text())
    values["rounds"].pop()
    file.write_text(json.dumps(values))
    run(made, tmp_path, data)
    assert levels_of(tmp_path) == before


def test_a_finished_fit_is_only_read_back(
    data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe()
    first = run(made, tmp_path, data)
    left = (tmp_path / "fit" / "levels.json").read_bytes()
    watch = Watch(monkeypatch)
    again = run(made, tmp_path, data)
    assert watch.steps == 0
    assert (tmp_path / "fit" / "levels.json").read_bytes() == left
    assert (again.seconds, again.iterations) == (pytest.approx(first.seconds), first.iterations)
    anew = run(made, tmp_path, data, resume=False)
    assert watch.steps == anew.iterations == 13
    assert same_states(anew.model.state_dict(), first.model.state_dict())
    longer = recipe(FIT | {"steps": 9})
    assert run(longer, tmp_path, data, resume=False).iterations == 15


def test_a_fit_of_an_earlier_version_is_read_back(data: dict[str, ImageData], tmp_path: Path) -> None:
    made = recipe(blocks={"num_blocks": 2, "target": {"kind": "label", "feedback": "hard"}})
    first = run(made, tmp_path, data)
    file = tmp_path / "fit" / "levels.json"
    values = json.loads(file.read_text())
    target, model, train = (values["settings"][name] for name in ("blocks", "model", "train"))
    target["target"]["bridge"] = target["target"].pop("feedback")
    train["dwell"] = train.pop("steps_per_switch")
    del model["dtype"]  # which version 0.1.0 did not have
    file.write_text(json.dumps(values))
    assert run(made, tmp_path, data).seconds == pytest.approx(first.seconds)


def test_a_fit_of_the_first_version_is_read_back_as_one_that_told_every_level(
    data: dict[str, ImageData], tmp_path: Path
) -> None:
    made = recipe(blocks={"num_blocks": 2, "noise": {"coverage": [0.0, 1.0]}})
    first = run(made, tmp_path, data)
    file = tmp_path / "fit" / "levels.json"
    values = json.loads(file.read_text())
    del values["settings"]["data"]
    for noise in (values["settings"]["blocks"]["noise"], *(part["noise"] for part in values["rounds"])):
        del noise["coverage"]
    file.write_text(json.dumps(values))
    again = run(made, tmp_path, data)
    assert again.seconds == pytest.approx(first.seconds)
    assert again.model.noise == first.model.noise
    assert again.model.noise.coverage == (0.0, 1.0)


# ---- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fit": FIT | {"floor": 0.2}}, ("fit.floor = 0.05", "has 0.2", "--restart")),
        ({"train": {"lr": 1e-3}}, ("train.lr = 0.003", "has 0.001")),
        ({"blocks": {"num_blocks": 2, "noise": {"p_mean": 0.5}}}, ("blocks.noise = None", "'p_mean': 0.5")),
        ({"blocks": {"num_blocks": 4}}, ("model.config", "'num_hidden_layers': 1")),
    ],
)
def test_a_fit_with_other_settings_is_not_read_back(
    changes: dict[str, Any], words: tuple[str, ...], data: dict[str, ImageData], tmp_path: Path
) -> None:
    run(recipe(), tmp_path, data)
    shutil.rmtree(tmp_path / "checkpoints")  # of the blocks, which refuse by themselves
    with pytest.raises(ValueError, match="was fitted with") as error:
        run(recipe(**changes), tmp_path, data)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_what_a_fit_does_not_depend_on_may_change(
    data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(), tmp_path, data)
    shutil.rmtree(tmp_path / "checkpoints")
    watch = Watch(monkeypatch)
    longer = recipe(train={"steps": 4, "ema_decay": 0.5, "log_every": 1}, evaluate={"steps": [2]})
    assert run(longer, tmp_path, data).iterations == 7 + 8
    assert watch.steps == 8


@pytest.mark.parametrize(("before", "now"), [(FIT, None), (None, FIT), (FIT, FIT | {"floor": 0.2})])
def test_blocks_do_not_go_on_with_other_levels(
    before: dict[str, Any] | None, now: dict[str, Any] | None, data: dict[str, ImageData], tmp_path: Path
) -> None:
    run(recipe(before), tmp_path, data)
    (tmp_path / "fit" / "levels.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"was made with fit(\.floor)? = (None|0\.05|\{.*), this run"):
        run(recipe(now), tmp_path, data)


def test_a_restart_that_is_killed_leaves_no_blocks_of_older_levels(
    data: dict[str, ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(trunk=TRUNK, train={"seed": 3})
    run(made, tmp_path / "expected", data)
    run(recipe(trunk=TRUNK), tmp_path / "run", data)
    watch = Watch(monkeypatch)
    watch.stop_at = 4
    with pytest.raises(Interrupted):
        run(made, tmp_path / "run", data, resume=False)
    watch.stop_at = None
    run(made, tmp_path / "run", data)
    assert levels_of(tmp_path / "run") == levels_of(tmp_path / "expected")
    assert same_states(weights(tmp_path / "run" / "model"), weights(tmp_path / "expected" / "model"))


def test_checkpoints_of_another_fit_are_refused(data: dict[str, ImageData], tmp_path: Path) -> None:
    run(recipe(), tmp_path, data)
    (tmp_path / "fit" / "levels.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint at iteration 7, but levels.json is for iterations 0 to 2"):
        run(recipe(), tmp_path, data)
    run(recipe(), tmp_path, data, resume=False)
    assert len(checkpoints(tmp_path / "fit" / "checkpoints")) == 2


def test_a_round_needs_a_step(data: dict[str, ImageData], tmp_path: Path) -> None:
    few = {"batch_size": 1000, "steps": None, "epochs": 1.0}
    made = recipe({"epochs": 2.0, "rounds": 5, "grid": 3, "examples": 8}, train=few)
    with pytest.raises(ValueError, match="a round of the fit would have no step"):
        run(made, tmp_path, data)


DIT = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_layers": 4, "num_classes": 10}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fit": {"epochs": 1.0}}, "fit and train must both be given in steps, or both in epochs"),
        ({"fit": {}}, "fit and train must both be given in steps"),
        ({"fit": {"steps": 2}}, "fit.rounds = 3 needs as many fit.steps at least, got 2"),
        ({"fit": {"steps": 9, "floor": 0.0}}, "fit.floor: Input should be greater than 0"),
        ({"fit": {"steps": 9, "grid": 2}}, "fit.grid: Input should be greater than or equal to 3"),
        ({"fit": {"steps": 9, "round": 2}}, "fit.round: no such field; did you mean rounds"),
        ({"blocks": {"num_blocks": 2, "noise": {"quantiles": [0.002, 80.0]}}}, "fitted levels already"),
        ({"blocks": {"num_blocks": 2, "layers": [1, 3]}}, r"blocks.layers = \(1, 3\)"),
        (
            {"model": {"type": "DiT", "config": DIT}, "evaluate": {"kind": "samples"}},
            "fit is for models with a cross-entropy at every level.*DiT is neither",
        ),
        (
            {
                "model": {"type": "MaskedTransformer", "config": MASKED},
                "evaluate": {"kind": "bits"},
                "data": {"kind": "topics", "length": 16},
            },
            "fit.equal = rise: levels of a MaskedTransformer are fitted to the bound's own.*set fit.equal to loss",
        ),
    ],
)
def test_recipes_are_refused_before_any_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(**changes)


def test_a_fit_needs_blocks_of_equal_layers(data: dict[str, ImageData], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 layers, 3 blocks"):
        run(recipe(blocks={"num_blocks": 3, "layers": None}), tmp_path, data)


# ---- beside the controls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["steps", "epochs"])
@pytest.mark.parametrize("trunk", [None, 4])
def test_every_row_has_the_same_layer_updates(field: str, trunk: int | None) -> None:
    lengths = {"steps": None} | {field: 6}
    made = recipe({field: 10}, train=lengths, trunk=None if trunk is None else {field: trunk})
    rows = variants(made)
    blocks = ["diffusionblocks", *(["diffusionblocks-branched"] if trunk else [])]
    assert [row.key for row in rows[3:]] == ["ensemble-2x2", *blocks, f"{blocks[-1]}-unfitted"]
    assert [row.key for row in rows if row.has_fit] == blocks
    updates = {}
    for row in rows:
        parts = (row.recipe.fit, row.recipe.trunk)
        extra = sum(getattr(part, field) for part in parts if part is not None)
        updates[row.key] = (extra + row.blocks * getattr(row.recipe.train, field)) * row.layers / row.blocks
    del updates["end-to-end-2"]  # the control of fewer layers at equal steps
    assert set(updates.values()) == {(10 + (trunk or 0) + 2 * 6) * 2}


def test_compare_with_and_without_the_fit(tmp_path: Path) -> None:
    made = recipe(FIT | {"steps": 6})
    shown = compare(Experiment(made), tmp_path, progress=False)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    found = {row["key"]: (row["fitted"], row["iterations"], row["layer_updates"]) for row in rows}
    assert found == {
        "end-to-end-4": (False, 6, 24),
        "end-to-end-2": (False, 6, 12),
        "end-to-end-2-x2": (False, 12, 24),
        "ensemble-2x2": (False, 12, 24),
        "diffusionblocks": (True, 12, 24),
        "diffusionblocks-unfitted": (False, 12, 24),
    }
    assert shown.count("levels fitted") == 1
    assert not (tmp_path / "diffusionblocks-unfitted" / "fit").exists()
    assert (tmp_path / "diffusionblocks" / "fit" / "levels.json").is_file()


def test_a_control_ignores_the_fit(data: dict[str, ImageData], tmp_path: Path) -> None:
    result = run(recipe(method="end-to-end"), tmp_path, data)
    assert result.iterations == 3
    assert not (tmp_path / "fit").exists()
