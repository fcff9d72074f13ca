"""What torch.compile keeps for the backward pass, and what it computes again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noise_batch, randomise_adaptive, seeded, tiny
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.profiler import profile

import diffusionblocks as db
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.planning import predict
from diffusionblocks.planning.planner import OPTIMISATIONS, optimisations_of, with_changes
from diffusionblocks.training import TrainConfig
from diffusionblocks.training.compilation import Compiler, within_budget

RECIPES = Path(__file__).parents[2] / "recipes"


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))


def run(module: nn.Module, forward: Any) -> tuple[list[Tensor], int, Counter[str]]:
    """Gradients, bytes kept for the backward pass beside the weights, and the matrix products of a step."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    states = torch.randn(16, 8, 32, generator=seeded(1))
    for _ in range(2):  # the first compiles
        kept.clear()
        with profile() as seen:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = forward(states).square().sum()
            gradients = torch.autograd.grad(loss, list(module.parameters()))
    return list(gradients), sum(kept.values()), products_in(seen)


def products_in(seen: profile) -> Counter[str]:
    """The matrix products that a profiler saw."""
    return Counter(event.name for event in seen.events() if event.name in ("aten::mm", "aten::addmm"))


def test_a_budget_keeps_less_and_computes_no_matrix_product_again() -> None:
    torch._dynamo.reset()
    module = mlp()
    backend = lookup_backend("aot_eager_decomp_partition")
    expected, everything, products = run(module, torch.compile(module, backend=within_budget(1.0, backend, None)))
    torch._dynamo.reset()
    found, less, same = run(module, torch.compile(module, backend=within_budget(0.9, backend, None)))
    torch.testing.assert_close(found, expected)
    assert less <= 0.75 * everything
    assert same == products
    assert torch._functorch.config.activation_memory_budget == 1.0  # it is as it was


@pytest.mark.parametrize("compile", ["layers", "true"])
def test_the_plan_counts_what_a_budget_keeps(compile: str) -> None:
    recipe = load_recipe(
        RECIPES / "dit" / "cifar10.yaml",
        [f"train.compile={compile}", "train.batch_size=32", "model.config.num_layers=6"],
    )
    every, some = (
        predict(with_changes(recipe, {"train.activation_memory_budget": budget}), num_examples=0)
        for budget in (1.0, 0.9)
    )
    assert some.activations < 0.8 * every.activations
    assert some.parameters == every.parameters


def test_a_plan_proposes_it_first_where_it_can_be_had() -> None:
    compiled = load_recipe(RECIPES / "dit" / "cifar10.yaml", [])
    first, *others = optimisations_of(compiled)
    assert first == {"train.activation_memory_budget": 0.9}
    assert tuple(others) == OPTIMISATIONS
    assert optimisations_of(with_changes(compiled, first)) == OPTIMISATIONS
    assert optimisations_of(with_changes(compiled, {"train.compile": False})) == OPTIMISATIONS


def test_a_budget_needs_the_compiler() -> None:
    with pytest.raises(ValueError, match=r"set train\.compile to true or layers, or train\.activation_memory"):
        TrainConfig(steps=1, activation_memory_budget=0.9)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        TrainConfig(steps=1, compile=True, activation_memory_budget=1.5)


def test_blocks_train_alike_within_a_budget() -> None:
    """With generated code, and layers that are computed again."""
    from diffusionblocks.bench.measurements import runner_of
    from diffusionblocks.bench.methods import Spec

    def trained(method: str, **changes: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        with runner_of(Spec("vit-h", method, 2, device="cpu", tiny=True, **changes)) as runner:
            for turn in (0, 0, 1, 1):
                runner.step(turn)
            runner.trainer.residency.flush()  # type: ignore[attr-defined]
            return {name: tensor.clone() for name, tensor in runner.trainer.model.state_dict().items()}  # type: ignore[attr-defined]

    expected = trained("resident-active", compile=False)
    for method in ("resident-active-memory-budget", "resident-active-checkpointing"):
        torch.testing.assert_close(trained(method), expected, atol=2e-3, rtol=1e-2)


# ---- what is computed again, in compiled layers ------------------------------------------------------------------


def compiled_step(checkpointing: bool, backend: str, **config: Any) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients of a block of three ViT layers, compiled by layers, and the matrix products of its step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = db.convert(tiny("vit", layers=3, **config), db.BlocksConfig(num_blocks=1, overlap=0.0))
    randomise_adaptive(model)
    block = model.blocks[0]
    block.activation_checkpointing = checkpointing
    train = TrainConfig(steps=1, compile="layers", activation_checkpointing=checkpointing)
    Compiler(train, torch.device("cpu"), backend=lookup_backend(backend)).compile([block])
    for _ in range(2):  # the first compiles
        block.zero_grad()
        torch.manual_seed(3)  # of dropout
        with profile() as seen:
            block.loss(noise_batch(), seeded()).mean().backward()
    return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}, products_in(seen)


def test_compiled_layers_compute_all_but_their_last_product_again() -> None:
    expected, once = compiled_step(False, "aot_eager_decomp_partition")
    found, again = compiled_step(True, "aot_eager_decomp_partition")
    assert again.total() - once.total() == 3 * 6  # of seven: noise, queries, keys, values, output, and one of the MLP
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: n + m)


def test_compiled_layers_drop_out_the_same_again() -> None:
    expected, found = (compiled_step(again, "inductor", hidden_dropout_prob=0.5)[0] for again in (False, True))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: n + m)
