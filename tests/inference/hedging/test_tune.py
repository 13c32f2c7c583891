from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq

from iama.config.methods import FIXED_DRAWS, TUNABLE
from iama.errors import ConfigError, DataError, IamaWarning
from iama.objective.operators import bon, bop, bop_zt
from iama.objective.rank_operators import soft_ranks
from inference.hedging import tune
from inference.hedging.laws import (
    NO_PRESSURE,
    by_budget,
    closed_chi_squared,
    closed_kl,
    on_ranks,
)
from inference.selection.curves import curves, rank_weights, sorted_scores
from tests.inference import densities


def heavy_tail(u):
    """Gold rises with the proxy, but the proxy's far tail is error: with `x = -ln(1-u)`, `x - 0.183 x^2`."""
    x = -np.log1p(-u)
    return x - 0.183 * x**2


def pool(num_prompts, num_samples, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    u = rng.random((num_prompts, num_samples))
    offsets = rng.normal(size=(num_prompts, 1))
    return u + offsets, heavy_tail(u) + noise * rng.normal(size=u.shape) + offsets


def draws(family, num_draws=16):
    return {"num_draws": num_draws} if family in FIXED_DRAWS else {}


def quick(proxy, gold, family, **options):
    return tune(proxy, gold, family, num_bootstrap=20, **draws(family), **options)


def weights_of(family, knob, num_samples, num_draws):
    if knob == NO_PRESSURE:
        return densities.bon_weights(1, num_samples)
    if family in FIXED_DRAWS:
        return {"soft_bon": densities.soft_bon_weights, "itp": densities.itp_weights}[family](
            num_draws, knob, num_samples
        )
    if family == "bop_zt":
        return rank_weights(bop_zt(knob), num_samples) if knob else densities.bon_weights(1, num_samples)
    return {"bon": densities.bon_weights, "bop": densities.bop_weights}[family](knob, num_samples)


def brute_force(proxy, gold, family, num_draws, num_settings=1500):
    """Knobs over the whole range, finely, and gold at each by the weights of the pool's ranks."""
    size = proxy.shape[1]
    path = on_ranks(family, num_draws) if family in FIXED_DRAWS else by_budget(family, size // 4, size)
    pressures = np.expm1(np.linspace(0, np.log1p(path.largest), num_settings))
    pressures = np.arange(path.largest + 1) if family == "bon" else pressures
    knobs = [path.setting(pressure) for pressure in pressures]
    mean_S = sorted_scores(proxy, gold).mean(axis=0)
    return np.array(knobs), np.array([mean_S @ weights_of(family, knob, size, num_draws) for knob in knobs])


@pytest.mark.parametrize("family", TUNABLE)
def test_residual_and_brute_force_agree(family):
    proxy, gold = pool(30, 64)
    tuned = quick(proxy, gold, family)
    knobs, values = brute_force(proxy, gold, family, 16)
    assert tuned.regime == "hacks"
    assert tuned.gold >= values.max() - 1e-12
    assert tuned.gold == pytest.approx(values.max(), abs=1e-4 if family == "itp" else 1e-6)
    assert tuned.value == pytest.approx(knobs[values.argmax()], rel=0.02)
    mean_S = sorted_scores(proxy, gold).mean(axis=0)
    assert tuned.gold == pytest.approx(mean_S @ weights_of(family, tuned.value, 64, 16), abs=1e-12)
    if family == "itp":  # gold is straight in 1/beta between the points where one draw fewer is kept
        bends = [k * (k - 1) / (2 * 16**2) for k in range(2, 17)]
        assert min(abs(tuned.value / bend - 1) for bend in bends) < 1e-9
    elif family != "bon":
        step = 1e-4 * tuned.value
        around = [mean_S @ weights_of(family, tuned.value + sign * step, 64, 16) for sign in (-1, 1)]
        assert (around[1] - around[0]) / (2 * step) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", TUNABLE)
@given(gold=arrays(np.float64, (2, 24), elements=st.floats(-1, 1, width=32)), seed=st.integers(0, 9))
@settings(max_examples=6)
def test_never_worse_than_brute_force_on_noise(family, gold, seed):
    gold[0, :2] = 2.0, -2.0
    proxy = np.random.default_rng(seed).random((2, 24))
    tuned = tune(proxy, gold, family, num_bootstrap=2, **draws(family, 6))
    _, values = brute_force(proxy, gold, family, 6, num_settings=300)
    assert tuned.gold >= values.max() - 1e-6


@pytest.mark.parametrize(("height", "best", "other"), [(100, 1.8, 241), (200, 241, 1.8)])
def test_the_right_one_of_two_humps(height, best, other):
    exponents = {100: (1.3055774, 261.80511748), 200: (1.23923418, 250.45947305)}[height]
    u = (np.arange(4096) + 0.5)[None] / 4096
    gold = u ** exponents[0] * (1 - u) + height * u ** exponents[1] * (1 - u)
    for family in ("bon", "bop"):
        tuned = quick(np.repeat(u, 2, axis=0), np.repeat(gold, 2, axis=0), family)
        maxima = [at.knob for at in tuned.stationary if at.kind == "maximum"]
        assert [at.kind for at in tuned.stationary] == ["maximum", "minimum", "maximum"]
        assert tuned.regime == "hacks"
        assert tuned.value == maxima[0 if best < other else 1]
        assert tuned.threshold == pytest.approx(241, rel=0.05)
        if family == "bon":
            knobs, values = brute_force(u, gold, family, None)
            tops = knobs[1:-1][(values[1:-1] > values[:-2]) & (values[1:-1] > values[2:])]
            np.testing.assert_array_equal(maxima, tops)
            assert tuned.value == knobs[values.argmax()]
            assert maxima == pytest.approx([2, 241], rel=0.05)


def walk(num_samples, seed):
    """One pool, twice, whose gold by ascending proxy is a random walk."""
    rng = np.random.default_rng(seed)
    gold = np.cumsum(rng.normal(size=num_samples))
    return np.tile(np.arange(float(num_samples)), (2, 1)), np.tile(gold, (2, 1))


@pytest.mark.parametrize("seed", range(6))
def test_every_n_is_looked_at(seed):
    """Best-of-n up to the whole pool, by brute force: all extrema, wherever they are."""
    proxy, gold = walk(400, seed)
    gold[:, -6:] += (40.0, 90.0, 30.0, 0.0, -60.0, -300.0)
    tuned = tune(proxy, gold, "bon", max_budget=400, num_bootstrap=4)
    values = np.array([gold[0] @ densities.bon_weights(n, 400) for n in range(1, 401)])
    assert tuned.gold == pytest.approx(values.max(), abs=1e-9)
    assert tuned.value == 1 + values.argmax()
    inside = range(1, 399)
    tops = [i + 1 for i in inside if values[i] > values[i - 1] and values[i] > values[i + 1]]
    assert [at.knob for at in tuned.stationary if at.kind == "maximum"] == tops
    assert tuned.value_ci95 == (tuned.value, tuned.value)  # both prompts are one


def test_a_peak_in_the_last_interval_of_the_curve():
    """Gold of the three best by proxy is -43, 1 and 0: if `m` are not drawn about `m/400 - 43 m (m-1) / 400^2`."""
    proxy, gold = np.tile(np.arange(400.0), (2, 1)), np.zeros((2, 400))
    gold[:, -3:] = -43.0, 1.0, 0.0
    values = np.array([gold[0] @ densities.bon_weights(n, 400) for n in range(1, 401)])
    tuned = tune(proxy, gold, "bon", max_budget=400, num_bootstrap=4)
    assert 1 + values.argmax() == 395
    assert tuned.curve[-2].knob < 395
    assert (tuned.value, tuned.regime, tuned.threshold) == (395, "hacks", 395)
    assert tuned.value_ci95 == tuned.threshold_ci95 == (395, 395)


@pytest.mark.parametrize("family", ["bop", "bop_zt", "soft_bon", "itp"])
@pytest.mark.parametrize("seed", range(2))
def test_no_top_of_a_random_walk_is_missed(family, seed):
    proxy, gold = walk(300, seed)
    options = {"num_draws": 60} if family in FIXED_DRAWS else {"max_budget": 150}
    tuned = tune(proxy, gold, family, num_bootstrap=2, **options)
    path = on_ranks(family, 60) if family in FIXED_DRAWS else by_budget(family, 150, 300)
    knobs = [path.setting(p) for p in np.expm1(np.linspace(0, np.log1p(path.largest), 600))]
    values = np.array([gold[0] @ weights_of(family, knob, 300, 60) for knob in knobs])
    assert tuned.gold >= values.max() - 1e-9
    tops = np.count_nonzero((values[1:-1] > values[:-2] + 1e-9) & (values[1:-1] > values[2:] + 1e-9))
    assert sum(at.kind == "maximum" for at in tuned.stationary) >= tops


@pytest.mark.parametrize("family", TUNABLE)
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_gold_that_the_proxy_cannot_change_is_flat(family, level):
    """Gold is even where the proxy chooses, and the proxy is where gold is not: only rounding is left."""
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 6, 64))
    proxy[:3], gold[3:] = 0.5, 1 / 3
    tuned = quick(proxy, gold + level, family)
    single = tuned.curve[0].knob
    assert (tuned.regime, tuned.written, tuned.value) == ("flat", "identity", single)
    assert tuned.value_ci95 == (single, single)
    assert (tuned.threshold, tuned.threshold_ci95, tuned.stationary) == (None, None, ())
    assert tuned.gain == tuned.gain_standard_error == 0


