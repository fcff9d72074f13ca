"""Recurrent depth as one denoiser through the whole seam: what it computes, what it sees, that it trains and stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HIDDEN,
    LENGTH,
    POLICIES,
    VOCAB,
    randomise_adaptive,
    same_states,
    seeded,
    token_batch,
    without_generated_code,
)
from torch import Tensor, nn
from torch.nn import functional as F

import diffusionblocks as db
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.core.block import Block
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import Fresh
from diffusionblocks.data import TextBatches
from diffusionblocks.data.text_data import TextData
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.families import instantiate
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.planning import plan, predict
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "sequence_length": LENGTH,
    "hidden_size": HIDDEN,
    "num_prelude_layers": 1,
    "num_core_layers": 2,
    "num_coda_layers": 1,
    "num_attention_heads": 2,
    "mlp_size": 48,
    "mean_recurrence": 6,
    "backprop_depth": 3,
}
TOKENS = token_batch(4)["input_ids"]


def original() -> RecurrentDepth:
    """No parameter zero or one, as in a trained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RecurrentDepth(**SIZES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def convert(**config: Any) -> db.DiffusionBlocks:
    return db.convert(original(), db.BlocksConfig(**({"num_blocks": 1} | config)))


def recipe_of(method: str = "diffusionblocks", model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    values = {
        "name": "t",
        "method": method,
        "model": {"type": "RecurrentDepth", "config": SIZES | {"sequence_length": 32} | (model or {})},
        "blocks": {"num_blocks": 1},
        "data": {"kind": "topics", "length": 32},
        "train": {"steps": 2, "batch_size": 16} | train,
        "evaluate": {"kind": "language", "prompt_length": 8, "new_tokens": 8},
        "device": "cpu",
    }
    return parse_recipe(values, "a test")


# ---- what it computes ----------------------------------------------------------------------------------------


def test_at_the_highest_noise_a_pass_is_an_iteration_of_the_original() -> None:
    """There c_skip vanishes, c_in * z is the state, and the norm after the recurrence takes c_out out of D."""
    model, sigma = original(), 1e6
    target: Any = {"kind": "next-token", "likelihood": "learned"}
    block = convert(noise=db.EDM(sigma_max=sigma), target=target).block(0).eval()
    context = model.embed(TOKENS[:, :-1])
    rotation = model.positions(TOKENS[:, :-1])
    for layer in model.prelude:
        context = layer(context, rotation)
    state = model.initial_state(context, seeded())
    x = model.core_norm(model.core_pass(state, context, rotation))
    for layer in model.coda:
        x = layer(x, rotation)
    by_hand = model.head(model.final_norm(x))
    c_in = 1 / math.hypot(sigma, 0.5)
    with torch.no_grad():
        one_pass = block({"input_ids": TOKENS}, state / c_in, torch.full((4,), sigma))
        lower = block({"input_ids": TOKENS}, state, torch.full((4,), 0.5))
    torch.testing.assert_close(one_pass, by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_pass, model(TOKENS[:, :-1], 1, seeded()), rtol=1e-4, atol=1e-4)
    # The positive controls: two iterations are something else, and so is a lower level, where z is in D.
    assert (one_pass - model(TOKENS[:, :-1], 2, seeded())).abs().max() > 0.1
    assert (one_pass - lower).abs().max() > 0.1


def logits_by_hand(block: Block, tokens: Tensor, z: Tensor, sigma: Tensor, *, added: bool = False) -> Tensor:
    """The network at levels (batch,), sigma_data 0.5, from the parts of a block whose adaptive norms are not zero.

    With an added likelihood F is read as it is, and what z says follows behind the head.
    """
    network, data = block.network, 0.5
    total = (sigma**2 + data**2)[:, None, None]
    c_skip, c_in, c_out = data**2 / total, total.rsqrt(), sigma[:, None, None] * data * total.rsqrt()
    assert block.shared.noise_embedding is not None
    condition = F.silu(block.shared.noise_embedding(sigma.clamp(max=12.27664).log() / 4))

    def modulations(adaptive: Any) -> list[tuple[Tensor, Tensor]]:
        values = adaptive.linear(condition)[:, None].split(HIDDEN, dim=-1)
        return list(zip(values[::2], values[1::2], strict=True))

    rotation = network.get_submodule("positions")(tokens)
    context = network.get_submodule("embedding")(tokens)
    for layer in network.get_submodule("prelude").children():
        context = layer(context, rotation)
    x = network.get_submodule("adapter")(torch.cat([c_in * z, context], dim=-1))
    for layer, adaptive in zip(network.get_submodule("core").children(), block.adaptive, strict=True):
        part: Any = layer
        (scale1, shift1), (scale3, shift3) = modulations(adaptive)
        x = part.norm2(part.attn(part.norm1(x) * (1 + scale1) + shift1, rotation) + x)
        x = part.norm4(part.mlp(part.norm3(x) * (1 + scale3) + shift3) + x)
    norm: Any = network.get_submodule("final_norm")
    ((scale, shift),) = modulations(block.shared.final_norms)
    x = norm(x if added else c_skip * z + c_out * x) * (1 + scale) + shift
    for layer in network.get_submodule("coda").children():
        x = layer(x, rotation)
    embedding: Any = network.get_submodule("embedding")
    logits = norm(x) @ embedding.weight.T
    if added:
        logits = logits + z @ F.normalize(original().embedding.weight, dim=-1).T / sigma[:, None, None] ** 2
    return logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("likelihood", ["added", "learned"])
@pytest.mark.parametrize("weight", ["none", "edm"])
def test_loss_by_hand(weight: str, likelihood: str) -> None:
    model = convert(target={"kind": "next-token", "weight": weight, "likelihood": likelihood}).eval()
    randomise_adaptive(model)
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    losses = model.loss({"input_ids": TOKENS}, 0, seeded(), level=sigma)
    rows = F.normalize(original().embedding.weight, dim=-1)
    y = rows[TOKENS[:, 1:]]
    z = y + sigma[:, None, None] * torch.randn(y.shape, generator=seeded())
    added = likelihood == "added"
    log_p = logits_by_hand(model.block(0), TOKENS[:, :-1], z, sigma, added=added).log_softmax(-1)
    expected = -log_p.gather(-1, TOKENS[:, 1:, None])[..., 0].mean(dim=1)
    if weight == "edm":
        expected = expected * (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert losses.shape == (4,)


def test_the_logit_scale_multiplies() -> None:
    inputs, z, level = {"input_ids": TOKENS}, torch.randn(4, LENGTH - 1, HIDDEN, generator=seeded()), torch.ones(4)
    plain, scaled = (
        convert(target={"kind": "next-token", "logit_scale": scale}).block(0)(inputs, z, level, context=True)
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(scaled, 3 * plain)


# ---- what a position sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 1.0, 70.0])
def test_a_position_sees_nothing_of_what_it_is_to_predict(sigma: float) -> None:
    model = convert().eval()
    randomise_adaptive(model)
    block, at, level = model.block(0), 5, torch.full((4,), sigma)
    z = torch.randn(4, LENGTH - 1, HIDDEN, generator=seeded()) * math.hypot(sigma, 0.5)

    def changed(tokens: slice | None = None, states: slice | None = None) -> float:
        """Most that the context logits up to the position change."""
        new_tokens, new_z = TOKENS.clone(), z.clone()
        if tokens is not None:
            new_tokens[:, tokens] = (new_tokens[:, tokens] + 1) % VOCAB
        if states is not None:
            new_z[:, states] = -new_z[:, states]
        with torch.no_grad():
            before = block({"input_ids": TOKENS}, z, level, context=True)
            after = block({"input_ids": new_tokens}, new_z, level, context=True)
        return float((before - after)[:, : at + 1].abs().max())

    assert changed(tokens=slice(at + 1, None)) < 1e-5
    assert changed(states=slice(at + 1, None)) < 1e-5
    # The positive controls: the token that it reads, its own state, and those before them.
    assert changed(tokens=slice(at, at + 1)) > 1e-2
    assert changed(states=slice(at, at + 1)) > 1e-2
    with torch.no_grad():
        new_z = z.clone()
        new_z[:, at - 1] = -new_z[:, at - 1]
        of_neighbour = block({"input_ids": TOKENS}, z, level) - block({"input_ids": TOKENS}, new_z, level)
    assert of_neighbour[:, at].abs().max() > 1e-4
    assert of_neighbour[:, : at - 1].abs().max() < 1e-5


# ---- saved, loaded, built ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
def test_save_load_export(shared: str, tmp_path: Path) -> None:
    model = convert(shared=shared)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    batch = token_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.loss(batch, 0, seeded()).mean().backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without, f"without a gradient: {sorted(without)}"
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".core." in name for name in moved)
    assert not moved & fixed
    assert any(".embedding.weight" in name for name in moved) == (shared != "frozen")
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.loss(batch, 0, seeded()), model.loss(batch, 0, seeded()))
    exported: Any = loaded.export_initialisation()
    assert isinstance(exported, RecurrentDepth)
    assert {name: exported.config[name] for name in SIZES} == SIZES
    trained = dict(model.block(0).network.named_parameters())
    assert {n: torch.equal(p, trained[n]) for n, p in exported.named_parameters()} == dict.fromkeys(trained, True)
    assert same_states(convert(shared=shared).export_initialisation().state_dict(), original().state_dict())


def test_a_fresh_block_is_initialised_for_the_depth_that_the_model_runs() -> None:
    """What is added to the residual stream starts as small in the shared parts as in the whole model."""
    wide = SIZES | {"hidden_size": 64, "mlp_size": 64, "num_core_layers": 6}
    config = RecurrentDepth(**wide).config
    source = Fresh("RecurrentDepth", config, seed=3)
    built = dict(build(source, db.BlocksConfig(num_blocks=1)).block(0).network.named_parameters())
    whole = dict(instantiate("RecurrentDepth", config).named_parameters())
    shallow = dict(RecurrentDepth(**(wide | {"num_core_layers": 1})).named_parameters())
    assert built.keys() == whole.keys()
    small = [name for name in built if name.endswith(("attn.proj.weight", "mlp.down.weight"))]
    assert len(small) == 2 * (1 + 6 + 1)
    for name, value in built.items():
        if value.dim() == 2:  # of 1,728 elements at least: four standard errors are 7 %
            assert value.std().item() == pytest.approx(whole[name].std().item(), rel=0.07), name
        else:
            assert torch.equal(value, whole[name]), name
    for name in small:  # the positive control: one core layer is a depth of 8, six are one of 38
        if name in shallow:
            assert shallow[name].std().item() > 2 * built[name].std().item()
    again = build(Fresh("RecurrentDepth", config, seed=3), db.BlocksConfig(num_blocks=1)).state_dict()
    other = build(Fresh("RecurrentDepth", config, seed=4), db.BlocksConfig(num_blocks=1)).state_dict()
    ours = build(source, db.BlocksConfig(num_blocks=1)).state_dict()
    assert same_states(ours, again)
    names = [n for n in ours if n.endswith(("coda.0.attn.proj.weight", "core.5.attn.proj.weight"))]
    assert len(names) == 2
    assert not any(torch.equal(ours[n], other[n]) for n in names)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_blocks": 2}, ("blocks.num_blocks = 2", "one core", "set num_blocks to 1")),
        (
            {"target": {"kind": "next-token", "clean_weight": 0.5}},
            ("target.clean_weight = 0.5", "no clean stream", "leave it out"),
        ),
        ({"noise": db.Masking()}, ("noise.kind = masking", "RecurrentDepth needs ddpm or edm or flow")),
    ],
    ids=["blocks", "clean-weight", "noise"],
)
def test_refused_with_the_value_and_what_is_allowed(config: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        convert(**config)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"


# ---- trained ---------------------------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path | None = None, **changes: Any) -> Trainer:
    """On a text in which each token tells the next."""
    text = TextData((torch.arange(2000) * 5 % VOCAB).to(torch.uint8), VOCAB)
    values = {"steps": 8, "batch_size": 4, "accumulation": 2, "lr": 3e-3, "warmup_steps": 2, "ema_decay": 0.9}
    config = TrainConfig.model_validate(values | {"log_every": 4} | changes)
    batches = TextBatches(text, LENGTH, device=torch.device("cpu"))
    return Trainer(model, batches, config, folder=folder, progress=False)


def model_of(kind: str) -> nn.Module:
    return EndToEnd(original()) if kind == "end-to-end" else convert(shared=kind)


def everything(run: Trainer) -> dict[str, Tensor]:
    """All tensors of a run: weights, optimizer state, averages."""
    tensors = {f"model.{name}": t.clone() for name, t in run.model.state_dict().items()}
    for name, parameters in run.sets.items():
        tensors |= {f"{name}.{k}": t.clone() for k, t in parameters.state().items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "end-to-end"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = trainer(model_of(kind), tmp_path / "whole")
    whole.train()
    first = trainer(model_of(kind), tmp_path / "split")
    first.train(until=3)
    assert not same_states(everything(whole), everything(first))  # the cut run really was behind
    second = trainer(model_of(kind), tmp_path / "split")
    second.train()
    assert second.iteration == whole.iteration == 8
    assert same_states(everything(whole), everything(second))


@pytest.mark.slow
def test_the_end_to_end_depth_is_random_and_keyed(tmp_path: Path) -> None:
    """Passes of the core, counted in what really runs, of a run in one piece and of one in two."""

    def counted(depths: list[int]) -> EndToEnd:
        model = original()
        model.prelude.get_submodule("0").register_forward_pre_hook(lambda *_: depths.append(0))
        model.adapter.register_forward_pre_hook(lambda *_: depths.__setitem__(-1, depths[-1] + 1))
        return EndToEnd(model)

    whole: list[int] = []
    trainer(counted(whole), tmp_path / "whole").train()
    pieces: list[int] = []
    trainer(counted(pieces), tmp_path / "split").train(until=3)
    trainer(counted(pieces), tmp_path / "split").train()
    assert len(whole) == 16  # 8 steps of 2 micro-batches
    assert whole == pieces
    assert len(set(whole)) > 4
    other: list[int] = []
    trainer(counted(other), tmp_path / "other", seed=1).train()
    assert other != whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "end-to-end"])
