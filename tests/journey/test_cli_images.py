"""Diffusion transformers by command line: trunk, branch, samples and the comparison."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DIGITS, TINY, sample, sets
from PIL import Image
from safetensors.torch import load_file

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.common.formats import read_json
from diffusionblocks.core.model_card import CARD


def files(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "images").iterdir())


def pixels(out: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted((out / "images").iterdir())]


def digest(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ---- train and evaluate -------------------------------------------------------------------------------------


def test_a_trunk_is_trained_branched_and_measured(run: Path) -> None:
    trunk, blocks = db.load(run / "trunk" / "model"), db.load(run / "model")
    assert trunk.partition.layers == (1,)
    assert blocks.partition.layers == (1, 1, 1)
    assert trunk.partition.interval(0) == (0.002, 80.0)
    result = read_json(run / "result.json")
    assert result["iterations"] == 6 + 3 * 4
    assert result["train_seconds"] > 0
    (row,) = result["rows"]
    given = {"solver": "euler", "steps": 3, "calls": 3, "grid": "karras", "guidance": 1.25, "samples": 40}
    assert given.items() <= row.items()
    assert row["features"] == "classifier on digits"
    assert 0 < row["fd_test"] < float("inf")
    assert row["fd_train"] != row["fd_test"]
    assert 0 < row["fd_real"] == row["real"]["fd_train"] < row["fd_train"]
    assert row["neighbours"] == 40
    assert row["real"]["coverage"] > row["coverage"]
    assert 0 <= row["class_accuracy"] <= 1 <= row["inception_score_analogue"] <= 10
    assert read_json(run / "recipe.json")["trunk"]["steps"] == 6
    units = [json.loads(line)["unit"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert sorted(units) == ["block 0", "block 1", "block 2"]


def test_a_finished_run_is_not_trained_again(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")

    def weights_and_checkpoints(folder: Path) -> dict[str, dict[str, str]]:
        """But for the cards, which have what is measured now."""
        digests = {name: digest(folder / name) for name in ("model", "trunk", "checkpoints")}
        return {name: {file: d for file, d in files.items() if CARD not in file} for name, files in digests.items()}

    before = weights_and_checkpoints(run)
    assert main(["train", DIGITS, "--out", str(again), "--quiet", *TINY]) == 0
    assert weights_and_checkpoints(again) == before
    assert read_json(again / "result.json")["rows"][0]["fd_test"] is None, "but it is measured as now asked for"
    assert main(["train", DIGITS, "--out", str(tmp_path / "same"), "--quiet", *TINY]) == 0
    assert weights_and_checkpoints(tmp_path / "same")["model"] == before["model"], (
        "trained anew, it is the same model bit for bit"
    )


def test_evaluate_gives_a_row_for_every_setting(
    run: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = sets(
        evaluate__features="classifier",
        evaluate__features_folder=features,
        evaluate__solver="[euler, heun, dpmpp-2m]",
        evaluate__grid="[karras, equal-quantile]",
        evaluate__guidance="[1, 1.25]",
        evaluate__cuda_graph="true",  # on a CPU the same calls, from memory that stays in place
    )
    path = tmp_path / "more" / "rows.json"
    assert main(["evaluate", DIGITS, "--model", str(run / "model"), "--json", str(path), *TINY, *many]) == 0
    rows = read_json(path)["rows"]
    assert len(rows) == 12
    keys = ("solver", "calls", "grid", "guidance")
    assert [tuple(rows[i][key] for key in keys) for i in (0, 1, 4, 11)] == [
        ("euler", 3, "karras", 1.0),
        ("euler", 3, "karras", 1.25),
        ("heun", 5, "karras", 1.0),
        ("dpmpp-2m", 3, "equal-quantile", 1.25),
    ]
    assert len({row["fd_train"] for row in rows}) == 12
    (trained,) = read_json(run / "result.json")["rows"]
    assert rows[1]["fd_train"] == trained["fd_train"], "the same figure as after training"
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 12 + 4
    assert "FD (classifier on digits) train" in table
    assert [line.split()[-1] == "*" for line in table.splitlines()[2:14]].index(True) == min(
        range(12), key=lambda i: rows[i]["fd_train"]
    )
    assert table.splitlines()[14] == "real test images:"
    assert max(len(cell) for cell in table.split() if not cell.startswith("-")) < 20, "figures are rounded to be read"


def test_the_control_is_one_block_on_all_levels(tmp_path: Path) -> None:
    whole = sets(method="end-to-end")
    assert main(["train", DIGITS, "--out", str(tmp_path), "--quiet", *TINY, *whole]) == 0
    assert not (tmp_path / "trunk").exists()
    assert db.load(tmp_path / "model").partition.layers == (3,)
    assert read_json(tmp_path / "result.json")["iterations"] == 4
    assert sample(tmp_path, tmp_path / "s", "--count", "2", *whole) == 0


# ---- sample -------------------------------------------------------------------------------------------------


def test_sample_writes_files_a_grid_a_chain_and_routing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(run, tmp_path, "--labels", "3", "5", "--count", "5", "--seed", "7") == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / name) for name in ("grid.png", "routing.png", "chain.png", "images")]
    assert files(tmp_path) == [f"{7 + i:06d}-000{label}.png" for i, label in enumerate((3, 5, 3, 5, 3))]
    for path in (tmp_path / "images").iterdir():
        image = Image.open(path)
        assert (image.size, image.mode, image.format) == ((8, 8), "L", "PNG")
    # Two labels: two columns and three rows of 96 pixels, with white lines of 2 between.
    assert Image.open(tmp_path / "grid.png").size == (2 * 96 + 2, 3 * 96 + 4)
    for name in ("chain.png", "routing.png"):
        image = Image.open(tmp_path / name)
        assert min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 10


def test_the_grid_shows_the_files(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path, "--labels", "1", "2", "--count", "4") == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for index, path in enumerate(sorted((tmp_path / "images").iterdir())):
        row, column = divmod(index, 2)
        cell = grid[row * 98 : row * 98 + 96, column * 98 : column * 98 + 96]
        assert np.array_equal(cell, np.asarray(Image.open(path)).repeat(12, 0).repeat(12, 1))


def test_the_same_seed_gives_the_same_files(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert sample(run, tmp_path / name, "--count", "6") == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    # An image depends on its own seed and label alone, not on what is drawn beside it.
    assert sample(run, tmp_path / "c", "--labels", "4", "--seed", "4", "--count", "1") == 0
    assert files(tmp_path / "c") == ["000004-0004.png"]
    alone, beside = (np.asarray(Image.open(tmp_path / x / "images" / "000004-0004.png")) for x in ("c", "a"))
    assert np.abs(alone.astype(int) - beside).max() <= 1
    assert sample(run, tmp_path / "d", "--count", "6", "--seed", "100") == 0
    assert pixels(tmp_path / "d") != pixels(tmp_path / "a")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "6"],
        ["--solver", "heun"],
        ["--guidance", "6"],
        ["--guidance", "6", "--guidance-interval", "1", "10"],
        ["--churn", "2"],
        ["--grid", "equal-quantile"],
        ["--seed", "1"],
        ["--labels", "9"],
        ["--labels", "10"],  # the null class: unconditional samples
    ],
    ids=" ".join,
)
def test_every_option_of_sample_acts(run: Path, tmp_path: Path, arguments: Sequence[str]) -> None:
    assert sample(run, tmp_path / "plain", "--count", "4") == 0
    assert sample(run, tmp_path / "other", "--count", "4", *arguments) == 0
    assert len(pixels(tmp_path / "other")) == 4
    assert pixels(tmp_path / "other") != pixels(tmp_path / "plain")


def test_sample_counts_by_labels_or_by_the_recipe(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path / "a", "--labels", "0", "1", "1") == 0
    assert files(tmp_path / "a") == ["000000-0000.png", "000001-0001.png", "000002-0001.png"]
    assert sample(run, tmp_path / "b", *sets(evaluate__grid_images=12, evaluate__seed=30)) == 0
    assert files(tmp_path / "b") == [f"{30 + i:06d}-{i % 10:04d}.png" for i in range(12)]


# ---- branch and compare -------------------------------------------------------------------------------------


def test_branch_copies_a_saved_trunk(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk = run / "trunk" / "model"
    arguments = ["--blocks", "4", "--overlap", "0.1", "--partition", "uniform"]
    assert main(["branch", str(trunk), *arguments, "--out", str(tmp_path / "b" / "model")]) == 0
    assert "4 blocks" in capsys.readouterr().out
    model = db.load(tmp_path / "b" / "model")
    assert model.partition.layers == (1, 1, 1, 1)
    assert (model.blocks_config.overlap, model.blocks_config.partition) == (0.1, "uniform")
    before = load_file(trunk / "block-00.safetensors")
    for b in range(4):
        after = load_file(tmp_path / "b" / "model" / f"block-{b:02d}.safetensors")
        assert {
            name.replace(f"layers.{b}.", "layers.0."): value for name, value in after.items()
        }.keys() == before.keys()
        for name, value in after.items():
            assert torch.equal(value, before[name.replace(f"layers.{b}.", "layers.0.")])
    # All blocks being copies, the samples are the trunk's.
    for folder, name in ((run / "trunk", "trunk"), (tmp_path / "b", "branched")):
        assert sample(folder, tmp_path / name, "--count", "3") == 0
    assert pixels(tmp_path / "branched") == pixels(tmp_path / "trunk")


def test_compare_gives_every_row_the_same_layer_updates(
    tmp_path: Path, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = sets(
        train__steps=2,
        evaluate__features="classifier",
        evaluate__features_folder=features,
        evaluate__samples=20,
        evaluate__steps="[3, 2]",
        evaluate__grid_images=10,
    )
    assert main(["compare", DIGITS, "--out", str(tmp_path), "--quiet", *TINY, *small]) == 0
    rows = read_json(tmp_path / "table.json")["rows"]
    keys = ("key", "layers", "blocks", "branched", "iterations", "layer_updates")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("end-to-end-3", 3, 1, False, 4, 12),
        ("end-to-end-1", 1, 1, False, 4, 4),  # the memory of one block at equal steps: less compute
        ("end-to-end-1-x3", 1, 1, False, 12, 12),
        ("diffusionblocks", 3, 3, False, 12, 12),  # 4 steps each, as if the trunk's 6 were shared out
        ("diffusionblocks-branched", 3, 3, True, 12, 12),  # 6 of the trunk and 2 each
    ]
    for row in rows:
        assert row["fd_train"] > 0
        assert row["fd_test"] > 0
        assert row["images_per_second"] > 0
        grid = tmp_path / row["key"] / "samples" / "grid.png"
        assert Image.open(grid).size == (10 * 98 - 2, 96)
    assert rows[3]["parameters_trained"] == rows[4]["parameters_trained"] < rows[0]["parameters_trained"]
    assert rows[3]["peak_memory_bytes"] < rows[0]["peak_memory_bytes"]
    printed = capsys.readouterr().out
    assert "diffusionblocks, branched" in printed
    assert "FD (classifier on digits) test" in printed
    assert "real test images" in printed
    # Distance against network calls: two settings of each row, one of them its best.
    by_calls = printed.partition("distance against network calls")[2].partition("table: ")[0].splitlines()
    lines = [line for line in by_calls if line.startswith(("end-to-end", "diffusionblocks"))]
    assert [int(line.split()[3]) for line in lines] == 5 * [2, 3]
    assert [line.split()[0] for line in lines if line.endswith("*")] == [row["key"] for row in rows]
    for row in rows:
        assert row["best"] in row["samples_measured"]
        assert row["best"]["fd_train"] == min(measured["fd_train"] for measured in row["samples_measured"])
        assert row["steps"] == 3, "the headline is the first setting"
    assert Image.open(tmp_path / "calls.png").size > (300, 300)
    assert all(str(tmp_path / row["key"] / "samples" / "grid.png") in printed for row in rows)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--out", str(page)]) == 0
    text = page.read_text()
    assert "Distance against network calls" in text
    assert text.count("<td>*</td>") == 5


# ---- boundaries ---------------------------------------------------------------------------------------------


def test_boundaries_are_printed_written_and_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--count", "2", "--examples", "32", "--moved", "-60", "0", "--out", str(tmp_path)]
    steps = sets(evaluate__steps="[30]")
    assert main(["boundaries", DIGITS, "--model", str(run / "model"), *more, *TINY, *steps]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = read_json(tmp_path / "boundaries.json")
    assert [(row["above"], row["below"], row["examples"]) for row in result["rows"]] == [(0, 1, 32), (1, 2, 32)]
    assert all(0 < row["denoised"] < row["velocity"] for row in result["rows"])
    assert [(row["share"], row["change"] > 0) for row in result["moved"]] == [(-0.6, True), (0, False)] * 2
    assert len(lines) == 1 + 4 + 1 + 6 + 2
    assert "moved by" in lines[6]
    assert lines[8].split()[1:3] == ["-60", "%"]
    assert Image.open(tmp_path / "boundaries.png").format == "PNG"


def test_boundaries_moved_between_the_steps_of_the_sampler_say_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--count", "1", "--examples", "2", "--out", str(tmp_path), *TINY]
    for percents, steps, says in (
        (["-10", "10"], 2, True),
        (["0"], 2, False),  # which moves none
        (["-10", "10"], 100, False),
        (["-0.001"], 20, True),
        (["-50", "50"], 20, False),
    ):
        options = ["--moved", *percents, *sets(evaluate__steps=f"[{steps}]")]
        assert main(["boundaries", DIGITS, "--model", str(run / "model"), *more, *options]) == 0
        printed = capsys.readouterr().out
        assert ("no step of the sampler falls between a boundary and the moved one" in printed) is says


def test_boundaries_of_what_has_none_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(run / "model")]
    assert main(["boundaries", DIGITS, *model, "--moved", "-100", *TINY]) == 2
    assert "--moved -100: must be a percentage above -100" in capsys.readouterr().err
    assert main(["boundaries", DIGITS, *model, "--count", "0", "--out", str(tmp_path), *TINY]) == 2
    assert "count" in capsys.readouterr().err
    assert main(["boundaries", DIGITS, "--model", str(run / "trunk" / "model"), *TINY]) == 2
    assert "this model has one; give one of several blocks" in capsys.readouterr().err
