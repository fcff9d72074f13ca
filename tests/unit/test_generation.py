"""Measuring samples: against a denoiser whose samples are known in closed form, and against replayed images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGE, NUM_LABELS, fresh_dit
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.data import digits
from diffusionblocks.evaluation.accuracy import AccuracyRow
from diffusionblocks.evaluation.classifier import train_classifier
from diffusionblocks.evaluation.frechet import FeatureStatistics, frechet_distance
from diffusionblocks.evaluation.image_quality import ImageMeasures, Reference
from diffusionblocks.evaluation.sample_quality import SampleRow, Setting, measure_samples, sample_batches, statistics
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.tasks import TASKS, SamplesConfig
from diffusionblocks.experiments.tasks.image_features import features_of
from diffusionblocks.sampling import prior_of_seeds

SIZE = 3 * IMAGE * IMAGE
DIM = 6
RECIPE = Path(__file__).parents[2] / "recipes" / "dit" / "digits.yaml"


class Projection:
    """Features that are Gaussian where the images are: their products with a few orthonormal directions."""

    name = "projection"
    dim = DIM

    def __init__(self) -> None:
        random = torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(0))
        self.directions = torch.linalg.qr(random).Q
        self.digest = "projection"
        self.seen: list[torch.dtype] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images.dtype)
        return images.flatten(1).float() @ self.directions

    def logits(self, features: Tensor) -> None:
        """There is no head."""


def exact_denoiser(**overrides: Any) -> db.DiffusionBlocks:
    """A fresh DiT has a zero head, so D = c_skip * z: the exact denoiser of data N(0, sigma_data^2)."""
    return db.convert(fresh_dit(**overrides), db.BlocksConfig(num_blocks=3)).eval()


def gaussian(std: float, count: int = 200_000) -> FeatureStatistics:
    """Statistics of features N(0, std^2), drawn and whitened: exact up to rounding."""
    random = torch.randn(count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    random -= random.mean(0)
    random = random @ torch.linalg.inv(torch.linalg.cholesky(random.T.cov())).T
    found = FeatureStatistics(DIM)
    found.update(random * std)
    return found


def keep(samples: Tensor) -> Tensor:
    return samples


def measure(model: db.DiffusionBlocks, *settings: Setting, **changes: Any) -> list[SampleRow]:
    options: dict[str, Any] = {"samples": 600, "batch_size": 200, "pixels": keep}
    options |= {"features": Projection(), "references": {"train": gaussian(0.5), "test": gaussian(0.7)}} | changes
    features, references = options.pop("features"), options.pop("references")
    real = {split: Reference(found) for split, found in references.items()}
    return measure_samples(model, settings, measures=features and ImageMeasures(features, real), **options)


# ---- the Frechet distance of known samples --------------------------------------------------------------------


def chain_std(model: db.DiffusionBlocks, setting: Setting) -> float:
    """Standard deviation of the exact denoiser's samples: each step multiplies z by a number."""

    def slope(z: float, level: float) -> float:
        return z * level / (model.noise.sigma_data**2 + level**2)

    levels = model.noise.sampling_levels(setting.steps, setting.grid)
    std = levels[0]
    for level, lower in itertools.pairwise(levels):
        euler = std + (lower - level) * slope(std, level)
        correct = setting.solver == "heun" and lower > 0
        std = std + (lower - level) * (slope(std, level) + slope(euler, lower)) / 2 if correct else euler
    return std


@pytest.mark.each_value
@pytest.mark.parametrize("grid", ["karras", "equal-quantile"])
@pytest.mark.parametrize(("solver", "steps"), [("euler", 4), ("euler", 12), ("heun", 12)])
def test_the_distance_is_that_of_the_two_gaussians(solver: str, steps: int, grid: str) -> None:
    model, setting = exact_denoiser(), Setting(solver, steps, grid)
    (row,) = measure(model, setting, samples=500, batch_size=200)
    std = chain_std(model, setting)
    # Exactly: every chain is its start times a number.
    starts = prior_of_seeds(model.noise, (3, IMAGE, IMAGE), range(500))
    found = statistics(Projection(), [starts * (std / model.noise.level_max)])
    for measured, real in ((row.fd_train, 0.5), (row.fd_test, 0.7)):
        assert measured == pytest.approx(frechet_distance(found, gaussian(real)), rel=1e-3)
        # Nearly: the starts are a finite draw.
        assert measured == pytest.approx(DIM * (std - real) ** 2, rel=0.2, abs=0.03)


