"""Alarms, on made-up lines of `metrics.jsonl` and in real runs."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from iama.config.files import WatchConfig
from iama.errors import IamaWarning
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from tests.processes import run_python
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan
from trainers.run.watch import Watch, covariance_with_advantages_K, effective_prompts, lift_K, silent_share

ROOT = Path(__file__).parents[3]
UNENDED = "ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning"


def line(step, gold=None, kl=0.01, clipped=0.0, silent=0.0, **criterion):
    values = {"mean": 0.0, "value": 0.5, "lift": 1.0, "gold": gold} | criterion
    return {
        "step": step,
        "criteria": {"helpful": values},
        "kl_per_token": kl,
        "clipped_ratio": clipped,
        "silent_groups": silent,
    }


def causes(rows, watch=None, **config):
    """The causes at each row."""
    watch = watch or Watch(WatchConfig(**config), ["helpful"])
    return [[alarm.cause for alarm in watch.look(row)] for row in rows]


def noisy(number, seed=0, **trends):
    """Rows whose numbers go from one value to another, with noise of 0.1."""
    rng = np.random.default_rng(seed)
    tracks = {key: np.linspace(*ends, number) + rng.normal(0, 0.1, number) for key, ends in trends.items()}
    return [line(i + 1, **{key: float(track[i]) for key, track in tracks.items()}) for i in range(number)]


def test_hacking_is_gold_below_its_best_block_while_the_proxy_is_above():
    up = noisy(60, mean=(0, 1), gold=(0, 1))
    down = noisy(60, mean=(1, 2), gold=(1, 0))
    rows = [{**row, "step": i + 1} for i, row in enumerate([*up, *down])]
    found = causes(rows)
    assert not any(found[:79])  # the first block after the turn ends at row 80
    first = next(i for i, names in enumerate(found) if names)
    assert first + 1 in (80, 100)
    assert found[-1] == ["hacking:helpful"]


@pytest.mark.parametrize(
    "trends",
    [
        {"mean": (0, 1), "gold": (0, 1)},  # both rise
        {"mean": (1, 0), "gold": (1, 0)},  # both fall: training is bad, and nothing is hacked
        {"mean": (0, 1)},  # no gold
    ],
)
def test_no_hacking_alarm(trends):
    assert not any(causes(noisy(120, **trends)))


def test_noise_alone_alarms_rarely():
    """A flat gold beside a rising proxy is the hardest case; of 200 runs of 200 steps at most 4 may alarm."""
    alarmed = sum(any(causes(noisy(200, seed, mean=(0, 1), gold=(0, 0)))) for seed in range(200))
    assert alarmed <= 4


def test_the_message_names_the_steps_and_what_to_do():
    watch = Watch(WatchConfig(), ["helpful"])
    rows = [*noisy(20, mean=(0, 0), gold=(1, 1)), *noisy(20, mean=(1, 1), gold=(0, 0))]
    told = [alarm.message for i, row in enumerate(rows) for alarm in watch.look({**row, "step": i + 1})]
    assert told[0].startswith("step 40: 'helpful' may be hacked: since steps 1 to 20 its proxy rose from")
    assert "checkpoint" in told[0]
    assert "\n" not in told[0]


def test_a_mode_has_vanished_when_lift_and_value_fell():
    rows = noisy(80, lift=(2, 0.0), value=(1, -1))
    found = causes(rows)
    assert not any(found[:39])  # over steps 21 to 40 the lift is above half of what it was
    assert found[-1] == ["vanished:helpful"]


@pytest.mark.parametrize(
    "trends",
    [
        {"lift": (2, 0), "value": (0, 1)},  # all completions became good
        {"lift": (2, 1.5), "value": (1, -1)},  # good ones stay in reach
    ],
)
def test_a_mode_that_has_not_vanished(trends):
    assert not any(causes(noisy(80, **trends)))


def test_kl_alarms_after_three_bad_steps_and_knows_the_target():
    rows = [line(i + 1, kl=kl) for i, kl in enumerate([0.1, 5.0, 0.1, 2.0, 2.0, 2.0])]
    assert [bool(names) for names in causes(rows)] == [False] * 5 + [True]
    watch = Watch(WatchConfig(), ["helpful"], kl_target=0.02)
    rows = [line(i + 1, kl=0.3) for i in range(3)]  # above ten times the target, below 1
    assert causes(rows, watch)[-1] == ["kl"]
    assert not any(causes([line(i + 1, kl=None) for i in range(5)]))  # beta 0: not measured


def test_clipped_and_silent_have_thresholds():
    assert causes([line(1, clipped=0.2), line(2, clipped=0.21)]) == [[], ["clipped"]]
    rows = [line(i + 1, silent=share) for i, share in enumerate([0.9, 0.9, 0.9, 0.0, 0.0])]
    assert causes(rows) == [[], [], ["silent"], ["silent"], []]
    assert causes(rows, silent=0.95) == [[]] * 5


def test_each_cause_is_told_once_also_after_a_restart():
    rows = [line(i + 1, clipped=0.5) for i in range(4)]
    watch = Watch(WatchConfig(), ["helpful"])
    told = [watch.unsaid(watch.look(row)) for row in rows]
    assert [len(alarms) for alarms in told] == [1, 0, 0, 0]
    again = Watch(WatchConfig(), ["helpful"])
    again.replay(rows[:2])
    assert not again.unsaid(again.look(rows[2]))


@given(st.integers(0, 2**32 - 1), st.integers(0, 90))
def test_a_continued_watch_sees_what_an_uninterrupted_one_sees(seed, cut):
    rows = noisy(90, seed, mean=(0, 2), gold=(1, -1), lift=(2, 0), value=(1, 0))
    whole = causes(rows, window=7)
    again = Watch(WatchConfig(window=7), ["helpful"])
    again.replay(rows[:cut])
    assert causes(rows[cut:], again) == whole[cut:]


# ------------------------------------------------------------------ what the trainer measures


def test_silence_is_measured_on_advantages_and_not_on_rewards():
    rewards_PGK = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])[..., None]
    advantages = Objective([Criterion("helpful", bon(2))]).advantages(rewards_PGK)
    assert silent_share(advantages, rewards_PGK) == 0.5
    # Rewards differ in every group, and only under a criterion that the aggregate gives no weight.
    assert silent_share(np.zeros((2, 4)), rewards_PGK) == 1.0


@given(hnp.arrays(np.float64, (3, 4, 2), elements=st.floats(-1e3, 1e3) | st.just(np.nan)))
def test_lift_is_a_slow_loops(rewards_PGK):
    for k, lift in enumerate(lift_K(rewards_PGK)):
        groups = [group[~np.isnan(group)] for group in rewards_PGK[:, :, k]]
        lifts = [group.max() - group.mean() for group in groups if len(group)]
        expected = np.mean(lifts) if lifts else np.nan
        np.testing.assert_allclose(lift, expected, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2])
def test_the_covariance_is_unbiased_over_all_groups(n):
    p, rewards_YK = np.array([0.2, 0.5, 0.3]), np.array([[0.0, 1.0], [1.0, 0.2], [0.4, 0.4]])
    groups = np.array(list(itertools.product(range(3), repeat=4)))
    advantages_PG = Objective([Criterion("a", bon(n)), Criterion("b", bon(n), 0.5)]).advantages(rewards_YK[groups])
    each = [
        covariance_with_advantages_K(a[None], rewards_YK[g][None]) for a, g in zip(advantages_PG, groups, strict=True)
    ]
    phi = sum(w * bon(n).first_variation(p, r) for w, r in zip((1.0, 0.5), rewards_YK.T, strict=True))
    exact = [p @ (r * phi) - (p @ r) * (p @ phi) for r in rewards_YK.T]
    np.testing.assert_allclose(p[groups].prod(axis=1) @ np.array(each), exact, atol=1e-12)


def test_the_covariance_is_taken_within_prompts_and_without_holes():
    rewards = np.array([[[0.0], [2.0], [np.nan]], [[10.0], [10.0], [10.0]], [[np.nan]] * 3])
    advantages = np.array([[-1.0, 1.0, 0.0], [5.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    assert covariance_with_advantages_K(advantages, rewards) == pytest.approx([(1.0 + 0.0) / 2])
    assert np.isnan(covariance_with_advantages_K(advantages, np.full((3, 3, 1), np.nan))).all()


def test_effective_prompts_by_hand():
    assert effective_prompts(np.array([[1.0, -1.0], [-1.0, 1.0]])) == 1.0
    assert effective_prompts(np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])) == 0.25
    assert effective_prompts(np.array([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx(3**2 / (2 * 5))  # masses of 2 and 1
    assert np.isnan(effective_prompts(np.zeros((2, 2))))


# ------------------------------------------------------------------ real runs

CONSTANT = """
def constant(completions, **columns):
    return [1.0 for _ in completions]
