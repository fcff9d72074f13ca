"""The masked text model against its own class: one block is the original; more blocks are its layers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import HIDDEN, LENGTH, POLICIES, VOCAB, convert, fresh_masked, parameter_names, seeded, tiny, token_batch
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.weights import Fresh
from diffusionblocks.models import MaskedTransformer
from diffusionblocks.models.masked_transformer import RotaryPositions, rotate

T = torch.tensor([1.0, 0.9, 0.5, 0.3, 1e-3, 0.0])


def masked_tokens(t: Tensor = T) -> Tensor:
    tokens = token_batch(len(t))["input_ids"]
    return db.Masking().corrupt(tokens, t, torch.rand(tokens.shape, generator=seeded(3)))


# ---- blocks are the original -------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
def test_one_block_is_the_original(shared: str) -> None:
    original = tiny("masked")
    model = db.convert(original, db.BlocksConfig(num_blocks=1, shared=shared)).eval()
    z = masked_tokens()
    with torch.no_grad():
        logits = model.blocks[0]({}, z, T)
        assert torch.equal(logits, original(z, T))
    assert logits.shape == (6, LENGTH, VOCAB)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("layers", [(2, 2, 2), (1, 2, 3)])
def test_a_block_is_the_original_with_its_layers_alone(layers: tuple[int, ...]) -> None:
    original = tiny("masked", layers=6)
    model = db.convert(original, db.BlocksConfig(layers=layers)).eval()
    outputs = []
    for b, block in enumerate(model.blocks):
        cut = copy.deepcopy(original)
        cut.layers = nn.ModuleList(copy.deepcopy(original.layers[i]) for i in model.partition.layer_range(b))
        level = torch.linspace(*model.partition.interval(b), 7)[1:]
        z = masked_tokens(level)
        with torch.no_grad():
            outputs.append(block({}, z, level))
            assert torch.equal(outputs[-1], cut(z, level))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("shared", POLICIES)
def test_gradients_stay_in_the_block(shared: str, block: int, checkpointing: bool) -> None:
    model = convert("masked", shared=shared)
    model.blocks[block].activation_checkpointing = checkpointing
    model.loss(token_batch(), block=block, generator=seeded()).mean().backward()
    common = {id(p) for p in model.shared_parameters()}
    assert bool(common) == (shared == "joint")
    own = f"blocks.{block}."
    reached = parameter_names(model, with_grad=True)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(n.startswith(own) or id(named[n]) in common for n in reached)
    trainable = {n for n, p in named.items() if n.startswith(own) and p.requires_grad}
    assert trainable <= reached
    assert all(bool((named[n].grad != 0).any()) for n in trainable)
    stem = {n for n in trainable if "token_embedder" in n or "time_embedder" in n or ".head." in n}
    assert bool(stem) == (shared != "frozen")


def test_checkpointing_computes_the_same() -> None:
    model = convert("masked")
    plain = model.loss(token_batch(), block=1, generator=seeded())
    gradients = torch.autograd.grad(plain.sum(), [p for p in model.blocks[1].parameters() if p.requires_grad])
    model.blocks[1].activation_checkpointing = True
    again = model.loss(token_batch(), block=1, generator=seeded())
    assert torch.equal(plain, again)
    for a, b in zip(gradients, torch.autograd.grad(again.sum(), list(model.blocks[1].parameters())), strict=True):
        assert torch.equal(a, b)


def test_export_gives_the_class_back() -> None:
    original = tiny("masked")
    exported = db.convert(original, db.BlocksConfig()).export_initialisation()
    assert isinstance(exported, MaskedTransformer)
    with torch.no_grad():
        assert torch.equal(exported.eval()(masked_tokens(), T), original(masked_tokens(), T))


# ---- the class itself ------------------------------------------------------------------------------------------


def test_a_fresh_model_is_uniform_and_its_layers_are_the_identity() -> None:
    model = fresh_masked()
    x = torch.randn(6, LENGTH, HIDDEN, generator=seeded())
    with torch.no_grad():
        assert (model(masked_tokens(), T) == 0).all()
        rotation = model.positions(masked_tokens())
        assert torch.equal(model.layers[0](x, model.time_embedder(T), rotation), x)


def test_the_papers_shape() -> None:
    """MD4's for text8: 4 d^2 of attention, 3 d * 2048 of the MLP and 6 d modulations a layer; condition 64."""
    with torch.device("meta"):
        model = MaskedTransformer()
    d, h, c = 768, 2048, 64
    layer = 4 * d * d + 3 * d * h + 6 * d * (c + 1)
    stem = 28 * c + (c + 1) * d + 2 * (c + 1) * c
    assert sum(p.numel() for p in model.parameters()) == 12 * layer + stem + 2 * d * (c + 1) + 27 * (d + 1)


