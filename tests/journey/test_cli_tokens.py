"""A language model's folder is whole: its tokenizer lies beside the weights, and goes wherever they go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import RECIPES, sets
from helpers import listing
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.common.tokenizer_file import TOKENIZER
from diffusionblocks.config import BlocksConfig
from diffusionblocks.data.token_text import END, train_tokenizer
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import ModelConfig, load_recipe
from diffusionblocks.families.generation_config import end_tokens

TOPICS = RECIPES / "text" / "autoregressive_topics.yaml"
BOOKS = ["It was a dark night — “very” dark.\n\nThe rain fell.", "Émile's 2nd book 😀 is odd.", "The night fell."]
TINY = {
    "device": "cpu",
    "model__config__hidden_size": 16,
    "model__config__intermediate_size": 32,
    "model__config__num_hidden_layers": 2,
    "model__config__vocab_size": 300,
    "train__steps": 2,
    "train__batch_size": 4,
    "train__warmup_steps": 0,
    "evaluate__limit": 4,
    "evaluate__levels": 2,
    "evaluate__samples": 2,
    "evaluate__prompt_length": 4,
    "evaluate__new_tokens": 5,
}


def corpus_in(folder: Path, books: list[str] = BOOKS) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n\n\n".join(books * 20), encoding="utf-8")
    (folder / "test.txt").write_text("\n\n\n".join(books * 3), encoding="utf-8")
    return folder


def recipe_in(folder: Path, **data: object) -> str:
    """A recipe of tokens: the small autoregressive one, on a corpus and a cache below `folder`."""
    values = yaml.safe_load(TOPICS.read_text())
    own = {"source": str(folder / "corpus"), "cache": str(folder / "cache"), "separator": "\n\n\n", "vocab_size": 300}
    values["data"] = {"kind": "tokens", "length": 16} | own | data
    file = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


def train(folder: Path, out: Path, **changes: object) -> Path:
    assert main(["train", recipe_in(folder), "--out", str(out), "--quiet", *sets(**(TINY | changes))]) == 0
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with its cache, and runs on it: blocks with a trunk and snapshots, and the end-to-end control."""
    folder = tmp_path_factory.mktemp("home")
    corpus_in(folder / "corpus")
    train(folder, folder / "blocks", trunk="{steps: 2}", train__snapshot_every=2)
    train(folder, folder / "plain", method="end-to-end")
    for b in (0, 1):
        train(folder, folder / f"job-{b}", train__blocks=[b])
    return folder


def cached(home: Path) -> bytes:
    (file,) = (home / "cache").glob("tokenizer-*.json")
    return file.read_bytes()


@pytest.fixture
def alone(tmp_path: Path, home: Path) -> Path:
    """The models in a place without corpus and cache."""
    for name in ("blocks", "plain"):
        shutil.copytree(home / name / "model", tmp_path / name)
    return tmp_path


def sample(recipe: str, model: Path, out: Path, *arguments: str, method: str = "diffusionblocks") -> list[str]:
    command = ["sample", recipe, "--model", str(model), "--out", str(out), "--quiet", *sets(**TINY, method=method)]
    assert main([*command, *arguments]) == 0
    return (out / "samples.txt").read_text(encoding="utf-8").removesuffix("\n").split("|")


# ---- where it lies ---------------------------------------------------------------------------------------------


def test_every_saved_model_has_the_very_tokenizer_of_its_corpus(home: Path) -> None:
    models = [*home.glob("*/model"), *home.glob("blocks/snapshots/*"), home / "blocks" / "trunk" / "model"]
    snapshots = [path for path in models if path.parent.name == "snapshots"]
    assert len(snapshots) > 1
    assert {path.parent.name for path in models} >= {"blocks", "plain", "job-0", "job-1", "trunk"}
    assert {path: (path / TOKENIZER).read_bytes() for path in models} == dict.fromkeys(models, cached(home))
    assert not [path for path in home.rglob("*") if path.name.endswith(".tmp")]


