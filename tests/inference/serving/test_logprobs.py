"""Log-probabilities beside an answer: exact, for every method, alone and among others, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from iama.config.specs import RewardSpec, Sampling
from iama.prompts.conversations import render_prompts
from iama.rewards.load import load_reward
from inference.engine.likelihood import TokenLikelihood
from inference.samplers.serve import read_method, serve
from inference.serving.answering import Answering
from inference.serving.asks import Ask, Piece
from inference.serving.logprobs import Likelihoods, Vocabulary
from tests.inference.serving.served import in_float64, server
from tests.inference.serving.test_answering import METHODS, assert_nothing_is_left, mixture, settled

HELLO = [{"role": "user", "content": "how to bake bread"}]
CARDS = "base/good:cards(quantile=0.5, entropy_threshold=2)"


@pytest.fixture(scope="module")
def policy_of_64(policy):
    return in_float64(replace(policy, model=type(policy.model)(policy.model.config).eval()))


@pytest.fixture
def answering(policy_of_64, tiny):
    rewards = {
        "helpful": load_reward("helpful", RewardSpec(model=str(tiny.reward))),
        "harmless": load_reward("harmless", RewardSpec(model=str(tiny.other_reward))),
    }
    made = Answering({"base": policy_of_64}, rewards, batch_size=8)
    yield made
    made.close()


def ids_of(policy, prompt):
    (ids,) = render_prompts(policy.tokenizer, [prompt], policy.eos_token_ids, "the policy")
    return ids


def one_pass(policy, prompt_ids, token_ids):
    """Log-probabilities of the whole vocabulary before each token, by one plain pass."""
    with torch.inference_mode():
        logits_TV = policy.model(input_ids=torch.tensor([[*prompt_ids, *token_ids]])).logits[0]
    return torch.log_softmax(logits_TV[len(prompt_ids) - 1 : -1].double(), dim=-1)


def asks_with_logprobs():
    """Of every method, some without; a classifier's criteria alone, so that none calls another's code."""
    asks = [
        replace(asked, criterion="harmless" if asked.criterion == "vowels" else asked.criterion)
        for asked in mixture(len(METHODS), seed=3)
    ]
    return [replace(asked, num_top=[5, 0, 2, None][i % 4]) for i, asked in enumerate(asks)]


@pytest.mark.slow
def test_each_is_that_of_one_plain_pass_alone_and_among_others(policy_of_64, answering):
    asks = asks_with_logprobs()

    async def go():
        together = await asyncio.gather(*map(answering.answer, asks))
        alone = [await answering.answer(asked) for asked in asks[:3]]
        plain = await asyncio.gather(*(answering.answer(replace(asked, num_top=None)) for asked in asks))
        return together, alone, plain, await settled(answering)

    together, alone, plain, state = asyncio.run(go())
    for asked, answer, without in zip(asks, together, plain, strict=True):
        assert without.logprobs is None
        assert answer.completion.token_ids == without.completion.token_ids
        if asked.num_top is None:
            assert answer.logprobs is None
            continue
        prompt_ids = ids_of(policy_of_64, asked.prompt)
        ids = answer.completion.token_ids
        law_TV = one_pass(policy_of_64, prompt_ids, ids)
        found = answer.logprobs
        has_end = answer.completion.token_ids[-1] in policy_of_64.eos_token_ids
        assert (found.end is not None) == has_end
        own_T = [float(law_TV[t, token]) for t, token in enumerate(ids)]
        if has_end:
            assert found.end == pytest.approx(own_T[-1], abs=1e-9)
        assert [t.log_probability for t in found.tokens] == pytest.approx(own_T[: len(found.tokens)], abs=1e-9)
        for t, token in enumerate(found.tokens):
            best = law_TV[t].topk(asked.num_top).values.tolist()
            assert [value for _, value in token.top] == pytest.approx(best, abs=1e-9)
        said = "".join(token.piece.text for token in found.tokens if token.piece.utf8 is not None)
        assert said.startswith(answer.completion.text)
        if not asked.sampling.stop:
            assert said == answer.completion.text
            assert len(found.tokens) == len(ids) - has_end
        assert found.num_read == len(prompt_ids) + len(ids)
        more = answer.completion.cost.policy_tokens - without.completion.cost.policy_tokens
        assert more == found.num_read
    for answer, again in zip(together, alone, strict=False):
        assert (answer.logprobs is None) == (again.logprobs is None)
        if answer.logprobs is not None:
            assert [t.piece for t in answer.logprobs.tokens] == [t.piece for t in again.logprobs.tokens]
            values = [[t.log_probability for t in each.logprobs.tokens] for each in (answer, again)]
            assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert_nothing_is_left(state)


def test_who_leaves_before_they_are_read_leaves_nothing(answering):
    """The answer was paid for, and is in no ledger then."""
    asked = replace(asks_with_logprobs()[0], num_top=1)

    async def go():
        work = asyncio.ensure_future(answering.answer(asked))
        while not answering._under_way:
            await asyncio.sleep(0)
        (under_way,) = answering._under_way
        while under_way.spent.policy_tokens == 0:
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return await settled(answering)

    assert_nothing_is_left(asyncio.run(go()))


# In OpenAI's shapes. ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(raw_serving):
    with server(raw_serving) as running:
        yield running


@pytest.mark.parametrize("name", ["base:single", "base/good:bon(4)", CARDS])
def test_the_official_client_reads_those_of_a_chat_whole_and_streamed(served, name):
    client = served.openai
    given = {"model": name, "messages": HELLO, "seed": 7, "logprobs": True, "top_logprobs": 3}
    plain = client.chat.completions.create(model=name, messages=HELLO, seed=7)
    whole = client.chat.completions.create(**given)
    (choice,) = whole.choices
    assert choice.message.content == plain.choices[0].message.content
    assert plain.choices[0].logprobs is None
    content = choice.logprobs.content
    assert "".join(token.token for token in content if token.bytes) == choice.message.content
    assert b"".join(bytes(token.bytes or b"") for token in content).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    for token in content:
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] <= 0
        same = [other.logprob for other in token.top_logprobs if other.bytes == token.bytes]
        assert not same or token.logprob in same
    told = choice.model_extra["iama"]
    assert told["logprobs_of"].startswith("policy base, temperature 1")
    assert ("chooses" in told["logprobs_of"]) == (name != "base:single")
    assert (told["end_logprob"] is not None) == (choice.finish_reason == "stop")
    details, before = whole.usage.completion_tokens_details, plain.usage.completion_tokens_details
    ledgers = [told["ledger"], plain.choices[0].model_extra["iama"]["ledger"]]
    num_read = whole.usage.prompt_tokens + len(content) + (choice.finish_reason == "stop")
    assert (before.logprobs_tokens, details.logprobs_tokens) == (0, num_read)
    assert ledgers[0]["policy_tokens"] - ledgers[1]["policy_tokens"] == num_read
    assert whole.usage.completion_tokens == plain.usage.completion_tokens
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**given, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    for mine, theirs in zip(streamed, content, strict=True):
        assert (mine.token, mine.bytes) == (theirs.token, theirs.bytes)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-9)


def test_the_official_client_reads_those_of_texts(served):
    client, prompts = served.openai, ["how to", "fix a"]
    reply = client.completions.create(model="base", prompt=prompts, seed=7, max_tokens=6, logprobs=2)
    policy = served.opened.policies["base"]
    for choice, prompt in zip(reply.choices, prompts, strict=True):
        found = choice.logprobs
        ends = [*found.text_offset[1:], len(choice.text)]
        said = [choice.text[start:end] for start, end in zip(found.text_offset, ends, strict=True)]
        assert all(mine in (token, "") for mine, token in zip(said, found.tokens, strict=True))
        asked = Ask("base", None, read_method("identity"), prompt, Sampling(max_new_tokens=6), choice.index + 7)
        wanted = serve(policy, None, asked.method, asked.sampling).sample([prompt], seed=asked.seed)[0]
        law_TV = one_pass(policy, ids_of(policy, prompt), wanted.token_ids)
        own = [float(law_TV[t, i]) for t, i in enumerate(wanted.token_ids)][: len(found.tokens)]
        assert found.token_logprobs == pytest.approx(own, abs=1e-9)
        for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
            assert top[token] == value
            assert len(top) in (2, 3)
    none = client.completions.create(model="base", prompt="how to", seed=7, max_tokens=6, logprobs=0).choices[0]
    assert none.text == reply.choices[0].text
    assert none.logprobs.top_logprobs == [
        {token: value} for token, value in zip(none.logprobs.tokens, none.logprobs.token_logprobs, strict=True)
    ]
    pieces = client.completions.create(model="base", prompt="how to", seed=7, max_tokens=6, logprobs=2, stream=True)
    told = [piece.choices[0].logprobs for piece in pieces if piece.choices and piece.choices[0].logprobs]
    assert [each.tokens for each in told] == [reply.choices[0].logprobs.tokens]


@pytest.mark.parametrize(
    ("route", "body", "param", "said"),
    [
        ("chat/completions", {"logprobs": 3}, "logprobs", "write true or false"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "set logprobs: true"),
        ("completions", {"logprobs": True}, "logprobs", "from 0 to 5"),
        ("completions", {"logprobs": 6}, "logprobs", "from 0 to 5"),
    ],
)
def test_what_cannot_be_had_is_refused(served, route, body, param, said):
    given = {"messages": HELLO} if route.startswith("chat") else {"prompt": "how to"}
    response = served.http.post(f"/v1/{route}", json={"model": "base", **given, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


# What tokens say. ------------------------------------------------------------------------------------------------


def byte_level_policy(policy):
    """A tokenizer whose tokens are bytes, so that a character is several."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    return replace(policy, tokenizer=fast, eos_token_ids=frozenset({fast.eos_token_id}))


