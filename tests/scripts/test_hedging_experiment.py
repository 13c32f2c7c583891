"""Hedging against a weak proxy: values against brute force, and every part of the experiment on tiny models."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from iama.config.specs import Sampling
from inference.hedging import tune
from inference.hedging.laws import NO_PRESSURE, closed_kl
from inference.selection.curves import sorted_scores
from scripts.demo_corpus import make_world
from scripts.experiments import common, hedging, hedging_page, hedging_plot, hedging_tables
from scripts.experiments import hedging_ensembles as several
from scripts.experiments import hedging_values as values
from scripts.experiments.hedging import Size, Unit
from scripts.experiments.hedging_values import Cell, Hedge, Pooled, Pressed
from scripts.experiments.weak_proxy import Weakness

SAMPLING = Sampling(max_new_tokens=8)
SEED = 3
SIZE = Size(4, 20, 6, 40, 30, 3, 2, 2)


def pooled(gold, num_prompts=12, num_samples=64, num_members=3, noise=0.0, seed=0):
    """A pool whose gold is a function of the first member's quantile; the others are noisier."""
    rng = np.random.default_rng(seed)
    proxy_PS = rng.random((num_prompts, num_samples))
    members = [proxy_PS + 0.2 * k * rng.normal(size=proxy_PS.shape) for k in range(num_members)]
    gold_PS = gold(proxy_PS) + noise * rng.normal(size=proxy_PS.shape)
    return Pooled(proxy_PS, gold_PS, np.stack(members)[:, :, :256], 10.0, 1.0, members[1][:, :256])


def cell_of(gold, noise=0.05, seed=0):
    """Calibrated and judged on pools of the same law."""
    calibration = pooled(gold, 20, 64, noise=noise, seed=seed)
    found = {
        family: tune(
            calibration.proxy_PS, calibration.gold_PS, family, num_draws=draws, max_budget=16, num_bootstrap=20
        )
        for family, draws in hedging.TUNED.items()
    }
    test = pooled(gold, 30, 512, noise=noise, seed=seed + 1)
    return Cell(calibration, test, found, dict.fromkeys(found, 0.5))


def hump(u):
    """Best under Best-of-n at n = sqrt(12), where the slopes of n/(n+3) and n/(n+4) are equal."""
    return u**3 * (1 - u)


# Values. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gold_of_best_of_n_is_the_mean_over_all_subsets_with_ties_broken_by_chance(n):
    rng = np.random.default_rng(1)
    proxy_PS, gold_PS = rng.integers(0, 4, size=(2, 5)).astype(float), rng.normal(size=(2, 5))
    exact = []
    for proxy, gold in zip(proxy_PS, gold_PS, strict=True):
        orders = [np.asarray(order) for order in itertools.permutations(range(5))]
        kept = [order[:n][proxy[order[:n]].argmax()] for order in orders]  # of equals the first of a random order
        exact.append(gold[kept].mean())
    assert values.expected("bon", [n], proxy_PS, gold_PS)[:, 0] == pytest.approx(exact)


@pytest.mark.parametrize("family", ["soft_bon", "itp"])
def test_methods_on_ranks_are_the_mean_over_all_subsets(family, monkeypatch):
    monkeypatch.setattr(values, "DRAWS", 3)
    values.weights.cache_clear()
    rng = np.random.default_rng(2)
    proxy_PS, gold_PS = rng.normal(size=(2, 2, 7))
    level = 0.4
    if family == "soft_bon":
        law = np.exp(np.array([0, 0.5, 1]) / level)
        law /= law.sum()
    else:
        u = np.array([1, 3, 5]) / 6
        low, high = -10.0, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum((u - middle) / level, 0).mean() > 1 else (low, middle)
        law = np.maximum((u - low) / level, 0) / 3
    exact = [
        np.mean([law @ g[sorted(some, key=lambda i: p[i])] for some in itertools.combinations(range(7), 3)])
        for p, g in zip(proxy_PS, gold_PS, strict=True)
    ]
    weights = values.weights(family, level, 7, 3)
    assert sorted_scores(proxy_PS, gold_PS) @ weights == pytest.approx(exact)
    assert values.weights(family, NO_PRESSURE, 7, 3) == pytest.approx(1 / 7)
    values.weights.cache_clear()


