"""Masked language models of transformers as blocks, in every variant that their configs have, against their classes.

One block is the class itself; several blocks are its layers. All logits are the class's but that of the mask, which no
text has. Then: training, generation, saving, export, building from files and afresh, branches, and what is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ENCODERS,
    LENGTH,
    VOCAB,
    fresh_encoder,
    randomise_adaptive,
    record_calls,
    same_states,
    seeded,
    tiny,
    token_batch,
    train_a_little,
)
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks import families
from diffusionblocks.core.materialise import build
from diffusionblocks.core.soup import soup
from diffusionblocks.core.weights import Fresh, pretrained_source
from diffusionblocks.evaluation.bits import bits_per_character

MASK = VOCAB
NOISE = db.Masking(vocab_size=VOCAB + 1, mask_token_id=MASK)
LAYERS = 4
T = torch.tensor([1.0, 0.9, 0.5, 0.3, 1e-3, 0.0])
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
BERT: dict[str, dict[str, Any]] = {
    "default": {},
    "untied": {"tie_word_embeddings": False},
    "eager": {"attn_implementation": "eager", "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "others": {"hidden_act": "silu", "type_vocab_size": 5, "chunk_size_feed_forward": 3},
    "no-dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
#: What configs can say: each is exact.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": BERT | {"no-padding": {"pad_token_id": None}},
    "roberta": BERT | {"padding": {"pad_token_id": 3}},
    "xlm-roberta": {"default": {}, "padding": {"pad_token_id": 0}},
    "camembert": {"default": {}, "untied": {"tie_word_embeddings": False}},
    "electra": BERT | {"as-wide": {"embedding_size": 32}},
    "distilbert": {
        "default": {},
        "untied": {"tie_word_embeddings": False, "pad_token_id": None},
        "others": {"activation": "relu", "sinusoidal_pos_embds": True, "chunk_size_feed_forward": 3},
        "eager": {"attn_implementation": "eager", "dropout": 0.0, "attention_dropout": 0.2},
    },
    "modernbert": {
        "default": {},
        "untied": {"tie_word_embeddings": False, "decoder_bias": False, "norm_bias": True},
        "kinds": {"layer_types": KINDS, "local_attention": 4, "attn_implementation": "eager"},
        "local": {"layer_types": ["sliding_attention"] * 4, "local_attention": 2},
        "global": {"global_attn_every_n_layers": 1, "pad_token_id": None},
        "biases": {"attention_bias": True, "mlp_bias": True, "classifier_bias": True, "sparse_prediction": True},
        "dropout": {"attention_dropout": 0.2, "embedding_dropout": 0.1, "mlp_dropout": 0.1},
        "others": {
            "hidden_activation": "silu",
            "classifier_activation": "relu",
            "norm_eps": 1e-3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    },
}
each_variant = pytest.mark.parametrize(
    ("family", "values"),
    [
        pytest.param(family, values, id=f"{family}-{name}")
        for family in ENCODERS
        for name, values in VARIANTS[family].items()
    ],
)
each_class = pytest.mark.parametrize("family", ENCODERS)


def original_of(family: str, values: dict[str, Any] | None = None, **more: Any) -> Any:
    return tiny(family, layers=LAYERS, **((values or {}) | more))


def blocks_of(original: nn.Module, num_blocks: int = 2, **config: Any) -> db.DiffusionBlocks:
    return db.convert(original, db.BlocksConfig(num_blocks=num_blocks, **({"noise": NOISE} | config)))


def masked_tokens(t: Tensor = T) -> Tensor:
    tokens = token_batch(len(t))["input_ids"]
    return NOISE.corrupt(tokens, t, torch.rand(tokens.shape, generator=seeded(3)))


def of_tokens(logits: Tensor) -> Tensor:
    """All logits but the mask's, which is the last."""
    return logits[..., :MASK]


# ---- blocks are the class ----------------------------------------------------------------------------------------


