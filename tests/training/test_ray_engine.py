"""Training on Ray leaves what one process leaves, whatever workers die."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import listing, vit_config, vit_recipe

from diffusionblocks.cli import main
from diffusionblocks.common.files import folder_lock, lock_holder, lock_text
from diffusionblocks.experiments import run
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import PartsMissing
from diffusionblocks.experiments.ray_engine import _cluster, _Job, train_on_ray
from diffusionblocks.experiments.run_status import read_status

CONFIG = vit_config(2)
STAGES = {"fit": {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}, "trunk": {"steps": 2}}
STEPS = 40


def experiment(**changes: Any) -> Experiment:
    sections = {
        "blocks": {"num_blocks": 2},
        "train": {"steps": STEPS, "batch_size": 4, "checkpoint_every": 1, "keep_checkpoints": STEPS},
        "evaluate": {"limit": 16, "seeds": [1]},
    }
    return Experiment(vit_recipe(CONFIG, sections, changes))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def kill_worker(part: Path, at: int, killed: dict[str, Any], over: threading.Event) -> None:
    """Kill whoever trains a part once it has so many checkpoints; note these with their times."""
    while not over.is_set():
        there = sorted((part / "checkpoints").glob("iteration-*"))
        holder = re.match(r"process (\d+)", lock_holder(part) or "")
        if len(there) >= at and holder:
            os.kill(int(holder[1]), signal.SIGKILL)
            killed |= {"times": {path.name: path.stat().st_mtime_ns for path in there}, "process": int(holder[1])}
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_worker_loses_one_interval_and_the_result_is_that_of_one_process(
    cluster: None, tmp_path: Path
) -> None:
    whole = run.train(experiment(**STAGES), tmp_path / "whole", progress=False)
    folder, killed = tmp_path / "ray", {}
    over = threading.Event()
    killer = threading.Thread(target=kill_worker, args=(folder / "blocks" / "block-01", 5, killed, over))
    killer.start()
    try:
        result = train_on_ray(experiment(**STAGES), folder, progress=False)
    finally:
        over.set()
        killer.join()
    assert killed, "no worker was killed"
    assert listing(folder / "model") == listing(tmp_path / "whole" / "model") != {}
    assert (result.rows, result.iterations) == (whole.rows, whole.iterations)
    # It went on: checkpoints from before are those that the killed worker wrote.
    checkpoints = folder / "blocks" / "block-01" / "checkpoints"
    after = {path.name: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    assert len(killed["times"]) < len(after) == STEPS
    assert {name: after[name] for name in killed["times"]} == killed["times"]
    assert read_status(folder).finished


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_told_as_in_one_process(cluster: None, tmp_path: Path) -> None:
    wild = experiment(train={"steps": 4, "lr": 1e30, "gradient_clip": None})
    with pytest.raises(PartsMissing, match=r"block 0 is missing: block 0: .*; block 1 is missing: block 1: "):
        train_on_ray(wild, tmp_path, progress=False)
    assert not read_status(tmp_path).running
    with pytest.raises(ValueError, match=r"train.lr = 1e\+?30, this run has 0.0005"):
        train_on_ray(experiment(train={"steps": 4}), tmp_path, progress=False)


def test_what_ray_cannot_train_is_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trains one unit"):
        train_on_ray(experiment(method="end-to-end"), tmp_path)
    with pytest.raises(ValueError, match=r"device: cuda, but no machine of the Ray cluster has a GPU"):
        train_on_ray(experiment(device="cuda"), tmp_path)
    with pytest.raises(ValueError, match=r"device: cuda:1 names one GPU"):
        train_on_ray(experiment(device="cuda:1"), tmp_path)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["train", "vit/digits", "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "pip install 'diffusionblocks[ray]'" in capsys.readouterr().err
    assert main(["train", "vit/digits", "--out", str(tmp_path / "out"), "--address", "auto"]) == 2
    assert "give --engine ray too" in capsys.readouterr().err
    for option in ("--dry-run", "--before-blocks"):
        assert main(["train", "vit/digits", "--out", str(tmp_path / "out"), "--engine", "ray", option]) == 2
        assert f"{option} works in this process, and --engine ray in tasks of Ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_an_address_no_cluster_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose `ray start` was killed would be waited for, for minutes."""
    options: list[dict[str, Any]] = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **given: options.append(given), shutdown=int)
    for variable, address in ((None, None), ("10.0.0.1:6379", None), ("10.0.0.1:6379", "auto")):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if variable:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        with _cluster(ray, address):
            pass
    assert [given["address"] for given in options] == ["local", "10.0.0.1:6379", "auto"]


def test_a_worker_that_sees_another_folder_refuses(tmp_path: Path) -> None:
    recipe = experiment().recipe.model_dump(mode="json")
    with folder_lock(tmp_path):
        job = _Job(recipe, tmp_path, lock_text(tmp_path))
        assert job.experiment().recipe == experiment().recipe
        elsewhere = dataclasses.replace(job, folder=tmp_path / "not-shared")
        with pytest.raises(ValueError, match=r"not-shared is not one folder on all machines .*--out, or .* jobs"):
            elsewhere.experiment()
