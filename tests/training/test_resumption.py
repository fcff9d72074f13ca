"""A run goes on only as what it was: every field that matters, and the data, are compared and named."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import few_digits, listing, vit_config, vit_recipe

from diffusionblocks.data import ImageData
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.training.checkpoint import checkpoints

CONFIG = vit_config(2)


def recipe(**changes: Any) -> Recipe:
    sections = {
        "blocks": {"num_blocks": 2},
        "train": {"steps": 2, "batch_size": 4},
    }
    return vit_recipe(CONFIG, sections, changes)


@pytest.fixture(scope="module")
def data() -> dict[str, ImageData]:
    return {"train": few_digits()}


@pytest.fixture(scope="module")
def left(data: dict[str, ImageData], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs, by method."""
    folders = {}
    for method in ("diffusionblocks", "end-to-end"):
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        run(recipe(method=method), folders[method], data)
    return folders


def run(made: Recipe, folder: Path, data: dict[str, ImageData], **options: Any) -> runs.RunResult:
    return runs.train(Experiment(made, data), folder, progress=False, measure=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"mean": [0.5]}}, r"data.mean = \[0.3\], this run has \[0.5\]"),
        ({"data": {"std": [0.5]}}, "data.std"),
        ({"data": {"augment": {"flip": True}}}, "data.augment.flip = False, this run has True"),
        ({"model": {"config": CONFIG | {"hidden_dropout_prob": 0.1}}}, "model.config.hidden_dropout_prob"),
        ({"blocks": {"noise": {"sigma_max": 40.0}}}, "blocks.noise"),
        ({"blocks": {"target": {"token": "replace-cls"}}}, "blocks.target"),
        ({"blocks": {"overlap": 0.2}}, "blocks.overlap = 0.05, this run has 0.2"),
        ({"blocks": {"shared": "frozen"}}, "blocks.shared"),
        ({"blocks": {"seed": 1}}, "blocks.seed"),
        ({"train": {"lr": 1e-3}}, "train.lr"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    changes: dict[str, Any], field: str, method: str, left: dict[str, Path], data: dict[str, ImageData]
) -> None:
    before = listing(left[method])
    with pytest.raises(ValueError, match=field) as error:
        run(recipe(method=method, **changes), left[method], data)
    for words in ("set it back", "--restart", "another folder"):
        assert words in str(error.value)
    assert listing(left[method]) == before


def test_a_run_does_not_go_on_by_the_other_method(left: dict[str, Path], data: dict[str, ImageData]) -> None:
    with pytest.raises(ValueError, match="method = diffusionblocks, this run has end-to-end"):
        run(recipe(method="end-to-end"), left["diffusionblocks"], data)


def replaced(data: ImageData, what: str) -> ImageData:
    images, labels, names = data.images.clone(), data.labels.clone(), list(data.class_names)
    if what == "pixel":
        images[7, 0, 3, 3] += 1
    elif what == "labels":
        labels[[0, 1]] = labels[[1, 0]]
    elif what == "names":
        names[0], names[1] = names[1], names[0]
    elif what == "order":
        images, labels = images.flip(0), labels.flip(0)
    elif what == "number":
        images, labels = images[:-1], labels[:-1]
    return dataclasses.replace(data, images=images, labels=labels, class_names=tuple(names))


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("pixel", "data.content"),
        ("labels", "data.content"),
        ("names", "data.classes"),
        ("order", "data.content"),
        ("number", "data.examples = 40, this run has 39"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    what: str, field: str, left: dict[str, Path], data: dict[str, ImageData]
) -> None:
    with pytest.raises(ValueError, match=field):
        run(recipe(), left["diffusionblocks"], {"train": replaced(data["train"], what)})


def test_what_changes_nothing_may_differ(left: dict[str, Path], data: dict[str, ImageData]) -> None:
    harmless = recipe(
        name="other",
        data={"placement": "host"},
        train={"resident": "active", "log_every": 7, "checkpoint_every": 1},
        evaluate={"steps": [2]},
    )
    same = {"train": replaced(data["train"], "nothing")}
    assert run(harmless, left["diffusionblocks"], same).iterations == 4


def make_first_version(folder: Path) -> None:
    """Bring a run's folder to what version 0.1.0 left: the recipe beside checkpoints that note no run, no coverage."""
    for checkpoint in checkpoints(folder / "checkpoints"):
        values = json.loads((checkpoint / "state.json").read_text())
        del values["sha256"]
        del values["run"]
        (checkpoint / "state.json").write_text(json.dumps(values))
    noted = json.loads((folder / "recipe.json").read_text())
    for section, field in (("noise", "coverage"), ("target", "likelihood")):
        (noted["blocks"][section] or {}).pop(field, None)
    (folder / "recipe.json").write_text(json.dumps(noted))


