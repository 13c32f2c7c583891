"""CARDS and its rivals on one engine: interpolation on Best-of-n's curve, and the whole page on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.files import EvaluationCriterion
from iama.config.specs import RewardSpec, Sampling
from iama.objective.operators import bon
from inference.samplers.args import ArgsSettings
from inference.samplers.best_of import SelectionSampler
from inference.samplers.cards import calibrate_target
from scripts.experiments import frame, guided
from scripts.experiments import segment_samplers as values
from scripts.experiments.pools import Scores, prompts
from scripts.experiments.segment_samplers import Cell, Chosen, Method

SAMPLING = Sampling(max_new_tokens=10)
SEED = 3
METHODS = tuple(m for m in values.METHODS if m.level not in (16, 0.75, 0.97))


@pytest.fixture
def small_world(small_world, monkeypatch):
    """Tiny models where a demo world has its own; each criterion's gold is the other one's model."""

    asked = []

    def criteria(seed, *, gold):
        asked.append(gold)
        specs = {name: RewardSpec(model=str(small_world / f"rm-{name}")) for name in frame.CRITERIA}
        swapped = dict(zip(specs, reversed(specs.values()), strict=True))
        return [EvaluationCriterion(name=n, proxy=s, gold=swapped[n] if gold else None) for n, s in specs.items()]

    monkeypatch.setattr(frame, "criteria", criteria)
    return asked


@given(arrays(float, (2, 4), elements=st.integers(0, 2)), arrays(float, (2,), elements=st.integers(0, 2)))
def test_wins_and_losses_are_counted_over_what_is_kept(gold_PS, ours_P):
    proxy_PS = np.random.default_rng(0).permutation(8).reshape(2, 4).astype(float)
    found = values.contests(Scores(proxy_PS, gold_PS, []), "cards", {"cards": ours_P, "args": gold_PS[:, 0]})
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
    assert str(never).startswith(">= 0.50")
    assert values.equal_gold([cell_of([1.5, 1.6])], names, "both").num_at_most == 1


def test_the_nearest_rival_is_nearest_in_tokens():
    cells = [Cell({"a/both": np.ones(2) * 100, "b/both": np.ones(2) * 45, "c/both": np.ones(2) * 180}, {}, True, 1.0)]
    assert values.nearest(cells, "a", ["b", "c"]) == "c"


# On tiny models. ----------------------------------------------------------------------------------------


def case_of(criterion="helpful", num_samples=4):
    cases = values.cases_of(SEED, {"base": None}, "test", num_samples, None, SAMPLING, gold=True)
    return cases["base", criterion]


def test_the_pool_costs_what_the_sampler_that_serves_it_costs(small_world):
    case = case_of("harmless")
    scores = case.task.scored(case.criterion)
    sampler = SelectionSampler(case.policy, case.reward, bon(4), SAMPLING)
    served = sampler.sample([row["prompt"] for row in case.task.rows], seed=SEED)
    found = values.bon_arrays(case, {"proxy": scores.proxy_PS, "gold": scores.gold})
    assert found["bon 4/policy"].tolist() == [c.cost.policy_tokens for c in served]
    # Served, an answer that begins like the prompt's first one shares those tokens too.
    spared = found["bon 4/reward"] - [c.cost.reward_tokens for c in served]
    assert ((spared >= 0) & (spared <= 6)).all()
    assert (spared == 0).any()
    assert found["bon 4/proxy"] == pytest.approx([c.reward for c in served], abs=1e-5)
    for n in (1, 4):
        assert found[f"bon {n}/gold"] == pytest.approx(scores.value(bon(n)))
    both = found["bon 4/policy"] + values.weight_of(case) * found["bon 4/reward"]
    assert found["bon 4/both"] == pytest.approx(both)


def test_targets_are_the_librarys_and_temperatures_are_shares_of_the_spread(small_world):
    case = case_of()
    proxy_PS = case.task.scored(case.criterion).proxy_PS
    texts = [row["prompt"] for row in case.task.rows]
    options = {"quantile": 0.75, "num_samples": 4, "seed": SEED, "batch_size": 64}
    target, _ = calibrate_target(case.policy, case.reward, texts, SAMPLING, **options)
    chosen = Chosen(1.5, 0.3, 0.1)
    found = {kind: values.settings_of(Method(kind, 0.75), proxy_PS, chosen, 10) for kind in ("cards", "rejection")}
    for kind, share in (("cards", 0.3), ("rejection", 0.1)):
        assert found[kind].target == pytest.approx(target, abs=1e-5)
        assert found[kind].acceptance_temperature == pytest.approx(share * proxy_PS.std())
    assert (found["cards"].entropy_threshold, found["rejection"].entropy_threshold) == (1.5, None)
    assert values.settings_of(Method("args", 0.5), proxy_PS, chosen, 10) == ArgsSettings(weight=0.5)


@pytest.mark.slow
def test_search_measurement_and_page_end_to_end(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(values, "METHODS", METHODS)
    monkeypatch.setattr(values, "JUDGED", [m for m in METHODS if m.kind != "bon"])
    monkeypatch.setattr(values, "THRESHOLDS", (4.0, 4.6))
    monkeypatch.setattr(values, "SHARES", (0.3,))
    monkeypatch.setattr(values, "NUM_CALIBRATION", 4)
    policies = {"base": None}
    rows = values.run_search(policies, sampling=SAMPLING)
    assert small_world
    assert not any(small_world)  # gold is not even named
    assert {(row.entropy_threshold, row.share) for row in rows} == {(4.0, 0.3), (4.6, 0.3), (None, 0.3)}
    chosen = values.choose(rows)
    best = max(rows[:2], key=lambda row: row.gain)
    assert chosen == Chosen(best.entropy_threshold, 0.3, 0.3)

    def measured():
        return values.measure({SEED: policies, 4: policies}, chosen, num_samples=8, sampling=SAMPLING)

    results = measured()
    cell = results[SEED]["base", "helpful"]
    assert cell.is_one_run
    assert set(cell.summaries) == {m.name for m in METHODS if m.kind in ("cards", "rejection")}
    line = _cards_line(tmp_path, "helpful")
    gold = guided.load_reward("gold", RewardSpec(model=str(frame.world(SEED) / "rm-harmless")))
    judged = gold.score([row["prompt"] for row in prompts(SEED, "test")], line["texts"], {})[0]
    assert any(cell.arrays[f"{m.name}/gold"] == pytest.approx(judged) for m in METHODS if m.kind == "cards")

    values.write(tmp_path, results, rows, chosen)
    page = (tmp_path / "cards.md").read_text()
    assert page.count("met**") == len(values.claims(results))
    assert page.count("| chosen |") == 2
    assert "nan" not in page
    assert (tmp_path / "cards.svg").read_text().startswith("<?xml")

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("answers/*.jsonl")}
    assert files
    monkeypatch.setattr(guided, "RUN", "another")
    again = measured()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again[SEED]["base", "helpful"].arrays.keys() == cell.arrays.keys()
    assert all((again[SEED]["base", "helpful"].arrays[key] == array).all() for key, array in cell.arrays.items())


def _cards_line(folder, criterion):
    lines = [json.loads(line) for line in next(folder.rglob(f"test-{SEED}/answers/base.jsonl")).open()]
    return next(x for x in lines if x["criterion"] == criterion and x["summary"] and x["settings"]["entropy_threshold"])


def test_seconds_of_different_runs_are_not_compared(small_world):
    case, other = case_of(), case_of("harmless").criterion
    proxy_PS = case.task.scored(case.criterion).proxy_PS
    line = guided.answers(case, "bon(1)")
    headline = Method("cards", values.HEADLINE)
    cards = guided.answers(case, values.settings_of(headline, proxy_PS, Chosen(4.0, 0.3, 0.3), 10))
    lines = {"bon 1": line, "bon 4": line, headline.name: cards}
    cell = values.cell(case, other, lines)
    assert values._seconds([cell], "bon 1").startswith("1.00")
    mixed = values.cell(case, other, lines | {"bon 1": {**line, "run": "other"}})
    assert not mixed.is_one_run
    assert values._seconds([mixed], "bon 1") == "-"
    assert dataclasses.replace(mixed, is_one_run=True).arrays.keys() == mixed.arrays.keys()


def test_the_samplers_do_not_share_random_numbers_with_the_pool(small_world):
    case = case_of()
    assert guided.answers(case, "bon(1)")["texts"] != [row[0] for row in case.task.scored(case.criterion).texts]
