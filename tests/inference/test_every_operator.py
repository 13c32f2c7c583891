"""Whatever enumerates operators takes each of them, or says in one line what to write: no traceback anywhere."""

from __future__ import annotations

import re
import warnings
from typing import get_args

import numpy as np
import pytest

from iama.config.files import ObjectiveConfig
from iama.config.specs import Sampling
from iama.errors import ConfigError, IamaWarning
from iama.objective import operators
from iama.objective.estimators import Estimator, advantages, check_group_size, clamped_share, group_value
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import EXAMPLES, OPERATORS, parse_operator
from inference.evaluation.rows.values import pool_values
from inference.samplers.serve import check_served, read_method, served_of
from inference.selection.kept import draw_kept
from inference.selection.rules import rule_of

EACH = [*re.findall(r"\w+(?:\([^)]*\))?", EXAMPLES), "bop(2, cap=4)", "soft_bon(4, 0.3, ranks=1)", "entropic(-1)"]
EACH += ["lstat(-0.5, 1.5)", "series(1, 0.5)"]


def test_the_examples_name_every_operator():
    assert {text.partition("(")[0] for text in EACH} == set(OPERATORS)
    assert {type(parse_operator(text)) for text in EACH} == set(get_args(operators.Operator))


@pytest.mark.parametrize("text", EACH)
def test_training_takes_it(text):
    criterion = {"name": "helpful", "proxy": {"model": "rm"}, "operator": text}
    operator = ObjectiveConfig.model_validate({"criteria": [criterion]}).criteria[0].parsed_operator()
    assert parse_operator(operator.name).name == operator.name  # as `iama.json` and the log of changes write it
    p, reward = np.array([0.2, 0.3, 0.5]), np.array([0.0, 1.0, -1.0])
    phi = operator.first_variation(p, reward)
    assert np.isfinite([operator.value(p, reward), *phi, operator.budget or 0.0, operator.kl or 0.0]).all()
    rewards = np.random.default_rng(0).normal(size=(2, 6))
    assert operator.smallest_group >= 2
    assert 0 <= clamped_share(operator, 3) <= 1
    assert np.isfinite(group_value(operator, rewards)).all()
    for estimator in get_args(Estimator):
        assert np.isfinite(advantages(operator, rewards, estimator=estimator)).all()
        assert np.isfinite(advantages(operator, rewards[:, :2], estimator=estimator)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IamaWarning)
            check_group_size(operator, 4, estimator, "criterion 'helpful'")
            Objective([Criterion("helpful", operator)], estimator).check(4)
    assert operator.name in Objective([Criterion("helpful", operator)]).describe()


@pytest.mark.parametrize("text", EACH)
def test_serving_takes_it_or_says_what_to_write(text):
    method = read_method(text)
    if text in ("tilt(0.1, cap=1)", "entropic(2)", "entropic(-1)", "lstat(-0.5, 1.5)", "series(1, 0.5)"):
        with pytest.raises(ConfigError, match=r"not a way to sample; .*(serve|divide)"):
            check_served(method, Sampling())
        return
    check_served(method, Sampling())
    served = served_of(method)
    assert served.budget == parse_operator(text).budget
    proxy = np.random.default_rng(0).normal(size=(3, 16))
    assert np.isfinite(pool_values(proxy, proxy, [served])).all()
    rule = rule_of(served)
    assert rule.keep(proxy[0, : rule.num_draws(0.5)].tolist(), [], 0.5) >= 0
    assert np.isfinite(draw_kept(served, proxy, None)[0]).all()
    assert rule.kl is None or rule.kl() >= 0