def test_it_learns(kind: str) -> None:
    model = model_of(kind)
    unit = model.block(0) if isinstance(model, db.DiffusionBlocks) else model
    tokens = {"input_ids": torch.stack([(torch.arange(LENGTH) + start) * 5 % VOCAB for start in range(64)])}
    level = {"level": torch.full((64,), 20.0)} if kind == "replicated" else {}  # z tells next to nothing there

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return float(unit.loss(tokens, seeded(), **level).mean())  # type: ignore[operator]

    before = loss()
    trainer(model, steps=45, accumulation=1, batch_size=16, ema_decay=None, warmup_steps=5).train()
    assert before > 2.5
    assert loss() < 0.6 * before


def test_an_end_to_end_model_is_saved_and_loaded(tmp_path: Path) -> None:
    recipe = recipe_of("end-to-end")
    model = Experiment(recipe).build()
    assert isinstance(model, EndToEnd)
    Experiment(recipe).save(model, tmp_path / "m")
    loaded = Experiment(recipe).load(tmp_path / "m")
    assert isinstance(loaded, EndToEnd)
    assert same_states(loaded.state_dict(), model.state_dict())
    losses = [m.eval().loss(token_batch(), seeded()) for m in (model, loaded)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"method|end-to-end"):
        Experiment(recipe_of()).load(tmp_path / "m")


