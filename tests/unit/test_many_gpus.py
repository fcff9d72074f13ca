"""Plans of several GPUs: bytes between them are closed forms, peaks are the planner's and what sharing adds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.cli import main
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.planning import Gpus, Predictor, parse_gpus, plan_gpus, predict
from diffusionblocks.training import units_of

VIT = Path(__file__).parents[2] / "recipes" / "vit" / "digits.yaml"
SMALL = ["device=cpu", "model.config.hidden_size=32", "model.config.num_hidden_layers=4", "train.batch_size=16"]


def small(*overrides: str) -> Recipe:
    return load_recipe(VIT, [*SMALL, "blocks.num_blocks=2", *overrides])


def gradients(recipe: Recipe) -> int:
    return sum(p.numel() * 4 for p in Experiment(recipe).outline.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("4x24GiB", Gpus(1, 4, 24 * 2**30)), ("2 x 8x80GB", Gpus(2, 8, 80 * 10**9)), ("1x2MiB", Gpus(1, 1, 2**21))],
)
def test_gpus(text: str, gpus: Gpus) -> None:
    assert parse_gpus(text) == gpus


@pytest.mark.parametrize("text", ["4", "24GiB", "x24GiB", "0x24GiB", "4x", "4x24", "4xGiB", "1x2x3x4GiB", "-1x24GiB"])
def test_bad_gpus_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="gpus = "):
        parse_gpus(text)


def test_a_memory_without_its_unit_is_named_as_that_of_gpus() -> None:
    message = "gpus = '4x24': the memory of each = '24' is 24 bytes: must be at least 1MiB; did you mean 24GiB?"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_gpus("4x24")


def test_bytes_between_gpus_are_the_closed_forms() -> None:
    recipe = small()
    plan = plan_gpus(Predictor(recipe), Gpus(1, 2, 2**30), batch=False)
    blocks, ddp, fsdp = plan.rows
    assert (blocks.mesh, blocks.batch_per_gpu, blocks.traffic_bytes, blocks.network_bytes) == ((2, 1), 16, 0, 0)
    assert blocks.peak == predict(small("train.resident=active")).peak
    whole = gradients(small("method=end-to-end"))
    assert (ddp.mesh, ddp.batch_per_gpu, ddp.batch) == ((1, 2), 8, 16)
    assert ddp.traffic_bytes == 2 * whole * 1 // 2
    module: Any = units_of(Experiment(small("method=end-to-end")).outline)[0][0].module
    layers = sum(p.numel() * 4 for group in module.layer_groups() for part in group for p in part.parameters())
    assert 0 < layers < whole
    assert fsdp.traffic_bytes == (2 * layers + (whole - layers) + whole) * 1 // 2  # stem and head are gathered once
    assert ddp.network_bytes == fsdp.network_bytes == 0
    assert ddp.peak >= predict(small("method=end-to-end", "train.batch_size=8")).peak
    assert fsdp.peak < ddp.peak
    assert plan.changes == {}


def test_more_gpus_than_blocks_share_a_batch() -> None:
    one, four = (
        plan_gpus(Predictor(small()), gpus, batch=False).rows[0] for gpus in (Gpus(1, 2, 2**30), Gpus(1, 4, 2**30))
    )
    assert (four.mesh, four.batch, four.batch_per_gpu) == ((2, 2), 16, 8)
    per_block = max(
        sum(p.numel() * 4 for p in block.parameters() if p.requires_grad)
        for block in Experiment(small()).outline.blocks  # type: ignore[union-attr]
    )
    assert four.traffic_bytes == 2 * per_block * 1 // 2
    assert four.peak == predict(small("train.resident=active", "train.batch_size=8")).peak + per_block
    assert one.traffic_bytes == 0
    # Groups of two are on one machine, or not.
    assert plan_gpus(Predictor(small()), Gpus(2, 2, 2**30), batch=False).rows[0].network_bytes == 0
    apart = plan_gpus(Predictor(small()), Gpus(4, 1, 2**30), batch=False)
    assert apart.rows[0].network_bytes == four.traffic_bytes
    assert apart.rows[1].network_bytes == apart.rows[1].traffic_bytes > 0


def test_one_gpu_is_told_to_hold_one_block_at_a_time() -> None:
    plan = plan_gpus(Predictor(small()), Gpus(1, 1, 2**30), batch=False)
    assert plan.changes == {"train.resident": "active"}  # one process trains all blocks in turn
    assert plan.rows[0].peak == predict(small("train.resident=active")).peak < predict(small()).peak
    assert plan_gpus(Predictor(small("train.resident=active")), Gpus(1, 1, 2**30), batch=False).changes == {}


def test_the_fewest_blocks_that_fit_and_their_largest_batch() -> None:
    wide = ["model.config.hidden_size=128", "train.batch_size=4"]
    peaks = {many: predict(small(*wide, f"blocks.num_blocks={many}", "train.resident=active")).peak for many in (2, 4)}
    assert peaks[4] < peaks[2]
    between = Gpus(1, 2, (peaks[2] + peaks[4]) // 2)
    plan = plan_gpus(Predictor(small(*wide)), between)
    assert (plan.rows[0].blocks, plan.rows[0].mesh, plan.rows[0].fits) == (4, (2, 1), True)
    assert plan.changes == {"blocks.num_blocks": 4}
    assert plan.largest_batch is not None
    assert plan.largest_batch >= 4
    nothing = plan_gpus(Predictor(small(*wide)), Gpus(1, 2, 2**20))
    assert (nothing.rows[0].fits, nothing.largest_batch) == (False, None)


def test_what_cannot_be_shared_is_refused() -> None:
    def plan(*overrides: str, gpus: int = 2) -> Any:
        return plan_gpus(Predictor(small(*overrides)), Gpus(1, gpus, 2**30), batch=False)

    with pytest.raises(ValueError, match=r"the layers make 2, 4 blocks: give another number of GPUs"):
        plan(gpus=7)
    with pytest.raises(ValueError, match="set method to diffusionblocks"):
        plan("method=end-to-end")
    with pytest.raises(ValueError, match=r"blocks.shared = joint: .* set blocks.shared to replicated or frozen"):
        plan("blocks.shared=joint")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [part for each in [*SMALL, "blocks.num_blocks=2"] for part in ("--set", each)]
    path = tmp_path / "plan.json"
    assert main(["plan", str(VIT), *sets, "--gpus", "4x1GiB", "--vary", "blocks", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "4 GPUs of 1.00 GiB" in out
    assert f"torchrun --nproc-per-node 4 -m diffusionblocks train {shlex.join([str(VIT), *sets])}\n" in out
    assert [row["method"] for row in json.loads(path.read_text())["plan"]["rows"]] == ["blocks", "ddp", "fsdp2"]
    assert main(["plan", str(VIT), *sets, "--gpus", "2x2x1GiB", "--vary", "blocks"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("run it"))
    assert "on each machine" in line
    assert "--rdzv-backend c10d --rdzv-endpoint FIRST:29500" in line  # else each waits at its own
    assert line.endswith(" --out SHARED")
    assert main(["plan", str(VIT), *sets, "--gpus", "4x1GiB", "--budget", "1GiB"]) == 2
    assert "leave --budget out" in capsys.readouterr().err
