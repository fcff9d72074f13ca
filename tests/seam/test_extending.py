"""What docs/extending.md says works from a package of the user's own, which touches none of our source."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import convert, noise_batch, seeded, toy_batch, train_a_little
from torch import Tensor
from transformers import Data2VecVisionConfig, Data2VecVisionForImageClassification

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.data import ImageData
from diffusionblocks.data.data_config import DATA
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.tasks.task import _SECTIONS, TASKS
from diffusionblocks.families import ClassifierFamily
from diffusionblocks.families.family import FAMILIES
from diffusionblocks.noise import NOISE_PROCESSES
from diffusionblocks.sampling import SOLVERS, calls

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "dit" / "digits.yaml"
VIT = ROOT / "recipes" / "vit" / "digits.yaml"


def section(title: str) -> str:
    """The first code of a section of the page."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.search(rf"^## {title}$.*?```python\n(.*?)```", page, re.S | re.M)[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package made of the page's code, imported as a user would; afterwards nothing of it is registered."""
    folder = tmp_path / "site" / "my_blocks"
    folder.mkdir(parents=True)
    (folder / "noise.py").write_text(section("A noise process"))
    (folder / "solver.py").write_text(section("A solver"))
    (folder / "ink.py").write_text(section("A task"))
    (folder / "family.py").write_text(section("A family"))
    (folder / "__init__.py").write_text("from . import family, ink, noise, solver\n")
    for registry in (NOISE_PROCESSES, SOLVERS, FAMILIES, DATA, TASKS, _SECTIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(str(folder.parent))
    yield importlib.import_module("my_blocks")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_blocks"]:
        del sys.modules[name]


def test_a_process_is_short() -> None:
    assert len(section("A noise process").strip().splitlines()) < 60


def test_a_model_trains_saves_loads_and_samples_with_a_user_s_process_and_solver(
    package: ModuleType, tmp_path: Path
) -> None:
    model = convert("dit", layers=3, noise={"kind": "cosine", "lowest": 0.01}, overlap=0.1)
    assert type(model.noise) is package.noise.Cosine
    assert model.partition.boundaries == pytest.approx([0.01, 0.01 + 0.988 / 3, 0.01 + 2 * 0.988 / 3, 0.998])
    before = model.loss(noise_batch(32), 1, seeded()).mean().item()
    train_a_little(model, noise_batch)
    assert model.loss(noise_batch(32), 1, seeded()).mean().item() < before
    model.eval().save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model").eval()
    assert (loaded.noise, loaded.partition) == (model.noise, model.partition)
    options = {"steps": 5, "solver": "adams-bashforth", "seeds": [7, 8]}
    drawn = loaded.sample([0, 1], **options)
    assert drawn.isfinite().all()
    assert torch.equal(drawn, model.sample([0, 1], **options))
    assert not torch.allclose(drawn, loaded.sample([0, 1], steps=5, seeds=[7, 8]))  # Euler's is another


def test_recipes_take_both_by_name(package: ModuleType) -> None:
    overrides = ["blocks.noise.kind=cosine", "blocks.noise.lowest=0.05", "evaluate.solver=[adams-bashforth]"]
    recipe = load_recipe(RECIPE, [*overrides, "evaluate.grid=[uniform]"])
    assert recipe.blocks.noise == package.noise.Cosine(lowest=0.05)
    assert load_recipe(RECIPE, overrides).model_dump(mode="json")["blocks"]["noise"]["lowest"] == 0.05
    with pytest.raises(ValueError, match=r"blocks\.noise\.lowst: no such field"):
        load_recipe(RECIPE, ["blocks.noise.kind=cosine", "blocks.noise.lowst=0.05"])
    with pytest.raises(ValueError, match=r"blocks\.noise: 0 < lowest < highest < 1 must hold, got 2"):
        load_recipe(RECIPE, ["blocks.noise.kind=cosine", "blocks.noise.lowest=2.0"])


def test_the_command_line_trains_and_measures_with_both(package: ModuleType, tmp_path: Path) -> None:
    evaluate = "{solver: [adams-bashforth], grid: [uniform], steps: [3], samples: 4, features: null, grid_images: 4}"
    settings = ["blocks.noise.kind=cosine", f"evaluate={evaluate}", "trunk=null", "train.steps=2", "device=cpu"]
    sets = [word for setting in [*settings, "train.warmup_steps=0"] for word in ("--set", setting)]
    assert main(["train", str(RECIPE), "--out", str(tmp_path / "run"), "--quiet", *sets]) == 0
    saved = db.load(tmp_path / "run" / "model")
    assert type(saved.noise) is package.noise.Cosine
    assert (
        main(
            [
                "sample",
                str(RECIPE),
                *sets,
                "--model",
                str(tmp_path / "run" / "model"),
                "--quiet",
                "--solver",
                "adams-bashforth",
                "--count",
                "2",
                "--out",
                str(tmp_path / "samples"),
            ]
        )
        == 0
    )
    assert (tmp_path / "samples" / "grid.png").is_file()


def test_without_the_package_both_are_refused_and_the_message_says_what_to_import(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert("dit", layers=3, noise={"kind": "cosine"}).save_pretrained(tmp_path / "model")
    monkeypatch.delitem(NOISE_PROCESSES._entries, "cosine")
    monkeypatch.delitem(SOLVERS._entries, "adams-bashforth")
    for refused in (
        lambda: db.load(tmp_path / "model"),
        lambda: load_recipe(RECIPE, ["blocks.noise.kind=cosine"]),
        lambda: db.BlocksConfig(noise={"kind": "cosine"}),
    ):
        with pytest.raises(ValueError, match=r"kind = 'cosine' is no noise process.*edm.*import the package"):
            refused()
    with pytest.raises(ValueError, match=r"unknown solver 'adams-bashforth'; allowed: euler, heun, dpmpp-2m"):
        load_recipe(RECIPE, ["evaluate.solver=[adams-bashforth]"])


@pytest.mark.parametrize("kind", ["edm", "flow", "cosine"])
def test_the_solver_is_of_the_order_that_it_is_registered_with(package: ModuleType, kind: str) -> None:
    """On Gaussian data D is linear in z, and the probability flow keeps z over its standard deviation."""
    process = NOISE_PROCESSES[kind]()
    z = torch.randn(16, generator=seeded(), dtype=torch.float64)
    high, low = (0.9, 0.1) if kind != "edm" else (5.0, 0.5)

    def scale(level: float) -> float:
        alpha, sigma = process.alpha_sigma(level)
        return math.hypot(0.5 * alpha, sigma)

    def denoiser(z: Tensor, level: float) -> Tensor:
        return 0.25 * process.alpha_sigma(level)[0] / scale(level) ** 2 * z

    def error(steps: int) -> float:
        levels = [high + (low - high) * i / steps for i in range(steps + 1)]
        landed = SOLVERS["adams-bashforth"](denoiser, scale(high) * z, levels, process)
        return (landed - scale(low) * z).abs().max().item()

    errors = [error(steps) for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(SOLVERS["adams-bashforth"].order, abs=0.2)
    assert calls("adams-bashforth", 7, ends_at_zero=True) == 7


# ---- a task -----------------------------------------------------------------------------------------------

INK = [
    *("data.kind=ink", "evaluate={kind: ink-error, steps: 2}", "device=cpu", "model.config.hidden_size=32"),
    *("model.config.num_hidden_layers=2", "blocks.num_blocks=2", "train.steps=60", "train.warmup_steps=0"),
]


def test_a_task_with_data_of_its_own_trains_saves_loads_and_evaluates_from_a_recipe(
    package: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for text in INK for part in ("--set", text)]
    out = tmp_path / "run"
    assert main(["train", str(VIT), "--out", str(out), "--quiet", *sets]) == 0
    (row,) = json.loads((out / "result.json").read_text())["rows"]
    assert row["error"] < 0.8 * row["error_of_the_mean"]  # it has learned something of the ink
    command = ["evaluate", str(VIT), "--model", str(out / "model"), *sets]
    assert main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [row]
    capsys.readouterr()
    assert main(["sample", str(VIT), "--model", str(out / "model"), *sets]) == 2
    assert "ViTForImageClassification estimates ink: use evaluate" in capsys.readouterr().err
    assert main([*command, "--by-level"]) == 2
    assert "--by-level is for classifiers" in capsys.readouterr().err


def test_a_comparison_prints_the_columns_of_the_task(package: ModuleType, tmp_path: Path) -> None:
    experiment = Experiment(load_recipe(VIT, [*INK, "train.steps=1"]))
    assert "ink error" in compare(experiment, tmp_path, rows=["diffusionblocks"], progress=False)


def test_data_of_a_user_serve_our_tasks_and_the_first_task_is_the_default(package: ModuleType) -> None:
    recipe = load_recipe(VIT, INK[:1])
    assert isinstance(recipe.data, package.ink.InkConfig)
    assert recipe.task.kind == "accuracy"
    data = recipe.data.load("train")
    assert isinstance(data, ImageData)
    assert data.labels.bincount().min() > 100  # deciles of 1,438 images
    with pytest.raises(ValueError, match=r"evaluate\.kind must be accuracy or ink-error for \w+, got bits"):
        load_recipe(VIT, ["evaluate.kind=bits"])
    with pytest.raises(ValueError, match=r"evaluate\.setps: no such field; did you mean steps"):
        load_recipe(VIT, ["evaluate={kind: ink-error, setps: 2}"])
    with pytest.raises(ValueError, match=r"data\.kind: ink is for image models; allowed: topics, text, tokens"):
        load_recipe(ROOT / "recipes" / "text" / "autoregressive_topics.yaml", ["data={kind: ink}"])


def test_a_task_is_registered_once_and_has_a_name(package: ModuleType) -> None:
    with pytest.raises(ValueError, match="task 'ink-error' is registered already"):
        db.register_task(
            type("Again", (package.ink.InkError,), {"section": type("S", (package.ink.InkErrorConfig,), {})})
        )
    with pytest.raises(ValueError, match="give the section a name"):
        db.register_task(type("Nameless", (package.ink.InkError,), {"section": db.EvaluateSection}))
    with pytest.raises(ValueError, match="give the section a name"):
        db.register_data(type("Nameless", (package.ink.DigitsConfig.__mro__[1],), {}))


# ---- registration itself ----------------------------------------------------------------------------------


def test_registration_refuses_what_is_no_process_or_solver_and_taken_names() -> None:
    with pytest.raises(TypeError, match="dataclass on NoiseProcess"):
        db.register_noise_process(int)
    with pytest.raises(ValueError, match="noise process 'edm' is registered already"):
        db.register_noise_process(type("Other", (db.EDM,), {"__dataclass_fields__": db.EDM.__dataclass_fields__}))
    with pytest.raises(TypeError, match="solver 'mine' must be a function, got 3"):
        db.register_solver("mine", 3)
    with pytest.raises(ValueError, match="solver 'euler' is registered already"):
        db.register_solver("euler", lambda *_: None)
    with pytest.raises(ValueError, match="calls_per_step must be >= 1, got 0"):
        db.register_solver("mine", lambda *_: None, calls_per_step=0)
    with pytest.raises(TypeError, match=r"calls_per_step must be a whole number, got 1\.5"):
        db.register_solver("mine", lambda *_: None, calls_per_step=1.5)  # type: ignore[arg-type]
    assert "mine" not in SOLVERS
    with pytest.raises(TypeError, match="register_task takes a subclass"):
        db.register_task(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="Bare lacks target, section, takes, does"):
        db.register_task(type("Bare", (db.Task,), {}))
    with pytest.raises(TypeError, match="register_data takes a subclass"):
        db.register_data(object)  # type: ignore[type-var]


def test_a_process_that_would_load_as_another_is_refused() -> None:
    members = {"_cdf": lambda _, t: t, "_icdf": lambda _, q: q, "alpha": lambda _, t: 1 - t, "sigma": lambda _, t: t}

    def process(frozen: bool = True, **more: Any) -> type:
        return dataclass(frozen=frozen)(type("Mine", (db.GaussianProcess,), members | more))

    with pytest.raises(ValueError, match=r"Mine: give the process a name"):  # no field: it would be saved without
        db.register_noise_process(process(kind="mine"))
    with pytest.raises(TypeError, match=r"Mine: .*frozen=True"):
        db.register_noise_process(process(False, kind="mine", __annotations__={"kind": str}))
    without = process(alpha=db.GaussianProcess.alpha, kind="mine", __annotations__={"kind": str})
    with pytest.raises(TypeError, match="Mine lacks alpha"):
        db.register_noise_process(without)
    with pytest.raises(ValueError, match=r"told of level 0, c_noise, is not finite; give precondition anew, or levels"):
        process(kind="mine", __annotations__={"kind": str})()
    assert "mine" not in NOISE_PROCESSES
    with pytest.raises(ValueError, match="Sharper is not the noise process that is registered as kind = 'edm'"):
        db.BlocksConfig(noise=type("Sharper", (db.EDM,), {})())


# ---- a family ------------------------------------------------------------------------------------------------


def data2vec() -> Data2VecVisionForImageClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    return Data2VecVisionForImageClassification(Data2VecVisionConfig(**sizes, image_size=8, patch_size=4, num_labels=4))


def test_a_model_of_a_user_s_family_trains_saves_loads_and_predicts(package: ModuleType, tmp_path: Path) -> None:
    model = db.convert(data2vec(), db.BlocksConfig(num_blocks=3))
    assert type(model.family) is package.family.Data2VecVisionFamily
    data = toy_batch(64, seed=1)
    before = model.loss(data, 0, seeded()).mean().item()
    train_a_little(model, toy_batch)
    model.eval()
    assert model.loss(data, 0, seeded()).mean().item() < before
    model.save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model")
    probabilities = loaded.predict(data["pixel_values"], generator=seeded()).probabilities
    assert torch.equal(probabilities, model.predict(data["pixel_values"], generator=seeded()).probabilities)
    with torch.no_grad():  # a conversion that never trained is the original again
        original, again = data2vec().eval(), db.convert(data2vec()).export_initialisation().eval()
        assert torch.equal(again(data["pixel_values"]).logits, original(data["pixel_values"]).logits)


def test_a_saved_model_of_a_family_that_nobody_registered_is_refused(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.convert(data2vec()).save_pretrained(tmp_path / "model")
    monkeypatch.delitem(FAMILIES._entries, "Data2VecVisionForImageClassification")
    with pytest.raises(
        ValueError, match=r"unknown model class 'Data2VecVisionForImageClassification'.* import the package"
    ):
        db.load(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"cannot convert Data2VecVisionForImageClassification.* docs/extending.md, 'A family'"
    ):
        db.convert(data2vec())


def test_what_is_registered_is_checked(package: ModuleType) -> None:
    family = package.family.Data2VecVisionFamily
    with pytest.raises(ValueError, match="Data2VecVisionForImageClassification is registered already"):
        db.register_family(type("Again", (family,), {}))
    with pytest.raises(TypeError, match=r"a subclass of diffusionblocks\.families\.Family, got 3"):
        db.register_family(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="Bare lacks classes, library, layers"):
        db.register_family(type("Bare", (ClassifierFamily,), {}))
