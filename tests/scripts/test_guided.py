"""Guided samplers beside Best-of-n: equal operations, coverage, what is kept on disk, what the pool costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.specs import PolicySpec, Sampling
from iama.models.flops import row_flops, size_of
from iama.objective.operators import bon
from iama.prompts.render import render_prompt
from inference.engine.likelihood import sequence_log_probabilities
from inference.samplers.args import ArgsSettings
from inference.samplers.best_of import SelectionSampler
from inference.samplers.cards import CardsSettings
from inference.samplers.ggro import GgroSettings
from inference.samplers.sea import SeaSettings
from scripts.experiments import frame
from scripts.experiments import guided as values
from scripts.experiments.guided import Case, Cell, Served
from scripts.experiments.pools import Task, policy_spec, prompts

SAMPLING = Sampling(max_new_tokens=6)
SEED = 3
SETTINGS = {
    "bon": "bon(2)",
    "cards": CardsSettings(target=0.0, entropy_threshold=4.2),
    "args": ArgsSettings(top_k=2),
    "ggro": GgroSettings(num_candidates=2, top_k=3, entropy_threshold=4.2),
    "sea": SeaSettings(num_steps=1, num_chains=2),
}


@pytest.fixture
def case(small_world):
    """The base on three prompts, with a pool of eight."""
    task = Task("base", policy_spec(SEED, None), prompts(SEED, "test", 3), 8, SEED, "test", SAMPLING)
    return Case(task, frame.criteria(SEED, gold=False)[1])


# Values. ------------------------------------------------------------------------------------------------


def cell_of(gold, flops, other=None):
    """Best-of-n with gold n - 1 and operations 10 n, and a method "a" with a gold and operations at every prompt."""
    n = np.arange(1, 9.0)
    own = {"gold": np.full(4, float(gold)), "flops": np.full(4, float(flops))}
    bon = {"gold": np.tile(n - 1, (4, 1)), "flops": np.tile(10 * n, (4, 1))}
    rows = np.arange(4) if other is None else np.asarray(other)
    served = Served(rows, {k: v[: len(rows)] for k, v in own.items()}, np.zeros((len(rows), 1)), [], [], "run")
    return Cell(bon, np.zeros((4, 8)), np.zeros((4, 8)), {"a": served})


@pytest.mark.parametrize(("flops", "best", "n", "clipped"), [(40, 3, 4, None), (500, 7, 8, "high"), (5, 0, 1, "low")])
def test_gold_is_compared_at_equal_operations_and_never_extrapolated(flops, best, n, clipped):
    found = values.equal_flops([cell_of(9, flops), cell_of(9, flops)], "a")
    assert (found.difference, *found.ci95) == pytest.approx((9 - best,) * 3)
    assert (found.reference_samples, found.clipped) == (pytest.approx(n), clipped)
    shown = values.samples_of(found, [cell_of(9, flops)])
    assert ("beyond the pool" in shown) == (clipped == "high")


def test_a_subset_of_prompts_is_compared_on_the_same_prompts():
    cell = cell_of(0, 40, other=[1, 3])
    cell.bon["gold"][[0, 2]] = 100.0
    assert values.equal_flops([cell], "a").difference == pytest.approx(-3)


@given(arrays(bool, (3, 5)), st.integers(1, 5))
def test_coverage_is_the_mean_over_all_subsets(hits_PM, m):
    subsets = list(itertools.combinations(range(5), m))
    expected = [np.mean([row[list(some)].any() for some in subsets]) for row in hits_PM]
    assert values.any_of(hits_PM, m) == pytest.approx(expected)


def test_the_rare_value_is_the_least_that_one_in_ten_reach():
    proxy_PS = np.tile(np.arange(4.0), (10, 1))
    gold_PS = np.zeros((10, 4))
    gold_PS[:, 3] = np.arange(10) / 10  # Best-of-4 keeps the last: golds 0, 0.1, ... 0.9
    assert values.rare_value(proxy_PS, gold_PS) == (pytest.approx(0.9), pytest.approx(0.1))
    gold_PS[:, 3] = 1.0  # all reach the greatest
    assert values.rare_value(proxy_PS, gold_PS) == (pytest.approx(1.0), pytest.approx(1.0))


def test_coverage_beside_answers_of_best_of_n():
    rng = np.random.default_rng(0)
    proxy_PS, gold_PS = rng.normal(size=(2, 6, 8))
    cell = cell_of(0, 20)
    flops_PN = np.tile(10 * np.arange(1, 9.0), (6, 1))
    gold_RM = np.asarray([[2.0, -9.0]] * 3 + [[-9.0, -9.0]] * 3)
    own = Served(np.arange(6), {"flops": np.full(6, 20.0)}, gold_RM, [], [], "run")
    cell = Cell({"flops": flops_PN}, proxy_PS, gold_PS, {"a": own})
    share, gap, plain = values.coverage([cell], "a", [0.5], 2)
    assert share == pytest.approx(0.5)
    hits_PS = gold_PS > 0.5
    pairs = list(itertools.combinations(range(8), 2))
    kept = [[h[max(pair, key=lambda i: p[i])] for pair in pairs] for p, h in zip(proxy_PS, hits_PS, strict=True)]
    reach_P = np.mean(kept, axis=1)
    assert share - gap.difference == pytest.approx(np.mean(1 - (1 - reach_P) ** 2))
    assert plain == pytest.approx(values.any_of(hits_PS, 2).mean())


def test_the_rate_of_cuts_is_that_which_made_the_segments():
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(400):
        answer, left = [], 30
        while left:
            length = min(left, 3 + int(rng.geometric(0.3)) - 1)
            answer.append([length, False])
            left -= length
        answers.append(answer)
    assert values.cut_rate(answers, 4) == pytest.approx(0.3, abs=0.03)
    assert values.cut_rate([[[3, False], [3, True]]], 4) == 1.0
    assert values.cut_rate([[[2, True]]], 4) == 0.0


def test_strict_gold_counts_ungrammatical_answers_as_nothing():
    assert values.strict([0.5, -1.0, 2.0], np.asarray([0.0, 0.0, 1.0])).tolist() == [0.5, -1.0, 0.0]


@given(arrays(float, (2, 5), elements=st.integers(0, 3)), st.integers(1, 5))
def test_shares_are_those_of_all_subsets_and_equals_share(proxy_PS, n):
    expected = np.zeros_like(proxy_PS)
    for p, proxy in enumerate(proxy_PS):
        subsets = list(itertools.combinations(range(5), n))
        for subset in subsets:
            best = [i for i in subset if proxy[i] == max(proxy[list(subset)])]
            expected[p, best] += 1 / len(best) / len(subsets)
    # Among equals of the whole pool the share is the same, as it is over all orders of sampling.
    for row, proxy in zip(expected, proxy_PS, strict=True):
        for value in set(proxy):
            row[proxy == value] = row[proxy == value].mean()
    assert values.keep_shares(proxy_PS, n) == pytest.approx(expected)


# On tiny models. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_are_the_samplers_own_and_are_kept(case, kind, monkeypatch):
    line = values.answers(case, SETTINGS[kind], [0, 2], num_answers=2)
    rows = [case.task.rows[i]["prompt"] for i in (0, 2, 0, 2)]
    expected = values.sampler(case, SETTINGS[kind]).sample(rows, seed=SEED + values.OTHER_SEED)
    assert line["texts"] == [c.text for c in expected]
    assert line["flops"] == [c.cost.flops for c in expected]
    assert line["proxy"] == pytest.approx(case.reward.score(rows, line["texts"], {})[0], abs=1e-4)
    base = PolicySpec(path=str(case.task.home / "policy"))
    ids = [render_prompt(case.policy.tokenizer, row) for row in rows]
    sums = sequence_log_probabilities(case.policy, ids, line["token_ids"], 8)
    fluency = values.fluency(case, base, line)
    assert fluency == pytest.approx([value / number for value, number in sums], abs=1e-5)

    def refuse(*_):
        raise AssertionError("answers that are on disk are not made again")

    monkeypatch.setattr(values, "_serve", refuse)
    monkeypatch.setattr(values, "_fluency", refuse)
    again = values.answers(case, SETTINGS[kind], [0, 2], num_answers=2)
    assert again == line
    assert values.fluency(case, base, again) == fluency
    with pytest.raises(AssertionError, match="made again"):
        values.answers(case, SETTINGS[kind], [0, 2], num_answers=1)


def test_best_of_n_costs_what_the_sampler_that_serves_it_costs(case):
    pool, scores = case.task.sampled(), case.task.scored(case.criterion)
    curves = values.bon_curves(case, pool, {"proxy": scores.proxy_PS})
    sampler = SelectionSampler(case.policy, case.reward, bon(8), SAMPLING)
    served = sampler.sample([row["prompt"] for row in case.task.rows], seed=SEED)
    assert curves["policy_tokens"][:, 7].tolist() == [c.cost.policy_tokens for c in served]
    # Served, an answer that begins like the prompt's first one is not read again up to there.
    spared = curves["reward_tokens"][:, 7] - [c.cost.reward_tokens for c in served]
    assert ((spared >= 0) & (spared <= 12)).all()
    assert curves["proxy"][:, 7] == pytest.approx([c.reward for c in served], abs=1e-4)
    ratio = curves["flops"][:, 7] / [c.cost.flops for c in served]
    assert ((ratio >= 1) & (ratio < 1.1)).all()
    assert (np.diff(curves["flops"]) > row_flops(size_of(case.policy.model), 0, 1)).all()