@pytest.mark.parametrize("family", ["bop", "bop_zt"])
def test_a_budget_that_the_pool_cannot_show_is_told(family):
    proxy, _ = pool(3, 64)
    with pytest.warns(IamaWarning, match=f"{family}: with 64 draws on average .* 64 samples of prompt 0; tried are up"):
        tuned = quick(proxy, proxy, family, max_budget=64)
    last = tuned.curve[-1]
    assert tuned.num_samples_mean == last.samples < 48
    assert tuned.gold == pytest.approx(curves(proxy, proxy, [{"bop": bop, "bop_zt": bop_zt}[family](last.knob)]).mean())


def test_soft_best_of_n_is_told_as_it_is_served():
    tuned = quick(*pool(30, 64), "soft_bon")
    served = soft_ranks(16, tuned.value)
    assert tuned.num_samples_mean == pytest.approx(served.budget)
    assert tuned.num_samples_mean < 15
    for point in tuned.curve[1::20]:
        operator = soft_ranks(16, point.knob)
        assert (point.samples, point.kl) == (pytest.approx(operator.budget), pytest.approx(operator.kl))


def ends(gold_of_u, family):
    u = np.random.default_rng(0).permuted(np.tile((np.arange(64) + 0.5) / 64, (3, 1)), axis=1)
    return quick(u, gold_of_u(u), family)


