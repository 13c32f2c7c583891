"""Best-of-N that stops, as it is served: the draws of plain Best-of-N, fewer of them, and what all of them cost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from iama.cli.app import app
from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError, IamaWarning
from iama.objective.operators import parse_operator
from iama.prompts.conversations import render_prompts
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine.decode import HeldPrompts, decode
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import pool_of
from inference.engine.rows import Rows
from inference.samplers.best_of import draw, score
from inference.samplers.serve import check_served, needs_target, read_method, serve, stopped_of, with_target
from inference.selection.stopping import upper_reward

TEXTS = ("how to bake bread", "fix a bike", "mix water then flour", "to bake", "a bike")
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
SAMPLING = Sampling(max_new_tokens=12)
COUNTED = ("policy_prefill_tokens", "policy_decode_tokens", "reward_calls", "reward_tokens", "sequential_steps")


@pytest.fixture(scope="module")
def reward(reward_spec):
    return load_reward("proxy", reward_spec)


def median_of(policy, reward) -> float:
    pool = score(draw(policy, PROMPTS, 9, SAMPLING, seed=1, batch_size=64), reward)
    return float(np.quantile([c.reward for row in pool.samples for c in row], 0.8))


@pytest.mark.parametrize("width", [1, 3, 4])
def test_the_draws_are_the_first_ones_of_plain_best_of_n(policy64, reward, width):
    tau = median_of(policy64, reward)
    method = f"bon(9, stop=target(0.8, threshold={tau:.4f}), width={width})"
    plain = serve(policy64, reward, "bon(9)", SAMPLING).sample(PROMPTS, seed=1)
    early = serve(policy64, reward, method, SAMPLING).sample(PROMPTS, seed=1)
    counts = [len(c.candidates) for c in early]
    for one, other, count in zip(early, plain, counts, strict=True):
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates[:count]]
        rewards = [c.reward for c in other.candidates]
        ends = [*range(width, 9, width), 9]
        assert count == next((end for end in ends if max(rewards[:end]) >= round(tau, 4)), 9)
        assert one.reward == pytest.approx(max(rewards[:count]), abs=1e-6)
        assert one.capped == (count == 9)
    assert min(counts) < 9


@pytest.mark.parametrize("stop", ["pandora(1e9)", "pandora(1e-9)", "beacon(1e9)", "beacon(1e-9)", "pandora(0.12)"])
@pytest.mark.parametrize("width", [1, 2])
def test_an_answer_is_capped_where_all_draws_were_made(policy64, reward, stop, width):
    answers = serve(policy64, reward, f"bon(4, stop={stop}, width={width})", SAMPLING).sample(PROMPTS, seed=2)
    assert [one.capped for one in answers] == [len(one.candidates) == 4 for one in answers]
    if stop.endswith("(1e-9)"):
        assert all(one.capped for one in answers)


@pytest.mark.parametrize("method", ["bon(7, stop=pandora(0.12), width=2)", "bon(7, stop=beacon(0.12))"])
def test_an_answer_depends_on_its_prompt_and_the_seed_alone(policy64, reward, method):
    sampler = serve(policy64, reward, method, SAMPLING, batch_size=4)
    together = sampler.sample(PROMPTS, seed=2)
    for prompt, one in zip(PROMPTS, together, strict=True):
        (alone,) = sampler.sample([prompt], seed=2)
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in alone.candidates]
        assert (one.text, one.chosen, one.capped) == (alone.text, alone.chosen, alone.capped)
        assert [getattr(one.cost, unit) for unit in COUNTED] == [getattr(alone.cost, unit) for unit in COUNTED]
    assert len({len(c.candidates) for c in together}) > 1


def test_repeated_prompts_keep_draws_of_their_own(policy64, reward):
    twice = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    plain = serve(policy64, reward, "bon(6)", SAMPLING).sample(twice, seed=1)
    early = serve(policy64, reward, "bon(6, stop=beacon(0.08), width=2)", SAMPLING).sample(twice, seed=1)
    for one, other in zip(early, plain, strict=True):
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates[: len(one.candidates)]]


def test_the_ledger_adds_up_over_rounds(policy64, reward):
    """All tokens, kept or not; the policy reads the prompt once, and steps follow those of the rounds before."""
    (completion,) = serve(policy64, reward, "bon(5, stop=pandora(1e-9), width=2)", SAMPLING).sample(PROMPTS[:1], seed=1)
    plain = draw(policy64, PROMPTS[:1], 5, SAMPLING, seed=1, batch_size=8)
    rounds = [plain.samples[0][:2], plain.samples[0][2:4], plain.samples[0][4:]]
    assert [c.token_ids for c in completion.candidates] == [c.token_ids for c in plain.samples[0]]
    read = [score(pool_of(PROMPTS[:1], [drawn], [Cost()]), reward).costs[0] for drawn in rounds]
    cost, (once,) = completion.cost, plain.costs
    assert cost.policy_prefill_tokens == once.policy_prefill_tokens > 0
    assert cost.policy_decode_tokens == once.policy_decode_tokens
    assert cost.flops == pytest.approx(once.flops + sum(c.flops for c in read))
    assert (cost.reward_calls, cost.reward_tokens) == (5, sum(c.reward_tokens for c in read))
    longest = [max(len(c.token_ids) for c in drawn) for drawn in rounds]
    assert cost.sequential_steps == 1 + sum(length - 1 for length in longest) + sum(c.sequential_steps for c in read)


def test_rounds_hold_their_prompts_whatever_the_batch_and_the_memory(policy64, monkeypatch):
    """Draws of `iter_decode`, with fewer rows than samples, and where memory runs out in the second round."""
    ids = render_prompts(policy64.tokenizer, PROMPTS, policy64.eos_token_ids, "policy")
    expected, _ = decode(policy64, ids, 6, SAMPLING, seed=3, batch_size=64)
    how = {"seed": 3, "batch_size": 3, "keys": prompt_keys(ids)}

    def tokens(held: HeldPrompts) -> list[list]:
        rounds = [held.draw(range(len(ids)), first, 3) for first in (0, 3)]
        return [[r.token_ids for drawn in rounds for r in drawn[i][0]] for i in range(len(ids))]

    wanted = [[r.token_ids for r in row] for row in expected]
    assert tokens(HeldPrompts(policy64, ids, SAMPLING, **how)) == wanted
    held = HeldPrompts(policy64, ids, SAMPLING, **how)
    first = held.draw(range(len(ids)), 0, 3)
    held.let_go([1])
    real, calls = Rows.extend, []

    def short(self, slots, ids):
        calls.append(len(slots))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, slots, ids)

    monkeypatch.setattr(Rows, "extend", short)
    with pytest.warns(IamaWarning, match="out of memory with 3 rows"):
        second = held.draw([0, 2, 3, 4], 3, 3)
    for i in second:
        assert [r.token_ids for r in (*first[i][0], *second[i][0])] == wanted[i]
        assert second[i][1].policy_prefill_tokens == 0


def test_columns_go_with_the_prompts_that_still_go_on(policy64):
    seen = []

    def rewards(prompts, completions, wanted, **_):
        seen.append(list(wanted))
        return [float(w == 0) for w in wanted]

    scorer = reward_from_function(rewards, "wanted")
    sampler = serve(policy64, scorer, "bon(3, stop=target(0.5, threshold=1))", SAMPLING)
    completions = sampler.sample(PROMPTS[:3], seed=0, columns={"wanted": [1, 0, 2]})
    assert [len(c.candidates) for c in completions] == [3, 1, 3]
    assert sorted(w for row in seen for w in row) == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("given", "stop"),
    [("target(0.8)", "target(0.8, threshold="), ("pandora(0.01, law=calibrated)", "pandora(0.01, th")],
)
def test_a_missing_threshold_is_measured_on_the_prompts(policy, reward, given, stop):
    method = read_method(f"bon(4, stop={given}, width=2)")
    check_served(method, SAMPLING)
    assert needs_target(method, SAMPLING)
    with pytest.raises(ConfigError, match="has to be measured; write it"):
        serve(policy, reward, method, SAMPLING)
    measured, cost = with_target(policy, reward, method, PROMPTS[:1], SAMPLING, seed=3)
    assert measured.text.startswith(f"bon(4, stop={stop}")
    assert measured.text.endswith(", width=2)")
    assert cost.reward_calls == 16
    rewards = [
        c.reward for c in score(draw(policy, PROMPTS[:1], 16, SAMPLING, seed=4, batch_size=8), reward).samples[0]
    ]
    threshold = stopped_of(measured).rule.threshold
    if "target" in given:
        assert threshold == pytest.approx(upper_reward(np.asarray(rewards), 0.8), rel=1e-4)
    else:
        assert np.maximum(np.asarray(rewards) - threshold, 0).mean() == pytest.approx(0.01, abs=1e-4)
    assert with_target(policy, reward, measured, PROMPTS[:1], SAMPLING, seed=3) == (measured, Cost())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bon(4, stop=often)", "stop = 'often' is no stopping rule; write one of pandora"),
        ("bon(4, stop=pandora(0))", "cost: Input should be greater than 0"),
        ("bon(4, stop=target(1))", "quantile: Input should be less than 1"),
        ("bon(4, stop=target(0.9), width=0)", "width: Input should be greater than or equal to 1"),
        ("bon(4, stop=target(0.9), width=5)", "a round of width = 5 exceeds n = 4; write at most width=4"),
        ("bon(4, width=2)", "width belongs to a stopping rule"),
        ("bon(4, stop=beacon(0.1, mean=1))", "mean, sd and weight (at least 2) go together"),
        ("bop(4, stop=target(0.9))", "write bon(4, stop=target(0.9))"),
        ("bon(4, stop=pandora(0.1, 2))", "'2' is no setting"),
    ],
)
def test_what_is_no_stopping_rule_is_refused(method, words):
    with pytest.raises(ConfigError) as error:
        check_served(read_method(method), SAMPLING)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_training_refuses_stopping_and_says_what_to_write():
    with pytest.raises(ConfigError, match=r"write bon\(16\)"):
        parse_operator("bon(16, stop=pandora(0.1), width=4)")
    with pytest.raises(ConfigError, match=r"write bop\(mu=3\)"):
        parse_operator("bop(mu=3, stop=pandora(0.1))")


def test_stopping_needs_a_reward(policy):
    with pytest.raises(ConfigError, match="stops by a reward"):
        serve(policy, None, "bon(4, stop=pandora(0.1))", SAMPLING)


def test_generate_tells_the_draws(tiny):
    method = "bon(5, stop=target(0.5), width=2)"
    words = ["generate", "--policy", str(tiny.policy), "--reward", str(tiny.reward), "--prompt", "fix a bike"]
    result = CliRunner().invoke(app, [*words, "--max-new-tokens", "6", "--method", method, "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert "cost of measuring the target" in result.output
    assert re.search(r"draws: [245] of at most 5, in [123] rounds? of 2", result.output)
    assert "threshold=" in result.output
