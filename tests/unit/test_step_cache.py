"""Steps that were followed before are read from files, and from no file that is not theirs, whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from diffusionblocks.common.digests import seal
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.planning import Predictor, StepCache, forecast
from diffusionblocks.planning.step_cache import code_of, surroundings
from diffusionblocks.planning.timeline import StepMoments

RECIPES = Path(__file__).parents[2] / "recipes"


def small(*overrides: str) -> Recipe:
    few = ["device=cpu", "model.config.num_hidden_layers=2", "model.config.hidden_size=48", "blocks.num_blocks=2"]
    return load_recipe(RECIPES / "vit" / "digits.yaml", [*few, "model.config.intermediate_size=64", *overrides])


def predicted(recipe: Recipe, folder: Path) -> tuple[int, list[StepMoments]]:
    """How many steps were followed, and the moments at two sizes of the batch."""
    said: list[str] = []
    made = Predictor(recipe, 0, say=said.append, cache=StepCache(folder)).forecast()
    return len(said), [moments for size in (1, 96) for moments in made.of(size).moments.values()]


def without_cache(recipe: Recipe) -> list[StepMoments]:
    made = forecast(recipe, num_examples=0)
    return [moments for size in (1, 96) for moments in made.of(size).moments.values()]


def test_a_step_is_followed_once_for_all_processes(tmp_path: Path) -> None:
    right = without_cache(small())
    assert predicted(small(), tmp_path / "new") == (1, right)
    assert predicted(small(), tmp_path / "new") == (0, right)
    assert predicted(small("train.batch_size=7", "train.optimizer=adamw-8bit"), tmp_path / "new") == (0, right)


def test_what_decides_on_a_step_makes_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert predicted(small(), tmp_path)[0] == 1
    others = ["model.config.intermediate_size=80", "train.precision=bfloat16", "train.activation_checkpointing=true"]
    for other in [*others, "device=cuda"]:
        assert predicted(small(other), tmp_path) == (1, without_cache(small(other)))
    monkeypatch.setenv("TORCH_COMPILE_WITH_OTHER_RULES", "1")
    surroundings.cache_clear()
    assert predicted(small(), tmp_path)[0] == 1
    monkeypatch.undo()
    surroundings.cache_clear()
    assert predicted(small(), tmp_path)[0] == 0
    assert len(list(tmp_path.glob("*.json"))) == 6


def _other_bytes(entry: Path) -> None:
    values = json.loads(entry.read_text())
    values["log"]["events"][0][1] += 1
    entry.write_text(json.dumps(values))


def _sealed(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def write(entry: Path) -> None:
        values = {name: value for name, value in json.loads(entry.read_text()).items() if name != "sha256"}
        change(values)
        entry.write_text(json.dumps(seal(values)))

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.write_text(""),
        lambda entry: entry.write_text(entry.read_text()[:-40]),
        lambda entry: entry.write_text("[1, 2]"),
        lambda entry: entry.write_bytes(b"\xff\xfe\x00"),
        lambda entry: entry.write_text(json.dumps({"sha256": None})),
        _other_bytes,
        _sealed(lambda values: values.update(step={"of": "another"})),
        _sealed(lambda values: values.update(log={"events": [["NEW", -1]], "gradient_bytes": 0, "times": []})),
        _sealed(lambda values: values.update(log={"events": [["LOST", 1]], "gradient_bytes": 0, "times": []})),
        _sealed(lambda values: values.update(log={"events": [["NEW", 1.5]], "gradient_bytes": 0, "times": []})),
        _sealed(lambda values: values.update(log=[])),
        _sealed(lambda values: values.pop("log")),
    ],
    ids=[
        *("empty", "cut", "list", "bytes", "no-log", "changed", "another-step"),
        *("negative", "unknown", "fraction", "log-list", "log-gone"),
    ],
)
def test_an_entry_that_is_not_whole_is_written_anew(
    whole: tuple[Path, list[StepMoments]], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder, right = whole
    shutil.copytree(folder, tmp_path / "steps")
    (entry,) = (tmp_path / "steps").glob("*.json")
    before = entry.read_bytes()
    damage(entry)
    assert predicted(small(), tmp_path / "steps") == (1, right)
    assert entry.read_bytes() == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepMoments]]:
    folder = tmp_path_factory.mktemp("steps")
    return folder, predicted(small(), folder)[1]


def test_the_entry_of_another_step_is_not_read(tmp_path: Path) -> None:
    predicted(small(), tmp_path)
    (first,) = tmp_path.glob("*.json")
    predicted(small("model.config.intermediate_size=80"), tmp_path)
    (second,) = set(tmp_path.glob("*.json")) - {first}
    shutil.copy(second, first)
    assert predicted(small(), tmp_path) == (1, without_cache(small()))


def test_a_step_of_a_class_that_is_not_known_has_no_entry() -> None:
    class Own(nn.Linear):
        pass

    assert code_of(nn.Sequential(nn.Linear(2, 2))) == {}
    assert code_of(nn.Sequential(nn.Linear(2, 2), Own(2, 2))) is None
    holding = nn.Sequential(nn.Linear(2, 2))
    holding.rule = Own  # type: ignore[assignment]
    assert code_of(holding) is None


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert predicted(small(), tmp_path / "file" / "steps") == (1, without_cache(small()))


def test_the_newest_entries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusionblocks.planning.step_cache._MOST", 2)
    for age, size in enumerate((64, 80, 96)):
        predicted(small(f"model.config.intermediate_size={size}"), tmp_path)
        for entry in tmp_path.glob("*.json"):
            os.utime(entry, (entry.stat().st_atime, 1000.0 + age)) if entry.stat().st_mtime > 2000 else None
    assert [predicted(small(f"model.config.intermediate_size={size}"), tmp_path)[0] for size in (96, 80, 64)] == [
        0,
        0,
        1,
    ]


def test_the_cache_lies_where_the_platform_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert StepCache.of_user().folder == tmp_path / "diffusionblocks" / "steps"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert StepCache.of_user().folder == Path.home() / ".cache" / "diffusionblocks" / "steps"
