"""Status: what another process reads off the folder of a run, at any moment of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import few_digits, vit_config, vit_recipe

from diffusionblocks.cli import main
from diffusionblocks.common.files import folder_lock, lock_holder
from diffusionblocks.experiments import run
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import begin, check_parts, finish, parts_of
from diffusionblocks.experiments.run import fit_noise, prepare, train_trunk, write_recipe
from diffusionblocks.experiments.run_folder import read_run
from diffusionblocks.experiments.run_status import RunStatus, read_status
from diffusionblocks.reports.page import RunReport, _times, write_page
from diffusionblocks.training import Interrupted, Trainer
from diffusionblocks.training.run_log import progress_line

CONFIG = vit_config(3)
STAGES = {"fit": {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}, "trunk": {"steps": 2}}


def experiment(**changes: Any) -> Experiment:
    sections = {
        "blocks": {"num_blocks": 3},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "schedule": "sequential"},
        "evaluate": {"limit": 16, "seeds": [1]},
    }
    data = few_digits()
    return Experiment(vit_recipe(CONFIG, sections, changes), {"train": data, "test": data})


def states(status: RunStatus) -> list[tuple[str, str, int]]:
    return [(unit.unit, unit.state, unit.step) for unit in status.units]


def stopped(folder: Path, at: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> RunStatus:
    """The status in the middle of a step, of a run that SIGTERM then stops."""
    step = Trainer.step
    seen = []

    def interrupted(trainer: Trainer, unit: int, following: int | None = None) -> None:
        step(trainer, unit, following)
        if trainer.iteration == at and trainer.folder == folder:
            seen.append(read_status(folder))
            trainer._watch.signum = 15

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(Interrupted):
            run.train(experiment(**changes), folder, progress=False)
    return seen[0]


def test_a_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    during = stopped(tmp_path, 6, monkeypatch)
    assert states(during) == [("block 0", "finished", 4), ("block 1", "running", 2), ("block 2", "running", 0)]
    assert during.running
    assert during.process is not None
    assert during.process.startswith("process ")
    assert during.seconds_left is not None
    after = read_status(tmp_path)
    assert states(after) == [("block 0", "finished", 4), ("block 1", "stopped", 3), ("block 2", "waiting", 0)]
    assert (after.running, after.missing) == (False, ["block 1", "block 2"])
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 / 4" in out
    assert "not running; missing: block 1, block 2; run its command again" in out
    run.train(experiment(), tmp_path, progress=False)
    assert main(["status", str(tmp_path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["finished"], values["running"], values["missing"]) == (True, False, [])
    assert [unit["steps"] for unit in values["units"]] == [4, 4, 4]


def test_blocks_wait_for_fit_and_trunk(tmp_path: Path) -> None:
    of = experiment(**STAGES)
    with folder_lock(tmp_path):
        prepare(of, tmp_path)
        write_recipe(of.recipe, tmp_path)
        blocks = [(f"block {block}", "waiting", 0) for block in range(3)]
        assert states(read_status(tmp_path)) == [("fit", "running", 0), ("trunk", "waiting", 0), *blocks]
        fitted, _ = fit_noise(of, tmp_path, progress=False)
        assert states(read_status(tmp_path)) == [("fit", "finished", 2), ("trunk", "running", 0), *blocks]
        train_trunk(fitted, tmp_path, progress=False)
        in_turn = [(name, "running", 0) for name, *_ in blocks]
        assert states(read_status(tmp_path)) == [("fit", "finished", 2), ("trunk", "finished", 2), *in_turn]
    assert states(read_status(tmp_path))[2:] == blocks


def test_a_run_in_parts(tmp_path: Path) -> None:
    of = experiment(**STAGES)
    check_parts(of, tmp_path)
    fitted, before = begin(of, tmp_path, say=lambda _: None)
    parts = parts_of(fitted, tmp_path)
    parts[1].train()
    with folder_lock(parts[2].folder):
        status = read_status(tmp_path)
    phases = [("fit", "finished", 2), ("trunk", "finished", 2)]
    assert states(status) == [*phases, ("block 0", "waiting", 0), ("block 1", "finished", 4), ("block 2", "running", 0)]
    assert status.missing == ["block 0", "block 2"]
    assert status.running
    assert not read_status(tmp_path).running
    for part in parts:
        part.train()
    assert read_status(tmp_path).missing == ["model and result"]
    finish(fitted, tmp_path, before, say=lambda _: None)
    assert read_status(tmp_path).finished
    report = read_run(tmp_path, "parts")
    assert [record["unit"] for record in report.logs["run"]] == [f"block {b}" for b in range(3) for _ in range(4)]
    assert report.side_by_side
    write_page(tmp_path / "page.html", [report])
    assert "block 2" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        ({0: (60, 10.0), 1: (80, 10.0)}, 4.0),  # the slower of two
        ({0: (100, 10.0), 1: (50, 5.0)}, 10.0),  # one has ended
        ({0: (50, 10.0)}, 15.0),  # the other waits for it
        ({0: (100, 10.0), 1: (100, 10.0)}, 0.0),
    ],
)
def test_what_trains_side_by_side_does_not_add_up(ends: dict[int, tuple[int, float]], left: float) -> None:
    records = [
        {"unit": f"block {b}", "step": step, "iteration": step + 100 * b, "iterations_per_second": speed}
        for b, (step, speed) in ends.items()
    ]
    report = RunReport("run", Path("run"), logs={"run": records}, unit_steps=(100, 2), side_by_side=True)
    assert _times(report)["left"] == left


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err
    run.train(experiment(), tmp_path / "table" / "blocks", progress=False, measure=False)
    assert main(["status", str(tmp_path / "table")]) == 2
    assert "comparison or an ablation: give one of its runs" in capsys.readouterr().err


def test_a_lock_is_seen_and_not_taken(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
    with folder_lock(tmp_path):
        assert "process" in (lock_holder(tmp_path) or "")
    (tmp_path / ".lock").write_text("process 1 on a machine that died")
    assert lock_holder(tmp_path) is None


def test_progress_without_a_terminal_is_a_line_a_unit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment().trainer(tmp_path).train()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("block")]
    assert [line.partition(",")[0] for line in lines] == [f"block {b}: step {s} of 4" for b in range(3) for s in (1, 4)]
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert record["rank"] == 0
    assert record["host"]


def test_a_line_of_progress() -> None:
    record = {"unit": "block 1", "step": 1200, "loss": 0.02134, "peak_bytes": 3 * 2**29}
    line = "block 1: step 1,200 of 3,000, loss 0.02134, 1:02:05 left"
    assert progress_line(record, 3000, 3725.4) == f"{line}, peak 1.5 GiB"
    used = record | {"device_bytes": 5 * 2**29}
    assert progress_line(used, 3000, 3725.4) == f"{line}, peak 1.5 GiB, GPU 2.5 GiB"
    assert progress_line(record | {"peak_bytes": None}, 3000, 3725.4) == line
