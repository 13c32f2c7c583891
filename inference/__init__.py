"""Inference: policies, the decoding engine, samplers, unbiased curves, savings, evaluation and its report."""

from inference.engine.policy import Policy, load_policy
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.base import Completion, Sampler
from inference.samplers.cards import Cards, CardsSettings, acceptance_summary, calibrate_target
from inference.samplers.serve import serve

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
