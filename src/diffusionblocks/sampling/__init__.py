"""Samplers: stateless solvers, and what each task makes of them."""

from .labels import Prediction, predict_labels
from .solvers import euler

__all__ = ["Prediction", "euler", "predict_labels"]
