"""Figures that take draws for independent, where they are not: of one seed, or of one prompt."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from iama.objective.operators import bon
from inference.evaluation.rows import kl, risks
from inference.selection.divergences import quantile_kl
from inference.statistics.win_rates import win_rates

NUM_SAMPLES = 4


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (None, None)])
def test_win_rates_of_two_policies_are_free_of_common_random_numbers(monkeypatch, samples, seeds):
    """Every pool of a law of three values, where in one place both policies have the same random number or none."""
    own, other = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 0.0])
    wanted = np.mean(
        [np.heaviside(max(own[list(drawn)]) - y, 0.5) for drawn in product(range(3), repeat=samples) for y in other]
    )
    pools = np.array(list(product(range(3), repeat=NUM_SAMPLES)))
    if seeds[0] == seeds[1] == 0:
        values = {"iama": own[pools], "base": other[pools]}
    else:
        values = {"iama": np.repeat(own[pools], len(pools), axis=0), "base": np.tile(other[pools], (len(pools), 1))}
    headers = dict(zip(("iama", "base"), ({"seed": seed} for seed in seeds), strict=True))
    evaluation = SimpleNamespace(
        curve_methods=[SimpleNamespace(name="bon")],
        config=SimpleNamespace(references=["base"], policies=["base", "iama"], win_rate_baseline=None),
        plan=SimpleNamespace(source=lambda policy, _: SimpleNamespace(name=policy, header=headers[policy])),
        scores_of=lambda policy, _: (values[policy], values[policy]),
    )
    monkeypatch.setattr(risks, "_lengths", lambda _, policy, __: np.ones_like(values[policy]))
    sides = risks._sides(evaluation, "iama", SimpleNamespace(name="c"), samples)
    assert win_rates(*sides).mean() == pytest.approx(wanted)


def test_no_choice_is_compared_with_the_sample_that_has_its_random_numbers():
    """A reference, and its equal of the same seed: the same samples, and so the same bound."""
    proxy_PS = np.random.default_rng(0).normal(size=(60, 8))
    sources = [SimpleNamespace(name=name, header={"seed": 0}) for name in ("base", "equal")]
    pool = SimpleNamespace(texts=[[""] * 8] * 60)
    evaluation = SimpleNamespace(
        plan=SimpleNamespace(
            source=lambda policy, _: next(s for s in sources if s.name == policy), sources=sources, num_samples=8
        ),
        measured=SimpleNamespace(
            reference="base",
            scores={("base", "proxy"): SimpleNamespace(values_PS=proxy_PS)},
            pools={"base": pool, "equal": pool},
        ),
        scores_of=lambda *_: (proxy_PS, None),
    )
    criterion = SimpleNamespace(name="c", proxy="proxy")
    found = [kl._of_choices(evaluation, policy, criterion, bon(4))[0] for policy in ("base", "equal")]
    assert found[0] == found[1] > 0


def test_answers_to_one_prompt_make_no_bound_higher():
    """Three answers that are always the same tell what one tells."""
    rng = np.random.default_rng(0)
    reference_PS, one_P1 = rng.normal(size=(40, 16)), rng.normal(size=(40, 1)) + 1
    measured = SimpleNamespace(
        scores={("base", "proxy"): SimpleNamespace(values_PS=reference_PS)},
        reference="base",
        answers={("iama", "c", "cards"): SimpleNamespace(proxy_PA=np.repeat(one_P1, 3, axis=1))},
    )
    criterion = SimpleNamespace(name="c", proxy="proxy")
    found, kind = kl._of_answers(SimpleNamespace(measured=measured), "iama", criterion, "cards")
    assert kind == "lower bound"
    assert found[0] == pytest.approx(quantile_kl(one_P1[:, 0], reference_PS).kl)
    measured.answers["iama", "c", "cards"].proxy_PA[:, 1:] = np.nan
    assert kl._of_answers(SimpleNamespace(measured=measured), "iama", criterion, "cards")[0][0] == found[0]
