"""CARDS on vLLM: bounds of an entropy, how much is drawn, and law, ledger and cost against our own engine."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cards_reference import PROMPTS, SAMPLING, answers, double, having, kept_law, segment_law, text_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare, ks_2samp

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError
from iama.models.vllm import close_llm
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.engine.vllm import load_vllm_policy
from inference.samplers import serve, vllm_segments
from inference.samplers.cards import Cards, calibrate_target
from inference.samplers.vllm_segments import OVERRUN, entropy_bounds, piece_length

pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")
NEVER = 1e-4
"""A p-value that the fixed seeds below are far from; another law falls far below it."""


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.integers(1, 30))
def test_the_likeliest_tokens_bound_the_entropy(logits, num_top):
    log_probs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    exact = -(np.exp(log_probs) * log_probs).sum()
    top = np.sort(log_probs)[::-1][:num_top]
    least, greatest = entropy_bounds(top[None], len(logits))
    assert least[0] - 1e-9 <= exact <= greatest[0] + 1e-9
    if num_top >= len(logits):
        assert (least[0], greatest[0]) == (pytest.approx(exact), pytest.approx(exact))


def test_the_bounds_are_reached_and_hold_for_tokens_without_probability():
    even, steep = np.log([0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3]), np.log([0.4, 0.3, 0.3])
    assert entropy_bounds(even[None, :1], 4)[1][0] == pytest.approx(-(np.exp(even) * even).sum())
    assert entropy_bounds(steep[None, :2], 9)[0][0] == pytest.approx(-(np.exp(steep) * steep).sum())
    least, greatest = entropy_bounds(np.array([[math.log(0.5), math.log(0.5), -math.inf]]), 9)
    assert (least[0], greatest[0]) == (pytest.approx(math.log(2)), pytest.approx(math.log(2)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 6), st.integers(1, 12), st.floats(0, 1))
def test_pieces_are_as_long_as_their_waste_allows(lengths, num_drawn, most, waste):
    def fed(piece: int) -> float:
        """Tokens fed back, by going through the requests."""
        total = 0.0
        for tokens in missing:
            drawn = 0
            while drawn < tokens:
                drawn += piece
                total += piece - 1
            total -= (1 - waste) * (drawn - tokens)
        return total

    missing = [length + 1 - num_drawn for length in lengths if length >= num_drawn] or [num_drawn + 1]
    allowed = (1 + OVERRUN) * (sum(missing) - len(missing))
    piece = piece_length(lengths, num_drawn, most, waste)
    assert fed(piece) <= allowed + 1e-9
    assert all(fed(longer) > allowed - 1e-9 for longer in range(piece + 1, most + 1))


# With vLLM. ---------------------------------------------------------------------------------------------


class Counting:
    """A policy's `llm` whose requests are counted."""

    def __init__(self, llm) -> None:
        self._llm, self.llm_engine = llm, llm.llm_engine
        self.num_read = self.num_fed_back = self.num_open = 0

    def generate(self, requests, params, **arguments):
        outputs = self._llm.generate(requests, params, **arguments)
        for request, output in zip(requests, outputs, strict=True):
            self.num_read += len(request["prompt_token_ids"]) - output.num_cached_tokens
            self.num_fed_back += len(output.outputs[0].token_ids) - 1
        self.num_open += sum(given.logprobs == -1 for given in params)
        return outputs


@pytest.fixture(scope="module")
def ours(wide):
    policy = load_policy("base", PolicySpec(path=str(wide.policy)))
    return replace(policy, eos_token_ids=policy.eos_token_ids | {40, 41, 42})


@pytest.fixture(scope="module")
def theirs(wide, ours):
    settings = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 256, "block_size": 32}
    spec = PolicySpec(path=str(wide.policy), engine="vllm", vllm=settings)
    policy = load_vllm_policy("base", spec, SAMPLING)
    yield replace(policy, eos_token_ids=ours.eos_token_ids)
    close_llm(policy.llm)


@pytest.fixture(scope="module")
def reward(wide):
    return double(load_reward("proxy", RewardSpec(model=str(wide.reward))))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["soft", "hard"])
def test_first_segments_follow_the_law_of_rejection_sampling(ours, theirs, reward, acceptance):
    """Exact, by enumeration: what is accepted among the first proposals, and the best of all where none is."""
    prompt, count = "no thanks", 900
    sampling = Sampling(max_new_tokens=3, top_k=3)
    ids = render_prompt(ours.tokenizer, prompt)
    own = reward.score([prompt], [""], {})[0][0]
    settings = having(
        target=own + 0.8, min_segment=1, max_segment=2, acceptance_temperature=0.5, max_proposals=4,
        parallel_proposals=2, acceptance=acceptance, entropy_threshold=3.3,
    )  # fmt: skip
    q = segment_law(ours, ids, settings, sampling)
    assert {len(tokens) for tokens in q} == {1, 2}
    value = {y: reward.score([prompt], [text_of(ours, list(y), sampling)[0]], {})[0][0] for y in q}
    law, forced = kept_law(q, value, settings, own, sampling.max_new_tokens)
    completions = Cards(theirs, reward, settings, sampling, batch_size=512).sample([prompt] * count, seed=0)
    firsts = [(c.token_ids[: c.trace[0].num_tokens], c.trace[0]) for c in completions]
    seen = np.asarray([sum(math.isclose(value[y], v, abs_tol=1e-6) for y, _ in firsts) for v in law])
    assert seen.sum() == count
    expected = np.asarray(list(law.values())) * count
    rare = expected < 5
    observed, wanted = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > NEVER
    share = np.mean([segment.forced for _, segment in firsts])
    assert abs(share - forced) < 4 * math.sqrt(forced * (1 - forced) / count)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"parallel_proposals": 3, "max_segment": 12}])
