"""Samplers: stateless solvers, and what each task makes of them."""

from .chain import Callback, Denoiser, in_interval
from .continue_text import Continuations, continue_plainly, continue_texts
from .denoise_images import (
    GuidedDenoiser,
    check_guidance,
    check_guided_levels,
    first_z,
    guided,
    guided_by_inputs,
    prior_of_seeds,
    sample_images,
)
from .denoise_labels import (
    COMBINATIONS,
    LabelNetwork,
    Prediction,
    Votes,
    check_combination,
    predict_labels,
    run_chain,
    starting_noise,
)
from .seed_noise import SeedNoise
from .solvers import (
    SOLVERS,
    Churn,
    Solver,
    SolverFunction,
    calls,
    check_churned_levels,
    dpmpp_2m,
    dpmpp_3m,
    euler,
    heun,
    network_calls,
    register_solver,
    unipc,
)
from .static_calls import StaticCalls, global_state
from .token_chain import TokenChains
from .unmask_tokens import sample_tokens
from .vote_on_texts import Posterior, vote_on_texts
from .votes import LogitVotes

__all__ = [
    "COMBINATIONS",
    "SOLVERS",
    "Callback",
    "Churn",
    "Continuations",
    "Denoiser",
    "GuidedDenoiser",
    "LabelNetwork",
    "LogitVotes",
    "Posterior",
    "Prediction",
    "SeedNoise",
    "Solver",
    "SolverFunction",
    "StaticCalls",
    "TokenChains",
    "Votes",
    "calls",
    "check_churned_levels",
    "check_combination",
    "check_guidance",
    "check_guided_levels",
    "continue_plainly",
    "continue_texts",
    "dpmpp_2m",
    "dpmpp_3m",
    "euler",
    "first_z",
    "global_state",
    "guided",
    "guided_by_inputs",
    "heun",
    "in_interval",
    "network_calls",
    "predict_labels",
    "prior_of_seeds",
    "register_solver",
    "run_chain",
    "sample_images",
    "sample_tokens",
    "starting_noise",
    "unipc",
    "vote_on_texts",
]