@pytest.mark.parametrize("family", TUNABLE)
def test_never_hacks_takes_the_last_setting(family):
    tuned = ends(lambda u: u**3, family)
    assert tuned.regime == "never hacks"
    assert (tuned.threshold, tuned.threshold_ci95, tuned.stationary) == (None, None, ())
    assert tuned.value == pytest.approx(tuned.curve[-1].knob)
    assert (tuned.loss_at_max, tuned.loss_at_max_ci95) == (0.0, (0.0, 0.0))
    assert tuned.num_samples_mean == pytest.approx(16)
    assert tuned.gain == pytest.approx(tuned.gold - 0.25, abs=1e-3)


@pytest.mark.parametrize("family", TUNABLE)
def test_always_hacks_takes_a_single_sample(family):
    tuned = ends(lambda u: -(u**3), family)
    single = {"bon": 1, "bop": 0, "bop_zt": 0}.get(family, NO_PRESSURE)
    assert tuned.regime == "always hacks"
    assert (tuned.written, tuned.value, tuned.num_samples_mean) == ("identity", single, 1)
    assert tuned.gain == tuned.gain_standard_error == 0
    assert tuned.threshold == (1 if family not in FIXED_DRAWS else NO_PRESSURE)
    assert tuned.loss_at_max > 0.3
    assert tuned.gold == pytest.approx(tuned.curve[0].gold)


