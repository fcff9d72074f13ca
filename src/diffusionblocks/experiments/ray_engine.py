"""Training on Ray: a task for each block, or member of an ensemble, on whatever machines a cluster has at the moment.

The folder of the run is on a disk that all machines share. A task whose worker dies is started again, on any machine,
and goes on from the newest checkpoint of its block; the tasks of other blocks know nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.files import folder_lock, lock_holder, lock_text
from ..common.messages import announcer, silent
from ..training import Diverged, Interrupted
from .boundaries import place_boundaries
from .experiment import Experiment
from .parts import MakeLoggers, begin, check_parts, finish, has_parts, missing_parts, no_loggers, parts_of, units_in
from .recipe import parse_recipe
from .run import fit_noise
from .run_status import read_status, status_table
from .tasks.task import RunResult

#: How often a block is started again after its worker, or the machine, died.
RETRIES = 100
#: Seconds between two tables of progress, and in which the worker before lets go of a block's folder.
_EVERY, _RELEASE = 15.0, 60.0


@dataclass(frozen=True)
class _Job:
    """What a worker is told of the run.

    Attributes:
        recipe: JSON values.
        folder: of the run, absolute.
        lock: what stands in the folder's lock file, by which a worker knows that it sees the same folder.
    """

    recipe: Mapping[str, Any]
    folder: Path
    lock: str

    def experiment(self) -> Experiment:
        """The experiment. ValueError: the folder is another one on this machine."""
        if lock_text(self.folder) != self.lock:
            raise ValueError(
                f"{self.folder} is not one folder on all machines of the Ray cluster: name one on a disk that "
                "they share with --out, or train blocks by diffusionblocks jobs, which share nothing"
            )
        return Experiment(parse_recipe(dict(self.recipe), "the recipe"))


@dataclass(frozen=True)
class _Resources:
    """What a task asks Ray for.

    Attributes:
        gpus, cpus: of a part.
        most_cpus: of what runs alone: fit, trunk and evaluation.
    """

    gpus: int
    cpus: int
    most_cpus: int


def train_on_ray(
    experiment: Experiment,
    folder: Path,
    *,
    address: str | None = None,
    loggers: MakeLoggers = no_loggers,
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult:
    """Train, save and evaluate an experiment on Ray, a task for each part; see `run.train`.

    Noise fit, trunk and evaluation are tasks too, so that this process needs no GPU.

    Args:
        experiment: what to do.
        folder: of the run, on a disk that all machines share; an unfinished run there goes on.
        address: of a cluster, or `auto`; None uses the one of the variable RAY_ADDRESS, or starts Ray on this machine.
        loggers: makes further receivers of the log of a part, of its folder.
        resume: False starts anew.
        progress: show a table of all parts now and then.
        measure: whether to evaluate.

    Returns:
        The result; its model is an outline on the meta device.

    Raises:
        ImportError: Ray is not installed.
        PartsMissing: a part diverged, or its workers died too often; the others are joined.
        ValueError: what cannot train apart, or what `run.prepare` refuses.
    """
    ray = _ray()
    if not has_parts(experiment):
        raise ValueError(
            f"{experiment.recipe.name} trains one unit, and Ray runs a task for each: train it without --engine ray"
        )
    folder = folder.absolute()
    with folder_lock(folder), _cluster(ray, address):
        resources = _resources(ray, experiment)
        job = _Job(experiment.recipe.model_dump(mode="json"), folder, lock_text(folder))
        say = announcer(progress)
        table = (lambda: _show(folder)) if progress else (lambda: None)

        def run_alone(task: Callable[..., Any], *arguments: Any) -> Any:
            remote = ray.remote(**_options(resources, alone=True))(task)
            outcome = _outcomes(ray, {remote.remote(job, *arguments): 0}, table)[0]
            if isinstance(outcome, str):
                raise RuntimeError(f"{task.__name__.strip('_')}: {outcome}")
            return outcome

        what = "a GPU" if resources.gpus else f"{resources.cpus} of the CPUs"
        say(f"ray: {units_in(experiment)} tasks, each with {what}")
        if not resume:  # in a task of its own: one that is started again must not throw away what it did
            run_alone(_check, False, measure)
        missing = run_alone(_begin, measure)
        remote = ray.remote(**_options(resources))(_train_part)
        outcomes = _outcomes(
            ray, {remote.remote(job, index, resources.cpus, loggers): index for index in missing}, table
        )
        reasons = {index: reason for index, reason in outcomes.items() if reason}
        for index, reason in reasons.items():
            say(f"part {index} stops, the others go on: {reason}")
        result = run_alone(_finish, reasons, measure)
        if isinstance(result, Exception):
            raise result
        rows, seconds, iterations = result
        return RunResult(experiment.outline, rows, seconds, iterations)


# ---- what workers do -------------------------------------------------------------------------------------------


def _check(job: _Job, resume: bool, measure: bool) -> None:
    """Check the run before any work; see `check_parts`."""
    check_parts(job.experiment(), job.folder, resume=resume, measure=measure)


def _begin(job: _Job, measure: bool) -> list[int]:
    """Check the run, and train what its parts start from. Returns the parts that are to be trained."""
    experiment = job.experiment()
    check_parts(experiment, job.folder, measure=measure)
    experiment, _ = begin(experiment, job.folder, say=silent)
    return [part.index for part in missing_parts(parts_of(experiment, job.folder))]


def _train_part(job: _Job, index: int, cpus: int, loggers: MakeLoggers) -> str:
    """Train one part. Returns why it diverged; "" where it did not."""
    torch.set_num_threads(min(torch.get_num_threads(), cpus))  # the process may have served a task of more
    experiment, _ = fit_noise(job.experiment(), job.folder, progress=False)  # which has ended, and is read back
    experiment = place_boundaries(experiment, job.folder)  # so have they
    part = next(part for part in parts_of(experiment, job.folder) if part.index == index)
    end = time.monotonic() + _RELEASE
    while lock_holder(part.folder) is not None and time.monotonic() < end:  # it saves what it has done
        time.sleep(0.2)
    try:
        part.train(loggers=loggers)
    except Diverged as error:
        return str(error)
    return ""


def _finish(job: _Job, reasons: Mapping[int, str], measure: bool) -> Any:
    """Join and evaluate. Returns (rows, seconds, iterations), or the error of parts that are missing."""
    experiment, before = begin(job.experiment(), job.folder, say=silent)
    try:
        result = finish(experiment, job.folder, before, reasons=reasons, measure=measure, say=silent)
    except Diverged as error:
        return error
    return result.rows, result.seconds, result.iterations


# ---- Ray -------------------------------------------------------------------------------------------------------


def _ray() -> Any:
    """The library. ImportError: it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # tasks without a GPU see none
    try:
        import ray
    except ImportError:
        raise ImportError("--engine ray needs the extra: pip install 'diffusionblocks[ray]'") from None
    return ray


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Any:
    """Connect to a cluster, or start Ray on this machine, for the body; one that was connected before stays so.

    Raises:
        ValueError: there is no cluster at the address.
    """
    ours = not ray.is_initialized()
    if ours:
        cluster = address or os.environ.get("RAY_ADDRESS")
        # Without an address Ray would join whatever `ray start` last began here, and wait for it where it was killed.
        options = {"address": cluster} if cluster else {"address": "local", "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"{f'--address {address}' if address else f'RAY_ADDRESS = {cluster}'}: no Ray cluster there ({error}): "
                "start one with ray start --head, or leave it out to use this machine"
            ) from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _resources(ray: Any, experiment: Experiment) -> _Resources:
    """What the tasks of an experiment take. ValueError: a device that Ray does not give."""
    device, totals = experiment.recipe.device, ray.cluster_resources()
    if device.startswith("cuda:"):
        raise ValueError(f"device: {device} names one GPU, and Ray gives each task its own: set device to auto or cuda")
    gpus = 0 if device == "cpu" else min(1, int(totals.get("GPU", 0)))
    if device == "cuda" and not gpus:
        raise ValueError("device: cuda, but no machine of the Ray cluster has a GPU: set device to auto or cpu")
    of_one_machine = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    share = int(totals.get("CPU", 1)) // units_in(experiment)
    return _Resources(gpus, 1 if gpus else max(1, min(of_one_machine, share)), 1 if gpus else max(1, of_one_machine))


