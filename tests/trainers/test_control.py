"""What steers a run besides its weights: beta, running values, the chi-squared penalty, dropped completions."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from iama.config.files import KLConfig
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.objective.aggregates import parse_aggregate
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from iama.objective.regularisation import chi_squared, chi_squared_advantages
from iama.prompts.data import load_prompts
from tests.trainers.test_nonlinear_grpo import grpo_args, length, script, vowels
from trainers import control
from trainers.control import RollOuts, RunControl, RunningMean, check_kl, describe_kl, next_beta
from trainers.nonlinear_grpo import NonlinearGRPOTrainer
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def train(config):
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    trainer.train()
    return trainer, [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def trainer_of(tiny, folder, args=None, rewards=(length, vowels), aggregate="sum", **extra):
    """A plain script's trainer, two groups of four a step, with an adapter that moves the policy."""
    criteria = [Criterion(reward.__name__, bon(2)) for reward in rewards]
    objective = Objective(criteria, aggregate=parse_aggregate(aggregate))
    trainer = script(NonlinearGRPOTrainer, tiny, folder, args, rewards, objective=objective, **extra)
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.model.train()
    return trainer


def roll_out(trainer, tiny):
    return trainer._generate_and_score_completions([row for row in load_prompts(tiny.prompts)[:2] for _ in range(4)])


def gathered(trainer):
    return trainer._gathered_rewards.double().numpy().reshape(2, 4, -1)


# --- KL control


def test_the_controller_turns_beta_towards_the_target():
    how = {"target": 0.1, "gain": 0.3}
    for has_reached in (False, True):
        assert next_beta(0.2, 0.1, **how, has_reached=has_reached) == 0.2
        assert next_beta(0.2, 0.15, **how, has_reached=has_reached) == pytest.approx(0.2 * math.exp(0.15))
        assert next_beta(0.2, 9.0, **how, has_reached=has_reached) == pytest.approx(0.2 * math.exp(0.3))
    assert next_beta(0.2, 0.0, **how, has_reached=False) == pytest.approx(0.2 * math.exp(-0.06))
    assert next_beta(0.2, 0.0, **how, has_reached=True) == pytest.approx(0.2 * math.exp(-0.3))


def test_a_noisy_kl_settles_at_its_target():
    """KL = 0.1 / beta, measured with a spread of half its size."""
    rng, beta, has_reached, found = np.random.default_rng(0), 10.0, False, []
    sigma = math.sqrt(math.log(1 + 0.5**2))
    for _ in range(5000):
        found.append(0.1 / beta)
        measured = found[-1] * math.exp(sigma * rng.normal() - sigma**2 / 2)
        has_reached = has_reached or measured >= 0.1
        beta = next_beta(beta, measured, target=0.1, gain=0.1, has_reached=has_reached)
    assert found[0] == 0.01
    assert np.mean(found[1000:]) == pytest.approx(0.1, rel=0.05)


@pytest.mark.slow
def test_beta_follows_the_logged_kl_step_by_step(make_config):
    trainer, rows = train(make_config(kl={"target": 0.01, "gain": 0.5}, trainer__max_steps=4))
    expected, has_reached = 0.1, False
    for row in rows:
        assert row["beta"] == expected
        has_reached = has_reached or row["kl_per_token"] >= 0.01
        expected = next_beta(expected, row["kl_per_token"], 0.01, 0.5, has_reached=has_reached)
    assert trainer.beta == expected
    assert len({row["beta"] for row in rows}) == 4


@pytest.mark.slow
def test_a_step_of_several_micro_batches_counts_once_with_their_mean(make_config):
    config = make_config(
        kl={"target": 0.01, "gain": 0.5},
        trainer__per_device_train_batch_size=4,
        trainer__gradient_accumulation_steps=2,
        trainer__logging_steps=2,
    )
    trainer, rows = train(config)
    first = next_beta(0.1, 0.0, 0.01, 0.5, has_reached=False)  # the policy starts as the reference
    second_kl = 2 * rows[0]["kl_per_token"]  # the line holds the mean of both steps
    second = next_beta(first, second_kl, 0.01, 0.5, has_reached=second_kl >= 0.01)
    assert rows[0]["beta"] == pytest.approx((0.1 + first) / 2)
    assert trainer.beta == pytest.approx(second)