@pytest.mark.parametrize("family", TUNABLE)
def test_a_dip_is_told_and_the_better_end_taken(family):
    up = ends(lambda u: (u - 0.6) ** 2, family)
    assert up.regime == "dips"
    assert up.threshold is None
    assert [at.kind for at in up.stationary] == ["minimum"]
    assert up.value == pytest.approx(up.curve[-1].knob)
    down = ends(lambda u: (u - 0.8) ** 2, family)
    assert (down.regime, down.written) == ("dips", "identity")


def test_writes_methods_as_people_do():
    proxy, gold = pool(30, 64)
    for family in TUNABLE:
        tuned = quick(proxy, gold, family)
        number = f"{tuned.value:.6g}"
        inside = f"16, {number}, {FIXED_DRAWS[family]}" if family in FIXED_DRAWS else number
        assert tuned.written == f"{family}({inside})"
        assert tuned.knob == TUNABLE[family]


@pytest.mark.parametrize("family", ["bon", "bop"])
@pytest.mark.slow
def test_recovers_the_true_threshold_of_a_heavy_tail(family):
    """The true n is 7.61 and mu 7.38; 20 pools of 100 prompts spread by about 0.7, of 500 by less than half of it."""
    start = 1 if family == "bon" else 0
    true = brentq(lambda v: densities.residual(family, v, heavy_tail), 2, 30)
    assert true == pytest.approx(7.61 if start else 7.38, abs=0.01)
    for (num_prompts, num_samples), tolerance, spread in (((100, 64), 0.7, 1.1), ((500, 256), 0.3, 0.55)):
        found = [
            tune(*pool(num_prompts, num_samples, seed), family, num_bootstrap=2).value
            for seed in range(12 if num_samples == 64 else 6)
        ]
        assert np.mean(found) == pytest.approx(true, abs=tolerance)
        assert np.std(found) < spread
        best, *values = (densities.expected(family, v, heavy_tail) for v in (true, *found))
        assert 0 <= best - np.mean(values) < 0.006  # of a gain of 0.45


@pytest.mark.slow
def test_intervals_cover():
    true = brentq(lambda v: densities.residual("bop", v, heavy_tail), 2, 30)
    gold, single = densities.expected("bop", true, heavy_tail), densities.expected("bop", 1e-9, heavy_tail)
    covered = []
    for seed in range(60):
        tuned = tune(*pool(50, 64, seed), "bop", num_bootstrap=200)
        low, high = tuned.value_ci95
        assert low <= tuned.value <= high
        covered.append((low <= true <= high, tuned.gain_ci95[0] <= gold - single <= tuned.gain_ci95[1]))
        assert (
            tuned.threshold_ci95 == pytest.approx((1 + low, 1 + high), abs=1e-6) or tuned.threshold != tuned.value + 1
        )
    assert np.mean(covered, axis=0) == pytest.approx([0.93, 0.93], abs=0.07)


def test_more_prompts_narrow_the_intervals():
    few, many = (tune(*pool(num_prompts, 64), "bon", num_bootstrap=200) for num_prompts in (25, 400))
    for name in ("gold_ci95", "gain_ci95", "loss_at_max_ci95"):
        width = [np.diff(getattr(tuned, name))[0] for tuned in (few, many)]
        assert width[1] < 0.5 * width[0]
    assert many.gain_standard_error == pytest.approx(np.diff(many.gain_ci95)[0] / 3.92, rel=0.2)


