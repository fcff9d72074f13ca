"""A block's layers can wait for their weights one by one: none computes before `before_layer` was called for it."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CAUSAL_FAMILIES,
    CAUSAL_VARIANTS,
    DIT_FAMILIES,
    FAMILIES,
    MORE_CLASSIFIERS,
    convert,
    image_batch,
    noise_batch,
    seeded,
    token_batch,
)
from torch import Tensor

from diffusionblocks.common.modules import tensors_of
from diffusionblocks.training.arena import Layout
from diffusionblocks.training.residency import bytes_needed, layer_of_tensors

IN_TURN = (*FAMILIES, *MORE_CLASSIFIERS, *DIT_FAMILIES, *CAUSAL_FAMILIES, *CAUSAL_VARIANTS, "masked")


def batch_for(family: str) -> dict[str, Tensor]:
    if family in DIT_FAMILIES:
        return noise_batch()
    return image_batch() if family in (*FAMILIES, *MORE_CLASSIFIERS) else token_batch()


@pytest.mark.parametrize("family", IN_TURN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_layer_computes_before_its_weights_are_there(family: str, checkpointing: bool) -> None:
    block = convert(family, num_blocks=1).blocks[0]
    block.train()
    block.activation_checkpointing = checkpointing
    batch = batch_for(family)
    torch.manual_seed(0)  # of dropout
    expected = block.loss(batch, seeded()).detach()
    layers = layer_of_tensors(block)
    assert block.family.calls_layers
    assert layers or family == "diffusers-dit"  # whose stem has a part of its first layer
    late = [[t for t in tensors_of(block) if layers.get(id(t)) == number] for number in range(3)]
    values = [[t.detach().clone() for t in of_layer] for of_layer in late]

    def arrive(number: int) -> None:
        calls.append(number)
        with torch.no_grad():
            for tensor, value in zip(late[number], values[number], strict=True):
                tensor.copy_(value)

    for comes in (True, False):  # the second shows that the first sees something
        calls: list[int] = []
        with torch.no_grad():
            for tensor in (t for of_layer in late for t in of_layer if t.is_floating_point()):
                tensor.fill_(torch.nan)
        block.before_layer = arrive if comes else calls.append
        torch.manual_seed(0)
        loss = block.loss(batch, seeded())
        assert sorted(set(calls)) == [0, 1, 2]
        assert torch.equal(loss.detach(), expected) == (comes or not layers)
        if comes:
            loss.mean().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_a_family_that_does_not_say_so_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    block = convert("vit", num_blocks=1).blocks[0]
    monkeypatch.setattr(type(block.family), "calls_layers", False)
    own = tensors_of(block)
    layout = Layout({str(i): t for i, t in enumerate(own)})
    needs = bytes_needed(block, own, layout)
    assert len(needs) == 1
    assert layout.bytes - 256 < needs[0] <= layout.bytes


def test_bytes_are_needed_in_the_order_of_layers() -> None:
    block = convert("vit", num_blocks=1).blocks[0]
    own = tensors_of(block)
    layers = layer_of_tensors(block)
    order = sorted(range(len(own)), key=lambda i: layers.get(id(own[i]), -1))
    layout = Layout({str(i): own[i] for i in order})
    needs = bytes_needed(block, own, layout)
    sizes = [sum(t.numel() * t.element_size() for t in own if layers.get(id(t), -1) == n) for n in range(-1, 3)]
    assert len(needs) == 4
    assert all(b - a >= size for a, b, size in zip([0, *needs], needs, sizes, strict=False))
    assert needs[-1] <= sum(sizes) + 256 * len(own)
