"""Samples per second, peak and traffic of several GPUs: blocks, beside the model end to end under DDP and FSDP2.

    python benchmarks/parallel.py --out benchmarks/results/parallel.json
    python benchmarks/parallel.py --gpus 1 --models dit-l-2 --no-compile --network 400 100 10 1 --out one.json  # short
    python benchmarks/parallel.py --tiny --device cpu --gpus 1 2 --network 10 --out /tmp/parallel.json  # a trial

Every row is a torchrun of its own with a process per GPU, and is written as soon as it is measured; a row that the file
has without an error is not measured again. In a step every GPU does as many layer-updates, whatever the method: a block
of L / B layers takes a batch of its own, the whole model of L layers a B-th of it on each GPU.

- `blocks`: ours, a block on each GPU at a time; with more GPUs than blocks, groups (`parallel.within_block`).
- `active`: ours on one GPU, all blocks in turn, of which one is on the device (`train.resident: active`).
- `ddp`: torch's DistributedDataParallel. `fsdp2`: torch's `fully_shard`, layer by layer, by `within_block: shard`.

`samples_per_second` counts samples through all L layers: layer-updates per second over L. `bytes_sent` is what one GPU
sends in a step, of ring collectives, counted where they are called; `bytes_between_blocks` what of it leaves a block's
group. Of the end-to-end model that is all. With `--network` steps are timed again with every collective delayed by what
its bytes would take on a link of so many Gbit/s, as if each GPU were a machine.

With one GPU `--network` is arithmetic: the measured step, and the bytes that it would send as one of as many machines
as there are blocks. A step takes the longer of both where all bytes travel while it computes, and their sum where none
do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.bench.bench_models import MODELS, batch_size_of, fill, layers_of, recipe_of, splits_of
from diffusionblocks.bench.methods import Spec
from diffusionblocks.bench.timing import Clock
from diffusionblocks.common.formats import read_json
from diffusionblocks.core.partition import even_layers
from diffusionblocks.evaluation.memory import transient_peak
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import mesh_rows
from diffusionblocks.planning.many_gpus import bytes_sent
from diffusionblocks.reports.results import results_header, write_results
from diffusionblocks.reports.tables import format_bytes, format_table
from diffusionblocks.training import Trainer, units_of
from diffusionblocks.training.compilation import Compiler
from diffusionblocks.training.ranks import Place, Ranks
from diffusionblocks.training.step import arithmetic
from diffusionblocks.training.traffic import Traffic
from diffusionblocks.training.units import Unit

METHODS = ("blocks", "active", "ddp", "fsdp2")

#: Steps before anything is measured: they compile, and make the optimizer's state.
_WARM_UP = 6

#: Milliseconds of a window whose collectives are delayed.
_LONGEST_WINDOW = 2000.0

#: Functions of torch.distributed that move what training moves; names differ between versions.
_COLLECTIVES = {
    "all_reduce": 2,
    "broadcast": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
}


@dataclass(frozen=True)
class Job:
    """A row to measure; fields are the options'."""

    model: str
    method: str
    gpus: int
    blocks: int = 4
    batch_size: int | None = None
    within_block: str = "replicate"
    device: str = "cuda"
    tiny: bool = False
    compile: bool = True
    cuda_graph: bool = False
    windows: int = 5
    iterations: int = 20
    network: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """What tells rows of a file apart."""
        parts = [self.model, self.method, f"gpus={self.gpus}", f"blocks={self.blocks}"]
        defaults = Job("", "", 0)
        for name in ("batch_size", "within_block", "device", "tiny", "compile", "cuda_graph"):
            if getattr(self, name) != getattr(defaults, name):
                parts.append(f"{name}={getattr(self, name)}")
        return " ".join(parts)

    def spec(self, method: str, **changes: Any) -> Spec:
        """The model of `diffusionblocks bench`."""
        same = {
            name: getattr(self, name) for name in ("model", "batch_size", "device", "tiny", "compile", "cuda_graph")
        }
        return Spec(method=method, **(same | changes))


