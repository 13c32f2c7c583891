from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch
from cards_reference import double
from ggro_reference import SAMPLING, SETTINGS, Slow, having, slow_ggro
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from iama.cli import main
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError, ModelError, RewardError
from iama.models.flops import forward_flops, size_of
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.policy import load_policy
from inference.engine.random_streams import prompt_keys
from inference.engine.reward_gradient import GradientRows
from inference.samplers.best_of import draw
from inference.samplers.gains import GradientScores
from inference.samplers.ggro import Ggro
from inference.samplers.serve import serve

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
EVERY = [*PROMPTS[:2], "mix water"]
SAMPLED = Sampling(max_new_tokens=13, temperature=0.9, top_k=30)


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


@pytest.fixture(scope="module")
def gpt2(tiny, tmp_path_factory):
    """A policy and a reward of GPT-2's family, with one vocabulary."""
    root = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=2, eos_token_id=tokenizer.eos_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(3)
    GPT2LMHeadModel(config).save_pretrained(root / "policy")
    GPT2ForSequenceClassification(config).save_pretrained(root / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(root / name)
    policy = load_policy("gpt2", PolicySpec(path=str(root / "policy")))
    policy = dataclasses.replace(policy, model=policy.model.double(), eos_token_ids=policy.eos_token_ids | {40, 41})
    return policy, double(load_reward("gpt2", RewardSpec(model=str(root / "reward"), sign=-1)))


def answer(policy, reward, prompts=EVERY, settings=SETTINGS, sampling=SAMPLING, seed=3, batch_size=5):
    return Ggro(policy, reward, settings, sampling, batch_size).sample(prompts, seed=seed)


def same(completion, expected):
    assert completion.token_ids == expected.token_ids
    assert completion.finish_reason == expected.finish_reason
    assert [(s.num_tokens, s.num_proposals, s.wasted_tokens, s.nudge) for s in completion.trace] == expected.trace
    assert [s.reward for s in completion.trace] == pytest.approx(expected.rewards, abs=1e-5)


CASES = {
    "gradient": (SETTINGS, SAMPLING),
    "taylor": (having(score="taylor"), SAMPLING),
    "exact": (having(score="exact"), SAMPLING),
    "parallel": (having(parallel=True), SAMPLING),
    "parallel exact": (having(parallel=True, score="exact"), SAMPLING),
    "sampled": (having(greedy=False), SAMPLED),
    "sampled parallel": (having(greedy=False, parallel=True, score="taylor"), SAMPLED),
    "sampled, one stream": (having(greedy=False, streams="shared"), SAMPLED),
    "likely nudges": (having(nudge_min_p=0.3, top_k=0.2), SAMPLING),
    "random nudges": (having(nudge_by="random"), SAMPLING),
    "random nudges in parallel": (having(nudge_by="random", parallel=True), SAMPLING),
    "random cuts": (having(random_cuts=0.3), SAMPLING),
    "first not nudged": (having(first_nudge=False, entropy_threshold=3.8), SAMPLING),
    "one segment": (having(entropy_threshold=None, max_segment=64), SAMPLING),
    "stop strings": (SETTINGS, SAMPLING.model_copy(update={"stop": ("ea", "<|user|>")})),
    "repetition penalty": (having(greedy=False), SAMPLED.model_copy(update={"repetition_penalty": 1.5})),
}


def check(policy, reward, settings, sampling, prompts=EVERY):
    keys = prompt_keys([render_prompt(policy.tokenizer, prompt) for prompt in prompts])
    completions = answer(policy, reward, prompts, settings, sampling)
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        same(completion, slow_ggro(policy, reward, prompt, settings, sampling, 3, key))
        assert completion.reward == pytest.approx(reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)
    return completions


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_equals_the_slow_reference(policy_with_ends, reward, case):
    prompts = EVERY if case == "gradient" else EVERY[1:]
    completions = check(policy_with_ends, reward, *CASES[case], prompts)
    if case == "gradient":
        # The case means something: responses end in both ways, segments too, and nudges win or lose.
        trace = [segment for completion in completions for segment in completion.trace]
        assert {completion.finish_reason for completion in completions} == {"stop", "length"}
        assert {segment.nudge for segment in trace} == {True, False}
        assert len({segment.num_tokens for segment in trace}) > 2
        assert {segment.num_proposals for segment in trace} >= {3, 4, 5}


@pytest.mark.parametrize("score", ["gradient", "exact"])
def test_equals_the_slow_reference_on_gpt2(gpt2, score):
    check(*gpt2, having(score=score, entropy_threshold=3.0), SAMPLING, EVERY[:2])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("score", ["taylor", "exact"])
@pytest.mark.slow
def test_the_batch_changes_nothing(policy_with_ends, reward, score, greedy):
    settings = having(score=score, greedy=greedy)
    prompts = [*PROMPTS, "mix water"]
    together = answer(policy_with_ends, reward, prompts, settings, SAMPLED, batch_size=16)
    alone = [answer(policy_with_ends, reward, [prompt], settings, SAMPLED, batch_size=1)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.reward == pytest.approx(other.reward, abs=1e-6)
        counted = [dataclasses.replace(c.cost, seconds=0, peak_memory=0) for c in (one, other)]
        assert counted[0] == counted[1]


def test_taylor_differs_from_the_gradient_by_a_constant(policy_with_ends, reward, monkeypatch):
    """So the two rank other tokens alike; the token that stands there is worth 0 in Taylor's way, and not in itself."""
    seen: dict[str, list[tuple[list[int], list[int], list[float]]]] = {"gradient": [], "taylor": []}
    original = GradientScores.score
    for score, noted in seen.items():

        def noting(self, requests, noted=noted):
            original(self, requests)
            noted.extend((request.round[-1].tokens, request.options, request.gains) for request in requests)

        monkeypatch.setattr(GradientScores, "score", noting)
        answer(policy_with_ends, reward, PROMPTS[:1], having(score=score))
    (tokens, options, plain), (_, same_options, taylor) = (noted[0] for noted in seen.values())
    assert options == same_options
    differences = [own - other for own, other in zip(plain, taylor, strict=True)]
    assert differences == pytest.approx([differences[0]] * len(options))
    place = options.index(tokens[0])
    assert taylor[place] == pytest.approx(0, abs=1e-12)
    assert abs(plain[place]) > 1e-3


def test_one_candidate_is_plain_decoding(policy_with_ends, reward):
    settings = having(num_candidates=1)
    greedy = answer(policy_with_ends, reward, PROMPTS, settings)
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        ids = torch.tensor([render_prompt(policy_with_ends.tokenizer, prompt)])
        expected = policy_with_ends.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLING.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(policy_with_ends.eos_token_ids),
        )[0, ids.shape[1] :]
        assert completion.token_ids == tuple(expected.tolist())
        assert completion.cost.backward_tokens == 0
        assert completion.cost.policy_decode_tokens == len(completion.token_ids) - 1
    sampled = answer(policy_with_ends, reward, PROMPTS, having(settings, greedy=False), SAMPLED, seed=5)
    pool = draw(policy_with_ends, PROMPTS, 1, SAMPLED, seed=5, batch_size=8)
    assert [c.token_ids for c in sampled] == [row[0].token_ids for row in pool.samples]


def test_parallel_candidates_are_the_best_proposals_of_the_first_gradient(policy_with_ends, reward):
    """With two candidates both ways propose the same token, unless it promises nothing."""
    one, other = (
        answer(policy_with_ends, reward, PROMPTS, having(num_candidates=2, parallel=parallel))
        for parallel in (False, True)
    )
    for first, second in zip(one, other, strict=True):
        assert second.trace[0].num_proposals == 2
        if first.trace[0].num_proposals == 2:
            assert first.token_ids[: first.trace[0].num_tokens] == second.token_ids[: second.trace[0].num_tokens]
    wide = answer(policy_with_ends, reward, PROMPTS, having(parallel=True), batch_size=64)
    slow = answer(policy_with_ends, reward, PROMPTS, having(), batch_size=64)
    steps = [sum(c.cost.sequential_steps / len(c.token_ids) for c in side) for side in (wide, slow)]
    assert steps[0] < steps[1]


def test_any_end_token_ends(policy64, reward):
    """Also one that is not the tokenizer's; a policy that ends at once answers with that token alone."""
    ends_prompts = policy64.tokenizer.convert_tokens_to_ids("<|assistant|>")
    policy = dataclasses.replace(policy64, eos_token_ids=frozenset(range(200)) - {ends_prompts})
    for settings in (SETTINGS, having(score="exact"), having(parallel=True), having(nudge_by="random")):
        for completion in answer(policy, reward, PROMPTS, settings):
            assert len(completion.token_ids) == 1
            assert (completion.text, completion.finish_reason) == ("", "stop")
            assert len(completion.trace) == 1


def test_the_ledger_is_what_was_forwarded_and_differentiated(policy_with_ends, reward, monkeypatch):
    """With one row a pass nothing that a model is given is padding."""
    classifier = dataclasses.replace(reward.classifier, batch_size=1)
    alone = Reward("proxy", classifier)
    backward = []
    gradient = torch.autograd.grad
    sampler = Ggro(policy_with_ends, alone, SETTINGS, SAMPLING, batch_size=1)
    scores = sampler.scores()  # its trial of the model is in no ledger
    monkeypatch.setattr(Ggro, "scores", lambda self: scores)
    for prompt in PROMPTS:
        passes: dict[str, list[int]] = {"policy": [], "reward": []}
        backward.clear()

        def counting(outputs, inputs, passes=passes):
            backward.append(passes["reward"][-1])
            return gradient(outputs, inputs)

        monkeypatch.setattr(torch.autograd, "grad", counting)
        handles = [
            model.register_forward_pre_hook(
                lambda _m, _a, kwargs, name=name, passes=passes: passes[name].append(kwargs["input_ids"].numel()),
                with_kwargs=True,
            )
            for name, model in (("policy", policy_with_ends.model), ("reward", classifier.model))
        ]
        (completion,) = sampler.sample([prompt], seed=0)
        for handle in handles:
            handle.remove()
        cost = completion.cost
        assert cost.policy_tokens == sum(passes["policy"])
        assert cost.reward_tokens == sum(passes["reward"])
        assert cost.backward_tokens == sum(backward) > 0
        num_rescored = cost.reward_calls - sum(segment.num_proposals for segment in completion.trace)
        assert num_rescored in (0, 1)  # the text, where the reward's tokenizer reads it as other ids
        assert cost.sequential_steps == len(passes["policy"]) + len(passes["reward"]) + len(backward)


@pytest.mark.parametrize("score", ["gradient", "exact"])
def test_candidates_read_side_by_side_are_one_step(policy_with_ends, reward, score):
    """In batches of any size: the prefills, two rounds' tokens, a reading of each, and one more of the text at most."""
    policy = dataclasses.replace(policy_with_ends, eos_token_ids=frozenset({3}))
    settings = having(parallel=True, score=score, num_candidates=8, entropy_threshold=None)
    steps = []
    for batch_size in (1, 64):
        alone = Reward("proxy", dataclasses.replace(reward.classifier, batch_size=batch_size))
        (completion,) = answer(policy, alone, PROMPTS[:1], settings, Sampling(max_new_tokens=6), batch_size=64)
        assert [(segment.num_tokens, segment.num_proposals) for segment in completion.trace] == [(6, 8)]
        steps.append(completion.cost.sequential_steps)
    gradient = 1  # or the options, by text
    assert steps[0] == steps[1]
    assert steps[0] - (2 + 5 + 1 + gradient + 5 + 1) in (0, 1)


@pytest.mark.parametrize("shown", ["prompt", "candidates"])
def test_a_lack_of_memory_is_the_rewards_whatever_it_reads(policy_with_ends, reward, monkeypatch, shown):
    """The template before a response is read without a gradient, candidates that nudges are asked of with one."""
    name = {"prompt": "extend", "candidates": "extend_with_gradient"}[shown]

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GradientRows, name, fail)
    with pytest.raises(ModelError, match=f"^{re.escape(reward.classifier.source)}: out of memory with a single row"):
        answer(policy_with_ends, reward, PROMPTS[:1], batch_size=1)