def test_end_to_end_it_has_no_checkpointing() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing = true: a RecurrentDepth .* set it to false"):
        trainer(EndToEnd(original()), activation_checkpointing=True)
    checkpointed = trainer(convert(), activation_checkpointing=True)
    plain = trainer(convert())
    for run in (checkpointed, plain):
        run.train()
    assert same_states(everything(checkpointed), everything(plain))


# ---- any number of steps at inference ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_number_of_iterations_is_free_at_inference(steps: int) -> None:
    model = convert().eval()
    randomise_adaptive(model)
    levels: list[float] = []
    model.block(0).register_forward_pre_hook(lambda _, args: levels.append(args[2][0].item()))
    prompts = [TOKENS[0, :5], TOKENS[1, :2]]
    made = model.continue_texts(prompts, 4, steps=steps)
    assert [len(row) for row in made.tokens] == [9, 6]
    assert all(torch.equal(row[: len(p)], p) for row, p in zip(made.tokens, prompts, strict=True))
    assert len(levels) == 4 * steps
    assert levels[:steps] == levels[steps : 2 * steps] == sorted(levels[:steps], reverse=True)
    assert levels[:steps] == pytest.approx(model.noise.levels(steps)[:-1])
    again = model.continue_texts(prompts[1:], 4, seeds=[1], steps=steps)
    assert torch.equal(again.tokens[0], made.tokens[1])


