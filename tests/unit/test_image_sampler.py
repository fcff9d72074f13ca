"""Prepared sampling: calls from memory that stays in place (on a GPU captured), and a network in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.sampling import SOLVERS, StaticCalls
from diffusionblocks.sampling.static_calls import StaticSteps

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: Settings that between them take every way through a chain.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 2.0},
    "interval": {"guidance": 2.0, "guidance_interval": (0.1, 5.0)},
    "stochastic": {"solver": "heun", "churn": 20.0, "churn_interval": (0.05, 50.0), "churn_noise": 1.003},
} | {solver: {"solver": solver, "guidance": 1.5} for solver in SOLVERS}


def made(seed: int = 0, **overrides: Any) -> db.DiffusionBlocks:
    return db.convert(tiny("dit", seed=seed, **overrides), db.BlocksConfig(num_blocks=3)).eval()


def images(model: Any, labels: list[int] | None, seeds: list[int], **setting: Any) -> Tensor:
    return model.sample(labels, seeds=seeds, steps=6, **setting)  # type: ignore[no-any-return]


# ---- calls in place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_calls_in_place_give_the_same_images_bit_for_bit(setting: str) -> None:
    """One sampler for batches of other labels, seeds and sizes: nothing of an earlier one is left."""
    model = made()
    sampler = model.sampler(cuda_graph=True)
    batches: list[tuple[list[int], list[int]]] = [([1, 2, 3], [5, 6, 7]), ([0, 0, 1], [7, 5, 9]), ([3], [4])]
    for labels, seeds in [*batches, *batches]:
        assert torch.equal(
            images(sampler, labels, seeds, **SETTINGS[setting]), images(model, labels, seeds, **SETTINGS[setting])
        )


def test_an_unconditional_model_has_calls_in_place_too() -> None:
    model = made(num_classes=0)
    sampler = model.sampler(cuda_graph=True)
    for seeds in ([1, 2], [3, 4]):
        assert torch.equal(images(sampler, None, seeds), images(model, None, seeds))


def test_a_sampler_follows_settings_that_change_between_calls() -> None:
    model = made()
    sampler = model.sampler(cuda_graph=True)
    for name in (*SETTINGS, "guided", "plain", "interval"):
        assert torch.equal(
            images(sampler, [1, 2], [5, 6], **SETTINGS[name]), images(model, [1, 2], [5, 6], **SETTINGS[name])
        )
    with torch.inference_mode():
        images(sampler, [1, 2, 3, 1], [5, 6, 7, 8])
    images(sampler, [1, 2, 3, 1], [5, 6, 7, 8])  # memory that was made there can be written to here


def test_calls_are_counted_blocks_once_a_level_and_unguided_ones_at_half_the_cost() -> None:
    model = made()
    rows: list[tuple[int, int, float]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, arguments: rows.append((block.index, len(arguments[1]), arguments[2][0].item()))
        )
    low, high = 0.1, 5.0
    levels = model.noise.sampling_levels(9)
    for run in (model, model.sampler(cuda_graph=True)):
        rows.clear()
        run.sample([1, 2], steps=9, guidance=2.0, guidance_interval=(low, high))
        assert [level for *_, level in rows] == pytest.approx(levels[:-1])
        assert [n for _, n, _ in rows] == [4 if low < level <= high else 2 for level in levels[:-1]]
        assert {n for _, n, _ in rows} == {2, 4}
        assert [index for index, *_ in rows] == [model.partition.block_of(level) for level in levels[:-1]]


def test_only_the_first_function_of_a_kind_is_called_and_results_stay() -> None:
    calls = StaticCalls(torch.zeros(2, 3), {"labels": torch.zeros(2, dtype=torch.int64)}, None)
    calls.set_inputs({"labels": torch.tensor([10, 20])}, None)

    def scaled() -> Tensor:
        return calls.z * calls.level[:2, None] + calls.inputs[0]["labels"][:, None]  # type: ignore[index]

    def refuse() -> Tensor:
        raise AssertionError("a second function of the kind")

    first = calls.run("a", scaled, torch.ones(2, 3), 0.5)
    calls.set_inputs({"labels": torch.tensor([30, 40])}, None)
    second = calls.run("a", refuse, torch.full((2, 3), 2.0), 3.0)
    assert first.tolist() == [[10.5] * 3, [20.5] * 3], "a later call left it alone"
    assert second.tolist() == [[36.0] * 3, [46.0] * 3]
    other = calls.run("b", lambda: calls.z.clone(), torch.full((2, 3), 7.0), 1.0)
    assert other.tolist() == [[7.0] * 3] * 2


# ---- weights ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"cuda_graph": True},
    {"dtype": torch.bfloat16},
    {"cuda_graph": True, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_that_changed_are_followed(options: dict[str, Any]) -> None:
    model, other = made(0), made(1)
    sampler = model.sampler(**options)
    before = images(sampler, [1, 2], [5, 6])
    model.load_state_dict(other.state_dict())
    after = images(sampler, [1, 2], [5, 6])
    assert torch.equal(after, images(other.sampler(**options), [1, 2], [5, 6]))
    assert not torch.allclose(before, after, atol=0.01)
    for block, its in zip(model.blocks, made(0).blocks, strict=True):  # new tensors in place of the old
        for name, parameter in its.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, torch.nn.Parameter(parameter.detach().clone()))
    assert torch.equal(images(sampler, [1, 2], [5, 6]), before)


def test_a_network_in_bfloat16_is_the_model_cast_with_its_chain_in_float32() -> None:
    model = made()
    cast = copy.deepcopy(model).to(torch.bfloat16)
    sampler = model.sampler(dtype=torch.bfloat16)
    seen: list[Tensor] = []
    drawn = images(sampler, [1, 2], [5, 6], guidance=2.0, callback=lambda step, level, z, d: seen.extend((z, d)))
    assert {tensor.dtype for tensor in (*seen, drawn)} == {torch.float32}
    assert torch.equal(drawn, images(cast, [1, 2], [5, 6], guidance=2.0))
    with torch.autocast("cpu", torch.bfloat16):  # which would compute norms in float32
        assert torch.equal(images(sampler, [1, 2], [5, 6], guidance=2.0), drawn)
    whole = images(model, [1, 2], [5, 6], guidance=2.0)
    assert 0 < (drawn - whole).abs().mean() < 0.1 * whole.abs().mean()
    assert next(model.parameters()).dtype == torch.float32, "the model itself stays as it is"


def test_a_step_in_place_changes_its_own_state_once_a_call() -> None:
    total = torch.zeros(2)

    def step(value: Tensor) -> Tensor:
        return total.add_(value).clone()

    run = StaticSteps(step)
    results = [run(torch.full((2,), float(i))) for i in range(1, 8)]
    assert [float(result[0]) for result in results] == [1, 3, 6, 10, 15, 21, 28]


@CUDA
def test_a_captured_step_changes_its_own_state_once_a_call() -> None:
    """The calls before a capture are steps like others, and a capture is none."""
    total = torch.zeros(2, device="cuda")
    run = StaticSteps(lambda value: total.add_(value) * 1)
    results = [run(torch.full((2,), float(i), device="cuda")) for i in range(1, 8)]
    assert [float(result[0]) for result in results] == [1, 3, 6, 10, 15, 21, 28]


@contextmanager
def training(model: db.DiffusionBlocks) -> Iterator[None]:
    model.train()
    yield
    assert model.training


def test_a_model_in_training_mode_is_sampled_in_evaluation_mode() -> None:
    model = made()
    expected = images(model, [1], [5])
    sampler = model.sampler(cuda_graph=True)
    with training(model):
        assert torch.equal(images(sampler, [1], [5]), expected)


def _taking_turns() -> db.DiffusionBlocks:
    model = made()
    model.run_one_at_a_time("cpu")
    return model


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: made().sampler(dtype=torch.int8), r"dtype must be a floating dtype.*got torch\.int8"),
    (lambda: made().sampler(compile="blocks"), "compile must be True, False or \"layers\", got 'blocks'"),
    (lambda: _taking_turns().sampler(cuda_graph=True), "one at a time.*leave both out"),
    (lambda: _taking_turns().sampler(dtype=torch.bfloat16), "one at a time.*leave both out"),
    (lambda: db.convert(tiny("vit")).sampler(), "sampler is for diffusion models"),
    (lambda: made().sampler(cuda_graph=True).sample([1], guidance=2.0, guidance_interval=(90.0, 99.0)), "holds none"),
    (lambda: made().sample([1], guidance=2.0, guidance_interval=(2.0, 1.0)), "guidance_interval must be two finite"),
    (lambda: made().sample([1], solver="unipc", churn=3.0), "churn = 3 is for solvers of one step"),
    (
        lambda: made().sample([1], steps=3, solver="heun", churn=3.0, churn_interval=(90.0, 99.0)),
        "no step of the chain.*so no noise would be added",
    ),
    (lambda: made().sample([1], solver="heun", churn=-3.0), r"churn must be a finite number >= 0, got -3\.0"),
]


@pytest.mark.parametrize(("act", "words"), REFUSED)
def test_refused(act: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()


def test_blocks_that_take_turns_are_sampled_without_graphs() -> None:
    model = _taking_turns()
    assert torch.equal(images(model.sampler(), [1], [5]), images(made(), [1], [5]))


# ---- on a GPU -----------------------------------------------------------------------------------------------


@CUDA
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_chains_are_eager_ones_bit_for_bit(setting: str, autocast: bool) -> None:
    model = made().to("cuda")
    sampler = model.sampler(cuda_graph=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for labels, seeds in [([1, 2, 3], [5, 6, 7]), ([0, 0, 1], [7, 5, 9]), ([3], [4]), ([1, 2, 3], [5, 6, 7])]:
            expected = images(model, labels, seeds, **SETTINGS[setting])
            assert torch.equal(images(sampler, labels, seeds, **SETTINGS[setting]), expected)


@CUDA
@pytest.mark.parametrize("options", OPTIONS)
def test_captured_chains_follow_weights(options: dict[str, Any]) -> None:
    model, other = made(0).to("cuda"), made(1).to("cuda")
    sampler = model.sampler(**options)
    images(sampler, [1, 2], [5, 6])
    model.load_state_dict(other.state_dict())
    assert torch.equal(images(sampler, [1, 2], [5, 6]), images(other.sampler(**options), [1, 2], [5, 6]))


@CUDA
def test_a_captured_chain_does_not_wait_for_the_device() -> None:
    model = made().to("cuda")
    sampler = model.sampler(cuda_graph=True, dtype=torch.bfloat16)
    images(sampler, [1, 2], [5, 6], guidance=2.0)  # captures
    levels: list[float] = []

    def within(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < 5 else "default")
        levels.append(level)

    try:
        images(sampler, [1, 2], [8, 9], guidance=2.0, callback=within)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(levels) == 6


@CUDA
def test_images_of_a_gpu_do_not_depend_on_their_batch() -> None:
    model = made().to("cuda")
    many = images(model, [1, 2, 3], [5, 6, 7], solver="heun", churn=20.0)
    for row, (label, seed) in enumerate(((1, 5), (2, 6), (3, 7))):
        alone = images(model, [label], [seed], solver="heun", churn=20.0)[0]
        torch.testing.assert_close(alone, many[row], rtol=1e-2, atol=1e-2)  # products of another size round otherwise
    assert (many[0] - many[1]).abs().mean() > 0.1
