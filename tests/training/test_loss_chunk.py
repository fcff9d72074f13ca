"""`loss_chunk`: logits of some positions at a time give the same loss and gradients, and are never there together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HIDDEN,
    LENGTH,
    VOCAB,
    convert,
    randomise_adaptive,
    seeded,
    tiny,
    token_batch,
    without_compiler,
    without_generated_code,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusionblocks as db
from diffusionblocks.data import TextBatches, TextData
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.planning import forecast, plan, predict
from diffusionblocks.planning.planner import OPTIMISATIONS, optimisations_of
from diffusionblocks.targets import in_chunks, positions_at_once
from diffusionblocks.targets.target import LOGITS_AT_ONCE
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer

CPU = torch.device("cpu")
UNITS = ("masked", "llama", "llama-clean", "recurrent", "llama-whole", "recurrent-whole")
RECIPES = Path(__file__).parents[2] / "recipes"


def recurrent(vocab: int = VOCAB) -> RecurrentDepth:
    layers = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "mlp_size": 48}
    depth = {"mean_recurrence": 3, "backprop_depth": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RecurrentDepth(vocab, LENGTH, HIDDEN, num_attention_heads=2, **layers, **depth)


def model_of(kind: str, vocab: int = VOCAB) -> nn.Module:
    """A converted model of two blocks (of one, recurrent), in training mode; or the control."""
    if kind == "recurrent-whole":
        return EndToEnd(recurrent(vocab))
    if kind == "llama-whole":
        return EndToEnd(tiny("llama", layers=2, vocab_size=vocab).train())
    if kind == "recurrent":
        model = db.convert(recurrent(vocab), db.BlocksConfig(num_blocks=1))
    else:
        family, _, clean = kind.partition("-")
        target: Any = {"kind": "next-token", "clean_weight": 0.5} if clean else None
        drops = {} if family == "masked" else {"attention_dropout": 0.2}
        original = tiny(family, layers=2, vocab_size=vocab, **drops)
        model = db.convert(original, db.BlocksConfig(num_blocks=2, target=target))
    randomise_adaptive(model)
    return model.train()


def unit_of(kind: str, vocab: int = VOCAB) -> Any:
    model = model_of(kind, vocab)
    return model.block(0) if isinstance(model, db.DiffusionBlocks) else model


def loss_and_gradients(unit: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)  # of dropout
    losses = unit.loss(batch, seeded(3))
    assert losses.shape == (len(batch["input_ids"]),)
    (losses * torch.linspace(1, 2, len(losses))).sum().backward()  # the samples' shares differ
    gradients = {name: p.grad.clone() for name, p in unit.named_parameters() if p.grad is not None}
    unit.zero_grad(set_to_none=True)
    return losses.detach(), gradients


# ---- it computes the same --------------------------------------------------------------------------------------


def test_chunks_are_cross_entropy_in_float64() -> None:
    states = torch.randn(3, 11, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 5, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (3, 10), generator=seeded(2))

    def nats(some: Tensor, of: Tensor) -> Tensor:
        return F.cross_entropy((some @ head.T).transpose(1, 2), of, reduction="none")

    expected = nats(states[:, :10], tokens)
    weights = torch.rand(expected.shape, generator=seeded(4), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), [states, head])
    assert torch.equal(gradients[0][:, 10], torch.zeros(3, 5, dtype=torch.float64))
    for chunk in (1, 3, 5, 9, 10, 64):
        found = in_chunks(nats, states, tokens, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        again = torch.autograd.grad((found * weights).sum(), [states, head])
        torch.testing.assert_close(again, gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 5, LENGTH, 100])
@pytest.mark.parametrize("kind", UNITS)
def test_loss_and_gradients_are_those_of_all_logits_at_once(kind: str, chunk: int) -> None:
    unit, batch = unit_of(kind), token_batch()
    plain, gradients = loss_and_gradients(unit, batch)
    unit.loss_chunk = chunk
    again, recomputed = loss_and_gradients(unit, batch)
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    assert recomputed.keys() == gradients.keys()
    assert len(gradients) > 10
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            recomputed[name], gradient, rtol=1e-4, atol=2e-6 * largest, msg=lambda m, n=name: n + m
        )
    # The positive control: another token at the last place is another loss and another gradient.
    batch["input_ids"][:, -1] = (batch["input_ids"][:, -1] + 1) % VOCAB
    other, changed = loss_and_gradients(unit, batch)
    assert not torch.allclose(other, plain, rtol=1e-4)
    assert any(not torch.allclose(changed[name], g, rtol=1e-3, atol=1e-5 * largest) for name, g in gradients.items())


def test_auto_makes_equal_chunks_of_a_bounded_number_of_logits() -> None:
    for batch, length, vocab in ((8, 1023, 32_000), (256, 256, 8192), (1, 7, 2**24), (3, 5, 2**26), (64, 255, 50_257)):
        chunk = positions_at_once("auto", (batch, length), vocab)
        assert chunk is not None
        assert batch * chunk * vocab <= max(LOGITS_AT_ONCE, batch * vocab), "of one position at least"
        many = -(-length // chunk)
        assert many * chunk - length < many, "no chunk has more than one position too many"
        assert many == 1 or batch * -(-length // (many - 1)) * vocab > LOGITS_AT_ONCE, "as few as can be"
    assert positions_at_once("auto", (64, 256), 27) is None
    assert [positions_at_once(chunk, (64, 256), 27) for chunk in (None, 5, 256)] == [None, 5, 256]


@pytest.mark.parametrize("kind", UNITS)
def test_auto_is_all_at_once_where_logits_are_few(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and where they are many, the same but for rounding."""
    unit, batch = unit_of(kind), token_batch()
    plain, gradients = loss_and_gradients(unit, batch)
    unit.loss_chunk = "auto"
    again, equal = loss_and_gradients(unit, batch)
    assert torch.equal(again, plain)
    assert all(torch.equal(equal[name], gradient) for name, gradient in gradients.items())
    monkeypatch.setattr("diffusionblocks.targets.target.LOGITS_AT_ONCE", len(plain) * VOCAB * 4)
    chunked, recomputed = loss_and_gradients(unit, batch)
    torch.testing.assert_close(chunked, plain, rtol=2e-6, atol=2e-6)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=2e-6 * largest)


