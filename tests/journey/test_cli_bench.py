"""`diffusionblocks bench` from the command line, at toy size on the CPU: shards, resuming, speed, depth, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusionblocks.bench.depth import search
from diffusionblocks.bench.methods import Spec
from diffusionblocks.bench.table import server
from diffusionblocks.cli import main

TINY = ["--device", "cpu", "--tiny", "--no-compile"]
QUICK = [*TINY, "--windows", "1", "--iterations", "1"]
MEMORY = ["bench", "memory", "--models", "dit-l-2", "--blocks", "2", "--no-predict"]
METHODS = ["end-to-end", "end-to-end-cpu-offload", "end-to-end-badam", "resident-all", "resident-active"]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_shards_are_measured_resumed_and_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for i, part in enumerate(parts):
        shard = ["--methods", *METHODS, "--shard", f"{i}/2", "--out", str(part)]
        assert main([*MEMORY, *QUICK, *shard]) == 0
    rows = {row["method"]: row for part in parts for row in read(part)["rows"]}
    assert set(rows) == set(METHODS)
    assert "from a GPU" in rows["end-to-end-cpu-offload"]["error"]
    measured = [row for row in rows.values() if "error" not in row]
    assert len(measured) == 4
    for row in measured:
        assert sum(row["bytes"].values()) == row["peak_bytes"]
        assert row["process_seconds"] >= row["seconds"] > 0
    assert rows["resident-active"]["peak_bytes"] < rows["resident-all"]["peak_bytes"]
    assert rows["end-to-end-badam"]["peak_bytes"] < rows["end-to-end"]["peak_bytes"]
    assert rows["resident-active"]["host_bytes"] > 0

    # Once more: only the row with an error is tried again.
    capsys.readouterr()
    again = next(i for i, part in enumerate(parts) if "cpu-offload" in part.read_text())
    before = read(parts[again])["rows"]
    shard = ["--methods", *METHODS, "--shard", f"{again}/2", "--out", str(parts[again])]
    assert main([*MEMORY, *QUICK, *shard]) == 0
    printed = capsys.readouterr().out
    assert printed.count("measured before") == len(before) - 1
    after = read(parts[again])["rows"]
    assert [row for row in after if "error" not in row] == [row for row in before if "error" not in row]

    joined, figure = tmp_path / "all.json", tmp_path / "all.png"
    assert main(["bench", "gather", *map(str, parts), "--out", str(joined), "--figure", str(figure)]) == 0
    assert [row["method"] for row in read(joined)["rows"]] == METHODS
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "resident-active" in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    out = tmp_path / "late.json"
    options = ["--methods", "end-to-end", "--windows", "1000", "--limit", "1.5", "--out", str(out)]
    assert main([*MEMORY, *TINY, *options]) == 0
    (row,) = read(out)["rows"]
    assert row["error"] == "timed out after 1.5 s"


@pytest.mark.slow
def test_speed_of_blocks_switches_and_trainer(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    options = ["--models", "vit-h", "--blocks", "2", "--dwells", "1", "3", "--offload", "host", "disk"]
    assert main(["bench", "speed", *options, *QUICK, "--out", str(out)]) == 0
    written = read(out)
    assert not [row for row in written["rows"] if "error" in row]
    whats = [ratio["what"] for ratio in written["ratios"]]
    assert whats.count("trainer over bare loop") == 2
    assert whats.count("blocks over end to end") == 1
    for home in ("host", "disk"):
        assert {f"dwell {n}, {home}, over no switch" for n in (1, 3)} <= set(whats)
    assert all(ratio["ratio"] > 0 for ratio in written["ratios"])


@pytest.mark.slow
def test_depth_within_a_budget() -> None:
    budget = 3 * 2**20
    found = {}
    with server() as asked:
        for method, blocks in (("end-to-end", 1), ("resident-active", 2)):
            spec = Spec("dit-l-2", method, blocks, task="fits", device="cpu", tiny=True, compile=False, budget=budget)
            found[method] = search(asked, spec, 180)
    for row in found.values():
        sizes = {trial["depth"]: trial["peak_bytes"] for trial in row["trials"]}
        step = row["blocks"]
        assert sizes[row["layers"]] <= budget < sizes[row["layers"] + step]
    # Two blocks of the depth that trains whole.
    assert found["resident-active"]["layers"] == 2 * found["end-to-end"]["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--methods", "badam"], "unknown method badam; allowed: end-to-end,"),
        (["memory", "--models", "dit-xl"], "unknown model dit-xl; allowed: dit-l-2,"),
        (["memory", "--blocks", "1"], "--blocks must be at least 2, got 1"),
        (["memory", "--blocks", "99"], "blocks = 99: dit-l-2 has 24 layers"),
        (["memory", "--windows", "0"], "--windows must be at least 1, got 0"),
        (["memory", "--limit", "0"], "--limit must be above 0 seconds, got 0"),
        (["depth", "--budget", "16GB"], "budget = '16GB': give a size such as 16GiB"),
        (["speed", "--dwells", "0"], "--dwells must be at least 1, got 0"),
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
