"""Stopping tuned on some prompts and valued on others."""

from __future__ import annotations

import numpy as np
import pytest

from iama.objective.operators import bon
from inference.samplers.serve import read_method, stopped_of
from inference.selection.curves import curves
from inference.selection.stopping_beacon import beacon_index
from inference.selection.stopping_families import ByDraws, Orders, Samples, Target
from inference.selection.stopping_pools import stopped_chances, stopped_scores
from inference.selection.stopping_tuned import Tuner

P, S, N = 12, 40, 8
RNG = np.random.default_rng(3)
SPREAD_P1 = np.exp(RNG.normal(0, 0.5, (P, 1)))
PROXY_PS = RNG.normal(0, 0.5, (P, 1)) + SPREAD_P1 * RNG.normal(size=(P, S))
GOLD_PS = PROXY_PS + RNG.normal(size=(P, S))
RIGHT_PS = (RNG.random((P, S)) < RNG.beta(0.5, 1, (P, 1))).astype(float)
HALVES = [np.arange(0, P, 2), np.arange(1, P, 2)]


def samples_of(proxy_PS, gold_PS=GOLD_PS) -> Samples:
    return Samples(list(proxy_PS), list(np.stack([proxy_PS, gold_PS], axis=1)), N)


@pytest.mark.parametrize("proxy_PS", [PROXY_PS, RIGHT_PS], ids=["normal", "0 or 1"])
def test_the_choosing_prompts_draw_n_on_average(proxy_PS):
    samples = samples_of(proxy_PS)
    chosen = HALVES[0]
    for family in (Target(samples), ByDraws(Orders(samples), lambda r: beacon_index(r, N), "beacon({})".format)):
        levels_N2, share_N = family.levels(chosen)
        draws = [family.at(levels_N2[:, side])[0][chosen].mean(axis=0) for side in (0, 1)]
        mixed = draws[0] + share_N * (draws[1] - draws[0])
        most = min(N, draws[1].max())  # of 0 and 1 a threshold may be as much as it will
        np.testing.assert_allclose(mixed, np.minimum(np.arange(1, N + 1), most), atol=1e-9)
        assert (draws[0] <= np.arange(1, N + 1) + 1e-9).all()


def test_a_threshold_of_the_family_is_the_method_as_it_is_served():
    family = Target(samples_of(PROXY_PS))
    draws_PL, values_KPL = family.at(np.asarray([0.3, 1.1]))
    for column, threshold in enumerate((0.3, 1.1)):
        stopped = stopped_of(read_method(f"bon({N}, stop=target(0.5, threshold={threshold}))"))
        _, drawn_PR = stopped_chances(stopped, PROXY_PS)
        np.testing.assert_allclose(draws_PL[:, column], drawn_PR.sum(axis=1))
        np.testing.assert_allclose(values_KPL[1, :, column], stopped_scores(stopped, PROXY_PS, GOLD_PS))


def test_stopping_gains_and_ends_at_plain_best_of_n():
    tuned = Tuner(samples_of(PROXY_PS)).cross_fitted(HALVES)
    plain_PN = curves(PROXY_PS, PROXY_PS, [bon(n) for n in range(1, N + 1)])
    means = tuned.values_KPN[0].mean(axis=0)
    assert (means[2:6] > plain_PN.mean(axis=0)[2:6]).all()
    np.testing.assert_allclose(tuned.draws_PN.mean(axis=0), np.arange(1, N + 1), rtol=0.25)
    np.testing.assert_allclose(tuned.values_KPN[0][:, -1], plain_PN[:, -1])
    assert tuned.plain_PN[:, -1].all()


def test_gold_never_chooses_and_no_prompt_chooses_for_its_half():
    tuned = Tuner(samples_of(PROXY_PS)).cross_fitted(HALVES)
    other = Tuner(samples_of(PROXY_PS, -(GOLD_PS**2))).cross_fitted(HALVES)
    np.testing.assert_array_equal(tuned.draws_PN, other.draws_PN)
    np.testing.assert_array_equal(tuned.values_KPN[0], other.values_KPN[0])
    changed_PS = PROXY_PS.copy()
    changed_PS[0] = 50 - 3 * changed_PS[0]  # of the first half
    third = Tuner(samples_of(changed_PS)).cross_fitted(HALVES)
    np.testing.assert_array_equal(tuned.draws_PN[HALVES[0][1:]], third.draws_PN[HALVES[0][1:]])
    assert (tuned.draws_PN[HALVES[1]] != third.draws_PN[HALVES[1]]).any()


@pytest.mark.parametrize("proxy_PS", [PROXY_PS, RIGHT_PS], ids=["normal", "0 or 1"])
def test_settings_serve_what_they_say(proxy_PS):
    """As they are written, from the pool: draws and proxy, within the noise of orders."""
    budgets = [1, 2, 4, 8]
    for budget, setting in zip(budgets, Tuner(samples_of(proxy_PS)).settings(budgets), strict=True):
        assert setting.draws <= budget + 1e-9
        if setting.stop is None:
            assert setting.draws == pytest.approx(round(setting.draws))
            continue
        stopped = stopped_of(read_method(f"bon({N}, stop={setting.stop})"))
        _, drawn_PR = stopped_chances(stopped, proxy_PS)
        assert drawn_PR.sum(axis=1).mean() == pytest.approx(setting.draws, abs=0.25)
        assert stopped_scores(stopped, proxy_PS, proxy_PS).mean() == pytest.approx(setting.proxy, abs=0.15)


def test_pools_of_several_sizes_and_equal_rewards():
    rows = [PROXY_PS[p, : S - 3 * (p % 3)] for p in range(P)]
    uneven = Samples(rows, [np.stack([row, row]) for row in rows], N)
    assert np.isfinite(Tuner(uneven).cross_fitted(HALVES).values_KPN).all()
    constant = Tuner(samples_of(np.ones((P, S)))).cross_fitted(HALVES)
    np.testing.assert_allclose(constant.values_KPN[0], 1.0)
    assert constant.plain_PN.all()
    one = Tuner(Samples(list(PROXY_PS), list(PROXY_PS[:, None]), 1)).cross_fitted(HALVES)
    np.testing.assert_allclose(one.draws_PN, 1.0)


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_levels_of_a_target_are_those_of_the_whole_table(decimals):
    """To the last bit, though the table of every prompt's draws at every threshold is never made."""
    rng = np.random.default_rng(decimals)
    for _ in range(40):
        max_draws, num_prompts = int(rng.integers(2, 12)), int(rng.integers(2, 30))
        proxies = [rng.normal(size=rng.integers(max_draws, 40)).round(decimals) for _ in range(num_prompts)]
        family = Target(Samples(proxies, [proxy[None] for proxy in proxies], max_draws))
        prompts = np.arange(0, num_prompts, 1 + num_prompts % 2)
        candidates = np.append(np.unique(np.concatenate([proxies[p] for p in prompts])), np.inf)
        draws_T = family._mean_draws(candidates, prompts)
        n_N = np.minimum(np.arange(1.0, max_draws + 1), draws_T[-1])
        low = np.clip(np.searchsorted(draws_T, n_N + 1e-9, side="right") - 1, 0, candidates.size - 1)
        high = np.minimum(low + 1, candidates.size - 1)
        gap_N = draws_T[high] - draws_T[low]
        share_N = np.clip((n_N - draws_T[low]) / np.where(gap_N > 0, gap_N, 1.0), 0.0, 1.0)
        levels = family.levels(prompts)
        assert (levels.levels_N2 == candidates[np.stack([low, high], axis=1)]).all()
        assert (levels.share_N == share_N).all()