def test_every_position_sees_every_other_and_the_order_counts() -> None:
    model = tiny("masked")
    z = masked_tokens()[2:3]
    with torch.no_grad():
        before = model(z, T[2:3])
        for i in range(LENGTH):
            changed = z.clone()
            changed[0, i] = (z[0, i] + 1) % VOCAB
            assert ((model(changed, T[2:3]) - before).abs().amax(dim=-1) > 1e-6).all()
        flipped = model(z.flip(1), T[2:3]).flip(1)
        assert not torch.allclose(flipped, before, atol=1e-3)
        assert not torch.allclose(model(z, T[3:4]), before, atol=1e-3)  # and so does the level


def test_rotary_positions_depend_on_distance_alone() -> None:
    """The product of a query and a key turned by their positions, against complex numbers; and shifted."""
    q, k = torch.randn(2, 1, 1, LENGTH, 8, generator=seeded()).double()
    cos, sin = (part.double() for part in RotaryPositions(8)(torch.zeros(1, LENGTH, dtype=torch.int64)))
    turned_q, turned_k = (rotate(x.float(), (cos.float(), sin.float())).double() for x in (q, k))
    frequencies = torch.tensor([10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    for i in range(LENGTH):
        for j in range(LENGTH):
            a, b = (torch.complex(x[0, 0, n, :4], x[0, 0, n, 4:]) for x, n in ((q, i), (k, j)))
            expected = (a * b.conj() * torch.polar(torch.ones(4).double(), (i - j) * frequencies)).real.sum()
            torch.testing.assert_close(turned_q[0, 0, i] @ turned_k[0, 0, j], expected, atol=1e-5, rtol=1e-5)


def test_initialisation_does_not_depend_on_depth() -> None:
    """What building block by block needs: a layer's weights have variance 1 / fan-in at any depth and place."""
    for layers in (1, 8):
        torch.manual_seed(0)
        model = fresh_masked(layers=layers, hidden_size=128, mlp_size=256)
        for layer in model.layers:
            for name in ("qkv", "proj", "gate_up", "down"):
                weight = layer.get_parameter(f"{name}.weight")
                assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.03)
    config = fresh_masked(layers=6).config
    names = ["layers.2.qkv.weight", "head.linear.bias", "token_embedder.proj.weight"]
    drawn = [dict(Fresh("MaskedTransformer", config, seed=1).tensors(1, range(2, 4), names)) for _ in range(2)]
    other = dict(Fresh("MaskedTransformer", config, seed=1).tensors(2, range(2, 4), names))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in names)
    assert not torch.equal(drawn[0][names[0]], other[names[0]])
    assert torch.equal(drawn[0][names[2]], other[names[2]])


def test_a_bfloat16_model_keeps_its_positions() -> None:
    model = tiny("masked").bfloat16()
    cos, _ = model.positions(torch.zeros(1, 300, dtype=torch.int64))
    assert cos.dtype == torch.float32
    assert cos[299, 0].item() == pytest.approx(math.cos(299), abs=1e-4)
    assert model(masked_tokens(), T).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 1}, r"vocab_size must be >= 2 .*got 1"),
        ({"num_layers": 0}, "num_layers must be > 0, got 0"),
        ({"embedding_size": 15}, "embedding_size must be even .*got 15"),
        ({"num_attention_heads": 32}, "even multiple of num_attention_heads = 32 .*got 32"),
    ],
)
def test_sizes_that_cannot_be(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh_masked(**({"layers": values.pop("num_layers")} if "num_layers" in values else values))
