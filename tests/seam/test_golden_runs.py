"""Small runs of every kind of model give what they gave at commit 7e9a180: weights, samples, measures, plans, levels.

`golden_runs.json` holds the values. On the processor and torch that made them, trained weights are compared bit for bit
by their digests; elsewhere losses, measures and samples are compared to a tolerance, and bits not, for an optimizer's
first steps turn rounding into steps. Numbers are compared whatever they are called. To note a change that is meant, run
this file as a script from the root of the project.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusionblocks as db

if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import command, digests, lacks, machine, numbers, outputs

pytestmark = pytest.mark.slow

NOTED = Path(__file__).with_name("golden_runs.json")
OLD = Path(__file__).parents[1] / "old_artefacts"
SHIPPED = Path(__file__).parents[2] / "recipes"

#: What networks of that time learned.
LEARNED = "blocks.target.likelihood=learned"

#: Runs: the recipe of tests/old_artefacts/recipes, and settings.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vit": ("vit", (LEARNED, "train.steps=8", "train.log_every=2", "evaluate.limit=20")),
    "vit-joint": (
        "vit",
        (LEARNED, "train.steps=4", "evaluate.limit=20", "blocks.shared=joint", "train.schedule=sequential"),
    ),
    "vit-fit": (
        "vit",
        (
            LEARNED,
            "train.steps=4",
            "evaluate.limit=20",
            "fit.steps=80",
            "fit.rounds=2",
            "fit.grid=9",
            "fit.examples=64",
        ),
    ),
    "vit-added": ("vit", ("train.steps=8", "train.log_every=2", "evaluate.limit=20")),
    "vit-end-to-end": ("vit", ("train.steps=8", "train.log_every=2", "evaluate.limit=20", "method=end-to-end")),
    "dit": ("dit", ("train.steps=8", "train.log_every=2", "trunk.steps=6")),
    "masked": (
        "masked",
        (
            "train.steps=8",
            "train.log_every=2",
        ),
    ),
    "llama": (
        "llama",
        (
            LEARNED,
            "train.steps=8",
            "train.log_every=2",
        ),
    ),
    "llama-added": ("llama", ("train.steps=8", "train.log_every=2", "evaluate.combine=chain")),
}
#: What is planned: a shipped recipe, and options.
PLANS = {
    "vit": ("vit/digits.yaml",),
    "dit": ("dit/digits.yaml", "--set", "train.resident=active"),
    "masked": ("text/masked_topics.yaml", "--set", "train.activation_checkpointing=true"),
    "llama": ("text/autoregressive_topics.yaml", "--set", "train.loss_chunk=8"),
}
_CLOCK = ("second", "time", "wall")


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {n: _without_clocks(v) for n, v in value.items() if not any(part in n for part in _CLOCK)}
    return [_without_clocks(part) for part in value] if isinstance(value, list) else value


def run(name: str, folder: Path) -> dict[str, Any]:
    """What a run gave. Its recipes are read in the folder of the old artefacts, where the text is."""
    kind, settings = RUNS[name]
    given = [part for setting in settings for part in ("--set", setting)]
    with _in(OLD):
        assert command("train", f"recipes/{kind}.yaml", "--out", folder, "--quiet", *given) == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    values: dict[str, Any] = {
        "measures": numbers(_without_clocks(result["rows"])),
        "iterations": result["iterations"],
        "losses": numbers([line["loss"] for line in log]),
    }
    if name == "vit-end-to-end":
        (file,) = (folder / "model").glob("*.safetensors")
        return {**values, "weights": [digests(load_file(file))]}
    model = db.load(folder / "model")
    given_back = outputs(kind, model)
    quantiles = getattr(model.noise, "quantiles", None)
    return {
        **values,
        "weights": [digests(block) for block in model.blocks],
        "boundaries": list(model.partition.boundaries),
        "quantiles": None if quantiles is None else list(quantiles),
        "outputs": {n: value.double().flatten()[:64].tolist() for n, value in given_back.items()},
        "output_digests": {n: digests({n: value})[0] for n, value in given_back.items()},
    }


def plan(name: str, folder: Path) -> list[float]:
    """The byte counts of a plan."""
    recipe, *more = PLANS[name]
    file = folder / "plan.json"
    assert command("plan", SHIPPED / recipe, "--examples", 1000, "--json", file, *more) == 0
    return numbers(_without_clocks(json.loads(file.read_text())["rows"]))


def levels() -> dict[str, list[float]]:
    """Levels at even quantiles of each noise process, and quantiles at these levels."""
    knots = (0.01, 0.1, 0.5, 2.0, 50.0)
    values = {}
    for name, noise in {
        "edm": db.EDM(),
        "edm-high": db.EDM(p_mean=1.0, p_std=0.8, sigma_max=40.0),
        "edm-fitted": db.EDM(sigma_min=0.01, sigma_max=50.0, quantiles=knots),
        "masking-linear": db.Masking(),
        "masking-cosine": db.Masking(schedule="cosine"),
    }.items():
        even = torch.linspace(0, 1, 17, dtype=torch.float64)
        # The second of each pair is an older name.
        icdf, cdf = (next(getattr(noise, n) for n in pair if hasattr(noise, n)) for pair in _QUANTILES)
        at = icdf(even)
        values[name] = [*at.tolist(), *cdf(at).tolist()]
    return values


_QUANTILES = (("icdf", "level_of"), ("cdf", "mass_of"))


def noted() -> dict[str, Any]:
    return json.loads(NOTED.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    before = noted()
    here, there = machine(), before["machine"]
    if here["torch"].split("+")[0] != there["torch"].split("+")[0]:
        pytest.skip(f"torch is {here['torch']}, and initial weights are those of {there['torch']}")
    same = here == there
    now, then = run(name, tmp_path / "run"), before["runs"][name]
    assert now["iterations"] == then["iterations"]
    assert lacks(now["losses"], then["losses"], 0.0 if same else 1e-2) == []
    if same:
        assert lacks(now["measures"], then["measures"], 0.0) == []
        assert now["weights"] == then["weights"]
        assert now.get("output_digests") == then.get("output_digests")
    if "outputs" in then:
        assert now["outputs"].keys() == then["outputs"].keys()
        assert now["boundaries"] == pytest.approx(then["boundaries"], rel=1e-6 if name != "vit-fit" else 1e-2)
        assert (now["quantiles"] is None) == (then["quantiles"] is None) == (name != "vit-fit")
        for output in then["outputs"]:
            if output != "text":  # one token that is drawn otherwise changes all after it
                assert now["outputs"][output] == pytest.approx(then["outputs"][output], rel=1e-2, abs=1e-2), output


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_counts_the_bytes_that_it_counted(name: str, tmp_path: Path) -> None:
    assert lacks(plan(name, tmp_path), noted()["plans"][name], 0.0) == []


def test_levels_stand_where_they_stood() -> None:
    before = noted()["levels"]
    now = levels()
    assert now.keys() == before.keys()
    for name, values in now.items():
        assert values == pytest.approx(before[name], rel=1e-9, abs=1e-12), name


def test_a_number_that_changed_is_noticed(tmp_path: Path) -> None:
    assert lacks([1.0, 2.0], [1.0, 1.0], 0.0) == [1.0], "each number serves once"
    assert lacks([1.0], [1.0 + 1e-9], 0.0) == [1.0 + 1e-9]
    then = noted()["runs"]["masked"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNS, "masked", ("masked", (*RUNS["masked"][1], "train.seed=1")))
        now = run("masked", tmp_path / "run")
    assert lacks(now["losses"], then["losses"], 1e-3)
    assert now["weights"] != then["weights"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        values = {
            "machine": machine(),
            "levels": levels(),
            "runs": {name: run(name, Path(place) / name) for name in RUNS},
            "plans": {name: plan(name, Path(place)) for name in PLANS},
        }
    NOTED.write_text(json.dumps(values, indent=1) + "\n")
