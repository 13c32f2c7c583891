"""A new operator is one function: it is put into `OPERATORS`, written in a configuration, and trains."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from iama.arrays import Floats
from iama.config.files import ObjectiveConfig, TrainingCriterion
from iama.objective.aggregates import parse_aggregate
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import OPERATORS, bon
from iama.objective.rank_operators import RankOperator


def hurried(n: int, share: float) -> RankOperator:
    """One draw for a `share` of the requests, the best of `n` for the others."""

    def pmf(max_n: int) -> Floats:
        draws = np.arange(1, max_n + 1)
        return share * (draws == 1) + (1 - share) * (draws == n)

    return RankOperator(
        name=f"hurried({n}, {share:g})",
        method="hurried",
        budget=share + (1 - share) * n,
        kl=None,
        pgf=lambda p: share * p + (1 - share) * p**n,
        pgf_derivative=lambda p: share + (1 - share) * n * p ** (n - 1),
        pmf=pmf,
    )


def test_a_new_operator_trains_as_the_configuration_asks(monkeypatch):
    monkeypatch.setitem(OPERATORS, "hurried", hurried)
    raw = {"name": "helpful", "proxy": {"model": "rm"}, "operator": "hurried(4, share=0.25)"}
    config = ObjectiveConfig.model_validate({"criteria": [raw]})
    operator = config.criteria[0].parsed_operator()
    assert (operator.name, operator.budget) == ("hurried(4, 0.25)", 3.25)
    rewards_PGK = np.random.default_rng(0).normal(size=(3, 8, 1))

    def advantages_PG(operator: RankOperator) -> Floats:
        criterion = Criterion("helpful", operator)
        return Objective([criterion], aggregate=parse_aggregate(config.aggregate)).advantages(rewards_PGK)

    mixed_PG = 0.25 * advantages_PG(bon(1)) + 0.75 * advantages_PG(bon(4))
    assert advantages_PG(operator) == pytest.approx(mixed_PG)


def test_a_criterion_s_operator_is_read_once_and_is_no_part_of_it():
    raw = {"name": "helpful", "proxy": {"model": "rm"}, "operator": "bop(2.5)"}
    criterion, other = (TrainingCriterion.model_validate(raw) for _ in range(2))
    assert criterion.parsed_operator() is criterion.parsed_operator()
    assert criterion.model_dump(exclude_unset=True) == other.model_dump(exclude_unset=True)
    assert set(criterion.model_dump()) == {"name", "proxy", "gold", "operator", "weight"}
    assert pickle.loads(pickle.dumps(criterion)) == criterion == other
    changed = criterion.model_copy(update={"operator": "bon(3)"})
    assert changed.parsed_operator().budget == 3
