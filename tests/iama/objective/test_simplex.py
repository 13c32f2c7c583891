"""Weights drawn from a simplex: their law, what they optimise, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from iama.config.files import ObjectiveConfig
from iama.errors import ConfigError
from iama.objective.estimators import advantages
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon, identity, parse_operator


def both(operator=None, **changes):
    operator = operator or bon(2)
    return Objective([Criterion("a", operator), Criterion("b", operator)], weights="simplex", **changes)


def test_every_group_is_scored_by_its_own_weights():
    rewards_PGK = np.random.default_rng(0).normal(size=(3, 4, 2))
    weights_PK = both().draw_weights(3, [5, 1, 0, 0])
    assert weights_PK.sum(axis=1) == pytest.approx(1.0)
    assert len(np.unique(weights_PK)) == 6
    np.testing.assert_array_equal(weights_PK, both().draw_weights(3, [5, 1, 0, 0]))
    assert (weights_PK != both().draw_weights(3, [5, 1, 1, 0])).all()
    found = both().advantages(rewards_PGK, weights_PK=weights_PK)
    for p, weights in enumerate(weights_PK):
        np.testing.assert_allclose(found[p], advantages(bon(2), rewards_PGK[p : p + 1] @ weights)[0], atol=1e-12)
    rewards_PGK[1, 2, 0] = np.nan  # this completion leaves its group
    found = both().advantages(rewards_PGK, weights_PK=weights_PK)
    kept = np.delete(rewards_PGK[1], 2, axis=0) @ weights_PK[1]
    assert found[1, 2] == 0.0
    np.testing.assert_allclose(np.delete(found[1], 2), advantages(bon(2), kept[None])[0], atol=1e-12)


def test_concentrations_are_the_criteria_s_weights():
    objective = Objective([Criterion("a", bon(2), 3.0), Criterion("b", bon(2), 1.0)], weights="simplex")
    drawn = objective.draw_weights(20000, [0])[:, 0]
    assert drawn.mean() == pytest.approx(3 / 4, abs=0.01)
    assert drawn.var() == pytest.approx(3 / (4**2 * 5), rel=0.05)  # of a Beta(3, 1)
    assert "E_[bon(2)] (w_1 a + w_2 b), w ~ Dirichlet(3, 1) for each group" in objective.describe()


def test_the_expected_gradient_is_that_of_the_value_averaged_over_weights():
    """Over all groups by enumeration, over weights by quadrature; and by finite differences of the value."""
    rng = np.random.default_rng(1)
    p, rewards_YK = rng.dirichlet(np.ones(3)), rng.normal(size=(3, 2))
    groups = np.array(list(itertools.product(range(3), repeat=4)))
    probability, one_hot = p[groups].prod(axis=1), np.eye(3)[groups] - p
    node, step = np.polynomial.legendre.leggauss(60)
    node, step = (node + 1) / 2, step / 2

    def value(p):
        return sum(s * bon(2).value(p, rewards_YK @ [w, 1 - w]) for w, s in zip(node, step, strict=True))

    gradient = np.zeros(3)
    for w, s in zip(node, step, strict=True):
        weights_PK = np.tile([w, 1 - w], (len(groups), 1))
        estimate = both().advantages(rewards_YK[groups], weights_PK=weights_PK)
        gradient += s * np.einsum("b,bg,bgy->y", probability, estimate, one_hot) / 4
    logits, exact = np.log(p), np.zeros(3)
    for y in range(3):
        ends = []
        for sign in (1, -1):
            moved = np.exp(logits + sign * 1e-5 * np.eye(3)[y])
            ends.append(value(moved / moved.sum()))
        exact[y] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(gradient, exact, atol=1e-9)
    # The draws have that law.
    drawn_PK = both().draw_weights(20000, [7])
    drawn = np.mean([bon(2).value(p, rewards_YK @ w) for w in drawn_PK[:4000]])
    assert drawn == pytest.approx(value(p), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"aggregate": "min"}, "drop aggregate: min"),
        ({"on_nan": "skip_criterion"}, "on_nan: error or drop"),
        ({"operators": ["bon(4)"]}, "there is one; leave it out"),
        ({"operators": ["bon(4)", "bon(2)"]}, r"have bon\(4\), bon\(2\); write operator: bon\(4\) for all"),
    ],
)
def test_what_leaves_nothing_to_draw_is_refused(changes, told):
    operators = changes.pop("operators", ["bon(4)", "bon(4)"])
    raw = [{"name": f"c{k}", "proxy": {"model": "rm"}, "operator": text} for k, text in enumerate(operators)]
    with pytest.raises(ValueError, match=told):
        ObjectiveConfig.model_validate({"criteria": raw, "weights": "simplex", **changes})
    if not changes:
        criteria = [Criterion(c["name"], parse_operator(c["operator"])) for c in raw]
        with pytest.raises(ConfigError, match=told):
            Objective(criteria, weights="simplex")


def test_a_config_without_it_is_written_as_before():
    raw = [{"name": name, "proxy": {"model": "rm"}} for name in "ab"]
    assert "weights" not in ObjectiveConfig.model_validate({"criteria": raw}).model_dump()
    assert both(identity()).weights == "simplex"
    with pytest.raises(ConfigError, match="needs the weights of each group"):
        both().advantages(np.zeros((1, 4, 2)))
