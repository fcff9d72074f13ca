"""Printed tables of generated images' quality, and of their distance against network calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.image_quality import distance_name
from ..evaluation.sample_quality import best_of

#: What says how images were sampled, of a row of `SampleRow.to_dict`.
_SETTING = ("solver", "steps", "calls", "grid", "guidance")
#: Further parts of a setting, shown where one of the rows has another value than this.
_SELDOM = {"guidance_interval": None, "churn": 0.0, "churn_interval": None, "churn_noise": 1.0}


def distance_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Printed columns of the Frechet distances of a row, of `SampleRow.to_dict` or a part of it.

    Bias is what extrapolation to infinitely many images takes away; "real" is the distance of the real test images to
    the training images.
    """
    name = distance_name(row["features"])
    train, infinity = row["fd_train"], row.get("fd_train_infinity")
    values = {
        f"{name} train": train,
        f"{name} test": row["fd_test"],
        "bias": None if train is None or infinity is None else train - infinity,
        "real": row.get("fd_real"),
    }
    return {"images": f"{row['samples']:,}"} | {
        column: "-" if value is None else f"{value:#.4g}" for column, value in values.items()
    }


def quality_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Printed columns of the other measures that a row, or `Quality.to_dict`, has."""
    names = ("precision", "recall", "density", "coverage", "inception_score_analogue", "class_accuracy")
    return {name.replace("_", " "): f"{row[name]:.3f}" for name in names if row.get(name) is not None}


def _setting_columns(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Printed columns of the setting of one of some rows; network evaluations where they are not its calls."""
    names = [name for name in _SETTING if name in row]
    names += [name for name, usual in _SELDOM.items() if any(other.get(name, usual) != usual for other in rows)]
    if any(other.get("evaluations", other["calls"]) != other["calls"] for other in rows):
        names.insert(names.index("calls") + 1, "evaluations")
    return {name: "-" if row.get(name) is None else str(row[name]) for name in names}


def setting_lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A printed line for each setting of one model, the best of several marked.

    Args:
        rows: of `SampleRow.to_dict`.
    """
    best = best_of(rows) if len(rows) > 1 else None
    lines = []
    for row in rows:
        line = _setting_columns(row, rows)
        line |= distance_columns(row) | quality_columns(row) | {"images/s": f"{row['images_per_second']:.0f}"}
        lines.append(line if best is None else line | {"best": "*" if row is best else ""})
    return lines


def distances_by_calls(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
    """Printed lines of distance against network calls: of each row its settings by their calls, its best one marked.

    Args:
        rows: rows of `SampleRow.to_dict` by the names of their models.

    Returns:
        None where no model has several settings, or nothing was measured.
    """
    if all(len(settings) < 2 or best_of(settings) is None for settings in rows.values()):
        return []
    lines, every = [], [row for settings in rows.values() for row in settings]
    for name, settings in rows.items():
        best = best_of(settings)
        for row in sorted(settings, key=lambda setting: setting["calls"]):
            line = {"row": name} | _setting_columns(row, every) | distance_columns(row)
            lines.append(line | {"images/s": f"{row['images_per_second']:.0f}", "best": "*" if row is best else ""})
    return lines