def test_numbers_equal_the_curves_of_the_evaluation():
    proxy, gold = pool(20, 40)
    tuned = quick(proxy, gold, "bon")
    kept, single = (curves(proxy, gold, [bon(n)])[:, 0] for n in (int(tuned.value), 1))
    assert tuned.gold == pytest.approx(kept.mean(), abs=1e-12)
    assert tuned.gain == pytest.approx((kept - single).mean(), abs=1e-12)
    assert tuned.gain_standard_error == pytest.approx((kept - single).std(ddof=1) / np.sqrt(20), rel=1e-9)
    assert tuned.proxy == pytest.approx(curves(proxy, proxy, [bon(int(tuned.value))]).mean(), abs=1e-12)
    assert [point.knob for point in tuned.curve] == list(range(1, 11))
    assert tuned.loss_at_max == pytest.approx(tuned.gold - tuned.curve[-1].gold, abs=1e-12)
    mixed = quick(proxy, gold, "bop")
    for point in mixed.curve[::20]:
        assert point.gold == pytest.approx(curves(proxy, gold, [bop(point.knob)]).mean(), abs=1e-12)
        assert point.samples == 1 + point.knob
        assert point.kl == pytest.approx(bop(point.knob).kl, abs=1e-9)
        assert point.gold_ci95[0] < point.gold < point.gold_ci95[1]


