"""Samplers: stateless solvers, and what each task makes of them."""

from .chain import Callback, Denoiser
from .continue_text import Continuations, Posterior, continue_plainly, continue_texts
from .denoise_images import guided, guided_by_inputs, prior_of_seeds, sample_images
from .denoise_labels import COMBINATIONS, LabelNetwork, Prediction, Votes, check_combination, predict_labels, run_chain
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
from .vote_on_texts import vote_on_texts
from .votes import LogitVotes

__all__ = [
    "COMBINATIONS",
    "SOLVERS",
    "Callback",
    "Continuations",
    "Denoiser",
    "LabelNetwork",
    "LogitVotes",
    "Posterior",
    "Prediction",
    "Solver",
    "SolverFunction",
    "Votes",
    "calls",
    "check_combination",
    "continue_plainly",
    "continue_texts",
    "dpmpp_2m",
    "euler",
    "guided",
    "guided_by_inputs",
    "heun",
    "predict_labels",
    "prior_of_seeds",
    "register_solver",
    "run_chain",
    "sample_images",
    "sample_tokens",
    "vote_on_texts",
]
