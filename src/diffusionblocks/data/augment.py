"""Random image augmentation for a whole batch at once: random crop, horizontal flip and RandAugment.

Everything is integer tensor arithmetic on the images' own device, with one set of random numbers per image.
That gives three things: the same draws give the same pixels on CPU and GPU, eager and compiled; nothing
waits for the device or depends on data in Python, so the code can be compiled without graph breaks and
captured in a CUDA graph; and the pixels are those of Pillow (hence of torchvision's RandAugment on Pillow
images), up to one level where Pillow's own floating-point rounding decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.fields import MOST_PIXELS, Int

__all__ = ["RANDAUGMENT_BINS", "RANDAUGMENT_OPS", "Augment", "AugmentConfig"]

RANDAUGMENT_OPS: tuple[str, ...] = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""The 14 operations RandAugment draws from, in the order of their index (torchvision's order)."""

RANDAUGMENT_BINS = 31
"""Number of magnitude levels: a magnitude is an index 0..30 into each operation's table."""

_INDEX = {name: index for index, name in enumerate(RANDAUGMENT_OPS)}
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

# Pillow's nearest-neighbour affine transform runs in 16.16 fixed point; doing the same reproduces it exactly.
_AFFINE_BITS = 16
_AFFINE_IDENTITY = (65536, 0, 32768, 0, 65536, 32768)

# Enhancement factors (0.1 .. 1.9) as fixed point: 255 * 1.9 * 2**22 still fits in an int32. Pillow rounds the
# product to float32, which lifts values just below a whole number onto it; the bias (3e-5) does likewise.
# Over all factors and pairs of levels 0.1 % of the results then differ from Pillow's, by one level.
_BLEND_BITS = 22
_BLEND_BIAS = 128


@dataclass(frozen=True)
class AugmentConfig:
    """Which augmentations to apply, always in the order crop, flip, RandAugment.

    Attributes:
        crop_padding: Zero pixels added on every side, before a crop at a uniform position back to the original size;
            at least 0 (0: no crop).
        flip: Mirror left to right with probability one half.
        randaugment_ops: Number of RandAugment operations applied one after the other; at least 0 (0: none).
        randaugment_magnitude: Strength of every operation, 0 to 30.

    Raises:
        ValueError: a field is outside the values above; the message names field, value and allowed values.
    """

    crop_padding: Int = 0
    flip: bool = False
    randaugment_ops: Int = 0
    randaugment_magnitude: Int = 9

    def __post_init__(self) -> None:
        _check_integer("crop_padding", self.crop_padding, MOST_PIXELS)
        _check_integer("randaugment_ops", self.randaugment_ops, 100)
        _check_integer("randaugment_magnitude", self.randaugment_magnitude, RANDAUGMENT_BINS - 1)
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip = {self.flip!r}: must be true or false")


def _check_integer(name: str, value: object, most: int) -> None:
    # bool is a subclass of int, but `crop_padding: true` is surely a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name} = {value!r}: must be an integer from 0 to {most}")


