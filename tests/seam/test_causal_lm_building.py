"""Language models built block by block, from a seed or from files: tied weights, the target's rows, exact positions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from building_helpers import same, tensors
from helpers import (
    CAUSAL_CLASSES,
    CAUSAL_FAMILIES,
    POLICIES,
    fresh_causal,
    same_states,
    seeded,
    tiny,
    token_batch,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import diffusionblocks as db
from diffusionblocks import families as families
from diffusionblocks.core.materialise import build, empty, materialise
from diffusionblocks.core.weights import Fresh, InFiles, pretrained_source

LAYERS = 4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

each_family = pytest.mark.parametrize("family", CAUSAL_FAMILIES)
each_policy = pytest.mark.parametrize("shared", POLICIES)
each_tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def config_of(shared: str = "replicated", **values: Any) -> db.BlocksConfig:
    return db.BlocksConfig(num_blocks=2, shared=shared, **values)  # type: ignore[arg-type]


def fresh(family: str, tied: bool, seed: int = 0) -> Fresh:
    return Fresh(
        CAUSAL_CLASSES[family], fresh_causal(family, layers=LAYERS, tie_word_embeddings=tied).config, seed=seed
    )


def saved(folder: Path, family: str, tied: bool, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    model: Any = tiny(family, layers=LAYERS, seed=4, tie_word_embeddings=tied).to(dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(folder, **options)


def reference(family: str, folder: Path, config: db.BlocksConfig) -> db.DiffusionBlocks:
    return db.convert(families.pretrained(CAUSAL_CLASSES[family], folder, {}), config)


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def each_has_memory_of_its_own(model: db.DiffusionBlocks, shared: str) -> bool:
    everything: dict[int, Tensor] = {id(t): t for block in model.blocks for t in tensors(block).values()}
    names = sum(len(tensors(block)) for block in model.blocks)
    one_storage_each = len({t.untyped_storage().data_ptr() for t in everything.values()}) == len(everything)
    return one_storage_each and (len(everything) == names) == (shared != "joint")


def given(model: db.DiffusionBlocks, block: int) -> None:
    embedding = model.block(block).network.get_parameter(EMBEDDING)
    torch.testing.assert_close(model.block(block).target.table, F.normalize(embedding.float(), dim=-1))


# ---- from a seed ------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@each_family
@each_policy
@each_tying
def test_fresh_blocks_have_one_space_and_memory_of_their_own(family: str, shared: str, tied: bool) -> None:
    source, config = fresh(family, tied), config_of(shared)
    whole = build(source, config)
    assert each_has_memory_of_its_own(whole, shared)
    for b, block in enumerate(whole.blocks):
        given(whole, b)
        embedding, head = (block.network.get_parameter(name) for name in (EMBEDDING, HEAD))
        assert torch.equal(embedding, head) == tied
        assert embedding is not head
        assert block.network.get_submodule("model.rotary_emb.rotary").inv_freq.dtype == torch.float32
    assert torch.equal(whole.block(0).target.embedding, whole.block(1).target.embedding)
    backwards = empty(fresh(family, tied), config)
    for b in (1, 0):
        materialise(backwards, b, source)
    assert same(whole, backwards)
    if shared != "joint":
        some = build(fresh(family, tied), config, blocks=[1])
        assert same(some.block(1), whole.block(1))
        assert all(t.is_meta for t in tensors(some.block(0)).values())
        loss = some.loss(token_batch(), 1, seeded())
        assert torch.equal(loss, whole.loss(token_batch(), 1, seeded()))
    assert not torch.equal(build(fresh(family, tied, seed=1), config).target.embedding, whole.target.embedding)


def test_training_the_head_leaves_the_embedding_it_was_tied_to() -> None:
    model = build(fresh("llama", tied=True), config_of())
    network = model.block(0).network
    before = network.get_parameter(EMBEDDING).detach().clone()
    with torch.no_grad():
        network.get_parameter(HEAD).add_(1.0)
    assert torch.equal(network.get_parameter(EMBEDDING), before)


def test_random_rows_are_those_that_conversion_draws() -> None:
    config = config_of(target={"kind": "next-token", "embedding": "frozen"}, seed=3)
    built = build(fresh("llama", tied=False), config)
    expected = db.convert(tiny("llama", layers=LAYERS), config).target.embedding
    for block in built.blocks:
        assert torch.equal(block.target.embedding, expected)


# ---- from files ---------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@each_family
@each_policy
@each_tying
def test_pretrained_blocks_are_what_conversion_makes(family: str, shared: str, tied: bool, tmp_path: Path) -> None:
    saved(tmp_path, family, tied)
    assert (HEAD in names_in(tmp_path)) != tied
    source = pretrained_source(CAUSAL_CLASSES[family], tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    config = config_of(shared)
    built, expected = build(source, config), reference(family, tmp_path, config)
    assert same(built, expected)
    assert each_has_memory_of_its_own(built, shared)
    assert families.config_values(source.model_class, built.config) == families.config_values(
        source.model_class, expected.config
    )
    for b in range(2):
        given(built, b)
    if shared != "joint":
        assert same(build(source, config, blocks=[1]).block(1), expected.block(1))
    original = families.pretrained(CAUSAL_CLASSES[family], tmp_path, {})
    assert same_states(built.export_initialisation().state_dict(), original.state_dict())


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}], ids=["one-file", "shards"])
@each_tying
def test_bfloat16_weights_in_files(tied: bool, shards: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path, "llama", tied, torch.bfloat16, **shards)
    source = pretrained_source("LlamaForCausalLM", tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    built, expected = build(source, config_of()), reference("llama", tmp_path, config_of())
    assert same(built, expected)
    frequencies = families.pretrained("LlamaForCausalLM", tmp_path, {}).model.rotary_emb.inv_freq
    for block in built.blocks:
        found = block.network.get_submodule("model.rotary_emb.rotary").inv_freq
        assert torch.equal(found, frequencies)
        assert found.dtype == torch.float32
        assert block.network.get_parameter(HEAD).dtype == torch.bfloat16
    built.save_pretrained(tmp_path / "blocks")
    loaded = db.load(tmp_path / "blocks")
    assert same(loaded, built)


def test_a_tied_name_that_the_files_have_all_the_same_is_read(tmp_path: Path) -> None:
    """Some published files hold the head of a tied model as well; the library and we make the same of it."""
    saved(tmp_path, "llama", tied=True)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {HEAD: state[EMBEDDING].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = pretrained_source("LlamaForCausalLM", tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    assert same(build(source, config_of()), reference("llama", tmp_path, config_of()))


def test_a_lost_head_of_an_untied_model_is_drawn_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The positive control: only what is tied is read from another's place."""
    saved(tmp_path, "llama", tied=False)
    state = load_file(tmp_path / "model.safetensors")
    del state[HEAD]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, "diffusionblocks"):
        source = pretrained_source("LlamaForCausalLM", tmp_path, {}, seed=0, dtype=None)
    assert isinstance(source, InFiles)
    head = build(source, config_of()).block(1).network.get_parameter(HEAD)
    assert not torch.equal(head, state[EMBEDDING])
    assert float(head.detach().std()) == pytest.approx(0.02, rel=0.2)