@pytest.mark.parametrize("noise", [None, {"p_mean": 0.0}])
def test_a_run_of_an_earlier_version_goes_on_with_what_it_noted(
    noise: dict[str, Any] | None, data: dict[str, ImageData], tmp_path: Path
) -> None:
    of_then = {"target": {"likelihood": "learned"}}  # networks learned it, and no recipe said so
    told_all = recipe(blocks={"noise": (noise or {}) | {"coverage": [0, 1]}} | of_then)
    run(told_all, tmp_path, data)  # as version 0.1.0 trained
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(blocks={"noise": noise}).model_dump(mode="json")))
    make_first_version(tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.overlap"):  # the recipe beside them says so
        run(recipe(blocks={"overlap": 0.2, "noise": noise} | of_then), tmp_path, data)
    with pytest.raises(ValueError, match=r"with --set blocks\.target\.likelihood=learned, .*--restart"):
        run(recipe(blocks={"noise": noise}), tmp_path, data)
    with pytest.raises(ValueError, match=r"--set blocks\.noise\.coverage=\[0,1\]"):
        run(recipe(blocks={"noise": noise} | of_then), tmp_path, data)
    with pytest.raises(ValueError, match=r"blocks\.noise\.p_mean"):
        run(recipe(blocks={"noise": {"p_mean": 0.1, "coverage": [0, 1]}} | of_then), tmp_path, data)
    assert run(told_all, tmp_path, {"train": replaced(data["train"], "pixel")}).iterations == 4  # nothing says


def test_an_end_to_end_run_of_an_earlier_version_knows_no_levels(data: dict[str, ImageData], tmp_path: Path) -> None:
    run(recipe(method="end-to-end"), tmp_path, data)
    make_first_version(tmp_path)
    assert run(recipe(method="end-to-end"), tmp_path, data).iterations == 2


def test_the_index_says_what_blocks_learned_from(left: dict[str, Path]) -> None:
    trained = json.loads((left["diffusionblocks"] / "model" / "diffusionblocks.json").read_text())["trained"]
    assert trained["data"]["examples"] == 40
    assert trained["train"]["seed"] == 0
    assert not {"blocks", "resident", "schedule"} & trained["train"].keys()


def test_data_that_moved_are_the_same(tmp_path: Path, data: dict[str, ImageData]) -> None:
    text = " the quick brown fox jumps over the lazy dog" * 40
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.txt").write_text(text)
    config = {"vocab_size": 27, "sequence_length": 16, "num_layers": 2, "num_attention_heads": 2}
    config |= {"hidden_size": 16, "embedding_size": 8, "mlp_size": 16}

    def of(folder: str, **changes: Any) -> Recipe:
        return parse_recipe(
            {
                "name": "tiny",
                "model": {"type": "MaskedTransformer", "config": config},
                "blocks": {"num_blocks": 2},
                "data": {"kind": "text", "length": 16, "source": str(tmp_path / folder), **changes},
                "train": {"steps": 2, "batch_size": 4},
                "evaluate": {"kind": "bits"},
                "device": "cpu",
            },
            "test",
        )

    runs.train(Experiment(of("here")), tmp_path / "run", progress=False, measure=False)
    shutil.rmtree(tmp_path / "here")
    runs.train(Experiment(of("there")), tmp_path / "run", progress=False, measure=False)
    (tmp_path / "there" / "train.txt").write_text(text.replace("fox", "cat"))
    with pytest.raises(ValueError, match=r"data.content = .*the data were replaced"):
        runs.train(Experiment(of("there")), tmp_path / "run", progress=False, measure=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(iteration=-1), r"state.json: iteration: .*\(got -1\)"),
        (lambda v: v.update(iteration="4"), r"state.json: iteration"),
        (lambda v: v.pop("config"), r"state.json: config"),
        (lambda v: v.update(units=3), r"state.json: units"),
        (lambda v: v.update(seconds=None), r"state.json: seconds"),
        (lambda v: v.update(run=[]), r"state.json: run"),
        (lambda v: v["run"].update(data=3), r"description of the run is damaged"),
        (lambda v: v["run"].pop("train"), r"description of the run is damaged"),
    ],
)
def test_the_state_of_a_checkpoint_is_checked_field_by_field(
    change: Callable[[dict], Any], message: str, left: dict[str, Path], data: dict[str, ImageData], tmp_path: Path
) -> None:
    shutil.copytree(left["diffusionblocks"], tmp_path / "run")
    file = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json"
    values = json.loads(file.read_text())
    del values["sha256"]
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        run(recipe(), tmp_path / "run", data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["recipe.json", "log.jsonl", "result.json"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_place_of_a_runs_file_is_refused_before_anything_is_deleted(
    name: str, resume: bool, tmp_path: Path
) -> None:
    before = tmp_path / "checkpoints" / "iteration-000000001"
    before.mkdir(parents=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(name)} is a folder"):
        runs.train(Experiment(recipe()), tmp_path, resume=resume)
    assert before.is_dir()
