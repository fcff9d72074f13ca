"""Prediction of classifiers: what each rule makes of the blocks' logits, which blocks are asked, and what it costs."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import HIDDEN, NUM_LABELS, convert, noise_batch, record_calls, seeded, tiny, toy_batch, train_a_little
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.fields import Combination
from diffusionblocks.core.partition import Partition
from diffusionblocks.evaluation.accuracy import accuracy_grid
from diffusionblocks.sampling import COMBINATIONS, predict_labels
from diffusionblocks.targets import LabelTarget
from diffusionblocks.training import EndToEnd

IMAGES = noise_batch()["pixel_values"]
RULES = tuple(COMBINATIONS)


def random_model(**config: Any) -> db.DiffusionBlocks:
    """Blocks whose every weight is random, so that each says something else, at every level."""
    model = convert("vit", **config).eval()
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            generator = seeded(index)
            for parameter in block.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- closed form ---------------------------------------------------------------------------------------------


def exact(context: Callable[[float], Tensor], combine: str, steps: int = 3, **options: Any) -> db.sampling.Prediction:
    """Predict with a network that knows the context logits, of each level, and the likelihood."""
    noise = db.EDM(coverage=(0.001, 0.999))
    partition = Partition.build(noise, 3, 3)
    target = LabelTarget(NUM_LABELS, HIDDEN, learned=False, seed=0)

    def network(z: Tensor, level: float, contexts: object) -> tuple[Tensor, Tensor]:
        logits = context(level)
        return logits, logits + z @ target.table.T / level**2

    return predict_labels(
        network,
        target,
        noise,
        noise.levels(steps),
        batch_size=2,
        device=torch.device("cpu"),
        owner=partition.block_of,
        combine=combine,
        generator=seeded(),
        **options,
    )


def test_of_equal_contexts_the_mean_is_the_context_and_the_product_its_power() -> None:
    context = torch.tensor([[0.5, 0.0, -1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    for combine in ("mean", "probabilities"):
        answer = exact(lambda _: context, combine, seeds=2)
        torch.testing.assert_close(answer.probabilities, context.softmax(-1))
        torch.testing.assert_close(answer.logits, context.log_softmax(-1))
    torch.testing.assert_close(exact(lambda _: context, "product").logits, (3 * context).log_softmax(-1))
    # A block that is asked four times is one witness still.
    torch.testing.assert_close(exact(lambda _: context, "product", steps=12).logits, (3 * context).log_softmax(-1))


def test_rules_by_hand_where_contexts_differ() -> None:
    rows = [torch.randn(2, NUM_LABELS, generator=seeded(i)) for i in range(3)]
    levels = db.EDM(coverage=(0.001, 0.999)).levels(3)
    by_level = dict(zip(levels, rows, strict=False))
    mean, product, average = (exact(by_level.__getitem__, rule) for rule in ("mean", "product", "probabilities"))
    torch.testing.assert_close(mean.logits, (sum(rows) / 3).log_softmax(-1))
    torch.testing.assert_close(product.logits, sum(rows).log_softmax(-1))  # type: ignore[attr-defined]
    torch.testing.assert_close(average.probabilities, sum(row.softmax(-1) for row in rows) / 3)
    assert torch.equal(mean.logits.argsort(-1), product.logits.argsort(-1))
    assert (product.probabilities.max(-1).values > mean.probabilities.max(-1).values).all()
    torch.testing.assert_close(mean.contexts, torch.stack(rows).log_softmax(-1))


def test_the_chain_of_an_exact_classifier_samples_its_probabilities() -> None:
    context = torch.tensor([[0.5, 0.0, -1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    first = exact(lambda _: context, "chain", steps=1, seeds=300)
    torch.testing.assert_close(first.probabilities, context.softmax(-1), atol=0.01, rtol=0)
    long = exact(lambda _: context, "chain", steps=40, seeds=300, return_trajectory=True)
    assert long.trajectory is not None
    assert torch.equal(long.trajectory[-1], long.probabilities)
    torch.testing.assert_close(long.probabilities, context.softmax(-1), atol=0.1, rtol=0)
    one = exact(lambda _: context, "chain", steps=40)  # one seed is a draw, and sure of it
    assert one.probabilities.max(-1).values.min() > 0.99
    certain = exact(lambda _: 40 * torch.eye(NUM_LABELS)[:2], "chain", steps=5, return_trajectory=True)
    assert certain.trajectory is not None
    assert certain.trajectory.argmax(-1).tolist() == [[0, 1]] * 5


# ---- of a model ------------------------------------------------------------------------------------------------


def test_each_blocks_vote_by_hand() -> None:
    model = random_model()
    prediction = model.predict(IMAGES, generator=seeded())
    inputs, levels = {"pixel_values": IMAGES}, prediction.levels
    z = levels[0] * torch.randn(len(IMAGES), HIDDEN, generator=seeded())
    assert prediction.contexts is not None
    with torch.no_grad():
        for b, (level, lower) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
            here = torch.full((len(IMAGES),), level)
            context = model.block(b)(inputs, z, here, context=True)
            torch.testing.assert_close(prediction.contexts[b], context.log_softmax(-1), rtol=1e-4, atol=1e-5)
            denoised = model.block(b).posterior(context, z, here).softmax(-1) @ model.block(b).target.table
            z = denoised + lower / level * (z - denoised)
    torch.testing.assert_close(prediction.logits, prediction.contexts.mean(0).log_softmax(-1))
    assert not torch.allclose(prediction.contexts[0], prediction.contexts[2], atol=0.1)


@pytest.mark.parametrize("combine", RULES)
def test_votes_answer_by_every_rule_what_predict_does(combine: str) -> None:
    model = random_model()
    asked = model.predict(IMAGES, combine=combine, steps=4, seeds=2, generator=seeded())
    other = model.predict(IMAGES, steps=4, seeds=2, generator=seeded())
    assert other.votes is not None
    probabilities, logits = other.votes.answer(combine)
    assert torch.equal(probabilities, asked.probabilities)
    assert torch.equal(logits, asked.logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(IMAGES)))
    torch.testing.assert_close(logits.exp(), probabilities)
    assert torch.equal(asked.logits, other.logits) == (combine == "mean")


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
@pytest.mark.parametrize("noise", [None, {"p_mean": 1.0, "p_std": 0.8}, {"kind": "flow"}])
@pytest.mark.parametrize("partition", ["equi-probability", "log-uniform", "uniform"])
def test_by_default_every_block_is_asked_once(partition: str, noise: dict | None, num_blocks: int) -> None:
    if noise and noise.get("kind") and partition == "log-uniform":
        pytest.skip("t begins at 0, where a logarithm has no value")
    config = db.BlocksConfig(num_blocks=num_blocks, partition=partition, noise=noise, overlap=0.0)
    model = db.convert(tiny("vit", layers=6), config).eval()
    calls = record_calls(model)
    prediction = model.predict(IMAGES)
    assert [block for block, _ in calls] == list(range(num_blocks))
    assert prediction.levels[0] == model.noise.read_max
    for block, level in enumerate(prediction.levels):
        low, high = model.partition.training_interval(block)
        assert low <= level <= high
    if partition == "equi-probability":
        assert prediction.levels == pytest.approx(model.noise.levels(num_blocks)[:-1], rel=1e-9)
    elif num_blocks == 6:  # the positive control: the grid for all would ask some twice and others never
        calls.clear()
        model.predict(IMAGES, steps=6, grid="equal-quantile")
        assert len({block for block, _ in calls}) < 6


def test_a_block_beyond_the_levels_that_are_read_is_asked_all_the_same() -> None:
    noise = db.EDM(coverage=(0.4, 0.6))
    model = convert("vit", noise=noise).eval()
    calls = record_calls(model)
    levels = model.predict(IMAGES).levels
    assert [block for block, _ in calls] == [0, 1, 2]
    assert levels[0] == 80 > noise.read_max
    assert list(levels) == sorted(levels, reverse=True)


def test_several_levels_of_each_block_descend_through_all() -> None:
    for coverage in (None, (0.001, 0.999), (0.4, 0.6), (0.7, 0.8)):
        for partition in ("equi-probability", "uniform", "log-uniform"):
            noise = db.EDM(coverage=coverage)
            split = Partition.build(noise, 3, 3, strategy=partition)
            *levels, end = split.levels(noise, 4)
            assert [split.block_of(level) for level in levels] == [0] * 4 + [1] * 4 + [2] * 4
            assert [*levels, end] == sorted({*levels, end}, reverse=True)


def test_the_default_costs_one_pass_of_all_layers() -> None:
    model = db.convert(tiny("vit", layers=6), db.BlocksConfig(num_blocks=3)).eval()
    calls: list[str] = []
    for b in range(3):
        block = model.block(b)
        for path in block.layer_paths:
            block.network.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    model.predict(IMAGES)
    assert calls == [path for b in range(3) for path in model.block(b).layer_paths]
    assert len(calls) == 6
    calls.clear()
    model(IMAGES)
    assert len(calls) == 6


def test_learned_likelihood_predicts_as_ever_and_has_nothing_to_average() -> None:
    model = random_model(target={"likelihood": "learned"})
    prediction = model.predict(IMAGES, generator=seeded())
    same = model.predict(IMAGES, combine="chain", steps=1, seeds=8, generator=seeded())
    assert torch.equal(prediction.logits, same.logits)
    assert prediction.contexts is None
    assert prediction.levels == (model.noise.read_max,)
    for combine in ("mean", "product", "probabilities"):
        with pytest.raises(ValueError, match=f"combine = {combine!r} needs .* use combine = chain, or train"):
            model.predict(IMAGES, combine=combine)


def test_a_rule_that_there_is_not() -> None:
    for value in ("median", "", 1, ["mean"]):
        message = f"unknown combine {value!r}; allowed: mean, product, probabilities, chain"
        with pytest.raises(ValueError, match=re.escape(message)):
            convert("vit").predict(IMAGES, combine=value)  # type: ignore[arg-type]
    assert get_args(Combination) == RULES


def test_what_was_trained_and_saved_predicts_the_same(tmp_path: Path) -> None:
    model = convert("vit")
    train_a_little(model, toy_batch)
    model.save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model").eval()
    for combine in RULES:
        ours, theirs = (m.predict(IMAGES, combine=combine, generator=seeded()) for m in (model, loaded))
        assert torch.equal(ours.logits, theirs.logits)
    batch = noise_batch()
    output = loaded(**batch, generator=seeded())  # what transformers.Trainer evaluates
    assert torch.equal(output.logits, loaded.predict(IMAGES, generator=seeded()).logits)


# ---- measured ---------------------------------------------------------------------------------------------------


def batches(*seeds: int) -> Callable[[], list[dict[str, Tensor]]]:
    return lambda: [noise_batch(seed=seed) for seed in seeds]


@pytest.mark.parametrize("flip", [False, True])
def test_no_chain_is_run_twice_for_several_rules(flip: bool) -> None:
    model = random_model()
    calls = record_calls(model)
    rows = accuracy_grid(
        model, batches(0, 1), combine=("mean", "chain"), steps=(None, 3, 1), seeds=(1, 4), flip=flip, seed=5
    )
    assert len(calls) == (3 + 1) * 4 * 2 * (1 + flip)
    assert [(row.combine, row.steps, row.seeds) for row in rows] == [
        (combine, steps, seeds) for combine in ("mean", "chain") for steps in (3, 1) for seeds in (1, 4)
    ]
    alone = accuracy_grid(model, batches(0, 1), combine=("chain",), steps=(3,), seeds=(4,), flip=flip, seed=5)
    assert alone == [rows[5]]


def test_a_row_is_of_the_predictions_by_hand() -> None:
    model = random_model()
    (row,) = accuracy_grid(model, batches(0), combine=(None,), seeds=(2,), flip=True)
    generator, labels = seeded(0), noise_batch()["labels"]
    views = (IMAGES, IMAGES.flip(-1))
    chains = [[model.predict(view, seeds=1, generator=generator) for view in views] for _ in range(2)]
    logs = [
        (chains[0][view].contexts.mean(0) + chains[1][view].contexts.mean(0)).div(2).log_softmax(-1)  # type: ignore
        for view in (0, 1)
    ]
    log_probabilities = ((logs[0] + logs[1]) / 2).log_softmax(-1)
    assert row.nll == pytest.approx(-log_probabilities[range(6), labels].mean().item(), rel=1e-5)
    assert row.accuracy == pytest.approx((log_probabilities.argmax(-1) == labels).double().mean().item())
    assert (row.combine, row.steps, row.seeds) == ("mean", 3, 2)
    for step in range(3):
        vote = sum(chain[view].contexts[step] for chain in chains for view in (0, 1))  # type: ignore[index]
        assert row.alone[step] == pytest.approx((vote.argmax(-1) == labels).double().mean().item())  # type: ignore


def test_flips_serve_every_model_alike() -> None:
    vit = EndToEnd(tiny("vit"))
    plain, mirrored = ({**noise_batch(), "pixel_values": view} for view in (IMAGES, IMAGES.flip(-1)))
    both, again = (accuracy_grid(vit, lambda batch=batch: [batch], flip=True) for batch in (plain, mirrored))
    assert both[0].nll == pytest.approx(again[0].nll, rel=1e-6)
    one, other = (accuracy_grid(vit, lambda batch=batch: [batch]) for batch in (plain, mirrored))
    assert one[0].nll != pytest.approx(other[0].nll, rel=1e-3)  # the positive control
    assert (both[0].combine, both[0].steps, both[0].seeds) == (None, None, None)


def test_copies_of_blocks_predict_alike() -> None:
    """A deep copy shares nothing of the original's prediction."""
    model = random_model()
    assert torch.equal(copy.deepcopy(model).predict(IMAGES).logits, model.predict(IMAGES).logits)
