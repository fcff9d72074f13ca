"""Pretrained weights: read block by block they are what the library loads whole; the rest is left to the library."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from building_helpers import CLASSES, LAYERS, each_family, reference, same, saved, tensors
from helpers import (
    HIDDEN,
    IMAGE,
    NUM_LABELS,
    POLICIES,
)
from transformers import ViTConfig, ViTModel

import diffusionblocks as db
from diffusionblocks import families as families
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import InFiles, InMemory, WeightSource, pretrained_source


@pytest.mark.slow
@pytest.mark.each_value
@each_family
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained_weights_are_read_block_by_block(
    family: str, shards: dict[str, str], dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, family, dtype, **shards)
    assert bool(shards) == any(path.name.endswith(".index.json") for path in tmp_path.iterdir())
    with caplog.at_level(logging.INFO, "diffusionblocks"):
        source = pretrained_source(CLASSES[family], tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    assert "is read block by block" in caplog.text
    for policy in POLICIES:
        config = db.BlocksConfig(shared=policy)
        built, expected = build(source, config), reference(family, tmp_path, config)
        assert same(built, expected)
        assert families.config_values(CLASSES[family], built.config) == families.config_values(
            CLASSES[family], expected.config
        )
    some = build(source, db.BlocksConfig(), blocks=[1])
    assert same(some.block(1), reference(family, tmp_path, db.BlocksConfig()).block(1))


def test_what_was_read_is_not_the_file(tmp_path: Path) -> None:
    """Files are mapped: training must not write to them, nor one block into another's copy of a shared part."""
    saved(tmp_path, "dit")
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    source = pretrained_source("DiT", tmp_path, {}, seed=0, dtype=None)
    model = build(source, db.BlocksConfig())
    again = build(source, db.BlocksConfig())
    with torch.no_grad():
        for parameter in model.block(0).parameters():
            parameter.add_(1.0)
    assert same(model.block(1), again.block(1))
    assert same(build(source, db.BlocksConfig()), again)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_new_head_is_drawn_afresh_from_the_seed(tmp_path: Path) -> None:
    """The files are a backbone's, whose names lack the prefix, and which has no classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        ViTModel(
            ViTConfig(
                image_size=IMAGE,
                patch_size=4,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
            )
        ).save_pretrained(tmp_path)
    values = {"num_labels": NUM_LABELS}
    source = pretrained_source(CLASSES["vit"], tmp_path, values, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    built = build(source, db.BlocksConfig())
    expected = tensors(reference("vit", tmp_path, db.BlocksConfig(), **values))
    mine = tensors(built)
    assert mine.keys() == expected.keys()
    differ = {n.split(".", 3)[-1] for n in mine if not torch.equal(mine[n], expected[n])}
    assert differ == {"classifier.weight"}
    heads = [built.block(b).network.get_parameter("classifier.weight") for b in range(3)]
    assert float(heads[0].detach().std()) == pytest.approx(0.02, rel=0.3)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    again = build(pretrained_source(CLASSES["vit"], tmp_path, values, seed=0, dtype=None), db.BlocksConfig())
    assert same(built, again)
    other = build(pretrained_source(CLASSES["vit"], tmp_path, values, seed=1, dtype=None), db.BlocksConfig())
    assert not torch.equal(other.block(0).network.get_parameter("classifier.weight"), heads[0])


def test_weights_that_the_library_changes_are_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DINOv2's SwiGLU is stored as one matrix that the library splits."""
    saved(tmp_path, "dinov2", use_swiglu_ffn=True)
    with caplog.at_level(logging.INFO, "diffusionblocks"):
        source = pretrained_source(CLASSES["dinov2"], tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InMemory)
    assert "is loaded whole on the host" in caplog.text
    assert same(build(source, db.BlocksConfig()), reference("dinov2", tmp_path, db.BlocksConfig()))
    assert same(build(source, db.BlocksConfig(), blocks=[2]).block(2), build(source, db.BlocksConfig()).block(2))


def test_a_stated_dtype_is_the_librarys_affair(tmp_path: Path) -> None:
    saved(tmp_path, "vit")
    source = pretrained_source(CLASSES["vit"], tmp_path, {"dtype": "bfloat16"}, seed=0, dtype=None)
    assert isinstance(source, InMemory)
    assert source.dtype == torch.bfloat16
    config = db.BlocksConfig()
    assert same(build(source, config), reference("vit", tmp_path, config, dtype="bfloat16"))


@pytest.mark.parametrize(("config_dtype", "road"), [("absent", InFiles), ("float32", InFiles)])
def test_the_configs_dtype_counts(config_dtype: str, road: type[WeightSource], tmp_path: Path) -> None:
    saved(tmp_path, "vit", torch.bfloat16)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described.pop("dtype") == "bfloat16"
    if config_dtype != "absent":
        described["dtype"] = config_dtype
    (tmp_path / "config.json").write_text(json.dumps(described))
    source = pretrained_source(CLASSES["vit"], tmp_path, {}, seed=0, dtype=None)
    assert type(source) is road
    assert source.dtype == (torch.bfloat16 if config_dtype == "absent" else torch.float32)
    assert same(build(source, db.BlocksConfig()), reference("vit", tmp_path, db.BlocksConfig()))


@pytest.mark.parametrize("spoil", ["no-file", "other-shape", "lost-layer"])
def test_what_cannot_be_read_is_left_to_the_library(spoil: str, tmp_path: Path) -> None:
    """It refuses, in its own words, what it refused before; or fills the gap."""
    model = saved(tmp_path, "vit")
    values: dict[str, Any] = {}
    if spoil == "no-file":
        (tmp_path / "model.safetensors").unlink()
    elif spoil == "other-shape":
        values = {"num_labels": NUM_LABELS + 1}
    else:
        state = {n: t for n, t in model.state_dict().items() if not n.startswith("vit.layers.5.")}
        model.save_pretrained(tmp_path, state_dict=state)  # type: ignore[operator]
    if spoil == "lost-layer":
        source = pretrained_source(CLASSES["vit"], tmp_path, values, seed=0, dtype=None)
        assert isinstance(source, InMemory)
        assert same(build(source, db.BlocksConfig()).block(0), reference("vit", tmp_path, db.BlocksConfig()).block(0))
        return
    with pytest.raises((OSError, RuntimeError)):
        families.pretrained(CLASSES["vit"], tmp_path, values)
    with pytest.raises((OSError, RuntimeError)):
        pretrained_source(CLASSES["vit"], tmp_path, values, seed=0, dtype=None)
