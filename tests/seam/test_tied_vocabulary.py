"""One table for embedding and head (`blocks.vocabulary: tied`): logits, gradients, bytes, files, branches, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from building_helpers import tensors
from helpers import LENGTH, POLICIES, VOCAB, fresh_causal, same_states, seeded, tiny, token_batch
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.core.branching import branch
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import Fresh, pretrained_source

FAMILIES = ["llama", "gemma2", "gpt2", "phi", "granite", "olmo"]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def blocks_of(family: str = "llama", blocks: int = 2, tied: bool = True, **target: Any) -> db.DiffusionBlocks:
    config = db.BlocksConfig(
        num_blocks=blocks,
        vocabulary="tied" if tied else "trained",
        target={"kind": "next-token", **target},  # type: ignore[arg-type]
    )
    return db.convert(tiny(family, layers=2 * blocks, tie_word_embeddings=True), config)


def losses(model: db.DiffusionBlocks) -> Tensor:
    z = torch.randn(3, LENGTH, model.target.table.shape[1], generator=seeded(1))  # type: ignore[attr-defined]
    batch = token_batch(3)
    return model.eval().block(0).losses(batch, batch, z, torch.full((3,), 0.5)).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_two_equal_tables_and_the_gradient_their_sum(family: str) -> None:
    tied, untied = blocks_of(family), blocks_of(family, tied=False)
    found, expected = losses(tied), losses(untied)
    assert torch.equal(found, expected)
    found.backward()
    expected.backward()
    table = tied.family.embedding_path
    names = dict(untied.block(0).network.named_parameters())
    assert {*dict(tied.block(0).network.named_parameters())} == names.keys() - {HEAD}
    for name, parameter in tied.block(0).network.named_parameters():
        gradients = [names[n].grad for n in ([name, HEAD] if name == table else [name])]
        assert all(each is not None for each in gradients)
        torch.testing.assert_close(parameter.grad, sum(gradients), rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


def test_a_table_is_counted_stepped_and_saved_once(tmp_path: Path) -> None:
    tied, untied = blocks_of(), blocks_of(tied=False)
    table = tied.block(0).network.get_parameter(TABLE)
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 2 * table.numel()  # of each of the two blocks
    assert table is not tied.block(1).network.get_parameter(TABLE)
    before = table.detach().clone()
    optimizer = torch.optim.SGD(tied.block(0).parameters(), lr=0.1)
    losses(tied).backward()
    gradient = table.grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close(table, before - 0.1 * gradient)
    tied.save_pretrained(tmp_path)
    loaded = db.load(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert loaded.blocks_config.ties
    assert same_states(loaded.state_dict(), tied.state_dict())
    assert not any(name.endswith(HEAD) for name in loaded.state_dict())
    assert torch.equal(losses(loaded), losses(tied))


def test_blocks_are_built_as_conversion_makes_them(tmp_path: Path) -> None:
    original = tiny("llama", layers=4, tie_word_embeddings=True)
    original.save_pretrained(tmp_path)  # type: ignore[operator]
    config = db.BlocksConfig(num_blocks=2, vocabulary="tied")
    built = build(pretrained_source("LlamaForCausalLM", tmp_path, {}, seed=0), config)
    assert same_states(built.state_dict(), db.convert(original, config).state_dict())
    source = Fresh("LlamaForCausalLM", fresh_causal("llama", layers=4, tie_word_embeddings=True).config, seed=0)
    fresh = tensors(build(source, config))
    assert not any(tensor.is_meta for tensor in fresh.values())


@pytest.mark.parametrize("shared", POLICIES)
def test_what_is_shared_says_how_many_tables_there_are(shared: str) -> None:
    config = db.BlocksConfig(num_blocks=2, vocabulary="tied", shared=shared)  # type: ignore[arg-type]
    model = db.convert(tiny("llama", layers=4, tie_word_embeddings=True), config)
    tables = [model.block(b).network.get_parameter(TABLE) for b in (0, 1)]
    assert (tables[0] is tables[1]) == (shared == "joint")
    assert [table.requires_grad for table in tables] == [shared != "frozen"] * 2


def test_branches_of_a_tied_trunk_are_tied() -> None:
    trunk = blocks_of(blocks=1)
    branches = branch(trunk, 2)
    assert branches.blocks_config.ties
    assert torch.equal(losses(branches), losses(trunk))
    for vocabulary in ("trained", "frozen"):
        with pytest.raises(ValueError, match=f"vocabulary = {vocabulary}: this trunk's is tied.*leave vocabulary out"):
            branch(trunk, 2, vocabulary=vocabulary)
    with pytest.raises(ValueError, match="vocabulary = tied: this trunk's is trained"):
        branch(blocks_of(blocks=1, tied=False), 2, vocabulary="tied")
    assert db.BlocksConfig(vocabulary="tied").as_trunk().vocabulary == "tied"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_exported_tied_where_its_norm_can_hold_the_scale(family: str, tmp_path: Path) -> None:
    """Gemma's norm multiplies by 1 + weight, and OLMo's has no weight: their exports have a head of their own."""
    model = blocks_of(family, noise_input=False, logit_scale=2.5).eval()
    exported: Any = model.export_block(1)
    assert exported.config.tie_word_embeddings == (family not in ("gemma2", "olmo"))
    embedding = exported.get_parameter(model.family.embedding_path)
    assert (exported.lm_head.weight is embedding) == exported.config.tie_word_embeddings
    ids = token_batch(3)["input_ids"]
    z = torch.zeros(3, LENGTH - 1, embedding.shape[1])
    exported.save_pretrained(tmp_path)
    again = type(exported).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.block(1)({"input_ids": ids}, z, torch.full((3,), 0.5), context=True)
        for each in (exported, again):
            torch.testing.assert_close(each(ids).logits[:, :-1], expected, rtol=1e-4, atol=1e-4)


def test_the_whole_is_exported_tied() -> None:
    original: Any = tiny("llama", layers=4, tie_word_embeddings=True)
    config = db.BlocksConfig(num_blocks=2, vocabulary="tied")
    exported: Any = db.convert(original, config).export_initialisation()
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert same_states(exported.state_dict(), original.state_dict())


def test_it_is_for_models_whose_tables_are_one() -> None:
    config = db.BlocksConfig(num_blocks=1, vocabulary="tied")
    with pytest.raises(ValueError, match=r"vocabulary = tied: this LlamaForCausalLM has tie_word_embeddings = False"):
        db.convert(tiny("llama", layers=2, tie_word_embeddings=False), config)
    with pytest.raises(ValueError, match=r"blocks\.vocabulary = tied is for language models"):
        db.convert(tiny("vit", layers=2), config)
    assert len(blocks_of(blocks=1).target.table) == VOCAB  # type: ignore[attr-defined]