def test_far_fewer_tokens_than_the_procedure_as_published(policy_with_ends, reward):
    settings, sampling = having(entropy_threshold=3.9), Sampling(max_new_tokens=20)
    policy = dataclasses.replace(policy_with_ends, eos_token_ids=frozenset({3}))
    for prompt in PROMPTS[:1]:
        (completion,) = answer(policy, reward, [prompt], settings, sampling)
        slow = slow_ggro(policy, reward, prompt, settings, sampling, 3)
        same(completion, slow)
        assert completion.cost.policy_tokens * 3 < slow.policy_tokens
        assert completion.cost.reward_tokens * 3 < slow.reward_tokens
        assert completion.cost.backward_tokens <= completion.cost.reward_tokens


def test_flops_are_counted(policy_with_ends, reward):
    """The policy's as those of what it forwards; the reward's backward about as much again as its forward."""
    (plain,) = answer(policy_with_ends, reward, PROMPTS[:1], having(num_candidates=1))
    (guided,) = answer(policy_with_ends, reward, PROMPTS[:1])
    size = size_of(policy_with_ends.model)
    assert plain.cost.flops > forward_flops(size, 0, plain.cost.policy_tokens)
    assert guided.cost.flops > plain.cost.flops


@pytest.mark.slow
def test_a_reward_that_is_read_whole(policy_with_ends, reward, monkeypatch):
    """The answers are the same, and the ledger tells that every candidate is read and differentiated whole."""
    prompts = EVERY[1:]
    quick = answer(policy_with_ends, reward, prompts)
    monkeypatch.setattr("inference.samplers.gains.reads_in_pieces", lambda _: False)
    whole = check(policy_with_ends, reward, SETTINGS, SAMPLING, prompts)
    assert [c.token_ids for c in whole] == [c.token_ids for c in quick]
    for prompt, completion in zip(prompts, whole, strict=True):
        rescored = len(reward.classifier.render([prompt], [completion.text])[0])
        num_tokens = slow_reward_tokens(policy_with_ends, reward, prompt)
        assert completion.cost.reward_tokens in (num_tokens, num_tokens + rescored)
        assert completion.cost.reward_tokens >= completion.cost.backward_tokens > 0
        assert completion.cost.reward_tokens > quick[prompts.index(prompt)].cost.reward_tokens