def test_answers_and_costs_are_those_of_our_engine(ours, theirs, reward, monkeypatch, changes):
    """In law; of decoded tokens no more than 1.25 times as many. Few likeliest tokens, so that laws are asked for."""
    monkeypatch.setattr(vllm_segments, "NUM_TOP", 16)
    settings = having(entropy_threshold=3.5, target=0.4, acceptance_temperature=0.5, **changes)
    sampling = Sampling(max_new_tokens=14, temperature=0.9)
    counting = Counting(theirs.llm)
    found = {
        policy: Cards(policy, reward, settings, sampling).sample(PROMPTS * 100, seed=1)
        for policy in (ours, replace(theirs, llm=counting))
    }
    one, other = found.values()
    assert counting.num_open > 20
    assert ks_2samp([c.reward for c in one], [c.reward for c in other]).pvalue > NEVER
    for count in (
        lambda c: [len(c.token_ids)],
        lambda c: [segment.num_tokens for segment in c.trace],
        lambda c: [segment.num_proposals for segment in c.trace],
        lambda c: [segment.forced for segment in c.trace],
    ):
        table = np.asarray([np.bincount([n for c in cs for n in count(c)], minlength=20) for cs in (one, other)])
        assert chi2_contingency(table[:, table.sum(axis=0) > 10]).pvalue > NEVER
    decoded = [sum(c.cost.policy_decode_tokens for c in completions) for completions in (one, other)]
    assert decoded[1] <= 1.25 * decoded[0]
    assert sum(c.cost.policy_decode_tokens for c in other) == counting.num_fed_back
    # A prompt is counted once, though of prompts that are alike vLLM reads one.
    assert sum(c.cost.policy_prefill_tokens for c in other) >= counting.num_read


@pytest.mark.vllm
@pytest.mark.slow
def test_an_answer_depends_on_its_prompt_and_seed(theirs, reward):
    settings = having(parallel_proposals=2)
    sampler = Cards(theirs, reward, settings, SAMPLING, batch_size=4)
    whole = sampler.sample(PROMPTS, seed=0)
    assert answers(sampler.sample(PROMPTS[::-1], seed=0)[::-1]) == answers(whole)
    assert answers(Cards(theirs, reward, settings, SAMPLING).sample(PROMPTS[1:2], seed=0)) == answers(whole[1:2])
    assert answers(sampler.sample(PROMPTS, seed=1)) != answers(whole)
    for completion in whole:
        ends = [i for i, token in enumerate(completion.token_ids) if token in theirs.eos_token_ids]
        assert ends in ([], [len(completion.token_ids) - 1])
        assert sum(segment.num_tokens for segment in completion.trace) == len(completion.token_ids)
        assert all(segment.wasted_tokens >= 0 for segment in completion.trace)


@pytest.mark.vllm
@pytest.mark.slow
def test_stop_strings_targets_and_what_is_served(ours, theirs, reward):
    sampling = SAMPLING.model_copy(update={"stop": ("ea", "t")})
    target, cost = calibrate_target(theirs, reward, PROMPTS, sampling, quantile=0.5, seed=3, batch_size=8)
    assert cost.policy_decode_tokens > 0
    sampler = serve(theirs, reward, f"cards(target={target}, entropy_threshold=3)", sampling)
    completions = sampler.sample(PROMPTS, seed=2)
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        assert "ea" not in completion.text
        assert "t" not in completion.text
        assert completion.reward == pytest.approx(reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)
    (whole,) = serve(theirs, reward, f"rejection(target={target})", sampling).sample(PROMPTS[:1], seed=2)
    assert len(whole.trace) == 1
    with pytest.raises(ConfigError, match=r"'ggro\(.*' needs this package's own engine.*cards, rejection or"):
        serve(theirs, reward, "ggro(num_candidates=2)", sampling)


@pytest.mark.vllm
@pytest.mark.slow
def test_best_of_n_that_stops_draws_what_best_of_n_draws(theirs, reward):
    plain = serve(theirs, reward, "bon(8)", SAMPLING).sample(PROMPTS, seed=1)
    early = serve(theirs, reward, "bon(8, stop=target(0.8, threshold=0.3), width=2)", SAMPLING).sample(PROMPTS, seed=1)
    for one, other in zip(early, plain, strict=True):
        number = len(one.candidates)
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates[:number]]
        rewards = [c.reward for c in other.candidates]
        assert number == next((end for end in (2, 4, 6) if max(rewards[:end]) >= 0.3), 8)
        assert one.cost.policy_decode_tokens == sum(len(c.token_ids) - 1 for c in one.candidates)


@pytest.mark.vllm
@pytest.mark.slow
def test_iama_generate_serves_cards_on_vllm(run_with_files, wide):
    asked = ("generate", "--policy", wide.policy, "--reward", wide.reward, "--prompt", "how to bake bread")
    asked += ("--engine", "vllm", "--vllm", "enforce_eager=true", "--vllm", "kv_cache_memory_bytes=268435456")
    code, out, err = run_with_files(
        *asked, "--max-new-tokens", 12, "--method", "cards(entropy_threshold=3, max_segment=6)"
    )
    assert code == 0, err
    assert "segment" in out
