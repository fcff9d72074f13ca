"""Time the linear algebra of a Frechet distance in float64, on the CPU and where there is one on the GPU.

    python benchmarks/frechet.py --dims 1280 2048 --out benchmarks/results/frechet.json

A distance takes the root of each covariance (`eigh`, once a set) and the singular values of their product (`svdvals`).
An extrapolated one takes eight of each. On the GPU the sum of the singular values is also taken from `eigvalsh` of
[[0, M], [M^T, 0]], which loses no digits of small ones. Every way's relative difference from the CPU's is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table


def covariance(dim: int, seed: int) -> Tensor:
    """Of features whose directions have variances over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, dim, dtype=torch.float64)
    rows = torch.randn(4 * dim, dim, generator=generator, dtype=torch.float64) * scales
    return rows.T @ rows / len(rows)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()


def by_doubling(product: Tensor) -> Tensor:
    """The sum of the singular values, as half that of the absolute eigenvalues of a matrix of twice the size."""
    zero = torch.zeros_like(product)
    both = torch.cat([torch.cat([zero, product], 1), torch.cat([product.T, zero], 1)])
    return torch.linalg.eigvalsh(both).abs().sum() / 2


def timed(compute: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, float]:
    compute()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = compute()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return result, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[1280])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/frechet.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for dim in options.dims:
        a, b = (covariance(dim, seed) for seed in (0, 1))
        exact = None
        for device in devices:
            here = a.to(device)
            of_a, eigh_seconds = timed(lambda here=here: root(here), device, options.repeats)  # type: ignore[misc]
            product = of_a.T @ root(b.to(device))
            ways: dict[str, Callable[[], Tensor]] = {
                "svdvals": lambda product=product: torch.linalg.svdvals(product).sum(),  # type: ignore[misc]
                "eigvalsh of twice the size": lambda product=product: by_doubling(product),  # type: ignore[misc]
            }
            for name, compute in ways.items():
                value, seconds = timed(compute, device, options.repeats)
                exact = value.item() if exact is None else exact
                row = {"dim": dim, "device": device.type, "threads": torch.get_num_threads(), "way": name}
                row |= {"eigh_seconds": eigh_seconds, "seconds": seconds}
                rows.append(row | {"relative_difference": abs(value.item() / exact - 1)})
                print(format_table(rows[-1:]), flush=True)
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
