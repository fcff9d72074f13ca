"""Prompts: their states are those of pipelines, lie beside latents, and reach the forward of a class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY, tiny_diffuser, velocity
from PIL import Image
from text_encoders import (
    TRANSFORMERS,
    clip,
    pipeline_of,
    save_encoder,
    save_pipeline,
    t5,
    tokenizer,
)
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.data import LatentBatches, latent_folder, prompt_states
from diffusionblocks.data.image_folder import CaptionedPictures
from diffusionblocks.data.latent_data import LatentData, LatentScale
from diffusionblocks.data.latent_shards import Prompts, noted_prompts, write_shards
from diffusionblocks.data.prompt_states import load_prompt_encoder
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import parse_recipe
from diffusionblocks.families import family_named, rebuild_config

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "dog"]


# ---- encoders ----------------------------------------------------------------------------------------------


def test_states_of_one_encoder_are_its_own_and_zero_behind_the_text(tmp_path: Path) -> None:
    states = load_prompt_encoder(str(save_encoder(tmp_path)), None, CPU)(PROMPTS)
    assert {name: (tuple(value.shape), value.dtype) for name, value in states.items()} == {
        "encoder_hidden_states": ((2, 8, 24), torch.bfloat16),
        "encoder_attention_mask": ((2, 8), torch.bool),
    }
    assert states["encoder_attention_mask"].sum(1).tolist() == [6, 2], "a word a token, and the end of the text"
    with torch.no_grad():
        alone = t5(24)(input_ids=torch.tensor([[11, 1]])).last_hidden_state
    torch.testing.assert_close(states["encoder_hidden_states"][1:, :2], alone.bfloat16(), rtol=0.02, atol=0.02)
    assert not states["encoder_hidden_states"][1, 2:].any()


def test_a_pooled_state_is_kept(tmp_path: Path) -> None:
    clip(20).save_pretrained(tmp_path)
    tokenizer(8).save_pretrained(tmp_path)
    states = load_prompt_encoder(str(tmp_path), 5, CPU)(PROMPTS)
    assert [tuple(value.shape) for value in states.values()] == [(2, 5, 20), (2, 5), (2, 20)]


class _Stopped(Exception):
    """A transformer has been told of its prompts."""


#: What a pipeline is called with, beside prompts, so that it is guided.
GUIDED: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"true_cfg_scale": 2.0},
    "QwenImagePipeline": {"true_cfg_scale": 2.0},
    "HunyuanVideoPipeline": {"true_cfg_scale": 2.0, "num_frames": 5},
    "PixArtAlphaPipeline": {"use_resolution_binning": False},
    "PixArtSigmaPipeline": {"use_resolution_binning": False},
    "SanaPipeline": {"use_resolution_binning": False},
    "PRXPipeline": {"use_resolution_binning": False},
    "WanPipeline": {"num_frames": 5},
    "LTXPipeline": {"num_frames": 9},
}
#: Those that tell the transformer of positive and negative prompts in two calls, that of the positive first.
IN_TWO_CALLS = ("FluxPipeline", "QwenImagePipeline", "HunyuanVideoPipeline", "Lumina2Pipeline", "WanPipeline")


def told_by(pipeline: Any, prompts: list[str], **more: Any) -> list[dict[str, Tensor]]:
    """What a pipeline tells its transformer of prompts, and of the empty ones that it leads away from, if it does."""
    kind, told = type(pipeline).__name__, []
    calls = 2 if kind in IN_TWO_CALLS else 1

    def stop(module: object, args: object, options: dict[str, Any]) -> None:
        told.append({name: value for name, value in options.items() if isinstance(value, Tensor)})
        if len(told) == calls:
            raise _Stopped

    hook = pipeline.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", **more}
    options |= GUIDED.get(kind, {})
    if "true_cfg_scale" in options:
        options["negative_prompt"] = [""] * len(prompts)
    with pytest.raises(_Stopped):
        pipeline(prompt=prompts, **options)
    hook.remove()
    if calls == 2 or kind == "Flux2Pipeline":  # the last is not guided
        return told
    both = {name: value for name, value in told[0].items() if len(value) == 2 * len(prompts)}
    return [{name: value.chunk(2)[part] for name, value in both.items()} for part in (1, 0)]


NAMES = {"attention_mask": "encoder_attention_mask", "encoder_hidden_states_mask": "encoder_attention_mask"}


def check_states(ours: dict[str, Tensor], told: dict[str, Tensor]) -> None:
    """Equal to the bit; places that a pipeline does not have, as it pads to its longest prompt, are empty."""
    told = {NAMES.get(name, name): value for name, value in told.items()}
    unsaid = {"encoder_attention_mask"} - told.keys()  # Qwen-Image's, where it is full
    assert ours.keys() - unsaid <= told.keys()
    length = told["encoder_hidden_states"].shape[1]
    for name, value in ours.items():
        shown, rest = (value, None) if name == "pooled_projections" else (value[:, :length], value[:, length:])
        theirs = told[name] if name in told else torch.ones_like(shown)
        assert torch.equal(shown, theirs.to(value.dtype)), name
        assert rest is None or not rest.any(), name


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_states_are_those_that_a_pipeline_tells_its_transformer(kind: str, tmp_path: Path) -> None:
    """When it is called, by the defaults of its call: of short, long and empty prompts, and of the negative ones."""
    if kind == "PRXPipeline":
        pytest.importorskip("ftfy", reason="PRXPipeline needs it")
    pipeline = pipeline_of(kind)
    make = load_prompt_encoder(str(save_pipeline(pipeline, tmp_path)), None, CPU)
    empty = make.empty()
    for prompts in (PROMPTS, [""], ["cat dog " * 600, "a cat"]):
        positive, *negative = told_by(pipeline, prompts)
        check_states(make(prompts), positive)
        for told in negative:
            check_states({name: value.expand(len(prompts), *value.shape[1:]) for name, value in empty.items()}, told)
    if kind == "Flux2Pipeline":  # not guided: the empty prompt is one like others
        check_states(empty, told_by(pipeline, [""])[0])
    shorter = load_prompt_encoder(str(tmp_path), 12, CPU)  # --prompt-length
    empty, length = shorter.empty(), {"tokenizer_max_length" if kind == "PRXPipeline" else "max_sequence_length": 12}
    positive, *negative = told_by(pipeline, ["cat dog " * 600], **length)
    for ours, told in zip((shorter(["cat dog " * 600]), empty), (positive, *negative), strict=False):
        check_states(ours, told)


def test_every_pipeline_is_checked() -> None:
    assert set(TRANSFORMERS) == set(prompt_states._RETURNS)
    page = (Path(__file__).parents[2] / "docs" / "text_to_image.md").read_text()
    assert [name for name in TRANSFORMERS if f"`{name}`" not in page] == []


def test_places_behind_a_prompt_change_nothing_of_qwen_image() -> None:
    """Its pipeline pads to the longest prompt of a batch, and cached states to one length."""
    kind = "QwenImageTransformer2DModel"
    model, random = tiny_diffuser(kind), torch.Generator().manual_seed(0)
    z, states = (torch.randn(2, *shape, generator=random) for shape in ((4, 8, 8), (6, 24)))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    padded = {
        "encoder_hidden_states": torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, 10)),
        "encoder_hidden_states_mask": torch.nn.functional.pad(mask, (0, 10)),
    }
    time, plain = torch.tensor([0.3, 0.7]), {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}
    with torch.no_grad():
        of_both = [velocity(model, kind, z, time, told) for told in (plain, padded)]
    torch.testing.assert_close(*of_both, rtol=1e-4, atol=1e-5)


def test_a_mask_that_a_pipeline_leaves_out_has_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image's, where all prompts of a batch are equally long: as is the empty one, alone."""
    from diffusers import QwenImagePipeline

    from diffusionblocks.data.prompt_states import _OfPipeline

    def embeds(self: object, prompt: list[str], device: object) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([5 + len(text) for text in prompt])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return mask[..., None].expand(-1, -1, 24).float(), mask

    monkeypatch.setattr(QwenImagePipeline, "_get_qwen_prompt_embeds", embeds)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    make = _OfPipeline(QwenImagePipeline(**parts), "it", 20, CPU)
    empty, states = make.empty(), make(["a cat", "dog"])
    assert empty["encoder_attention_mask"].sum(1).tolist() == [5]
    assert states["encoder_attention_mask"].sum(1).tolist() == [10, 8]
    assert {value.shape[1] for made in (empty, states) for value in made.values()} == {20}