def slow_reward_tokens(policy, reward, prompt):
    """Those of the reference, without what it reads to find that a candidate is a repeated one."""
    slow = Slow(policy, reward, prompt, SETTINGS, SAMPLING, 3)
    read: list[tuple[tuple[int, ...], int]] = []
    judge = slow.judge

    def noting(tokens, new, options, asks):
        before = slow.answer.reward_tokens
        result = judge(tokens, new, options, asks)
        read.append(((len(tokens), *new), slow.answer.reward_tokens - before))
        return result

    slow.judge = noting
    slow.run()
    return sum(dict(read).values())


def test_a_function_guides_by_exact_scores(policy_with_ends):
    def brief(prompts, completions, **_):
        return [-float(len(c if isinstance(c, str) else c[-1]["content"])) for c in completions]

    reward = reward_from_function(brief, "brief")
    completions = check(policy_with_ends, reward, having(score="exact"), SAMPLING, EVERY[:2])
    plain = answer(policy_with_ends, reward, EVERY[:2], settings=having(num_candidates=1))
    assert sum(c.reward for c in completions) > sum(c.reward for c in plain)
    with pytest.raises(ConfigError, match=r"'brief' is no classifier; use ggro\(score=exact\), or method cards or"):
        Ggro(policy_with_ends, reward, SETTINGS, SAMPLING)


