"""Text to video by command line: clips and prompts cached once, trained on, resumed, sampled as mp4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderKLLTXVideo, AutoencoderKLWan
from diffusers_models import TINY
from text_encoders import wan_pipeline
from videos import av, write_video

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.data.autoencoder import load_vae
from diffusionblocks.data.latent_data import LatentScale
from diffusionblocks.data.latent_shards import latent_folder
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.planning import Predictor

CPU = torch.device("cpu")
WAN = "WanTransformer3DModel"
MEAN, STD = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of Wan's class: it halves sides and, after the first frame, time."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": MEAN, "latents_std": STD}
    AutoencoderKLWan(**sizes, temperal_downsample=[True], **statistics).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny WanPipeline's text encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of twelve frames, each with its prompt beside it."""
    folder = tmp_path_factory.mktemp("videos")
    for name, text in (("a", "a photo of a red cat"), ("b", "a large dog")):
        write_video(folder / f"{name}.mp4", 12)
        (folder / f"{name}.txt").write_text(text)
    return folder


def encode(videos: Path, vae: Path, out: Path, *more: str) -> int:
    where = ["--source", str(videos), "--vae", str(vae), "--out", str(out)]
    return main(["encode", *where, "--size", "16", "--fps", "30", *more])


def test_latents_of_clips_are_those_of_the_class_itself(vae: Path, videos: Path) -> None:
    model = load_vae(str(vae), CPU)
    assert model.scale == LatentScale(1.0, 0.0, MEAN, STD)
    clips = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = model.scale
    mean, std = model.encode(clips, scale)
    with torch.no_grad():
        posterior = model.module.encode(clips).latent_dist
        expected = (posterior.mean - torch.tensor(MEAN).view(4, 1, 1, 1)) / torch.tensor(STD).view(4, 1, 1, 1)
        decoded = model.module.decode(posterior.mean).sample.clamp(-1, 1)
    assert mean.shape == std.shape == (2, 4, 3, 8, 8)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(model.decode(mean, scale), decoded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("timed", [False, True])
def test_statistics_among_the_weights_are_followed(timed: bool, tmp_path: Path) -> None:
    """LTX-Video's, whose later decoders are told a time."""
    torch.manual_seed(0)
    two: dict[str, Any] = {"block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    two |= {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "downsample_type": ("conv",) * 2}
    two |= {"upsample_residual": (False,) * 2, "upsample_factor": (1, 1)}
    two |= {"spatio_temporal_scaling": (True, False), "decoder_spatio_temporal_scaling": (True, False)}
    three: dict[str, Any] = dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (1,) * 3)
    three["decoder_inject_noise"] = (False,) * 3
    made = AutoencoderKLLTXVideo(latent_channels=4, timestep_conditioning=timed, **two, **three)
    made.latents_mean.copy_(torch.tensor(MEAN))
    made.latents_std.copy_(torch.tensor(STD))
    made.save_pretrained(tmp_path)
    model = load_vae(str(tmp_path), CPU)
    scale = model.scale
    assert scale is not None
    assert scale.latents_mean == pytest.approx(MEAN)
    assert scale.latents_std == pytest.approx(STD)
    mean, _ = model.encode(torch.zeros(1, 3, 3, 64, 64), scale)
    assert model.decode(mean, scale).shape == (1, 3, 3, 64, 64)


def test_encode_train_sample(
    vae: Path, videos: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, check = tmp_path / "latents", tmp_path / "check.png"
    prompts = ["--text-encoder", str(encoder), "--prompt-length", "8"]
    assert encode(videos, vae, latents, "--frames", "5", *prompts, "--figure", str(check)) == 0
    printed = capsys.readouterr().out
    assert "4 latents (4, 3, 8, 8) of 1 classes" in printed
    assert "mean of the first 1 clips" in printed
    assert check.is_file()
    data = latent_folder(latents)
    assert [tuple(mean.shape) for mean in data.mean] == [(4, 4, 3, 8, 8)]
    assert json.loads((latents / "train.json").read_text())["fps"] == 30
    states = data.states["encoder_hidden_states"][0]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])

    values: dict[str, Any] = {
        "name": "video",
        "device": "cpu",
        "model": {"type": WAN, "config": {**TINY[WAN].config}},
        "blocks": {"num_blocks": 2, "split": "experts", "noise": {"kind": "flow", "shift": 3.0}},
        "data": {"kind": "latents", "source": str(latents), "scale": 1.0},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-3, "sample_every": 4},
        "evaluate": {"samples": 2, "steps": [2], "grid": ["uniform"], "features": None, "grid_images": 2},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert Predictor(load_recipe(file)).at_hand["pixel_values"] == (4, 3, 8, 8)
    out, model = tmp_path / "run", ["--model", str(tmp_path / "run" / "model")]
    assert main(["train", str(file), "--out", str(out), "--quiet"]) == 0
    assert len(list((out / "samples").glob("step-*.png"))) == 2
    prompts = ["--prompt", "a red dog", "--prompt", "a cat"]
    assert main(["sample", str(file), *model, "--out", str(tmp_path / "s"), "--quiet", *prompts]) == 0
    assert (tmp_path / "s" / "grid.png").is_file()
    names = sorted(path.name for path in (tmp_path / "s" / "videos").iterdir())
    assert names == ["000000.mp4", "000001.mp4"]
    with av.open(str(tmp_path / "s" / "videos" / names[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 30
    assert len(frames) == 5
    blocks, section = db.load(out / "model"), Experiment(load_recipe(file)).recipe.data
    own = section.conditions(data, torch.tensor([0]), CPU)  # type: ignore[attr-defined]
    told = {"encoder_hidden_states": own["encoder_hidden_states"]}
    samples = blocks.sample(seeds=[0], inputs=told, sizes=(3, 8, 8), steps=2, grid="uniform")
    assert section.to_pixels(CPU)(samples).shape == (1, 3, 5, 16, 16)  # type: ignore[attr-defined]
    assert main(["evaluate", str(file), *model]) == 0
    assert main(["boundaries", str(file), *model, "--out", str(tmp_path / "s"), "--count", "1", "--examples", "2"]) == 0
    features = ["--set", "evaluate.features=inception", "--set", "data.test_split=train"]
    assert main(["evaluate", str(file), *model, *features]) == 2
    assert "compares images, and the latents are of videos: set evaluate.features to null" in capsys.readouterr().err


def test_bad_input_is_one_line(
    vae: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Path
) -> None:
    prompts = ["--text-encoder", str(encoder), "--prompt-length", "8"]

    def refused(message: str, *options: str, vae: Path = vae, videos: Path = videos) -> None:
        assert encode(videos, vae, tmp_path / "out", *options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line
        assert not list((tmp_path / "out").glob("*"))

    refused("frames = 7: of these", "--frames", "7", *prompts)
    refused("gives back 5: must be such as 5 or 9", "--frames", "7", *prompts)
    refused("13 frames at 30 a second take 0.43 s", "--frames", "13", *prompts)
    refused("frames = 0: must be at least 1", "--frames", "0", *prompts)
    refused("fps = 0.0: must be finite and > 0", "--frames", "5", "--fps", "0", *prompts)
    where = ["--source", str(videos), "--vae", str(vae), "--out", str(tmp_path / "out")]
    assert main(["encode", *where]) == 2
    assert "has no pictures in train/CLASS/, nor parquet files of the split 'train'; for its videos give frames" in (
        capsys.readouterr().err
    )
    refused("fps = 30.0 is of videos: give frames", *prompts)
    refused("has no files in train/CLASS/ that end in .avi", "--frames", "5")
    refused("has videos in files, not in columns", "--frames", "5", "--image-column", "img")
    refused("videos are read from a local folder", "--frames", "5", videos=tmp_path / "nowhere")
    images = tmp_path / "images"
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(images)
    refused("it is of images; for videos give one such as AutoencoderKLWan", "--frames", "5", *prompts, vae=images)
