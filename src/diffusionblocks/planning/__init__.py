"""Planning: the bytes of a recipe's training step before it runs, and what fits into a budget."""

from .ledger import WORKSPACE_BYTES, Forecast, Ledger, forecast, predict
from .planner import Fit, Plan, parse_budget, plan

__all__ = [
    "WORKSPACE_BYTES",
    "Fit",
    "Forecast",
    "Ledger",
    "Plan",
    "forecast",
    "parse_budget",
    "plan",
    "predict",
]