def test_the_best_fixed_setting_is_chosen_on_one_half_and_scored_on_the_other():
    cell = cell_of(hump)
    for family in values.FAMILIES:
        found = values.hedge(cell, family)
        tried = values.settings(family)
        half = {"choose": slice(None, 256), "score": slice(256, None)}
        proxy_PS, gold_PS = cell.test.proxy_PS, cell.test.gold_PS
        curve_N = values.expected(family, tried, proxy_PS[:, half["choose"]], gold_PS[:, half["choose"]]).mean(axis=0)
        assert found.fixed == tried[curve_N.argmax()]
        scored = [
            values.expected(family, [value], proxy_PS[:, half["score"]], gold_PS[:, half["score"]])[:, 0]
            for value in (tried[0], found.fixed, cell.tuned[family].value, tried[-1])
        ]
        for array, expected in zip(
            (found.base_P, found.fixed_P, found.tuned_P, found.strongest_P), scored, strict=True
        ):
            assert array == pytest.approx(expected)
        assert found.gain > 0.015
        assert found.met
        assert not found.is_none
    assert values.hedge(cell, "bon").fixed in (3, 4)
    assert values.hedge(cell, "bon").base_P == pytest.approx(cell.test.gold_PS[:, 256:].mean(axis=1))


def hedge_of(base, fixed, tuned):
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=50)
    noise -= noise.mean()
    return Hedge("bon", 2.0, 3.0, np.zeros(50) + base, fixed + noise, tuned + noise, np.zeros(50))


def test_a_gain_within_two_standard_errors_is_none():
    won = hedge_of(0.1, 0.2, 0.194)
    assert (won.is_none, won.lost, won.met) == (False, pytest.approx(0.06), False)
    assert won.standard_error == pytest.approx(np.std(won.fixed_P, ddof=1) / np.sqrt(50))
    assert hedge_of(0.1, 0.2, 0.196).met
    assert hedge_of(0.1, 0.2, 0.21).lost == pytest.approx(-0.1)
    none = hedge_of(0.1, 0.1 + 1e-4, 0.1)
    assert none.is_none
    assert none.met
    assert not hedge_of(0.1, 0.1 + 1e-4, 0.05).met  # no gain to lose, but a loss against a single sample
    share = values.lost_share([won, won])
    assert (share.mean, *share.seeds) == pytest.approx([0.06] * 3)


def one(cell, how, **kwargs):
    return several.as_one(cell.test.members_KPM, cell.calibration.members_KPM, how, **kwargs)


def moved(cell, by):
    """The cell, its members' scores changed by a function of them."""
    pools = (cell.calibration, cell.test)
    own, test = (dataclasses.replace(pool, members_KPM=by(pool.members_KPM)) for pool in pools)
    return dataclasses.replace(cell, calibration=own, test=test)


AGGREGATES = ("mean", "median", "min", "mean_minus_std")


@pytest.mark.parametrize("by_prompt", [True, False])
def test_members_are_put_on_one_scale_before_they_are_one(by_prompt):
    cell = cell_of(hump)
    stretched = np.asarray([1.0, 50.0, 0.1])[:, None, None]
    far = moved(cell, lambda members_KPM: members_KPM * stretched + 7)
    for how in AGGREGATES:
        assert one(far, how, by_prompt=by_prompt) == pytest.approx(one(cell, how, by_prompt=by_prompt))
    if by_prompt:
        spreads = [np.sqrt(np.mean([row.var() for row in m])) for m in cell.calibration.members_KPM]
        scaled = [
            np.stack([(row - row.mean()) / spread for row in m])
            for m, spread in zip(cell.test.members_KPM, spreads, strict=True)
        ]
    else:
        flat = cell.calibration.members_KPM.reshape(3, -1)
        scaled = [(m - f.mean()) / f.std() for m, f in zip(cell.test.members_KPM, flat, strict=True)]
    found = {how: one(cell, how, by_prompt=by_prompt) for how in AGGREGATES}
    assert found["min"] == pytest.approx(np.min(scaled, axis=0))
    assert found["mean_minus_std"] == pytest.approx(np.mean(scaled, axis=0) - 0.5 * np.std(scaled, axis=0))


