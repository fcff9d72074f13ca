"""NoProp's noise: T fixed steps from noise to a label's embedding, on the cosine schedule (arXiv 2503.24322).

Step t of T denoises z_(t-1) into z_t. Given the embedding u of the label, z_t = sqrt(abar_t) u + sqrt(1 - abar_t) eps,
and abar rises from 0 (t = 0) to nearly 1 (t = T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Offset of the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672): it keeps the last level a little below 1.
_OFFSET = 0.008


@dataclass(frozen=True)
class DiscreteSteps:
    """The schedule of T steps.

    Attributes:
        abar: abar_0 to abar_T, rising from 0.

    Raises:
        ValueError: steps < 1.
    """

    abar: tuple[float, ...]

    @classmethod
    def cosine(cls, steps: int) -> DiscreteSteps:
        """abar_t = cos^2(pi / 2 * (1 - t / T + 0.008) / 1.008)."""
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        angles = [math.pi / 2 * (1 - t / steps + _OFFSET) / (1 + _OFFSET) for t in range(steps + 1)]
        return cls((0.0, *(math.cos(angle) ** 2 for angle in angles[1:])))

    def snr(self, t: int) -> float:
        """Signal-to-noise ratio abar_t / (1 - abar_t)."""
        return self.abar[t] / (1 - self.abar[t])

    def loss_weight(self, t: int, eta: float) -> float:
        """Weight (T / 2) eta (SNR_t - SNR_(t-1)) of the squared error of step t, 1 <= t <= T."""
        return (len(self.abar) - 1) / 2 * eta * (self.snr(t) - self.snr(t - 1))

    def coefficients(self, t: int) -> tuple[float, float, float]:
        """(a, b, c) of z_t = a u + b z_(t-1) + sqrt(c) eps, which is q(z_t | z_(t-1), u); 1 <= t <= T."""
        before, now = self.abar[t - 1], self.abar[t]
        alpha = before / now
        return (
            math.sqrt(now) * (1 - alpha) / (1 - before),
            math.sqrt(alpha) * (1 - now) / (1 - before),
            (1 - now) * (1 - alpha) / (1 - before),
        )