def test_another_vocabulary_is_refused_but_for_exact_scores(policy_with_ends, tiny, tmp_path):
    old = AutoTokenizer.from_pretrained(tiny.reward)
    tokenizer = old.train_new_from_iterator(["abcdefghijklmnopqrstuvwxyz how bike flour"] * 3, vocab_size=70)
    config = LlamaForSequenceClassification.config_class.from_pretrained(tiny.reward, vocab_size=len(tokenizer))
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    foreign = double(load_reward("foreign", RewardSpec(model=str(tmp_path))))
    with pytest.raises(
        ConfigError,
        match=r"differ in \d+ token ids, e\.g\. \d+ \(.*use ggro\(score=exact\), or method cards or bon instead$",
    ):
        Ggro(policy_with_ends, foreign, SETTINGS, SAMPLING)
    check(policy_with_ends, foreign, having(score="exact"), SAMPLING, PROMPTS[:1])


def test_no_prompt_that_the_reward_cannot_read_is_begun(policy64, reward):
    short = Reward("proxy", dataclasses.replace(reward.classifier, context_length=20))
    with pytest.raises(RewardError, match=r"exceeds the 20 that .* reads; use shorter prompts or a smaller"):
        answer(policy64, short, PROMPTS)


def test_served_by_name(policy, tiny, monkeypatch, capsys):
    reward = load_reward("proxy", RewardSpec(model=str(tiny.reward)))
    sampler = serve(policy, reward, "ggro(num_candidates=3, score=taylor, parallel=true)", SAMPLING)
    assert isinstance(sampler, Ggro)
    assert (sampler.settings.num_candidates, sampler.settings.score, sampler.settings.parallel) == (3, "taylor", True)
    with pytest.raises(ConfigError, match=r"min_segment = 9 exceeds max_segment = 4"):
        serve(policy, reward, "ggro(min_segment=9, max_segment=4)", SAMPLING)
    with pytest.raises(ConfigError, match=r"top_k = 2.5 is no whole number; write one, or a share below 1"):
        serve(policy, reward, "ggro(top_k=2.5)", SAMPLING)
    asked = ["--policy", str(tiny.policy), "--reward", str(tiny.reward), "--prompt", "fix a bike"]
    method = "ggro(num_candidates=3)"
    monkeypatch.setattr(sys, "argv", ["iama", "generate", *asked, "--method", method, "--max-new-tokens", "6"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert f"{method}: " in capsys.readouterr().out
