"""DiT on CIFAR-10, block by block beside its controls: curves of Frechet distance over equal layer-updates, a study of
branching, solvers at fewer calls, and the speed and memory of training and sampling.

Jobs are independent, so that several GPUs can share them; each writes its rows as they come:

    python benchmarks/cifar10_dit.py curve --row end-to-end --epochs 25 50 100 250 --out a.json
    python benchmarks/cifar10_dit.py curve --row diffusionblocks --epochs 25 50 100 --out b.json
    python benchmarks/cifar10_dit.py trunk --epochs 25 50 100 250 --out c.json
    python benchmarks/cifar10_dit.py speed --out d.json
    python benchmarks/sampling_speed.py --out e.json
    python benchmarks/cifar10_dit.py gather a.json b.json c.json d.json e.json

An "epoch" of a budget is one pass of the L-layer end-to-end model; every row gets the same number of layer-updates
(layers moved x steps): B blocks of L/B layers step B times as often, and so does the end-to-end model of L/B layers.
`--set` changes the recipe, as everywhere: `train.seed=1` is another seed, `model.config.patch_size=4` DiT-S/4.
Distances are of averaged weights.

After the longest budget each row is sampled in all ways, with other seeds and fewer images; the nearest of them at the
recipe's guidance is its best solver, and is measured like the first setting. `gather` adds the rows to the file that is
there, in place of those of the same model, seed and solver.

Other diffusion models of a recipe are measured by the same commands, such as latents of photographs:

    python benchmarks/cifar10_dit.py trunk --recipe recipes/dit/imagenette-latents.yaml \
        --set evaluate.features=efficientnet-lite0 --epochs 400 --out f.json
    python benchmarks/cifar10_dit.py gather f.json --out benchmarks/results/latents.json --figure latents.png
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from cifar10_gather import gather

from diffusionblocks.bench.timing import Clock
from diffusionblocks.core.image_sampler import ImageSampler
from diffusionblocks.core.model import DiffusionBlocks
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.evaluation.sample_quality import Setting, best_of, measure_samples, sample_batches
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, TrunkConfig, load_recipe
from diffusionblocks.experiments.recipe_changes import depth_of, with_depth, with_train
from diffusionblocks.experiments.run import branch_trunk
from diffusionblocks.experiments.tasks.image_features import image_measures
from diffusionblocks.experiments.tasks.image_generation import SamplesConfig, draw_samples, sampler_of
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.training import Trainer

RESULTS = Path("benchmarks/results/cifar10_dit.json")

#: What is added to the seeds of images that only choose a solver, so that none of them is measured.
OTHER_IMAGES = 2**31


class Job:
    """One process: data, features and references once, rows written after every measure."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = load_recipe(options.recipe, options.set)
        assert isinstance(self.recipe.evaluate, SamplesConfig)
        self.options = self.recipe.evaluate
        self.final: bool = options.final
        self.search_samples: int = options.search_samples
        self.out: Path = options.out
        self.out.parent.mkdir(parents=True, exist_ok=True)  # before hours of work, not after
        self.splits = {split: self.recipe.data.load(split) for split in ("train", "test")}
        self.device = Experiment(self.recipe).device
        self.pixels = self.recipe.data.to_pixels(self.device)
        self.measures = image_measures(Experiment(self.recipe, self.splits), self.pixels)
        self.epoch = self.recipe.train.steps_per_epoch(len(self.splits["train"]))
        self.rows: list[dict[str, Any]] = []
        self.samplers: dict[tuple[int, int], ImageSampler] = {}

    def sampler(self, recipe: Recipe, model: DiffusionBlocks) -> ImageSampler:
        """A sampler of a copy of the model; one for every shape of model, so that it is compiled once."""
        shape = (model.partition.num_layers, model.partition.num_blocks)
        if shape not in self.samplers:
            made = Experiment(recipe).build()
            assert isinstance(made, DiffusionBlocks)
            compile_too = self.options.compile or ("layers" if recipe.train.compile else False)
            options = self.options.model_copy(update={"compile": compile_too})
            self.samplers[shape] = sampler_of(options, made.to(self.device).eval())
        self.samplers[shape].model.load_state_dict(model.state_dict())
        return self.samplers[shape]

    def measure(
        self,
        trainer: Trainer,
        recipe: Recipe,
        settings: list[Setting] | None = None,
        samples: int | None = None,
        seed: int | None = None,
        **about: Any,
    ) -> list[dict[str, Any]]:
        """Add a row for each setting, of the trainer's averaged weights; return these rows."""
        with trainer.averaged() as model:
            assert isinstance(model, DiffusionBlocks)
            sampler = self.sampler(recipe, model)
        with Experiment(recipe).precision(sampler.model):
            measured = measure_samples(
                sampler,
                settings or self.options.settings[:1],
                samples=samples or self.options.samples,
                batch_size=self.options.batch_size,
                pixels=self.pixels,
                measures=self.measures,
                seed=self.options.seed if seed is None else seed,
            )
        always = {"patch": recipe.model.config["patch_size"], "seed": self.recipe.train.seed}
        rows = [about | always | row.to_dict() for row in measured]
        self.rows += rows
        print(format_table([{name: row.get(name) for name in SHOWN} for row in rows]), flush=True)
        write_results(self.out, self.rows)
        return rows

    def draw(self, trainer: Trainer, recipe: Recipe, name: str) -> None:
        """A small grid of samples of the averaged weights, beside the rows."""
        folder = self.out.parent / f"samples-{name}"
        with trainer.averaged() as model:
            assert isinstance(model, DiffusionBlocks)
            draw_samples(Experiment(recipe), self.sampler(recipe, model).model, folder, count=50)


