"""Label smoothing and distillation in the trainer: of blocks and end to end, resumed, and where they are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert, seeded, tiny
from torch import nn

import diffusionblocks as db
from diffusionblocks.core.end_to_end import save_end_to_end
from diffusionblocks.core.merging import merge
from diffusionblocks.data import ImageBatches, ImageData, digits
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.models import NoPropCNN
from diffusionblocks.planning.predictor import Predictor
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer
from diffusionblocks.training.ensemble import Ensemble
from diffusionblocks.training.local_learning import LocalConfig, LocalLearning
from diffusionblocks.training.noprop_steps import NoProp

CPU = torch.device("cpu")


def images(n: int = 40) -> ImageData:
    """Four classes, each of a brightness of its own."""
    labels = torch.arange(n) % 4
    pixels = torch.randint(0, 60, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0)) + 60 * labels.view(
        -1, 1, 1, 1
    )
    return ImageData(pixels.to(torch.uint8), labels, tuple("abcd"))


def student(kind: str) -> nn.Module:
    if kind == "ensemble":
        return Ensemble([tiny("vit", seed=seed) for seed in (1, 2)])
    return EndToEnd(tiny("vit", seed=1)) if kind == "end-to-end" else convert("vit", seed=1, num_blocks=3)


def train(kind: str, folder: Path | None = None, *, until: int | None = None, **changes: Any) -> Trainer:
    config = TrainConfig.model_validate({"steps": 4, "batch_size": 8, "lr": 1e-3} | changes)
    batches = ImageBatches(images(), mean=(0.5,) * 3, std=(0.3,) * 3, augment=None, device=CPU)
    trainer = Trainer(student(kind), batches, config, folder=folder, progress=False)
    trainer.train(until=until)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in trainer.model.state_dict().items() if isinstance(value, torch.Tensor)}


def same(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of trained classifiers: blocks, and end to end."""
    folder = tmp_path_factory.mktemp("teachers")
    convert("vit", seed=7, num_blocks=3).save_pretrained(folder / "blocks")
    save_end_to_end(tiny("vit", seed=8), folder / "run" / "model")  # the folder of a run will do
    Ensemble([tiny("vit", seed=seed) for seed in (5, 6)]).save(folder / "ensemble")
    return {"blocks": str(folder / "blocks"), "end-to-end": str(folder / "run"), "ensemble": str(folder / "ensemble")}