@pytest.mark.parametrize("family", TUNABLE)
def test_curves_start_at_a_single_sample_and_rise_in_the_proxy(family):
    proxy, gold = pool(10, 64)
    tuned = quick(proxy, gold, family)
    first = tuned.curve[0]
    assert (first.samples, first.kl, first.chi2) == (1, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert first.gold == pytest.approx(gold.mean(), abs=1e-12)
    for name in ("proxy", "kl", "chi2"):
        assert (np.diff([getattr(point, name) for point in tuned.curve]) > -1e-9).all()
    last = tuned.curve[-1]
    assert last.samples == pytest.approx(16)
    if family in FIXED_DRAWS:
        assert last.kl == pytest.approx(closed_kl("bon", 16), abs=1e-6)
        assert last.chi2 == pytest.approx(closed_chi_squared("bon", 16), rel=1e-6)


@given(seed=st.integers(0, 20), levels=st.sampled_from([2, 5, 1000]))
@settings(max_examples=6)
@pytest.mark.slow
def test_the_order_of_samples_does_not_matter_nor_does_the_scale_of_the_proxy(seed, levels):
    rng = np.random.default_rng(seed)
    proxy = rng.integers(levels, size=(5, 32)).astype(float)  # many ties
    gold = rng.normal(size=proxy.shape)
    order = np.argsort(rng.random(proxy.shape), axis=1)
    shuffled = [np.take_along_axis(scores, order, axis=1) for scores in (proxy, gold)]
    expected = quick(proxy, gold, "bop")
    for other in (quick(*shuffled, "bop"), quick(np.exp(proxy / 50) - 3, gold, "bop")):
        assert other.gold == pytest.approx(expected.gold, abs=1e-9)
        assert [p.gold for p in other.curve] == pytest.approx([p.gold for p in expected.curve], abs=1e-9)
        assert other.regime == expected.regime


def test_samples_without_a_score_leave_their_pool():
    proxy, gold = pool(4, 24)
    proxy[1, 3] = gold[1, 7] = np.nan
    gold[2, 20:] = proxy[2, 20:] = np.nan
    tuned = quick(proxy, gold, "bon")
    assert [point.knob for point in tuned.curve] == [1, 2, 3, 4, 5]  # a quarter of the smallest pool, of 20
    expected = curves(proxy, gold, [bon(n) for n in range(1, 6)]).mean(axis=0)
    np.testing.assert_allclose([point.gold for point in tuned.curve], expected, atol=1e-12)


def test_a_constant_proxy_in_one_prompt_selects_nothing_there():
    proxy, gold = pool(3, 16)
    proxy[1] = 4.0
    tuned = quick(proxy, gold, "bon", max_budget=8)
    others = quick(proxy[[0, 2]], gold[[0, 2]], "bon", max_budget=8)
    assert [point.gold for point in tuned.curve] == pytest.approx(
        [(2 * point.gold + gold[1].mean()) / 3 for point in others.curve], abs=1e-12
    )


def test_fast():
    proxy, gold = pool(50, 64)
    for family in TUNABLE:
        start = time.process_time()
        tune(proxy, gold, family, num_bootstrap=1000, **draws(family))
        assert time.process_time() - start < 10


def test_large_pools_and_budgets():
    proxy, gold = pool(2, 4000)
    for family in ("bon", "bop"):
        tuned = quick(proxy, gold, family)
        assert tuned.curve[-1].samples == 1000
        assert len(tuned.curve) <= 128
        mean_S = sorted_scores(proxy, gold).mean(axis=0)
        neighbours = [mean_S @ weights_of(family, tuned.value + step, 4000, None) for step in (-1, 0, 1)]
        assert np.argmax(neighbours) == 1


def changed(**places):
    proxy, gold = pool(3, 16)
    for name, (index, value) in places.items():
        {"proxy": proxy, "gold": gold}[name][index] = value
    return proxy, gold


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (changed(proxy=((1, 4), np.inf)), "the proxy score of prompt 1, sample 4 is infinite"),
        (changed(gold=((2, 0), -np.inf)), "the gold score of prompt 2, sample 0 is infinite"),
        (changed(gold=(2, np.nan)), "prompt 2 has 0 samples with both scores"),
        (
            changed(gold=((1, slice(7, None)), np.nan)),
            "prompt 1 has 7 samples with both scores; a quarter of at least 8",
        ),
        (changed(proxy=(slice(None), 1.0)), "the proxy score is the same for all samples of every prompt"),
        (changed(gold=(slice(None), 1.0)), "the gold score is the same for all samples of every prompt"),
        (([[1.0, 2.0]], [[1.0, 2.0]]), "scores of 1 prompts"),
        (([[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.0]]), "proxy scores are no table of numbers"),
        (([1.0, 2.0], [1.0, 2.0]), r"proxy scores have the shape \(2,\)"),
        ((np.zeros((3, 16)), np.zeros((3, 15))), r"shape \(3, 16\), gold scores \(3, 15\)"),
    ],
)
def test_unusable_scores_are_told_in_one_line(scores, message):
    with pytest.raises(DataError, match=message) as caught:
        tune(*scores, "bon")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": "mbr"}, ConfigError, "family 'mbr' cannot be tuned; write one of bon, bop, bop_zt, soft_bon, itp"),
        ({"family": "soft_bon"}, ConfigError, "soft_bon is tuned with a fixed number of draws .* num_draws is None"),
        ({"family": "itp", "num_draws": 1}, ConfigError, "num_draws is 1"),
        ({"family": "itp", "num_draws": 17}, DataError, "num_draws is 17, but prompt 0 has 16 samples"),
        ({"family": "itp", "num_draws": 8, "max_budget": 4}, ConfigError, "num_draws 8 is above max_budget 4"),
        ({"family": "bon", "num_draws": 8}, ConfigError, r"bon tunes its number of draws: leave out num_draws \(8\)"),
        ({"family": "bop", "max_budget": 17}, DataError, "max_budget is 17, but prompt 0 has 16 samples"),
        ({"family": "bop", "max_budget": 1}, ConfigError, "max_budget is 1"),
        ({"family": "bon", "num_bootstrap": 0}, ConfigError, "num_bootstrap is 0"),
    ],
)
def test_unusable_options_are_told_in_one_line(options, error, message):
    with pytest.raises(error, match=message) as caught:
        tune(*pool(3, 16), **options)
    assert "\n" not in str(caught.value)
