"""Samplers on one engine: Best-of-n from a pool, interpolation on its curve, and the whole page on tiny models."""

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
from iama.objective.operators import bon
from inference.samplers.args import ArgsSettings
from inference.samplers.best_of import SelectionSampler
from inference.samplers.cards import CardsSettings, calibrate_target
from scripts.experiments import common, segment_samplers, segment_samplers_page, segment_setup
from scripts.experiments import segment_samplers_values as values
from scripts.experiments.pools import Scores
from scripts.experiments.segment_samplers_values import Cell, Drawn, Method
from scripts.experiments.segment_setup import Chosen

SAMPLING = Sampling(max_new_tokens=10)
SEED = 3
METHODS = tuple(m for m in segment_samplers.METHODS if m.level not in (16, 0.75, 0.97))


@pytest.fixture
def small_world(small_world, monkeypatch):
    """Tiny models where a demo world has its own; each criterion's gold is the other one's model."""

    asked = []

    def criteria(seed, *, gold):
        asked.append(gold)
        specs = {name: RewardSpec(model=str(small_world / f"rm-{name}")) for name in common.CRITERIA}
        swapped = dict(zip(specs, reversed(specs.values()), strict=True))
        return [EvaluationCriterion(name=n, proxy=s, gold=swapped[n] if gold else None) for n, s in specs.items()]

    monkeypatch.setattr(common, "criteria", criteria)
    return asked


def pool(proxy_PS, gold_PS, other_PS=None, weight=0.5):
    ones = np.ones(len(proxy_PS))
    golds = [gold_PS, gold_PS if other_PS is None else other_PS]
    return Drawn([proxy_PS] * 2, golds, 7 * ones, 10 * ones, [20 * ones] * 2, [6 * ones] * 2, weight)


# Best-of-n from a pool. ---------------------------------------------------------------------------------


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


def test_arrays_of_best_of_n_are_unbiased_values_and_the_ledgers_tokens():
    rng = np.random.default_rng(0)
    proxy_PS, gold_PS, other_PS = rng.normal(size=(3, 4, 6))
    found = values.bon_arrays(pool(proxy_PS, gold_PS, other_PS), 0)
    for n in (1, 4, 6):
        assert found[f"bon {n}/gold"] == pytest.approx(common.values(bon(n), Scores(proxy_PS, gold_PS, [])))
        assert found[f"bon {n}/other"] == pytest.approx(common.values(bon(n), Scores(proxy_PS, other_PS, [])))
    tokens = [found[f"bon 3/{cost}"][0] for cost in ("policy", "reward", "both")]
    assert tokens == [37, 60 - 2 * 6, 37 + 0.5 * (60 - 2 * 6)]


@given(arrays(float, (2, 4), elements=st.integers(0, 2)), arrays(float, (2,), elements=st.integers(0, 2)))
def test_wins_and_losses_are_counted_over_what_is_kept(gold_PS, ours_P):
    proxy_PS = np.random.default_rng(0).permutation(8).reshape(2, 4).astype(float)
    found = pool(proxy_PS, gold_PS).contests(0, "cards", {"cards": ours_P, "args": gold_PS[:, 0]})
    for n in (1, 2, 4):
        for p, proxy in enumerate(proxy_PS):
            kept = [max(subset, key=lambda i: proxy[i]) for subset in itertools.combinations(range(4), n)]
            assert found[f"bon {n}/win"][p] == pytest.approx(np.mean([ours_P[p] > gold_PS[p, i] for i in kept]))
            assert found[f"bon {n}/loss"][p] == pytest.approx(np.mean([ours_P[p] < gold_PS[p, i] for i in kept]))
    assert found["args/win"].tolist() == (ours_P > gold_PS[:, 0]).tolist()
    assert found["cards/win"].sum() == found["cards/loss"].sum() == 0


# On the curve. ------------------------------------------------------------------------------------------


def curve(extra=()):
    """Best-of-1 to 5 with costs 15, 25, ... and golds 0, 1, 4, 9, 16."""
    means = {f"bon {n}/both": np.asarray([5.0 + 10 * n]) for n in range(1, 6)}
    means |= {f"bon {n}/gold": np.asarray([(n - 1.0) ** 2]) for n in range(1, 6)}
    return means | dict(extra)


@pytest.mark.parametrize(("cost", "expected"), [(15, 0), (20, 0.5), (30, 2.5), (50, 12.5), (55, 16), (10, 0), (99, 16)])
def test_gold_at_equal_tokens_is_interpolated_and_never_extrapolated(cost, expected):
    means = curve({"cards/both": np.asarray([float(cost)]), "cards/gold": np.asarray([20.0])})
    assert values.at_equal_tokens("cards")(means) == pytest.approx([20 - expected])
    cell = Cell(means, {}, True, 1.0)
    assert values.within([cell], "cards") == (15 <= cost <= 55)


def test_best_of_n_has_no_advantage_over_itself():
    means = {key: np.repeat(value, 2) for key, value in curve().items()}
    for n in range(1, 6):
        assert values.at_equal_tokens(f"bon {n}")(means) == pytest.approx([0, 0])


