"""A model whose blocks take turns on a device: where their weights are, and that nothing changes."""

from __future__ import annotations

import pytest
import torch
from helpers import HIDDEN, noise_batch, randomise_adaptive, same_states, seeded, tiny, token_batch

import diffusionblocks as db
from diffusionblocks.common.modules import computes_on, tensors_of

META = torch.device("meta")


def model_of(family: str = "llama", shared: str = "replicated") -> db.DiffusionBlocks:
    model = db.convert(tiny(family, layers=4), db.BlocksConfig(num_blocks=2, shared=shared))  # type: ignore[arg-type]
    randomise_adaptive(model)
    return model.eval()


def on_meta(block: torch.nn.Module) -> set[bool]:
    return {tensor.is_meta for tensor in tensors_of(block)}


@pytest.mark.parametrize("shared", ["replicated", "joint", "frozen"])
def test_only_the_block_that_runs_is_on_the_device(shared: str) -> None:
    """The meta device stands for a GPU: what computes there must be there."""
    model = model_of(shared=shared)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".shared." not in name}
    model.run_one_at_a_time("meta")
    assert model.device == computes_on(model) == META
    ids, z = token_batch(3)["input_ids"].to(META), torch.empty(3, 12, HIDDEN, device=META)
    for place in (1, 0, 0, 1):
        here, away = model.block(place), model.block(1 - place)
        assert here({"input_ids": ids}, z, torch.empty(3, device=META)).is_meta
        assert on_meta(here) == {True}
        assert on_meta(away.adaptive) == {False}
        if shared != "joint":  # else embedding and head belong to both
            assert on_meta(away.network) == {False}
    with torch.no_grad():  # block 1 is there: its own weights wait unchanged
        model.block(0)({"input_ids": ids}, z, torch.empty(3, device=META))
    found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("blocks.1.")}
    away = {name: tensor for name, tensor in found.items() if not tensor.is_meta}
    assert len(away) >= 20
    assert same_states(away, {name: before[name] for name in away})


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_taking_turns_computes_the_same(family: str) -> None:
    plain, turns = model_of(family), model_of(family)
    turns.run_one_at_a_time("cpu")
    batch = noise_batch() if family == "vit" else token_batch()
    for b in (0, 1, 1, 0):
        ours, theirs = (model.loss(batch, b, seeded(b)) for model in (turns, plain))
        assert torch.equal(ours, theirs)
    assert same_states(turns.state_dict(), plain.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_holds_one_block() -> None:
    model = model_of()
    ids, z, level = token_batch(3)["input_ids"].cuda(), torch.randn(3, 12, HIDDEN).cuda(), torch.full((3,), 0.3).cuda()
    expected = [block.cuda()({"input_ids": ids}, z, level) for block in map(model.block, range(2))]
    model.to("cpu")
    model.run_one_at_a_time("cuda")
    for place in (1, 0, 1):
        torch.testing.assert_close(model.block(place)({"input_ids": ids}, z, level), expected[place])
        assert {t.device.type for t in tensors_of(model.block(1 - place).network)} == {"cpu"}
