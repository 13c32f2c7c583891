"""Inference: policies, the decoding engine, samplers, unbiased curves, savings, evaluation and its report."""

from inference.policy import Policy, load_policy
from inference.samplers import Completion, Sampler, serve

__all__ = ["Completion", "Policy", "Sampler", "load_policy", "serve"]