@each_variant
@torch.no_grad()
def test_one_block_is_the_class(family: str, values: dict[str, Any]) -> None:
    """Bit for bit; in training, too, where both draw the same dropout. Shorter texts and longer ones."""
    original = original_of(family, values)
    model = blocks_of(original, 1).eval()
    for length in (3, LENGTH, model.target.length // 3 * 3):
        z = token_batch(6, length=length)["input_ids"].masked_fill(
            torch.rand(6, length, generator=seeded(3)) < 0.5, MASK
        )
        logits = model.block(0)({}, z, T)
        assert torch.equal(of_tokens(logits), of_tokens(original(input_ids=z).logits))
        assert logits.dtype == torch.float32
        assert bool((logits.softmax(dim=-1)[..., MASK] == 0).all())
    outputs = []
    for network in (lambda z: model.train().block(0)({}, z, T), lambda z: original.train()(input_ids=z).logits):
        torch.manual_seed(5)
        outputs.append(of_tokens(network(masked_tokens())))
    assert torch.equal(*outputs)


@each_variant
@torch.no_grad()
def test_a_block_is_the_class_with_its_layers_alone(family: str, values: dict[str, Any]) -> None:
    original = original_of(family, values)
    model = blocks_of(original, layers=(1, 3)).eval()
    outputs = []
    for b, block in enumerate(model.blocks):
        cut = copy.deepcopy(original)
        path, _, name = model.family.layers_path(original).rpartition(".")
        layers = original.get_submodule(f"{path}.{name}")
        few = nn.ModuleList(copy.deepcopy(layers[i]) for i in model.partition.layer_range(b))
        setattr(cut.get_submodule(path), name, few)
        level = torch.linspace(*model.partition.interval(b), 7)[1:]
        outputs.append(of_tokens(block({}, masked_tokens(level), level)))
        assert torch.equal(outputs[-1], of_tokens(cut(input_ids=masked_tokens(level)).logits))
    assert not torch.allclose(*outputs, atol=1e-2)


@each_variant
def test_a_training_step_reaches_all_of_a_block_and_nothing_else(family: str, values: dict[str, Any]) -> None:
    model = blocks_of(original_of(family, values)).train()
    randomise_adaptive(model)
    torch.manual_seed(0)
    losses = model.loss(token_batch(), 1, seeded())
    assert losses.shape == (6,)
    assert losses.isfinite().all()
    losses.mean().backward()
    assert not [n for n, p in model.block(1).named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not [n for n, p in model.block(0).named_parameters() if p.grad is not None]


@each_class
def test_the_level_matters_once_it_is_learned(family: str) -> None:
    model = blocks_of(original_of(family), 1).eval()
    z, other = masked_tokens(), 1 - T
    with torch.no_grad():
        assert torch.equal(model.block(0)({}, z, T), model.block(0)({}, z, other))
        randomise_adaptive(model)
        assert not torch.allclose(model.block(0)({}, z, T), model.block(0)({}, z, other), atol=1e-2)


@each_class
@torch.no_grad()
def test_kernels_agree(family: str) -> None:
    results = []
    for kernel in ("eager", "sdpa"):
        model = blocks_of(original_of(family, attn_implementation=kernel)).eval()
        randomise_adaptive(model)
        results.append(model.block(0)({}, masked_tokens(), torch.full((6,), 0.8)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


@each_class
def test_chunks_and_checkpoints_compute_the_same(family: str) -> None:
    model = blocks_of(original_of(family)).eval()
    randomise_adaptive(model)
    block = model.block(0)
    results = []
    for chunk, again in ((None, False), (5, False), (None, True)):
        block.loss_chunk, block.activation_checkpointing = chunk, again
        losses = model.loss(token_batch(), 0, seeded())
        parameters = [p for p in block.parameters() if p.requires_grad]
        results.append([losses, *torch.autograd.grad(losses.sum(), parameters)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_rotary_positions_of_a_bfloat16_model_are_exact() -> None:
    original = original_of("modernbert").bfloat16()
    rotary = blocks_of(original).block(1).network.get_submodule("model.rotary_emb")
    frequencies = {name.rpartition(".")[2]: buffer for name, buffer in rotary.named_buffers()}
    for kind, theta in (("full_attention", 160_000.0), ("sliding_attention", 10_000.0)):
        expected = theta ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(frequencies[f"{kind}_inv_freq"], expected)


# ---- what z hides and what texts have ----------------------------------------------------------------------------


@each_class
def test_hidden_tokens_are_hidden(family: str) -> None:
    """What is masked reaches the network by no road; with what is shown as the positive control."""
    model = blocks_of(original_of(family)).eval()
    tokens, level = token_batch()["input_ids"], torch.full((6,), 0.8)
    seen: list[Tensor] = []
    model.block(0).register_forward_hook(lambda _, args, output: seen.extend([args[1], output]))
    model.loss({"input_ids": tokens}, block=0, generator=seeded(), level=level)
    hidden = seen[0] == MASK
    assert 0 < hidden.float().mean() < 1
    for where, same in ((~hidden, True), (hidden, False)):
        changed = tokens.where(where, (tokens + 1) % VOCAB)
        model.loss({"input_ids": changed}, block=0, generator=seeded(), level=level)
        assert torch.equal(seen[0], seen[-2]) == same
        assert torch.equal(seen[1], seen[-1]) == same


@each_class
def test_texts_have_no_mask_and_the_length_of_their_template(family: str) -> None:
    model = blocks_of(original_of(family)).eval()
    with torch.no_grad():  # the mask would be the likeliest token of all
        decoder = model.block(0).network.get_submodule(model.family.decoder)
        if decoder.bias is not None:
            decoder.bias[MASK] = 100.0
    calls = record_calls(model)
    texts = model.generate([3, 4, 5], steps=7)
    assert [place for place, _ in calls] == [model.partition.block_of(level) for _, level in calls]
    assert {place for place, _ in calls} == {0, 1}
    assert texts.shape == (3, model.target.length) == (3, 22 if "roberta" in family or family == "camembert" else 24)
    assert texts.max() < MASK
    template = token_batch(1)["input_ids"][0]
    template[3:7] = MASK
    texts = model.generate(range(20), steps=4, template=template)
    assert torch.equal(texts[:, template != MASK], template[template != MASK].expand(20, -1))
    assert texts.max() < MASK
    assert len({tuple(row) for row in texts.tolist()}) > 5
    assert model.generate(template=template, temperature=0.0).max() < MASK


@pytest.mark.parametrize("place", [0, 9, VOCAB])
def test_the_mask_may_stand_anywhere_in_the_vocabulary(place: int) -> None:
    """A model whose ids are counted in another way gives the same losses and texts, counted so."""
    original: Any = original_of("bert")
    ids = torch.cat([torch.arange(place), torch.tensor([MASK]), torch.arange(place, MASK)])  # new id -> old id
    new = ids.argsort()
    moved = copy.deepcopy(original)
    with torch.no_grad():
        embedding, bias = moved.bert.embeddings.word_embeddings.weight, moved.cls.predictions.decoder.bias
        embedding.copy_(embedding[ids].clone())
        bias.copy_(bias[ids].clone())
    noise = db.Masking(vocab_size=VOCAB + 1, mask_token_id=place)
    ours, theirs = blocks_of(moved, noise=noise).eval(), blocks_of(original).eval()
    tokens = token_batch()["input_ids"]
    for b in range(2):
        losses = ours.loss({"input_ids": new[tokens]}, b, seeded())
        torch.testing.assert_close(losses, theirs.loss({"input_ids": tokens}, b, seeded()))
    template = tokens[0].clone()
    template[2:9] = MASK
    texts = [m.generate([0, 1], template=t, temperature=0.0) for m, t in ((ours, new[template]), (theirs, template))]
    assert torch.equal(texts[0], new[texts[1]])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_uniform_model_takes_the_bits_of_its_tokens(family: str) -> None:
    """Of 27 tokens and a mask, log2(27): what no text has takes no bits."""
    model = blocks_of(original_of(family)).eval()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.network.get_submodule(model.family.decoder).parameters():
                parameter.zero_()
    networks = {b: lambda z, t, b=b: model.block(b)({}, z, t) for b in range(2)}
    bits = bits_per_character(networks, model.noise, [token_batch(600)], model.partition, times=4)  # type: ignore[arg-type]
    assert bits.bits == pytest.approx(math.log2(VOCAB), abs=4 * bits.standard_error)
    assert bits.standard_error < 0.1


# ---- files, exports, branches --------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_saving_and_files_give_the_same(family: str, tied: bool, tmp_path: Path) -> None:
    original = original_of(family, tie_word_embeddings=tied)
    config = db.BlocksConfig(num_blocks=2, noise=NOISE)
    model = db.convert(original, config).eval()
    exported: Any = model.export_initialisation()
    assert type(exported) is type(original)
    with torch.no_grad():
        assert torch.equal(exported(masked_tokens()).logits, original(masked_tokens()).logits)
    start = copy.deepcopy(model.state_dict())
    train_a_little(model)
    assert not same_states(model.state_dict(), start)
    model.save_pretrained(tmp_path / "blocks")
    loaded = db.load(tmp_path / "blocks").eval()
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.blocks_config == model.blocks_config
    assert torch.equal(loaded.generate([1]), model.generate([1]))
    for b in range(2):
        assert torch.equal(loaded.loss(token_batch(), b, seeded()), model.loss(token_batch(), b, seeded()))
    original.save_pretrained(tmp_path / "original")
    name = type(original).__name__
    source = pretrained_source(name, tmp_path / "original", {}, seed=0, dtype=None)
    assert type(source).__name__ == "InFiles"
    built = build(source, config).eval()
    plain = db.convert(families.pretrained(name, tmp_path / "original", {}), config).eval()
    assert same_states(built.state_dict(), plain.state_dict())
    for b in range(2):
        assert torch.equal(built.loss(token_batch(), b, seeded()), plain.loss(token_batch(), b, seeded()))


@each_class
def test_blocks_that_are_not_told_the_level_are_ordinary_models(family: str, tmp_path: Path) -> None:
    model = blocks_of(original_of(family), target={"kind": "tokens", "noise_input": False})
    assert not [name for name in model.state_dict() if "noise_embedding" in name or "adaptive" in name]
    train_a_little(model)
    z = masked_tokens()
    for b in range(1 if family == "modernbert" else 2):
        exported: Any = model.export_block(b)
        exported.save_pretrained(tmp_path / str(b))
        again = type(exported).from_pretrained(tmp_path / str(b)).eval()
        with torch.no_grad():
            ours = model.denoise({}, z, model.partition.interval(b)[1])
            assert torch.equal(of_tokens(ours), of_tokens(again(z).logits))
    if family == "modernbert":
        with pytest.raises(ValueError, match="layers of a ModernBertForMaskedLM differ with their place"):
            model.export_block(1)


@pytest.mark.parametrize("family", [name for name in ENCODERS if name != "modernbert"])
def test_a_block_at_one_level_is_an_ordinary_model(family: str) -> None:
    model = blocks_of(original_of(family))
    train_a_little(model)
    randomise_adaptive(model)
    model.eval()
    other, level = model.partition.interval(0)
    exported: Any = model.export_block(0, level)
    z = masked_tokens()
    with torch.no_grad():
        ours, theirs = of_tokens(model.denoise({}, z, level)), of_tokens(exported.eval()(z).logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (of_tokens(model.denoise({}, z, (level + other) / 2)) - theirs).abs().max() > 1e-3  # of this level alone


def test_norms_without_a_bias_have_no_place_for_a_shift() -> None:
    with pytest.raises(ValueError, match="more than a ModernBertForMaskedLM can hold: it has a shift of attn_norm"):
        blocks_of(original_of("modernbert")).export_block(0)


@pytest.mark.parametrize("family", [name for name in ENCODERS if name != "modernbert"])
def test_a_branch_is_its_trunk(family: str) -> None:
    trunk = blocks_of(original_of(family), 1).eval()
    randomise_adaptive(trunk)
    branched = db.branch(trunk, 3)
    assert branched.partition.num_layers == 3 * LAYERS
    assert torch.equal(branched.generate([1, 2], steps=9), trunk.generate([1, 2], steps=9))
    train_a_little(branched)
    assert not torch.equal(branched.generate([1, 2], steps=9), trunk.generate([1, 2], steps=9))


@pytest.mark.parametrize("act", [lambda: db.branch(MODERN_TRUNK, 2), lambda: soup(MODERN)], ids=["branch", "soup"])
def test_layers_that_keep_their_place_are_neither_branched_nor_mixed(act: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="layers of a ModernBertForMaskedLM differ with their place"):
        act()


MODERN = blocks_of(original_of("modernbert"))
MODERN_TRUNK = blocks_of(original_of("modernbert"), 1)


@each_class
def test_fresh_blocks_are_drawn_as_the_class_draws(family: str) -> None:
    """Names and shapes of what conversion gives, and of each tensor the spread that the class gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original: Any = fresh_encoder(family, layers=8, **({} if family == "distilbert" else {"intermediate_size": 96}))
    config = db.BlocksConfig(num_blocks=2, noise=NOISE)
    expected = db.convert(original, config).state_dict()
    name = type(original).__name__
    built = build(Fresh(name, original.config, seed=0), config)
    states = built.state_dict()
    assert {n: t.shape for n, t in states.items()} == {n: t.shape for n, t in expected.items()}
    for tensor, values in states.items():
        if values.dim() > 1 and values.numel() > 500:
            assert values.std().item() == pytest.approx(expected[tensor].std().item(), rel=0.15), tensor
    alone = build(Fresh(name, original.config, seed=0), config, blocks=[1]).block(1).state_dict()
    assert same_states(alone, built.block(1).state_dict())
    shared = [n for n in alone if ".layers." not in n and ".layer." not in n]
    assert all(torch.equal(alone[n], built.block(0).state_dict()[n]) for n in shared)


# ---- refusals ------------------------------------------------------------------------------------------------------

PLAIN = blocks_of(original_of("bert")).eval()
TOKENS = token_batch()["input_ids"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
CASES: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (
        lambda: db.convert(original_of("bert")),
        ("BertForMaskedLM does not say which of its 28 tokens is the mask", "set blocks.noise.mask_token_id", "= 28"),
    ),
    (lambda: blocks_of(original_of("bert"), noise=db.Masking(mask_token_id=5)), ("vocab_size = 27", "to 28")),
    (lambda: db.Masking(vocab_size=28, mask_token_id=28), ("mask_token_id must be an id below vocab_size = 28", "28")),
    (
        lambda: db.convert(tiny("masked"), db.BlocksConfig(noise=db.Masking(mask_token_id=3))),
        ("blocks.noise.mask_token_id = 3", "MaskedTransformer is the id after", "leave mask_token_id out"),
    ),
    (
        lambda: db.convert(tiny("masked"), db.BlocksConfig(target={"kind": "tokens", "noise_input": False})),  # type: ignore[arg-type]
        ("target.noise_input = false", "MaskedTransformer knows the noise level by itself"),
    ),
    (lambda: blocks_of(original_of("bert", is_decoder=True)), ("is_decoder = True", "set is_decoder to False")),
    (lambda: blocks_of(original_of("electra", is_decoder=True)), ("ElectraForMaskedLM has is_decoder = True",)),
    (lambda: _with_other_padding().loss({"input_ids": TOKENS}, 0), ("pad_token_id was changed to 5", "counted from 1")),
    (lambda: blocks_of(_without_padding()), ("RobertaForMaskedLM has pad_token_id = None",)),
    (
        lambda: blocks_of(
            original_of("modernbert", rope_parameters={"full_attention": DYNAMIC, "sliding_attention": DYNAMIC})
        ),
        ("rope_type dynamic, which change with the text's length",),
    ),
    (lambda: PLAIN.loss({"input_ids": TOKENS.repeat(1, 3)}, 0), ("texts of 36 tokens", "takes 1 to 24")),
    (lambda: PLAIN.loss({"input_ids": TOKENS[:, :0]}, 0), ("texts of 0 tokens",)),
    (lambda: PLAIN.loss({"input_ids": TOKENS.float()}, 0), ("int64", "(6, 12)", "float32")),
    (lambda: PLAIN.loss({"input_ids": TOKENS + 3}, 0), ("[0, 27]",)),
    (lambda: PLAIN.loss({"input_ids": TOKENS.where(TOKENS > 5, MASK)}, 0), ("has the mask, 27", "without a collator")),
    (
        lambda: PLAIN.loss({"input_ids": TOKENS, "token_type_ids": TOKENS * 0}, 0),
        ("takes no token_type_ids", "attention_mask, input_ids"),
    ),
    (
        lambda: PLAIN.loss({"input_ids": TOKENS, "attention_mask": (TOKENS > 3).long()}, 0),
        ("attention_mask has zeros",),
    ),
    (lambda: PLAIN.generate(template=torch.full((30,), MASK)), ("template", "(24,)", "(30,)")),
    (lambda: PLAIN.generate(template=torch.full((5,), MASK + 1)), ("from 0 to 27 (27: the mask), got 28",)),
]


def _with_other_padding() -> db.DiffusionBlocks:
    model = blocks_of(original_of("roberta"))
    model.config.pad_token_id = 5
    return model


def _without_padding() -> nn.Module:
    original: Any = original_of("roberta")
    original.config.pad_token_id = None
    return original  # type: ignore[no-any-return]


@pytest.mark.parametrize(("act", "words"), CASES, ids=[case[1][0] for case in CASES])
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"
