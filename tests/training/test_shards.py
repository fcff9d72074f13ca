"""A unit shared out over ranks (FSDP2, gloo): one process's results, half of its memory, files like any run's."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import few_digits, run_like_torchrun
from test_parallel import STAGES, assert_close, experiment, over_ranks, serial, weights  # noqa: F401 - a fixture
from torch import nn

from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.planning import Gpus, Predictor, plan_gpus
from diffusionblocks.training import Diverged, TrainConfig, Trainer
from diffusionblocks.training.ranks import Group, Place, Ranks
from diffusionblocks.training.shards import ShardResident, check_shards, share_out
from diffusionblocks.training.traffic import Traffic

SHARD = {"parallel": {"within_block": "shard", "timeout": 30}}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive"
)

Groups = Callable[..., Group]


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    """Import once what each fork would."""
    importlib.import_module("torch.distributed.fsdp")
    importlib.import_module("torch.distributed.tensor")
    few_digits()


def in_group(folder: Path, check: Callable[[Groups, int], None]) -> None:
    """Let two ranks check something; each gets what makes their group."""

    def command(rank: int) -> int:
        place = Place.from_environment()
        assert place is not None
        ranks = Ranks(place, 30)

        def groups(*, shard: bool) -> Group:
            group = ranks.groups(torch.device("cpu"), 1, shard=shard)
            assert group is not None
            return group

        with ranks.failing_together():
            check(groups, rank)
        return 0

    folder.mkdir(exist_ok=True)
    run_like_torchrun(command, folder, ranks=2)


def of_block(**train: Any) -> Experiment:
    return experiment(blocks={"num_blocks": 2}, train={"gradient_clip": 0.05, "accumulation": 1, **train}).part(1)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The unit's weights, averages and optimizer state."""
    (unit,) = trainer.units
    return {**unit.module.state_dict(), **trainer.sets[unit.name].state()}


def first_moments(trainer: Trainer) -> list[torch.Tensor]:
    """After one step these are the clipped gradients, but for a factor."""
    return [moments["exp_avg"] for moments in trainer.sets[trainer.units[0].name].moments]


def end_to_end(**train: Any) -> Experiment:
    return experiment(method="end-to-end", train={"gradient_clip": 0.05, **train})


@pytest.mark.parametrize(
    ("made", "is_taught"), [(of_block, False), (end_to_end, False), (of_block, True)], ids=["block", "whole", "taught"]
)
def test_gradients_and_steps_are_those_of_one_process(
    made: Callable[..., Experiment], is_taught: bool, tmp_path: Path
) -> None:
    teacher: dict[str, Any] = {}
    if is_taught:
        experiment(train={"seed": 5}).build().save_pretrained(tmp_path / "teacher")
        teacher["distill"] = {"teacher": str(tmp_path / "teacher"), "weight": 0.9}

    def check(groups: Groups, rank: int) -> None:
        trained = {}
        for name, group in {"shard": groups(shard=True), "replicate": groups(shard=False), "alone": None}.items():
            of_rank = made(activation_checkpointing=name == "shard", **teacher)
            trainer = trained[name] = of_rank.trainer(progress=False, group=group)
            with Traffic() as traffic:
                trainer.step(0)
            assert (traffic.between([(0,), (1,)]) > 0) == (group is not None)
            assert traffic.between([(0, 1)]) == 0
            trainer.residency.flush()
        shards = trained["shard"].residency
        assert isinstance(shards, ShardResident)
        (module,) = shards.shared_modules
        rows = sum(p.to_local().numel() for p in module.module.parameters())  # type: ignore[operator]
        whole = sum(p.numel() for p in trained["alone"].units[0].module.parameters())
        assert 0.4 * whole < rows < 0.6 * whole
        assert all(p.is_meta for p in trained["shard"].units[0].module.parameters()) == (rank > 0)
        if rank > 0:
            return
        for ours, theirs in zip(*(first_moments(trained[name]) for name in ("shard", "alone")), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)
        norms = [trainer.stepper.read_sums()[1][0] for trainer in trained.values()]
        assert norms == pytest.approx([norms[-1]] * 3, rel=1e-5)
        assert norms[0] > 0.05, "nothing was clipped"
        if is_taught:
            untaught = made().trainer(progress=False)
            untaught.step(0)
            assert untaught.stepper.read_sums()[1][0] != pytest.approx(norms[0], rel=1e-3), "the teacher says nothing"

    in_group(tmp_path, check)


