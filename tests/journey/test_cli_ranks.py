"""Ranks that measure and sample together (gloo): the numbers and files of one process, bit for bit."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIGITS, RECIPES, TINY, TINY_VIT, VIT, sets
from helpers import listing, run_like_torchrun

from diffusionblocks.cli import main
from diffusionblocks.core.model import DiffusionBlocks
from diffusionblocks.evaluation.real_features import KEPT_REFERENCES
from diffusionblocks.training.ranks import Ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive"
)

LLAMA, MASKED, RECURRENT = (
    str(RECIPES / "text" / f"{name}_topics.yaml") for name in ("autoregressive", "masked", "recurrent")
)
TEXT = {
    "device": "cpu",
    "model__config__hidden_size": 16,
    "data__length": 16,
    "train__batch_size": 8,
    "train__warmup_steps": 0,
    "evaluate__limit": 20,
    "evaluate__batch_size": 6,
}
WRITES = {"evaluate__samples": 5, "evaluate__prompt_length": 6, "evaluate__new_tokens": 6, "evaluate__levels": 3}
CLASSIFIER = [*TINY_VIT, *sets(evaluate__limit=20, evaluate__batch_size=6, evaluate__steps="[1, 3]")]

#: recipe, changes, and further options of `evaluate`
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "blocks of a classifier": (
        VIT,
        [*CLASSIFIER, *sets(evaluate__seeds="[1, 2]", evaluate__combine="[chain, mean]", evaluate__flip="true")],
        ["--by-level", "--every-block"],
    ),
    "ensemble": (VIT, [*CLASSIFIER, *sets(method="ensemble")], []),
    "images": (
        DIGITS,
        [*TINY, *sets(trunk="null", evaluate__samples=20, evaluate__batch_size=6, evaluate__reference_images=40)],
        [],
    ),
    "masked text": (
        MASKED,
        sets(
            **TEXT,
            model__config__sequence_length=16,
            model__config__mlp_size=32,
            model__config__num_layers=3,
            evaluate__times=2,
            evaluate__steps=4,
        ),
        [],
    ),
    "continued text": (
        LLAMA,
        sets(**TEXT, **WRITES, model__config__intermediate_size=32, model__config__num_hidden_layers=2),
        [],
    ),
    "recurrence": (
        RECURRENT,
        sets(
            **TEXT,
            **WRITES,
            model__config__mlp_size=32,
            model__config__mean_recurrence=2,
            method="end-to-end",
        ),
        [],
    ),
}
SPEEDS = ("images_per_second", "tokens_per_second")


def measured(file: Path) -> Any:
    """What `evaluate --json` left, but the speeds."""
    values = json.loads(file.read_text())
    for row in values["rows"]:
        for name in SPEEDS:
            row.pop(name, None)
    return {name: values.get(name) for name in ("rows", "by_level", "model")}


def over_ranks(
    folder: Path,
    arguments: list[str],
    *,
    ranks: int = 3,
    statuses: tuple[int, ...] = (),
    before: Callable[[int], list[str] | None] = lambda rank: None,
) -> list[str]:
    """Run a command by so many ranks; returns what each said on standard error.

    Args:
        folder: for that; new.
        arguments: of the command.
        ranks: how many.
        statuses: their exit statuses, where they do not all end well.
        before: called first, with the rank; may return other arguments.
    """
    folder.mkdir()
    return run_like_torchrun(
        lambda rank: main(before(rank) or arguments), folder, ranks=ranks, timeout=60, statuses=statuses
    )


def counted(rank: int) -> None:
    """Let a rank say what it hands to the first one."""
    hand = Ranks.hand

    def telling(ranks: Ranks, name: str, content: bytes) -> None:
        print(f"handed {name}", file=sys.stderr)
        hand(ranks, name, content)

    Ranks.hand = telling  # type: ignore[method-assign]


@pytest.mark.parametrize("what", CASES)
def test_ranks_measure_and_sample_what_one_process_does(what: str, tmp_path: Path, features: Path) -> None:
    recipe, changes, options = CASES[what]
    run = tmp_path / "run"
    assert main(["train", recipe, "--out", str(run), "--quiet", *changes, *sets(train__steps=1)]) == 0
    if what == "images":
        own = shutil.copytree(features, tmp_path / "features", ignore=shutil.ignore_patterns(KEPT_REFERENCES))
        changes = [*changes, *sets(evaluate__features="classifier", evaluate__features_folder=own)]
    command = [recipe, "--model", str(run / "model"), *changes]
    for name, launch in LAUNCHES.items():
        json_file = tmp_path / f"{name}.json"
        for file in (tmp_path / "features").glob(KEPT_REFERENCES):
            file.unlink()  # so that each launch computes the features of the real images
        launch(tmp_path / f"{name} evaluate", ["evaluate", *command, *options, "--json", str(json_file)])
        if what in ("images", "masked text", "continued text"):
            more = ["--count", "14", "--quiet", "--out", str(tmp_path / name)]
            launch(tmp_path / f"{name} sample", ["sample", *command, *more])
    alone, together = measured(tmp_path / "alone.json"), measured(tmp_path / "together.json")
    assert together == alone
    assert alone["rows"]
    handed = [(tmp_path / "together evaluate" / f"rank-{rank}.err").read_text().count("handed") for rank in range(3)]
    assert handed[0] == 0
    assert min(handed[1:]) >= 1  # the work was shared
    if (tmp_path / "alone").exists():
        assert listing(tmp_path / "together") == listing(tmp_path / "alone") != {}


def _alone(folder: Path, arguments: list[str]) -> None:
    assert main(arguments) == 0


LAUNCHES: dict[str, Callable[[Path, list[str]], Any]] = {
    "alone": _alone,
    "together": functools.partial(over_ranks, before=counted),
}


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`evaluate` of a trained classifier, in four batches."""
    out = tmp_path_factory.mktemp("vit")
    changes = [*CLASSIFIER, *sets(parallel__timeout=3)]
    assert main(["train", VIT, "--out", str(out), "--quiet", *changes, *sets(train__steps=1)]) == 0
    return ["evaluate", VIT, *changes, "--model", str(out / "model")]


