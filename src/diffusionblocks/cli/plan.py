"""diffusionblocks plan."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .command import say_when_slow, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    takes_recipe(parser, run)
    parser.add_argument("--budget", help="device memory, as 12GiB, 16GB or 800MiB (default: only the ledger)")
    parser.add_argument(
        "--gpus",
        metavar="NxSIZE",
        help="share the run among GPUs, as 4x24GiB (of several machines: 2x8x80GiB), beside DDP and FSDP2",
    )
    parser.add_argument("--vary", choices=("blocks", "batch"), help="fit only the number of blocks or the batch size")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="count N examples of the data (default: those of local images)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="SHARE",
        help="share of each predicted peak that stays free, for the prediction's error (default: 0.05)",
    )
    parser.add_argument("--json", type=Path, help="also write the plan to this file")


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Predict the memory of a recipe's training step, and what fits a budget."""
    from ..planning import MARGIN, Predictor, StepCache, parse_budget, plan_with
    from ..planning.plan_text import describe, ledger_table, remarks
    from ..planning.predictor import why_not_predicted
    from ..reports.results import write_results

    recipe = experiment.recipe
    if (why := why_not_predicted(recipe)) is not None:
        raise ValueError(f"{why}: `diffusionblocks train --dry-run` tells its time")
    if options.gpus is not None:
        _run_gpus(experiment, options)
        return
    margin = MARGIN if options.margin is None else options.margin
    predictor, plan = Predictor(recipe, options.examples, say=say_when_slow("plan"), cache=StepCache.of_user()), None
    if options.budget is not None:
        plan = plan_with(predictor, parse_budget(options.budget), vary=options.vary, margin=margin)
    elif options.margin is not None:
        raise ValueError(f"--margin {options.margin:g} needs a budget to leave free of: give --budget, as 12GiB")
    elif options.vary:
        raise ValueError(f"--vary {options.vary} needs a budget to fit: give --budget, as 12GiB")
    ledger = plan.ledger if plan else predictor.forecast().ledger
    notes = remarks(predictor, plan)
    print(ledger_table(recipe, ledger))
    for line in notes:
        print(line)
    if plan:
        print(describe(plan, options.vary, experts=recipe.blocks.split == "experts"))
    if options.json:
        write_results(options.json, [ledger.to_dict()], remarks=notes, **({"plan": plan.to_dict()} if plan else {}))


def _run_gpus(experiment: Experiment, options: argparse.Namespace) -> None:
    """Tell what several GPUs make of the recipe."""
    from ..planning import MARGIN, Predictor, StepCache, parse_gpus, plan_gpus
    from ..planning.plan_text import describe_gpus
    from ..reports.results import write_results

    if options.budget is not None:
        raise ValueError(
            f"--gpus {options.gpus} beside --budget {options.budget}: --gpus says the memory of each GPU itself, as "
            "4x24GiB: leave --budget out"
        )
    gpus = parse_gpus(options.gpus, MARGIN if options.margin is None else options.margin)
    predictor = Predictor(experiment.recipe, options.examples, say=say_when_slow("plan"), cache=StepCache.of_user())
    plan = plan_gpus(predictor, gpus, batch=options.vary != "blocks")
    overrides = [part for value in options.set or () for part in ("--set", value)]
    print(describe_gpus(plan, shlex.join([options.recipe, *overrides])))
    if options.json:
        write_results(options.json, [], plan=plan.to_dict())
