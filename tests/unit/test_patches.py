"""Convolutions of patches as matrix products: the same function under the same names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusionblocks.training.patches import multiply_patches


@pytest.mark.parametrize("size", [(28, 28), (29, 41)])
@pytest.mark.parametrize(("kernel", "bias"), [(14, True), ((7, 4), False), (4, True)])
def test_the_product_is_the_convolution(size: tuple[int, int], kernel: int | tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, kernel, stride=kernel, bias=bias).double()
    product = copy.deepcopy(conv)
    multiply_patches(product)
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = (
        (*torch.autograd.grad((out := module(images)).square().sum(), [images, *module.parameters()]), out)
        for module in (product, conv)
    )
    torch.testing.assert_close(found, expected)
    assert type(product) is not type(conv)  # it did compute another way
    assert product.state_dict().keys() == conv.state_dict().keys()


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 2, stride=2, padding=1), nn.Conv2d(4, 4, 2, stride=2, groups=2)],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    multiply_patches(conv)
    assert type(conv) is nn.Conv2d