def test_roll_outs_have_the_same_numbers_again_after_a_restart():
    whole = RollOuts()
    for step in range(2):
        whole.next(step, "train")
        whole.next(step, "train")  # two roll-out batches a step
        whole.next(step, "eval")
    resumed = RollOuts()
    assert [whole.next(2, "train") for _ in range(2)] == [resumed.next(2, "train") for _ in range(2)]
    assert resumed.next(2, "train") == (2, 2, 0)
    assert resumed.next(2, "eval") == (2, 0, 1)


def test_weights_from_a_simplex_are_those_of_the_seed_and_the_step(tiny, tmp_path):
    criteria = [Criterion("length", bon(2)), Criterion("vowels", bon(2))]
    objective = Objective(criteria, weights="simplex")
    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, objective=objective)
    trainer.model.train()
    for step, number in ((0, 0), (0, 1), (3, 0)):
        trainer.state.global_step = step
        output = roll_out(trainer, tiny)
        weights_PK = objective.draw_weights(2, [trainer.args.seed, step, number, 0])
        np.testing.assert_array_equal(trainer.drawn_weights_PK, weights_PK)  # which `samples/` shows
        expected = objective.advantages(gathered(trainer), weights_PK=weights_PK)
        np.testing.assert_allclose(output["advantages"], expected.reshape(-1), atol=1e-5)


@pytest.mark.slow
def test_beta_stays_in_reach(make_config, monkeypatch):
    monkeypatch.setattr(control, "BETA_RANGE", 1.1)
    with pytest.warns(IamaWarning, match=r"stops there: kl.target = 1000 nats a token is out of reach"):
        trainer, rows = train(make_config(kl={"target": 1000.0, "gain": 1.0}))
    assert trainer.beta == 0.1 / 1.1
    assert rows[1]["beta"] == pytest.approx(0.1 / 1.1)


@pytest.mark.slow
def test_a_fixed_beta_needs_no_callback(make_config):
    trainer, rows = train(make_config())
    assert [row["beta"] for row in rows] == [0.1, 0.1]
    assert not any(isinstance(callback, RunControl) for callback in trainer.callback_handler.callbacks)
    assert {"chi2", "dropped"}.isdisjoint(rows[0])
    assert "weight" not in rows[0]["criteria"]["helpful"]


@pytest.mark.slow
def test_a_checkpoint_from_before_says_so(tiny, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tiny, tmp_path, grpo_args(tmp_path, max_steps=1, **args)).train()
    later = trainer_of(tiny, tmp_path, grpo_args(tmp_path, **args), kl=KLConfig(target=0.1))
    with pytest.warns(IamaWarning, match="the checkpoint of step 1 holds no beta or running values"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("kl", [KLConfig(target=0.1), KLConfig(chi2=0.5)])
def test_without_a_reference_nothing_regularises(kl, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"^kl\.(target = 0.1|chi2 = 0.5) needs a reference policy"):
        check_kl(kl, 0.0)
    check_kl(KLConfig(), 0.0)
    with pytest.raises(ConfigError, match="needs a reference policy"):
        trainer_of(tiny, tmp_path, grpo_args(tmp_path, beta=0.0), kl=kl)


def test_the_control_in_force_is_told():
    assert describe_kl(KLConfig(), 0.1) == "beta 0.1"
    assert describe_kl(KLConfig(target=0.05, chi2=0.3), 0.1) == (
        "beta 0.1 at first, steered to a KL of 0.05 nats a token (gain 0.1), plus 0.3 * chi2(policy || reference)"
    )


# --- running values


@given(st.floats(0, 0.99), st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=1, max_size=8))
def test_the_running_mean_is_the_weighted_mean_of_all_batches(decay, batches):
    running = RunningMean(decay, [0.0, 0.0])
    assert np.isnan(running.means()).all()
    for batch in batches:
        running.update(np.array(batch))
        running.update(np.array([math.nan, math.nan]))  # no value, no change
    weights = decay ** np.arange(len(batches))[::-1]
    expected = np.average(batches, axis=0, weights=weights)
    np.testing.assert_allclose(running.means(), expected, atol=1e-9)