def test_encoders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded: .*; give a folder or hub name of a pipeline"):
        load_prompt_encoder(str(tmp_path), None, CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogView4Pipeline"}')
    with pytest.raises(ValueError, match="is a CogView4Pipeline, of which it is not known what its prompts become"):
        load_prompt_encoder(str(tmp_path), None, CPU)
    folder = str(save_encoder(tmp_path / "t5"))
    with pytest.raises(ValueError, match=r"--prompt-length 9: .* takes at most 8 tokens"):
        load_prompt_encoder(folder, 9, CPU)


def test_pictures_have_their_prompts_beside_them(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").touch()
    with pytest.raises(ValueError, match=r"has no pictures .*; for its videos give frames"):
        CaptionedPictures(tmp_path, "train")
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a cat\n")
    with pytest.raises(ValueError, match=r"b\.png has no prompt: write it into b\.txt beside it"):
        CaptionedPictures(tmp_path, "train")
    (tmp_path / "b.txt").write_text("")
    assert [(Path(row.where).name, row.label, row.prompt) for row in CaptionedPictures(tmp_path, "train")] == [
        ("a.jpg", 0, "a cat"),
        ("b.png", 0, ""),
    ]


# ---- shards and batches ------------------------------------------------------------------------------------


def states(rows: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(rows, 5, 24, generator=random).bfloat16(),
        "encoder_attention_mask": torch.arange(5) <= torch.arange(rows)[:, None] % 5,
        "pooled_projections": torch.randn(rows, 20, generator=random).bfloat16(),
    }


EMPTY = {name: value[0] for name, value in states(1, seed=1).items()}


def latents(rows: int, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    mean, std = (torch.rand(rows, 4, *size, generator=random).half() for _ in range(2))
    return mean, std, torch.zeros(rows, dtype=torch.int64)


@pytest.fixture
def data(tmp_path: Path) -> LatentData:
    """Ten latents with prompts, in shards of 4, 4 and 2."""
    options: dict[str, Any] = {"shard_rows": 4, "class_names": ["image"], "vae": "vae", "scale": LatentScale(1.0)}
    rows = [(*latents(10), states(10))]
    write_shards(tmp_path, "train", rows, **options, prompts=Prompts("encoder", 5, EMPTY))
    return latent_folder(tmp_path)


def test_shards_give_back_the_states(data: LatentData, tmp_path: Path) -> None:
    for name, value in states(10).items():
        assert torch.equal(data.rows(name, torch.arange(10)), value)
        assert torch.equal(data.part(3).rows(name, torch.arange(3)), value[[0, 3, 6]])
        assert torch.equal(data.empty[name], EMPTY[name])
    noted = noted_prompts(tmp_path, "train")
    assert noted is not None
    assert (noted.text_encoder, noted.length) == ("encoder", 5)
    (tmp_path / "train-empty.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-empty\.safetensors is missing, the states of the empty prompt"):
        latent_folder(tmp_path)


def test_states_that_are_not_those_of_the_empty_prompt_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_rows": 4, "class_names": ["image"], "vae": "vae", "scale": LatentScale(1.0)}
    shorter = {name: value[:, :3] for name, value in states(10).items()}
    with pytest.raises(ValueError, match=r"states .*: must be .*, as the empty prompt's"):
        write_shards(tmp_path, "train", [(*latents(10), shorter)], **options, prompts=Prompts("encoder", 5, EMPTY))
    bad = states(10) | {"pooled_projections": torch.full((10, 20), torch.inf)}
    with pytest.raises(ValueError, match="states must be finite in bfloat16"):
        write_shards(tmp_path, "train", [(*latents(10), bad)], **options, prompts=Prompts("encoder", 5, EMPTY))


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_share_of_the_examples_gets_the_empty_prompt(data: LatentData, placement: str) -> None:
    indices = torch.arange(10).repeat(200)
    own = states(10)
    batches = LatentBatches(data, device=CPU, placement=placement, prompt_dropout=0.25)
    batch = batches(indices, torch.Generator().manual_seed(0))
    dropped = (batch["pooled_projections"] == EMPTY["pooled_projections"]).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.04)
    for name, value in own.items():
        assert torch.equal(batch[name][~dropped], value[indices[~dropped]]), "the others have their own, of one row"
        assert torch.equal(batch[name][dropped], EMPTY[name].expand(int(dropped.sum()), *EMPTY[name].shape))
    again = batches(indices, torch.Generator().manual_seed(0))
    assert all(torch.equal(again[name], value) for name, value in batch.items())
    without = LatentBatches(data, device=CPU, placement=placement)(indices, torch.Generator().manual_seed(0))
    assert torch.equal(without["pixel_values"], batch["pixel_values"]), "the latents are drawn as ever"
    assert torch.equal(without["pooled_projections"], own["pooled_projections"][indices])


def test_constants_are_told_of_every_example(data: LatentData) -> None:
    batches = LatentBatches(data, device=CPU, constants={"guidance": torch.tensor(3.5)})
    assert batches(torch.arange(3), None)["guidance"].tolist() == [3.5, 3.5, 3.5]


# ---- what a class reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name, tiny in TINY.items() if name != "CogView4Transformer2DModel"])
def test_a_class_reads_cached_latents_and_states(data: LatentData, kind: str) -> None:
    """One loss of every class that reads no more than a prompt, of batches as recipes make them."""
    config = rebuild_config(kind, TINY[kind].config)
    family = family_named(kind)
    assert family.takes_shape(config, data.example_shape)
    batch_of = family.batch_of(config)
    assert batch_of is not None
    batch = batch_of(LatentBatches(data, device=CPU, constants={"guidance": torch.tensor(3.5)})(torch.arange(2), None))
    assert batch["pixel_values"].dim() == (5 if len(TINY[kind].sizes) == 3 else 4), "an image is a video of one frame"
    masks = [name for name in batch if name.endswith("mask")]
    assert all(torch.equal(batch[name], states(2)["encoder_attention_mask"]) for name in masks)
    model = db.convert(tiny_diffuser(kind), db.BlocksConfig(num_blocks=2))
    assert set(batch) - {"pixel_values"} <= set(model.target.conditions)  # type: ignore[arg-type, union-attr]
    assert bool(model.loss(batch, block=0, generator=torch.Generator().manual_seed(0)).isfinite().all())
    family.check_conditions(config, {name: value[:1] for name, value in batch.items()}, "model")


@pytest.mark.parametrize("kind", [name for name in TINY if name != "CogView4Transformer2DModel"])
def test_a_class_trains_by_a_recipe(kind: str, data: LatentData, tmp_path: Path) -> None:
    """Its blocks are built one after another; tables that no state dict names are there where they compute."""
    values = {
        "name": "tiny",
        "device": "cpu",
        "model": {"type": kind, "config": TINY[kind].config},
        "blocks": {"num_blocks": 2, "split": "experts"},
        "data": {"kind": "latents", "source": str(tmp_path), "scale": 1.0, "constants": {"guidance": 3.5}},
        "train": {"steps": 1, "batch_size": 2, "resident": "active"},
        "evaluate": {"features": None, "samples": 2, "grid": ["equal-quantile"]},
    }
    trainer = Experiment(parse_recipe(values, "test")).trainer(progress=False)
    trainer.train()
    batch = trainer.stepper.batches(torch.arange(2), None)
    losses = [trainer.model.loss(batch, block=b, generator=torch.Generator().manual_seed(0)) for b in (0, 1)]  # type: ignore[operator]
    assert bool(torch.stack(losses).isfinite().all())


def test_data_that_lack_what_a_class_reads_are_refused(data: LatentData) -> None:
    kind = "SD3Transformer2DModel"
    config, family = rebuild_config(kind, TINY[kind].config), family_named(kind)
    with pytest.raises(ValueError, match=r"reads pooled_projections, which the data do not have; cache states"):
        family.check_conditions(config, {"encoder_hidden_states": torch.zeros(1, 5, 24)}, "it")
    narrow = {name: value[None][..., :7] for name, value in data.empty.items()}
    with pytest.raises(ValueError, match=r"\(1, any, 24\), got .*\(1, 5, 7\): encode prompts by the text encoder of"):
        family.check_conditions(config, narrow, "it")


def test_states_belong_to_every_row(data: LatentData) -> None:
    short = {name: tuple(shard[:-1] for shard in shards) for name, shards in data.states.items()}
    with pytest.raises(ValueError, match="a row a latent"):
        dataclasses.replace(data, states=short)