#: Columns that are printed.
SHOWN = (
    *("name", "epochs", "seed", "solver", "steps", "guidance", "guidance_interval", "churn", "samples"),
    *("fd_train", "fd_test", "fd_real", "images_per_second"),
)


def row_name(layers: int, times: int = 1, blocks: int = 1, *, branched: bool = False, restarted: bool = False) -> str:
    """What a row is called: its training; end to end, its layers and how often it steps for a step of all layers."""
    if blocks > 1:
        return "diffusionblocks-branched" if branched else "diffusionblocks-scratch"
    return f"end-to-end-{layers}" + f"-x{times}" * (times > 1) + "-restarted" * restarted


def layer_updates(trainer: Trainer) -> int:
    """Layers moved x steps, so far."""
    assert isinstance(trainer.model, DiffusionBlocks)
    partition = trainer.model.partition
    return trainer.iteration * partition.num_layers // partition.num_blocks


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return with_train(recipe, steps=steps, epochs=None)


def controls(recipe: Recipe, layers: int) -> Recipe:
    return with_depth(recipe, layers).model_copy(update={"method": "end-to-end", "trunk": None})


def measure_now(job: Job, trainer: Trainer, recipe: Recipe, about: dict[str, Any]) -> None:
    spent = {"layer_updates": layer_updates(trainer), "train_seconds": trainer.seconds}
    job.measure(trainer, recipe, **about, **spent)


def curve(options: argparse.Namespace) -> None:
    """End to end with L layers, or blocks from scratch: one run, measured at every budget."""
    job = Job(options)
    depth, many = depth_of(job.recipe), job.recipe.blocks.num_blocks
    blocks = options.row == "diffusionblocks"
    base = job.recipe.model_copy(update={"trunk": None}) if blocks else controls(job.recipe, depth)
    recipe = with_steps(base, max(options.epochs) * job.epoch)
    trainer = Experiment(recipe, job.splits).trainer(progress=False)
    many = many if blocks else 1
    about = {"name": row_name(depth, blocks=many), "layers": depth, "blocks": many, "branched": False}
    for epochs in sorted(options.epochs):
        trainer.train(until=epochs * job.epoch * len(trainer.units))
        measure_now(job, trainer, recipe, about | {"epochs": epochs})
    last = about | {"epochs": max(options.epochs), "layer_updates": layer_updates(trainer)}
    job.draw(trainer, recipe, f"{about['name']}-{many}x{depth // many}")
    final_settings(job, trainer, recipe, last | {"train_seconds": trainer.seconds})