def judged(ids) -> Likelihoods:
    asked = Likelihoods([1], ids, 0)
    asked.found = [TokenLikelihood(i, -1.0, []) for i in ids]
    return asked


def test_tokens_that_are_parts_of_a_character_have_its_bytes(policy):
    policy = byte_level_policy(policy)
    vocabulary = Vocabulary(policy)
    text = " né 😀"
    ids = [*policy.tokenizer(text)["input_ids"], policy.tokenizer.eos_token_id]
    found = vocabulary.logprobs(judged(ids), text, Sampling())
    assert b"".join(token.piece.utf8 for token in found.tokens).decode() == text
    assert found.end == -1.0
    assert found.tokens[2].piece == Piece("bytes:\\xc3", b"\xc3")
    cut = vocabulary.logprobs(judged(ids), " n", Sampling(stop=("é",)))
    assert [token.piece.text for token in cut.tokens] == [" ", "n"]
    assert vocabulary.piece(policy.tokenizer.eos_token_id, False) == Piece("<|end|>", None)


def test_what_a_token_says_is_what_it_adds_to_the_text(policy):
    vocabulary = Vocabulary(policy)
    for text in ("how to bake bread", "fix a bike then"):
        ids = policy.tokenizer(text)["input_ids"]
        found = vocabulary.logprobs(judged(ids), policy.tokenizer.decode(ids, skip_special_tokens=True), Sampling())
        assert "".join(token.piece.text for token in found.tokens) == text
        assert found.end is None


