"""What a training step takes: from steps that are run and thrown away; on a CPU, where need be, of fewer examples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from time import perf_counter

from ..training import Trainer
from ..training.shared_module import shape_of
from .experiment import Experiment
from .recipe_changes import with_train
from .run import untrained

#: Steps of each unit before the clock starts (compilation, a CUDA graph's capture), and steps that are timed.
_WARM, _TIMED = 12, 36
#: The same where nothing is compiled or captured first.
_PLAIN = (2, 6)
#: More steps of one unit than a first estimate takes: two, and one for each doubling of a batch.
_PROBES = 64


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, on average over the units.

    Attributes:
        seconds: of one step.
        scaled: whether steps of fewer examples were run, and scaled by the examples.
    """

    seconds: float
    scaled: bool = False


def seconds_a_step(experiment: Experiment, *, warm: int = _WARM, timed: int = _TIMED) -> float:
    """Seconds of a training step once it runs, from a few of each unit.

    Args:
        experiment: whose steps; what they train is thrown away.
        warm: steps of each unit before the clock starts.
        timed: steps of each unit that are timed.
    """
    return _timed(_trainer(experiment, warm + timed), warm, timed)


def estimated_step(experiment: Experiment, at_most: float) -> StepTime:
    """Estimate what a training step takes, in bounded time.

    A few steps of each unit are timed, where they do not take too long by a first estimate. That is the second step of
    one unit of each shape. On a CPU it comes of batches that begin at one or two examples and double while there is
    time: a step is a line in the examples, through the first batch and the last. Nothing is compiled there, for that
    alone takes longer.

    Args:
        experiment: whose steps; what they train is thrown away.
        at_most: seconds for the first estimate, and again for the steps that are timed then. Whatever they take, one
            step of the smallest batch of each shape is run, on a GPU two of the whole one.
    """
    compiles = _compiles(experiment)
    if experiment.recipe.train.compile and not compiles:
        experiment = experiment.derive(with_train(experiment.recipe, compile=False))
    captures = experiment.recipe.train.cuda_graph and _on_gpu(experiment)
    warm, timed = (_WARM, _TIMED) if compiles or captures else _PLAIN
    trainer = _trainer(experiment, _PROBES + warm + timed)
    first = _first_estimate(trainer, at_most, _batches(experiment))
    if first.seconds * (warm + timed) * len(trainer.units) > at_most:
        return first
    return StepTime(_timed(trainer, warm, timed))


def leaves_compilation_out(experiment: Experiment) -> bool:
    """Whether `estimated_step` times steps that are not compiled, of a recipe that compiles them."""
    return bool(experiment.recipe.train.compile) and not _compiles(experiment)


def _compiles(experiment: Experiment) -> bool:
    return bool(experiment.recipe.train.compile) and _on_gpu(experiment)


def _on_gpu(experiment: Experiment) -> bool:
    return experiment.device.type != "cpu"


def _trainer(experiment: Experiment, steps: int) -> Trainer:
    recipe = with_train(experiment.recipe, steps=steps, epochs=None, schedule="round-robin")
    return untrained(experiment.derive(recipe))


def _timed(trainer: Trainer, warm: int, timed: int) -> float:
    units = len(trainer.units)
    trainer.train(until=warm * units)
    before = trainer.seconds
    trainer.train(until=(warm + timed) * units)
    return (trainer.seconds - before) / (timed * units)


def _batches(experiment: Experiment) -> list[int]:
    """Examples of the steps of a first estimate, ascending; the last are those of a whole step."""
    train = experiment.recipe.train
    whole = train.batch_size * train.accumulation
    if _on_gpu(experiment):
        return [whole]
    smallest = 2 if experiment.family.batch_norm else 1  # one example has no variance
    doubled = itertools.takewhile(lambda size: size < train.batch_size, (smallest << i for i in itertools.count()))
    return sorted({*doubled, train.batch_size, whole})


def _first_estimate(trainer: Trainer, at_most: float, batches: list[int]) -> StepTime:
    """Seconds of a unit's step, on average over all units, of which one of each shape is stepped."""
    shapes = [shape_of(unit) for unit in trainer.units]
    different = list(dict.fromkeys(shapes))
    trainer.model.train()
    with trainer.side_stream():
        times = {s: _unit_step(trainer, shapes.index(s), at_most / len(different), batches) for s in different}
    seconds = sum(times[shape].seconds for shape in shapes) / len(shapes)
    return StepTime(seconds, any(time.scaled for time in times.values()))


def _unit_step(trainer: Trainer, unit: int, at_most: float, batches: list[int]) -> StepTime:
    """Seconds of a unit's step, by a line through the smallest of these batches and the largest in time."""
    whole = batches[-1]
    begin = perf_counter()
    smallest, shortest = batches[0], _one_step(trainer, unit, batches[0], whole)
    if len(batches) == 1 or 2 * shortest <= at_most:  # the first loads kernels, or compiles
        shortest = _one_step(trainer, unit, smallest, whole)
    largest, longest = smallest, shortest
    for examples in batches[1:]:
        if perf_counter() - begin + longest * examples / largest > at_most:
            break
        largest, longest = examples, _one_step(trainer, unit, examples, whole)
    if largest == whole:
        return StepTime(longest)
    an_example = longest / largest
    if largest > smallest:
        an_example = min(an_example, (longest - shortest) / (largest - smallest))
    return StepTime(longest + max(0.0, an_example) * (whole - largest), scaled=True)


def _one_step(trainer: Trainer, unit: int, examples: int, whole: int) -> float:
    start = perf_counter()
    trainer.step(unit, examples=None if examples == whole else examples)
    trainer.stepper.first_bad_step()  # waits for the device
    return perf_counter() - start
