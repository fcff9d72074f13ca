"""Machines that share nothing: the scripts of `jobs`, run in folders of their own, leave the serial run's model."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import TINY_VIT, VIT, sets
from helpers import listing

from diffusionblocks.cli import main

SMALL = [*TINY_VIT, *sets(train__steps=3, evaluate__limit=20, blocks__num_blocks=2, model__config__num_hidden_layers=2)]
STAGES = sets(
    fit="{steps: 2, rounds: 2, grid: 3, examples: 16}",
    trunk="{steps: 2}",
)


def sh(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = {"DIFFUSIONBLOCKS": f"{sys.executable} -m diffusionblocks"}
    return subprocess.run(
        ["sh", str(script), *arguments],
        cwd=cwd,
        env=os.environ | program | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blocks", pytest.param("ensemble", marks=pytest.mark.exhaustive)])
def test_scripts_on_machines_of_their_own_are_one_run(method: str, tmp_path: Path) -> None:
    changes = [*SMALL, *(STAGES if method == "blocks" else sets(method="ensemble"))]
    jobs, name = tmp_path / "jobs", {"blocks": "block", "ensemble": "member"}[method]
    assert main(["train", VIT, "--out", str(tmp_path / "whole"), "--quiet", *changes]) == 0
    assert main(["jobs", VIT, "--out", str(jobs), *changes]) == 0
    scripts = sorted(path.name for path in jobs.iterdir())
    stages = ["start.sh"] if method == "blocks" else []
    assert scripts == [f"{name}-00.sh", f"{name}-01.sh", "merge.sh", "recipe.json", *stages]
    assert str(tmp_path) not in "".join(path.read_text() for path in jobs.iterdir())
    arguments: list[str] = []
    if stages:
        first = shutil.copytree(jobs, tmp_path / "first")
        refused = sh(first / "block-00.sh", cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "run start.sh first" in refused.stderr
        assert sh(first / "start.sh", cwd=tmp_path).returncode == 0
        arguments = [str(first / "start")]
    for part in ("00", "01"):
        machine = shutil.copytree(jobs, tmp_path / f"machine-{part}")
        finished = sh(machine / f"{name}-{part}.sh", *arguments, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        shutil.copytree(machine / f"{name}-{part}", jobs / f"{name}-{part}")
    merged = sh(jobs / "merge.sh", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    model = listing(jobs / "model")
    whole = listing(tmp_path / "whole" / "model")
    weights = [file for file in whole if file.endswith(".safetensors")]
    assert len(weights) >= 2
    assert {file: model[file] for file in weights} == {file: whole[file] for file in weights}
    for row in json.loads((tmp_path / "whole" / "result.json").read_text())["rows"]:
        assert f"{row['accuracy']:.4g}" in merged.stdout


@pytest.mark.slow
def test_a_slurm_array_runs_the_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "jobs"
    assert main(["jobs", VIT, "--out", str(out), "--format", "slurm", *SMALL, *STAGES]) == 0
    assert f"submit all: sh {out}/submit.sh" in capsys.readouterr().out
    array = (out / "blocks.sbatch").read_text()
    assert "#SBATCH --array=0,1\n" in array
    assert "--gpus" not in array
    submit = (out / "submit.sh").read_text()
    assert submit.index("start.sh") < submit.index("blocks.sbatch") < submit.index("merge.sh")
    task = sh(out / "blocks.sbatch", cwd=tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert f"no {out}/start/fit: run start.sh first" in task.stderr
    assert main(["jobs", VIT, "--out", str(tmp_path / "some"), "--format", "slurm", *SMALL, *sets(device="auto")]) == 0
    assert "#SBATCH --gpus=1\n" in (tmp_path / "some" / "blocks.sbatch").read_text()


def sky_tasks(folder: Path, *changes: str) -> dict[str, dict[str, Any]]:
    """The tasks that are written, by their stem."""
    assert main(["jobs", VIT, "--out", str(folder), "--format", "skypilot", *SMALL, *STAGES, *changes]) == 0
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))}


def test_tasks_of_skypilot_bring_their_folders_to_the_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each runs in a copy of the folder, as on a machine of its own, with a program that only makes its folder."""
    tasks = sky_tasks(tmp_path / "jobs")
    assert "first start.yaml, the blocks', then merge.yaml" in capsys.readouterr().out
    assert list(tasks) == ["block-00", "block-01", "merge", "start"]
    (tmp_path / "program").write_text(
        'for word; do [ "$before" = --out ] && mkdir -p "$word/fit" "$word/trunk"; before=$word; done; echo "$*"'
    )
    bucket = tmp_path / "results"
    bucket.mkdir()
    said = {}
    for stem in ("start", "block-00", "block-01", "merge"):
        machine = shutil.copytree(tmp_path / "jobs", tmp_path / stem)
        (tmp_path / "run.sh").write_text(tasks[stem]["run"].replace("/results", str(bucket)))
        done = sh(tmp_path / "run.sh", cwd=machine, DIFFUSIONBLOCKS=f"sh {tmp_path / 'program'}")
        assert done.returncode == 0, done.stderr
        said[stem] = done.stdout
        assert (bucket / stem.replace("merge", "model")).is_dir()
    assert (bucket / "block-01" / "trunk").is_dir(), "it started from the bucket's start"
    assert f"merge {tmp_path}/merge/block-00 {tmp_path}/merge/block-01 --out" in said["merge"]
    assert "nvidia-smi" not in tasks["start"]["run"]
    assert "nvidia-smi -L\n" in sky_tasks(tmp_path / "gpu", *sets(device="auto"))["start"]["run"]


def test_skypilot_takes_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sky") is None:
        pytest.skip("skypilot is not installed, whose schema of tasks this is")
    monkeypatch.setenv("HOME", str(tmp_path))  # it makes folders there
    import sky

    given = [("BUCKET", "s3://some-bucket"), ("INSTALL", "true")]
    read = lambda values, given=None: sky.Task.from_yaml_config(copy.deepcopy(values), env_overrides=given)  # noqa: E731
    for stem, values in sky_tasks(tmp_path / "jobs", *sets(device="auto")).items():
        task = read(values, given)
        assert task.name == f"{stem}-vit-digits"
        assert list(task.storage_mounts) == ["/results"]
        with pytest.raises(ValueError, match="'BUCKET' is None"):
            read(values)
        with pytest.raises(ValueError, match="worksdir"):
            read(values | {"worksdir": "."}, given)


def test_what_cannot_be_done_apart_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*changes: str, out: str = "out") -> str:
        assert main(["jobs", VIT, "--out", str(tmp_path / out), *SMALL, *changes]) == 2
        return capsys.readouterr().err

    assert "set blocks.shared to replicated or frozen" in error(*sets(blocks__shared="joint"))
    assert "trains one unit" in error(*sets(method="end-to-end"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert "is not empty" in error(out="full")
    assert main(["train", VIT, "--out", str(tmp_path / "out"), "--before-blocks", *SMALL]) == 2
    assert "neither a noise fit nor a trunk" in capsys.readouterr().err


def test_some_blocks_alone(tmp_path: Path) -> None:
    assert main(["jobs", VIT, "--out", str(tmp_path), *SMALL, *sets(blocks__num_blocks=2, train__blocks="[0, 1]")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-00.sh", "block-01.sh", "recipe.json"]