def test_the_end_of_a_document_is_in_every_saved_models_configs(home: Path, tmp_path: Path) -> None:
    (file,) = (home / "cache").glob("tokenizer-*.json")
    end = Tokenizer.from_file(str(file)).token_to_id(END)
    for folder in [*home.glob("*/model"), *home.glob("blocks/snapshots/*"), home / "blocks" / "trunk" / "model"]:
        index = folder / "diffusionblocks.json"
        if index.is_file():
            values = json.loads(index.read_text())
            found = [values["model_config"], values["generation_config"]]
        else:
            found = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
        assert [part["eos_token_id"] for part in found] == [end, end], folder
    blocks = db.load(home / "blocks" / "model")
    assert end_tokens(blocks) == end_tokens(blocks.export_initialisation()) == (end,)


def test_a_recipes_own_ends_stay_and_characters_have_none(home: Path) -> None:
    def ends(path: str, **changes: Any) -> tuple[int, ...]:
        recipe = load_recipe(path, [text for text in sets(**TINY, **changes) if text != "--set"])
        model: Any = Experiment(recipe).build()
        Experiment(recipe).task.settle(Experiment(recipe), model)
        return end_tokens(model)

    (end,) = ends(str(home / "recipe.yaml"))
    assert ends(str(home / "recipe.yaml"), model__config__eos_token_id=[7, 9]) == (7, 9, end)
    recurrent = {"hidden_size": 16, "num_attention_heads": 2, "mlp_size": 16, "vocab_size": 300, "sequence_length": 16}
    recipe = load_recipe(home / "recipe.yaml")
    other = recipe.model_copy(update={"model": ModelConfig(type="RecurrentDepth", config=recurrent)})
    blocks: Any = Experiment(other.model_copy(update={"blocks": BlocksConfig(num_blocks=1)})).build()
    Experiment(other).task.settle(Experiment(other), blocks)
    assert end_tokens(blocks) == (end,)  # its class has no place for it, the blocks have
    assert ends(str(TOPICS)) == ()  # the class's default, 2, is a character there


def test_a_ready_tokenizer_is_copied_byte_for_byte(tmp_path: Path) -> None:
    corpus_in(tmp_path / "corpus")
    ready = tmp_path / "ready.json"
    train_tokenizer([tmp_path / "corpus" / "train.txt"], 300, ready)
    compact = json.dumps(json.loads(ready.read_text()), ensure_ascii=True).encode()  # as the library never lays it out
    assert compact != ready.read_bytes()
    ready.write_bytes(compact)
    run = train(tmp_path, tmp_path / "run", data__tokenizer=ready)
    assert (run / "model" / TOKENIZER).read_bytes() == compact
    assert not list((tmp_path / "cache").glob("tokenizer-*"))


def test_a_model_of_characters_has_none(tmp_path: Path) -> None:
    changes = TINY | {"model__config__vocab_size": 27, "data__length": 16}
    assert main(["train", str(TOPICS), "--out", str(tmp_path), "--quiet", *sets(**changes)]) == 0
    assert not (tmp_path / "model" / TOKENIZER).exists()


