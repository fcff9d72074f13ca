"""Ranks that share a run (gloo): the model of one process, whoever trains what, and nothing hangs where one fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import few_digits, listing, run_like_torchrun, started_like_torchrun, vit_config, vit_recipe
from safetensors.torch import load_file

from diffusionblocks.common.files import lock_text
from diffusionblocks.common.messages import report_errors
from diffusionblocks.experiments import parallel, run
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import mesh_rows
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.run_folder import read_run
from diffusionblocks.training import Trainer
from diffusionblocks.training.ranks import Group, Place, Ranks

CONFIG = vit_config(4)
STAGES = {"fit": {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}, "trunk": {"steps": 2}}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive"
)


def experiment(**changes: Any) -> Experiment:
    sections = {
        "blocks": {"num_blocks": 4},
        "data": {"kind": "digits", "augment": {"flip": True, "crop_padding": 1}},
        "train": {"steps": 4, "batch_size": 6, "accumulation": 2, "ema_decay": 0.9, "log_every": 2},
        "parallel": {"timeout": 30},
        "evaluate": {"limit": 16, "seeds": [1], "batch_size": 6},
    }
    data = few_digits()
    return Experiment(vit_recipe(CONFIG, sections, changes), {"train": data, "test": data})


def over_ranks(
    folder: Path,
    ranks: int,
    *,
    statuses: tuple[int, ...] = (),
    before: Callable[[int], None] | None = None,
    resume: bool = True,
    **changes: Any,
) -> list[str]:
    """Train by so many ranks; returns what each said."""

    def command(rank: int) -> int:
        if before is not None:
            before(rank)
        return report_errors(lambda: parallel.train(experiment(**changes), folder / "run", resume=resume) and None)

    folder.mkdir(exist_ok=True)
    return run_like_torchrun(command, folder, ranks=ranks, statuses=statuses)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def results(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "result.json").read_text())
    return {name: values[name] for name in ("rows", "iterations")}


def assert_close(folder: Path, other: Path) -> None:
    """The same weights to rounding, and not by chance: they moved."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run in one process, by what is changed."""
    done: dict[str, Path] = {}

    def of(**changes: Any) -> Path:
        key = json.dumps(changes)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("serial")
            run.train(experiment(**changes), done[key], progress=False)
        return done[key]

    return of


Event = Callable[[Trainer], None]


def at(block: int, step: int, event: Event) -> Callable[[int], None]:
    """Let something happen on the ranks that train a block, before one of its steps."""
    original = Trainer.step

    def before(rank: int) -> None:
        def eventful(trainer: Trainer, unit: int, following: int | None = None) -> None:
            if (trainer.units[unit].index, trainer.iteration) == (block, step):  # so many are done
                event(trainer)
            original(trainer, unit, following)

        Trainer.step = eventful  # type: ignore[method-assign]

    return before


def killed(trainer: Trainer) -> None:
    if trainer.group is None or not trainer.group.leads:
        os.kill(os.getpid(), signal.SIGKILL)


def stopped(trainer: Trainer) -> None:
    """SIGTERM comes to one rank."""
    if trainer.group is None or not trainer.group.leads:
        signal.raise_signal(signal.SIGTERM)


