"""Pretrained folders from the command line: other labels, padded vocabularies, and shapes that are the folder's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from commands import VIT, sets
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    EfficientNetImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from diffusionblocks.cli import main
from diffusionblocks.core.loading import load
from diffusionblocks.data.token_text import train_tokenizer
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe

LABELS, LAYERS = 7, 4


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 4 layers and 7 labels for the digits' images."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=LABELS, **sizes)
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a Qwen2 whose vocabulary, 320, is padded beyond its tokenizer's 300."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "corpus").mkdir()
    text = "".join(f"line {i}: the quick brown fox jumps\n" for i in range(400))
    for split in ("train", "test"):
        (folder / "corpus" / f"{split}.txt").write_text(text)
    assert train_tokenizer([folder / "corpus" / "train.txt"], 300, folder / "tokenizer.json").get_vocab_size() == 300
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=320, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    data = {
        "kind": "tokens",
        "source": str(folder / "corpus"),
        "tokenizer": str(folder / "tokenizer.json"),
        "length": 32,
    }
    recipe = {
        "name": "padded",
        "device": "cpu",
        "model": {"type": "Qwen2ForCausalLM", "pretrained": str(folder / "model")},
        "blocks": {"num_blocks": 2},
        "data": {**data, "cache": str(folder / "cache")},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"kind": "language", "samples": 4, "prompt_length": 8, "new_tokens": 8, "limit": 8, "levels": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def of_digits(vit: Path, **changes: object) -> list[str]:
    """The digits' recipe on the pretrained ViT, whose shape it does not give."""
    return sets(
        device="cpu",
        model=json.dumps({"type": "ViTForImageClassification", "pretrained": str(vit)}),
        blocks__num_blocks=2,
        train__batch_size=16,
        train__warmup_steps=0,
        fit="null",
        trunk="null",
        train__epochs="null",
        train__steps=2,
        evaluate__steps="[1]",
        evaluate__seeds="[1]",
        **changes,
    )


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def advice_in(message: str) -> list[str]:
    """The `--set` arguments that a message gives."""
    return [part for found in re.findall(r"--set ([\w.]+=[^\s;,:]+)", message) for part in ("--set", found)]


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_pretrained_classifier_learns_other_labels_when_told_to(
    method: str, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["train", VIT, "--out", str(tmp_path / "run"), "--quiet", *of_digits(vit, method=method)]
    assert main(arguments) == 2
    message = last_line(capsys)
    assert "num_labels = 7, the data has 10 classes" in message
    assert advice_in(message) == sets(model__config__num_labels=10)
    assert main([*arguments, *advice_in(message)]) == 0
    assert sum("drawn afresh" in record.message for record in caplog.records) == 1
    evaluate = ["evaluate", VIT, "--model", str(tmp_path / "run" / "model"), *of_digits(vit, method=method)]
    assert main([*evaluate, *advice_in(message)]) == 0


def test_a_new_classifier_is_drawn_from_the_seed_and_all_else_is_the_folders(vit: Path) -> None:
    def recipe(**changes: object) -> Any:
        return load_recipe(VIT, of_digits(vit, model__config__num_labels=10, **changes)[1::2])

    blocks, again, other = (
        Experiment(recipe()).build(),
        Experiment(recipe()).build(),
        Experiment(recipe(train__seed=5)).build(),
    )
    whole, stored = (
        Experiment(recipe()).original.build().state_dict(),
        ViTForImageClassification.from_pretrained(vit).state_dict(),
    )
    for index in range(2):
        states = [dict(model.block(index).network.state_dict()) for model in (blocks, again, other)]
        assert states[0]["classifier.weight"].shape == (10, 16)
        assert torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
        assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
        assert torch.equal(states[0]["classifier.weight"], whole["classifier.weight"]), "the control has the same"
        assert all(torch.equal(t, stored[n]) for n, t in states[0].items() if not n.startswith("classifier"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in stored.items() if not name.startswith("classifier"))


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_padded_vocabulary_trains_evaluates_and_samples(method: str, qwen: Path, tmp_path: Path) -> None:
    common, run = [str(qwen / "recipe.yaml")], tmp_path / "run"
    more = ["--quiet", *sets(method=method)]
    assert main(["train", *common, "--out", str(run), *more]) == 0
    assert main(["evaluate", *common, "--model", str(run / "model"), *sets(method=method)]) == 0
    # At this temperature all ids are as likely; one beyond the tokenizer's could not be decoded.
    hot = ["--temperature", "1000", "--new-tokens", "40", "--prompt", "line 3", "--count", "8"]
    assert main(["sample", *common, "--model", str(run / "model"), "--out", str(tmp_path / "s"), *hot, *more]) == 0


def test_only_ids_of_the_tokenizer_are_generated(qwen: Path) -> None:
    model = Experiment(load_recipe(qwen / "recipe.yaml")).build().eval()
    common: dict[str, Any] = {"seeds": range(20), "temperature": 1000.0}
    tokens = [row[1:] for row in model.continue_texts([[1]] * 20, 30, num_tokens=300, **common).tokens]  # type: ignore[operator]
    assert int(torch.cat(tokens).max()) < 300
    control = [row[1:] for row in model.continue_texts([[1]] * 20, 30, **common).tokens]  # type: ignore[operator]
    assert int(torch.cat(control).max()) >= 300
    with pytest.raises(ValueError, match=r"num_tokens must be from 1 to the vocabulary's 320, got 321"):
        model.continue_texts([[1]], 2, num_tokens=321)  # type: ignore[operator]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer([qwen / "corpus" / "train.txt"], 350, tmp_path / "other.json")
    size = json.loads((tmp_path / "other.json").read_text())["model"]["vocab"]
    assert len(size) > 320
    changes = sets(data__tokenizer=tmp_path / "other.json", data__cache=tmp_path / "cache")
    assert main(["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet", *changes]) == 2
    message = last_line(capsys)
    assert "vocab_size = 320" in message
    assert "give the tokenizer" in message


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [("vocab_size", 300, 320), ("num_hidden_layers", 4, 2), ("hidden_size", 32, 16), ("num_key_value_heads", 2, 1)],
)
def test_a_recipe_does_not_contradict_the_folder(
    field: str, value: int, own: int, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, *sets(**{f"model__config__{field}": value})]) == 2
    message = last_line(capsys)
    assert f"model.config.{field} = {value}" in message
    assert f"has {own}" in message
    assert main(["inspect", arguments[1], *sets(**{f"model__config__{field}": own})]) == 0


