"""Ranks on GPUs of their own (NCCL), started by torchrun: what the tests of gloo hold on a CPU holds there.

pytest tests/training/test_parallel_cuda.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import listing, vit_config, vit_recipe
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

DEVICE = "cuda"
STAGES = {"fit": {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}, "trunk": {"steps": 2}}
SHARD = {"parallel": {"within_block": "shard", "timeout": 60}}
IMAGES = {
    "model": {
        "type": "DiT",
        "config": {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "num_layers": 2,
            "num_attention_heads": 2,
            "hidden_size": 32,
            "num_classes": 10,
        },
    },
    "evaluate": {"kind": "samples", "samples": 40, "batch_size": 6, "steps": [4], "features": None},
}

#: The command line, in whose training something happens once: (rank, step, what).
EVENTFUL = """
import os, signal, sys
from diffusionblocks.cli import main
from diffusionblocks.training import Trainer

step, (rank, last, what) = Trainer.step, os.environ["HAPPENS"].split()

def eventful(trainer, unit, following=None):
    here = os.environ["RANK"], str(trainer.iteration), os.environ["TORCHELASTIC_RESTART_COUNT"]
    if here == (rank, last, "0") and not trainer.units[unit].name.startswith("trunk"):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(5, "Input/output error", "somewhere")
    step(trainer, unit, following)

Trainer.step = eventful
sys.exit(main())
"""


def recipe_file(folder: Path, **changes: Any) -> Path:
    sections = {
        "device": DEVICE,
        "blocks": {"num_blocks": 2},
        "train": {"steps": 20, "batch_size": 8, "ema_decay": 0.9, "checkpoint_every": 1, "log_every": 5},
        "parallel": {"timeout": 60},
        "evaluate": {"limit": 40, "batch_size": 6},
    }
    if "kind" in changes.get("evaluate", {}):
        del sections["evaluate"]
    recipe = vit_recipe(vit_config(2), sections, changes)
    file = folder / "tiny.json"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    return file


def launch(
    *arguments: str | Path, ranks: int = 1, happens: str | None = None, restarts: int = 0, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command by so many ranks, or in one process."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    (cwd / "eventful.py").write_text(EVENTFUL)
    command += ["eventful.py"] if happens else ["-m", "diffusionblocks"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HAPPENS": happens or ""},
        capture_output=True,
        text=True,
        timeout=420,
    )


def ends_well(*arguments: str | Path, **options: Any) -> str:
    done = launch(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{n}": x for file in files for n, x in load_file(file).items()}


def rows(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())["rows"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run on one GPU, by what is changed."""
    done: dict[str, Path] = {}

    def of(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in done:
            done[key] = folder = tmp_path_factory.mktemp("alone")
            ends_well("train", recipe_file(folder, **changes), "--out", folder / "run", "--quiet", cwd=folder)
        return done[key] / "run"

    return of


@pytest.mark.parametrize(
    "changes", [{}, {"method": "ensemble"}, {"train": {"compile": True, "cuda_graph": True}}], ids=str
)
def test_a_block_on_each_gpu_is_that_of_one(
    changes: dict[str, Any], alone: Callable[..., Path], tmp_path: Path
) -> None:
    ends_well("train", recipe_file(tmp_path, **changes), "--out", tmp_path / "run", "--quiet", ranks=2, cwd=tmp_path)
    assert listing(tmp_path / "run" / "model") == listing(alone(**changes) / "model") != {}
    assert rows(tmp_path / "run") == rows(alone(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"method": "end-to-end"}, STAGES, {"method": "end-to-end", **SHARD}, {**STAGES, **SHARD}],
    ids=["end-to-end", "fit and trunk", "end-to-end, sharded", "fit and trunk, sharded"],
)
def test_a_group_agrees_with_one_gpu(changes: dict[str, Any], alone: Callable[..., Path], tmp_path: Path) -> None:
    ends_well("train", recipe_file(tmp_path, **changes), "--out", tmp_path / "run", "--quiet", ranks=2, cwd=tmp_path)
    ours, theirs = weights(tmp_path / "run"), weights(alone(**changes))
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("changes", [{}, IMAGES], ids=["classifier", "images"])
def test_gpus_measure_and_sample_what_one_does(
    changes: dict[str, Any], alone: Callable[..., Path], tmp_path: Path
) -> None:
    model, recipe = alone(**changes) / "model", recipe_file(tmp_path, **changes)
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        ends_well("evaluate", recipe, "--model", model, "--json", out, ranks=ranks, cwd=tmp_path)
        results.append([{**row, "images_per_second": None} for row in json.loads(out.read_text())["rows"]])
        if changes:
            more = ("--count", "14", "--quiet", "--out", tmp_path / f"samples-{ranks}")
            ends_well("sample", recipe, "--model", model, *more, ranks=ranks, cwd=tmp_path)
    assert results[1] == results[0]
    assert results[0]
    if changes:
        assert listing(tmp_path / "samples-2") == listing(tmp_path / "samples-1") != {}


@pytest.mark.parametrize("changes", [{}, {"method": "end-to-end"}], ids=["blocks", "group"])
def test_torchrun_starts_again_what_died(changes: dict[str, Any], alone: Callable[..., Path], tmp_path: Path) -> None:
    step = random.Random(os.getpid()).randrange(1, 20)
    arguments = ("train", recipe_file(tmp_path, **changes), "--out", tmp_path / "run", "--quiet")
    ends_well(*arguments, ranks=2, happens=f"1 {step} kill", restarts=1, cwd=tmp_path)
    ours, theirs = weights(tmp_path / "run"), weights(alone(**changes))
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=1e-2, msg=f"{name}, killed at {step}")
    if not changes:
        assert listing(tmp_path / "run" / "model") == listing(alone() / "model"), f"killed at {step}"


def test_a_rank_that_fails_in_a_group_says_so_at_once(tmp_path: Path) -> None:
    """Not only when NCCL's timeout has passed: it must not wait for the others before."""
    arguments = ("train", recipe_file(tmp_path, method="end-to-end", parallel={"timeout": 3600}), "--out", "run")
    done = launch(*arguments, ranks=2, happens="1 3 fail", cwd=tmp_path)
    assert done.returncode != 0
    assert "rank 1: error: somewhere: Input/output error" in done.stderr


def test_a_comparison_on_two_gpus(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, train={"steps": 4})
    said = ends_well("compare", recipe, "--out", tmp_path / "out", "--quiet", ranks=2, cwd=tmp_path)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["finished"]
    assert {"end-to-end-2", "ensemble-2x1", "diffusionblocks"} <= {row["key"] for row in table["rows"]}
    assert "table: out" in said or "table.json" in said