def test_a_criterion_that_a_batch_lacks_keeps_its_mean():
    running = RunningMean(0.5, [0.0, 0.0])
    for batch, expected in (
        ([1.0, math.nan], [1.0, math.nan]),  # no value yet
        ([2.0, 8.0], [5 / 3, 8.0]),
        ([math.nan, 2.0], [5 / 3, 4.0]),
    ):
        running.update(np.array(batch))
        assert running.means().tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_an_aggregate_takes_its_weights_from_the_running_values(make_config):
    trainer, rows = train(make_config(objective__aggregate="smooth_min(5)", objective__running_mean_decay=0.5))
    running = RunningMean(0.5, [0.0, 0.0])
    for row in rows:
        criteria = row["criteria"].values()
        running.update(np.array([c["value"] for c in criteria]))
        assert [c["running"] for c in criteria] == running.means().tolist()
        assert [c["weight"] for c in criteria] == trainer.objective.slopes(running.means()).tolist()
    assert rows[0]["criteria"]["helpful"]["running"] == pytest.approx(rows[0]["criteria"]["helpful"]["value"])


def test_running_values_shape_the_advantages_and_evaluation_leaves_them_alone(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, aggregate="smooth_min(0.5)")
    roll_out(trainer, tiny)
    first = trainer.objective.values_K(gathered(trainer))
    output = roll_out(trainer, tiny)
    running_values_K = (0.9 * first + trainer.objective.values_K(gathered(trainer))) / 1.9
    expected = trainer.objective.advantages(gathered(trainer), running_values_K)
    np.testing.assert_allclose(output["advantages"], expected.reshape(-1), rtol=1e-5)
    trainer.model.eval()
    before = trainer._running.means()
    roll_out(trainer, tiny)
    np.testing.assert_array_equal(trainer._running.means(), before)


# --- chi-squared penalty


def exact_log_ratios(trainer, output):
    """Log-ratios of whole completions from plain forward passes, row by row, without TRL."""
    result = []
    for row in range(len(output["completion_ids"])):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            policy = trainer.model(input_ids=ids).logits
            with trainer.model.disable_adapter():
                reference = trainer.model(input_ids=ids).logits
        logps = [torch.log_softmax(logits[0, :-1] / trainer.temperature, dim=-1) for logits in (policy, reference)]
        chosen = [rows.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item() for rows in logps]
        result.append(chosen[0] - chosen[1])
    return np.array(result).reshape(2, 4)


@pytest.mark.filterwarnings("ignore:.*groups of an older policy:iama.errors.IamaWarning")
@pytest.mark.parametrize("misaligned", [False, True])
def test_the_penalty_folds_into_the_advantages(tiny, tmp_path, misaligned):
    # With two steps a generation TRL keeps the old log-probabilities; else they are computed once more.
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2} if misaligned else {}
    args = grpo_args(tmp_path, temperature=0.7, **changes)
    trainer = trainer_of(tiny, tmp_path, args, kl=KLConfig(chi2=0.3))
    output = roll_out(trainer, tiny)
    assert ("old_per_token_logps" in output) == misaligned
    log_ratios_PG = exact_log_ratios(trainer, output)
    assert np.abs(log_ratios_PG).max() > 0.1
    penalty = chi_squared_advantages(log_ratios_PG, 0.3)
    expected = trainer.objective.advantages(gathered(trainer)) + penalty
    np.testing.assert_allclose(output["advantages"], expected.reshape(-1), rtol=1e-3, atol=1e-4)
    assert trainer._metrics["train"]["chi2"] == [pytest.approx(chi_squared(log_ratios_PG), rel=1e-3)]