# ---- what is stepped -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stepping:
    """Training of one rank.

    Attributes:
        step: takes a step; no wait for the device.
        layer_updates: samples times layers of a step, of this rank.
        unit: what this rank trains, or the first of it.
        weights: of that, its rows alone where they are shared out.
        groups: the ranks of each block.
        batch_size: of a step of a block, or of the whole model over all ranks.
        stream: where the steps run, for as long as this is there: captured ones have one of their own.
    """

    step: Callable[[], None]
    layer_updates: float
    unit: Unit
    weights: list[Tensor]
    groups: list[tuple[int, ...]]
    batch_size: int
    stream: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


def of_blocks(job: Job, ranks: Ranks, device: torch.device) -> Stepping:
    """The first of the blocks that this rank trains."""
    place, batch = ranks.place, batch_size_of(job.spec("resident-all"))
    rows = mesh_rows(place.world, job.blocks)
    size = place.world // rows
    row = place.rank // size
    group = ranks.groups(device, rows, shard=job.within_block == "shard")
    trainer = _trainer(job, job.spec("resident-all", blocks=job.blocks), device, group, row)
    layers = even_layers(layers_of(job.spec("resident-all")), job.blocks)[row]
    groups = [tuple(range(first * size, (first + 1) * size)) for first in range(rows)]
    return _of_trainer(trainer, layers * batch / size, groups, batch)


