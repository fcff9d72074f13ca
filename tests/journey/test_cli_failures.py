"""What stops a command: full disks, signals, a second run. One line, an exit status by kind, and the work survives."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_VIT, VIT, sets
from safetensors.torch import load_file

from diffusionblocks.cli import main
from diffusionblocks.common import files, messages
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.training import Trainer

SMALL = [*TINY_VIT, *sets(train__steps=6, train__lr=1e-3, evaluate__limit=20, train__log_every=2)]


def train(out: Path, *more: str, **changes: object) -> int:
    return main(["train", VIT, "--out", str(out), "--quiet", *SMALL, *sets(**changes), *more])


def in_child(action: Callable[[], int]) -> tuple[int, str]:
    """Exit status and errors of an action in a process of its own. They go through a pipe, which has no length."""
    read, write = os.pipe()
    if not (child := os.fork()):
        status = 70
        try:
            os.dup2(write, 2)
            with os.fdopen(write, "w", closefd=False) as sys.stderr:
                status = action()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as stream:
        told = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{n}": t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, by method."""
    found = {}
    for method in ("diffusionblocks", "end-to-end"):
        found[method] = tmp_path_factory.mktemp(method)
        assert train(found[method], method=method) == 0
    return found


@pytest.mark.each_value
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive")
@pytest.mark.parametrize("limit", [0, 300, 5_000, 60_000])
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    method: str, limit: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    """No file may be longer than the limit: none at all, no log, no checkpoint, no model."""

    def full() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return train(tmp_path / "run", method=method)

    status, told = in_child(full)
    assert status == 4, told
    errors = [line for line in told.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "Traceback" not in told
    assert "File too large" in errors[0]
    assert "run the same command again" in errors[0]
    assert train(tmp_path / "run", method=method) == 0
    assert same(tmp_path / "run" / "model", whole[method] / "model")
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".tmp")]


def test_a_second_run_is_kept_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.folder_lock(tmp_path / "run"):
        assert train(tmp_path / "run") == 2
    assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.each_value
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("owner", "place"), [(Experiment, "data"), (runs, "evaluate_saved")])
def test_a_signal_outside_training_is_one_line(
    owner: Any,
    place: str,
    number: int,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = getattr(owner, place)

    def stopped(*args: object, **options: object) -> object:
        signal.raise_signal(number)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stopped)
        assert train(tmp_path / "run") == 128 + number
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped by" in line]
    assert line.startswith(f"stopped by {signal.Signals(number).name}; ")
    assert "run the same command again" in line
    assert train(tmp_path / "run") == 0
    assert same(tmp_path / "run" / "model", whole["diffusionblocks"] / "model")


def test_a_row_that_is_stopped_does_not_name_a_checkpoint_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes may share the folder of an ablation: the newest checkpoint in it may be another process's."""
    real = runs.evaluate_saved

    def stopped(experiment: Experiment, folder: Path, **options: Any) -> Any:
        if "overlap=0.1" in str(folder):
            signal.raise_signal(signal.SIGTERM)
        return real(experiment, folder, **options)

    monkeypatch.setattr(runs, "evaluate_saved", stopped)
    rows = ["--over", "blocks.overlap=0,0.1", "--out", str(tmp_path), "--quiet"]
    assert main(["ablate", VIT, *rows, *SMALL]) == 128 + signal.SIGTERM
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped by" in line]
    assert line == f"stopped by SIGTERM; run the same command again to resume what is unfinished in {tmp_path}"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device", "x"), 4, "x: No space left on device"),
        (PermissionError(13, "Permission denied", "x"), 4, "x: Permission denied"),
        (OSError(30, "Read-only file system", "x"), 4, "x: Read-only file system"),
        (Exception("No space left on device (os error 28)"), 4, "No space left"),
        (MemoryError(), 5, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "train.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "No such file"),
        (ValueError("a\nb"), 2, "a; b"),
        (RuntimeError("shapes do not match"), 1, "DIFFUSIONBLOCKS_TRACEBACK=1"),
    ],
)
def test_exit_statuses_by_kind(error: Exception, status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise error

    assert messages.report_errors(action) == status
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1
    assert "Traceback" not in told


def test_a_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFUSIONBLOCKS_TRACEBACK", "1")
    assert main(["train", "nowhere.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_checkpoints_are_as_frequent_as_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    real = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda run: saved.append(run.iteration) or real(run))
    assert train(tmp_path / "often", train__checkpoint_seconds=1e-9) == 0
    often = list(saved)
    saved.clear()
    assert train(tmp_path / "seldom") == 0
    assert len(often) == max(often) > len(saved) == 1
    assert same(tmp_path / "often" / "model", tmp_path / "seldom" / "model")


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_killed_at_random_the_next_run_ends_the_same(method: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """Killed in a first run, while an older model is replaced, and during a restart."""
    draw = random.Random(0)
    out = tmp_path / "run"
    assert train(out, method=method, train__steps=1) == 0
    for number in range(6):
        more = ["--restart"] if number < 4 else []
        if not (child := os.fork()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(train(out, *more, method=method, train__checkpoint_every=1))
        time.sleep(draw.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if (status := train(out, method=method)) != 0:  # no restart had begun, so the older run's checkpoints are there
        assert status == 2
        assert train(out, "--restart", method=method) == 0
    assert same(out / "model", whole[method] / "model")


def test_a_restart_that_was_killed_is_finished(whole: dict[str, Path], tmp_path: Path) -> None:
    """It died after some of its checkpoints: those left, of another recipe, do not block the next run."""
    assert train(tmp_path / "run", train__steps=2) == 0
    (tmp_path / "run" / runs._RESTARTING).touch()
    assert train(tmp_path / "run") == 0
    assert same(tmp_path / "run" / "model", whole["diffusionblocks"] / "model")
