"""Samplers: stateless solvers, and what each task makes of them."""

from .chain import Callback, Denoiser
from .continue_text import Continuations, continue_plainly, continue_texts
from .denoise_images import guided, prior_of_seeds, sample_images
from .denoise_labels import Prediction, predict_labels
from .solvers import (
    SOLVERS,
    Solver,
    SolverFunction,
    calls,
    dpmpp_2m,
    euler,
    heun,
    register_solver,
)
from .unmask_tokens import sample_tokens

__all__ = [
    "SOLVERS",
    "Callback",
    "Continuations",
    "Denoiser",
    "Prediction",
    "Solver",
    "SolverFunction",
    "calls",
    "continue_plainly",
    "continue_texts",
    "dpmpp_2m",
    "euler",
    "guided",
    "heun",
    "predict_labels",
    "prior_of_seeds",
    "register_solver",
    "sample_images",
    "sample_tokens",
]