# ---- the memory of a step, predicted -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_predicted_step_is_the_measured_one(method: str, precision: str) -> None:
    """End to end the measured steps are deeper than the gradient goes."""
    recipe = recipe_of(method, {"mean_recurrence": 12, "backprop_depth": 2}, precision=precision)
    ledger = predict(recipe)
    run = Experiment(recipe).trainer(progress=False)
    assert ledger.parameters == bytes_of(run.units[0].module.parameters())
    measured = max(unit.transient for unit in step_memory(run))
    assert ledger.activations + ledger.gradients == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_end_to_end_memory_grows_with_the_gradients_depth_alone() -> None:
    def held(**model: int) -> int:
        return predict(recipe_of("end-to-end", {"num_core_layers": 1} | model)).activations

    few, more, most = (held(backprop_depth=depth) for depth in (1, 3, 5))
    assert most - more == pytest.approx(more - few, rel=0.01)
    assert more > 1.3 * few
    assert held(backprop_depth=3, mean_recurrence=60) == more


@pytest.mark.slow
def test_a_plan_tries_one_block_alone() -> None:
    recipe = recipe_of(batch_size=4)
    peak = predict(recipe).peak
    roomy = plan(recipe, peak, vary="blocks", margin=0)
    assert roomy.blocks is not None
    assert roomy.blocks.changes["blocks.num_blocks"] == 1
    tight = plan(recipe, peak - 1, margin=0)
    assert tight.blocks is None
    assert tight.batch is not None
    assert 1 <= tight.batch.changes["train.batch_size"] < 4


@pytest.mark.slow
@pytest.mark.parametrize("end_to_end", [False, True])
def test_compiled_by_parts_every_layer_is(end_to_end: bool) -> None:
    model = original()
    layers = [*model.prelude, *model.core, *model.coda]
    if end_to_end:
        EndToEnd(model).compile()
        assert all(layer._compiled_call_impl is not None for layer in layers)
        return
    block = db.convert(model, db.BlocksConfig(num_blocks=1)).block(0)
    with without_generated_code():
        plain = block.loss(token_batch(), seeded())
        block.compile_parts()
        torch.testing.assert_close(block.loss(token_batch(), seeded()), plain, rtol=1e-5, atol=1e-5)
    stem = [block.network.get_submodule(f"{place}.{i}") for place in ("prelude", "coda") for i in range(1)]
    assert all(layer._compiled_call_impl is not None for layer in stem)