@pytest.mark.parametrize("kind", ["blocks", "end-to-end"])
def test_distillation_of_no_weight_is_none_bit_for_bit(kind: str, teachers: dict[str, str]) -> None:
    plain, none = train(kind), train(kind, distill={"teacher": teachers["blocks"], "weight": 0}, label_smoothing=0)
    assert same(plain, none)
    assert not same(plain, train(kind, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [("blocks", "blocks"), ("blocks", "end-to-end"), ("end-to-end", "ensemble"), ("ensemble", "blocks")],
)
def test_a_distilled_run_resumes_exactly(kind: str, teacher: str, teachers: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"distill": {"teacher": [teachers[teacher]], "temperature": 2.0}, "label_smoothing": 0.1}
    whole = train(kind, tmp_path / "whole", **options)
    train(kind, tmp_path / "apart", until=2, **options)
    assert same(whole, train(kind, tmp_path / "apart", **options))
    assert not same(whole, train(kind, label_smoothing=0.1))
    other = {"distill": {"teacher": [teachers[teacher]], "temperature": 1.0}, "label_smoothing": 0.1}
    with pytest.raises(ValueError, match=r"train.distill = .*'temperature': 2.0.*, this run has"):
        train(kind, tmp_path / "apart", **other)


@pytest.mark.parametrize("kind", ["blocks", "end-to-end"])
def test_a_student_comes_to_say_what_its_teacher_says(kind: str, teachers: dict[str, str]) -> None:
    """Labels do not count here, and the teacher is untrained: only it can have taught its answers."""
    teacher = EndToEnd(tiny("vit", seed=8)).eval()
    pixels = ImageBatches(images(), mean=(0.5,) * 3, std=(0.3,) * 3, augment=None, device=CPU)(torch.arange(40), None)

    def divergence(model: nn.Module) -> float:
        answers = [each.predict(pixels["pixel_values"]).logits for each in (model, teacher)]  # type: ignore[operator]
        return nn.functional.kl_div(*answers, log_target=True, reduction="batchmean").item()

    before = divergence(student(kind))
    distilled = train(kind, steps=40, distill={"teacher": teachers["end-to-end"], "weight": 1}, gradient_clip=None)
    assert divergence(distilled.model) < before / 4


def test_the_mean_of_several_teachers_is_taught(teachers: dict[str, str]) -> None:
    trainer = train("end-to-end", until=0, distill={"teacher": list(teachers.values())})
    generators = [seeded(3) for _ in range(2)]
    taught = trainer.stepper.batches(torch.arange(6), generators[0])
    blocks, whole, ensemble = trainer.teachers
    assert isinstance(blocks, db.DiffusionBlocks)
    images = taught["pixel_values"]
    expected = blocks.predict(images, generator=generators[1]).logits + whole(images) + ensemble(images)
    torch.testing.assert_close(
        taught["teacher_logits"].log_softmax(-1), (expected / 3).log_softmax(-1), atol=1e-5, rtol=1e-5
    )
    assert not any(p.requires_grad for teacher in trainer.teachers for p in teacher.parameters())
    assert not any(teacher.training for teacher in trainer.teachers)


def test_the_trunk_is_distilled_too_and_its_memory_counts_the_teachers(teachers: dict[str, str]) -> None:
    from diffusionblocks.evaluation.memory import step_memory

    plain, taught = (
        step_memory(train("end-to-end", until=0, **options))[0]
        for options in ({}, {"distill": {"teacher": teachers["end-to-end"]}})
    )
    assert taught.parameters == 2 * plain.parameters


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("noprop", {"label_smoothing": 0.1}, "of labels: a DenoisingStep has another; leave it out"),
    ("text", {"label_smoothing": 0.1}, "train.label_smoothing = 0.1 is for losses that are cross-entropies of labels"),
    ("text", {"distill": {"teacher": "anywhere"}}, "train.distill is for losses that are cross-entropies of labels"),
    ("learned", {"distill": {"teacher": "anywhere"}}, "set blocks.target.likelihood to added, or leave it out"),
    ("blocks", {"distill": {"teacher": "nowhere"}}, "train.distill.teacher = nowhere: no model is there"),
    ("blocks", {"distill": {"teacher": 400 * "x"}}, r"train.distill.teacher = x+\.\.\.: no model is there"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSALS)
def test_what_cannot_be_smoothed_or_distilled_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    model = {
        "noprop": lambda: NoProp(NoPropCNN(image_size=8, num_labels=4, num_layers=2, hidden_size=16, num_filters=2)),
        "text": lambda: convert("masked", num_blocks=3),
        "learned": lambda: convert("vit", num_blocks=3, target={"likelihood": "learned"}),
        "blocks": lambda: convert("vit", num_blocks=3),
    }[kind]()
    batches = ImageBatches(images(), mean=(0.5,) * 3, std=(0.3,) * 3, augment=None, device=CPU)
    config = TrainConfig.model_validate({"steps": 1, "batch_size": 8} | changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(model, batches, config, progress=False)


def test_a_teacher_of_other_labels_or_without_context_logits_is_refused(tmp_path: Path) -> None:
    save_end_to_end(tiny("vit", num_labels=3), tmp_path / "three")
    convert("vit", num_blocks=3, target={"likelihood": "learned"}).save_pretrained(tmp_path / "learned")
    with pytest.raises(ValueError, match="is a model of labels 3, this recipe's model is one of 4"):
        train("blocks", distill={"teacher": str(tmp_path / "three")})
    with pytest.raises(ValueError, match=r"holds blocks of target.likelihood: learned, which have no context logits"):
        train("blocks", distill={"teacher": str(tmp_path / "learned")})
    LocalLearning(tiny("vit"), LocalConfig(), 3).save(tmp_path / "local")
    with pytest.raises(ValueError, match=r"local is of method: local, whose modules cannot teach; name blocks, an ens"):
        train("blocks", distill={"teacher": str(tmp_path / "local")})


@pytest.mark.parametrize("value", [1e308, 1e-300])
def test_a_temperature_that_float32_cannot_follow_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"temperature\n.*should be (less|greater) than or equal"):
        TrainConfig.model_validate({"distill": {"teacher": "a", "temperature": value}})
    with pytest.raises(ValueError, match=r"LocalConfig: temperature: Input should be (less|greater) than or equal"):
        LocalConfig(objective="forward-forward", temperature=value)


# ---- recipes ----------------------------------------------------------------------------------------------------


def recipe(mean: float = 0.3, **train: Any) -> Recipe:
    config = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10, "hidden_size": 16}
    config |= {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {
        "name": "tiny",
        "model": {"type": "ViTForImageClassification", "config": config},
        "blocks": {"num_blocks": 2},
        "data": {"kind": "digits", "mean": [mean]},
        "train": {"steps": 2, "batch_size": 4} | train,
        "device": "cpu",
    }
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def data() -> dict[str, ImageData]:
    whole = digits("train")
    return {"train": ImageData(whole.images[:40].clone(), whole.labels[:40].clone(), whole.class_names)}


def run(recipe: Recipe, folder: Path, data: dict[str, ImageData]) -> None:
    runs.train(Experiment(recipe, data), folder, progress=False, measure=False)


@pytest.mark.parametrize("method", ["diffusionblocks", "ensemble", "end-to-end"])
def test_a_model_of_inputs_of_another_scale_neither_teaches_nor_is_measured(
    method: str, data: dict[str, ImageData], tmp_path: Path
) -> None:
    """Its answers would be wrong, and nothing would tell."""
    teacher = recipe().model_copy(update={"method": method})
    run(teacher, tmp_path / "teacher", data)
    distill = {"teacher": str(tmp_path / "teacher")}
    run(recipe(distill=distill), tmp_path / "same", data)
    with pytest.raises(ValueError, match=r"teacher = .*learned from inputs of data.mean = \[0.3\], and the recipe has"):
        run(recipe(mean=0.5, distill=distill), tmp_path / "other", data)
    other = recipe(mean=0.5).model_copy(update={"method": method})
    Experiment(teacher).load(tmp_path / "teacher" / "model")
    with pytest.raises(
        ValueError, match=r"model learned from inputs of data.mean = \[0.3\], and the recipe has \[0.5\]"
    ):
        Experiment(other).load(tmp_path / "teacher" / "model")


def test_a_run_goes_on_with_its_teacher_alone_and_blocks_of_one_teacher_are_merged(
    data: dict[str, ImageData], tmp_path: Path
) -> None:
    for seed in (1, 2):
        run(recipe(seed=seed), tmp_path / f"teacher-{seed}", data)
    shutil.copytree(tmp_path / "teacher-1", tmp_path / "copy")
    teachers = [tmp_path / name for name in ("teacher-1", "copy", "teacher-2")]
    for number, teacher in enumerate(teachers):
        run(recipe(distill={"teacher": str(teacher)}, blocks=[min(number, 1)]), tmp_path / f"job-{number}", data)
    merge([tmp_path / "job-0", tmp_path / "job-1"], tmp_path / "merged")  # the same teacher, at another place
    with pytest.raises(ValueError, match=r"train.teachers"):
        merge([tmp_path / "job-0", tmp_path / "job-2"], tmp_path / "mixed")
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(tmp_path / "teacher-2", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"train.teachers"):
        run(recipe(distill={"teacher": str(tmp_path / "copy")}, blocks=[1]), tmp_path / "job-1", data)


def test_a_run_without_its_teacher_is_refused_before_anything_is_written(
    data: dict[str, ImageData], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"train.distill.teacher = .*nowhere: no model is there"):
        run(recipe(distill={"teacher": str(tmp_path / "nowhere")}), tmp_path / "run", data)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "train.label_smoothing"),
        ({"distill": {"teacher": []}}, "train.distill.teacher"),
        ({"distill": {"teacher": "x", "weight": 2}}, "train.distill.weight"),
        ({"distill": {"teacher": "x", "temperature": 0}}, "train.distill.temperature"),
        ({"distill": {}}, "train.distill.teacher"),
        ({"distill": {"teacher": "a\0b"}}, "train.distill.teacher"),
    ],
)
def test_values_out_of_range_are_refused_with_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_the_memory_of_teachers_is_not_predicted_and_plan_says_so() -> None:
    with pytest.raises(ValueError, match=r"set train.distill to null"):
        Predictor(recipe(distill={"teacher": "x"}))
    Predictor(recipe(distill={"teacher": "x", "weight": 0}))
