from __future__ import annotations

import dataclasses

import pytest
import torch
from classifiers import gpt2_tokenizer, save
from families import CONFIGS, make_model
from sea_reference import parts, slow_chain, slow_top_k, straight_through
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from iama.config.schema import validate
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError, IamaWarning, ModelError, RewardError, TooLongError
from iama.objective.operators import parse_operator
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.engine.prefix import Prefixes
from inference.engine.reward_gradient import EmbeddedReward, around, embedding_table
from inference.engine.vocabulary import end_tokens
from inference.samplers.best_of import SelectionSampler
from inference.samplers.sea import Chains, Sea, SeaSettings, batches_alike
from inference.samplers.sea_energy import (
    Energy,
    Models,
    Start,
    decode_top_k,
    silent_tokens,
    softmax_pullback_,
)

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
SAMPLING = Sampling(max_new_tokens=12)
SETTINGS = SeaSettings(num_chains=2, num_steps=6, learning_rate=1.0, keep="reward")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
RISE = 0.5  # standard deviations of samples' rewards


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


@pytest.fixture(scope="module")
def other_reward(tiny):
    return double(load_reward("other", RewardSpec(model=str(tiny.other_reward), sign=-1)))


@pytest.fixture(scope="module")
def wide_reward(tiny, tmp_path_factory):
    """A reward whose vocabulary has special tokens more."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>", "<|more|>"]})
    torch.manual_seed(3)
    model = LlamaForSequenceClassification.from_pretrained(tiny.reward)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(folder, model, tokenizer)
    return double(load_reward("wide", RewardSpec(model=str(folder))))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Policy and reward of the GPT-2 kind, whose vocabulary is padded."""
    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    fields = {"vocab_size": 310, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save(root / "policy", GPT2LMHeadModel(GPT2Config(**fields, **ends)), tokenizer)
    save(root / "reward", GPT2ForSequenceClassification(GPT2Config(**fields, **ends, num_labels=1)), tokenizer)
    policy = load_policy("gpt2", PolicySpec(path=str(root / "policy")))
    policy.model.double()
    return policy, double(load_reward("gpt2", RewardSpec(model=str(root / "reward"))))


def double(reward):
    reward.classifier.model.double()
    return reward


def having(settings=SETTINGS, **changes):
    return SeaSettings.model_validate(settings.model_dump() | changes)


def make_energy(policy, reward, responses, alpha=20.0):
    """Of responses to the first prompts."""
    ids = [render_prompt(policy.tokenizer, prompt) for prompt in PROMPTS]
    models = Models.of(policy, reward, SAMPLING)
    starts = [Start(ids[i], tokens, *around(reward, PROMPTS[i]), i) for i, tokens in enumerate(responses)]
    return Energy(models, starts, alpha), starts


def slow(policy, reward, settings, prompt, start_ids, *, c, seed):
    silent_V = silent_tokens(policy, len(EmbeddedReward(reward).embeddings), end_tokens(policy, SAMPLING))
    return slow_chain(policy, reward, settings, prompt, around(reward, prompt), start_ids, silent_V, c=c, seed=seed)


def samples(policy, reward, seed, number=2):
    completions = SelectionSampler(policy, reward, parse_operator(f"bon({number})"), SAMPLING).sample(
        PROMPTS, seed=seed
    )
    return [[candidate.token_ids for candidate in completion.candidates] for completion in completions]


def assert_same(completions, others):
    for one, other in zip(completions, others, strict=True):
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]
        assert [c.reward for c in one.candidates] == pytest.approx([c.reward for c in other.candidates], abs=1e-6)
        assert one.chosen == other.chosen
        costs = [dataclasses.replace(c.cost, seconds=0, peak_memory=0) for c in (one, other)]
        assert costs[0] == costs[1]


def test_the_softmax_pullback_is_autograds():
    torch.manual_seed(0)
    state = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 9, dtype=torch.float64)
    (expected,) = torch.autograd.grad(state.softmax(dim=-1), state, weight)
    assert torch.allclose(softmax_pullback_(weight.clone(), state.detach()), expected, atol=1e-14)


