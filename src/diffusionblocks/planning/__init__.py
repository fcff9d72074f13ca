"""Planning: the bytes of a recipe's training step before it runs, and what fits into a budget."""

from .ledger import Forecast, Ledger
from .machine_fit import check_fits
from .many_gpus import Gpus, ParallelPlan, parse_gpus, plan_gpus
from .planner import MARGIN, Fit, Plan, parse_budget, plan, plan_with
from .predictor import CONTEXT_BYTES, WORKSPACE_BYTES, Predictor, forecast, predict
from .step_cache import StepCache

__all__ = [
    "CONTEXT_BYTES",
    "MARGIN",
    "WORKSPACE_BYTES",
    "Fit",
    "Forecast",
    "Gpus",
    "Ledger",
    "ParallelPlan",
    "Plan",
    "Predictor",
    "StepCache",
    "check_fits",
    "forecast",
    "parse_budget",
    "parse_gpus",
    "plan",
    "plan_gpus",
    "plan_with",
    "predict",
]
