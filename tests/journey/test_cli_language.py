"""Autoregressive text from the command line: train, evaluate, go on from prompts, compare; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIGITS, RECIPES, sets
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.experiments.baselines import variants
from diffusionblocks.experiments.recipe import load_recipe

LLAMA = str(RECIPES / "text" / "autoregressive_topics.yaml")
RECURRENT = str(RECIPES / "text" / "recurrent_topics.yaml")
MASKED = str(RECIPES / "text" / "masked_topics.yaml")
COMMON = {
    "device": "cpu",
    "model__config__hidden_size": 16,
    "data__length": 16,
    "train__steps": 4,
    "train__batch_size": 8,
    "train__warmup_steps": 0,
    "evaluate__limit": 20,
    "evaluate__levels": 3,
    "evaluate__samples": 3,
    "evaluate__prompt_length": 6,
    "evaluate__new_tokens": 10,
}
TINY = sets(
    **COMMON,
    model__config__intermediate_size=32,
    model__config__num_hidden_layers=2,
)
TINY_RECURRENT = sets(**COMMON, model__config__mlp_size=32, model__config__mean_recurrence=2)


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run."""
    out = tmp_path_factory.mktemp("llama")
    assert main(["train", LLAMA, "--out", str(out), "--quiet", *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same end to end."""
    out = tmp_path_factory.mktemp("plain")
    assert main(["train", LLAMA, "--out", str(out), "--quiet", *TINY, *sets(method="end-to-end")]) == 0
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model that has the same 27 characters, and gives each the same probability."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=27, num_key_value_heads=2, tie_word_embeddings=False, **sizes))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    return folder


def sample(run: Path, out: Path, *arguments: str, recipe: str = LLAMA) -> list[str]:
    tiny = TINY_RECURRENT if recipe == RECURRENT else TINY
    command = ["sample", recipe, "--model", str(run / "model"), "--out", str(out), "--quiet", *tiny, *arguments]
    assert main(command) == 0
    return (out / "samples.txt").read_text().removesuffix("\n").split("\n\n")


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "tokens_per_second"}


def test_evaluate(llama_run: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = tmp_path / "e.json"
    arguments = ["--model", str(llama_run / "model"), "--json", str(json_file), *TINY]
    assert main(["evaluate", LLAMA, *arguments]) == 0
    (row,) = json.loads(json_file.read_text())["rows"]
    assert timeless(row) == timeless(json.loads((llama_run / "result.json").read_text())["rows"][0])
    assert row["tokens"] == 20 * 15
    assert row["continuations"] == 3
    assert [level["block"] for level in row["by_level"]] == [0, 1, 1]
    assert 0 < row["cross_entropy"] < 6
    assert row["perplexity"] is None
    assert row["tokens_per_second"] > 0
    out = capsys.readouterr().out
    assert f"{row['cross_entropy']:.4g}" in out
    assert f"{row['by_level'][1]['scrambled']:.4g}" in out
    assert max(map(len, out.splitlines())) < 250, "levels are a table of their own"

    assert main(["evaluate", LLAMA, *arguments, *sets(evaluate__teacher=teacher)]) == 0
    (judged,) = json.loads(json_file.read_text())["rows"]
    assert judged["perplexity"]["perplexity"] == pytest.approx(27)
    assert judged["teacher"] == str(teacher)
    assert "perplexity 27" in capsys.readouterr().out
    same = ("cross_entropy", "distinct_2", "by_level")
    assert [judged[name] for name in same] == [row[name] for name in same]


def test_sample(llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starts = sample(llama_run, tmp_path)
    assert "\n\n".join(starts) in capsys.readouterr().out
    assert [tuple(map(len, text.split("|"))) for text in starts] == [(6, 10)] * 3
    assert set("".join(starts)) <= set(" abcdefghijklmnopqrstuvwxyz|")
    assert sample(llama_run, tmp_path, "--seed", "0", "--count", "2") == starts[:2]

    prompts = ["--prompt", "the end of", "--prompt", "a", "--count", "5", "--new-tokens", "7"]
    texts = sample(llama_run, tmp_path, *prompts)
    assert [text.split("|")[0] for text in texts] == ["the end of", "a", "the end of", "a", "the end of"]
    assert all(len(text.split("|")[1]) == 7 for text in texts)
    assert len(set(texts)) == 5
    assert sample(llama_run, tmp_path, "--prompt", "a", "--new-tokens", "7", "--seed", "1") == texts[1:2]
    for changed in (["--temperature", "0"], ["--top-p", "0.2"], ["--feedback", "soft"], ["--steps", "9"]):
        assert sample(llama_run, tmp_path, *prompts, *changed) != texts, changed
    (nothing,) = sample(llama_run, tmp_path, "--prompt", "")  # the two streams need no prompt
    assert nothing.startswith("|")
    assert len(nothing) == 11


@pytest.mark.parametrize("end_to_end", [False, True])
def test_texts_do_not_depend_on_how_many_are_written_together(
    llama_run: Path, plain_run: Path, tmp_path: Path, end_to_end: bool
) -> None:
    run, method = (plain_run, sets(method="end-to-end")) if end_to_end else (llama_run, [])
    two = sets(evaluate__generation_batch_size=2)
    count = ["--count", "5", "--prompt", "the import"]
    assert sample(run, tmp_path / "a", *count, *method) == sample(run, tmp_path / "b", *count, *method, *two)


def test_sample_end_to_end(plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = sets(method="end-to-end")
    texts = sample(plain_run, tmp_path, *plain, "--prompt", "the end of", "--prompt", "a", "--count", "3")
    assert [text.split("|")[0] for text in texts] == ["the end of", "a", "the end of"]
    cold = sample(plain_run, tmp_path, *plain, "--prompt", "the end of", "--count", "2", "--temperature", "0")
    assert cold[0] == cold[1]
    command = ["sample", LLAMA, "--model", str(plain_run / "model"), "--out", str(tmp_path / "new"), *TINY, *plain]
    assert main([*command, "--prompt", ""]) == 2
    assert "an empty prompt: an ordinary language model needs at least one token" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["evaluate", LLAMA, "--model", str(plain_run / "model"), *TINY, *plain]) == 0
    assert "decodable_share" in capsys.readouterr().out


def test_recurrent_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("diffusionblocks", "end-to-end"):
        out, changed = tmp_path / method, sets(method=method)
        assert main(["train", RECURRENT, "--out", str(out), "--quiet", *TINY_RECURRENT, *changed]) == 0
        texts = sample(out, tmp_path / "s", *changed, "--prompt", "the end of", "--prompt", "a", recipe=RECURRENT)
        assert [text.split("|")[0] for text in texts] == ["the end of", "a"]
        arguments = ["--model", str(out / "model"), "--prompt", "", *TINY_RECURRENT, *changed]
        assert main(["sample", RECURRENT, "--out", str(tmp_path / "n"), *arguments]) == 2
        assert "an empty prompt" in capsys.readouterr().err


# ---- compare -----------------------------------------------------------------------------------------------------


def compared(recipe: str, tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["compare", recipe, "--out", str(folder), "--quiet", *tiny]) == 0
    out = capsys.readouterr().out
    assert "cross-entropy" in out
    assert "context gap" in out
    assert "tokens/s" in out
    rows = {row["key"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}
    for key, row in rows.items():
        assert math.isfinite(row["cross_entropy"])
        assert (row["context_gap"] is None) == (row["name"] in ("end-to-end", "ensemble"))
        if row["name"] == "ensemble":  # it is asked, and writes nothing
            assert row["combine"] == "mean"
            continue
        assert (folder / key / "samples" / "samples.txt").read_text().count("|") == 3
    return rows


def test_compare_with_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = sets(fit="{steps: 2, rounds: 1, grid: 5, examples: 16}", train__steps=2)
    rows = compared(LLAMA, [*TINY, *fit], tmp_path, capsys)
    assert list(rows) == [
        "end-to-end-2",
        "end-to-end-1",
        "end-to-end-1-x2",
        "ensemble-2x1",
        "diffusionblocks",
        "diffusionblocks-unfitted",
    ]
    assert [row["fitted"] for row in rows.values()] == [False, False, False, False, True, False]
    assert [row["iterations"] for row in rows.values()] == [3, 3, 6, 6, 6, 6]


def test_compare_of_one_block_has_no_row_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compared(RECURRENT, TINY_RECURRENT, tmp_path, capsys)
    assert list(rows) == ["end-to-end-2", "diffusionblocks"]
    assert [row["iterations"] for row in rows.values()] == [4, 4]


def test_the_control_of_recurrent_depth_is_never_captured() -> None:
    recipe = load_recipe(RECURRENT, ["train.cuda_graph=true"])
    assert [row.recipe.train.cuda_graph for row in variants(recipe)] == [False, True]
    assert [row.recipe.train.cuda_graph for row in variants(load_recipe(LLAMA, ["train.cuda_graph=true"]))] == [
        True
    ] * 5


# ---- refusals ----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[list[str], str]] = [
    (["sample", "--infill", "the _"], "--infill is not for LlamaForCausalLM, which generates continued text"),
    (["sample", "--solver", "heun"], "--solver is not for LlamaForCausalLM"),
    (["sample", "--prompt", "The end"], "character 'T' at 0: must be a space or a letter a to z"),
    (["sample", "--prompt", "a", "--count", "0"], "count must be >= 1, got 0"),
    (["sample", "--prompt", "a", "--top-p", "0"], "top_p: Input should be greater than 0 (got 0.0)"),
    (
        ["sample", "--prompt", "a", "--new-tokens", "0"],
        "new_tokens: Input should be greater than or equal to 1 (got 0)",
    ),
    (["sample", "--prompt", "a", "--steps", "0"], "steps: Input should be greater than or equal to 1"),
    (["sample", "--prompt", "a", "--grid", "cosine"], "unknown level grid 'cosine' for edm; allowed: equal-quantile"),
    (["sample", "--count", "100000"], "the test text has only"),
    (["evaluate", "--by-level"], "--by-level is for classifiers; LlamaForCausalLM generates continued text"),
    (["evaluate", *sets(evaluate__kind="bits")], "evaluate.kind must be language for LlamaForCausalLM, got bits"),
    (["evaluate", *sets(evaluate__limit=1)], "evaluate.limit"),
    (
        [
            "train",
            *sets(
                data="{kind: images, source: x, image_size: 8, channels: 1, num_classes: 2, mean: [0.5], std: [0.5]}"
            ),
        ],
        "data.kind: images is for",
    ),
    (["train", *sets(model__config__vocab_size=26)], "vocab_size = 26, the data has 27 different tokens"),
    (["train", *sets(evaluate__teacher="/no/such/folder")], "evaluate.teacher = /no/such/folder: no model of"),
    (
        ["evaluate", *sets(evaluate__teacher=RECIPES)],
        "no model of transformers is there; give a folder with config.json",
    ),
    (["train", *sets(fit="{steps: 1}")], "fit.rounds = 3 needs as many fit.steps at least, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_refused(
    arguments: list[str], message: str, llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    place = ["--out", str(tmp_path / "new")] if command == "train" else ["--model", str(llama_run / "model")]
    out = ["--out", str(tmp_path / "new")] if command == "sample" else []
    assert main([command, LLAMA, *place, *out, *TINY, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", MASKED, "--prompt", "the"], "--prompt is not for MaskedTransformer, which generates masked text"),
        (["sample", MASKED, "--feedback", "soft"], "--feedback is not for MaskedTransformer"),
        (["train", DIGITS, *sets(fit="{steps: 3}")], "fit is for models with a cross-entropy at every level"),
        (
            ["train", RECURRENT, *sets(method="end-to-end", train__cuda_graph="true")],
            "RecurrentDepth end to end draws its number of iterations anew each step: set train.cuda_graph to false",
        ),
    ],
)
def test_refused_elsewhere(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_blocks_without_noise_input_train_and_go_out_as_language_models(
    llama_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = sets(blocks__num_blocks=2, blocks__target="{kind: next-token, noise_input: false}")
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", LLAMA, "--out", str(run), "--quiet", *TINY, *alone]) == 0
    assert main(["export", str(run), "--block", "1", "--out", str(out)]) == 0
    assert "log p(next token | text)" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(out).eval()
    assert (type(exported).__name__, exported.config.num_hidden_layers) == ("LlamaForCausalLM", 1)
    tokens = torch.randint(27, (2, 9))
    with torch.no_grad():
        expected = db.load(run / "model").eval().export_block(1)(tokens).logits
        assert torch.equal(exported(tokens).logits, expected)
    assert main(["export", str(llama_run), "--block", "0", "--out", str(out)]) == 2
    assert "reads two streams, noised tokens and their context" in capsys.readouterr().err
    assert (out / "block.json").is_file()  # what is there stays
