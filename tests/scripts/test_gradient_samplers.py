from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.settings import EvaluationCriterion
from iama.config.specs import RewardSpec, Sampling
from iama.models.flops import row_flops, size_of
from iama.objective.operators import bon
from iama.prompts.render import render_prompt
from inference.engine.likelihood import sequence_log_probabilities
from inference.engine.policy import load_policy
from inference.samplers.best_of import SelectionSampler
from inference.samplers.ggro import GgroSettings
from scripts.experiments import common, gradient_samplers, gradient_samplers_page, gradient_ties, segment_setup
from scripts.experiments import gradient_samplers_values as values
from scripts.experiments.gradient_samplers import Size
from scripts.experiments.gradient_samplers_values import Cell, Served
from scripts.experiments.pools import policy_spec

SAMPLING = Sampling(max_new_tokens=6)
SEED = 3
SIZE = Size(num_prompts=3, num_sea_prompts=2, num_samples=8, num_answers=2)
QUICK = {False: {"top_k": 3, "entropy_threshold": 4.2}, True: {"num_steps": 1, "num_chains": 2}}
METHODS = tuple(dataclasses.replace(m, settings={**m.settings, **QUICK[m.is_sea]}) for m in gradient_samplers.METHODS)


@pytest.fixture
def small_world(small_world, monkeypatch):
    """Tiny models where a demo world has its own; each criterion's gold is the other one's model."""

    def criteria(seed, *, gold):
        specs = {name: RewardSpec(model=str(small_world / f"rm-{name}")) for name in common.CRITERIA}
        swapped = dict(zip(specs, reversed(specs.values()), strict=True))
        return [EvaluationCriterion(name=n, proxy=s, gold=swapped[n] if gold else None) for n, s in specs.items()]

    monkeypatch.setattr(common, "criteria", criteria)
    return small_world


def measured():
    return gradient_samplers.measure({SEED: {"base": None}}, SIZE, SAMPLING, METHODS, at_once=1)


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
    shown = gradient_samplers_page.samples_of(found, [cell_of(9, flops)])
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


def test_what_nudges_change():
    rows = np.asarray([0, 1])
    greedy = Served(rows, {"seconds": np.asarray([1.0, 3.0])}, np.zeros((2, 1)), [[5, 6, 7], [8, 9]], [], "run")
    own = Served(
        np.asarray([1]),
        {"seconds": np.asarray([6.0])},
        np.zeros((1, 2)),
        [[8, 7, 6, 5], [8, 9]],
        [[(3, True), (1, False)], [(2, False)]],
        "run",
    )
    assert values.changed(own, greedy) == pytest.approx((3 / 4 + 0) / 2)
    assert values.nudged(own) == pytest.approx(1 / 6)
    assert values.num_segments(own) == 1.5
    assert values.same_answers(own, own)
    assert not values.same_answers(own, greedy)
    cell = Cell({}, np.zeros((2, 1)), np.zeros((2, 1)), {"a": own, "greedy": greedy})
    assert values.seconds_ratio(cell, "a", "greedy") == pytest.approx(2.0)
    other = dataclasses.replace(own, run="other")
    assert values.seconds_ratio(dataclasses.replace(cell, served={**cell.served, "a": other}), "a", "greedy") is None


def test_strict_gold_counts_ungrammatical_answers_as_nothing():
    assert gradient_samplers.strict([0.5, -1.0, 2.0], np.asarray([0.0, 0.0, 1.0])).tolist() == [0.5, -1.0, 0.0]


