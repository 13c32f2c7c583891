"""The pure parts of the experiments on the demo world: areas, intervals, pools that share a budget, the search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.schema import load_config
from iama.config.settings import TrainingConfig
from iama.objective.estimators import group_value
from iama.objective.operators import bon
from scripts.experiments import common, front, mixed_preference, rivals, search
from scripts.experiments.fronts import hypervolume, split_value, verdict
from scripts.experiments.pools import Scores

SIDE = st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 3))


def area_by_grid(points, reference, steps=400):
    """The dominated area, counted on a fine grid."""
    ticks = (np.arange(steps) + 0.5) / steps * 2
    x, y = np.meshgrid(reference[0] + ticks, reference[1] + ticks)
    covered = np.zeros_like(x, dtype=bool)
    for px, py in points:
        covered |= (x <= px) & (y <= py)
    return covered.sum() * (2 / steps) ** 2


def area(points, reference=(0.0, 0.0)):
    return float(hypervolume(np.asarray([points], dtype=float), np.asarray([reference], dtype=float))[0])


def test_hypervolume_of_known_fronts():
    assert area([(2, 3)]) == pytest.approx(6)
    assert area([(2, 3), (3, 1)]) == pytest.approx(7)
    assert area([(2, 3), (1, 1), (3, 1), (3, 1)]) == pytest.approx(7)  # dominated and repeated points add nothing
    assert area([(2, 3)], reference=(1, 1)) == pytest.approx(2)
    assert area([(2, -1), (-1, 2)]) == 0.0  # below the reference in one criterion


@given(arrays(float, (5, 2), elements=SIDE), arrays(float, (2,), elements=SIDE))
def test_hypervolume_agrees_with_counting(points, reference):
    assert area(points, reference) == pytest.approx(area_by_grid(points, reference), abs=0.03)


@given(arrays(float, (4, 2), elements=SIDE), arrays(float, (2,), elements=st.floats(0, 1)))
def test_a_front_that_moves_outward_never_loses_area(points, step):
    assert area(points + step) >= area(points) - 1e-12


def test_hypervolume_is_taken_replicate_by_replicate():
    points, reference = np.random.default_rng(0).normal(size=(7, 5, 2)), np.zeros((7, 2))
    one_by_one = [area(points[b]) for b in range(7)]
    assert hypervolume(points, reference) == pytest.approx(one_by_one)


def enumerate_split(selectors, scores, draws):
    """Mean score of the best over every choice of subsets; a tie goes to the later pool."""
    subsets = [list(itertools.combinations(range(len(s)), n)) for s, n in zip(selectors, draws, strict=True)]
    found = []
    for chosen in itertools.product(*subsets):
        samples = [(selectors[k][i], k, i, scores[k][i]) for k, some in enumerate(chosen) for i in some]
        found.append(max(samples)[3])
    return float(np.mean(found))


@given(
    arrays(float, (5,), elements=st.integers(0, 5)),
    arrays(float, (4,), elements=st.integers(0, 5)),
    st.sampled_from([(2, 2), (1, 3), (3, 1), (4, 0), (0, 2)]),
)
def test_split_value_is_the_mean_over_all_subsets(first, second, draws):
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=5), rng.normal(size=4)]
    value = split_value([first[None], second[None]], [s[None] for s in scores], draws)
    assert value[0] == pytest.approx(enumerate_split([first, second], scores, draws))


def test_split_value_of_one_pool_is_the_group_value():
    rng = np.random.default_rng(1)
    selector, score = rng.normal(size=(2, 3, 16))
    both = split_value([selector, rng.normal(size=(3, 8))], [score, np.zeros((3, 8))], [4, 0])
    assert both == pytest.approx(group_value(bon(4), selector, score))


def test_the_bootstrap_of_a_mean_has_the_normal_interval():
    rng = np.random.default_rng(0)
    arrays_by_seed = [{"a": rng.normal(1.0, 1.0, size=400)} for _ in range(1)]
    found = common.bootstrap(arrays_by_seed, lambda m: m["a"], num_bootstrap=4000)
    half = 1.96 * arrays_by_seed[0]["a"].std() / math.sqrt(400)
    mean = arrays_by_seed[0]["a"].mean()
    assert found.mean == pytest.approx(mean)
    assert found.ci95 == pytest.approx((mean - half, mean + half), abs=0.01)


def test_the_bootstrap_resamples_prompts_jointly_and_seeds():
    noise = np.random.default_rng(0).normal(size=50)
    paired = {"iama": noise + 0.25, "grpo": noise}
    alone = common.bootstrap([paired], lambda m: m["iama"] - m["grpo"])
    assert alone.ci95 == pytest.approx((0.25, 0.25))
    seeds = [{"x": np.full(50, level)} for level in (0.0, 1.0, 2.0)]
    spread = common.bootstrap(seeds, lambda m: m["x"])
    assert spread.seeds == (0.0, 1.0, 2.0)
    assert (spread.mean, *spread.ci95) == pytest.approx((1.0, 0.0, 2.0), abs=0.35)
    assert verdict(spread) in ("higher", "no difference shown")


def test_values_select_by_proxy_and_judge_by_gold():
    proxy = np.asarray([[3.0, 1.0, 2.0]])
    gold = np.asarray([[0.0, 1.0, 5.0]])
    scores = Scores(proxy, gold, [["a", "b", "c"]])
    assert common.values(bon(3), scores) == pytest.approx([0.0])
    assert common.values(bon(1), scores, "proxy") == pytest.approx([2.0])
    with pytest.raises(AssertionError, match="without gold"):
        common.values(bon(2), Scores(proxy, None, [["a", "b", "c"]]))


def row(beta, kl, proxy=0.0, rate=4e-3):
    return {"learning_rate": rate, "beta": beta, "kl": kl, "proxy": proxy}


def test_the_search_looks_for_the_smallest_beta_within_the_limit():
    limit = search.MAX_KL
    assert search.next_setting([]) == rivals.Setting(4e-3, 0.1)
    assert search.next_setting([row(0.1, 2 * limit)]).beta == pytest.approx(0.4)
    assert search.next_setting([row(0.1, limit)]).beta == pytest.approx(0.025)
    assert search.next_setting([row(0.1, limit), row(0.025, 2 * limit)]).beta == pytest.approx(0.05)
    assert search.next_setting([row(0.1, 9), row(0.4, 9)]).beta == pytest.approx(1.6)
    last = search.next_setting([row(0.1, limit), row(0.025, 2 * limit), row(0.05, limit)])
    assert last == rivals.Setting(2e-3, 0.05)


def test_the_search_takes_the_best_proxy_within_the_limit_and_says_when_there_is_none():
    limit = search.MAX_KL
    rows = [row(0.1, limit, 1.0), row(0.05, limit, 2.0), row(0.01, 2 * limit, 9.0), row(0.05, 0.0, 1.5, rate=2e-3)]
    assert search.choose(rows) == rivals.Setting(4e-3, 0.05)
    assert search.choose(rows[2:3]) == rivals.Setting(4e-3, 0.01)
    text = search.page({name: rows if name != "told" else rows[2:3] * 4 for name in rivals.LANES})
    assert text.count("| chosen |") >= len(rivals.LANES)
    assert "No run of told ended within it" in text


@pytest.fixture
def fake_world(tmp_path, monkeypatch):
    """A world's folder without building it: what is tested reads only names and the stamp."""
    folder = tmp_path / "world-1"
    folder.mkdir()
    (folder / "stamp.json").write_text('{"sources_sha256": "0123456789abcdef"}')
    monkeypatch.setattr(common, "world", lambda seed: folder)
    return folder


