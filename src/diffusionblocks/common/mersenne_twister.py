"""Torch's CPU generators of many seeds side by side, on any device: the Mersenne Twister and its normal numbers.

`torch.randn` draws of a CPU generator what its seed says, the same on every machine; but one seed after another, and on
the host. Here all seeds are rows of one tensor. Numbers are those of `torch.randn(count, generator=g)` with a CPU
generator g for each seed, up to the last digits of log, cos and sin, which differ from device to device.

Matsumoto and Nishimura, "Mersenne Twister", 1998 (MT19937); torch's `aten/src/ATen/core/MT19937RNGEngine.h` and
`aten/src/ATen/native/cpu/DistributionTemplates.h` (`normal_fill`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORDS, _AHEAD = 624, 397  # words of a state; how far ahead lies what a word is mixed with
_UPPER, _LOWER, _MATRIX = 0x80000000, 0x7FFFFFFF, 0x9908B0DF

#: Fewer normal numbers than this torch draws in another way.
LEAST_NORMALS = 16


class MersenneTwister:
    """Generators of some seeds, in step with one another; each row is what its own seed gives.

    Args:
        seeds: whole numbers >= 0; as in torch, the lowest 32 bits count.
        device: where the numbers are made.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        states = torch.from_numpy(_initial_states(seeds)).to(device)
        self._state = states.long() & 0xFFFFFFFF
        self._left = self._state[:, :0]  # words that were made and not yet taken

    def normals(self, count: int) -> Tensor:
        """Draw standard normal numbers: float32 (seeds, count), `count` >= 16.

        Two uniform numbers make two normal ones (Box and Muller), in blocks of sixteen. Of a count that is no multiple
        of sixteen the last sixteen are drawn anew, as torch does.
        """
        assert count >= LEAST_NORMALS
        whole = count - count % 16
        numbers = _box_muller(self._uniforms(count)[:, :whole])
        if whole == count:
            return numbers
        return torch.cat([numbers[:, : count - 16], _box_muller(self._uniforms(16))], dim=1)

    def _uniforms(self, count: int) -> Tensor:
        """The next uniform numbers of 24 bits in [0, 1), float32 (seeds, count)."""
        words = [self._left]
        missing = count - self._left.shape[1]
        while missing > 0:
            self._state = _twist(self._state)
            words.append(_temper(self._state))
            missing -= _WORDS
        ahead = torch.cat(words, dim=1) if len(words) > 1 else self._left
        self._left = ahead[:, count:]
        return (ahead[:, :count] & 0xFFFFFF).float() * 2.0**-24


def _initial_states(seeds: Sequence[int]) -> np.ndarray:
    """States (seeds, words) as 32 bits: every word follows from the one before it, so the host does it."""
    states = np.empty((_WORDS, len(seeds)), dtype=np.uint32)
    states[0] = np.array([seed & 0xFFFFFFFF for seed in seeds], dtype=np.uint32)
    for i in range(1, _WORDS):
        before = states[i - 1]
        states[i] = np.uint32(1812433253) * (before ^ (before >> np.uint32(30))) + np.uint32(i)
    return np.ascontiguousarray(states.T).view(np.int32)


def _twist(state: Tensor) -> Tensor:
    """The next state. A word is mixed with one that lies ahead, of which the first `reach` are of the old state."""
    reach = _WORDS - _AHEAD
    mixed = (state & _UPPER) | (state.roll(-1, dims=1) & _LOWER)
    rest = (mixed >> 1) ^ ((mixed & 1) * _MATRIX)
    first = state[:, _AHEAD:] ^ rest[:, :reach]
    second = first ^ rest[:, reach : 2 * reach]
    third = second[:, : _WORDS - 1 - 2 * reach] ^ rest[:, 2 * reach : -1]
    # The last word's neighbour is the first of the new state.
    ends = (state[:, -1:] & _UPPER) | (first[:, :1] & _LOWER)
    partner = second[:, _AHEAD - 1 - reach : _AHEAD - reach]
    last = partner ^ (ends >> 1) ^ ((ends & 1) * _MATRIX)
    return torch.cat([first, second, third, last], dim=1)


def _temper(words: Tensor) -> Tensor:
    words = words ^ (words >> 11)
    words = words ^ ((words << 7) & 0x9D2C5680)
    words = words ^ ((words << 15) & 0xEFC60000)
    return words ^ (words >> 18)


def _box_muller(uniforms: Tensor) -> Tensor:
    pairs = uniforms.reshape(len(uniforms), -1, 2, 8)
    radius = (-2.0 * (1.0 - pairs[:, :, 0]).log()).sqrt()
    angle = (2.0 * math.pi) * pairs[:, :, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).reshape(uniforms.shape)
