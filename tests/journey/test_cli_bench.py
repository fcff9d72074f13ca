"""`diffusionblocks bench` from the command line, at toy size on the CPU: shards, resuming, speed, depth, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusionblocks.bench import server
from diffusionblocks.bench.depth import depth, search
from diffusionblocks.bench.methods import Spec, rows_of
from diffusionblocks.bench.rows import measure_all, shard, with_method
from diffusionblocks.bench.speed import specs_of, speed
from diffusionblocks.bench.worker import answer
from diffusionblocks.cli import main
from diffusionblocks.common.formats import write_json

QUICK = ["--device", "cpu", "--tiny", "--no-compile", "--windows", "1", "--iterations", "1"]
METHODS = ["end-to-end", "end-to-end-cpu-offload", "end-to-end-badam", "resident-all", "resident-active"]


class Here:
    """Measures in this process, which on a CPU gives the same rows without the seconds that a fresh one takes."""

    def ask(self, spec: Spec, limit: float) -> dict[str, Any]:
        return answer(spec)


def tiny(model: str, method: str = "end-to-end", blocks: int = 1, **changes: Any) -> Spec:
    given = {"device": "cpu", "tiny": True, "compile": False, "windows": 1, "iterations": 1} | changes
    return Spec(model, method, blocks, **given)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_rows_are_measured_each_in_a_process_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "memory.json", tmp_path / "memory.png"
    models = ["--models", "dit-l-2", "--blocks", "2", "--methods", "end-to-end", "resident-active"]
    files = ["--out", str(out), "--figure", str(figure)]
    assert main(["bench", "memory", "--no-predict", *models, *QUICK, *files]) == 0
    whole, block = read(out)["rows"]
    assert (whole["method"], block["method"]) == ("end-to-end", "resident-active")
    for row in (whole, block):
        assert sum(row["bytes"].values()) == row["peak_bytes"]
        assert row["process_seconds"] >= row["seconds"] > 0
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "resident-active" in capsys.readouterr().out


def test_shards_are_measured_resumed_and_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    shards = [shard(rows_of(["dit-l-2"], [2], METHODS, tiny("dit-l-2")), f"{i}/2") for i in range(2)]
    for specs, part in zip(shards, parts, strict=True):
        measure_all(specs, part, 60.0, Here())
    rows = {row["method"]: row for part in parts for row in read(part)["rows"]}
    assert set(rows) == set(METHODS)
    assert "from a GPU" in rows["end-to-end-cpu-offload"]["error"]
    assert len([row for row in rows.values() if "error" not in row]) == 4
    assert rows["resident-active"]["peak_bytes"] < rows["resident-all"]["peak_bytes"]
    assert rows["end-to-end-badam"]["peak_bytes"] < rows["end-to-end"]["peak_bytes"]
    assert rows["resident-active"]["host_bytes"] > 0

    # Once more: only the row with an error is tried again.
    capsys.readouterr()
    again = next(i for i, part in enumerate(parts) if "cpu-offload" in part.read_text())
    before = read(parts[again])["rows"]
    measure_all(shards[again], parts[again], 60.0, Here())
    printed = capsys.readouterr().out
    assert printed.count("measured before") == len(before) - 1
    after = read(parts[again])["rows"]
    assert [row for row in after if "error" not in row] == [row for row in before if "error" not in row]

    joined, figure = tmp_path / "all.json", tmp_path / "all.png"
    assert main(["bench", "gather", *map(str, parts), "--out", str(joined), "--figure", str(figure)]) == 0
    assert [row["method"] for row in read(joined)["rows"]] == METHODS
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "resident-active" in capsys.readouterr().out


def test_speed_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of three shards: the end-to-end row and one of the trainer's loop; measured here, as `Here` says."""
    monkeypatch.setattr(server, "server", lambda *_: contextlib.nullcontext(Here()))
    out = tmp_path / "speed.json"
    few = ["--models", "vit-h", "--blocks", "2", "--switching-steps", "1", "--shard", "1/3"]
    assert main(["bench", "speed", *few, *QUICK, "--out", str(out)]) == 0
    written = read(out)
    assert [row["task"] for row in written["rows"]] == ["overhead", "switching"]
    assert not [row for row in written["rows"] if "error" in row]
    assert {ratio["what"] for ratio in written["ratios"]} == {
        "trainer over bare loop",
        "resident-active, 1 step per switch, host, over no switch",
    }
    assert "trainer over bare loop" in capsys.readouterr().out


