"""Weights that are not finite are no model: after the last step, in a checkpoint, on saving, loading, merging,
branching, and in a pretrained folder."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building_helpers import CLASSES, saved
from helpers import convert, seeded, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import pretrained_source
from diffusionblocks.data import ImageBatches, ImageData
from diffusionblocks.evaluation.teachers import load_teacher
from diffusionblocks.families import pretrained
from diffusionblocks.training import Diverged, EndToEnd, TrainConfig, Trainer
from diffusionblocks.training.checkpoint import checkpoints


def spoil(file: Path, name: str | None = None, value: float = math.nan) -> str:
    """Put a value into one tensor of a file; its name."""
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    name = name or max(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[-1] = value
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    for index in file.parent.glob("*.json"):  # a folder that fits its digests, as one saved before they were noted
        values = json.loads(index.read_text())
        index.write_text(json.dumps({key: value for key, value in values.items() if key not in ("sha256", "files")}))
    return name


def said(file: Path, name: str) -> str:
    return rf"{re.escape(str(file))}: {re.escape(name)} holds NaN or infinite values; "


# ---- training ----------------------------------------------------------------------------------------------


def trainer(folder: Path | None, kind: str = "replicated", **changes: object) -> Trainer:
    pixels = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    data = ImageData(pixels, torch.arange(24) % 4, ("a", "b", "c", "d"))
    batches = ImageBatches(data, mean=(0.5,) * 3, std=(0.3,) * 3, augment=None, device=torch.device("cpu"))
    values: dict[str, object] = {"steps": 1, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "lr_schedule": "constant"}
    model = EndToEnd(tiny()) if kind == "end-to-end" else convert(num_blocks=3, shared=kind)
    return Trainer(model, batches, TrainConfig.model_validate(values | changes), folder=folder, progress=False)


@pytest.mark.parametrize(("kind", "resident"), [("replicated", "all"), ("replicated", "active"), ("end-to-end", "all")])
def test_what_the_last_step_made_is_looked_at(kind: str, resident: str, tmp_path: Path) -> None:
    trainer(tmp_path / "good", kind, resident=resident).train()  # the positive control
    with pytest.raises(Diverged, match=r"(block 0: network|end-to-end: model)\S+ is NaN or infinite after iteration"):
        # The loss was finite: only the weights that its gradient made are not.
        trainer(tmp_path / "bad", kind, resident=resident, lr=3e38).train()
    assert not checkpoints(tmp_path / "bad" / "checkpoints")
    with pytest.raises(Diverged, match="there is no checkpoint to go back to"):
        trainer(None, kind, resident=resident, lr=3e38).train()


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=4, checkpoint_every=3)
    run.train(until=3)
    again = trainer(tmp_path, steps=4, checkpoint_every=3)
    step = again.stepper.run

    def overflow(*args: object) -> None:
        step(*args)  # type: ignore[arg-type]
        again.units[0].own[0].data.fill_(math.inf)

    again.stepper.run = overflow  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"block 0: network\S* is NaN or infinite.*last good checkpoint is .*000000003"):
        again.train(until=4)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["iteration-000000003"]


@pytest.mark.parametrize("state", ["ema", "exp_avg_sq"])
def test_averages_and_moments_are_looked_at(state: str) -> None:
    run = trainer(None, ema_decay=0.9)
    run.train()
    owner = run.sets["block 1"]
    (owner.ema[2] if state == "ema" else owner.moments[2][state]).view(-1)[0] = math.inf
    name = next(n for n, p in run.units[1].module.named_parameters() if p is owner.parameters[2])
    with pytest.raises(Diverged, match=rf"block 1: the \w.* of {re.escape(name)} is NaN"):
        run._stop_if_state_diverged()


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    (saved_at,) = checkpoints(tmp_path / "checkpoints")
    name = spoil(saved_at / "block-1.safetensors")
    with pytest.raises(ValueError, match=said(saved_at / "block-1.safetensors", name) + f"remove .*{saved_at.name}"):
        trainer(tmp_path).train()


# ---- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_saved_model_is_loaded_merged_and_branched_only_if_finite(value: float, tmp_path: Path) -> None:
    model = convert(num_blocks=1)
    model.save_pretrained(tmp_path / "m")
    db.load(tmp_path / "m")
    db.merge([tmp_path / "m"], tmp_path / "merged")
    name = spoil(tmp_path / "m" / "block-00.safetensors", value=value)
    message = said(tmp_path / "m" / "block-00.safetensors", name) + "the training diverged"
    with pytest.raises(ValueError, match=message):
        db.load(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        db.merge([tmp_path / "m"], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with torch.no_grad():
        model.block(0).get_parameter(name).view(-1)[0] = value
    for refuse in (lambda: model.save_pretrained(tmp_path / "other"), lambda: db.branch(model, 2)):
        with pytest.raises(ValueError, match=rf"(block 0|the trunk): {re.escape(name)} holds NaN or infinite"):
            refuse()
    assert not (tmp_path / "other").exists()


def test_a_model_is_converted_only_if_finite() -> None:
    model = tiny()
    with torch.no_grad():
        model.classifier.weight[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"ViTForImageClassification: classifier.weight holds NaN"):
        db.convert(model)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: build(pretrained_source(CLASSES["vit"], path, {}, seed=0), db.BlocksConfig()),
        lambda path: pretrained(CLASSES["vit"], path, {}),
    ],
    ids=["block by block", "whole"],
)
def test_a_pretrained_folder_is_read_only_if_finite(read: Callable[[Path], object], tmp_path: Path) -> None:
    saved(tmp_path, "vit")
    read(tmp_path)
    name = spoil(tmp_path / "model.safetensors", "classifier.weight")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*: {name} holds NaN or infinite values"):
        read(tmp_path)


def test_a_teacher_is_loaded_only_if_finite(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    load_teacher(tmp_path)
    spoil(tmp_path / "model.safetensors", "lm_head.weight")
    with pytest.raises(ValueError, match=r"the teacher .*: lm_head.weight holds NaN"):
        load_teacher(tmp_path)
