"""Criteria weighed by chance: each group is scored by `sum_k w_k r_k` with weights drawn from a simplex.

A policy that is good under every weighting keeps answers along the whole trade-off between the criteria (Vector Policy
Optimization, Bahlous-Boldi et al. 2026). That paper scores a set of answers under many weightings; here a group has one
weighting, and the set is the group under its operator, so that the value is `E_w V[sum_k w_k r_k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError

Weights = Literal["fixed", "simplex"]


def draw_weights(concentration_K: Sequence[float], num_prompts: int, key: Sequence[int]) -> Floats:
    """Weights `[P, K]` of a batch's groups, each row from a Dirichlet law; the same for the same `key`."""
    weights_PK: Floats = np.random.default_rng(list(key)).dirichlet(np.asarray(concentration_K), size=num_prompts)
    return weights_PK


def scalarise(rewards_PGK: Floats, weights_PK: Floats) -> Floats:
    """`sum_k w_k r_k` of every completion, `[P, G]`."""
    total: Floats = (rewards_PGK * weights_PK[:, None, :]).sum(axis=2)
    return total


def check_simplex(operators: Sequence[str], aggregate: str, skip_criterion: bool) -> None:
    """Refuse (`ConfigError`) what leaves nothing to draw, or no one operator to serve the drawn sum."""
    if len(operators) < 2:
        raise ConfigError("weights: simplex draws the weights of several criteria, but there is one; leave it out")
    if len(set(operators)) > 1:
        raise ConfigError(
            f"weights: simplex has one operator for the drawn sum, but the criteria have {', '.join(operators)}; "
            f"write operator: {operators[0]} for all"
        )
    if aggregate != "sum":
        raise ConfigError(f"weights: simplex is a sum of the criteria; drop aggregate: {aggregate}")
    if skip_criterion:
        raise ConfigError(
            "weights: simplex needs every criterion's score; write on_nan: error or drop, not skip_criterion"
        )