def test_completions_that_trl_masks_are_not_penalised_and_leave_their_group(tiny, tmp_path):
    with pytest.warns(
        IamaWarning, match="mask_truncated_completions = True trains the value of the completions that end"
    ):
        trainer = trainer_of(
            tiny, tmp_path, grpo_args(tmp_path, mask_truncated_completions=True), kl=KLConfig(chi2=0.3)
        )
    with pytest.warns(IamaWarning, match=r"of 2 groups hold fewer than 2 completions that end, which bon\(2\) needs"):
        output = roll_out(trainer, tiny)
    masked = output["completion_mask"].sum(dim=1) == 0
    assert masked.any()
    assert trainer._log_ratios(output).isnan().equal(masked)
    assert torch.isfinite(output["advantages"]).all()
    assert (output["advantages"][masked] == 0).all()


@pytest.mark.slow
def test_the_first_step_has_no_penalty_and_the_log_tells(make_config):
    _, rows = train(make_config(kl={"chi2": 0.1}))
    assert rows[0]["chi2"] == pytest.approx(0.0, abs=1e-5)
    assert rows[1]["chi2"] != 0.0


# --- completions without a score


def holes(prompts, **kwargs):
    """Scores with a hole in the first group, none in the second."""
    return [None if i == 1 else float(i) for i, _ in enumerate(prompts)]


def test_a_completion_without_a_score_leaves_its_group(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, rewards=(length, holes), on_nan="drop")
    with pytest.warns(IamaWarning, match=r"'holes' returned None or NaN for the prompt .*how to bake bread.*drop"):
        output = roll_out(trainer, tiny)
    roll_out(trainer, tiny)  # warned once
    metrics = trainer._metrics["train"]
    assert metrics["dropped"] == [1.0, 1.0]
    assert metrics["rewards/holes/mean"][0] == pytest.approx(27 / 7)
    assert output["advantages"][1] == 0.0
    assert all(math.isfinite(value) for values in metrics.values() for value in values)


def test_what_is_dropped_counts_nowhere(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, rewards=(length, holes), on_nan="drop", kl=KLConfig(chi2=0.3))
    with pytest.warns(IamaWarning, match="'holes'"):
        output = roll_out(trainer, tiny)
    rewards, log_ratios_PG = gathered(trainer), exact_log_ratios(trainer, output)
    kept = [0, 2, 3]
    expected = trainer.objective.advantages(rewards[:1, kept]) + chi_squared_advantages(log_ratios_PG[:1, kept], 0.3)
    np.testing.assert_allclose(output["advantages"][kept], expected[0], rtol=1e-3, atol=1e-4)
    assert output["advantages"][1] == 0.0
    kept_rewards = np.delete(rewards.reshape(8, 2), 1, axis=0).sum(axis=1)
    assert "reward" not in trainer._metrics["train"]
    assert trainer._metrics["train"]["linear_sum/mean"] == [pytest.approx(kept_rewards.mean())]


def test_an_infinite_reward_is_always_an_error(tiny, tmp_path):
    def endless(prompts, **kwargs):
        return [None, *[math.inf] * (len(prompts) - 1)]

    trainer = trainer_of(tiny, tmp_path, rewards=(endless,), on_nan="drop")
    with pytest.raises(RewardError, match=r"'endless' returned inf for the prompt"):
        roll_out(trainer, tiny)


def nothing(completions, **kwargs):
    return [None] * len(completions)


def some(completions, **kwargs):
    return [None if i % 3 == 0 else float(i) for i, _ in enumerate(completions)]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "dropped"), [("some", 3.0), ("nothing", 8.0)])
def test_a_run_with_dropped_completions(make_config, function, dropped):
    first, second = (c.model_dump() for c in make_config().objective.criteria)
    first["proxy"] = {"function": f"{__file__}:{function}"}
    config = make_config(
        objective={"criteria": [first, second], "on_nan": "drop", "aggregate": "min"}, kl={"chi2": 0.1, "target": 0.1}
    )
    alarm = pytest.warns(IamaWarning, match="8 completions left their groups for want of a score")
    with (
        pytest.warns(IamaWarning, match="'helpful' returned None or NaN"),
        alarm if function == "nothing" else nullcontext(),
    ):
        _, rows = train(config)
    assert [row["dropped"] for row in rows] == [dropped, dropped]
    assert (rows[0]["criteria"]["harmless"]["value"] is None) == (function == "nothing")
    assert all(math.isfinite(row["loss"]) for row in rows)