def test_what_a_member_adds_to_all_answers_of_a_prompt_changes_nothing():
    cell = cell_of(hump)
    offsets = np.random.default_rng(8).normal(scale=9, size=(3, 30, 1))
    far = moved(cell, lambda members_KPM: members_KPM + offsets[:, : members_KPM.shape[1]])
    for how in AGGREGATES:
        assert one(far, how) == pytest.approx(one(cell, how))
        assert several.ensemble_gold(far, how) == pytest.approx(several.ensemble_gold(cell, how))
    # by one mean over all prompts the minimum was one member's at every answer of a prompt
    lowest_KPM = np.argsort(offsets, axis=0)[:1] * np.ones((1, 1, 256))
    chosen = several.as_one(far.test.members_KPM, cell.calibration.members_KPM, "min", by_prompt=False)
    members = [
        several.as_one(far.test.members_KPM[[k, k]], cell.calibration.members_KPM[[k, k]], "min", by_prompt=False)
        for k in range(3)
    ]
    assert (chosen == np.choose(lowest_KPM[0].astype(int), members)).mean() > 0.9


def test_a_delay_is_a_later_peak_and_more_gold_far_out():
    cell = cell_of(hump)
    found = several.delay([cell], "mean")
    k = values.NEARER.index(values.FAR)
    assert found.gap.mean == pytest.approx(
        (several.ensemble_gold(cell, "mean") - several.members_gold(cell))[:, k].mean()
    )
    assert found.peak == several.peak([several.ensemble_gold(cell, "mean")])
    assert several.peak([values.expected("bon", values.NS, cell.test.proxy_PS, hump(cell.test.proxy_PS))]) in (3, 4)
    above = common.Estimate((0.1,), 0.1, (0.01, 0.2))
    assert several.Delay(4, 4, above).met
    assert not several.Delay(3, 4, above).met
    assert not several.Delay(4, 4, dataclasses.replace(above, ci95=(0.0, 0.2))).met


def test_agreement_given_gold_is_that_of_what_gold_does_not_explain():
    """Two members that share an error, beside a regression on gold."""
    rng = np.random.default_rng(5)
    gold_PS, shared_PS = rng.normal(size=(2, 30, 64)) + rng.normal(size=(2, 30, 1))
    members_KPM = gold_PS + shared_PS + rng.normal(size=(3, 30, 64))
    made = Pooled(members_KPM[0], gold_PS, members_KPM, 1.0, 1.0)
    found = several.agreement(Cell(made, made, {}, {}))
    centred = [(rows - rows.mean(axis=1, keepdims=True)).ravel() for rows in (*members_KPM, gold_PS)]
    gold = centred.pop()
    rest = [row - gold * (row @ gold) / (gold @ gold) for row in centred]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert found[0] == pytest.approx(np.mean([np.corrcoef(row, gold)[0, 1] for row in centred]))
    assert found[2] == pytest.approx(np.mean([np.corrcoef(centred[a], centred[b])[0, 1] for a, b in pairs]))
    assert found[3] == pytest.approx(np.mean([np.corrcoef(rest[a], rest[b])[0, 1] for a, b in pairs]))
    assert found[3] == pytest.approx(0.5, abs=0.05)
    assert found[1] > found[0]


@pytest.mark.parametrize(("n", "expected"), [(2, 9e-3), (8, 8e-4), (16, 1e-4)])
def test_deficits_are_those_of_the_tilt_at_equal_kl(n, expected):
    assert values.deficit(n) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("family", ["bop", "soft_bon"])