@pytest.mark.parametrize("name", [name for name in rivals.LANES if name != "told"])
def test_every_run_is_a_configuration_that_train_iama_accepts_and_has_no_gold(fake_world, name):
    lane = rivals.LANES[name]
    job = lane.job(1, rivals.Setting(4e-3, 0.05), weight=0.3, steps=7)
    config = load_config(common.launch.ROOT / job.config, TrainingConfig, job.settings())
    assert [c.gold for c in config.objective.criteria] == [None] * len(lane.serves)
    assert {c.name: c.weight for c in config.objective.criteria} == (
        {"helpful": 0.3, "harmless": 0.7} if len(lane.serves) == 2 else {lane.serves[0]: 1.0}
    )
    assert all(c.operator == lane.operator for c in config.objective.criteria)
    assert (config.trainer["beta"], config.trainer["max_steps"], config.world_size) == (0.05, 7, 1)
    assert config.output_dir == str(job.folder)
    assert config.name.endswith("in world 1 of 01234567")
    assert config.kl.target is None
    steered = lane.job(1, rivals.Setting(4e-3, 0.05), kl_target=0.2)
    assert load_config(common.launch.ROOT / job.config, TrainingConfig, steered.settings()).kl.target == 0.2
    assert steered.folder != lane.job(1, rivals.Setting(4e-3, 0.05)).folder


def test_points_of_a_method_are_those_of_the_policies_that_serve_it():
    served = [rivals.Served("p", "q", None)]
    trained = rivals.Trained({}, {}, {"told": served, "base": [rivals.Served("base", "base", 0.0)]})
    means = {front.key("p", "helpful", 4): np.asarray([0.5]), front.key("q", "harmless", 4): np.asarray([0.75])}
    means |= {front.key("base", c, 4): np.asarray([0.25]) for c in common.CRITERIA}
    assert front.points(trained, "told", 4, means).tolist() == [[[0.5, 0.75]]]
    assert front.volume(trained, "told", 4)(means) == pytest.approx([0.125])
    assert front.total(trained, "told", 4)(means) == pytest.approx([1.25])


def test_a_mix_of_one_criterion_only_is_that_criterions_own_best_of_4(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(mixed_preference, "MIXES", (1.0,))
    names = {name for mix in (1.0,) for name in mixed_preference._policies(mix)}
    scores = {
        (name, c): Scores(rng.normal(size=(3, 8)), rng.random((3, 8)), []) for name in names for c in common.CRITERIA
    }
    values = mixed_preference.serve(front.Measured(rivals.Trained({}, {}, {}), scores, {}, {}))
    expected = common.values(bon(4), scores["iama-w50", "helpful"])
    assert values[mixed_preference.key("iama", 1.0, "helpful")] == pytest.approx(expected)
    base = scores["base", "helpful"].gold
    assert values[mixed_preference.key("iama", 1.0, "mixed")] == pytest.approx((expected - base.mean()) / base.std())
