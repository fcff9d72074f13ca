"""Features for a Frechet distance: a small classifier that the trainer makes, and Inception by torch-fidelity."""

import importlib.util
import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from diffusionblocks.data import ImageData, digits
from diffusionblocks.evaluation.classifier import ClassifierFeatures, SmallCNN, train_classifier
from diffusionblocks.evaluation.features import Features, InceptionFeatures
from diffusionblocks.evaluation.frechet import FeatureStatistics, frechet_distance

DIGITS: dict[str, Any] = {"mean": (0.3,), "std": (0.376,), "dataset": "digits", "device": "cpu"}


@pytest.fixture(scope="module")
def train() -> ImageData:
    return digits("train")


@pytest.fixture(scope="module")
def test() -> ImageData:
    return digits("test")


@pytest.fixture(scope="module")
def classifier(train: ImageData, test: ImageData) -> ClassifierFeatures:
    return train_classifier(train, test, **DIGITS, flip=False, crop_padding=1, epochs=6, batch_size=64, width=16)


def statistics(features: Features, images: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.dim)
    for batch in images.split(200):
        result.update(features(batch))
    return result


# ---- the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "last"), [(1, 1, 1), (1, 3, 3), (1, 8, 2), (1, 28, 7), (3, 64, 16)])
def test_small_cnn_takes_any_size(channels: int, size: int, last: int) -> None:
    net = SmallCNN(channels, 7, width=4).eval()
    seen: list[torch.Size] = []
    net.stages[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    pixels = torch.randn(2, channels, size, size, generator=seeded())
    assert net(pixel_values=pixels).logits.shape == (2, 7)
    assert net.features(pixels).shape == (2, net.dim) == (2, 16)
    assert seen[0] == (2, 16, last, last)


def test_small_cnn_has_256_features_unless_told() -> None:
    assert SmallCNN(3, 10).dim == 256


def test_dropout_only_in_training() -> None:
    net = SmallCNN(1, 3, width=4, dropout=0.5)
    pixels = torch.randn(4, 1, 8, 8, generator=seeded())
    assert not torch.equal(net(pixels).logits, net(pixels).logits)
    net.eval()
    assert torch.equal(net(pixels).logits, net(pixels).logits)


@pytest.mark.parametrize("change", [{"channels": 0}, {"num_classes": 0}, {"width": 0}, {"dropout": 1.0}])
def test_small_cnn_refuses(change: dict[str, Any]) -> None:
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be"):
        SmallCNN(**({"channels": 1, "num_classes": 2} | change))


# ---- the trained classifier --------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_the_digits(classifier: ClassifierFeatures) -> None:
    assert classifier.accuracy > 0.95
    assert (classifier.name, classifier.dim, classifier.dataset) == ("classifier on digits", 64, "digits")


def test_features_are_float32_without_gradient_and_of_each_image_alone(
    classifier: ClassifierFeatures, test: ImageData
) -> None:
    features = classifier(test.images[:20])
    assert (features.dtype, features.shape, features.requires_grad) == (torch.float32, (20, 64), False)
    torch.testing.assert_close(classifier(test.images[7:9]), features[7:9])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(test.images[:20]), features)


def test_real_images_are_near_and_others_far(classifier: ClassifierFeatures, train: ImageData, test: ImageData) -> None:
    reference = statistics(classifier, train.images)
    near = frechet_distance(reference, statistics(classifier, test.images))
    noise = torch.randint(0, 256, test.images.shape, generator=seeded()).to(torch.uint8)
    far = frechet_distance(reference, statistics(classifier, noise))
    assert 0 < near < 0.02 * far

    # More noise is further away, and so are samples of half of the classes.
    def blended(part: float) -> float:
        images = ((1 - part) * test.images + part * noise).round().to(torch.uint8)
        return frechet_distance(reference, statistics(classifier, images))

    assert near < blended(0.15) < blended(0.3) < blended(0.6)
    half = frechet_distance(reference, statistics(classifier, test.images[test.labels < 5]))
    assert half > 5 * near


def test_training_depends_on_its_seed_alone(train: ImageData, test: ImageData) -> None:
    def features(seed: int, state: int) -> Tensor:
        torch.manual_seed(state)
        made = train_classifier(
            train, test, **DIGITS, flip=True, crop_padding=1, epochs=0.3, batch_size=64, width=4, seed=seed
        )
        return made(test.images[:9])

    first = features(0, 1)
    assert torch.equal(first, features(0, 2))
    assert not torch.equal(first, features(1, 1))