def test_auto_is_the_default_and_says_nothing_to_images() -> None:
    assert TrainConfig().loss_chunk == "auto"
    block = convert("vit").block(0)
    block.loss_chunk = "auto"
    with pytest.raises(ValueError, match="loss_chunk must be auto, >= 1"):
        convert("llama").block(0).loss_chunk = "some"  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["masked", "llama-clean", "recurrent"])
def test_evaluation_sees_all_logits_as_ever(kind: str) -> None:
    block = unit_of(kind).eval()
    tokens = token_batch()["input_ids"]
    y = block.target.encode({"input_ids": tokens})
    level = block.noise.sample(len(y), block.interval, generator=seeded())
    z = block.noise.corrupt(y, level, block.noise.draws(y.shape, generator=seeded()))
    inputs = dict.fromkeys(block.input_names, tokens)
    before = block(inputs, z, level)
    block.loss_chunk = 3
    assert torch.equal(block(inputs, z, level), before)
    assert before.shape == (*z.shape[:2], VOCAB)


@pytest.mark.parametrize("kind", ["masked", "llama-clean", "llama-whole"])
def test_bfloat16_autocast(kind: str) -> None:
    unit, batch = unit_of(kind), token_batch()
    exact = loss_and_gradients(unit, batch)[1]
    errors = []
    for chunk in (None, 3):
        unit.loss_chunk = chunk
        with torch.autocast("cpu", torch.bfloat16):
            _, found = loss_and_gradients(unit, batch)
        errors.append(max(float((found[name] - g).norm() / g.norm()) for name, g in exact.items() if g.norm() > 1e-3))
    assert 0 < errors[1] < 1.5 * errors[0]


# ---- in the trainer, with other memory optimisations -------------------------------------------------------------


def batches_of(vocab: int, length: int = LENGTH, device: torch.device = CPU) -> TextBatches:
    ids = torch.randint(vocab, (70 * length,), generator=seeded()).to(torch.uint16)
    return TextBatches(TextData(ids, vocab), length, device=device)


def trained(
    kind: str, folder: Path | None = None, device: torch.device = CPU, vocab: int = VOCAB, **changes: Any
) -> dict[str, Tensor]:
    model = model_of(kind, vocab)
    values: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 3e-3, "ema_decay": 0.9, "gradient_clip": None}
    config = TrainConfig(**(values | changes))
    run = Trainer(model, batches_of(vocab, device=device), config, device=device, folder=folder, progress=False)
    run.train()
    moments = [moments for group in run.sets.values() for moments in group.moments]
    assert any("exp_avg.codes" in kept for kept in moments) == (config.optimizer == "adamw-8bit")
    return {n: t.detach().clone().cpu() for n, t in model.state_dict().items() if n != "_extra_state"}


