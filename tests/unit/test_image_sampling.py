"""Starting noise by seed, classifier-free guidance, and the chain that makes images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks import EDM
from diffusionblocks.common.mersenne_twister import MersenneTwister
from diffusionblocks.sampling import (
    SOLVERS,
    Churn,
    SeedNoise,
    calls,
    check_guided_levels,
    euler,
    first_z,
    guided,
    prior_of_seeds,
    sample_images,
)

NOISE = EDM()
SHAPE = (3, 5, 4)
LABELS = torch.tensor([1, 0, 3])
NULL = 9


class Network:
    """A network whose D follows its label, row by row, and which notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any, float]] = []

    def __call__(self, z: Tensor, labels: Tensor | None, level: float) -> Tensor:
        self.calls.append((len(z), None if labels is None else labels.tolist(), level))
        shift = 0.0 if labels is None else labels.to(z.dtype)[:, None, None, None].sin()
        return z / (1 + level**2) + shift


def images(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *SHAPE, generator=seeded(), dtype=dtype)


# ---- the prior --------------------------------------------------------------------------------------------


def test_prior_of_a_seed_is_the_same_in_every_batch() -> None:
    batch = prior_of_seeds(NOISE, SHAPE, [3, 5, 7], "cpu")
    assert batch.dtype == torch.float32
    assert batch.shape == (3, *SHAPE)
    for row, seed in enumerate([3, 5, 7]):
        assert torch.equal(batch[row], prior_of_seeds(NOISE, SHAPE, [seed], "cpu")[0])
    reordered = prior_of_seeds(NOISE, SHAPE, [7, 3, 3, 5, 0], torch.device("cpu"))
    assert torch.equal(reordered[[1, 3, 0]], batch)
    assert torch.equal(reordered[1], reordered[2])


def test_priors_of_different_seeds_differ_and_neighbours_are_uncorrelated() -> None:
    z = prior_of_seeds(NOISE, (1000,), range(40), "cpu") / NOISE.sigma_max
    correlations = (z @ z.T / 1000).fill_diagonal_(0.0)
    assert correlations.abs().max().item() < 5 / 1000**0.5


def test_prior_has_the_highest_noise() -> None:
    z = prior_of_seeds(NOISE, (8, 8), range(200), "cpu")
    assert z.std().item() == pytest.approx(80.0, rel=0.03)
    assert z.mean().item() == pytest.approx(0.0, abs=3.0)


def test_prior_neither_reads_nor_moves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = prior_of_seeds(NOISE, SHAPE, [0], "cpu")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(77)
    assert torch.equal(first, prior_of_seeds(NOISE, SHAPE, [0], "cpu"))


@pytest.mark.parametrize("seeds", [[-1], [2, -3], [1.0], [True], ["1"], [None], [2**63]])
def test_seeds_that_are_no_whole_numbers_are_refused(seeds: list[Any]) -> None:
    with pytest.raises(ValueError, match="whole number from 0") as error:
        prior_of_seeds(NOISE, SHAPE, seeds, "cpu")
    assert repr(seeds[-1]) in str(error.value)


def test_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        prior_of_seeds(NOISE, SHAPE, [], "cpu")


SIZES = [(3, 8, 8), (1, 5, 5), (4, 15, 15), (16,), (17,), (31,), (700,), (2, 3)]


@pytest.mark.parametrize("shape", SIZES)
def test_noise_drawn_side_by_side_is_that_of_torchs_cpu_generators(shape: tuple[int, ...]) -> None:
    """Several draws, whose lengths are multiples neither of sixteen nor of the generator's 624 words."""
    seeds = [0, 1, 12345, 2**32 - 1, 2**32 + 7, 2**63 - 1]
    size = torch.Size(shape).numel()
    source = SeedNoise(seeds, shape)
    twister = MersenneTwister(seeds, "cpu") if size >= 16 else None
    for _ in range(4):
        plain = source.draw()
        assert plain.shape == (6, *shape)
        if twister is not None:
            torch.testing.assert_close(twister.normals(size).view(6, *shape), plain, rtol=2e-5, atol=2e-6)


