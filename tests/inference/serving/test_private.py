"""Threads of other people's code: how many at a time, how long, and models that are theirs alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
import torch

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine import packed
from inference.engine.policy import load_policy
from inference.samplers.serve import read_method, serve
from inference.serving.answering import Answering
from inference.serving.asks import AnswerError, Ask, ClosingError, RewardTooSlowError
from inference.serving.private import Job, Threads, twin_policy, twin_reward


def test_so_many_run_at_a_time_and_the_others_wait():
    threads, running, most = Threads("test", 2, 5.0), [], []

    def work(_: Job) -> int:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return len(most)

    async def go():
        return await asyncio.gather(*(threads.run(work) for _ in range(7)))

    assert len(asyncio.run(go())) == 7
    assert max(most) == 2
    threads.close(1)


def test_one_that_is_too_slow_makes_room_for_the_others():
    threads, go_on = Threads("test", 1, 0.2), threading.Event()

    async def go():
        slow = threads.run(lambda _: go_on.wait(10))
        return await asyncio.gather(slow, threads.run(lambda _: "done"), return_exceptions=True)

    slow, done = asyncio.run(go())
    go_on.set()
    assert isinstance(slow, RewardTooSlowError)
    assert str(slow) == "the reward took longer than 0.2 s; ask for less"
    assert done == "done"
    threads.close(1)


def test_time_is_counted_from_the_last_step_on():
    threads = Threads("test", 1, 0.15)

    def steps(job: Job) -> bool:
        return all(job.go_on() and time.sleep(0.02) is None for _ in range(15))

    assert asyncio.run(threads.run(steps))
    threads.close(1)


def test_one_that_is_cancelled_while_it_waits_never_runs_and_one_in_steps_ends():
    threads, go_on, ran = Threads("test", 1, None), threading.Event(), []

    def steps(job: Job) -> None:
        while job.go_on():
            time.sleep(0.001)
        ran.append("steps")

    async def go():
        tasks = [asyncio.ensure_future(threads.run(work)) for work in (steps, lambda _: ran.append("waiting"))]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert not threads._waiting
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await threads.run(lambda _: ran.append("next"))
        go_on.set()

    asyncio.run(go())
    assert ran == ["steps", "next"]
    threads.close(1)


def test_what_is_raised_reaches_the_one_who_waits_even_the_end_of_a_program():
    threads = Threads("test", 1, None)

    def work(error: BaseException):
        def run(_: Job) -> None:
            raise error

        return run

    async def go():
        works = [work(KeyError("a")), work(SystemExit(1))]
        return await asyncio.gather(*map(threads.run, works), return_exceptions=True)

    assert [type(error) for error in asyncio.run(go())] == [KeyError, AnswerError]
    threads.close(1)


def test_after_closing_nobody_waits():
    threads, go_on = Threads("test", 1, None), threading.Event()

    async def go():
        tasks = [asyncio.ensure_future(threads.run(lambda _: go_on.wait(10))) for _ in range(2)]
        await asyncio.sleep(0.01)
        threads.close(0)
        results = await asyncio.gather(*tasks, threads.run(lambda _: None), return_exceptions=True)
        go_on.set()
        return results

    assert [type(error) for error in asyncio.run(go())] == [ClosingError] * 3


@torch.inference_mode()
def test_a_twin_has_the_weights_and_nothing_else_in_common(policy, reward_spec):
    reward = load_reward("proxy", reward_spec)
    for model, twin in (
        (policy.model, twin_policy(policy).model),
        (reward.classifier.model, twin_reward(reward).classifier.model),
    ):
        ids = torch.arange(12).reshape(2, 6)
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
        assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
        shared = {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
        assert not shared
        assert twin.config is not model.config


def test_packed_models_have_twins_and_answer_as_a_whole(tiny, monkeypatch):
    """Packed weights cannot be copied; each twin's products belong to its own layers."""
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 0)
    policy = load_policy("base", PolicySpec(path=str(tiny.policy)))
    reward = load_reward("good", RewardSpec(model=str(tiny.reward)))
    asked = Ask("base", "good", read_method("args(top_k=3)"), "fix a bike", Sampling(max_new_tokens=4), 0)
    (alone,) = serve(policy, reward, asked.method, asked.sampling).sample([asked.prompt], seed=0)
    packed.pack(reward.classifier.model.requires_grad_(requires_grad=False))  # as samplers by its gradient do
    reward.score([asked.prompt], [alone.text], {})
    for model, twin in (
        (policy.model, twin_policy(policy).model),
        (reward.classifier.model, twin_reward(reward).classifier.model),
    ):
        gc.collect()
        layers = [module for module in twin.modules() if isinstance(module, packed._Packed)]
        assert len(layers) == sum(isinstance(module, packed._Packed) for module in model.modules()) > 0
        assert all(layer.product._parts[layer.place] is layer for layer in layers)
        products = [{id(m.product) for m in each.modules() if hasattr(m, "product")} for each in (model, twin)]
        assert products[0].isdisjoint(products[1])
        ids = torch.arange(12).reshape(2, 6)
        with torch.inference_mode():
            assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    answering = Answering({"base": policy}, {"good": reward})
    answer = asyncio.run(answering.answer(asked))
    answering.close()
    assert answer.completion.text == alone.text


def test_a_reward_that_is_no_classifier_is_its_own_twin(reward_spec):
    function = reward_from_function(lambda prompts, completions, **_: [0.0] * len(prompts), "function")
    assert twin_reward(function) is function


@pytest.mark.parametrize("sign", [1, -1])
def test_a_twin_scores_as_the_reward_does(reward_spec, sign):
    reward = load_reward("proxy", RewardSpec(model=reward_spec.model, sign=sign))
    prompts, texts = [[{"role": "user", "content": "fix a bike"}]] * 2, ["no thanks", "first mix"]
    assert twin_reward(reward).score(prompts, texts, {})[0] == reward.score(prompts, texts, {})[0]