def assert_trained_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # AdamW's first steps are signs of gradients: where one is all but zero, rounding decides.
    for name, tensor in expected.items():
        far = (found[name] - tensor).abs() > 1e-4
        assert far.double().mean() < 0.01, name


@pytest.mark.each_value
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"resident": "active"},
        {"resident": "active", "offload": "disk", "optimizer_in_backward": True},
        {"accumulation": 2, "gradient_clip": 1.0},
        {"optimizer": "adamw-8bit", "vocab": 256},  # makes the head large enough for 8-bit state
    ],
    ids=["checkpointing", "active", "in-backward", "accumulation", "8-bit"],
)
@pytest.mark.parametrize("kind", ["masked", "llama-clean", "recurrent"])
def test_it_stacks_with_the_other_memory_optimisations(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "optimizer" in options:
        pytest.importorskip("torchao")
    with without_compiler():
        expected = trained(kind, tmp_path / "plain", **options)
        found = trained(kind, tmp_path / "chunks", loss_chunk=5, **options)
    assert_trained_alike(found, expected)
    start = model_of(kind, options.get("vocab", VOCAB)).state_dict()
    assert any(((tensor - start[name]).abs() > 1e-3).any() for name, tensor in expected.items())  # it did train


@pytest.mark.parametrize("kind", ["llama-whole", "recurrent-whole"])
def test_the_control_trains_alike(kind: str) -> None:
    checkpointing = {"activation_checkpointing": kind == "llama-whole"}
    assert_trained_alike(trained(kind, loss_chunk=5, **checkpointing), trained(kind, **checkpointing))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("masked", {"compile": True, "activation_checkpointing": True}),
        pytest.param("llama-clean", {"compile": True}, marks=pytest.mark.exhaustive),
        ("llama-clean", {"compile": "layers", "activation_checkpointing": True}),
        ("recurrent", {"compile": True, "optimizer_in_backward": True}),
        ("llama-whole", {"compile": True}),
    ],
    ids=["masked", "llama", "llama-layers", "recurrent-in-backward", "llama-whole"],
)
def test_it_compiles_without_a_break(kind: str, options: dict[str, Any]) -> None:
    from torch._dynamo.utils import counters

    expected = trained(kind)
    counters.clear()
    with without_generated_code():
        found = trained(kind, loss_chunk=5, **options)
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] > 0
    assert_trained_alike(found, expected)


# ---- what is in memory -------------------------------------------------------------------------------------------

MANY = 2000  # tokens of a vocabulary


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor over positions and the vocabulary (weights of HIDDEN rows are none)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (MANY,) and tensor.shape[0] != HIDDEN:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", UNITS)
def test_no_tensor_has_more_logits_than_a_chunks(kind: str) -> None:
    unit, batch = unit_of(kind, MANY), token_batch(4)

    def largest(chunk: int | None) -> int:
        unit.loss_chunk = chunk
        with Largest() as seen:
            loss_and_gradients(unit, batch)
        return seen.elements

    assert largest(None) >= 4 * (LENGTH - 1) * MANY  # the positive control: all positions
    assert largest(5) == 4 * 5 * MANY


@pytest.mark.parametrize("kind", ["masked", "llama", "recurrent", "llama-whole"])
def test_a_real_step_takes_less(kind: str) -> None:
    """By the allocator's own events."""

    def transient(chunk: int | None) -> int:
        config = TrainConfig(steps=3, batch_size=64, loss_chunk=chunk)
        run = Trainer(model_of(kind, MANY), batches_of(MANY), config, progress=False)
        return max(unit.transient for unit in step_memory(run))

    logits = 64 * LENGTH * MANY * 4
    plain, chunked = transient(None), transient(2)
    # Chunks alone, without making them again in the backward pass, would save 1.7 times the logits.
    assert plain > 3 * logits
    assert plain - chunked > 2 * logits


def language(*overrides: str, family: str = "autoregressive", device: str = "cpu") -> Recipe:
    sets = ["hidden_size=64", "num_attention_heads=2", f"vocab_size={MANY}"]
    if family == "autoregressive":
        sets += ["num_hidden_layers=2", "intermediate_size=96", "num_key_value_heads=2", "max_position_embeddings=64"]
    sets = [f"model.config.{size}" for size in sets] + ["train.batch_size=8", "train.epochs=null", "train.steps=3"]
    if family == "masked":
        sets.append(f"blocks.noise.vocab_size={MANY}")
    sets.append(f"device={device}")
    return load_recipe(RECIPES / "text" / f"{family}_topics.yaml", [*sets, *overrides])