def in_turn(job: Job, ranks: Ranks, device: torch.device) -> Stepping:
    """All blocks in this one process, ten steps each, one of them on the device."""
    spec = job.spec("resident-active", blocks=job.blocks)
    recipe = recipe_of(spec)
    experiment = Experiment(recipe, splits_of(recipe)).on(str(device))
    trainer = experiment.trainer(progress=False, model=fill(Experiment(recipe).outline, torch.device("cpu")).train())
    taken = 0

    def step() -> None:
        nonlocal taken
        trainer.step(taken // 10 % job.blocks, (taken // 10 + 1) % job.blocks)
        taken += 1

    batch = batch_size_of(spec)
    active = trainer.residency.activate(0, None)
    layer_updates = layers_of(spec) / job.blocks * batch
    stepping = Stepping(step, layer_updates, trainer.units[0], [*active.parameters], [(0,)], batch)
    stepping.stream.enter_context(trainer.side_stream())
    return stepping


def of_fsdp(job: Job, ranks: Ranks, device: torch.device) -> Stepping:
    """The whole model, shared out over all ranks by the trainer."""
    share = share_of(job, ranks.place.world)
    whole = share * ranks.place.world
    group = ranks.groups(device, 1, shard=True) if ranks.place.world > 1 else None
    trainer = _trainer(job, job.spec("end-to-end", batch_size=whole, cuda_graph=False), device, group, None)
    return _of_trainer(trainer, layers_of(job.spec("end-to-end")) * share, _singles(ranks), whole)


def of_ddp(job: Job, ranks: Ranks, device: torch.device) -> Stepping:
    """The whole model on every rank, by torch's DistributedDataParallel."""
    share = share_of(job, ranks.place.world)
    recipe = recipe_of(job.spec("end-to-end", batch_size=share, cuda_graph=False))
    experiment = Experiment(recipe, splits_of(recipe)).on(str(device))
    (unit,), _ = units_of(fill(Experiment(recipe).outline, device).train())
    module: nn.Module = _Loss(unit.module)
    batches = experiment.batches()
    if recipe.train.compile:
        batches.compile()
        Compiler(recipe.train, device).compile([unit.module])
    if ranks.place.world > 1:
        ranks.groups(device, 1)
        devices = [device] if device.type == "cuda" else None
        options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}  # its leanest way
        module = nn.parallel.DistributedDataParallel(module, devices, **options)
        module.register_comm_hook(None, averaging(device))
    optimizer = torch.optim.AdamW(unit.own, lr=recipe.train.lr, fused=True)
    generator = torch.Generator(device).manual_seed(ranks.place.rank)
    indices = torch.arange(share, device=device)

    def step() -> None:
        batch = batches(indices, generator)
        with arithmetic(device, recipe.train.precision):
            loss = module(batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    layers = layers_of(job.spec("end-to-end"))
    return Stepping(step, layers * share, unit, [*unit.own], _singles(ranks), share * ranks.place.world)


MAKERS = dict(zip(METHODS, (of_blocks, in_turn, of_ddp, of_fsdp), strict=True))


class _Loss(nn.Module):
    """The mean loss of a unit's module as a call, which is where DDP steps in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, generator: torch.Generator) -> Tensor:
        losses: Tensor = self.module.loss(batch, generator)  # type: ignore[operator]
        return losses.mean()


def averaging(device: torch.device) -> Callable[[None, Any], Any]:
    """DDP's own all-reduce, on a stream beside the backward pass, so that a delay there holds up nothing else."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def hook(state, bucket):  # type: ignore[no-untyped-def] # DDP reads annotations, and not as text
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            buffer = bucket.buffer().div_(torch.distributed.get_world_size())
            return torch.distributed.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    return hook


def share_of(job: Job, world: int) -> int:
    """Examples of a GPU, end to end: as many layer-updates as a block's."""
    return max(1, math.ceil(batch_size_of(job.spec("end-to-end")) / max(job.blocks, world)))


def _singles(ranks: Ranks) -> list[tuple[int, ...]]:
    return [(rank,) for rank in range(ranks.place.world)]


def _trainer(job: Job, spec: Spec, device: torch.device, group: Any, block: int | None) -> Trainer:
    """The trainer of one unit, whose weights are random numbers."""
    recipe = recipe_of(spec)
    experiment = Experiment(recipe, splits_of(recipe)).on(str(device))
    model = Experiment(recipe).outline
    if block is not None:
        experiment = experiment.part(block)
    (unit,), _ = units_of(model, experiment.recipe.train.blocks)
    fill(unit.module, torch.device("cpu") if group is not None and group.shards else device)
    return experiment.trainer(progress=False, model=model.train(), group=group)


def _of_trainer(trainer: Trainer, layer_updates: float, groups: list[tuple[int, ...]], batch: int) -> Stepping:
    weights = [*trainer.residency.activate(0, None).parameters]
    stepping = Stepping(lambda: trainer.step(0), layer_updates, trainer.units[0], weights, groups, batch)
    stepping.stream.enter_context(trainer.side_stream())
    return stepping


# ---- the network -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def slowed(gigabits: float, device: torch.device) -> Iterator[None]:
    """Delay every collective by what its bytes would take on a link, on the stream that calls it."""
    distributed = torch.distributed
    cycles = _cycles_per_second(device)

    def wrap(function: Callable[..., Any], passes: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
            size = max((value.numel() * value.element_size() for value in tensors), default=0)
            count = distributed.get_world_size(options.get("group"))
            seconds = passes * size * (count - 1) / count * 8 / (gigabits * 1e9)
            if device.type == "cuda":
                torch.cuda._sleep(int(seconds * cycles))
            else:
                _busy(seconds)
            return function(*args, **options)

        return call

    before = {name: getattr(distributed, name) for name in _COLLECTIVES if hasattr(distributed, name)}
    try:
        for name, function in before.items():
            setattr(distributed, name, wrap(function, _COLLECTIVES[name]))
        yield
    finally:
        for name, function in before.items():
            setattr(distributed, name, function)


def _busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _cycles_per_second(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    clock, many = Clock(device), 100_000_000
    torch.cuda._sleep(many)
    start = clock.now()
    torch.cuda._sleep(many)
    end = clock.now()
    clock.wait()
    return 1000.0 * many / clock.between(start, end)


# ---- a rank ----------------------------------------------------------------------------------------------------


class Meeting:
    """Lets ranks begin together and collects what they measured, through torchrun's store: no collective."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._number = 0

    def values(self, value: Any) -> list[Any]:
        """What all ranks say, by rank."""
        self._number += 1
        self._ranks.tell(f"{self._number} of {self._ranks.place.rank}", json.dumps(value))
        world = range(self._ranks.place.world)
        return [json.loads(self._ranks.wait_for(f"{self._number} of {rank}", rank)) for rank in world]


def measure(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Measure a row; all ranks return the same."""
    device = torch.device(ranks.place.device(job.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting, clock = Meeting(ranks), Clock(device)
    stepping = MAKERS[job.method](job, ranks, device)
    with torch.compiler.set_stance("force_eager"), Traffic() as traffic:
        if not job.cuda_graph:
            stepping.step()
    sent, between = sum(traffic.by_group.values()), traffic.between(stepping.groups)
    for _ in range(_WARM_UP * (job.blocks if job.method == "active" else 1)):
        stepping.step()
    clock.wait()

    def times(windows: int, iterations: int) -> list[float]:
        """Milliseconds of a step in each window, of the slowest rank."""
        result = []
        for _ in range(windows):
            meeting.values(None)
            start = clock.now()
            for _ in range(iterations):
                stepping.step()
            end = clock.now()
            clock.wait()
            result.append(max(meeting.values(clock.between(start, end) / iterations)))
        return result

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        milliseconds = times(job.windows, job.iterations)
        peak = torch.cuda.max_memory_allocated()
    else:
        milliseconds = times(job.windows, job.iterations)
        held = sum(weight.numel() * weight.element_size() for weight in stepping.weights)
        peak = 3 * held + transient_peak(stepping.step, device)  # weights and AdamW's two averages
    networks = {}
    for gigabits in job.network if job.gpus > 1 else ():
        with slowed(gigabits, device):
            (first,) = times(1, 1)  # a second and more on a slow link: then a window is of fewer steps, or this one
            iterations = min(job.iterations, int(_LONGEST_WINDOW / first))
            networks[f"{gigabits:g}"] = statistics.median(times(job.windows, iterations)) if iterations else first
    of_ranks = meeting.values([peak, sent, between, stepping.layer_updates])
    peaks, sents, betweens, updates = zip(*of_ranks, strict=True)
    layers = layers_of(job.spec("end-to-end"))
    samples = sum(updates) / layers  # of a step of all GPUs, through all layers

    def per_second(step: float) -> float:
        return 1000.0 * samples / step

    step = statistics.median(milliseconds)
    row = {
        "layers": layers,
        "batch_size": stepping.batch_size,
        "samples_per_second": per_second(step),
        "step_ms": {"median": step, "min": min(milliseconds), "max": max(milliseconds)},
        "peak_bytes": max(peaks),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }
    if not job.cuda_graph:  # captured steps are not counted: a graph has no calls
        row |= {"bytes_sent": max(sents), "bytes_between_blocks": max(betweens)}
    row["network"] = [
        {"gigabits_per_second": float(name), "step_ms": each, "samples_per_second": per_second(each)}
        for name, each in networks.items()
    ]
    if job.gpus == 1 and job.method != "active":  # which is of one machine
        row["on_paper"] = [on_paper(job, stepping.unit, device, step, samples, link) for link in job.network]
    return row


def on_paper(
    job: Job, unit: Unit, device: torch.device, step: float, samples: float, gigabits: float
) -> dict[str, Any]:
    """What as many machines as there are blocks would make, of one GPU each.

    Args:
        job: the row; `ddp` and `fsdp2` send, blocks do not.
        unit: what a machine trains.
        device: on which a step was measured.
        step: its milliseconds.
        samples: of a step of one machine, through all layers.
        gigabits: of the link of each machine, per second.
    """
    config = recipe_of(job.spec("end-to-end")).train
    sent = 0
    if job.method in ("ddp", "fsdp2"):
        sent = bytes_sent(unit, config, device, job.blocks, shard=job.method == "fsdp2")
    travelling = 1000 * 8 * sent / (gigabits * 1e9)
    steps = {"at_best": max(step, travelling), "at_worst": step + travelling}
    per_second = {name: 1000 * samples * job.blocks / each for name, each in steps.items()}
    values = {"gigabits_per_second": gigabits, "machines": job.blocks, "bytes_sent": sent}
    return {**values, "step_ms": steps, "samples_per_second": per_second}


def work(job: Job, out: Path) -> None:
    """Be a rank of a row."""
    place = Place.from_environment()
    assert place is not None, "torchrun starts this"
    torch.set_float32_matmul_precision("high")
    ranks = Ranks(place, 600.0)
    with ranks.failing_together():
        try:
            row = measure(job, ranks)
        except Exception as error:
            if ranks.leads or isinstance(error, torch.OutOfMemoryError):
                out.write_text(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
            traceback.print_exc()
            raise
        ranks.tell(f"end {place.rank}")
        if ranks.leads:
            for rank in range(place.world):
                ranks.wait_for(f"end {rank}", rank)
            out.write_text(json.dumps(row))


# ---- the table -------------------------------------------------------------------------------------------------


def command_of(job: Job, out: Path) -> list[str]:
    """What starts the ranks of a row."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.gpus)]
    return [*launcher, str(Path(__file__).resolve()), "--work", json.dumps(dataclasses.asdict(job)), "--out", str(out)]


def answer(job: Job, limit: float) -> dict[str, Any]:
    """Measure a row in processes of its own; what goes wrong becomes its `error`."""
    with tempfile.TemporaryDirectory(prefix="diffusionblocks-parallel-") as folder:
        out = Path(folder) / "row.json"
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        process = subprocess.Popen(command_of(job, out), env=os.environ | threads, stdout=sys.stderr)
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            process.wait()
            return {"error": f"timed out after {limit:g} s"}
        if out.is_file():
            row: dict[str, Any] = json.loads(out.read_text())
            return row
        return {"error": f"torchrun ended with status {status}"}


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The rows that are asked for."""
    same = {field.name for field in dataclasses.fields(Job)} & set(vars(options)) - {"network"}
    shared = {name: getattr(options, name) for name in same - {"gpus"}}
    return [
        Job(**shared, model=model, method=method, gpus=gpus, network=tuple(options.network))
        for model in options.models
        for gpus in options.gpus
        for method in options.methods
        if method != "active" or gpus == 1
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["dit-l-2", "vit-h"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch-size", type=int, help="of a block (default: the model's, 64)")
    parser.add_argument("--within-block", choices=("replicate", "shard"), default="replicate")
    parser.add_argument("--network", nargs="*", type=float, default=[], metavar="GBIT", help="links to time as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="capture the steps of blocks; nothing is counted then"
    )
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20, help="steps of a window")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a row")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    options = parser.parse_args()
    if options.work:
        values = json.loads(options.work)
        work(Job(**values | {"network": tuple(values["network"])}), options.out)
        return
    jobs = jobs_of(options)
    if options.dry_run:
        print("\n".join(shlex.join(command_of(job, Path("row.json"))) for job in jobs))
        return
    if options.device == "cuda" and torch.cuda.device_count() < max(options.gpus):
        raise SystemExit(f"{torch.cuda.device_count()} GPUs are here: lower --gpus, or try --device cpu --tiny")
    rows = {row["key"]: row for row in read_json(options.out)["rows"]} if options.out.exists() else {}
    for job in jobs:
        if "error" in rows.get(job.key, {"error": ""}):
            rows[job.key] = {"key": job.key, **dataclasses.asdict(job), **answer(job, options.limit)}
            devices = {row["device"] for row in rows.values() if "samples_per_second" in row}
            write_results(options.out, [*rows.values()], results_header(", ".join(sorted(devices)) or options.device))
        print(
            json.dumps({name: rows[job.key].get(name) for name in ("key", "samples_per_second", "error")}), flush=True
        )
    print(format_table([_cells(rows[job.key]) for job in jobs]))


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    if "error" in row:
        return {"model": row["model"], "method": row["method"], "gpus": row["gpus"], "samples/s": row["error"][:60]}
    sent = [row.get(name) for name in ("bytes_sent", "bytes_between_blocks")]
    return {
        "model": row["model"],
        "method": row["method"],
        "gpus": row["gpus"],
        "samples/s": f"{row['samples_per_second']:.1f}",
        "step ms": f"{row['step_ms']['median']:.2f}",
        "peak of a GPU": format_bytes(row["peak_bytes"]),
        "sent": None if sent[0] is None else format_bytes(sent[0]),
        "between blocks": None if sent[1] is None else format_bytes(sent[1]),
        **{
            f"samples/s at {n['gigabits_per_second']:g} Gbit/s": f"{n['samples_per_second']:.1f}"
            for n in row.get("network", [])
        },
        **{
            f"samples/s of {n['machines']} machines at {n['gigabits_per_second']:g} Gbit/s": " to ".join(
                dict.fromkeys(f"{n['samples_per_second'][case]:.1f}" for case in ("at_worst", "at_best"))
            )
            for n in row.get("on_paper", [])
        },
    }


if __name__ == "__main__":
    main()
