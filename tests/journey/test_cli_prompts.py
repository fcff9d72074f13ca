"""Text to image by command line: latents and states of prompts cached once, trained on, resumed, sampled, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers_models import TINY
from PIL import Image
from safetensors.torch import load_file
from text_encoders import sd3_pipeline, wan_pipeline

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.common.progress import is_progress
from diffusionblocks.data.prompt_states import load_prompt_encoder
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe

PROMPTS = ["a photo of a red cat", "a large dog", "a small blue cat"]
SD3, WAN, FLUX = "SD3Transformer2DModel", "WanTransformer3DModel", "FluxTransformer2DModel"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder that halves its images."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, each with its prompt beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(PROMPTS[i % 3])
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pipeline's text encoders, by the class of the model."""
    folder = tmp_path_factory.mktemp("encoders")
    sd3_pipeline().save_pretrained(folder / "sd3")
    wan_pipeline().save_pretrained(folder / "wan")
    return {SD3: str(folder / "sd3"), FLUX: str(folder / "sd3"), WAN: str(folder / "wan")}


def encoded(pictures: Path, vae: Path, encoder: str, out: Path) -> int:
    where = ["--source", str(pictures), "--vae", str(vae), "--out", str(out)]
    return main(["encode", *where, "--size", "16", "--text-encoder", encoder, "--prompt-length", "8"])


def recipe(kind: str, latents: Path, path: Path, **changes: Any) -> Path:
    """A recipe of two blocks on a class's tiny config."""
    values: dict[str, Any] = {
        "name": path.stem,
        "device": "cpu",
        "model": {"type": kind, "config": {**TINY[kind].config}},
        "blocks": {"num_blocks": 2, "split": "experts", "noise": {"kind": "flow", "shift": 3.0}},
        "data": {"kind": "latents", "source": str(latents), "scale": 1.0},
        "train": {"steps": 6, "batch_size": 4, "lr": 1e-3, "accumulation": 2, "ema_half_life": 20, "log_every": 2},
        "evaluate": {"samples": 4, "steps": [3], "grid": ["uniform"], "guidance": [3.0], "features": None},
    }
    values["evaluate"]["grid_images"] = 4
    for name, more in changes.items():
        values[name].update(more)
    path.write_text(yaml.safe_dump(values))
    return path


def check_samples(file: Path, folder: Path, encoder: str, images: Path) -> None:
    """The files hold what `model.sample` gives for states that the pipeline's encoder makes of the prompts."""
    experiment, model = Experiment(load_recipe(file)), db.load(folder)
    make = load_prompt_encoder(encoder, 8, torch.device("cpu"))
    names = set(model.block(0).input_names)
    told, empty = ({n: v for n, v in make(texts).items() if n in names} for texts in (["a red dog", "a cat"], ["", ""]))
    sizes = (8, 8) if len(model.target.shape) == 3 else (1, 8, 8)  # type: ignore[union-attr, arg-type]
    options: dict[str, Any] = {"steps": 3, "grid": "uniform", "guidance": 3.0, "sizes": sizes}
    latents = model.sample(seeds=[0, 1], inputs=told, negative_inputs=empty, **options)
    for number, pixels in enumerate(experiment.recipe.data.to_pixels(torch.device("cpu"))(latents)):  # type: ignore[attr-defined]
        written = np.asarray(Image.open(images / f"{number:06d}.png")).transpose(2, 0, 1)
        assert np.array_equal(written, pixels.numpy())


@pytest.mark.parametrize("kind", [SD3, WAN])
def test_encode_train_resume_sample_export(
    kind: str, pictures: Path, vae: Path, encoder: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encoded(pictures, vae, encoder[kind], tmp_path / "latents") == 0
    printed = capsys.readouterr()
    assert "encoder_hidden_states" in printed.out
    assert all(map(is_progress, printed.err.splitlines())), "no bars of what diffusers loads"
    lora = {"lora": {"rank": 2}} if kind == WAN else {}
    file = recipe(kind, tmp_path / "latents", tmp_path / "run.yaml", blocks=lora)
    for name in ("whole", "halves"):
        if name == "halves":  # stopped in the middle of both blocks
            trainer = Experiment(load_recipe(file)).trainer(tmp_path / name, progress=False)
            trainer.train(until=5)
            assert [parameters.steps for parameters in trainer.sets.values()] != [6, 6]
        more = ["--set", "train.sample_every=6", "--set", "train.resident=active"] if name == "whole" else []
        assert main(["train", str(file), "--out", str(tmp_path / name), "--quiet", *more]) == 0
    drawn = [Image.open(path) for path in sorted((tmp_path / "whole" / "samples").glob("step-*.png"))]
    assert len(drawn) == 2, "decoded by the autoencoder, of prompts of the data; training is not changed by them"
    assert np.asarray(drawn[0]).shape == np.asarray(drawn[1]).shape
    for block in sorted((tmp_path / "whole" / "model").glob("*.safetensors")):
        resumed = load_file(tmp_path / "halves" / "model" / block.name)
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_file(block).items())
    out, model = str(tmp_path / "samples"), ["--model", str(tmp_path / "whole" / "model")]
    prompts = ["--prompt", "a red dog", "--prompt", "a cat"]
    assert main(["sample", str(file), *model, "--out", out, "--quiet", *prompts]) == 0
    assert sorted(path.name for path in Path(out, "images").iterdir()) == ["000000.png", "000001.png"]
    check_samples(file, tmp_path / "whole" / "model", encoder[kind], Path(out, "images"))
    assert main(["evaluate", str(file), *model]) == 0, "features: null reads no test split, and there is none"
    assert main(["boundaries", str(file), *model, "--out", out, "--count", "2", "--examples", "4"]) == 0
    if kind == WAN:
        pipeline = ["--pipeline", encoder[kind], "--out", str(tmp_path / "pipeline")]
        assert main(["export", str(file), *model, *pipeline]) == 0
        assert db.load(tmp_path / "whole" / "model").blocks_config.lora is not None
        from diffusers import WanPipeline

        loaded: Any = WanPipeline.from_pretrained(tmp_path / "pipeline", vae=None)
        assert loaded.transformer_2 is not None
        assert 0 < loaded.config.boundary_ratio < 1