def gradients(policy, reward, responses):
    """Of each chain from a random state: its start, the state, and the gradient at weight 20 of the reward."""
    energy, starts = make_energy(policy, reward, responses)
    torch.manual_seed(0)
    tokens_N = energy.sampled_N
    state_NV = torch.randn(len(tokens_N), policy.model.config.vocab_size, dtype=torch.float64)
    state_NV.scatter_(1, tokens_N.unsqueeze(1), 5.0)
    gradient_NV = energy.gradient(energy.read(tokens_N, with_gradient=True), state_NV)
    return zip(starts, energy.split(state_NV), energy.split(gradient_NV), strict=True)


def test_the_gradient_is_that_of_finite_differences(gpt2):
    """Of the surrogate whose weights are one-hot(argmax y) + softmax(y') - softmax(y), at y' = y."""
    policy, reward = gpt2  # Llama's norms round to float32
    for start, state, gradient in gradients(policy, reward, [[50, 61, 33, 47], [39, 77, 20, 0, 55], [90, 91]]):
        hard = torch.nn.functional.one_hot(torch.tensor(start.token_ids), state.shape[1]).double()

        def value(moved, state=state, hard=hard, start=start):
            weight = hard + moved.softmax(dim=-1) - state.softmax(dim=-1)
            log_prob, score = parts(policy, reward, start.prompt_ids, start.before, start.after, weight)
            return -(log_prob + 20.0 * score).item()

        for _ in range(3):
            direction = torch.randn_like(state)
            step = 1e-5 * direction
            difference = (value(state + step) - value(state - step)) / 2e-5
            assert difference == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "wide"])
def test_the_gradient_is_that_of_dense_weights(family, policy_with_ends, reward, wide_reward):
    policy, reward = policy_with_ends, {"llama": reward, "wide": wide_reward}[family]
    responses = [[50, 61, 33, 47, 80], [39, 77, 20, min(policy.eos_token_ids), 55, 66], [90, 91]]
    for start, state, gradient in gradients(policy, reward, responses):
        state.requires_grad_()
        log_prob, score = parts(policy, reward, start.prompt_ids, start.before, start.after, straight_through(state))
        (expected,) = torch.autograd.grad(-(log_prob + 20.0 * score), state)
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)
        assert expected.abs().max() > 0.1
        moved = int((gradient.abs().amax(dim=1) > 0).sum())
        assert moved == (4 if len(start.token_ids) == 6 else len(start.token_ids))  # up to the end token


