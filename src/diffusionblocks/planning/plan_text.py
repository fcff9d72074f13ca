"""A ledger and a plan as text."""

from __future__ import annotations

from ..data.text_config import TextSection
from ..experiments.recipe import Recipe
from ..experiments.recipe_changes import trunk_recipe
from ..reports.tables import format_bytes, format_table
from .ledger import POOL_BYTES, POOL_SHARE, Ledger
from .many_gpus import ParallelPlan
from .planner import Fit, Plan, options_of, with_changes
from .predictor import Predictor

_TINY = 2**20 // 20  # less is printed as 0.0 MiB


def ledger_table(recipe: Recipe, ledger: Ledger) -> str:
    """The predicted bytes by kind."""
    train = recipe.train
    what = f"{recipe.name}: {recipe.model.type}, {recipe.method}, batch {train.batch_size}, {train.precision}"
    how = ", compiled" if train.compile else ""
    kinds = {kind: value for kind, value in ledger.kinds.items() if value or kind != "graph_pool"}
    rows = [{"kind": kind, "bytes": format_bytes(value)} for kind, value in kinds.items()]
    rows.append({"kind": "peak of a step", "bytes": format_bytes(ledger.peak)})
    lines = [f"{what}{how}; predicted for {ledger.unit}", format_table(rows)]
    if ledger.gradients < _TINY and ledger.optimizer > 20 * _TINY:  # they would take at least 2 MiB
        why = (
            "train.optimizer_in_backward uses each one up as soon as it is made"
            if train.optimizer_in_backward
            else "the peak is early in the backward pass, before they are made"
        )
        lines.append(f"gradients: none to speak of, as {why}")
    return "\n".join(lines)


def remarks(predictor: Predictor, plan: Plan | None = None) -> list[str]:
    """What the ledger's figures do and do not hold, a line each.

    Args:
        predictor: made the ledger.
        plan: with a budget.
    """
    lines = []
    if about_data := _about_data(predictor, plan):
        lines.append(f"data: {about_data}")
    if predictor.takes_any_shape and not predictor.at_hand:
        shapes = ", ".join(f"{name} {shape}" for name, shape in predictor.shapes.items() if shape)
        lines.append(f"sizes: no latents are at hand to say them, so an example is taken to be {shapes}")
    host = predictor.host_bytes(with_changes(predictor.recipe, plan.always) if plan else None)
    if host.total:
        waiting = f"waiting blocks (train.offload: {predictor.recipe.train.offload})"
        kinds = {waiting: host.waiting, "data": host.data}
        sizes = ", ".join(f"{format_bytes(size)} of {kind}" for kind, size in kinds.items() if size)
        lines.append(f"host memory: {sizes}; Python, torch and driver take more")
    if predictor.on_gpu and predictor.recipe.train.cuda_graph and not (plan and plan.always):
        lines.append(
            f"train.cuda_graph: graph_pool is what gaps in a captured step's private pool take, {POOL_SHARE:.0%} of "
            f"its gradients and activations and {format_bytes(POOL_BYTES)}"
        )
    recipe = predictor.recipe
    if recipe.trunk is not None and recipe.method == "diffusionblocks" and recipe.blocks.fixes_in_common:
        peak = predictor.forecast(trunk_recipe(recipe)).ledger.peak
        lines.append(
            f"trunk: it trains what its blocks keep fixed; its step peaks at {format_bytes(peak)}, and the plan is of "
            "the blocks"
        )
    if predictor.recipe.train.concurrent:
        lines.append(
            "train.concurrent: the plan is of one block's step at a time; together they take the memory of all"
        )
    return lines


def _about_data(predictor: Predictor, plan: Plan | None) -> str:
    recipe = predictor.recipe
    if not predictor.keeps_data(recipe):
        return f"not on the device (data.placement: {recipe.data.placement})"
    if plan and plan.always:
        size = format_bytes(predictor.data_bytes())
        graph = ", without a CUDA graph, which cannot read them there" if "train.cuda_graph" in plan.always else ""
        return (
            f"{size} are more than a quarter of the budget, so data.placement: auto would leave them on the host of "
            f"such a GPU; this plan has them there{graph}"
        )
    if predictor.num_examples is not None:
        return ""
    examples = predictor.examples
    if examples.count is None:
        return f"NOT COUNTED ({examples.where}); --examples N counts N examples of {_one_example(predictor)}"
    if not examples.where:
        return ""
    auto = "; data.placement: auto keeps them on the GPU if they take at most a quarter of its free memory"
    return f"{examples.count:,} examples in {examples.where}" + (
        auto if plan is None and predictor.on_gpu and recipe.data.placement == "auto" else ""
    )


def _one_example(predictor: Predictor) -> str:
    data = predictor.recipe.data
    if isinstance(data, TextSection):
        return f"{data.length} {data.examples}"
    return f"{predictor.example_bytes():,} bytes"