def reach(costs, golds, target):
    cost, kind = values.first_reach(
        np.asarray(costs, float)[:, None], np.asarray(golds, float)[:, None], np.asarray([target], float)
    )
    return float(cost[0]), int(kind[0])


def test_the_first_cost_that_reaches_a_gold():
    assert reach([10, 20, 40], [0, 1, 2], 1.5) == (30, 0)
    assert reach([10, 20, 40], [0, 1, 2], 1.0) == (20, 0)
    assert reach([10, 20, 40, 50], [0, 2, 1, 3], 1.5) == (17.5, 0)  # the first of two crossings
    assert reach([10, 20, 40], [1, 2, 3], 0.5) == (10, -1)
    assert reach([10, 40, 30], [0, 1, 2], 5.0) == (40, 1)
    assert reach([10, 20], [1, 1], 2.0) == (20, 1)  # flat


def cell_of(golds, reference=1.0):
    arrays_ = {f"cards {i}/gold": np.full(8, g) for i, g in enumerate(golds)}
    arrays_ |= {f"cards {i}/both": np.full(8, 10.0 * (i + 1)) for i in range(len(golds))}
    return Cell(arrays_ | {"bon 4/gold": np.full(8, reference), "bon 4/both": np.full(8, 40.0)}, {}, True, 1.0)


def test_tokens_for_equal_gold_are_a_ratio_to_best_of_4_and_bounds_are_told():
    names = ["cards 0", "cards 1"]
    found = values.equal_gold([cell_of([0.5, 1.5]), cell_of([0.5, 1.5])], names, "both")
    assert (found.ratio, *found.ci95) == pytest.approx((15 / 40,) * 3)
    assert (found.num_at_most, found.num_at_least, found.verdict) == (0, 0, "fewer")
    never = values.equal_gold([cell_of([0.5, 0.9])], names, "both")
    assert (never.num_at_least, never.verdict) == (1, "not shown")  # 20 of 40 tokens, but only a lower bound
    assert segment_samplers_page._need(never).startswith(">= 0.50")
    assert values.equal_gold([cell_of([1.5, 1.6])], names, "both").num_at_most == 1


def test_the_nearest_rival_is_nearest_in_tokens():
    cells = [Cell({"a/both": np.ones(2) * 100, "b/both": np.ones(2) * 45, "c/both": np.ones(2) * 180}, {}, True, 1.0)]
    assert values.nearest(cells, "a", ["b", "c"]) == "c"


# On tiny models. ----------------------------------------------------------------------------------------


def ready_with_pool(num_samples=4):
    scores = common.pools(SEED, {"base": None}, num_samples=num_samples, sampling=SAMPLING)
    rows = segment_setup.prompts(SEED, "test", None)
    ready = segment_setup.setup(SEED, "base", None, "test", rows, SAMPLING)
    return ready, segment_setup.drawn(ready, "test", num_samples, {c: scores["base", c] for c in common.CRITERIA}, rows)


def test_the_pool_costs_what_the_sampler_that_serves_it_costs(small_world):
    ready, drawn = ready_with_pool()
    prompts = [row["prompt"] for row in ready.rows]
    sampler = SelectionSampler(ready.policy, ready.proxies["harmless"], bon(4), SAMPLING)
    served = sampler.sample(prompts, seed=SEED)
    found = values.bon_arrays(drawn, 1)
    assert found["bon 4/policy"].tolist() == [c.cost.policy_tokens for c in served]
    # Served, an answer that begins like the prompt's first one shares those tokens too.
    spared = found["bon 4/reward"] - [c.cost.reward_tokens for c in served]
    assert ((spared >= 0) & (spared <= 6)).all()
    assert (spared == 0).any()
    proxies = values.bon_arrays(drawn, 1, "proxy")
    assert proxies["bon 4/proxy"] == pytest.approx([c.reward for c in served], abs=1e-5)
    # The prompt is shared by all, an answer's first token is not (in a pool that begins in several ways).
    assert all(0 < shared < total for shared, total in zip(drawn.shared_tokens[1], drawn.reward_tokens[1], strict=True))
    # One tied matrix is looked up and multiplied with, the classifier's embedding is only looked up.
    num_embedding = ready.proxies["helpful"].classifier.model.get_input_embeddings().weight.numel()
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in (ready.proxies["helpful"].classifier.model, ready.policy.model)
    ]
    assert drawn.weight == pytest.approx((sizes[0] - num_embedding) / sizes[1])