@pytest.mark.each_value
@pytest.mark.parametrize("chunk", ["null", "8"])
@pytest.mark.parametrize("family", ["autoregressive", "masked", "recurrent"])
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_the_predicted_step_is_the_measured_one(family: str, method: str, chunk: str) -> None:
    """Of Llama end to end the library makes a mask on tensors without values that it leaves out otherwise."""
    recipe = language(f"method={method}", f"train.loss_chunk={chunk}", family=family)
    ledger = predict(recipe)
    run = Trainer(Experiment(recipe).build(), batches_of(MANY, recipe.data.length), recipe.train, progress=False)
    measured = max(unit.transient for unit in step_memory(run))
    whole_llama = (family, method) == ("autoregressive", "end-to-end")
    assert ledger.activations + ledger.gradients == pytest.approx(measured, rel=0.05 if whole_llama else 1e-3)


@pytest.mark.parametrize(("precision", "compile"), [("float32", "false"), ("bfloat16", "true")])
def test_the_plan_sees_what_is_saved(precision: str, compile: str) -> None:
    overrides = [f"train.precision={precision}", f"train.compile={compile}", "model.config.vocab_size=32000"]
    plain, chunked = (
        predict(language(*overrides, f"train.loss_chunk={chunk}", device="cuda")) for chunk in ("null", "4")
    )
    logits = 8 * 64 * 32_000 * 4
    assert plain.activations > 2 * logits
    assert chunked.activations < 0.5 * logits
    assert (plain.parameters, plain.optimizer) == (chunked.parameters, chunked.optimizer)


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_the_plan_of_auto_is_that_of_the_positions_that_a_batch_has(method: str) -> None:
    overrides = [f"method={method}", "model.config.vocab_size=32000", "train.precision=float32"]
    length = 64 if method == "diffusionblocks" else 63
    auto = forecast(language(*overrides, "train.loss_chunk=auto"))
    for batch in (1, 8, 32):
        chunk = positions_at_once("auto", (batch, length), 32_000)
        recipe = language(*overrides, f"train.loss_chunk={chunk or 'null'}", f"train.batch_size={batch}")
        assert auto.of(batch).ledger == predict(recipe)
    logits = 4 * LOGITS_AT_ONCE
    assert 1.5 * logits < auto.of(32).ledger.activations


def test_a_plan_proposes_it_first() -> None:
    recipe = language("blocks.num_blocks=2", "train.resident=active", "train.loss_chunk=null")
    made = plan(recipe, predict(recipe).peak - 1, vary="blocks")
    assert made.optimisations is not None
    # So much less that even one block fits.
    assert made.optimisations.changes == {"blocks.num_blocks": 1, "train.resident": "active", "train.loss_chunk": 4}
    assert made.optimisations.ledger.peak < predict(recipe).peak
    pasted = made.optimisations.options.replace("--set ", "").split()
    assert predict(language(*pasted)) == made.optimisations.ledger
    assert optimisations_of(language("train.loss_chunk=2")) == OPTIMISATIONS
    assert optimisations_of(language("train.loss_chunk=auto")) == OPTIMISATIONS


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_models_without_tokens_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"train.loss_chunk = 8 is for text models: .* images and has no logits"):
        load_recipe(RECIPES / family / "digits.yaml", ["train.loss_chunk=8"])
    with pytest.raises(ValueError, match=r"loss_chunk = 8 is for text models: a block that .* a \w+Target has no"):
        convert(family).block(0).loss_chunk = 8


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_chunk = 8 is for text models: a ViTForImageClassification has no"):
        EndToEnd(tiny("vit")).loss_chunk = 8
    for unit in (unit_of("masked"), unit_of("llama-whole")):
        with pytest.raises(
            ValueError, match=r"loss_chunk must be auto, >= 1 \(positions\), or null for all at once; got 0"
        ):
            unit.loss_chunk = 0
    with pytest.raises(
        ValueError, match=r"train.loss_chunk: Input should be greater than or equal to 1, or 'auto' \(g"
    ):
        language("train.loss_chunk=0")


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["masked", "llama-clean", "recurrent"])
def test_gpu_graphs_capture_it(kind: str, compile: bool) -> None:
    options = {"device": torch.device("cuda"), "steps": 8}
    expected = trained(kind, **options)
    assert_trained_alike(trained(kind, loss_chunk=5, cuda_graph=True, compile=compile, **options), expected)