def test_train_and_test_must_match(train: ImageData, test: ImageData) -> None:
    more = ImageData(test.images, test.labels, (*test.class_names, "ten"))
    with pytest.raises(ValueError, match=r"of 10 classes, test .* of 11"):
        train_classifier(train, more, **DIGITS, flip=False, crop_padding=0)
    larger = ImageData(test.images.repeat(1, 1, 2, 2), test.labels, test.class_names)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) of 10 classes, test \(1, 16, 16\)"):
        train_classifier(train, larger, **DIGITS, flip=False, crop_padding=0)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), *(torch.zeros(s, dtype=torch.uint8) for s in [(2, 3, 8, 8), (2, 1, 9, 8), (1, 8, 8)])],
)
def test_other_images_are_refused(classifier: ClassifierFeatures, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(n, 1, 8, 8\)"):
        classifier(images)


def test_another_device_is_refused(classifier: ClassifierFeatures) -> None:
    with pytest.raises(ValueError, match="images are on meta, the classifier on cpu"):
        classifier(torch.zeros(2, 1, 8, 8, dtype=torch.uint8, device="meta"))


# ---- saved and loaded --------------------------------------------------------------------------------------


def test_a_saved_classifier_gives_the_same_bits(
    classifier: ClassifierFeatures, test: ImageData, tmp_path: Path
) -> None:
    for _ in range(2):  # the second one replaces the first
        classifier.save(tmp_path / "c")
        (tmp_path / "c" / "notes.txt").write_text("kept")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    names = ["classifier.json", "classifier.safetensors", "notes.txt"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == names
    loaded = ClassifierFeatures.load(tmp_path / "c")
    assert torch.equal(loaded(test.images), classifier(test.images))
    for name in ("name", "dim", "dataset", "image_shape", "accuracy"):
        assert getattr(loaded, name) == getattr(classifier, name)
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_nothing_half_written_is_left(
    classifier: ClassifierFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "accuracy", object())  # JSON cannot hold it
    with pytest.raises(TypeError):
        classifier.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_classifier_is_named(classifier: ClassifierFeatures, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(FileNotFoundError, match=r"classifier\.json is missing"):
        ClassifierFeatures.load(folder)
    classifier.save(folder)
    index = folder / "classifier.json"
    good = json.loads(index.read_text())

    def load_with(**changes: object) -> None:
        index.write_text(json.dumps({k: v for k, v in (good | changes).items() if v is not None}))
        ClassifierFeatures.load(folder)

    for changes, message in [
        ({"format": 9}, "format 9; this version reads format 1"),
        ({"width": None}, "KeyError: 'width'"),
        ({"width": "wide"}, "does not describe a classifier"),
        ({"image_shape": 3}, "does not describe a classifier"),
        ({"std": [0.0]}, "std"),
        ({"width": 8}, r"classifier\.safetensors does not match"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_with(**changes)
    load_with()
    (folder / "classifier.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="damaged or not safetensors"):
        load_with()
    (folder / "classifier.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors is missing"):
        load_with()


# ---- Inception ---------------------------------------------------------------------------------------------

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"


@pytest.fixture(scope="module")
def inception_module() -> Iterator[types.ModuleType]:
    """torch-fidelity's module, also where torchvision, which its other networks need, is not installed."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torch-fidelity is not installed: pip install 'diffusionblocks[fid]'")
    before = {name for name in sys.modules if name.startswith("torch_fidelity")}
    if "torch_fidelity" not in before and importlib.util.find_spec("torchvision") is None:
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    yield importlib.import_module(INCEPTION)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        if name not in before:
            del sys.modules[name]


@pytest.fixture(scope="module")
def weights(inception_module: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the file format of the real ones."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = inception_module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys(inception_module: types.ModuleType, weights: Path) -> None:
    features = InceptionFeatures(weights=weights)
    assert (features.name, features.dim) == ("Inception", 2048)
    grey = torch.randint(0, 256, (2, 1, 8, 8), generator=seeded()).to(torch.uint8)
    made = features(grey)
    assert (made.dtype, made.shape, made.requires_grad) == (torch.float32, (2, 2048), False)
    assert not torch.allclose(made[0], made[1], rtol=1e-3)
    original = inception_module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    assert torch.equal(made, original(grey.repeat(1, 3, 1, 1))[0])
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.uint8), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"must be uint8 \(n, 1 or 3, H, W\)"):
            features(bad)
    with pytest.raises(ValueError, match="images are on meta, the network on cpu"):
        features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta"))


@pytest.mark.usefixtures("inception_module")
def test_inception_weights_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights\.pth is missing"):
        InceptionFeatures(weights=path)
    path.write_bytes(b"not a network")
    with pytest.raises(ValueError, match="damaged, or not a PyTorch file"):
        InceptionFeatures(weights=path)
    path.write_bytes(pickle.dumps(print, protocol=2))  # code, which must not run
    with pytest.raises(ValueError, match="not a PyTorch file of plain tensors"):
        InceptionFeatures(weights=path)
    for other in ({"some": torch.zeros(1)}, [torch.zeros(1)]):
        torch.save(other, path)
        with pytest.raises(ValueError, match="does not match the Inception network"):
            InceptionFeatures(weights=path)


def test_inception_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_fidelity", INCEPTION):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'diffusionblocks\[fid\]'"):
        InceptionFeatures()