def test_targets_are_the_librarys_and_temperatures_are_shares_of_the_spread(small_world):
    ready, drawn = ready_with_pool()
    prompts = [row["prompt"] for row in ready.rows]
    target, _ = calibrate_target(
        ready.policy,
        ready.proxies["helpful"],
        prompts,
        SAMPLING,
        quantile=0.75,
        num_samples=4,
        seed=SEED,
        batch_size=64,
    )
    chosen = Chosen(1.5, 0.3, 0.1)
    found = {
        kind: segment_setup.settings_of(Method(kind, 0.75), drawn.proxies[0], chosen, 10)
        for kind in ("cards", "rejection")
    }
    for kind, share in (("cards", 0.3), ("rejection", 0.1)):
        assert found[kind].target == pytest.approx(target, abs=1e-5)
        assert found[kind].acceptance_temperature == pytest.approx(share * drawn.proxies[0].std())
    assert (found["cards"].entropy_threshold, found["rejection"].entropy_threshold) == (1.5, None)
    assert segment_setup.settings_of(Method("args", 0.5), drawn.proxies[0], chosen, 10) == ArgsSettings(weight=0.5)


@pytest.mark.slow
def test_search_measurement_and_page_end_to_end(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_samplers_page, "PAGE", tmp_path / "cards.md")
    monkeypatch.setattr(segment_samplers_page, "PLOT", tmp_path / "cards.svg")
    monkeypatch.setattr(segment_samplers_page, "JUDGED", [m for m in METHODS if m.kind != "bon"])
    for module in (segment_samplers, segment_samplers_page):
        monkeypatch.setattr(module, "METHODS", METHODS)
    monkeypatch.setattr(segment_samplers, "THRESHOLDS", (4.0, 4.6))
    monkeypatch.setattr(segment_samplers, "SHARES", (0.3,))
    monkeypatch.setattr(segment_samplers, "NUM_CALIBRATION", 4)
    policies = {"base": None}
    rows = segment_samplers.run_search(policies, sampling=SAMPLING)
    assert small_world
    assert not any(small_world)  # gold is not even named
    assert {(row.entropy_threshold, row.share) for row in rows} == {(4.0, 0.3), (4.6, 0.3), (None, 0.3)}
    chosen = segment_samplers.choose(rows)
    best = max(rows[:2], key=lambda row: row.gain)
    assert chosen == Chosen(best.entropy_threshold, 0.3, 0.3)

    def measured():
        return segment_samplers.measure({SEED: policies, 4: policies}, chosen, num_samples=8, sampling=SAMPLING)

    results = measured()
    cell = results[SEED]["base", "helpful"]
    assert cell.is_one_run
    assert set(cell.summaries) == {m.name for m in METHODS if m.kind in ("cards", "rejection")}
    line = _line(tmp_path, "helpful", CardsSettings)
    gold = segment_setup.load_reward("gold", RewardSpec(model=str(common.world(SEED) / "rm-harmless")))
    prompts = [row["prompt"] for row in segment_setup.prompts(SEED, "test", None)]
    judged = gold.score(prompts, line["texts"], {})[0]
    assert any(
        cell.arrays[f"{m.name}/gold"] == pytest.approx(judged) for m in segment_samplers.METHODS if m.kind == "cards"
    )

    segment_samplers_page.write(results, rows, chosen)
    page = (tmp_path / "cards.md").read_text()
    assert page.count("met**") == len(segment_samplers_page.claims(results))
    assert page.count("| chosen |") == 2
    assert "nan" not in page
    assert (tmp_path / "cards.svg").read_text().startswith("<?xml")

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("segment_samplers/**/*.jsonl")}
    monkeypatch.setattr(segment_setup, "RUN", "another")
    again = measured()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again[SEED]["base", "helpful"].arrays.keys() == cell.arrays.keys()
    assert all((again[SEED]["base", "helpful"].arrays[key] == array).all() for key, array in cell.arrays.items())


def _line(folder, criterion, kind):
    lines = [json.loads(line) for line in next(folder.rglob(f"segment_samplers/test-{SEED}/base.jsonl")).open()]
    return next(x for x in lines if x["criterion"] == criterion and x["summary"] and x["settings"]["entropy_threshold"])


def test_seconds_of_different_runs_are_not_compared(small_world):
    ready, drawn = ready_with_pool()
    line = ready.answers("helpful", "bon(1)")
    golds = dict.fromkeys(common.CRITERIA, ready.proxies["helpful"])
    headline = Method("cards", segment_samplers.HEADLINE)
    cards = ready.answers("helpful", segment_setup.settings_of(headline, drawn.proxies[0], Chosen(4.0, 0.3, 0.3), 10))
    lines = {"bon 1": line, "bon 4": line, headline.name: cards}
    cell = segment_samplers.cell(drawn, "helpful", lines, golds, ready.rows)
    assert segment_samplers_page._seconds([cell], "bon 1").startswith("1.00")
    mixed = segment_samplers.cell(drawn, "helpful", lines | {"bon 1": {**line, "run": "other"}}, golds, ready.rows)
    assert not mixed.is_one_run
    assert segment_samplers_page._seconds([mixed], "bon 1") == "-"
    assert dataclasses.replace(mixed, is_one_run=True).arrays == mixed.arrays


def test_the_samplers_do_not_share_random_numbers_with_the_pool(small_world):
    ready, _ = ready_with_pool()
    line = ready.answers("helpful", "bon(1)")
    texts = common.pools(SEED, {"base": None}, num_samples=4, sampling=SAMPLING)["base", "helpful"].texts
    assert line["texts"] != [row[0] for row in texts]