def trunk(options: argparse.Namespace) -> None:
    """End to end with L/B layers; at every budget it is branched so that the blocks end at that budget."""
    job = Job(options)
    depth, many = depth_of(job.recipe), job.recipe.blocks.num_blocks
    short = depth // many
    longest = max(options.epochs) * job.epoch * many
    recipe = with_steps(controls(job.recipe, short), longest)
    trainer = Experiment(recipe, job.splits).trainer(progress=False)
    about = {"name": row_name(short, many), "layers": short, "blocks": 1, "branched": False}

    # What to do at which of the trunk's steps. A branch at share f of a budget leaves (1 - f) to the blocks.
    plan: dict[int, list[Callable[[], Any]]] = {}

    def at(step: int, what: Callable[[], Any]) -> None:
        plan.setdefault(step, []).append(what)

    for epochs in options.epochs:
        total = epochs * job.epoch * many
        at(
            total,
            functools.partial(measure_now, job, trainer, recipe, about | {"epochs": epochs}),
        )
        per_block = round((1 - options.share) * epochs * job.epoch)
        final = epochs == max(options.epochs)
        at(
            total - many * per_block,
            functools.partial(branch_and_measure, job, trainer, epochs, per_block, options.share, {}, final=final),
        )
    for epochs in options.study:
        total = epochs * job.epoch * many
        for share, changes in options.changes or STUDY:
            per_block = round((1 - share) * epochs * job.epoch)
            # The control of a branch is a row of its own, and so has its own best solver.
            final = epochs == max(options.epochs) and changes == {"blocks": 1}
            at(
                total - many * per_block,
                functools.partial(
                    branch_and_measure, job, trainer, epochs, per_block, share, changes, final=final, studied=True
                ),
            )
    for step in sorted(plan):
        trainer.train(until=step)
        for what in plan[step]:
            what()
    job.draw(trainer, recipe, f"{about['name']}-1x{short}")
    final_settings(
        job,
        trainer,
        recipe,
        about
        | {"epochs": max(options.epochs), "layer_updates": layer_updates(trainer), "train_seconds": trainer.seconds},
    )


#: One change each against the recipe's own branch at 5/6 of the budget. `blocks: 1` is no branch at all: the trunk goes
#: on alone for the same layer-updates, with all that a branch changes but the blocks (fresh average, other draws).
STUDY: list[tuple[float, dict[str, Any]]] = [
    (1 / 2, {}),
    (5 / 6, {"blocks": 1}),
    (5 / 6, {"overlap": 0.0}),
    (5 / 6, {"overlap": 0.2}),
    (5 / 6, {"lr": 1 / 3}),
    (5 / 6, {"average": "copied"}),
]