"""
HACKED = """
calls = {"proxy": 0, "gold": 0}

def counted(name, sign):
    def score(completions, **columns):
        calls[name] += 1
        return [sign * calls[name] + 0.01 * (i % 3) for i in range(len(completions))]
    return score

proxy, gold = counted("proxy", 1.0), counted("gold", -1.0)
"""


def rows_of(config):
    return [json.loads(text) for text in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def config_with(make_config, tmp_path, code, **changes):
    (tmp_path / "rewards.py").write_text(code)
    names = [word.split("(")[0] for word in ("proxy", "gold")]
    functions = {name: {"function": f"{tmp_path / 'rewards.py'}:{name}"} for name in names}
    criterion = {"name": "helpful", "operator": "bon(2)", **functions}
    if "gold" not in code:
        criterion = {"name": "helpful", "proxy": {"function": f"{tmp_path / 'rewards.py'}:constant"}}
    return make_config(objective__criteria=[{"operator": "bon(2)", **criterion}], **changes)


@pytest.mark.slow
@pytest.mark.filterwarnings(UNENDED)
def test_groups_without_a_signal_are_seen_in_a_run(make_config, tmp_path):
    config = config_with(make_config, tmp_path, CONSTANT, trainer__max_steps=3)
    with pytest.warns(IamaWarning, match="step 1: 100% of the groups carry no signal") as caught:
        build_trainer(make_plan(config, "test.yaml"), Console(quiet=True)).train()
    assert sum("no signal" in str(warning.message) for warning in caught) == 1
    rows = rows_of(config)
    assert [row["silent_groups"] for row in rows] == [1.0, 1.0, 1.0]
    assert ["silent" in row["alarms"] for row in rows] == [True, False, True]
    assert rows[0]["criteria"]["helpful"]["lift"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_a_hacked_run_ends_where_that_is_asked_for(make_config, tmp_path, stop):
    watch = {"window": 5, "stop_on_hacking": stop}
    config = config_with(make_config, tmp_path, HACKED, trainer__max_steps=12, watch=watch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
        trainer.train()
    told = [str(warning.message) for warning in caught if "hacked" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("step 10: 'helpful' may be hacked: since steps 1 to 5")
    assert trainer.state.global_step == (10 if stop else 12)
    assert rows_of(config)[9]["alarms"][-1] == "hacking:helpful"
    assert any("the run ends here" in str(warning.message) for warning in caught) == stop


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(raw_config, tmp_path):
    (tmp_path / "rewards.py").write_text(HACKED)
    functions = {name: {"function": f"{tmp_path / 'rewards.py'}:{name}"} for name in ("proxy", "gold")}
    raw_config["objective"] = {"criteria": [{"name": "helpful", "operator": "bon(2)", **functions}]}
    raw_config["trainer"] |= {"max_steps": 12, "per_device_train_batch_size": 4}
    raw_config |= {"world_size": 2, "watch": {"window": 5, "stop_on_hacking": True}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw_config))
    done = run_python(["train_iama.py", "--config", tmp_path / "config.yaml"], num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("warning: step 10: the run ends here") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == list(range(1, 11))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_gradient_of_zero_is_an_alarm_unless_no_group_has_a_signal():
    row = {"step": 1, "criteria": {}, "silent_groups": 0.5}
    found = [[a.cause for a in Watch(WatchConfig(), []).look({**row, "grad_norm": norm})] for norm in (0.0, 0.1, None)]
    assert found == [["gradient"], [], []]
    silent = Watch(WatchConfig(), []).look({**row, "silent_groups": 1.0, "grad_norm": 0.0})
    assert [alarm.cause for alarm in silent] == ["silent"]
