"""The front and the search behind it: areas, points, the runs' configurations, both pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from scripts.experiments import frame, front, rivals, search
from scripts.experiments.front import hypervolume

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


def test_the_search_takes_the_best_proxy_within_the_limit_and_says_when_there_is_none(tmp_path):
    limit = search.MAX_KL
    rows = [row(0.1, limit, 1.0), row(0.05, limit, 2.0), row(0.01, 2 * limit, 9.0), row(0.05, 0.0, 1.5, rate=2e-3)]
    assert search.choose(rows) == rivals.Setting(4e-3, 0.05)
    assert search.choose(rows[2:3]) == rivals.Setting(4e-3, 0.01)
    search.write(tmp_path, {name: rows if name != "told" else rows[2:3] * 4 for name in rivals.LANES})
    text = (tmp_path / "search.md").read_text()
    assert (tmp_path / "data/search-runs.csv").read_text().count(",chosen\n") >= len(rivals.LANES)
    assert "No run of told ended within it" in text


@pytest.fixture
def fake_world(tmp_path, monkeypatch):
    """A world's folder without building it: what is tested reads only names and the stamp."""
    folder = tmp_path / "world-1"
    folder.mkdir()
    (folder / "stamp.json").write_text('{"sources_sha256": "0123456789abcdef"}')
    monkeypatch.setattr(frame, "world", lambda seed: folder)
    return folder


@pytest.mark.parametrize("name", [name for name in rivals.LANES if name != "told"])
def test_every_run_is_a_configuration_that_train_iama_accepts_and_has_no_gold(fake_world, name):
    lane = rivals.LANES[name]
    job = lane.job(1, rivals.Setting(4e-3, 0.05), weight=0.3, steps=7)
    config = load_config(frame.launch.ROOT / job.config, TrainingConfig, job.settings())
    assert [c.gold for c in config.objective.criteria] == [None] * len(lane.serves)
    weights = {"helpful": 0.3, "harmless": 0.7} if len(lane.serves) == 2 else {lane.serves[0]: 1.0}
    weights = {"helpful": 1.0, "harmless": 1.0} if lane.is_drawn else weights
    assert {c.name: c.weight for c in config.objective.criteria} == weights
    assert config.objective.weights == ("simplex" if name == "vpo" else "fixed")
    assert all(c.operator == lane.operator for c in config.objective.criteria)
    assert (config.trainer["beta"], config.trainer["max_steps"], config.world_size) == (0.05, 7, 1)
    assert config.output_dir == str(job.folder)
    assert config.name.endswith("in world 1 of 01234567")
    assert config.kl.target is None
    steered = lane.job(1, rivals.Setting(4e-3, 0.05), kl_target=0.2)
    assert load_config(frame.launch.ROOT / job.config, TrainingConfig, steered.settings()).kl.target == 0.2
    assert steered.folder != lane.job(1, rivals.Setting(4e-3, 0.05)).folder


def test_points_of_a_method_are_those_of_the_policies_that_serve_it():
    served = [rivals.Served("p", "q", None)]
    trained = rivals.Trained({}, {}, {"told": served, "base": [rivals.Served("base", "base", 0.0)]})
    means = {front.key("p", "helpful", 4): np.asarray([0.5]), front.key("q", "harmless", 4): np.asarray([0.75])}
    means |= {front.key("base", c, 4): np.asarray([0.25]) for c in frame.CRITERIA}
    assert front.points(trained, "told", 4, means).tolist() == [[[0.5, 0.75]]]
    assert front.volume(trained, "told", 4)(means) == pytest.approx([0.125])
    assert front.total(trained, "told", 4)(means) == pytest.approx([1.25])


@pytest.fixture
def seeds():
    """Two seeds of random values of everything that has a point on the front."""
    rng = np.random.default_rng(0)
    found = {}
    for seed in (10, 11):
        points = {
            m: [rivals._alone(rivals.pool_name(m, w), {}) for w in rivals.WEIGHTS] for m in ("iama", "grpo", "soup")
        }
        points |= {
            name: [rivals.Served(name, name, 0.1)] for name in ("stock", "vpo", "base", "iama-matched", "grpo-matched")
        }
        for name in ("told", "specialists1", "specialists4"):
            points[name] = [rivals.Served(f"{name}-helpful", f"{name}-harmless", 0.2)]
        pools = {point.policy(c) for some in points.values() for point in some for c in frame.CRITERIA}
        keys = [front.key(pool, c, n) for pool in sorted(pools) for c in frame.CRITERIA for n in front.SERVED]
        values = {key: rng.normal(size=6) for key in keys}
        found[seed] = front.Measured(rivals.Trained({}, {}, points), values, dict.fromkeys(pools, 0.1))
    return found


def test_the_page_has_every_method_and_verdict(seeds, tmp_path):
    front.write(tmp_path, seeds)
    text = (tmp_path / "front.md").read_text()
    assert text.count("Rivals above IAMA: ") == len(front.SERVED)
    assert "*VPO*" in text
    data = {path.stem.removeprefix("front-"): path.read_text() for path in (tmp_path / "data").glob("front-*.csv")}
    assert len(data["parts"].splitlines()) == 1 + len(front.claims(seeds))
    soups = [line for one in data.values() for line in one.splitlines() if "rewarded soups" in line]
    assert len(soups) == len(front.SERVED) * 2 + 1 + len(rivals.WEIGHTS)
    assert "nan" not in "".join([text, *data.values()])
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