def test_a_setting_with_a_given_kl(family):
    for n in values.EQUAL_KL_NS:
        assert values.kl(family, values.at_kl(family, values.kl("bon", n))) == pytest.approx(
            values.kl("bon", n), abs=2e-3
        )
    assert values.kl("bop", 3.0) == pytest.approx(closed_kl("bop", 3.0))
    assert values.kl("soft_bon", NO_PRESSURE) == 0.0
    assert values.kl("soft_bon", 1e-3) == pytest.approx(values.kl("bon", values.DRAWS), abs=1e-6)


def straight(gold, num_samples=512):
    """A cell whose proxy is the quantile: without noise Best-of-n's is n / (n + 1) exactly."""
    u = np.tile(np.arange(1, num_samples + 1) / (num_samples + 1), (4, 1))
    made = Pooled(u, gold(u), u[None], 1.0, 1.0)
    return Cell(made, made, {}, {})


def test_the_slope_of_gold_is_per_quantile_and_absolute():
    for n in values.EQUAL_KL_NS:
        assert values.slope([straight(lambda u: 1 - 3 * u)], n) == pytest.approx(3)
        assert values.slope([straight(lambda u: u), straight(lambda u: -0.5 * u)], n) == pytest.approx(0.25)
    # of u^2, whose mean under Best-of-n is n / (n + 2): (5/7 - 3/5) / (5/6 - 3/4) at n = 4
    assert values.slope([straight(lambda u: u**2, 20_000)], 4) == pytest.approx(48 / 35, rel=1e-3)


def test_differences_at_equal_kl_below_the_deficit_in_gold_are_ties():
    estimate = common.Estimate((0.0,), 0.008, (0.006, 0.01))
    assert values.verdict(estimate, 0.008) == "tie"
    assert values.verdict(dataclasses.replace(estimate, mean=-0.008), 0.008) == "tie"
    assert values.verdict(estimate, 0.007) == "higher"
    assert values.verdict(dataclasses.replace(estimate, mean=-0.008, ci95=(-0.01, -0.006)), 0.007) == "lower"
    assert values.verdict(dataclasses.replace(estimate, ci95=(-0.001, 0.02)), 0.007) == "no difference shown"
    # gold is a tenth of the quantile: Best-of-n lacks a tenth of its deficit, Poisson little, and that is no more
    cells = [cell_of(lambda u: 0.1 * u, noise=0.0)]
    found = values.at_equal_kl(cells, "bop", 2)
    bound = values.deficit(2) * values.slope(cells, 2)
    assert found.mean == pytest.approx(0.1 * values.deficit(2), abs=1e-4)
    assert bound == pytest.approx(0.1 * values.deficit(2), rel=0.1)


# The experiment. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 10])
def test_prompts_are_disjoint_and_in_no_training_split(seed):
    calibration, test = hedging.prompts(seed, Size())
    texts = [[row["prompt"][0]["content"] for row in rows] for rows in (calibration, test)]
    trained = {prompt for _, prompt in make_world(seed).splits["train"]}
    assert [len(set(some)) for some in texts] == [50, 100]
    assert not set(texts[0]) & set(texts[1])
    assert not (set(texts[0]) | set(texts[1])) & trained
    assert len({row["topic"] for row in test}) == 16
    assert hedging.prompts(seed, Size()) == (calibration, test)