# On tiny models. ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_is_served_judged_and_written_and_a_second_run_reads(small_world, tmp_path, monkeypatch):
    results = measured()
    cell = results[SEED]["base", "harmless"]
    assert set(cell.served) == {method.name for method in METHODS}
    lines = [json.loads(x) for x in (tmp_path / f"gradient_samplers/test-{SEED}/base.jsonl").open()]
    served = [line for line in lines if line.get("criterion") == "harmless"]
    cuts = next(line for line in served if line["settings"].get("random_cuts") is not None)
    first = GgroSettings(num_candidates=2, **QUICK[False]).model_dump(mode="json")
    own = next(line for line in served if line["settings"] == first)
    assert cuts["settings"]["random_cuts"] == pytest.approx(values.cut_rate(own["segments"], 4))
    assert cell.served["SEA 10"].rows.tolist() == [0, 2]
    assert cell.served["sampled 4"].gold_RM.shape == (3, 2)

    prompts = [row["prompt"] for row in segment_setup.prompts(SEED, "test", 3)]
    rewards = [segment_setup.load_reward(n, RewardSpec(model=str(small_world / f"rm-{n}"))) for n in common.CRITERIA]
    for name, reward in (("proxy", rewards[1]), ("gold", rewards[0]), ("other", rewards[1])):
        expected = reward.score(prompts, own["texts"], {})[0]
        assert cell.served["gradient 2"].values[name] == pytest.approx(expected, abs=1e-4)
    policy = load_policy("base", policy_spec(SEED, None), SAMPLING)
    ids = [render_prompt(policy.tokenizer, prompt) for prompt in prompts]
    sums = sequence_log_probabilities(policy, ids, own["token_ids"], 8)
    assert cell.served["gradient 2"].values["fluency"] == pytest.approx([s / n for s, n in sums], abs=1e-5)

    monkeypatch.setattr(gradient_samplers_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(gradient_samplers_page, "PLOT", tmp_path / "page.svg")
    monkeypatch.setattr(gradient_samplers_page, "METHODS", METHODS)
    monkeypatch.setattr(values, "NUM_BOOTSTRAP", 20)
    gradient_samplers_page.write(results, SIZE, gradient_ties.measure([SEED], 1))
    page = (tmp_path / "page.md").read_text()
    assert "nan" not in page
    assert page.count("loses to Best-of-n") == len(METHODS)
    assert "## Not measured" in page
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")

    def refuse(*_):
        raise AssertionError("answers that are on disk are not made again")

    monkeypatch.setattr(gradient_samplers.Judge, "_serve", refuse)
    monkeypatch.setattr(gradient_samplers.Judge, "_fluency", refuse)
    again = measured()[SEED]["base", "harmless"]
    for name, own_values in cell.served.items():
        for metric, array in own_values.values.items():
            assert (again.served[name].values[metric] == array).all()
    assert (again.bon["fluency"] == cell.bon["fluency"]).all()


def test_best_of_n_costs_what_the_sampler_that_serves_it_costs(small_world):
    cell = gradient_samplers.measure({SEED: {"base": None}}, SIZE, SAMPLING, METHODS[:1], at_once=1)[SEED][
        "base", "helpful"
    ]
    rows = segment_setup.prompts(SEED, "test", 3)
    ready = segment_setup.setup(SEED, "base", None, "test", rows, SAMPLING)
    sampler = SelectionSampler(ready.policy, ready.proxies["helpful"], bon(8), SAMPLING)
    served = sampler.sample([row["prompt"] for row in rows], seed=SEED)
    assert cell.bon["policy_tokens"][:, 7].tolist() == [c.cost.policy_tokens for c in served]
    # Served, an answer that begins like the prompt's first one is not read again up to there.
    spared = cell.bon["reward_tokens"][:, 7] - [c.cost.reward_tokens for c in served]
    assert ((spared >= 0) & (spared <= 12)).all()
    assert cell.bon["proxy"][:, 7] == pytest.approx([c.reward for c in served], abs=1e-4)
    ratio = cell.bon["flops"][:, 7] / [c.cost.flops for c in served]
    assert ((ratio >= 1) & (ratio < 1.1)).all()
    assert (np.diff(cell.bon["flops"]) > row_flops(size_of(ready.policy.model), 0, 1)).all()