def branch_and_measure(
    job: Job,
    trunk_trainer: Trainer,
    epochs: int,
    per_block: int,
    share: float,
    changes: dict[str, Any],
    *,
    final: bool,
    studied: bool = False,
) -> None:
    many = job.recipe.blocks.num_blocks
    parts = changes.get("blocks", many)
    base = with_depth(job.recipe, depth_of(job.recipe) // many * parts)
    per_block = per_block * many // parts
    handover = {name: changes[name] for name in ("optimizer", "average") if name in changes}
    blocks = base.blocks.model_copy(
        update={"num_blocks": parts, "overlap": changes.get("overlap", base.blocks.overlap)}
    )
    # Warm-up belongs to the trunk: blocks go on at full rate.
    rate = {"lr": base.train.lr * changes.get("lr", 1.0), "warmup_steps": 0, "seed": base.train.seed + 1}
    recipe = base.model_copy(
        update={
            "blocks": blocks,
            "train": base.train.model_copy(update={"steps": per_block, "epochs": None, **rate}),
            "trunk": TrunkConfig(steps=max(1, trunk_trainer.iteration), **handover),
        }
    )
    assert recipe.trunk is not None
    trainer = Experiment(recipe, job.splits).trainer(progress=False, model=branch_trunk(recipe, trunk_trainer))
    trainer.inherit(
        trunk_trainer, optimizer=recipe.trunk.optimizer == "copied", average=recipe.trunk.average == "copied"
    )
    trainer.train()
    about = {
        "name": row_name(depth_of(base), many // parts, parts, branched=True, restarted=True),
        "layers": depth_of(base),
        "blocks": parts,
        "branched": parts > 1,
        "epochs": epochs,
        "layer_updates": layer_updates(trunk_trainer) + layer_updates(trainer),
        "train_seconds": trunk_trainer.seconds + trainer.seconds,
        "share_of_trunk": round(share, 4),
        "average": recipe.trunk.average,
        "changes": changes,
    }
    if studied:
        about["study"] = "branching"
    job.measure(trainer, recipe, **about)
    if final:
        job.draw(trainer, recipe, f"{about['name']}-{parts}x{depth_of(base) // parts}")
        final_settings(job, trainer, recipe, about)


def final_settings(job: Job, trainer: Trainer, recipe: Recipe, about: dict[str, Any]) -> None:
    """The last weights under other solvers, grids and guidance; and the best solver of the row, measured anew."""
    if not job.final:
        return
    first = job.options.settings[0]
    change = functools.partial(dataclasses.replace, first)
    stochastic = {"churn_interval": (0.01, 1.0), "churn_noise": 1.007}  # EDM's on CIFAR-10, as is churn 30
    settings = [
        *(change(solver="euler", steps=n) for n in (10, 15, 20, 30)),
        change(grid="equal-quantile"),
        *(change(solver="heun", steps=n) for n in (5, 8, 10, 13, 18, 25)),
        *(change(solver=name, steps=n) for name in ("dpmpp-2m", "dpmpp-3m", "unipc") for n in (5, 8, 10, 12, 15, 20)),
        *(change(solver="heun", steps=n, churn=c, **stochastic) for n in (18, 25) for c in (2.0, 30.0)),
        *(change(guidance=g) for g in (1.0, 1.25, 1.5, 3.0)),
        *(change(guidance=g, guidance_interval=i) for g in (2.0, 3.0) for i in ((0.1, 2.0), (0.2, 5.0))),
    ]
    search = {"samples": job.search_samples, "seed": job.options.seed + OTHER_IMAGES}
    every = [first, *settings]
    rows = job.measure(trainer, recipe, every, **search, **about | {"study": "sampling"})
    guided_as_first = [
        (row, setting)
        for row, setting in zip(rows, every, strict=True)
        if (setting.guidance, setting.guidance_interval) == (first.guidance, first.guidance_interval)
    ]
    nearest = best_of([row for row, _ in guided_as_first])
    best = [setting for row, setting in guided_as_first if row is nearest]
    job.measure(trainer, recipe, best, **about | {"study": "best"})


def speed(options: argparse.Namespace) -> None:
    """Milliseconds and memory of a training step, images a second; a row a shape, all in one process."""
    torch.set_float32_matmul_precision("high")
    recipe = load_recipe(options.recipe, options.set)
    assert isinstance(recipe.evaluate, SamplesConfig)
    splits = {"train": recipe.data.load("train")}
    rows: list[dict[str, Any]] = []
    depth, many = depth_of(recipe), recipe.blocks.num_blocks
    scratch = recipe.model_copy(update={"trunk": None})
    shapes = [
        ("end-to-end", depth, 1, controls(recipe, depth)),
        ("end-to-end", depth // many, 1, controls(recipe, depth // many)),
        ("diffusionblocks", depth, many, scratch),
    ]
    for patch in options.patches:
        for name, layers, blocks, chosen in shapes:
            config = chosen.model.config | {"patch_size": patch}
            shaped = chosen.model_copy(update={"model": chosen.model.model_copy(update={"config": config})})
            row = {"name": name, "layers": layers, "blocks": blocks, "patch_size": patch}
            row |= step_time(with_steps(shaped, 10_000), splits, options)
            row |= sampling_speed(shaped, recipe.evaluate, options)
            rows.append(row)
            print(format_table(rows[-1:]), flush=True)
            ratios = [ratio(rows, patch) for patch in options.patches]
            write_results(options.out, rows, study="speed", ratios=[r for r in ratios if r])
            torch.cuda.empty_cache()


def ratio(rows: list[dict[str, Any]], patch: int) -> dict[str, float]:
    found = {(r["name"], r["layers"]): r for r in rows if r["patch_size"] == patch}
    whole = next((r for (name, _), r in found.items() if name == "end-to-end"), None)
    blocks = next((r for (name, _), r in found.items() if name == "diffusionblocks"), None)
    if whole is None or blocks is None:
        return {}
    return {
        "patch_size": patch,
        "blocks_times_block_over_end_to_end": blocks["blocks"] * blocks["step_ms"] / whole["step_ms"],
        "images_per_second_over_end_to_end": blocks["images_per_second"] / whole["images_per_second"],
        "step_peak_over_end_to_end": blocks["step_peak_bytes"] / whole["step_peak_bytes"],
    }


def step_time(recipe: Recipe, splits: Any, options: argparse.Namespace) -> dict[str, float]:
    trainer = Experiment(recipe, splits).trainer(progress=False)
    trainer.model.train()
    done = 0

    def run(count: int) -> None:
        nonlocal done
        for _ in range(count):
            trainer.step(done % len(trainer.units))
            done += 1

    with trainer.side_stream():
        run(6 * len(trainer.units))
        timed = functools.partial(_timed, functools.partial(run, options.iterations), trainer.device)
        times = [timed() / options.iterations for _ in range(7)]
    assert trainer.stepper.first_bad_step() is None, "the timed run diverged"
    result = {"step_ms": statistics.median(times), "step_ms_min": min(times), "step_ms_max": max(times)}
    # The same compiled step, not captured: a graph's memory is not the allocator's peak.
    plain = with_train(recipe, cuda_graph=False)
    memory = step_memory(Experiment(plain, splits).trainer(progress=False))
    return result | {"step_peak_bytes": max(unit.peak for unit in memory)}


def sampling_speed(recipe: Recipe, settings: SamplesConfig, options: argparse.Namespace) -> dict[str, float]:
    experiment = Experiment(recipe)
    model = experiment.build()
    assert isinstance(model, DiffusionBlocks)
    if recipe.train.compile:
        model.compile_layers()
    model = model.to(experiment.device).eval()
    setting, batch = settings.settings[0], settings.batch_size
    images = []

    def once() -> None:
        with experiment.precision(model):
            images.extend(sample_batches(model, batch, setting, batch_size=batch))

    once()
    seconds = [_timed(once, experiment.device) / 1000 for _ in range(options.batches)]
    return {"images_per_second": batch / statistics.median(seconds), "sampling_batch": batch, "calls": setting.calls}


def _timed(what: Callable[[], None], device: torch.device) -> float:
    """Milliseconds, by the device's own clock."""
    clock = Clock(device)
    start = clock.now()
    what()
    end = clock.now()
    clock.wait()
    return clock.between(start, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (curve, trunk, speed):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--recipe", default="recipes/dit/cifar10.yaml")
        command.add_argument("--set", action="append", default=[])
        command.add_argument("--out", type=Path, required=True)
        if function is speed:
            command.add_argument("--patches", type=int, nargs="+", default=[2, 4])
            command.add_argument("--iterations", type=int, default=12)
            command.add_argument("--batches", type=int, default=3)
        else:
            command.add_argument("--epochs", type=int, nargs="+", default=[25, 50, 100])
            text = "at the end also other solvers, grids and guidance, and the best solver (default yes)"
            command.add_argument("--final", action=argparse.BooleanOptionalAction, default=True, help=text)
            text = "images by which a solver is chosen (default 10,000)"
            command.add_argument("--search-samples", type=int, default=10_000, help=text)
        if function is curve:
            command.add_argument("--row", choices=("end-to-end", "diffusionblocks"), required=True)
        if function is trunk:
            command.add_argument("--share", type=float, default=5 / 6, help="share of a budget before the branch")
            command.add_argument("--study", type=int, nargs="*", default=[], help="budgets at which to study branching")
            command.add_argument("--changes", type=yaml.safe_load, help="studies: a list of [share, {change: value}]")
    joining = commands.add_parser("gather", help=gather.__doc__)
    joining.set_defaults(run=gather)
    joining.add_argument("parts", type=Path, nargs="+")
    joining.add_argument("--out", type=Path, default=RESULTS)
    joining.add_argument("--figure", type=Path, default=Path("docs/figures/cifar10_dit.png"))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
