"""What a measuring process does: one of four tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.partition import even_layers
from ..experiments.experiment import Experiment
from ..training import Trainer
from .alternatives import alternative_runner
from .bench_models import batch_size_of, build, bytes_of_data, layers_of, recipe_of, splits_of
from .bus import bus_bytes_of_step
from .host_need import check_host
from .methods import METHODS, Spec
from .peak_memory import measure_memory, peak_of_steps
from .plain_loop import Plain, compile_units
from .runners import Runner, TrainerRunner
from .timing import Clock, Times, alone, paired_switching, steady_times, switching_times, warm_up

#: Allocators, of the device and of the host, say one of these when there is no more.
_NO_MEMORY = ("out of memory", "can't allocate memory")


def failure(error: Exception) -> dict[str, str]:
    """What an answer says of an exception, as its `error`; the traceback of an unexpected one is printed."""
    if isinstance(error, (ValueError, ImportError)):  # what can be told in advance: a package that is missing, say
        return {"error": str(error)}
    text = f"{type(error).__name__}: {error}".strip()
    if any(part in text.lower() for part in _NO_MEMORY):
        return {"error": "out of memory", "detail": text.splitlines()[0]}
    traceback.print_exception(error)
    return {"error": text}


@contextlib.contextmanager
def runner_of(spec: Spec) -> Iterator[Runner]:
    """What a specification asks for, ready to step.

    Raises:
        ImportError: an alternative's package is missing; the message says how to install it.
        ValueError: what the specification asks for cannot be, or would fill the host's memory.
    """
    check_host(spec)
    if METHODS[spec.method].kind == "alternative":
        yield alternative_runner(spec)
        return
    recipe = recipe_of(spec)
    experiment = Experiment(recipe, splits_of(recipe))
    waits_on_host = recipe.train.resident == "active"
    model = build(recipe, torch.device("cpu") if waits_on_host else experiment.device)
    with tempfile.TemporaryDirectory(prefix="diffusionblocks-bench-") as temporary:
        # With a folder, the trainer's loop would also save checkpoints.
        folder = Path(temporary) if recipe.train.offload == "disk" else None
        trainer = experiment.trainer(folder, progress=False, model=model)
        with trainer.side_stream():
            yield TrainerRunner(trainer, bytes_of_data(experiment.data("train")))


def _row(spec: Spec) -> dict[str, Any]:
    """Measure memory and speed of a method."""
    row = _launched(spec)
    if spec.captured and METHODS[spec.method].kind != "alternative":
        try:
            row["captured_ms"] = _captured_times(spec).to_dict()
        except Exception as error:  # what was measured before must not be lost to it
            row["captured_error"] = failure(error)["error"]
    return row


def _captured_times(spec: Spec) -> Times:
    """Milliseconds of a step that is captured in a CUDA graph, where launches cost nothing; without switches."""
    gc.collect()  # the trainer before
    with runner_of(dataclasses.replace(spec, cuda_graph=True)) as runner, alone():
        warm_up(runner)
        times = steady_times(runner, spec.windows, spec.iterations)
        runner.check()
        return times


def _launched(spec: Spec) -> dict[str, Any]:
    start = time.perf_counter()
    with runner_of(spec) as runner, alone():
        ready = time.perf_counter()
        warm_up(runner)
        Clock(runner.device).wait()
        warm = time.perf_counter()
        # Of captured steps the allocator knows the capture only.
        memory = {} if spec.cuda_graph else measure_memory(runner).to_dict()
        steady = steady_times(runner, spec.windows, spec.iterations)
        switch = _switch_ms(runner, spec, steady)
        steps_per_switch = runner.steps_per_switch or spec.steps_per_switch
        bus = bus_bytes_of_step(runner, steps_per_switch)
        runner.check()
        step_ms = steady.median + (switch or 0.0) / steps_per_switch
        batch = batch_size_of(spec)
        per_second = 1000.0 * batch / step_ms
        return {
            **_about(spec),
            **memory,
            "step_ms": steady.to_dict(),
            "switch_ms": switch,
            "steps_per_switch": steps_per_switch if runner.switches else None,
            "samples_per_second": per_second,
            "epoch_samples_per_second": per_second / (spec.blocks if METHODS[spec.method].kind == "blocks" else 1),
            "host_bytes": runner.host_bytes,
            "bus_bytes_per_step": bus,
            "start_seconds": ready - start,
            "warm_up_seconds": warm - ready,
        }


def _about(spec: Spec) -> dict[str, Any]:
    layers, method = layers_of(spec), METHODS[spec.method]
    parts = even_layers(layers, spec.blocks)
    return {
        "model": spec.model,
        "method": spec.method,
        "about": method.about,
        "blocks": spec.blocks,
        "layers": parts[0] if method.kind == "short" else layers,
        "block_layers": parts if method.kind == "blocks" else None,
        "batch_size": batch_size_of(spec),
        "tiny": spec.tiny,
        "compile": spec.compile,
        "cuda_graph": spec.cuda_graph,
        "device": torch.cuda.get_device_name() if spec.device == "cuda" else "CPU",
    }


def _switch_ms(runner: Runner, spec: Spec, steady: Times) -> float | None:
    """What a switch adds to a step, from steps that all switch; an upper bound, as a longer stay hides more of it."""
    if not runner.switches:
        return None
    return switching_times(runner, spec.windows, 1).median - steady.median


def _switching(spec: Spec) -> dict[str, Any]:
    """Milliseconds of a step, switches included, for several steps per switch, beside steps without switches."""
    with runner_of(spec) as runner, alone():
        warm_up(runner)
        steady = steady_times(runner, spec.windows, spec.iterations)
        switching = [(steps, paired_switching(runner, spec.windows, steps)) for steps in spec.switching_steps]
        runner.check()
        return {
            **_about(spec),
            "offload": spec.offload,
            "host_bytes": runner.host_bytes,
            "step_ms": steady.to_dict(),
            "switching": [{"steps_per_switch": steps, **times.to_dict()} for steps, times in switching],
        }


def _overhead(spec: Spec) -> dict[str, Any]:
    """Milliseconds of a step in the trainer's loop and in a bare loop, in windows that take turns."""
    with runner_of(spec) as runner, alone():
        assert isinstance(runner, TrainerRunner)
        bare = _bare_loop(spec)
        count = 4 * spec.iterations * runner.turns  # a call of `train` has its own small cost
        loops: dict[str, Callable[[int], None]] = {"trainer": _trainer_loop(runner.trainer), "bare": bare}
        clock = Clock(runner.device)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for loop in loops.values():
            loop(3 * runner.turns)
        for window in range(spec.windows):
            for name in sorted(loops, reverse=window % 2 == 1):
                clock.wait()
                start = clock.now()
                loops[name](count)
                end = clock.now()
                clock.wait()
                times[name].append(clock.between(start, end) / count)
        runner.check()
        ratios = [a / b for a, b in zip(times["trainer"], times["bare"], strict=True)]
        return {
            **_about(spec),
            "trainer_ms": Times.of(times["trainer"]).to_dict(),
            "bare_ms": Times.of(times["bare"]).to_dict(),
            "trainer_over_bare": statistics.median(ratios),
        }


