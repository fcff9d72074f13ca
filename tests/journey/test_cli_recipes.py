"""Recipes by name and by the folder of a run: what ships is listed, and a run needs no recipe beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
from commands import DIGITS, RECIPES, TINY, TINY_VIT, VIT

from diffusionblocks.cli import main
from diffusionblocks.experiments.identity import describe_run
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.run import write_recipe
from diffusionblocks.experiments.shipped_recipes import shipped_recipes


def test_every_recipe_that_ships_is_listed_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(RECIPES.rglob("*.yaml"))
    assert [line.split()[0] for line in lines] == [str(file.relative_to(RECIPES).with_suffix("")) for file in files]
    assert all(len(line.split()) > 4 for line in lines)
    for line, file in zip(lines, files, strict=True):  # whole sentences, each in a line for tools that read lines
        name, about = line.split(maxsplit=1)
        comment = " ".join(part.removeprefix("#").strip() for part in file.read_text().split("\nname:")[0].splitlines())
        assert f"{about}." in f"{comment}.", name
        assert not about.endswith("...")
    assert main(["recipes", "vit/digits"]) == 0
    assert capsys.readouterr().out == Path(VIT).read_text()


@pytest.mark.parametrize("name", ["vit/digits", "vit/digits.yaml", "recipes/vit/digits.yaml"])
def test_a_recipe_that_ships_is_known_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == load_recipe(VIT)


def test_a_file_of_the_users_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "digits").write_text(Path(VIT).read_text().replace("vit-digits", "mine"))
    assert load_recipe("vit/digits").name == "mine"
    (tmp_path / "cats.yaml").write_text(Path(VIT).read_text().replace("vit-digits", "cats"))
    assert load_recipe("cats").name == "cats", "as `init cats` was given the name"


@pytest.mark.parametrize(
    ("place", "message"), [("vit/digitz", "did you mean vit/digits"), (".", "a run's recipe.json")]
)
def test_no_recipe_there_is_told_with_the_fix(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", place]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ("runs/dit-digits", "no run at runs/dit-digits: train it first: diffusionblocks train dit/digits"),
        (
            "runs/dit-digit",
            "no run at runs/dit-digit (did you mean dit-digitz?): train it first: diffusionblocks train RECIPE --out "
            "runs/dit-digit",
        ),
        (
            "mine/vit-digits",
            "no run at mine/vit-digits: train it first: diffusionblocks train vit/digits --out mine/vit-digits",
        ),
        (
            "my runs/dit-digits",
            "no run at my runs/dit-digits: train it first: diffusionblocks train dit/digits --out 'my ",
        ),
        (
            "runs/vit-digits-compare",
            "no run at runs/vit-digits-compare: train it first: diffusionblocks compare vit/digits",
        ),
        ("vit-digits", "no recipe and no run at vit-digits, and no recipe of that name ships"),
        ("runs", "runs holds no run itself, but 1 inside: name one of them, as runs/trained"),
        (
            "runs/dit-digitz",
            "runs/dit-digitz holds no run: train one there first (diffusionblocks train RECIPE --out runs/dit-digitz)",
        ),
    ],
)
@pytest.mark.parametrize("verb", [["sample"], ["predict", "a.png"], ["evaluate"], ["export", "--block=0", "--out=o"]])
def test_a_run_that_is_not_trained_is_told_how(
    verb: list[str],
    run: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dit-digitz").mkdir(parents=True)
    (tmp_path / "runs" / "trained").mkdir()
    (tmp_path / "runs" / "trained" / "recipe.json").touch()
    assert main([verb[0], run, *verb[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {command}")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_what_a_run_leaves_is_its_recipe(name: str, tmp_path: Path) -> None:
    """Read back it trains the same, and describes the same run."""
    recipe = load_recipe(name)
    write_recipe(recipe, tmp_path)
    again = load_recipe(tmp_path)
    assert describe_run(again, None) == describe_run(recipe, None)
    assert again.evaluate == recipe.evaluate
    assert again.blocks.target is not None  # its defaults may become others


def test_an_old_run_means_what_it_meant() -> None:
    """It was written before the likelihood could be added, and says nothing of it."""
    run = Path(__file__).parents[1] / "old_artefacts" / "runs" / "vit-stopped"
    assert "likelihood" not in json.loads((run / "recipe.json").read_text())["blocks"]["target"]
    target = load_recipe(run).blocks.target
    assert target is not None
    assert not target.adds_likelihood


def test_a_run_is_evaluated_and_inspected_without_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [*TINY_VIT, "--set", "train.steps=2", "--set", "evaluate.combine=[mean]"]
    assert main(["train", "vit/digits", "--out", "mine", "--quiet", *changes]) == 0
    capsys.readouterr()
    assert main(["evaluate", "mine", "--json", "again.json"]) == 0
    first, again = (json.loads(Path(name).read_text())["rows"] for name in ("mine/result.json", "again.json"))
    (first, again) = ([row["accuracy"] for row in rows] for rows in (first, again))
    assert first == again
    capsys.readouterr()
    assert main(["inspect", "mine"]) == 0
    assert "3 layers" in capsys.readouterr().out
    assert main(["train", "mine", "--quiet"]) == 0  # which has ended
    assert not Path("runs").exists()


def test_a_run_is_sampled_without_its_recipe(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sample", str(run), "--count", "2", "--out", str(tmp_path), "--quiet"]) == 0
    assert len(list((tmp_path / "images").iterdir())) == 2


# ---- what was meant ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "vit/digits"], "did you mean train?"),
        (["train", "vit/digits", "--queit"], "did you mean --quiet?"),
        (["train", "vit/digits", "--set", "trian.lr=1"], "trian: no such field; did you mean train or"),
        (["train", "vit/digits", "--set", "train.lr_schedule=cosin"], "(did you mean cosine?)"),
        (["train", "vit/digits", "--set", "data.kind=digit"], "(did you mean digits?)"),
        (["train", "dit/digits", "--set", "blocks.noise.kind=flwo"], "(did you mean flow?)"),
        (["train", "dit/digits", "--set", "evaluate.solver=[huen]"], "(did you mean heun?)"),
        (["train", "vit/digits", "--set", "model.type=ViTForImageClassifcation"], "did you mean ViTForImage"),
        (["compare", "vit/digits", "--rows", "end-to-end-5"], "did you mean end-to-end-4"),
        (["ablate", "vit/digits", "--preset", "overlaps"], "(did you mean overlap?)"),
        (
            ["ablate", "noprop/cifar100", "--rows", "noprop-dt", "--set", "train.epochs=5"],
            "row noprop-dt sets train.epochs = 150 itself, which stays; write --set rows.noprop-dt.train.epochs=5",
        ),
        (
            ["ablate", "noprop/cifar100", "--rows", "noprop-dt", "--set", "train={epochs: 5, lr: 1.0e-3}"],
            "row noprop-dt sets train.epochs = 150 itself, which stays",
        ),
    ],
)
def test_what_was_meant_is_said(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # of the parser
        assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---- phases --------------------------------------------------------------------------------------------------------


def test_phases_are_announced_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [*TINY, "--set", "train.log_every=2"]
    assert main(["train", DIGITS, "--out", str(tmp_path / "loud"), *changes]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.split(":")[0].isalpha() and ": step " not in line]
    assert lines == [
        "trunk: 6 steps",
        "train: each block 4 steps, 12 iterations in all",
        f"save: {tmp_path / 'loud' / 'model'}",
        "evaluate: samples",
    ]
    for last in ("trunk: step 6 of 6", "block 2: step 4 of 4"):  # no terminal: lines in place of the bar
        assert re.search(rf"^{last}, loss \d.*, \S+ left$", printed.err, re.MULTILINE)
    assert "trunk:" not in printed.out
    assert main(["train", DIGITS, "--out", str(tmp_path / "quiet"), "--quiet", *changes]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("shtab") is None:
        assert main(["completion", shell]) == 2
        assert "pip install 'diffusionblocks[completion]'" in capsys.readouterr().err
        return
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("doctor", "--dry-run", "--by-level"))
    assert "vit/digits" in script, "recipes that ship are completed by their names"