@pytest.mark.slow
def test_a_better_solver_is_nearer() -> None:
    """The samples of the exact denoiser come near the data as the chain is solved better."""
    rough, many, heun = measure(exact_denoiser(), Setting("euler", 6), Setting("euler", 60), Setting("heun", 24))
    assert rough.fd_train > 4 * many.fd_train  # type: ignore[operator]
    assert many.fd_train < 0.02  # type: ignore[operator]
    assert heun.fd_train < 0.02  # type: ignore[operator]
    assert heun.calls < many.calls


class Replay:
    """Takes the place of `DiffusionBlocks.sample`, and notes what it was asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.labels: list[list[int] | None] = []
        self.seeds: list[list[int]] = []
        self.settings: list[dict[str, Any]] = []

    def __call__(self, labels: Tensor | None, *, seeds: list[int], **setting: Any) -> Tensor:
        self.labels.append(None if labels is None else labels.tolist())
        self.seeds.append(list(seeds))
        self.settings.append(setting)
        return self.images[list(seeds)]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> tuple[db.DiffusionBlocks, Replay]:
    model = exact_denoiser()
    images = torch.randn(40, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    replay = Replay(images)
    monkeypatch.setattr(model, "sample", replay)
    return model, replay


def test_a_model_that_repeats_the_training_images_is_at_distance_zero(
    replay: tuple[db.DiffusionBlocks, Replay],
) -> None:
    model, source = replay
    features = Projection()
    references = {
        "train": statistics(features, source.images.split(13)),
        "test": statistics(features, (source.images + 1).split(9)),
    }
    (row,) = measure(model, Setting(), samples=40, batch_size=7, features=features, references=references)
    assert row.fd_train == pytest.approx(0, abs=1e-9)
    # Moved by 1 in every pixel: nothing but the means differs.
    shift = (torch.ones(1, SIZE) @ features.directions).square().sum().item()
    assert row.fd_test == pytest.approx(shift, rel=1e-5)


# ---- labels, seeds, settings, batches -------------------------------------------------------------------------


def test_labels_take_turns_and_seeds_count_up(replay: tuple[db.DiffusionBlocks, Replay]) -> None:
    model, source = replay
    setting = Setting("heun", 3, "equal-quantile", 2.0, guidance_interval=(0.1, 2.0), churn=3.0)
    batches = list(sample_batches(model, 10, setting, batch_size=4, seed=5))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert source.seeds == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]
    assert NUM_LABELS == 4
    assert source.labels == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]
    assert source.settings == 3 * [dataclasses.asdict(setting)]


def test_an_unconditional_model_gets_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_denoiser(num_classes=0)
    source = Replay(torch.zeros(40, 3, IMAGE, IMAGE))
    monkeypatch.setattr(model, "sample", source)
    assert len(list(sample_batches(model, 5, Setting(), batch_size=3))) == 2
    assert source.labels == [None, None]


@pytest.mark.slow
def test_another_seed_gives_other_samples_of_the_same_kind() -> None:
    model = exact_denoiser()
    (a,), (again,), (b,) = (measure(model, Setting("euler", 30), seed=seed) for seed in (0, 0, 10_000))
    assert a.fd_train == again.fd_train
    assert a.fd_train != b.fd_train
    assert a.fd_test == pytest.approx(b.fd_test, rel=0.2)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = exact_denoiser()
    (one,) = measure(model, Setting("euler", 4), samples=64, batch_size=batch_size)
    (whole,) = measure(model, Setting("euler", 4), samples=64, batch_size=16)
    assert one.fd_train == pytest.approx(whole.fd_train, rel=1e-5)
    assert one.samples == whole.samples == 64
    assert one.images_per_second > 0


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(("solver", "expected"), [("euler", 5), ("heun", 9), ("dpmpp-2m", 5)])
def test_calls_are_the_networks_calls(solver: str, expected: int, guidance: float) -> None:
    model, made = exact_denoiser(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: made.append(len(arguments[1])))
    setting = Setting(solver, 5, guidance=guidance)
    list(sample_batches(model, 2, setting, batch_size=2))
    assert setting.calls == len(made) == expected
    assert set(made) == {2 if guidance == 1 else 4}, "guidance runs each call on twice the images"


@pytest.mark.parametrize(
    "setting",
    [
        Setting("euler", 9),
        Setting("heun", 9, guidance=2.0),
        Setting("unipc", 9, guidance=2.0, guidance_interval=(0.1, 5.0)),
        Setting("heun", 9, guidance=0.0, guidance_interval=(0.1, 5.0), churn=9.0, churn_interval=(0.2, 10.0)),
    ],
)
def test_evaluations_are_the_images_that_the_network_saw(setting: Setting) -> None:
    model, made = exact_denoiser(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: made.append(len(arguments[1])))
    (row,) = measure(model, setting, samples=2, batch_size=2, features=None, references={})
    assert row.evaluations == sum(made) / 2
    assert row.calls == len(made)
    assert (setting.guidance_interval is None) == (row.evaluations in (row.calls, 2 * row.calls))


def test_the_features_see_what_would_be_saved() -> None:
    features = Projection()
    measure(exact_denoiser(), Setting("euler", 2), samples=10, batch_size=4, features=features, pixels=Tensor.byte)
    assert features.seen == [torch.uint8] * 3


def test_without_features_only_speed_is_measured() -> None:
    def unused(samples: Tensor) -> Tensor:
        raise AssertionError("pixels nobody looks at")

    (row,) = measure(exact_denoiser(), Setting("euler", 2), features=None, references={}, pixels=unused, samples=10)
    assert (row.features, row.fd_train, row.fd_test) == (None, None, None)
    assert row.images_per_second > 0


def test_a_row_says_how_it_was_made() -> None:
    settings = [Setting("euler", 2), Setting("heun", 3, "equal-quantile", 1.5)]
    rows = [row.to_dict() for row in measure(exact_denoiser(), *settings, samples=20, batch_size=10)]
    assert {"solver": "heun", "steps": 3, "grid": "equal-quantile", "guidance": 1.5, "calls": 5}.items() <= rows[
        1
    ].items()
    assert {"solver": "euler", "samples": 20, "features": "projection"}.items() <= rows[0].items()
    assert all(math.isfinite(row["images_per_second"]) for row in rows)
    assert not {"churn", "guidance_interval"} & {*rows[0], *rows[1]}, "what is not used has no column"
    setting = Setting("heun", 3, guidance=2.0, guidance_interval=(0.1, 9.0), churn=2.0)
    (used,) = (row.to_dict() for row in measure(exact_denoiser(), setting, samples=20, batch_size=10))
    assert {"churn": 2.0, "guidance_interval": (0.1, 9.0), "evaluations": 7}.items() <= used.items()


# ---- the recipe's part ------------------------------------------------------------------------------------------


def test_settings_are_all_combinations_the_first_of_each_first() -> None:
    options = SamplesConfig(kind="samples", solver=("heun", "euler"), steps=(5, 9), guidance=(1.0, 2.0))
    found = options.settings
    assert len(found) == 8
    assert found[:2] == [Setting("heun", 5, "karras", 1.0), Setting("heun", 5, "karras", 2.0)]
    assert found[-1] == Setting("euler", 9, "karras", 2.0)


def test_settings_of_intervals_and_churn() -> None:
    options = SamplesConfig.model_validate(
        {"solver": ["heun"], "guidance": [1, 2], "guidance_interval": [[0.1, 2], None], "churn": [0, 9]}
        | {"churn_interval": [0.05, 50], "churn_noise": 1.003}
    )
    heun = functools.partial(Setting, "heun", 50, "karras")
    fresh = {"churn": 9.0, "churn_interval": (0.05, 50.0), "churn_noise": 1.003}
    assert options.settings == [
        heun(1.0),
        heun(1.0, **fresh),
        heun(2.0, (0.1, 2.0)),
        heun(2.0, (0.1, 2.0), **fresh),
        heun(2.0),
        heun(2.0, **fresh),
    ]
    one = SamplesConfig.model_validate({"guidance_interval": [0.1, 2]})
    assert one.guidance_interval == ((0.1, 2.0),)
    for interval in ([2, 1], [-1, 2], [[1, 2, 3]], []):
        with pytest.raises(ValueError, match="guidance_interval"):
            SamplesConfig.model_validate({"guidance_interval": interval})


@pytest.mark.slow
def test_the_headline_is_the_first_setting_whatever_the_distances() -> None:
    rows = measure(exact_denoiser(), Setting("euler", 3), Setting("heun", 20))
    assert rows[1].fd_test < rows[0].fd_test or rows[1].fd_train < rows[0].fd_train  # type: ignore[operator]
    assert TASKS["samples"].headline(rows) is rows[0]


@pytest.mark.parametrize(("rules", "headline"), [(("chain",), 2), (("mean",), 1), (("chain", "product", "mean"), 9)])
def test_the_headline_of_accuracies_is_of_the_default_rule(rules: tuple[str, ...], headline: int) -> None:
    """Of chains the most seeds and the fewest steps, else the other way round: fixed, whatever the accuracies."""
    rows = [
        AccuracyRow(combine, steps, seeds, accuracy, standard_error=0.0, nll=1.0, ece=0.0)
        for combine in rules
        for steps, seeds, accuracy in ((1, 1, 0.9), (3, 1, 0.45), (1, 8, 0.5), (3, 8, 0.95))
    ]
    assert TASKS["accuracy"].headline(rows) is rows[headline]


@pytest.mark.parametrize("limit", [None, 250])
def test_real_images_are_measured_whole(limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe compares with: the images of each split, all or evenly spread ones, through the features."""
    train, test = digits("train"), digits("test")
    options: dict[str, Any] = {"mean": [0.3], "std": [0.4], "device": "cpu", "flip": False, "crop_padding": 1}
    kept = train_classifier(train, test, dataset="digits", epochs=1, width=2, **options)
    kept.save(tmp_path / "features")
    changes = [
        f"evaluate.features_folder={tmp_path / 'features'}",
        "evaluate.batch_size=100",
        f"evaluate.reference_images={limit or 'null'}",
        "model.config.hidden_size=16",
        "device=cpu",
    ]
    recipe = load_recipe(RECIPE, changes)
    given: dict[str, Any] = {}
    function = "diffusionblocks.evaluation.sample_quality.measure_samples"
    monkeypatch.setattr(function, lambda model, settings, **rest: given.update(rest) or [])
    model = db.convert(fresh_dit(sample_size=8, in_channels=1, num_classes=10), recipe.blocks)
    assert recipe.task.measure(Experiment(recipe), model) == []
    measures = given["measures"]
    assert measures.features.name == "classifier on digits"
    assert set(measures.references) == {"train", "test"}
    for split, data in (("train", train), ("test", test)):
        found, direct = (
            measures.references[split].statistics,
            kept(data.part(limit or len(data)).images).double().numpy(),
        )
        assert found.count == (limit or len(data))
        np.testing.assert_allclose(found.mean.numpy(), direct.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.covariance.numpy(), np.cov(direct.T), rtol=1e-4, atol=1e-8)
    # Samples become pixels by the data's own mean and deviation.
    assert torch.equal(
        given["pixels"](torch.full((1, 1, 8, 8), -0.305 / 0.75)), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [(8, 32), (16, 64)])
def test_small_images_get_a_small_classifier_and_few_images_a_small_batch(
    size: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = digits("train")
    few = type(train)(
        images=train.images[:20].repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3),
        labels=train.labels[:20],
        class_names=train.class_names,
    )
    recipe = load_recipe(RECIPE, [f"evaluate.features_folder={tmp_path / 'features'}", "device=cpu"])
    assert isinstance(recipe.evaluate, SamplesConfig)
    made = features_of(Experiment(recipe, {"train": few, "test": few}))
    assert made.dim == 4 * width
    again = features_of(Experiment(recipe, {"train": few, "test": few}))
    assert torch.equal(made(few.images), again(few.images)), "the kept one"