def _trainer_loop(trainer: Trainer) -> Callable[[int], None]:
    def run(count: int) -> None:
        trainer.train(resume=False, until=trainer.iteration + count)

    return run


def _bare_loop(spec: Spec) -> Callable[[int], None]:
    """What one would write by hand for the same model: batch, loss, backward, AdamW; units take turns."""
    plain = Plain(spec)
    if spec.compile:
        plain.batches.compile()
        compile_units(plain)
    optimizers = [torch.optim.AdamW(unit.own, fused=True, **plain.adamw()) for unit in plain.units]
    count_so_far = 0

    def run(count: int) -> None:
        nonlocal count_so_far
        for _ in range(count):
            step, turn = divmod(count_so_far, len(optimizers))
            plain.loss(turn, step).backward()
            optimizers[turn].step()
            optimizers[turn].zero_grad(set_to_none=True)
            count_so_far += 1

    return run


def _fits(spec: Spec) -> dict[str, Any]:
    """Whether a model trains within a budget of the allocator's memory; on a CPU, whether its peak is below it."""
    assert spec.budget is not None
    if spec.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.budget / total))
    with runner_of(spec) as runner, alone():
        peak, reserved = peak_of_steps(runner)
        runner.check()
        fits = spec.device == "cuda" or peak <= spec.budget
        return {**_about(spec), "peak_bytes": peak, "reserved_bytes": reserved, "fits": fits}


TASKS: dict[str, Callable[[Spec], dict[str, Any]]] = {
    "row": _row,
    "switching": _switching,
    "overhead": _overhead,
    "fits": _fits,
}