@pytest.mark.parametrize("name", ["blocks", "plain"])
def test_transformers_opens_it(home: Path, name: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(home / name / "model" / TOKENIZER))
    recipe = load_recipe(recipe_in(home), sets(**TINY)[1::2])
    ours = Experiment(recipe).with_processing_of(home / name / "model").recipe.data.codec()
    assert len(theirs) == ours.vocab_size == 300
    assert theirs.convert_tokens_to_ids(END) == ours.end
    for text in (*BOOKS, "unseen: 日本\x00"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text


# ---- what uses it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_sample_needs_the_folder_alone(home: Path, alone: Path, method: str) -> None:
    name = "blocks" if method == "diffusionblocks" else "plain"
    prompt = ("--prompt", "The night — 😀")
    texts = sample(recipe_in(alone), alone / name, alone / "out", *prompt, method=method)
    assert texts[0] == prompt[1]
    assert texts == sample(recipe_in(home), home / name / "model", alone / "there", *prompt, method=method)
    assert not (alone / "cache").exists()
    # Control: without it there is nothing that could read the prompt.
    (alone / name / TOKENIZER).unlink()
    command = ["sample", recipe_in(alone), "--model", str(alone / name), "--out", str(alone / "none"), *prompt]
    assert main([*command, *sets(**TINY, method=method)]) == 2
    assert not (alone / "none").exists()


def test_sample_writes_a_chat_as_the_folders_template_says(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, recipe = alone / "blocks", recipe_in(alone)
    arguments = ("--prompt", "the cat", "--new-tokens", "4")
    assert sample(recipe, model, alone / "plain-text", *arguments)[0] == "the cat"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "Q: {{ messages[0]['content'] }} A:"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    prompt, answer = sample(recipe, model, alone / "chat", "--chat", *arguments)
    assert prompt == "Q: the cat A:"
    assert answer
    command = ["sample", recipe, "--model", str(model), "--quiet", *sets(**TINY)]
    assert main([*command, "--chat"]) == 2
    assert "--chat says how to read --prompt: give what the user says" in capsys.readouterr().err


def test_evaluate_reads_the_test_text_with_it(home: Path, alone: Path) -> None:
    (alone / "corpus").mkdir()
    shutil.copy(home / "corpus" / "test.txt", alone / "corpus")  # and no train split
    rows = alone / "rows.json"
    arguments = ["--model", str(alone / "blocks"), "--json", str(rows), *sets(**TINY)]
    assert main(["evaluate", recipe_in(alone), *arguments]) == 0
    (there,) = json.loads((home / "blocks" / "result.json").read_text())["rows"]
    (here,) = json.loads(rows.read_text())["rows"]
    assert here | {"tokens_per_second": 0} == there | {"tokens_per_second": 0}
    assert not list((alone / "cache").glob("tokenizer-*"))


def test_a_limit_reads_no_more_of_the_test_text_than_evaluation_and_prompts_need(
    home: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (alone / "corpus").mkdir()
    shutil.copy(home / "corpus" / "test.txt", alone / "corpus")
    rows, limit = alone / "rows.json", {**TINY, "evaluate__limit": 2}

    def measured() -> dict[str, Any]:
        arguments = ["--model", str(alone / "blocks"), "--json", str(rows)]
        assert main(["evaluate", recipe_in(alone), *arguments, *sets(**limit)]) == 0
        (row,) = json.loads(rows.read_text())["rows"]
        return {**row, "tokens_per_second": 0}

    whole = sets(**{**TINY, "evaluate__limit": "null"})
    assert main(["evaluate", recipe_in(alone), "--model", str(alone / "blocks"), *whole]) == 0
    of_the_whole = measured()  # which lies in the cache
    shutil.rmtree(alone / "cache")
    (alone / "corpus" / "test2.txt").write_bytes(b"\xff no UTF-8")  # which nobody is to read
    assert measured() == of_the_whole
    few = sample(recipe_in(alone), alone / "blocks", alone / "few", "--count", "2")
    assert len(few) == 3
    capsys.readouterr()
    command = ["sample", recipe_in(alone), "--model", str(alone / "blocks"), "--out", str(alone / "all"), "--quiet"]
    assert main([*command, "--count", "1000", *sets(**limit)]) == 2
    assert "test2.txt, line 1 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_another_tokenizer_is_refused(
    alone: Path, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    corpus_in(alone / "corpus", ["Quite another text, of zebras and their stripes."] * 3)
    recipe, model = recipe_in(alone), alone / "blocks"
    out = ["--out", str(alone / "out"), "--prompt", "The night"] if command == "sample" else []
    run = [command, recipe, "--model", str(model), *out]
    options = sets(**TINY)
    # Its corpus at hand, but no tokenizer trained on it yet: the model's is used, and none is trained.
    assert main([*run, *options]) == 0
    assert not list((alone / "cache").glob("tokenizer-*"))
    load_recipe(recipe).data.codec()
    (own,) = (alone / "cache").glob("tokenizer-*.json")
    capsys.readouterr()
    assert main([*run, *options]) == 2
    error = capsys.readouterr().err
    assert f"{model / TOKENIZER}, which the model learned, and {own}, the recipe's own, are different" in error
    assert f"--set data.tokenizer={model / TOKENIZER}" in error
    assert main([*run, *options, *sets(data__tokenizer=model / TOKENIZER)]) == 0
    assert main([*run, *options, *sets(data__tokenizer=own)]) == 2
    # One that is only laid out otherwise is the same.
    other = alone / "compact.json"
    other.write_text(json.dumps(json.loads((model / TOKENIZER).read_text())))
    assert main([*run, *options, *sets(data__tokenizer=other)]) == 0
    (model / TOKENIZER).write_text("{}")
    capsys.readouterr()
    assert main([*run, *options]) == 2
    assert f"{model / TOKENIZER} is no tokenizer.json" in capsys.readouterr().err


# ---- what carries it -------------------------------------------------------------------------------------------


def test_load_and_save_leave_it_alone(home: Path, alone: Path) -> None:
    before = listing(alone / "blocks")
    model = db.load(alone / "blocks")
    model.save_pretrained(alone / "blocks")
    assert listing(alone / "blocks").keys() == before.keys()
    assert (alone / "blocks" / TOKENIZER).read_bytes() == before[TOKENIZER]
    model.save_pretrained(alone / "new")
    assert not (alone / "new" / TOKENIZER).exists()


def test_branch_carries_it(home: Path, tmp_path: Path) -> None:
    trunk, out = home / "blocks" / "trunk" / "model", tmp_path / "branched"
    for _ in range(2):  # the second time over the first
        assert main(["branch", str(trunk), "--blocks", "2", "--out", str(out)]) == 0
        assert (out / TOKENIZER).read_bytes() == cached(home)
    assert sample(recipe_in(tmp_path), out, tmp_path / "out", "--prompt", "It was")[0] == "It was"


def test_merge_carries_it_and_refuses_two(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [tmp_path / "a", tmp_path / "b"]
    for b, folder in enumerate(jobs):
        shutil.copytree(home / f"job-{b}" / "model", folder)
    merge = ["merge", *map(str, jobs), "--out", str(tmp_path / "whole")]
    assert main(merge) == 0
    assert (tmp_path / "whole" / TOKENIZER).read_bytes() == cached(home)
    assert sample(recipe_in(tmp_path), tmp_path / "whole", tmp_path / "out", "--prompt", "It was")[0] == "It was"
    # Laid out otherwise, or in one folder alone, it is still the one.
    (jobs[1] / TOKENIZER).write_text(json.dumps(json.loads(cached(home))))
    assert main(merge) == 0
    (jobs[0] / TOKENIZER).unlink()
    assert main(merge) == 0
    assert (tmp_path / "whole" / TOKENIZER).read_bytes() == (jobs[1] / TOKENIZER).read_bytes()
    # Another one is not.
    whole = listing(tmp_path / "whole")
    train_tokenizer([home / "corpus" / "test.txt"], 290, jobs[0] / TOKENIZER)
    capsys.readouterr()
    assert main(merge) == 2
    assert f"{jobs[0] / TOKENIZER} and {jobs[1] / TOKENIZER} are different tokenizers" in capsys.readouterr().err
    assert listing(tmp_path / "whole") == whole
    # And where no folder has one, an older merge's does not stay.
    for folder in jobs:
        (folder / TOKENIZER).unlink()
    assert main(merge) == 0
    assert not (tmp_path / "whole" / TOKENIZER).exists()