def test_noise_drawn_side_by_side_is_the_same_in_every_batch() -> None:
    many = MersenneTwister(range(9), "cpu")
    first, second = many.normals(75), many.normals(75)
    for seeds in ([4], [8, 4, 4, 0]):
        few = MersenneTwister(seeds, "cpu")
        assert torch.equal(few.normals(75), first[seeds])
        assert torch.equal(few.normals(75), second[seeds])
    assert not torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_seed_is_one_image_on_a_gpu_too() -> None:
    on_gpu = prior_of_seeds(NOISE, SHAPE, [3, 5, 7], "cuda")
    torch.testing.assert_close(on_gpu.cpu(), prior_of_seeds(NOISE, SHAPE, [3, 5, 7]), rtol=2e-5, atol=2e-4)
    assert torch.equal(on_gpu[1:2], prior_of_seeds(NOISE, SHAPE, [5], "cuda"))


# ---- guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.5, 4.0])
def test_guidance_is_its_formula_in_one_call(guidance: float) -> None:
    network, z = Network(), images()
    guided_d = guided(network, LABELS, NULL, guidance)(z, 0.7)
    assert network.calls == [(6, [*LABELS.tolist(), NULL, NULL, NULL], 0.7)]
    of_label, of_null = Network()(z, LABELS, 0.7), Network()(z, torch.full((3,), NULL), 0.7)
    assert torch.equal(guided_d, of_null + guidance * (of_label - of_null))
    if guidance > 1:  # beyond the label's D, seen from that without one
        assert bool(((guided_d - of_label) * (of_label - of_null) > 0).all())


def test_guidance_zero_ignores_the_labels() -> None:
    z = images()
    assert torch.equal(guided(Network(), LABELS, NULL, 0.0)(z, 0.7), Network()(z, torch.full((3,), NULL), 0.7))


@pytest.mark.parametrize("null_class", [NULL, None])
@pytest.mark.parametrize("labels", [LABELS, None])
def test_without_guidance_one_call_of_the_batch_itself(labels: Tensor | None, null_class: int | None) -> None:
    network, z = Network(), images()
    denoised = guided(network, labels, null_class, 1.0)(z, 0.7)
    assert network.calls == [(3, None if labels is None else LABELS.tolist(), 0.7)]
    assert torch.equal(denoised, Network()(z, labels, 0.7))


def test_only_levels_of_the_interval_are_guided_and_the_others_cost_one_row_an_image() -> None:
    network, z = Network(), images()
    denoiser = guided(network, LABELS, NULL, 3.0, (0.5, 2.0))
    for level in (3.0, 2.0, 1.0, 0.5, 0.1):  # a low end is outside, a high end inside, as with a block's levels
        inside = 0.5 < level <= 2.0
        assert denoiser.guides(level) == inside
        plain = guided(Network(), LABELS, NULL, 3.0 if inside else 1.0)(z, level)
        assert torch.equal(denoiser(z, level), plain)
    assert [(n, level) for n, _, level in network.calls] == [(3, 3.0), (6, 2.0), (6, 1.0), (3, 0.5), (3, 0.1)]
    assert network.calls[0][1] == LABELS.tolist()


REFUSED: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: guided(Network(), None, NULL, 2.0), ("guidance = 2.0", "labels", "set guidance to 1")),
    (lambda: guided(Network(), LABELS, None, 0.0), ("guidance = 0.0", "null_class", "set guidance to 1")),
    (lambda: guided(Network(), LABELS, NULL, -0.5), ("guidance", ">= 0", "-0.5")),
    (lambda: guided(Network(), LABELS, NULL, float("nan")), ("guidance", "finite", "nan")),
    (lambda: guided(Network(), LABELS, NULL, float("inf")), ("guidance", "finite", "inf")),
    (lambda: guided(Network(), LABELS, NULL, 2.0, (2.0, 1.0)), ("guidance_interval", "low < high", "[2.0, 1.0]")),
    (lambda: guided(Network(), LABELS, NULL, 2.0, (-1.0, 1.0)), ("guidance_interval", "0 <=", "[-1.0, 1.0]")),
    (lambda: guided(Network(), LABELS, NULL, 2.0, (0.0, float("inf"))), ("guidance_interval", "finite")),
    (lambda: guided(Network(), LABELS, NULL, 1.0, (1.0, 2.0)), ("guidance_interval = [1.0, 2.0]", "guidance = 1")),
    (lambda: check_guided_levels([80.0, 9.0, 0.0], (0.0, 8.0)), ("guidance_interval = [0.0, 8.0]", "80", "down to 9")),
    (lambda: guided(Network(), LABELS[:, None], NULL, 1.0), ("labels", "(n,)", "(3, 1)")),
    (lambda: guided(Network(), LABELS, NULL, 1.0)(images(4), 1.0), ("labels", "4 samples", "3")),
    (lambda: guided(Network(), LABELS, NULL, 2.0)(images(4), 1.0), ("labels", "4 samples", "3")),
    (
        lambda: sample_images(guided(Network(), None, None, 1.0), images(), [1.0, 0.0], NOISE, solver="ddim"),
        ("'ddim'", "euler", "heun", "dpmpp-2m"),
    ),
    (lambda: sample_images(guided(Network(), None, None, 1.0), images(), [1.0], NOISE), ("levels", "at least two")),
    (lambda: sample_images(guided(Network(), None, None, 1.0), images(), [], NOISE), ("levels", "at least two")),
]