class Augment:
    """Augments batches as an `AugmentConfig` says.

    The random numbers (`draw`) are separate from the work (`apply`), which is a pure function of its inputs:
    image i of the result depends on image i and row i of the draws only.

    Args:
        config: what to apply.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        magnitude = config.randaugment_magnitude

        def level(largest: float) -> float:
            # torchvision reads its tables from a float32 linspace; so does this, to get the same last bits.
            return float(torch.linspace(0.0, largest, RANDAUGMENT_BINS)[magnitude])

        self._shear = level(0.3)
        self._degrees = level(30.0)
        enhance = level(0.9)
        self._factors = tuple(round((1.0 + s * enhance) * 2**_BLEND_BITS) for s in (1, -1))
        bits = 8 - round(magnitude / ((RANDAUGMENT_BINS - 1) / 4))
        self._posterize_mask = 256 - 2 ** (8 - bits)
        # The pixels are integers, so `pixel < threshold` holds exactly when `pixel < ceil(threshold)`.
        self._solarize_threshold = math.ceil(255.0 - level(255.0))

    @property
    def num_draws(self) -> int:
        """Uniform numbers per image: crop row, crop column, flip, and (operation, sign) per slot."""
        return 3 + 2 * self.config.randaugment_ops

    def draw(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        """Draws all random numbers for n images with a single `torch.rand`.

        Args:
            n: number of images.
            device: where the result goes; must be the generator's device.
            generator: source of randomness; None takes the device's default generator.

        Returns:
            float32 (n, num_draws), uniform in [0, 1).
        """
        return torch.rand((n, self.num_draws), dtype=torch.float32, device=device, generator=generator)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augments images with the given random numbers.

        Args:
            images: uint8 (n, C, H, W), C is 1 or 3; H and W below 8,192 (fixed-point positions).
            draws: float32 (n, num_draws) in [0, 1) on the same device, from `draw`.

        Returns:
            uint8 (n, C, H, W); `images` itself when the configuration asks for nothing.

        Raises:
            ValueError: wrong dtype or shape of either argument.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)}: must be uint8 (n, C, H, W) with C = 1 or 3"
            )
        if draws.dim() != 2 or draws.shape[0] != images.shape[0] or draws.shape[1] != self.num_draws:
            raise ValueError(
                f"draws: shape {tuple(draws.shape)}: must be ({images.shape[0]}, {self.num_draws}), "
                "as returned by draw(n, ...) of the same Augment"
            )
        slots = self.config.randaugment_ops
        moves = self.config.crop_padding > 0 or self.config.flip
        if not moves and slots == 0:
            return images

        # The geometric operation of the first slot and the crop and flip before it are one gather: follow
        # each output pixel backwards through them. The map of an operation of another kind is the identity.
        columns = draws[:, :, None, None]
        grid = _grid(images)
        where = grid
        if slots:
            where = self._affine(grid, columns[:, 3], columns[:, 4], images.shape[2], images.shape[3])
        if moves:
            where = self._crop_flip(where, columns, images.shape[2], images.shape[3])
        images = _gather(images, where)
        if slots:
            images = self._colour(images, columns[:, 3], columns[:, 4])
        for slot in range(1, slots):
            op, sign = columns[:, 3 + 2 * slot], columns[:, 4 + 2 * slot]
            images = _gather(images, self._affine(grid, op, sign, images.shape[2], images.shape[3]))
            images = self._colour(images, op, sign)
        return images

    def _crop_flip(self, where: tuple[Tensor, Tensor], columns: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Maps positions (y, x) in the cropped and flipped image to positions in the original image.

        What lies outside the cropped image must stay outside: it is the geometric operation's fill, although
        the padded original may have a pixel there.
        """
        y, x = where
        p = self.config.crop_padding
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        if self.config.flip:
            x = torch.where(columns[:, 2] < 0.5, w - 1 - x, x)
        if p:
            y = y + (_uniform_integer(columns[:, 0], 2 * p + 1) - p)
            x = x + (_uniform_integer(columns[:, 1], 2 * p + 1) - p)
        return torch.where(inside, y, -1), x

    def _affine(self, grid: tuple[Tensor, Tensor], op: Tensor, sign: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Maps output positions (y, x) to source positions, int32 (n, H, W); others stay unchanged."""
        op, negative = _uniform_integer(op, len(RANDAUGMENT_OPS)), sign < 0.5
        coefficients = [torch.full_like(op, value) for value in _AFFINE_IDENTITY]
        for name in _GEOMETRIC:
            uses = op == _INDEX[name]
            plus, minus = (self._inverse_affine(name, s, h, w) for s in (1, -1))
            for i, identity in enumerate(_AFFINE_IDENTITY):
                if plus[i] != identity:
                    coefficients[i] = torch.where(uses & ~negative, plus[i], coefficients[i])
                if minus[i] != identity:
                    coefficients[i] = torch.where(uses & negative, minus[i], coefficients[i])
        y, x = grid
        a, b, c, d, e, f = coefficients
        return (d * x + e * y + f) >> _AFFINE_BITS, (a * x + b * y + c) >> _AFFINE_BITS

    def _inverse_affine(self, name: str, s: int, h: int, w: int) -> tuple[int, ...]:
        """Fixed-point (a, b, c, d, e, f) with source x = a x + b y + c and source y = d x + e y + f.

        As torchvision: shears keep the top left corner in place, rotations the centre, and translations are
        by whole pixels, rounded towards zero.
        """
        a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
        level = self.config.randaugment_magnitude / (RANDAUGMENT_BINS - 1)
        if name == "ShearX":
            b = s * self._shear
        elif name == "ShearY":
            d = s * self._shear
        elif name == "TranslateX":
            c = -float(s * int(150.0 / 331.0 * w * level + 1e-6))
        elif name == "TranslateY":
            f = -float(s * int(150.0 / 331.0 * h * level + 1e-6))
        else:
            angle = -math.radians(s * self._degrees)
            a = e = math.cos(angle)
            b, d = math.sin(angle), -math.sin(angle)
            c = w / 2 - a * w / 2 - b * h / 2
            f = h / 2 - d * w / 2 - e * h / 2
        # Positions are pixel centres, hence the half pixel added to each offset.
        values = (a, b, c + 0.5 * (a + b), d, e, f + 0.5 * (d + e))
        return tuple(math.floor(v * 2**_AFFINE_BITS + 0.5) for v in values)

    def _colour(self, images: Tensor, op: Tensor, sign: Tensor) -> Tensor:
        """Applies the drawn colour operation to each image; other operations change nothing."""
        op = _uniform_integer(op, len(RANDAUGMENT_OPS))[:, None]
        negative = (sign < 0.5)[:, None]
        x = images.to(torch.int32)

        # Enhancements move the pixels towards (factor < 1) or away from a degenerate image.
        grey = _grey(x)
        degenerate = torch.where(op == _INDEX["Color"], grey, 0)
        degenerate = torch.where(op == _INDEX["Contrast"], _rounded_mean(grey), degenerate)
        degenerate = torch.where(op == _INDEX["Sharpness"], _smooth(x), degenerate)
        factor = torch.where(negative, self._factors[1], torch.full_like(op, self._factors[0]))
        enhanced = degenerate + (((x - degenerate) * factor + _BLEND_BIAS) >> _BLEND_BITS)
        enhancing = (op >= _INDEX["Brightness"]) & (op <= _INDEX["Sharpness"])
        out = torch.where(enhancing, enhanced.clamp(0, 255), x)

        out = torch.where(op == _INDEX["Posterize"], x & self._posterize_mask, out)
        solarized = torch.where(x < self._solarize_threshold, x, 255 - x)
        out = torch.where(op == _INDEX["Solarize"], solarized, out)

        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        stretched = torch.div((x - low) * 255, (high - low).clamp(min=1), rounding_mode="trunc")
        out = torch.where((op == _INDEX["AutoContrast"]) & (high > low), stretched, out)
        out = torch.where(op == _INDEX["Equalize"], _equalize(x, high), out)
        return out.to(torch.uint8)


def _uniform_integer(u: Tensor, count: int) -> Tensor:
    """Integers 0 .. count-1 (int32) from uniform numbers in [0, 1), of the same shape."""
    # The clamp only matters if the product rounds up to `count`.
    return (u * count).to(torch.int32).clamp(max=count - 1)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row (1, H, 1) and column (1, 1, W) numbers, int32."""
    h, w = images.shape[2:]
    y = torch.arange(h, dtype=torch.int32, device=images.device)[None, :, None]
    x = torch.arange(w, dtype=torch.int32, device=images.device)[None, None, :]
    return y, x


def _gather(images: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
    """Reads uint8 images (n, C, H, W) at integer positions (y, x), each (n, H, W); 0 outside the image."""
    n, c, h, w = images.shape
    y, x = where
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = torch.where(inside, y * w + x, 0).to(torch.int64)
    index = index.expand(n, h, w).reshape(n, 1, h * w).expand(n, c, h * w)
    pixels = images.reshape(n, c, h * w).gather(2, index).view(n, c, h, w)
    return torch.where(inside[:, None], pixels, 0)


def _grey(x: Tensor) -> Tensor:
    """Luma of int32 images (n, C, H, W) as Pillow's conversion to mode L computes it: (n, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def _rounded_mean(grey: Tensor) -> Tensor:
    """Mean level of each image (n, 1, H, W), rounded half up: int32 (n, 1, 1, 1)."""
    count = grey.shape[2] * grey.shape[3]
    total = grey.sum((2, 3), keepdim=True)
    return torch.div(2 * total + count, 2 * count, rounding_mode="trunc").to(torch.int32)


def _smooth(x: Tensor) -> Tensor:
    """Pillow's SMOOTH filter, the 3x3 mean with the centre counted five times; the border is left alone."""
    h, w = x.shape[2:]
    p = torch.nn.functional.pad(x, (1, 1, 1, 1))
    rows = p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x
    # total / 13 is never halfway between two levels, so rounding it needs no tie rule.
    smooth = torch.div(2 * total + 13, 26, rounding_mode="trunc")
    y, z = (torch.arange(size, device=x.device) for size in (h, w))
    inner = ((y > 0) & (y < h - 1))[:, None] & ((z > 0) & (z < w - 1))
    return torch.where(inner, smooth, x)


def _equalize(x: Tensor, high: Tensor) -> Tensor:
    """Histogram equalisation per image and channel, as Pillow's ImageOps.equalize.

    Args:
        x: int32 (n, C, H, W), 0 to 255.
        high: its largest value per image and channel, (n, C, 1, 1).
    """
    n, c, h, w = x.shape
    flat = x.reshape(n, c, h * w).to(torch.int64)
    counts = torch.zeros((n, c, 256), dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(2, flat, torch.ones_like(flat, dtype=torch.int32))
    below = counts.cumsum(2, dtype=torch.int32) - counts
    top = counts.gather(2, high.reshape(n, c, 1).to(torch.int64))
    # step is 0 when (nearly) all pixels share the largest value: Pillow then leaves the channel as it is.
    step = torch.div(h * w - top, 255, rounding_mode="trunc")
    divisor = step.clamp(min=1)
    half = torch.div(step, 2, rounding_mode="trunc")
    table = torch.div(half + below, divisor, rounding_mode="trunc").clamp(max=255)
    equalized = table.gather(2, flat)
    return torch.where(step > 0, equalized, flat.to(torch.int32)).view(n, c, h, w)