def test_pools_tuning_pressure_and_page_end_to_end(small_world, tiny, tmp_path, monkeypatch):
    members = {SEED: [tiny.reward, tiny.other_reward]}
    for name, few in (("QUANTILES", (0.5,)), ("CANDIDATES", (1, 2)), ("STEPS", (0, 1))):
        monkeypatch.setattr(hedging, name, few)
    units = hedging.units_of({SEED: {"base": None, "iama": None}}, members, SIZE, SAMPLING)
    pools = {(unit.seed, unit.name): hedging.pools_of(unit) for unit in units}
    calibration, test = pools[SEED, "base"]
    assert calibration.members_KPM.shape == (2, 4, 20)
    assert test.gold_PS.shape == (6, 40)
    assert calibration.sampling_seconds > 0
    assert calibration.scoring_seconds > 0
    again = hedging.pools_of(units[0])
    assert (again[1].members_KPM == test.members_KPM).all()

    cells = {(SEED, name): dataclasses.replace(cell_of(hump, seed=k)) for k, name in enumerate(hedging_plot.POLICIES)}
    unit = units[0]
    found = hedging.press(unit, Cell(calibration, test, {}, {}))
    assert [point.sampler for point in found] == ["CARDS", "GGRO", "GGRO", "SEA", "SEA"]
    assert all(point.gold_P.shape == (3,) for point in found)
    monkeypatch.setattr(hedging._Server, "_serve", None)  # what is on disk is not answered again
    assert (hedging.press(unit, Cell(calibration, test, {}, {}))[1].proxy_P == found[1].proxy_P).all()

    monkeypatch.setattr(hedging_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(hedging_page, "PLOT", tmp_path / "page.svg")
    monkeypatch.setattr(values, "NUM_BOOTSTRAP", 20)
    hedging_page.write(cells, {SEED: found}, Weakness(), {SEED: [0.6, 0.55]}, SIZE)
    page = (tmp_path / "page.md").read_text()
    assert "nan" not in page
    assert page.count("met**") >= len(hedging_page.claims(cells, _hedges(cells)))
    assert all(len(line) <= 120 or line.startswith("|") for line in page.splitlines())
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")


def _hedges(cells):
    return {
        (policy, family): [values.hedge(cells[SEED, policy], family)]
        for policy in hedging_plot.POLICIES
        for family in values.FAMILIES
    }


def test_the_rise_and_fall_of_a_hump_is_told_and_a_rise_is_not():
    risen = {(SEED, "base"): cell_of(lambda u: u), (SEED, "iama"): cell_of(lambda u: u)}
    humped = {(SEED, "base"): cell_of(hump), (SEED, "iama"): cell_of(hump)}
    assert hedging_page._rises_and_falls(humped, "base").met
    assert not hedging_page._rises_and_falls(risen, "base").met
    assert not hedging_page._delays(humped, "base", "mean").measured.startswith("peak 1 ")
    assert humped[SEED, "base"].tuned["bon"].value in (3, 4)


def test_a_tuned_setting_of_a_pressed_sampler_is_read_per_prompt():
    point = Pressed("CARDS", 0.5, np.asarray([0.1, 0.3]), np.asarray([1.0, 2.0]), 0.1)
    cell = cell_of(hump)
    single = hedging_tables._single({(SEED, "base"): cell}, {SEED: [point]}, 2)
    assert single[0] == pytest.approx(cell.test.gold_PS[:2].mean(axis=1))
    assert Unit(SEED, "base", None, [], SIZE, SAMPLING).size.num_answers == 2


def test_where_no_onset_lies_inside_hedging_is_told_apart_and_not_silently_counted():
    results = {(seed, policy): cell_of(hump) for seed in (1, 2) for policy in hedging_plot.POLICIES}
    results[2, "base"] = cell_of(lambda u: u)
    assert values.onset_inside(results[1, "base"])
    assert not values.onset_inside(results[2, "base"])
    hedges = {
        (policy, family): [values.hedge(results[seed, policy], family) for seed in (1, 2)]
        for policy in hedging_plot.POLICIES
        for family in values.FAMILIES
    }
    base, iama = (hedging_page._loses_little(results, p, "bon", hedges[p, "bon"]) for p in hedging_plot.POLICIES)
    assert base.measured.endswith("%); onset inside in 1 of 2 seeds")
    assert iama.measured.endswith("%; onset inside in 2 of 2 seeds")
    assert "(" not in iama.measured
    assert "the base policy of world 2:" in hedging_page._without_onset(results)[0]
    told = hedging_page._told_without_onset(results, hedges)
    assert len(told) == 1
    assert told[0].startswith("*Base in world 2: no onset within n = 16.*")
    assert f'"{results[2, "base"].tuned["bon"].regime}"' in told[0]
    only = {key: cell for key, cell in results.items() if key != (2, "base")}
    assert hedging_page._without_onset(only) == []
    rows = [line for line in hedging_tables.hedged(results, hedges).splitlines() if "| base | Best-of-n |" in line]
    assert [row.split(" | ")[3] for row in rows[:2]] == ["yes", "**no**"]
