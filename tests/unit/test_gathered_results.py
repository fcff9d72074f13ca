"""The benchmark of diffusion transformers: its jobs' rows in one file, under the names by which they are compared."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.common.formats import read_json, write_json

ORIGIN = {"command": "python job.py", "device": "GPU", "torch": "2.11", "commit": "abc"}
ROW: dict[str, Any] = {
    **{"name": "end-to-end-12", "layers": 12, "blocks": 1, "branched": False, "epochs": 100, "layer_updates": 120},
    **{"patch": 2, "seed": 1, "solver": "euler", "steps": 50, "calls": 50, "grid": "karras", "guidance": 2.0},
    **{"samples": 50, "features": "classifier", "fd_train": 3.0, "fd_test": 2.9, "images_per_second": 10.0},
}
UNI_PC = {"solver": "unipc", "steps": 10, "calls": 10}
BEFORE = {"way": "before", "solver": "euler", "images_per_second": 7.0, "images_per_second_before": 7.0}
#: A row of an older file: no seed, no patch, and the solver without its steps.
OLDER = {name: value for name, value in ROW.items() if name not in ("patch", "seed")} | {"name": "end-to-end"}


@pytest.fixture
def gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    from cifar10_gather import gather as command

    def run(*parts: dict[str, Any]) -> dict[str, Any]:
        files = [tmp_path / f"{number}.json" for number in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            write_json(file, ORIGIN | part)
        out = tmp_path / "results.json"
        command(argparse.Namespace(parts=files, out=out, figure=tmp_path / "curves.png"))
        return dict(read_json(out))

    return run


def test_rows_are_named_by_solver_and_replace_those_of_the_same_model(gather: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", ORIGIN | {"speed": {"step": 1}, "rows": [OLDER]})
    best, tried = ROW | UNI_PC | {"study": "best", "fd_train": 2.0}, ROW | UNI_PC | {"study": "sampling"}
    first = gather({"rows": [ROW, tried, best]}, {"study": "sampling speed", "rows": [BEFORE]})
    assert OLDER in first["rows"]  # as it was
    new = {row["solver"]: row for row in first["rows"] if "patch" in row}
    assert {solver: (row["fd_train"], row.get("best_solver")) for solver, row in new.items()} == {
        "euler-50": (3.0, None),
        "best": (2.0, "unipc-10"),
    }
    assert [row["study"] for row in first["sampling"]] == ["sampling", "sampling speed"]
    assert first["sampling"][1]["images_per_second_before"] == 7.0
    assert first["speed"] == {"step": 1}
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "curves_patch2.png").exists()
    # Measured again, with another best solver, a row takes its place; another seed's is a row of its own.
    again = ROW | {"study": "best", "steps": 30, "fd_train": 1.5}
    second = gather({"rows": [again, again | {"seed": 2}]}, {"study": "sampling speed", "rows": [BEFORE]})
    bests = {row["seed"]: row["best_solver"] for row in second["rows"] if row["solver"] == "best"}
    assert bests == {1: "euler-30", 2: "euler-30"}
    assert len(second["rows"]) == len(first["rows"]) + 1
    assert len(second["sampling"]) == len(first["sampling"])
    assert second["device"] == "GPU"  # once, though each of the files says it