def test_a_tokenizer_that_tidies_its_text_is_read_by_what_each_token_adds(policy):
    class Tidy:
        """Leaves out a space before a full stop."""

        def __getattr__(self, name):
            return getattr(policy.tokenizer, name)

        def __len__(self):
            return len(policy.tokenizer)

        def decode(self, ids, **settings):
            return policy.tokenizer.decode(ids, **settings).replace(" b", "b")

    tidy = replace(policy, tokenizer=Tidy())
    ids = policy.tokenizer("how to bake bread")["input_ids"]
    text = tidy.tokenizer.decode(ids)
    found = Vocabulary(tidy).logprobs(judged(ids), text, Sampling())
    assert "".join(token.piece.text for token in found.tokens) == text == "how tobakebread"


def test_reading_takes_the_least_likely_for_what_json_cannot_say():
    from inference.serving.asks import Logprobs, TokenLogprob
    from inference.serving.replies import chat_logprobs, text_logprobs

    logprobs = Logprobs((TokenLogprob(Piece("a", b"a"), -math.inf, ((Piece("b", b"b"), -0.0),)),), None, 2)
    assert chat_logprobs(logprobs)["content"][0]["logprob"] == -9999.0
    assert text_logprobs(logprobs)["top_logprobs"] == [{"b": -0.0, "a": -9999.0}]