def _options(resources: _Resources, *, alone: bool = False) -> dict[str, Any]:
    """Options of a task, which is started again where its worker died or had to stop."""
    cpus = resources.most_cpus if alone else resources.cpus
    process = {"max_calls": 1} if resources.gpus else {}  # a process of its own, which lets go of the GPU's memory
    retries = {"max_retries": RETRIES, "retry_exceptions": [Interrupted]}
    return {"num_gpus": resources.gpus, "num_cpus": cpus, **process, **retries}


def _outcomes(ray: Any, tasks: Mapping[Any, int], show: Callable[[], None]) -> dict[int, Any]:
    """Wait for tasks, with a table now and then.

    Args:
        ray: the library.
        tasks: the part of each.
        show: shows the table.

    Returns:
        What each returned, by its part; why it is missing where its workers died too often.
    """
    outcomes: dict[int, Any] = {}
    waiting, shown_at = list(tasks), time.monotonic()
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=1.0)
        for task in ready:
            try:
                outcomes[tasks[task]] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                outcomes[tasks[task]] = f"its worker died {RETRIES + 1} times: {error}"
        if time.monotonic() - shown_at >= _EVERY:
            show()
            shown_at = time.monotonic()
    return outcomes


def _show(folder: Path) -> None:
    """Print how far each part is."""
    with contextlib.suppress(ValueError, OSError):  # a file that is being written on another machine
        print(status_table(read_status(folder)), file=sys.stderr, flush=True)