def spoiled(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.units[0].own[0].fill_(float("nan"))


def failing(trainer: Trainer) -> None:
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize(
    "changes", [{"blocks": {"shared": "frozen"}}, {"method": "ensemble"}], ids=["frozen", "ensemble"]
)
def test_ranks_leave_what_one_process_leaves(changes: dict[str, Any], serial: Any, tmp_path: Path) -> None:
    said = over_ranks(tmp_path, 3, **changes)
    whole = serial(**changes)
    assert listing(tmp_path / "run" / "model") == listing(whole / "model") != {}
    assert results(tmp_path / "run") == results(whole)
    name = "member" if "method" in changes else "block"
    for rank, parts in enumerate([(0, 3), (1,), (2,)]):
        assert [f"{name} {b}: step 4 of 4, loss" in said[rank] for b in range(4)] == [b in parts for b in range(4)]


GROUPS: dict[str, tuple[int, dict[str, Any]]] = {
    "rows of two": (4, {"blocks": {"num_blocks": 2}}),
    "members of two": (4, {"method": "ensemble", "blocks": {"num_blocks": 2}}),
    "uneven shares": (4, {"method": "end-to-end"}),
    "fit and trunk": (2, STAGES),
}


@pytest.mark.parametrize("what", GROUPS)
def test_groups_agree_with_one_process_of_the_whole_batch(what: str, serial: Any, tmp_path: Path) -> None:
    ranks, changes = GROUPS[what]
    over_ranks(tmp_path, ranks, **changes)
    assert_close(tmp_path / "run", serial(**changes))
    assert results(tmp_path / "run")["iterations"] == results(serial(**changes))["iterations"]


def test_one_block_by_several_ranks_leaves_what_one_process_leaves(serial: Any, tmp_path: Path) -> None:
    changes = {"train": {"blocks": [1]}}
    over_ranks(tmp_path, 2, **changes)
    assert_close(tmp_path / "run", serial(**changes))
    assert results(tmp_path / "run") == results(serial(**changes)) == {"rows": [], "iterations": 4}


def test_a_run_goes_on_with_other_ranks(serial: Any, tmp_path: Path) -> None:
    changes = {"train": {"checkpoint_every": 1, "seed": 3}, "parallel": {"timeout": 2}}
    said = over_ranks(tmp_path, 4, statuses=(1, 0, -signal.SIGKILL, 0), before=at(2, 2, killed), **changes)
    assert "rank 2 gave no sign of life for 2 s" in said[0]
    folder = tmp_path / "run" / "blocks"
    of_others = {name: file for name, file in listing(folder).items() if "block-02" not in name}
    assert {name.split("/")[0] for name in of_others} == {"block-00", "block-01", "block-03"}
    over_ranks(tmp_path, 2, statuses=(-signal.SIGKILL, 1), before=at(2, 3, killed), **changes)
    parallel.train(experiment(**changes), tmp_path / "run", progress=False)
    steps = [json.loads(line)["step"] for line in (folder / "block-02" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert {name: file for name, file in listing(folder).items() if "block-02" not in name} == of_others
    assert listing(tmp_path / "run" / "model") == listing(serial(**changes) / "model")


@pytest.mark.parametrize("event", [killed, stopped])
def test_a_group_goes_on_in_one_process(event: Event, serial: Any, tmp_path: Path) -> None:
    changes = {"method": "end-to-end", "train": {"checkpoint_every": 1}}
    ends = (1, -signal.SIGKILL) if event is killed else (143, 143)
    said = over_ranks(tmp_path, 2, statuses=ends, before=at(0, 2, event), **changes)
    assert "error" not in said[1]
    assert ("a rank that trains the same block is gone" in said[0]) == (event is killed)
    (*_, newest) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == ("iteration-000000002" if event is killed else "iteration-000000003")
    run.train(experiment(**changes), tmp_path / "run", progress=False)
    assert_close(tmp_path / "run", serial(method="end-to-end"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_block_that_diverges_stops_alone(ranks: int, tmp_path: Path) -> None:
    changes = {"blocks": {"num_blocks": 2}}
    said = over_ranks(tmp_path, ranks, statuses=(3, *[0] * (ranks - 1)), before=at(1, 2, spoiled), **changes)
    assert "error: block 1 is missing: block 1: loss or gradient is NaN or infinite at its step" in said[0]
    assert "block 1 stops, the others go on: " in said[ranks // 2]
    assert json.loads((tmp_path / "run" / "model" / "diffusionblocks.json").read_text())["blocks"] == [0]


def test_a_restart_over_ranks_starts_anew(tmp_path: Path) -> None:
    run.train(experiment(), tmp_path / "run", progress=False, measure=False)
    said = over_ranks(tmp_path, 2, statuses=(2, 1))
    assert "holds a run that trains all blocks in one process" in said[0]
    over_ranks(tmp_path, 2, resume=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert results(tmp_path / "run")["iterations"] == 16


def test_what_fails_is_told_once(tmp_path: Path) -> None:
    said = over_ranks(tmp_path, 2, statuses=(1, 4), before=at(1, 2, failing))
    assert "rank 1: error: somewhere: No space left" in said[1]
    assert "error" not in said[0]
    said = over_ranks(tmp_path / "joint", 2, statuses=(2, 1), blocks={"shared": "joint"})
    assert said[0].startswith("error: blocks.shared = joint: every step")
    assert "set blocks.shared to replicated or frozen" in said[0]


def test_a_rank_whose_group_fails_says_nothing(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        at(0, 2, failing if rank == 0 else lambda _: None)(rank)

    said = over_ranks(tmp_path, 2, statuses=(4, 1), before=before, method="end-to-end")
    assert "error: somewhere: No space left" in said[0]
    assert "error" not in said[1]


def test_what_needs_a_whole_batch_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    sizes = ["model.config.hidden_size=16", "model.config.mlp_size=16", "data.length=12", "train.epochs=null"]
    path = Path(__file__).parents[2] / "recipes" / "text" / "recurrent_topics.yaml"
    recurrent = load_recipe(path, ["device=cpu", "train.steps=2", "method=end-to-end", *sizes])

    def command(rank: int) -> int:
        return report_errors(lambda: parallel.train(Experiment(recurrent), tmp_path / "run") and None)

    said = run_like_torchrun(command, tmp_path, ranks=2, statuses=(2, 1))
    assert "end-to-end cannot be trained by 2 ranks together, as it draws" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_DELAY", 0.5)

    def command(rank: int) -> int:
        return report_errors(lambda: parallel.train(experiment(), tmp_path / f"disk-{rank}", progress=False) and None)

    said = run_like_torchrun(command, tmp_path, ranks=2, statuses=(1, 2))
    assert "disk-1 is not the folder of the first rank (process " in said[1]
    assert "machines that train one run share its disk; name a folder that all see" in said[1]
    assert not (tmp_path / "disk-1").exists()


def test_rows_of_the_mesh() -> None:
    assert [mesh_rows(world, 4, "block") for world in (1, 3, 4, 8, 12)] == [1, 3, 4, 4, 4]
    with pytest.raises(ValueError, match=r"6 ranks for 4 blocks: with more ranks than blocks .* start 4 or 8 ranks"):
        mesh_rows(6, 4, "block")
    with pytest.raises(ValueError, match=r"9 ranks for 4 members: .* start 8 ranks"):
        mesh_rows(9, 4, "member")


def test_each_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() is None
    place = Place(rank=5, world=8, local_rank=1, local_world=4)
    assert [place.device(name) for name in ("cpu", "auto", "cuda")] == ["cpu", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [place.device(name) for name in ("cpu", "auto", "cuda")] == ["cpu", "cuda:1", "cuda:1"]
    with pytest.raises(ValueError, match="device: cuda:0 is one GPU for 8 ranks; use device: cuda or auto"):
        place.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 ranks on a machine with 2 GPUs: start torchrun with --nproc-per-node 2"):
        place.device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # its own, as Slurm shows it to each process
    assert [place.device(name) for name in ("auto", "cuda")] == ["cuda:0", "cuda:0"]


@pytest.mark.parametrize("own", [True, False])
def test_ranks_that_see_one_gpu_each_must_see_different_ones(
    own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def command(rank: int) -> int:
        seen = SimpleNamespace(uuid=f"GPU-{rank}" if own else "GPU-0")
        torch.cuda.get_device_properties = lambda _: seen  # type: ignore[assignment]
        place = Place.from_environment()
        assert place is not None

        def take() -> None:
            ranks = Ranks(place, 30)
            with ranks.failing_together():
                assert ranks.device("cuda") == "cuda:0"

        return report_errors(take)

    said = run_like_torchrun(command, tmp_path, ranks=2, statuses=(0, 0) if own else (0, 2))
    assert ("ranks 0 and 1 have one GPU between them: start one rank for each GPU" in said[1]) is not own


def test_what_a_group_cannot_train_is_refused() -> None:
    group: Any = type("Three", (Group,), {"__init__": lambda self: setattr(self, "size", 3)})()
    for changes, message in [
        ({"batch_size": 2}, "train.batch_size = 2 gives 3 ranks of one block no example each"),
        (
            {"optimizer_in_backward": True, "gradient_clip": None, "accumulation": 1},
            "set train.optimizer_in_backward to false",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            experiment(method="end-to-end", train=changes).trainer(group=group)


#: A run by the command line, one of whose ranks dies once, at a step that a variable names.
MORTAL = """
import os, signal, sys
from diffusionblocks.cli import main
from diffusionblocks.training import Trainer

step, (block, last) = Trainer.step, map(int, os.environ["DIES_AT"].split())

def mortal(trainer, unit, following=None):
    if (trainer.units[unit].index, trainer.iteration, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (block, last, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer, unit, following)

Trainer.step = mortal
sys.exit(main())
"""


@pytest.mark.slow
def test_torchrun_starts_again_what_died(tmp_path: Path) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL)
    recipe, folder = tmp_path / "tiny.json", tmp_path / "run"
    of_digits = experiment(train={"checkpoint_every": 1, "log_every": 1, "steps": 40}, blocks={"num_blocks": 2})
    recipe.write_text(json.dumps(of_digits.recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["mortal.py", "train", str(recipe), "--out", str(folder), "--quiet"]
    dies_at = f"1 {random.Random(os.getpid()).randrange(1, 40)}"
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DIES_AT": dies_at}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (dies_at, done.stderr)
    assert "80 iterations in" in done.stdout
    run.train(Experiment(load_recipe(recipe)), tmp_path / "serial", progress=False)
    assert listing(folder / "model") == listing(tmp_path / "serial" / "model") != {}
    for block in range(2):  # no step was lost, and none was logged twice
        log = (folder / "blocks" / f"block-{block:02d}" / "log.jsonl").read_text()
        assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, 41))
    report = read_run(folder, "run")
    assert report.finished
    assert [record["iteration"] for record in report.logs["run"]] == list(range(1, 81))


def newest_step(part: Path) -> int:
    """The last step that the log of a block names; of a line that is being written nothing."""
    log = part / "log.jsonl"
    lines = log.read_text().rpartition("\n")[0].splitlines() if log.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def kill_in_training(part: Path, after: int, ranks: Sequence[Process]) -> None:
    """Kill the rank that trains a block, as soon as the block's log has so many steps."""
    while newest_step(part) < after:
        assert all(rank.exitcode is None or rank.exitcode == 0 for rank in ranks), "a rank failed by itself"
        assert not (part / "result.json").exists(), f"{part.name} ended before step {after} was seen"
        time.sleep(0.001)
    _, process, *_ = lock_text(part).split()
    os.kill(int(process), signal.SIGKILL)
    assert not (part / "result.json").exists(), f"{part.name} had ended"
    assert sum(rank.pid == int(process) for rank in ranks) == 1


def test_the_first_rank_stays_for_a_slow_one_where_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusionblocks.training.ranks._AFTER_FAILURE", 0.0)

    def command(rank: int) -> int:
        place = Place.from_environment()
        assert place is not None
        ranks = Ranks(place, 30)
        with ranks.failing_together():
            if ranks.leads:
                ranks.tell("end")
            else:
                time.sleep(0.5)
                assert ranks.wait_for("end", 0) == ""
        return 0

    run_like_torchrun(command, tmp_path, ranks=2)


def states(part: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of a block was written, and what it holds."""
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in part.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(20, 800, marks=pytest.mark.exhaustive)])
def test_ranks_that_are_killed_in_training_cost_steps_alone(
    kills: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, three blocks: two thirds of the kills come while the first two train, the rest in the third.

    As torchrun does, the other rank is sent SIGTERM then, and both are started again.
    """
    monkeypatch.setattr("diffusionblocks.training.ranks._AFTER_FAILURE", 0.2)  # the dead do not answer
    train = {"checkpoint_every": 10, "log_every": 1, "steps": steps, "accumulation": 1, "batch_size": 2}
    options = {"model": {"config": vit_config(3)}, "blocks": {"num_blocks": 3}, "train": train}
    folder = tmp_path / "run"
    parts = [folder / "blocks" / f"block-{block:02d}" for block in range(3)]
    last = steps - steps // 4  # far enough from the end for a kill to come in time
    draws = random.Random(os.getpid())
    finished: dict[int, dict[str, tuple[int, bytes]]] = {}

    def command(rank: int) -> int:
        return report_errors(lambda: parallel.train(experiment(**options), folder) and None)

    for number in range(kills):
        with started_like_torchrun(command, tmp_path, ranks=2, restarts=number) as ranks:
            in_training = [b for b in (0, 1) if newest_step(parts[b]) < last] if 3 * number < 2 * kills else []
            block = draws.choice(in_training or [2])
            here = newest_step(parts[block])
            kill_in_training(parts[block], here + draws.randint(1, max(1, (last - here) // (kills - number))), ranks)
            for ended in {b for b in range(3) if (parts[b] / "result.json").exists()} - finished.keys():
                finished[ended] = states(parts[ended])
            for rank in ranks:
                rank.terminate()
                rank.join()
            assert sorted({rank.exitcode for rank in ranks} - {0, 143}) == [-signal.SIGKILL]
    assert 0 in finished, "no kill came after a block had ended"
    run_like_torchrun(command, tmp_path, ranks=2)
    for ended, before in finished.items():
        assert states(parts[ended]) == before, f"block {ended} had ended, and was touched again"
    whole = run.train(experiment(**options), tmp_path / "serial", progress=False)
    assert listing(folder / "model") == listing(tmp_path / "serial" / "model") != {}
    assert results(folder)["iterations"] == whole.iterations == 3 * steps
    for part in parts:  # no step was lost, and none was logged twice
        log = (part / "log.jsonl").read_text()
        assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, steps + 1))


def test_a_comparison_over_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    changes = {"blocks": {"num_blocks": 2}, "train": {"steps": 2}}

    def command(rank: int) -> int:
        return report_errors(lambda: print(parallel.compare(experiment(**changes), tmp_path / "ranks")))

    said = run_like_torchrun(command, tmp_path, ranks=2)
    table = parallel.compare(experiment(**changes), tmp_path / "alone", progress=False)
    assert table is not None
    ours, alone = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("ranks", "alone"))
    assert ours["finished"]
    assert [row["key"] for row in ours["rows"]] == [row["key"] for row in alone["rows"]]
    for mine, its in zip(ours["rows"], alone["rows"], strict=True):
        assert mine["iterations"] == its["iterations"]
        assert mine["nll"] == pytest.approx(its["nll"], rel=1e-4), mine["key"]
    same = {row["key"] for row, other in zip(ours["rows"], alone["rows"], strict=True) if row["nll"] == other["nll"]}
    assert {"diffusionblocks", "ensemble-2x2"} <= same
    assert "row: diffusionblocks" in said[0]
    assert "row: " not in said[1]


def test_what_ranks_cannot_compare_is_refused_before_a_row_is_trained(tmp_path: Path) -> None:
    def over(folder: Path, **options: Any) -> str:
        def command(rank: int) -> int:
            changes = options.pop("changes", {})
            return report_errors(lambda: print(parallel.compare(experiment(**changes), folder / "out", **options)))

        folder.mkdir()
        return run_like_torchrun(command, folder, ranks=2, statuses=(2, 1))[0]

    assert "compares by the clock of one process" in over(tmp_path / "clock", equal="seconds")
    joint = {"blocks": {"shared": "joint"}}
    assert "set blocks.shared to replicated or frozen" in over(tmp_path / "joint", changes=joint)
    assert not (tmp_path / "joint" / "out").exists()
    in_backward = {"optimizer_in_backward": True, "gradient_clip": None, "accumulation": 1}
    stages = {"trunk": {"steps": 2}, "blocks": {"num_blocks": 2}, "train": in_backward}
    rows = ["ensemble-2x2", "diffusionblocks-branched"]  # ranks train members apart, and a trunk together
    for kind, message in (
        ("replicate", "steps before the gradients of all 2 ranks are there: set train.optimizer_in_backward to false"),
        ("shard", "under parallel.within_block = shard no rank has them whole: set train.optimizer_in_backward"),
    ):
        changes = stages | {"parallel": {"within_block": kind, "timeout": 30}}
        assert message in over(tmp_path / kind, changes=changes, rows=rows)
        assert not (tmp_path / kind / "out").exists(), "the ensemble was trained first"