def test_speed_of_blocks_switches_and_trainer(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    specs = specs_of(["vit-h"], [2], ["resident-active"], ["host", "disk"], tiny("vit-h", switching_steps=(1, 3)))
    speed(specs, out, 60.0, Here())
    written = read(out)
    assert not [row for row in written["rows"] if "error" in row]
    whats = [ratio["what"] for ratio in written["ratios"]]
    assert whats.count("trainer over bare loop") == 2
    assert whats.count("blocks over end to end") == 1
    for place in ("host", "disk"):
        for steps in ("1 step", "3 steps"):
            assert f"resident-active, {steps} per switch, {place}, over no switch" in whats
    assert all(ratio["ratio"] > 0 for ratio in written["ratios"])


def test_depth_within_a_budget() -> None:
    budget = 3 * 2**20
    found = {}
    for method, blocks in (("end-to-end", 1), ("resident-active", 2)):
        found[method] = search(Here(), tiny("dit-l-2", method, blocks, task="fits", budget=budget), 180)
    for row in found.values():
        sizes = {trial["depth"]: trial["peak_bytes"] for trial in row["trials"]}
        beyond = tiny("dit-l-2", row["method"], row["blocks"], task="fits", depth=row["layers"] + row["blocks"])
        assert sizes[row["layers"]] <= budget < answer(dataclasses.replace(beyond, budget=budget))["peak_bytes"]
    # Two blocks of the depth that trains whole.
    assert found["resident-active"]["layers"] == 2 * found["end-to-end"]["layers"]


def test_depths_of_several_budgets(tmp_path: Path) -> None:
    out, budgets = tmp_path / "depth.json", [3 * 2**20, 6 * 2**20]
    small, large = depth([tiny("llama-7b")], ["resident-active"], budgets, 2, out, 180.0, Here())
    assert [trial["depth"] for trial in large["trials"]] == [large["layers"]]  # the line through the others' peaks
    for row, budget in ((small, budgets[0]), (large, budgets[1])):
        sizes = {trial["depth"]: trial["peak_bytes"] for trial in row["trials"]}
        assert sizes[row["layers"]] <= budget == row["budget_bytes"]
        beyond = answer(tiny("llama-7b", "resident-active", 2, task="fits", budget=budget, depth=row["layers"] + 2))
        assert beyond["peak_bytes"] > budget
    assert large["parameters"] > 1.5 * small["parameters"]
    alone = answer(tiny("llama-7b", "resident-active", 2, task="fits", budget=budgets[0], depth=4))
    whole = answer(tiny("llama-7b", "resident-active", 2, depth=4))
    assert alone["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.01)  # one block alone as all in turn


def test_depth_keeps_the_searches_that_its_file_has(tmp_path: Path) -> None:
    out = tmp_path / "depth.json"
    base = tiny("dit-l-2")
    methods = ("end-to-end", "resident-active", "end-to-end-all-optimisations", "resident-active-all-optimisations")
    given: dict[str, Any] = {"task": "fits", "budget": 2**20}
    specs = [with_method(base, method, 2 if "active" in method else 1, **given) for method in methods]
    answers = iter(["error", *["layers"] * 3])
    rows = [{"key": spec.key, "method": spec.method, next(answers): 4} for spec in specs]
    write_json(out, {"rows": rows})
    found = depth([base], methods, [2**20], 2, out, 180.0, Here(), predict=False)
    assert found[1:] == rows[1:] == read(out)["rows"][1:]
    assert found[0].keys() >= {"layers", "trials"}  # what had failed is searched again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--methods", "badam"], "unknown method badam; allowed: end-to-end,"),
        (["memory", "--models", "dit-xl"], "unknown model dit-xl; allowed: dit-l-2,"),
        (["memory", "--blocks", "1"], "--blocks must be at least 2, got 1"),
        (["memory", "--blocks", "99"], "blocks = 99: dit-l-2 has 24 layers"),
        (["memory", "--windows", "0"], "--windows must be at least 1, got 0"),
        (["memory", "--limit", "0"], "--limit must be above 0 seconds, got 0"),
        (["depth", "--budget", "16GiB", "--methods", "end-to-end-badam"], "unknown method end-to-end-badam; allowed"),
        (["depth", "--budget", "16Gb"], "budget = '16Gb': must be bytes above zero, as 12GiB"),
        (["speed", "--switching-steps", "0"], "--switching-steps must be at least 1, got 0"),
        (["speed", "--dwells", "0"], "--switching-steps must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--out", str(tmp_path / "x.json"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["memory"], ["speed"], ["depth", "--budget", "16GiB"]])
def test_without_a_gpu_it_says_so(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *command, "--out", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert "CUDA" in error
    assert "--device cpu --tiny" in error
