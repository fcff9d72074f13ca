"""What a machine has free, what a run keeps on its host, and the changes that make a run fit."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from diffusionblocks.common.machine import free_host_memory, group_limits, host_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.planning import MARGIN, Predictor, predict
from diffusionblocks.planning.counting import count_waiting
from diffusionblocks.planning.machine_fit import check_device, check_fits, check_host
from diffusionblocks.planning.planner import cheapest_changes, with_changes

VIT = Path(__file__).parents[2] / "recipes" / "vit" / "digits.yaml"
SMALL = ["model.config.hidden_size=64", "model.config.num_hidden_layers=3", "model.config.intermediate_size=128"]


def small(*overrides: str, device: str = "cuda") -> Recipe:
    return load_recipe(VIT, [f"device={device}", *SMALL, *overrides])


def test_every_control_group_counts_without_what_it_caches(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, most, used in ((tmp_path / "outer", "1000", "700"), (inner, "max", "50"), (tmp_path, "5000", "900")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(used + "\n")
    (tmp_path / "outer" / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    process = tmp_path / "cgroup"
    process.write_text("1:name=systemd:/else\n0::/outer/inner\n")
    assert list(group_limits(tmp_path, process)) == [(1000, 550), (5000, 900)]
    process.write_text("0::/\n")
    assert list(group_limits(tmp_path, process)) == [(5000, 900)]
    assert list(group_limits(tmp_path / "none", tmp_path / "none")) == []
    assert 0 < free_host_memory() <= host_memory()


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("shared", ["replicated", "joint"])
def test_waiting_blocks_are_those_of_a_real_trainer(offload: str, shared: str) -> None:
    changes = ["train.resident=active", f"train.offload={offload}", f"blocks.shared={shared}", "train.ema_decay=0.9"]
    experiment = Experiment(small(*changes, device="cpu"))
    trainer = experiment.trainer(progress=False)
    counted = count_waiting(trainer.units, experiment.recipe.train)
    tensors = sum(len(group.state()) for group in trainer.sets.values()) + 200 * len(trainer.units)
    assert counted <= trainer.residency.host_bytes < counted + 256 * tensors  # each lies at a multiple of 256 bytes
    assert count_waiting(trainer.units, small(device="cpu").train) == 0


def test_the_cheapest_changes_fit_each_for_itself() -> None:
    recipe = small("train.batch_size=64", device="cpu")  # without cuBLAS's workspace, larger than all of it
    peak = predict(recipe).peak
    with pytest.raises(ValueError, match="free: what fits, the cheapest first: --set") as told:
        check_device(Predictor(recipe), int(peak * 0.9))
    fits = cheapest_changes(Predictor(recipe), int(peak * 0.9))
    assert 1 <= len(fits) <= 3
    assert fits[0].changes == {"train.resident": "active"}
    for fit in fits:
        assert fit.options in str(told.value)
        assert predict(with_changes(recipe, fit.changes)).peak * (1 + MARGIN) <= peak * 0.9
    parts = [fit.changes for fit in fits if "train.accumulation" in fit.changes]
    assert all(each["train.batch_size"] * each["train.accumulation"] == 64 for each in parts)
    with pytest.raises(ValueError, match="no memory optimisation makes it fit"):
        check_device(Predictor(recipe), 2**16)


def test_within_the_error_it_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor(small(device="cpu"))
    peak = predictor.forecast().ledger.peak
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        check_device(predictor, int(peak * (1 + MARGIN)) + 1)
        assert not caplog.records
        check_device(predictor, peak)
    assert "within the prediction's error" in caplog.text


def test_a_host_that_is_too_small_is_told_what_would_take_less() -> None:
    predictor = Predictor(small("train.resident=active", "data.placement=host"), 100)
    host = predictor.host_bytes()
    assert host.data == 100 * (64 + 8)
    assert host.waiting > 0
    check_host(predictor, host.total)
    with pytest.raises(ValueError, match=r"the host has .* free, .*--set train.offload=disk") as told:
        check_host(predictor, host.total - 1)
    for setting in re.findall(r"--set (\S+?),? or|--set (\S+?)\. ", str(told.value)):
        name, value = "".join(setting).rstrip(",").split("=")
        less = Predictor(with_changes(predictor.recipe, {name: value}), 100).host_bytes()
        assert less.total < host.total
    assert Predictor(small("train.resident=active", device="cpu")).host_bytes().total == 0
    least = ["train.resident=active", "train.offload=disk", "train.optimizer=adamw-8bit"]
    with pytest.raises(ValueError, match="take less with fewer layers, or more blocks"):
        check_host(Predictor(small(*least), 0), 1)


def test_a_cpu_is_not_predicted() -> None:
    check_fits(Experiment(small(device="cpu")))
