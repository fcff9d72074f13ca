"""The command line as a user meets it: the digits journey, interruption and resume, errors that help."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import TINY_VIT, VIT, sets
from helpers import listing
from safetensors.torch import load_file
from transformers import ViTForImageClassification

import diffusionblocks as db
from diffusionblocks.cli import main

DIGITS = str(Path(__file__).parents[2] / "recipes" / "vit" / "digits.yaml")
TINY = [
    *("--set", "model.config.num_hidden_layers=3"),
    *("--set", "model.config.hidden_size=16"),
    *("--set", "train.batch_size=16"),
    *("--set", "train.warmup_steps=0"),
    *("--set", "evaluate.steps=[1, 3]"),
    *("--set", "evaluate.seeds=[1, 2]"),
]


def test_compare_leaves_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", DIGITS, "--out", str(tmp_path), "--quiet", "--set", "train.steps=4", *TINY]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["name"], row["layers"], row["blocks"], row["iterations"]) for row in rows] == [
        ("end-to-end", 3, 1, 4),
        ("end-to-end", 1, 1, 4),
        ("end-to-end", 1, 1, 12),
        ("ensemble", 3, 3, 12),
        ("diffusionblocks", 3, 3, 12),
    ]
    for row in rows:
        assert 0.0 <= row["test_accuracy"] <= 1.0
        assert row["peak_memory_bytes"] > row["memory"]["parameters"] + row["memory"]["optimizer"] > 0
        assert row["seconds"] > 0
        assert row["parameters_trained"] > 0
    whole, short, _, _, blocks = rows
    assert short["peak_memory_bytes"] < whole["peak_memory_bytes"]
    assert blocks["parameters_trained"] < whole["parameters_trained"]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "diffusionblocks" in printed
    assert "peak memory of a step" in printed


def test_the_digits_are_learned(tmp_path: Path) -> None:
    """A small golden run on real data, block by block; the whole recipe runs in `make demo`."""
    arguments = ["--quiet", "--set", "train.steps=250", "--set", "train.batch_size=64", *TINY[:2]]
    arguments += [
        "--set",
        "model.config.hidden_size=48",
        "--set",
        "evaluate.combine=[mean]",
        "--set",
        "evaluate.steps=[3]",
    ]
    assert main(["train", DIGITS, "--out", str(tmp_path), *arguments]) == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["accuracy"] > 0.8
    losses: dict[str, list[float]] = {}
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses.setdefault(record["unit"], []).append(record["loss"])
    assert set(losses) == {"block 0", "block 1", "block 2"}
    assert all(values[-1] < values[0] for values in losses.values())
    model = db.load(tmp_path / "model")
    assert model.partition.num_blocks == 3


def test_accuracy_by_level_shows_where_z_gives_the_label_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", DIGITS, "--out", str(tmp_path), "--quiet", "--set", "train.steps=2", *TINY]) == 0
    path = tmp_path / "levels.json"
    more = ["--model", str(tmp_path / "model"), "--by-level", "--json", str(path), "--set", "evaluate.limit=100"]
    figure = tmp_path / "levels.png"
    assert main(["evaluate", DIGITS, *TINY, *more, "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "nearest" in printed
    assert "context_cross_entropy" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(path.read_text())["by_level"]
    assert round(rows[0]["nearest"] * 100, 6).is_integer()  # of 100 images
    assert [row["block"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert rows[0]["level"] == pytest.approx(69.86, abs=0.01)  # the quantile 0.999 of levels centred at e
    assert rows[0]["nearest"] < 0.2
    assert rows[-1]["nearest"] > 0.5
    assert main(["evaluate", DIGITS, *TINY, *more, "--every-block"]) == 0
    every = json.loads(path.read_text())["by_level"]
    assert [row["block"] for row in every] == [0, 1, 2] * 12
    assert [row for row in every if row["own_level"]] == rows
    for option in (["--every-block"], ["--figure", str(figure)]):
        command = ["evaluate", DIGITS, *TINY, "--model", str(tmp_path / "model"), *option]
        capsys.readouterr()
        assert main(command) == 2
        assert f"{option[0]} needs --by-level" in capsys.readouterr().err


def test_ways_to_combine_are_measured_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", DIGITS, "--out", str(tmp_path), "--quiet", "--set", "train.steps=2", *TINY]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["combine"], row["steps"], row["seeds"]) for row in rows] == [
        (combine, steps, seeds)
        for combine in ("mean", "product", "probabilities", "chain")
        for steps in (1, 3)
        for seeds in (1, 2)
    ]
    assert all(row["nll"] > 0 and 0 <= row["ece"] <= 1 for row in rows)
    learned = ["--set", "blocks.target.likelihood=learned", "--quiet", "--set", "train.steps=2", *TINY]
    capsys.readouterr()
    assert main(["train", DIGITS, "--out", str(tmp_path / "b"), *learned]) == 2
    error = capsys.readouterr().err
    assert "evaluate.combine = 'mean' needs" in error
    assert "use evaluate.combine = [chain]" in error
    assert not (tmp_path / "b" / "log.jsonl").exists()
    chain = ["--set", "evaluate.combine=null", "--set", "evaluate.steps=null", "--set", "evaluate.seeds=null"]
    assert main(["train", DIGITS, "--out", str(tmp_path / "b"), *learned, *chain]) == 0
    (row,) = json.loads((tmp_path / "b" / "result.json").read_text())["rows"]
    assert (row["combine"], row["steps"], row["seeds"]) == ("chain", 1, 8)


def test_sigterm_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    def arguments(out: Path) -> list[str]:
        more = ["--set", "train.steps=60", "--set", "train.log_every=1000", "--set", "evaluate.limit=20"]
        return ["train", DIGITS, "--out", str(out), "--quiet", *TINY, *more]

    command = [sys.executable, "-m", "diffusionblocks", *arguments(tmp_path / "a")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "resume" in errors
    (checkpoint,) = (tmp_path / "a" / "checkpoints").iterdir()
    assert 0 < json.loads((checkpoint / "state.json").read_text())["iteration"] < 180
    assert not (tmp_path / "a" / "model").exists()
    for name in ("a", "b"):
        assert main(arguments(tmp_path / name)) == 0
    for file in sorted((tmp_path / "a" / "model").glob("*.safetensors")):
        resumed, whole = load_file(file), load_file(tmp_path / "b" / "model" / file.name)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_branching_replaces_neither_the_trunk_nor_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--set", "blocks.num_blocks=1", "--set", "model.config.num_hidden_layers=1", "--set", "train.steps=1"]
    assert main(["train", DIGITS, "--out", str(tmp_path / "run"), "--quiet", *TINY, *one]) == 0
    (tmp_path / "file").write_text("mine")
    trunk = tmp_path / "run" / "model"
    for out, message in (
        (trunk, "which is branched"),
        (tmp_path / "run", "which is branched"),
        (tmp_path / "file", "is a file"),
    ):
        assert main(["branch", str(trunk), "--blocks", "2", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert db.load(trunk).partition.num_blocks == 1


def test_the_control_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of another shape that fails while it saves leaves the older control, config and weights."""
    arguments = ["train", DIGITS, "--out", str(tmp_path), "--quiet", *TINY, "--set", "method=end-to-end"]
    arguments += ["--set", "train.steps=1", "--set", "evaluate.limit=20"]
    assert main(arguments) == 0
    before = listing(tmp_path / "model")
    real = ViTForImageClassification.save_pretrained

    def failing(model: ViTForImageClassification, folder: Path) -> None:
        model.config.save_pretrained(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", failing)
    shallower = ["--restart", "--set", "model.config.num_hidden_layers=1"]
    with contextlib.suppress(OSError):
        assert main([*arguments, *shallower]) != 0
    assert listing(tmp_path / "model") == before
    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", real)
    assert main([*arguments, *shallower]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("method", "units"),
    [
        ("ensemble", ["member 0", "member 1", "member 2"]),
        ("local", ["module 0", "module 1", "module 2"]),
        ("end-to-end", ["end-to-end"]),
    ],
)
def test_inspect_shows_what_a_baseline_trains(
    method: str, units: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["inspect", "vit/digits", "--set", f"method={method}"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[0].strip() for line in lines[4:]] == units
    assert main([*options, "--figure", str(tmp_path / "levels.png")]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_inspect_draws_the_partition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", DIGITS, "--figure", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "0.3333" in out
    owners = next(line for line in out.splitlines() if line.startswith("block    2"))
    assert sorted(set(owners.removeprefix("block").strip())) == ["0", "1", "2"]
    assert owners.rstrip().endswith("0")
    assert "optimizer" in out


def test_tensorboard_receives_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    steps = ["--set", "train.steps=2", "--set", "train.log_every=1"]
    assert main(["train", DIGITS, "--out", str(tmp_path), "--quiet", "--tensorboard", *TINY, *steps]) == 0
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no recipe and no run at nowhere.yaml"),
        (["train", DIGITS, "--set", "train.lr=-1"], "train.lr: Input should be greater than 0 (got -1)"),
        (["train", DIGITS, "--set", "train.lrr=1"], "train.lrr: no such field; did you mean lr?"),
        (["train", DIGITS, "--set", "train.lr"], "--set wants field.name=value, got 'train.lr'"),
        (["train", DIGITS, "--set", "train.lr=[1"], "--set train.lr: not YAML"),
        (["train", DIGITS, "--set", "name.x=1"], "name is 'vit-digits', not a section"),
        (["train", DIGITS, "--set", "train.epochs=1"], "give either train.steps or train.epochs"),
        (["train", DIGITS, "--set", "method=magic"], "'diffusionblocks', 'end-to-end'"),
        (["train", DIGITS, "--set", "data.kind=video"], "'digits', 'images'"),
        (["train", DIGITS, "--set", "model.type=BertModel"], "supported: AuraFlowTransformer2DModel"),
        (["train", DIGITS, "--set", "model.config.hiden_size=3"], "knows no ['hiden_size']"),
        (["train", DIGITS, "--set", "model.config.attn_implementation=some/kernel"], "'some/kernel'; allowed: eager"),
        (["train", DIGITS, "--set", "model.config.num_labels=7"], "num_labels = 7, the data has 10 classes"),
        (["train", DIGITS, "--set", "model.config.image_size=16"], "the data has 1x8x8"),
        (["train", DIGITS, "--set", "blocks.num_blocks=5"], "12 layers do not divide into num_blocks = 5"),
        (["train", DIGITS, "--set", "train.batch_size=5000"], "one step needs batch_size x accumulation = 5000"),
        (
            ["train", DIGITS, "--set", "evaluate.steps=[0]"],
            "evaluate.steps: Input should be greater than or equal to 1 (got 0)",
        ),
        (
            ["train", DIGITS, "--set", "blocks.noise.p_std=0"],
            "blocks.noise.p_std: p_std must be a finite number > 0, got 0",
        ),
        (["train", DIGITS, "--set", "blocks.noise.sigma=0"], "blocks.noise.sigma"),
        (["train", DIGITS, "--set", "blocks.target.embedding=learned"], "needs shared = joint"),
        (["evaluate", DIGITS, "--model", "nowhere"], "no model at nowhere"),
        (["compare", DIGITS, "--rows", "end-to-end-5"], "unknown rows ['end-to-end-5']"),
        (["compare", DIGITS, "--set", "method=end-to-end"], "compare starts from method: diffusionblocks"),
    ],
)
def test_bad_input_names_the_value_and_the_fix(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_of_another_method_starts_anew_in_the_folder_of_each(tmp_path: Path) -> None:
    """What is left in `model` is the new one's alone, whatever the older was."""
    methods = ["local", "diffusionblocks", "ensemble", "diffusionblocks", "end-to-end", "diffusionblocks"]
    for method in methods:
        quick = [*TINY_VIT, *sets(train__steps=1, evaluate__limit=10, method=method)]
        assert main(["train", VIT, "--out", str(tmp_path), "--quiet", "--restart", *quick]) == 0
        names = {path.name for path in (tmp_path / "model").iterdir()}
        assert ("diffusionblocks.json" in names) == (method == "diffusionblocks")
        if method == "diffusionblocks":
            assert not [
                name for name in names if name.startswith(("module", "member", "local", "ens", "files", "model"))
            ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", DIGITS, "--out", str(tmp_path), "--set", "device=cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_model_of_the_other_method_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", DIGITS, "--out", str(tmp_path), "--quiet", "--set", "train.steps=1", *TINY]) == 0
    arguments = ["evaluate", DIGITS, "--model", str(tmp_path / "model"), "--set", "method=end-to-end", *TINY]
    assert main(arguments) == 2
    assert "holds a model of method diffusionblocks" in capsys.readouterr().err


def test_local_data_is_found_by_the_environment_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusionblocks.experiments.recipe import load_recipe

    recipe = Path(DIGITS).with_name("cifar100.yaml")
    monkeypatch.delenv("DIFFUSIONBLOCKS_DATA", raising=False)
    assert load_recipe(recipe).data.location() == "uoft-cs/cifar100"  # type: ignore[union-attr]
    (tmp_path / "cifar100").mkdir()
    monkeypatch.setenv("DIFFUSIONBLOCKS_DATA", str(tmp_path))
    assert load_recipe(recipe).data.location() == str(tmp_path / "cifar100")  # type: ignore[union-attr]
    chosen = load_recipe(recipe, ["data.source=elsewhere"])
    assert chosen.data.location() == "elsewhere"  # type: ignore[union-attr]


def test_help_does_not_wait_for_libraries_of_models() -> None:
    """They take seconds to import; what converts a model of theirs does it."""
    slow = ("transformers.models.", "diffusers", "torchao")
    asked = f"import sys, diffusionblocks.cli; print(*(name for name in sys.modules if name.startswith({slow})))"
    printed = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert printed.split() == []
