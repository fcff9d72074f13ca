"""Figures of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from helpers import convert

from diffusionblocks.evaluation.accuracy import AccuracyRow
from diffusionblocks.reports.figures import draw_run


def test_a_comparison_of_many_rows_is_drawn(tmp_path: Path) -> None:
    """As many baselines as `compare --rows` can name, and more: greys must not run out after they were trained."""
    model = convert("vit", num_blocks=3)
    rows = [AccuracyRow("mean", steps, 1, 0.5, 0.01, 1.0, 0.1) for steps in (1, 3)]
    baselines = [(f"baseline {number}", number / 20) for number in range(20)]
    draw_run(rows, baselines, model.partition, model.noise, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
