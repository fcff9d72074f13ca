"""A ledger and a plan as text."""

from __future__ import annotations

from ..evaluation.tables import format_bytes, format_table
from ..recipes import Recipe
from .ledger import Ledger
from .planner import Fit, Plan


def ledger_table(recipe: Recipe, ledger: Ledger) -> str:
    """The predicted bytes by kind."""
    train = recipe.train
    what = f"{recipe.name}: {recipe.model.type}, {recipe.method}, batch {train.batch_size}, {train.precision}"
    how = ", compiled" if train.compile else ""
    rows = [{"kind": kind, "bytes": format_bytes(value)} for kind, value in ledger.kinds.items()]
    rows.append({"kind": "peak of a step", "bytes": format_bytes(ledger.peak)})
    return f"{what}{how}; predicted for {ledger.unit}\n{format_table(rows)}"


def describe(plan: Plan, vary: str | None) -> str:
    """What fits and what does not, a line each."""
    budget = format_bytes(plan.budget)
    fits = plan.ledger.peak <= plan.budget
    lines = [f"budget {budget}: the recipe as it stands {'fits' if fits else 'does not fit'}"]
    if vary != "batch":
        lines.append(_line("fewest blocks", plan.blocks, f"no number of blocks fits {budget} at this batch size"))
    if vary != "blocks":
        lines.append(_line("largest batch", plan.batch, f"not even one example fits {budget} with these blocks"))
    if plan.savers is not None:
        lines.append(_line("what fits", plan.savers, ""))
    elif plan.blocks is None and plan.batch is None:
        lines.append(f"nothing fits {budget}: not even all memory savers with the most blocks and one example")
    return "\n".join(lines)


def _line(name: str, fit: Fit | None, otherwise: str) -> str:
    if fit is None:
        return f"{name}: {otherwise}"
    return f"{name}: {format_bytes(fit.ledger.peak)} with\n  {fit.options}"