def describe(plan: Plan, vary: str | None, *, experts: bool = False) -> str:
    """What fits and what does not, a line each.

    Args:
        plan: what to describe.
        vary: what was asked for, see `plan_with`.
        experts: whether the blocks are experts (`blocks.split`), whose number changes no memory.
    """
    budget = format_bytes(plan.budget)
    free = _not_for_steps(plan.context, plan.margin)
    stands = "the recipe as it stands" + (", its data on the host," if plan.always else "")
    lines = [f"budget {budget}{free}: {stands} {'fits' if plan.fits else 'does not fit'}"]
    if vary != "batch":
        if experts:
            name, none = "one expert on the device at a time", f"does not fit {budget} at this batch size"
        else:
            name, none = "fewest blocks", f"no number of blocks fits {budget} at this batch size"
        lines.append(_line(name, plan.blocks, none))
    if vary != "blocks":
        lines.append(_line("largest batch", plan.batch, f"not even one example fits {budget} with these blocks"))
    if plan.optimisations is not None:
        smaller = "train.batch_size" in plan.optimisations.changes
        lines.append(_line("what fits" if smaller else "what fits at this batch size", plan.optimisations, ""))
    elif plan.blocks is None and plan.batch is None:
        lines.append(f"nothing fits {budget}: not even all memory optimisations with the most blocks and one example")
    elif plan.blocks is None and vary != "batch":
        lines.append("what fits at this batch size: nothing, not even all memory optimisations with the most blocks")
    return "\n".join(lines)


def describe_gpus(plan: ParallelPlan, recipe: str = "RECIPE") -> str:
    """The ways to share a run as a table, and what it counts.

    Args:
        plan: what to describe.
        recipe: as the command line names it, with its overrides.
    """
    gpus = plan.gpus
    machines = f"{gpus.machines} machines of " if gpus.machines > 1 else ""
    rows = [
        {
            "method": row.method,
            "mesh (block x data)": f"{row.mesh[0]} x {row.mesh[1]}",
            "blocks": row.blocks,
            "batch": row.batch,
            "per GPU": row.batch_per_gpu,
            "peak of a GPU": format_bytes(row.peak) + ("" if row.fits else ", too much"),
            "sent by a GPU per step": format_bytes(row.traffic_bytes) if row.traffic_bytes else "nothing",
            "between machines": format_bytes(row.network_bytes) if row.network_bytes else "nothing",
        }
        for row in plan.rows
    ]
    first, end_to_end = plan.rows[:2]
    each = f", each on {first.mesh[1]} GPUs" if first.mesh[1] > 1 else ""
    lines = [
        f"{machines}{gpus.each} GPUs of {format_bytes(gpus.memory)}" + _not_for_steps(plan.context, gpus.margin),
        format_table(rows),
        f"{first.blocks} blocks{each}: {'fits' if first.fits else 'no number of blocks fits at this batch size'}",
    ]
    if plan.largest_batch is not None:
        lines.append(f"largest batch of a block: {plan.largest_batch}")
    options = f" {options_of(plan.changes)}" if plan.changes else ""
    launcher, rest, where = f"torchrun --nproc-per-node {gpus.each}", "", ""
    if gpus.machines > 1:  # which meet at one of them, and share the run's folder
        launcher += f" --nnodes {gpus.machines} --rdzv-backend c10d --rdzv-endpoint FIRST:29500"
        rest, where = " --out SHARED", " on each machine; FIRST is one of them, SHARED a folder on a disk of all"
    lines += [
        f"run it{where}: {launcher} -m diffusionblocks train {recipe}{options}{rest}",
        f"ddp, fsdp2: the end-to-end model at as many layer-updates, {end_to_end.batch_per_gpu} examples on a GPU; the "
        "peaks have gradients in DDP's buckets, and two gathered layers of FSDP2 beside stem and head",
        "bytes are those of ring collectives: DDP sends 2 (N - 1) / N of the gradients, FSDP2 (N - 1) / N of the "
        "weights twice and of the gradients once; data, and what moves between a GPU and its host, are not counted",
    ]
    return "\n".join(lines)


def _not_for_steps(context: int, margin: float) -> str:
    """What of a GPU's memory no peak may take, as the end of a line."""
    shares = [f"{format_bytes(context)} are its context's (driver and kernels; an allowance)"] if context else []
    shares += [f"{margin:.0%} of each peak stay free"] if margin else []
    return f", of which {' and '.join(shares)}" if shares else ""


def _line(name: str, fit: Fit | None, otherwise: str) -> str:
    if fit is None:
        return f"{name}: {otherwise}"
    return f"{name}: {format_bytes(fit.ledger.peak)} with\n  {fit.options}"
