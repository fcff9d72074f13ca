"""Pictures of a model that trains: training is not changed by them, and they are what the saved model draws."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_DIT, few_digits, run_like_torchrun, seeded, vit_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.data import AugmentConfig, ImageBatches, ImageData
from diffusionblocks.experiments import run
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import has_parts
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.run_folder import read_run
from diffusionblocks.reports.pictures import readable_scale, save_grid
from diffusionblocks.training import TrainConfig, Trainer
from diffusionblocks.training.checkpoint import checkpoints
from diffusionblocks.training.ranks import Place, Ranks
from diffusionblocks.training.run_log import PictureLogger

DIGITS = Path(__file__).parents[2] / "recipes" / "dit" / "digits.yaml"
TINY: dict[str, Any] = {
    **TINY_DIT,
    "trunk": "null",
    "train.steps": 4,
    "train.log_every": 3,
    "evaluate.steps": "[5]",
    "evaluate.solver": "[euler]",
    "evaluate.guidance": "[1.0]",
    "evaluate.grid_images": 4,
    "evaluate.batch_size": 3,
}
ONE_AFTER_ANOTHER = {"train.schedule": "sequential"}


def recipe(changes: dict[str, Any] | None = None) -> Recipe:
    return load_recipe(DIGITS, [f"{name}={value}" for name, value in (TINY | (changes or {})).items()])


def experiment(changes: dict[str, Any] | None = None) -> Experiment:
    return Experiment(recipe(changes), {"train": few_digits(), "test": few_digits()})


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimizer state."""
    trainer.residency.flush()
    values = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for owner, group in trainer.sets.items():
        values |= {f"{owner}.{name}": tensor.clone() for name, tensor in group.state().items()}
    return values


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("samples/*.png"))}