@pytest.mark.parametrize(("act", "words"), REFUSED)
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"


# ---- chains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_chain_is_its_solvers_and_counts_its_calls(solver: str) -> None:
    network, levels = Network(), NOISE.sampling_levels(5)
    z = prior_of_seeds(NOISE, SHAPE, [1, 2, 3], "cpu")
    seen: list[int] = []
    made = sample_images(
        guided(network, LABELS, NULL, 3.0), z, levels, NOISE, solver=solver, callback=lambda step, *_: seen.append(step)
    )
    assert seen == [0, 1, 2, 3, 4]
    assert len(network.calls) == calls(solver, 5, ends_at_zero=True)
    assert {n for n, _, _ in network.calls} == {6}
    assert made.dtype == torch.float32
    assert torch.equal(made, SOLVERS[solver](guided(Network(), LABELS, NULL, 3.0), z, levels, NOISE))


def test_euler_is_the_default() -> None:
    denoiser = guided(Network(), None, None, 1.0)
    chain = (denoiser, images(), [2.0, 1.0, 0.5], NOISE)
    assert torch.equal(sample_images(*chain), euler(*chain))


def test_an_image_depends_on_its_seed_and_label_alone() -> None:
    levels = NOISE.sampling_levels(4, "karras")

    def make(seeds: list[int], labels: list[int]) -> Tensor:
        denoiser = guided(Network(), torch.tensor(labels), NULL, 2.0)
        return sample_images(denoiser, prior_of_seeds(NOISE, SHAPE, seeds, "cpu"), levels, NOISE, solver="heun")

    many = make([3, 5, 7, 5], [0, 1, 2, 2])
    assert torch.equal(many[1:2], make([5], [1]))
    assert torch.equal(many[2:], make([7, 5], [2, 2]))
    assert not torch.equal(many[1], many[3])  # the label matters


def test_churned_images_depend_on_their_seeds_alone() -> None:
    levels = NOISE.sampling_levels(6, "karras")

    def make(seeds: list[int], amount: float = 20.0) -> Tensor:
        source = SeedNoise(seeds, SHAPE)
        z, churn = first_z(NOISE, source), Churn(amount, source.draw)
        denoiser = guided(Network(), torch.zeros(len(seeds), dtype=torch.int64), NULL, 1.0)
        return sample_images(denoiser, z, levels, NOISE, solver="heun", churn=churn)

    many = make([3, 5, 7, 5])
    assert torch.equal(many[1:2], make([5]))
    assert torch.equal(many[2:], make([7, 5]))
    assert not torch.allclose(many, make([3, 5, 7, 5], 0.0))


def test_chains_make_no_gradients() -> None:
    scale = torch.ones((), requires_grad=True)
    assert not sample_images(lambda z, level: scale * z, images(), [2.0, 1.0, 0.0], NOISE).requires_grad
    assert torch.is_grad_enabled()


def test_progress_is_shown_on_request_alone(capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = guided(Network(), None, None, 1.0)
    sample_images(denoiser, images(), NOISE.sampling_levels(7), NOISE)
    assert capsys.readouterr().err == ""
    sample_images(denoiser, images(), NOISE.sampling_levels(7), NOISE, progress=True)
    assert "7/7" in capsys.readouterr().err