def in_second_batch(rank: int, event: Callable[[], None]) -> Callable[[int], None]:
    """Let something happen on a rank in its second batch."""
    predict, calls = DiffusionBlocks.predict, itertools.count()

    def eventful(model: DiffusionBlocks, *arguments: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) == rank and next(calls) == 1:
            event()
        return predict(model, *arguments, **options)

    def before(_: int) -> None:
        DiffusionBlocks.predict = eventful  # type: ignore[method-assign]

    return before


def test_what_happens_to_one_rank_ends_all(vit_run: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [*vit_run, "--json", str(file)]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail() -> None:
        raise OSError(5, "Input/output error", "somewhere")

    died = over_ranks(
        tmp_path / "died", command, ranks=2, statuses=(1, -signal.SIGKILL), before=in_second_batch(1, die)
    )
    assert "error: rank 1 gave no sign of life for 3 s" in died[0]
    failed = over_ranks(tmp_path / "failed", command, ranks=2, statuses=(1, 4), before=in_second_batch(1, fail))
    assert (failed[0], "rank 1: error: somewhere: Input/output error" in failed[1]) == ("", True)
    assert not file.exists()


def test_bad_input_is_told_once(vit_run: list[str], tmp_path: Path) -> None:
    said = over_ranks(tmp_path / "folder", [*vit_run[:-1], str(tmp_path / "nowhere")], statuses=(2, 0, 0))
    assert "no model at" in said[0]
    assert said[1:] == ["", ""]


def test_ranks_that_see_other_files_are_refused(vit_run: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    changes = [*vit_run[2:-2], *sets(train__steps=1, train__seed=7)]
    assert main(["train", VIT, "--out", str(other), "--quiet", *changes]) == 0

    def before(rank: int) -> list[str] | None:
        return [*vit_run[:-1], str(other / "model")] if rank == 1 else None

    said = over_ranks(tmp_path / "ranks", vit_run, ranks=2, statuses=(1, 2), before=before)
    assert "rank 1 has other weights in" in said[1]
    assert "name a folder on a disk that they share" in said[1]


def test_what_one_process_does_is_refused_of_several(tmp_path: Path) -> None:
    for number, (command, name) in enumerate(
        [
            (["ablate", VIT, "--over", "train.lr=1e-3"], "ablate"),
            (["train", VIT, "--dry-run"], "train --dry-run"),
            (["train", VIT, "--engine", "ray"], "train --engine ray"),
        ]
    ):
        said = over_ranks(tmp_path / str(number), command, ranks=2, statuses=(2, 2))
        assert said[0].startswith(f"error: {name} is the work of one process: start it without torchrun (train, ")
        assert said[1] == ""