CASES = {
    "adam": SETTINGS,
    "sgd": having(optimiser="sgd", learning_rate=5.0),
    "no noise, energy": having(noise=0.0, keep="energy"),
    "random": having(init="random", noise=0.5),
    "no reward": having(alpha=0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_reference(case, policy_with_ends, reward):
    settings = CASES[case]
    policy = policy_with_ends
    completions, traces = Sea(policy, reward, settings, SAMPLING).sample_traced(PROMPTS, seed=5)
    num_changed = 0
    for prompt, completion, chains, starts in zip(
        PROMPTS, completions, traces, samples(policy, reward, 5), strict=True
    ):
        for c, (candidate, trace) in enumerate(zip(completion.candidates, chains, strict=True)):
            expected = slow(policy, reward, settings, prompt, starts[c], c=c, seed=5)
            assert trace.rewards == pytest.approx(expected.rewards, abs=1e-7)
            assert trace.log_probs == pytest.approx(expected.log_probs, abs=1e-6)
            assert (candidate.token_ids, trace.best_step) == (expected.token_ids, expected.best_step)
            assert candidate.reward == pytest.approx(reward.score([prompt], [candidate.text], {})[0][0], abs=1e-5)
            if trace.same_ids:
                assert candidate.reward == pytest.approx(trace.rewards[trace.best_step], abs=1e-5)
            num_changed += len(set(expected.rewards)) > 1
        rewards = [candidate.reward for candidate in completion.candidates]
        assert completion.reward == max(rewards)
        assert completion.chosen == rewards.index(max(rewards))
        assert completion.text == completion.candidates[completion.chosen].text
    assert num_changed >= 3  # else nothing was tried


def test_gpt2_equals_the_slow_reference_and_never_moves_to_padding(gpt2):
    policy, reward = gpt2
    settings = having(learning_rate=3.0)
    completions, traces = Sea(policy, reward, settings, SAMPLING).sample_traced(PROMPTS, seed=1)
    for prompt, completion, chains, starts in zip(
        PROMPTS, completions, traces, samples(policy, reward, 1), strict=True
    ):
        for c, (candidate, trace) in enumerate(zip(completion.candidates, chains, strict=True)):
            expected = slow(policy, reward, settings, prompt, starts[c], c=c, seed=1)
            assert trace.rewards == pytest.approx(expected.rewards, abs=1e-7)
            assert candidate.token_ids == expected.token_ids
            assert set(candidate.token_ids) - set(starts[c]) <= set(range(len(policy.tokenizer)))


def test_without_steps_it_is_best_of_n(policy_with_ends, reward):
    """Step 0 decodes to the sample."""
    settings = having(num_steps=0, num_chains=5)
    completions, traces = Sea(policy_with_ends, reward, settings, SAMPLING).sample_traced(PROMPTS, seed=3)
    expected = SelectionSampler(policy_with_ends, reward, parse_operator("bon(5)"), SAMPLING).sample(PROMPTS, seed=3)
    for completion, other, chains in zip(completions, expected, traces, strict=True):
        assert completion.candidates == other.candidates
        assert (completion.text, completion.reward) == (other.text, other.reward)
        assert all(len(trace.rewards) == 1 for trace in chains)


def test_what_follows_the_end_changes_nothing(policy_with_ends, reward):
    end = min(policy_with_ends.eos_token_ids)
    begin = [50, 61, end]
    readings = []
    for tail in ([33, 47, 80], [end, 20, 95]):
        energy, _ = make_energy(policy_with_ends, reward, [begin + tail])
        reading = energy.read(energy.sampled_N, with_gradient=True)
        assert (reading.num_text_R.tolist(), reading.num_counted_R.tolist()) == ([2], [3])
        state_NV = torch.zeros(6, policy_with_ends.model.config.vocab_size, dtype=torch.float64)
        gradient_NV = energy.gradient(reading, state_NV)
        assert gradient_NV[3:].abs().max() == 0
        readings.append((reading.log_probs_R, reading.rewards_R, gradient_NV[:3]))
    for one, other in zip(*readings, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("decode", ["argmax", "top_k"])
@pytest.mark.slow
def test_a_prompt_alone_and_in_any_batch_is_the_same(decode, policy_with_ends, reward):
    settings = having(decode=decode, top_k=4, num_steps=3)
    prompts = [*PROMPTS, "how to bake"]
    together = Sea(policy_with_ends, reward, settings, SAMPLING).sample(prompts, seed=2)
    alone = [Sea(policy_with_ends, reward, settings, SAMPLING).sample([prompt], seed=2)[0] for prompt in prompts]
    assert_same(together, alone)
    assert_same(together, Sea(policy_with_ends, reward, settings, SAMPLING, batch_size=5).sample(prompts, seed=2))
    single = Sea(policy_with_ends, reward, settings, SAMPLING, batch_size=1).sample(prompts[:2], seed=2)
    assert [c.text for c in single] == [c.text for c in together[:2]]
    assert len({c.text for c in together}) > 1


def test_running_out_of_memory_changes_nothing(policy_with_ends, reward, monkeypatch):
    sampler = Sea(policy_with_ends, reward, SETTINGS, SAMPLING)
    expected = sampler.sample(PROMPTS, seed=2)
    forward = policy_with_ends.model.forward

    def small(*args, inputs_embeds=None, **inputs):
        if inputs_embeds is not None and len(inputs_embeds) > 4:
            raise torch.OutOfMemoryError("too many rows")
        return forward(*args, inputs_embeds=inputs_embeds, **inputs)

    monkeypatch.setattr(policy_with_ends.model, "forward", small)
    with pytest.warns(IamaWarning, match="out of memory"):
        found = dataclasses.replace(sampler, batch_size=6).sample(PROMPTS, seed=2)
    assert_same(found, expected)


def test_without_weight_the_reward_moves_nothing(policy64, reward, other_reward):
    settings = having(alpha=0.0, keep="energy")
    (one, one_traces), (other, other_traces) = (
        Sea(policy64, r, settings, SAMPLING).sample_traced(PROMPTS, seed=4) for r in (reward, other_reward)
    )
    for left, right in zip(one, other, strict=True):
        assert [c.token_ids for c in left.candidates] == [c.token_ids for c in right.candidates]
        assert [c.reward for c in left.candidates] != [c.reward for c in right.candidates]
    for left, right in zip(one_traces, other_traces, strict=True):
        assert [trace.log_probs for trace in left] == [trace.log_probs for trace in right]
    weighted = Sea(policy64, reward, having(keep="energy"), SAMPLING).sample(PROMPTS, seed=4)
    assert [c.candidates for c in weighted] != [c.candidates for c in one]


def test_the_reward_rises(policy64, reward):
    """At the last step, not only at the best one, by the margin above what the policy alone pulls to."""
    settings = having(num_chains=4, num_steps=20, alpha=100.0, learning_rate=0.5)
    _, traces = Sea(policy64, reward, settings, SAMPLING).sample_traced(PROMPTS, seed=0)
    _, controls = Sea(policy64, reward, having(settings, alpha=0.0), SAMPLING).sample_traced(PROMPTS, seed=0)
    first, last, control = (
        torch.tensor([[trace.rewards[step] for trace in row] for row in rows])
        for rows, step in ((traces, 0), (traces, -1), (controls, -1))
    )
    assert (last - first).mean() > RISE * first.std()
    assert (last - control).mean() > RISE * first.std()


@pytest.mark.parametrize("k", [1, 3, 1000])
def test_top_k_decodes_within_the_policys_likeliest(k, policy_with_ends, reward):
    policy, settings = policy_with_ends, having(decode="top_k", top_k=k)
    completions = Sea(policy, reward, settings, SAMPLING).sample(PROMPTS, seed=5)
    for prompt, completion, starts in zip(PROMPTS, completions, samples(policy, reward, 5), strict=True):
        for c, candidate in enumerate(completion.candidates):
            state_TV = slow(policy, reward, settings, prompt, starts[c], c=c, seed=5).state_TV
            silent_V = silent_tokens(policy, len(EmbeddedReward(reward).embeddings), end_tokens(policy, SAMPLING))
            assert candidate.token_ids == slow_top_k(policy, prompt, state_TV, k, silent_V)


@pytest.mark.parametrize("k", [1, 2])
def test_top_k_decodes_no_token_without_text(k, policy_with_ends, reward):
    """Not even where all of the policy's likeliest are such tokens; elsewhere what they are changes nothing."""
    policy, state_TV = policy_with_ends, torch.randn(4, 310, generator=torch.Generator().manual_seed(0)).double()
    start = Start(render_prompt(policy.tokenizer, PROMPTS[0]), [50] * 4, *around(reward, PROMPTS[0]), 0)
    state_TV = state_TV[:, : policy.model.config.vocab_size]
    silent_V = torch.zeros(state_TV.shape[1], dtype=torch.bool)

    def decoded():
        models = Models(policy, EmbeddedReward(reward), "reward", policy.eos_token_ids, silent_V)
        (answer,), _ = decode_top_k(models, [start], [state_TV.masked_fill(silent_V, -torch.inf)], k)
        return tuple(answer)

    plain = decoded()
    with torch.no_grad():
        likeliest = policy.model(torch.tensor([start.prompt_ids])).logits[0, -1].topk(k + 1).indices
    for silent in (likeliest[k:], likeliest[:k]):
        silent_V.zero_()
        silent_V[silent] = True
        found = decoded()
        assert found == slow_top_k(policy, PROMPTS[0], state_TV.masked_fill(silent_V, -torch.inf), k, silent_V)
        assert not set(found) & set(silent.tolist())
        assert (found[0] == plain[0]) == (plain[0] not in silent.tolist())


def test_in_half_precision_energies_are_in_full(spec, reward_spec):
    """The models' numbers are rounded; what is made of them is not."""
    policy, reward = load_policy("base", spec), load_reward("proxy", reward_spec)
    for model in (policy.model, reward.classifier.model):
        model.to(torch.bfloat16)
    energy, _ = make_energy(policy, reward, [[50, 61, 33, 47, 80], [39, 77, 20, 55, 66]])
    chains = Chains(energy, having(num_steps=2, keep="energy"))
    chains.run()
    assert chains.state_NV.dtype == chains._best_R.dtype == torch.float32
    for r, step in enumerate(chains.best_step_R.tolist()):
        expected = chains.log_probs_SR[step][r] + 20.0 * chains.rewards_SR[step][r]
        assert chains._best_R[r].item() == pytest.approx(expected, rel=1e-6)


def test_the_answer_ends_at_a_stop_string(policy64, reward):
    sampling = Sampling(max_new_tokens=12, stop=("e",))
    completions = Sea(policy64, reward, having(init="random"), sampling).sample(PROMPTS, seed=0)
    candidates = [candidate for completion in completions for candidate in completion.candidates]
    assert all("e" not in candidate.text for candidate in candidates)
    stopped = [candidate for candidate in candidates if candidate.finish_reason == "stop"]
    assert stopped
    assert all("e" in policy64.tokenizer.decode(candidate.token_ids[-1:]) for candidate in stopped)


def test_no_chain_moves_to_what_has_no_text(policy64, wide_reward):
    """Special tokens are in no answer but where the sample has them."""
    settings = having(init="random", num_steps=10, learning_rate=3.0)
    completions = Sea(policy64, wide_reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    special = set(policy64.tokenizer.all_special_ids) - policy64.eos_token_ids
    for completion in completions:
        assert all(special.isdisjoint(candidate.token_ids) for candidate in completion.candidates)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lengths", [(9, 4, 1), (5, 5, 5), (0, 6, 2), (0, 0, 0)])
def test_rows_after_their_beginnings_are_those_of_whole_rows(family, lengths):
    """Logits and gradients; the first row goes on longest, so that the others end with padding."""
    model = make_model(family).requires_grad_(False)
    rows = [[(7 * i + 3 * r) % 47 + 3 for i in range(length)] for r, length in enumerate(lengths)]
    following = [[11, 30, 7, 22, 41], [8, 19, 33], [44]]
    table = embedding_table(model)
    padded = torch.tensor([[*ids, *[0] * (5 - len(ids))] for ids in following])
    inputs = table[padded].requires_grad_()
    logits = Prefixes(model, rows).logits(inputs)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    for r, (row, ids) in enumerate(zip(rows, following, strict=True)):
        whole = table[torch.tensor([[*row, *ids]])].requires_grad_()
        expected = model(inputs_embeds=whole).logits[0, len(row) :]
        assert torch.allclose(logits[r, : len(ids)], expected, atol=2e-5)
        (want,) = torch.autograd.grad(expected, whole, weight[r, : len(ids)])
        own = (logits[r, : len(ids)] * weight[r, : len(ids)]).sum()
        (found,) = torch.autograd.grad(own, inputs, retain_graph=True)
        assert torch.allclose(found[r, : len(ids)], want[0, len(row) :], atol=1e-4 * float(want.abs().max()) + 1e-5)


def test_batches_are_of_like_lengths_and_full_only():
    starts = [Start([1] * 4, [2] * (1 + 37 * i % 60), [], [], i) for i in range(200)]
    batches = batches_alike(starts, 64)
    assert sorted(c for batch in batches for c in batch) == list(range(200))
    lengths = [[4 + len(starts[c].token_ids) for c in batch] for batch in batches]
    assert all(len(batch) <= 64 for batch in batches)
    assert sum(map(sum, lengths)) > 0.8 * sum(len(row) * max(row) for row in lengths)
    assert len(batches) < 12
    assert batches_alike(starts[:6], 64) == [sorted(range(6), key=lambda c: len(starts[c].token_ids))]


class Watch:
    """Tokens that a model is given, of rows that need no padding, and passes."""

    def __init__(self, model, monkeypatch):
        self.forward, self.num_tokens, self.num_passes, self.num_with_gradient = model.forward, 0, 0, 0
        monkeypatch.setattr(model, "forward", self)

    def __call__(self, input_ids=None, inputs_embeds=None, **inputs):
        given = input_ids if inputs_embeds is None else inputs_embeds
        number = given.shape[0] * given.shape[1]
        self.num_tokens += number
        self.num_passes += 1
        is_read_with = torch.is_grad_enabled() if inputs_embeds is None else inputs_embeds.requires_grad
        self.num_with_gradient += number * is_read_with
        return self.forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)


@pytest.mark.parametrize("decode", ["argmax", "top_k"])
def test_the_cost_is_what_was_forwarded(decode, policy64, reward, monkeypatch):
    settings = having(num_chains=1, decode=decode)
    sampler = Sea(policy64, reward, settings, SAMPLING)
    sampler.sample(PROMPTS[:1], seed=0)  # trials of a new model are in no ledger
    embedded = EmbeddedReward(reward)
    monkeypatch.setattr("inference.samplers.sea_energy.EmbeddedReward", lambda _: embedded)
    policy_watch, reward_watch = Watch(policy64.model, monkeypatch), Watch(reward.classifier.model, monkeypatch)
    (completion,) = sampler.sample(PROMPTS[:1], seed=0)
    cost = completion.cost
    assert cost.policy_tokens == policy_watch.num_tokens
    assert cost.reward_tokens == reward_watch.num_tokens
    assert cost.backward_tokens == policy_watch.num_with_gradient + reward_watch.num_with_gradient
    assert cost.sequential_steps == policy_watch.num_passes + reward_watch.num_passes + 2 * settings.num_steps
    assert cost.reward_calls == settings.num_steps + 2
    assert cost.flops > 0


def test_a_reward_that_reads_the_prompt_once_gives_the_same_for_less(policy_with_ends, reward, monkeypatch):
    sampler = Sea(policy_with_ends, reward, SETTINGS, SAMPLING)
    in_pieces = sampler.sample(PROMPTS, seed=1)
    monkeypatch.setattr("inference.samplers.sea_energy.reads_in_pieces", lambda _: False)
    whole = sampler.sample(PROMPTS, seed=1)
    for prompt, one, other in zip(PROMPTS, in_pieces, whole, strict=True):
        assert [c.token_ids for c in one.candidates] == [c.token_ids for c in other.candidates]
        assert one.reward == pytest.approx(other.reward, abs=1e-9)
        saved = SETTINGS.num_chains * SETTINGS.num_steps * len(around(reward, prompt)[0])
        assert other.cost.reward_tokens - one.cost.reward_tokens == saved
        assert one.cost.flops < other.cost.flops


def test_refuses_another_vocabulary_and_what_is_no_model(policy64, gpt2):
    with pytest.raises(ConfigError, match="cards or bon") as error:
        Sea(policy64, gpt2[1], SETTINGS, SAMPLING)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cards or bon"):
        Sea(policy64, reward_from_function(lambda **_: [0.0], "f"), SETTINGS, SAMPLING)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_chains": 0}, {"num_steps": -1}, {"alpha": -1.0}, {"learning_rate": 0}, {"optimiser": "lbfgs"},
        {"noise": -0.1}, {"margin": 0.0}, {"init": "zero"}, {"decode": "beam"}, {"top_k": 0}, {"keep": "last"},
        {"alpha": float("nan")}, {"steps": 3},
    ],
)  # fmt: skip
def test_refuses_settings_out_of_range(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=name) as error:
        validate(setting, SeaSettings, "method 'sea'")
    assert "\n" not in str(error.value)


def test_refuses_what_the_reward_cannot_read_and_no_chains(policy64, reward):
    short = dataclasses.replace(reward.classifier, context_length=20)
    limited = type(reward)(reward.name, short)
    with pytest.raises(TooLongError, match=r"the prompt '.*' with an answer .* exceeds the 20 .*; use shorter prompts"):
        Sea(policy64, limited, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        Sea(policy64, reward, SETTINGS, SAMPLING, batch_size=0)


@pytest.mark.parametrize("which", ["policy", "reward"])
def test_damaged_weights_are_named(which, spec, reward_spec):
    policy, reward = load_policy("base", spec), load_reward("proxy", reward_spec)
    sampler = Sea(policy, reward, SETTINGS, SAMPLING)
    energy, _ = make_energy(policy, reward, [[50, 61]])
    model = policy.model if which == "policy" else reward.classifier.model
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError if which == "policy" else RewardError, match="not finite"):
        energy.read(energy.sampled_N, with_gradient=True)
    with pytest.raises((ModelError, RewardError, ConfigError)):
        sampler.sample(PROMPTS, seed=0)