@pytest.mark.parametrize("other", ["GPT2LMHeadModel", "LlamaForCausalLM"])  # which has no biases
def test_another_class_than_the_folders_is_refused_with_its_name(
    other: str, qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(qwen / "recipe.yaml"), *sets(model__type=other)]
    assert main(arguments) == 2
    message = last_line(capsys)
    assert f"holds a Qwen2ForCausalLM, the recipe has model.type: {other}" in message
    assert main([*arguments, *advice_in(message)]) == 0


def test_depth_comes_from_the_folder(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = sets(model__config__num_labels=10)
    rows = ["--rows", f"end-to-end-{LAYERS}", "diffusionblocks"]
    assert main(["compare", VIT, "--out", str(tmp_path / "c"), "--quiet", *of_digits(vit), *labels, *rows]) == 0
    assert load(tmp_path / "c" / "diffusionblocks" / "model").partition.num_layers == LAYERS
    assert f"no rows of fewer layers: {vit} has weights of all {LAYERS} layers" in capsys.readouterr().out
    short = ["--rows", f"end-to-end-{LAYERS // 2}"]
    assert main(["compare", VIT, "--out", str(tmp_path / "c"), "--quiet", *of_digits(vit), *labels, *short]) == 2
    assert f"unknown rows ['end-to-end-{LAYERS // 2}']" in last_line(capsys)
    with_trunk = [*of_digits(vit), *labels, *sets(trunk="{steps: 2}")]
    assert main(["train", VIT, "--out", str(tmp_path / "t"), "--quiet", *with_trunk]) == 2
    assert f"has {LAYERS}: leave trunk and fit out" in last_line(capsys)


@pytest.mark.parametrize("name", ["nowhere", "{folder}/corpus"])
def test_a_folder_without_a_model_is_refused(
    name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = name.format(folder=qwen)
    changes = sets(model__pretrained=place)
    assert main(["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet", *changes]) == 2
    assert f"model.pretrained = {place}: no model is there" in last_line(capsys)


# ---- tokenizers ------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def whole(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen2 with its tokenizer, chat template and settings of generation beside it."""
    folder = tmp_path_factory.mktemp("whole") / "qwen"
    shutil.copytree(qwen / "model", folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(qwen / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 7], temperature=0.6, do_sample=True).save_pretrained(folder)
    return folder


def own_tokenizer(whole: Path, **changes: object) -> list[str]:
    """The padded recipe on that folder, without a tokenizer of its own."""
    return sets(model__pretrained=whole, data__tokenizer="null", **changes)


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_the_folders_own_tokenizer_is_used_and_kept(method: str, qwen: Path, whole: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "qwen", tmp_path / "run"
    shutil.copytree(whole, folder)
    options = own_tokenizer(folder, method=method, data__cache=tmp_path / "cache")
    assert main(["train", str(qwen / "recipe.yaml"), "--out", str(run), "--quiet", *options]) == 0
    assert not list((tmp_path / "cache").glob("tokenizer-*")), "none was trained"
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        assert (run / "model" / name).read_bytes() == (whole / name).read_bytes()
    chat = [{"role": "user", "content": "jumps"}]
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (whole, run / "model"))
    assert ours.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\njumps<|im_end|>\n"
    assert ours("the quick brown fox").input_ids == theirs("the quick brown fox").input_ids
    kept: Any = load(run / "model") if method == "diffusionblocks" else None
    kept = GenerationConfig.from_pretrained(run / "model") if kept is None else kept.generation_config
    assert (kept.temperature, kept.do_sample, kept.eos_token_id) == (0.6, True, [0, 7])
    shutil.rmtree(folder)  # what was trained needs it no more
    shutil.rmtree(tmp_path / "cache")
    assert (
        main(["sample", str(run), "--out", str(tmp_path / "s"), "--prompt", "line 3", "--count", "1", "--quiet"]) == 0
    )
    assert main(["evaluate", str(run)]) == 0


def test_a_tokenizer_with_other_ids_than_the_folders_is_refused(
    qwen: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer([qwen / "corpus" / "train.txt"], 290, tmp_path / "other.json")
    arguments = ["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, *sets(model__pretrained=whole, data__tokenizer=tmp_path / "other.json")]) == 2
    assert f"other.json has other ids than {whole / 'tokenizer.json'}" in last_line(capsys)
    same = json.loads((whole / "tokenizer.json").read_text()) | {"truncation": None}
    (tmp_path / "same.json").write_text(json.dumps(same, indent=1))
    more = sets(model__pretrained=whole, data__tokenizer=tmp_path / "same.json", data__cache=tmp_path / "cache")
    assert main(["inspect", arguments[1], *more]) == 0


def test_a_folder_without_a_tokenizer_says_how_to_make_one(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, *sets(data__tokenizer="null")]) == 2
    message = last_line(capsys)
    assert f"{qwen / 'model'} has no tokenizer.json" in message
    assert main([*arguments, *sets(data__tokenizer=qwen / "tokenizer.json")]) == 0


def test_documents_begin_and_end_as_the_folders_tokenizer_says(qwen: Path, whole: Path, tmp_path: Path) -> None:
    """Llama's kind: no <|endoftext|>, and `<s>` before every text by itself."""
    folder = tmp_path / "llama"
    shutil.copytree(whole, folder)
    values = json.loads((whole / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>"))
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens(["<s>"])
    start, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    options = own_tokenizer(folder, data__separator='"\\n"', data__cache=tmp_path / "cache")
    experiment = Experiment(load_recipe(qwen / "recipe.yaml", options[1::2]))
    lines = (qwen / "corpus" / "train.txt").read_text().splitlines()
    library = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = [token for line in lines for token in [*library(line).input_ids, end]]
    assert experiment.data("train").text.ids.tolist() == expected
    assert expected[0] == start
    prompt = experiment.codec.encode("line 3")
    assert prompt.tolist() == library("line 3").input_ids
    assert experiment.codec.decode(prompt) == "line 3"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>.*--set data.end=TOKEN"):
        Experiment(experiment.recipe).data("train")
    named = Experiment(load_recipe(qwen / "recipe.yaml", [*options, *sets(data__end="</s>")][1::2]))
    assert named.data("train").text.ids.tolist() == expected


def test_the_shipped_recipe_takes_depth_and_tokenizer_from_the_folder(
    qwen: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = "text/finetune"
    assert main(["inspect", recipe]) == 2
    assert "model.pretrained = pretrained-model: no model is there" in last_line(capsys)
    given = sets(model__type="Qwen2ForCausalLM", model__pretrained=whole, data__source=qwen / "corpus", device="cpu")
    assert main(["inspect", recipe, *given]) == 2
    assert "num_blocks must be from 1 to the number of layers, 2; got 3" in last_line(capsys)
    tiny = sets(blocks__num_blocks=2, data__length=16, data__cache=tmp_path / "cache", train__steps=2)
    small = sets(train__warmup_steps=0, evaluate__limit=8, evaluate__new_tokens=4, evaluate__prompt_length=4)
    assert main(["train", recipe, "--out", str(tmp_path / "run"), "--quiet", *given, *tiny, *small]) == 0
    model = load(tmp_path / "run" / "model")
    assert model.partition.num_layers == 2
    assert model.config.vocab_size == 320


def test_jobs_that_train_one_block_each_keep_the_folders_files(qwen: Path, whole: Path, tmp_path: Path) -> None:
    for block in (0, 1):
        options = own_tokenizer(whole, train__blocks=f"[{block}]", data__cache=tmp_path / "cache")
        out = str(tmp_path / f"job-{block}")
        assert main(["train", str(qwen / "recipe.yaml"), "--out", out, "--quiet", *options]) == 0
    jobs = [str(tmp_path / f"job-{block}") for block in (0, 1)]
    assert main(["merge", *jobs, "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == CHAT
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|endoftext|>"


# ---- image processors ------------------------------------------------------------------------------------------

MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.25, 0.3]
COLOURS = ["red", "green", "blue"]


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Pictures of several sizes."""
    draw = np.random.default_rng(seed)
    sizes = [(20, 30), (16, 16), (31, 17)]
    return [Image.fromarray(draw.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files of pictures of several sizes, with named labels."""
    folder = tmp_path_factory.mktemp("photos")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=COLOURS)})
    for split, count, seed in (("train", 24, 0), ("test", 9, 1)):
        rows = {"image": pictures(count, seed), "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


PROCESSORS = {
    "squeezed": ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD, resample=3),
    "cropped": CLIPImageProcessorPil(
        size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD
    ),
    "from -1 to 1": ViTImageProcessorPil(
        size={"height": 8, "width": 8}, rescale_factor=1 / 127.5, image_mean=[1.0] * 3
    ),
}


def colour_vit(folder: Path, labels: list[str], processor: Any = None) -> Path:
    """A ViT for pictures of 8 pixels, with named labels."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    names = dict(enumerate(labels))
    config = ViTConfig(image_size=8, patch_size=4, id2label=names, label2id={n: i for i, n in names.items()}, **sizes)
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def colour_recipe(folder: Path, vit: Path, photos: Path, **data: object) -> Path:
    recipe = {
        "name": "colours",
        "device": "cpu",
        "model": {"type": "ViTForImageClassification", "pretrained": str(vit)},
        "blocks": {"num_blocks": 2},
        "data": {"kind": "images", "source": str(photos), **data},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"steps": [1], "seeds": [1]},
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "colours.yaml"


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_what_the_folders_processor_makes_of_them(kind: str, photos: Path, tmp_path: Path) -> None:
    vit = colour_vit(tmp_path / "vit", COLOURS, PROCESSORS[kind])
    experiment = Experiment(load_recipe(colour_recipe(tmp_path, vit, photos, cache=str(tmp_path / "cache"))))
    for _ in range(2):  # decoded, and from the cache
        data = experiment.recipe.data.load("test")
        (batch,) = experiment.recipe.data.evaluation_batches(data, batch_size=9, device=torch.device("cpu"))
        expected = PROCESSORS[kind](pictures(9, 1), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_the_folders_processor_is_saved_beside_the_trained_model(method: str, photos: Path, tmp_path: Path) -> None:
    vit = colour_vit(tmp_path / "vit", COLOURS, PROCESSORS["cropped"])
    recipe, run = colour_recipe(tmp_path, vit, photos), tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--quiet", *sets(method=method)]) == 0
    name = "preprocessor_config.json"
    assert (run / "model" / name).read_bytes() == (vit / name).read_bytes()
    shutil.rmtree(vit)
    assert main(["evaluate", str(run)]) == 0


def test_a_recipe_that_normalises_otherwise_than_the_folder_is_told_so(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = colour_vit(tmp_path / "vit", COLOURS, PROCESSORS["squeezed"])
    half = {"mean": [0.5] * 3, "std": STD}
    assert main(["inspect", str(colour_recipe(tmp_path, vit, photos, **half))]) == 2
    assert "data.image_size is left out" in last_line(capsys)
    experiment = Experiment(load_recipe(colour_recipe(tmp_path, vit, photos, image_size=8, **half)))
    assert sum("leave data.mean out" in record.message for record in caplog.records) == 1
    assert experiment.recipe.data.processor is None  # type: ignore[attr-defined]
    (vit / "preprocessor_config.json").unlink()
    assert main(["inspect", str(colour_recipe(tmp_path, vit, photos))]) == 2
    assert f"data.image_size is left out, and {vit} has no preprocessor_config.json" in last_line(capsys)


@pytest.mark.parametrize("kind", ["unknown", "offset"])
def test_a_processor_that_cannot_be_followed_is_refused(
    kind: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = colour_vit(
        tmp_path / "vit",
        COLOURS,
        EfficientNetImageProcessorPil(size={"height": 8, "width": 8}, rescale_offset=True, include_top=False),
    )
    message = "this processor does more to pixels than to resize, crop and normalise them"
    if kind == "unknown":
        (vit / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
        message = "is no image processor that can be used here"
    assert main(["inspect", str(colour_recipe(tmp_path, vit, photos))]) == 2
    told = last_line(capsys)
    assert message in told
    for field in ("data.image_size", "data.mean", "data.std"):
        assert field in told
    assert main(["inspect", str(colour_recipe(tmp_path, vit, photos, image_size=8, mean=MEAN, std=STD))]) == 0


# ---- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end", "local"])
def test_as_many_labels_of_other_names_are_told_and_learned(
    method: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vit = colour_vit(tmp_path / "vit", [f"{method} {i}" for i in range(3)], PROCESSORS["squeezed"])
    recipe, run = colour_recipe(tmp_path, vit, photos), tmp_path / "run"
    arguments = ["train", str(recipe), "--out", str(run), "--quiet", *sets(method=method)]
    assert main(arguments) == 0
    (told,) = [record.message for record in caplog.records if "the model's labels are" in record.message]
    assert advice_in(told) == sets(model__new_head="true")
    experiment = Experiment(load_recipe(recipe, sets(method=method)[1::2]))
    model: Any = experiment.load(run / "model")
    assert model.config.id2label == dict(enumerate(COLOURS))
    drawn = Experiment(load_recipe(recipe, [*sets(method=method), *advice_in(told)][1::2])).build()
    state, stored = drawn.state_dict(), ViTForImageClassification.from_pretrained(vit).state_dict()
    heads = [name for name in state if name.endswith("classifier.weight")]
    assert heads
    assert all(not torch.equal(state[name], stored["classifier.weight"]) for name in heads)
    (stem,) = {name for name in state if name.endswith("cls_token")} if method == "end-to-end" else {None}
    assert stem is None or torch.equal(state[stem], stored["vit.embeddings.cls_token"])


def test_labels_of_the_same_names_are_not_told(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vit = colour_vit(tmp_path / "vit", ["Red", "Green", "Blue"], PROCESSORS["squeezed"])
    assert main(["train", str(colour_recipe(tmp_path, vit, photos)), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert not [record for record in caplog.records if "the model's labels are" in record.message]