def test_checkpoints_are_of_any_number_of_ranks(tmp_path: Path) -> None:
    def go_on(folder: Path, group: Group | None, until: int) -> Trainer:
        trainer = of_block(checkpoint_every=2).trainer(folder, progress=False, group=group)
        trainer.train(until=until)
        return trainer

    def check(groups: Groups, rank: int) -> None:
        shard, replicate = groups(shard=True), groups(shard=False)
        whole = go_on(tmp_path / "whole", shard, 4)
        go_on(tmp_path / "begun", shard, 2)
        if rank == 0:
            for name in ("again", "alone", "replicate"):
                shutil.copytree(tmp_path / "begun", tmp_path / name)
            go_on(tmp_path / "alone", None, 3)
        shard.largest([0])  # waits for the copies
        results = {
            "again": go_on(tmp_path / "again", shard, 4),
            "alone": go_on(tmp_path / "alone", shard, 4),  # after 2 steps of two ranks and one of one
            "replicate": go_on(tmp_path / "replicate", replicate, 4),
        }
        bad = go_on(tmp_path / "bad", shard, 1)
        assert isinstance(bad.residency, ShardResident)
        if rank == 1:
            bad.residency._rows.ema[0].fill_(float("nan"))
        bad.step(0)
        with pytest.raises(Diverged, match=r"block 1: the moving average of .* is NaN or infinite"):
            bad.save_checkpoint()
        if rank > 0:
            return
        expected = state_of(whole)
        assert int(expected["steps"]) == 4
        for name, trainer in results.items():
            for key, tensor in state_of(trainer).items():
                if name == "again":
                    assert torch.equal(tensor, expected[key]), key
                else:
                    torch.testing.assert_close(tensor, expected[key], atol=2e-5, rtol=1e-4, msg=f"{name}: {key}")

    in_group(tmp_path, check)


def test_nothing_travels_between_blocks(tmp_path: Path) -> None:
    def check(ranks: Ranks) -> None:
        row = ranks.place.rank // 2
        for shard in (True, False):
            group = ranks.groups(torch.device("cpu"), 2, shard=shard)
            trainer = experiment(blocks={"num_blocks": 2}).part(row).trainer(progress=False, group=group)
            with Traffic() as traffic:
                trainer.train(until=1)
            assert list(traffic.by_group) == [(0, 1) if row == 0 else (2, 3)]
            assert traffic.by_group.total() > 0
            assert traffic.between([(0, 1), (2, 3)]) == 0

    over_four(tmp_path, check)


def over_four(folder: Path, check: Callable[[Ranks], None]) -> None:
    """Let four ranks check something."""

    def command(rank: int) -> int:
        place = Place.from_environment()
        assert place is not None
        ranks = Ranks(place, 30)
        with ranks.failing_together():
            check(ranks)
            ranks.tell(f"end {rank}")
            if ranks.leads:  # the store is there until all have ended
                for other in range(4):
                    ranks.wait_for(f"end {other}", other)
        return 0

    run_like_torchrun(command, folder, ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["diffusionblocks", "ensemble"])
def test_groups_that_share_out_their_blocks_agree_with_one_process(method: str, serial: Any, tmp_path: Path) -> None:  # noqa: F811
    changes = {"blocks": {"num_blocks": 2}, "method": method}
    over_ranks(tmp_path, 4, **changes, **SHARD)
    assert_close(tmp_path / "run", serial(**changes))


def test_fit_trunk_and_block_are_shared_out(serial: Any, tmp_path: Path) -> None:  # noqa: F811
    trunk = {"steps": 2, "average": "copied"}
    changes = {"blocks": {"num_blocks": 1}, "fit": STAGES["fit"], "trunk": trunk}
    changes["train"] = {"steps": 2, "accumulation": 1}
    over_ranks(tmp_path, 2, **changes, **SHARD)
    assert_close(tmp_path / "run", serial(**changes))
    assert weights(tmp_path / "run").keys() == weights(serial(**changes)).keys()


def test_what_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    for changes, message in [
        ({"cuda_graph": True}, r"train.cuda_graph = true .* set train.cuda_graph \(and train.concurrent\) to false"),
        ({"optimizer": "adamw-8bit"}, "set train.optimizer to adamw, or parallel.within_block to replicate"),
        ({"optimizer_in_backward": True, "gradient_clip": None}, "set train.optimizer_in_backward to false"),
        ({"early_stopping": {"every": 1}}, "set train.early_stopping to null, or parallel.within_block to replicate"),
        ({"weights": "bfloat16"}, "set train.weights to null, or parallel.within_block to replicate"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_shards(TrainConfig(steps=1, **changes))
    check_shards(TrainConfig(steps=1))
    scalar = nn.Module()
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"scale is a single number.* set parallel.within_block to replicate"):
        share_out(scalar, None, TrainConfig(steps=1))  # type: ignore[arg-type]
    codes = nn.Module()
    codes.weight_codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"set blocks.lora.base to null, or parallel.within_block to replicate"):
        share_out(codes, None, TrainConfig(steps=1))  # type: ignore[arg-type]


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(ImportError, match=r"needs a newer torch than .* set parallel.within_block to replicate"):
        check_shards(TrainConfig(steps=1))


def test_plans_say_what_is_sent(tmp_path: Path) -> None:
    made = experiment(blocks={"num_blocks": 2}, train={"accumulation": 1}, **SHARD)
    plan = plan_gpus(Predictor(made.recipe), Gpus(1, 4, 2**30), batch=False)
    blocks = plan.rows[0]
    assert blocks.mesh == (2, 2)

    def check(groups: Groups, rank: int) -> None:
        sent = []
        for part in (made.part(0), made.part(1)):
            trainer = part.trainer(progress=False, group=groups(shard=True))
            with Traffic() as traffic:
                trainer.step(0)
            sent.append(traffic.by_group[0, 1])
        # A parameter of an odd number of rows travels with one more, and the loss and the norm do.
        assert blocks.traffic_bytes <= max(sent) < 1.1 * blocks.traffic_bytes

    in_group(tmp_path, check)