# ---- training is not changed, and goes on exactly ------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"train.accumulation": 2},
        {"train.resident": "active", "train.offload": "disk", "blocks.shared": "joint", "train.ema_half_life": 30},
    ],
)
def test_a_run_with_pictures_is_bit_equal_and_resumes_with_the_same_ones(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = experiment(changes).trainer(tmp_path / "plain", progress=False)
    plain.train()
    random = torch.get_rng_state()
    drawn = experiment(changes | {"train.sample_every": 4}).trainer(tmp_path / "drawn", progress=False)
    drawn.train()
    assert torch.equal(torch.get_rng_state(), random)
    assert same(everything(plain), everything(drawn))
    first = pictures(tmp_path / "drawn")
    assert [*first] == ["step-000000004.png", "step-000000008.png", "step-000000012.png"]
    assert len({*first.values()}) == 3
    part = experiment(changes).trainer(tmp_path / "resumed", progress=False)  # pictures may be asked for later
    part.train(until=3)
    again = experiment(changes | {"train.sample_every": 4}).trainer(tmp_path / "resumed", progress=False)
    again.train()
    assert same(everything(plain), everything(again))
    assert pictures(tmp_path / "resumed") == first


def test_a_picture_is_what_the_saved_model_draws(tmp_path: Path) -> None:
    changes = {"train.sample_every": 12, "train.snapshot_every": 12, "train.ema_half_life": 30}
    of = experiment(changes | {"evaluate.guidance": "[2.0]", "evaluate.batch_size": 4})
    of.trainer(tmp_path, progress=False).train()
    options: Any = of.recipe.evaluate
    model = db.load(tmp_path / "snapshots" / "iteration-000000012")
    images = model.sample([0, 1, 2, 3], seeds=[options.seed + i for i in range(4)], steps=5, guidance=2.0)
    expected = of.recipe.data.to_pixels(torch.device("cpu"))(images)  # type: ignore[attr-defined]
    save_grid(expected, tmp_path / "expected.png", 10, scale=readable_scale(expected))
    assert (tmp_path / "samples" / "step-000000012.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


# ---- blocks that have learned nothing yet --------------------------------------------------------------------


def test_one_after_another_the_chain_ends_with_the_blocks_that_have_stepped(tmp_path: Path) -> None:
    """Its last D; and with all blocks at the end, or from the start where they branch from a trunk."""
    calls: list[int | None] = []

    def watched(of: Experiment, folder: Path) -> list[int | None]:
        calls.clear()
        real = type(of.task).draw_in_training

        def note(self: Any, *args: Any, last_block: int | None) -> None:
            calls.append(last_block)
            real(self, *args, last_block=last_block)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(of.task), "draw_in_training", note)
            run.train(of, folder, progress=False, measure=False)
        return [*calls]

    fresh = experiment(ONE_AFTER_ANOTHER | {"train.sample_every": 2})
    assert watched(fresh, tmp_path / "fresh") == [0, 0, 1, 1, None, None]
    shown = [path.name for path in read_run(tmp_path / "fresh", "fresh").pictures]
    assert shown == [f"step-{iteration:09d}.png" for iteration in (6, 8, 10, 12)], "a report has the newest"
    of_trunk = experiment(ONE_AFTER_ANOTHER | {"train.sample_every": 4, "trunk": "{steps: 4}"})
    assert watched(of_trunk, tmp_path / "branched") == [None] * 4
    assert [*pictures(tmp_path / "branched" / "trunk")] == ["step-000000004.png"]


def test_the_last_block_gives_its_last_d() -> None:
    model = Experiment.blocks_of(experiment().build())
    seen: list[tuple[float, Tensor]] = []

    def watch(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        seen.append((level, denoised.clone()))

    whole = model.sample([3, 4], seeds=[1, 2], steps=8, callback=watch)
    owners = [model.partition.block_of(level) for level, _ in seen]
    for block in range(2):
        expected = [denoised for owner, (_, denoised) in zip(owners, seen, strict=True) if owner <= block][-1]
        images = model.sampler().sample([3, 4], seeds=[1, 2], steps=8, last_block=block)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(images, whole, atol=1e-3)
    assert torch.equal(model.sampler().sample([3, 4], seeds=[1, 2], steps=8, last_block=2), whole)


def test_without_a_step_of_block_0_there_is_no_picture(tmp_path: Path) -> None:
    changes = {"train.sample_every": 1, "train.schedule": "round-robin", "train.steps": 1}
    experiment(changes).trainer(tmp_path, progress=False).train()
    assert len(pictures(tmp_path)) == 3
    trainer = experiment(changes).trainer(tmp_path / "second", progress=False)
    trainer.schedule = trainer.schedule[::-1].copy()  # block 0 last
    trainer.train()
    assert [*pictures(tmp_path / "second")] == ["step-000000003.png"]


# ---- who receives them ---------------------------------------------------------------------------------------


class Plain:
    """A logger of records alone."""

    def log(self, record: dict[str, Any]) -> None:
        """Not kept."""

    def close(self) -> None:
        """Nothing to release."""


class WithPictures(Plain):
    """A logger of pictures."""

    def __init__(self) -> None:
        self.received: list[tuple[str, int]] = []

    def picture(self, path: Path, iteration: int) -> None:
        """Note it."""
        self.received.append((path.name, iteration))


def test_loggers_receive_pictures_where_they_take_them(tmp_path: Path) -> None:
    watch = WithPictures()
    assert not isinstance(Plain(), PictureLogger)
    of = experiment({"train.sample_every": 6})
    of.trainer(tmp_path, progress=False, loggers=(Plain(), watch)).train()
    assert watch.received == [("step-000000006.png", 6), ("step-000000012.png", 12)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive")
def test_of_ranks_that_train_one_unit_the_first_draws(tmp_path: Path) -> None:
    """Whether each of them has it whole or a share; and training goes on as without pictures."""
    changes = {"blocks.num_blocks": 1, "train.steps": 3}

    def command(rank: int) -> int:
        place = Place.from_environment()
        assert place is not None
        ranks = Ranks(place, 30)
        with ranks.failing_together():
            for shard in (False, True):
                group = ranks.groups(torch.device("cpu"), 1, shard=shard)
                for name, every in (("plain", {}), ("drawn", {"train.sample_every": 2})):
                    of, folder = experiment(changes | every), tmp_path / f"{name}-{shard}"
                    of.trainer(folder, progress=False, group=group).train()
        return 0

    importlib.import_module("torch.distributed.fsdp")  # once, not in each process
    few_digits()
    run_like_torchrun(command, tmp_path, ranks=2)
    for shard in (False, True):
        plain, drawn = (
            load_file(checkpoints(tmp_path / f"{name}-{shard}" / "checkpoints")[-1] / "block-0.safetensors")
            for name in ("plain", "drawn")
        )
        assert same(plain, drawn)
        assert [*pictures(tmp_path / f"drawn-{shard}")] == ["step-000000002.png"]


# ---- refused -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"train.sample_every = 2 draws diffusion models of images, and ViT"):
        vit_recipe({}, {}, {"train": {"steps": 2, "sample_every": 2}})
    with pytest.raises(
        ValueError, match=r"train.blocks = \[1\] trains some without the others: set train.sample_every"
    ):
        recipe({"train.sample_every": 2, "train.blocks": "[1]"})
    with pytest.raises(ValueError, match=r"blocks that train apart have no others: set train.sample_every to null"):
        has_parts(experiment({"train.sample_every": 2}))
    has_parts(experiment())


def test_the_cost_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = experiment({"train.sample_every": 10})
    of.trainer(tmp_path)
    assert "a picture of 4 images of 5 network calls, about 8% of the training's work" in capsys.readouterr().err


# ---- a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes", [{"cuda_graph": True}, {"resident": "active"}, {"resident": "active", "compile": True}]
)
def test_graphs_and_residency_on_a_gpu_are_not_disturbed(changes: dict[str, Any]) -> None:
    device = torch.device("cuda")

    def trained(draw: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: nn.Module = experiment().build()
        data = ImageData(
            torch.randint(0, 256, (40, 1, 8, 8), generator=seeded(), dtype=torch.uint8),
            torch.arange(40) % 10,
            tuple("0123456789"),
        )
        batches = ImageBatches(data, mean=(0.5,), std=(0.5,), augment=AugmentConfig(), device=device)
        config = TrainConfig(steps=8, batch_size=8, sample_every=4, **changes)
        trainer = Trainer(model, batches, config, device=device, progress=False, draw=draw)
        trainer.train()
        return everything(trainer)

    drawn: list[Tensor] = []

    def draw(model: db.DiffusionBlocks, iteration: int, with_steps: Any) -> None:
        drawn.append(model.sampler().sample([1, 2], seeds=[0, 1], steps=6).cpu())

    assert same(trained(None), trained(draw))
    assert len(drawn) == 6
    assert all(bool(images.isfinite().all()) for images in drawn)
