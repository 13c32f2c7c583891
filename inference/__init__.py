"""Inference: policies, the decoding engine, samplers, unbiased curves, savings, evaluation and its report."""

from inference.cards import Cards, CardsSettings, acceptance_summary, calibrate_target
from inference.policy import Policy, load_policy
from inference.samplers import Completion, Sampler
from inference.serving import serve
from inference.token_search import Args, ArgsSettings

__all__ = [
    "Args",
    "ArgsSettings",
    "Cards",
    "CardsSettings",
    "Completion",
    "Policy",
    "Sampler",
    "acceptance_summary",
    "calibrate_target",
    "load_policy",
    "serve",
]
