"""Measures of a set of images: each is there, of the right set; features of real images are computed once and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.data import ImageData, digits
from diffusionblocks.evaluation.classifier import ClassifierFeatures, SmallCNN
from diffusionblocks.evaluation.frechet import frechet_distance
from diffusionblocks.evaluation.image_quality import ImageMeasures, Quality, Reference, distance_name
from diffusionblocks.evaluation.neighbours import RealNeighbours
from diffusionblocks.evaluation.real_features import kept_reference, order_of_rows, reference
from diffusionblocks.evaluation.sample_quality import best_of, statistics
from diffusionblocks.experiments.tasks.image_features import has_imagenet_labels
from diffusionblocks.reports.image_tables import distance_columns, distances_by_calls, quality_columns


class Corner:
    """Features that are the first pixels, with a head that says the class of the first of them."""

    name = "corner"
    dim = 4
    digest = "corner 1"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.flatten(1)[:, : self.dim].float()

    def logits(self, features: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(features[:, 0].long() % 4, 4) * 1e3


def random_images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 2, 3), generator=seeded(seed)).to(torch.uint8)


def by_number(images: Tensor) -> Callable[[range], Tensor]:
    return lambda numbers: images[numbers.start : numbers.stop]


def of(images: Tensor) -> Reference:
    return reference(Corner(), by_number(images), len(images), batch_size=7)


# ---- measures --------------------------------------------------------------------------------------------------


def test_each_measure_is_of_its_set() -> None:
    features = Corner()
    train, test, generated = (random_images(n, seed) for n, seed in ((90, 0), (50, 1), (70, 2)))
    measures = ImageMeasures(features, {"train": of(train), "test": of(test)}, lambda images, own: features.logits(own))
    measuring = measures.start(70)
    labels = generated.flatten(1)[:, 0].long() % 4
    labels[:7] += 1  # a tenth is wrong
    for images, of_them in zip(generated.split(20), labels.split(20), strict=True):
        measuring.add(measures.results_of(images), of_them % 4)
    quality = measuring.quality()
    x, y, z = (features(images) for images in (generated, train, test))
    assert quality.samples == quality.neighbours == 70
    assert quality.fd_train == pytest.approx(frechet_distance(*(statistics(features, [i]) for i in (generated, train))))
    assert quality.fd_test == pytest.approx(frechet_distance(*(statistics(features, [i]) for i in (generated, test))))
    assert quality.fd_train_infinity is not None
    assert quality.fd_train_infinity < quality.fd_train
    expected = RealNeighbours(y[order_of_rows(90)][:70]).measure(x)
    assert {name: getattr(quality, name) for name in vars(expected)} == vars(expected)
    assert quality.class_accuracy == pytest.approx(0.9)
    shares = torch.bincount(x[:, 0].long() % 4) / 70
    assert quality.inception_score_analogue == pytest.approx((-(shares * shares.log()).sum()).exp().item())
    real = measures.real
    assert real is not None
    assert (real.samples, real.neighbours, real.fd_test) == (50, 50, None)
    assert real.fd_train == pytest.approx(frechet_distance(*(statistics(features, [i]) for i in (test, train))))
    assert real.precision == RealNeighbours(y[order_of_rows(90)][:50]).measure(z[order_of_rows(50)]).precision


def test_what_cannot_be_measured_is_none() -> None:
    """Three images have no neighbours, and too few for a line; distances alone need no rows."""
    features = Corner()
    train = Reference(statistics(features, [random_images(90, 0)]))
    for references, count in (({"train": of(random_images(90, 0))}, 3), ({"train": train}, 70)):
        measures = ImageMeasures(features, references)
        measuring = measures.start(count)
        with pytest.warns(UserWarning, match="singular") if count == 3 else _nothing():
            measuring.add(measures.results_of(random_images(count, 1)))
            quality = measuring.quality()
        assert quality.fd_train is not None
        assert (quality.precision, quality.neighbours, quality.fd_test, quality.class_accuracy) == (None,) * 4
        assert (quality.fd_train_infinity is None) == (count == 3)
        assert measures.real is None


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_only_inceptions_distance_is_called_fid() -> None:
    names = [distance_name(name) for name in ("Inception", "EfficientNet-Lite0", "classifier on digits", None)]
    assert names == ["FID", "FD (EfficientNet-Lite0)", "FD (classifier on digits)", "FD"]


def test_a_classifiers_head_gives_its_logits() -> None:
    network, images = SmallCNN(1, 10, width=4, dropout=0.5), digits("test").images[:30]

    def classifier(mean: float) -> ClassifierFeatures:
        shape = (1, 8, 8)
        return ClassifierFeatures(network, dataset="d", image_shape=shape, mean=[mean], std=[0.4], accuracy=0.9)

    features = classifier(0.3)
    expected = network((images / 255 - 0.3) / 0.4).logits
    torch.testing.assert_close(features.logits(features(images)), expected)
    assert features.digest == classifier(0.3).digest != classifier(0.31).digest


# ---- features of real images -------------------------------------------------------------------------------------


def test_rows_are_a_fixed_draw_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(30, 0)
    whole = of(images)
    assert whole.rows is not None
    assert torch.equal(whole.rows, Corner()(images)[order_of_rows(30)])
    assert sorted(order_of_rows(30).tolist()) == list(range(30)) != order_of_rows(30).tolist()
    monkeypatch.setattr("diffusionblocks.evaluation.real_features.MOST_NEIGHBOURS", 11)
    some = of(images)
    assert torch.equal(some.rows, whole.rows[:11])  # type: ignore[arg-type]
    assert some.statistics.count == 30


def test_real_features_are_computed_once(tmp_path: Path) -> None:
    images, features = random_images(30, 0), Corner()

    def get(identity: str = "a") -> Reference:
        options = {"folder": tmp_path / "kept", "batch_size": 8, "device": torch.device("cpu")}
        return kept_reference(features, by_number(images), 30, identity=identity, **options)  # type: ignore[arg-type]

    first = get()
    assert features.calls == 4
    again = get()
    assert features.calls == 4
    assert torch.equal(first.rows, again.rows)  # type: ignore[arg-type]
    assert torch.equal(first.statistics.covariance, again.statistics.covariance)
    get("b")
    assert features.calls == 8, "other images"
    features.digest = "corner 2"
    get()
    assert features.calls == 12, "another network"
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"x" * 40)
    assert torch.equal(get().rows, first.rows)  # type: ignore[arg-type]
    assert features.calls == 16, "a damaged file is made again"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "tench, Tinca tinca", 207: "golden retriever", 999: "toilet tissue, toilet paper"}, True),
        ({0: "n01440764", 207: "n02099601", 999: "n15075141"}, True),
        ({0: "tench", 207: "golden_retriever", 999: "bolete"}, False),
        ({}, False),
    ],
)
def test_imagenets_labels_are_known_by_their_names(names: dict[int, str], expected: bool) -> None:
    classes = tuple(names.get(i, f"c{i}") for i in range(1000))
    data = ImageData(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), classes)
    assert has_imagenet_labels(data) == expected
    assert not has_imagenet_labels(dataclasses.replace(data, class_names=classes[:10]))


# ---- tables -------------------------------------------------------------------------------------------------------


def measured(solver: str, calls: int, distance: float | None) -> dict[str, Any]:
    setting = {"solver": solver, "steps": calls, "calls": calls, "grid": "karras", "guidance": 1.0}
    quality = Quality(50, fd_train=distance, fd_test=distance, fd_train_infinity=None, precision=0.5).to_dict()
    return setting | {"features": "Inception", "images_per_second": 3.0, "fd_real": 0.25} | quality


def test_the_best_setting_is_the_nearest_and_of_equal_ones_the_quickest() -> None:
    rows = [measured("euler", 50, 2.0), measured("heun", 19, 1.0), measured("dpmpp-2m", 10, 1.0)]
    assert best_of(rows) is rows[2]
    assert best_of([measured("euler", 5, None)]) is None


def test_distance_against_calls_marks_each_rows_own_best() -> None:
    rows = {"a": [measured("euler", 50, 2.0), measured("heun", 9, 3.0)], "b": [measured("euler", 20, 0.5)]}
    lines = distances_by_calls(rows)
    assert [(line["row"], line["calls"], line["FID train"], line["best"]) for line in lines] == [
        ("a", "9", "3.000", ""),
        ("a", "50", "2.000", "*"),
        ("b", "20", "0.5000", "*"),
    ]
    assert distances_by_calls({"b": rows["b"]}) == [], "one setting is no curve"
    assert distances_by_calls({"c": [measured("euler", 5, None), measured("euler", 6, None)]}) == []


def test_number_of_images_bias_and_real_distance_stand_beside_a_distance() -> None:
    row = measured("euler", 5, 2.0)
    assert distance_columns(row) == {
        "images": "50",
        "FID train": "2.000",
        "FID test": "2.000",
        "bias": "-",
        "real": "0.2500",
    }
    assert distance_columns(row | {"fd_train_infinity": 1.5})["bias"] == "0.5000"
    assert quality_columns(row) == {"precision": "0.500"}
