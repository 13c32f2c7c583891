"""Answers of many asks side by side: each is the one that its sampler gives alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from iama.config.specs import RewardSpec, Sampling
from iama.errors import IamaWarning
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine.decode import Decoder, Samples
from inference.engine.random_streams import stream_keys
from inference.engine.reward_rows import RewardRows
from inference.engine.rows import Rows
from inference.samplers.segments import SegmentLoop
from inference.samplers.serve import read_method, serve
from inference.selection import stopping
from inference.serving.answering import Answering
from inference.serving.asks import (
    AnswerError,
    Ask,
    BadAskError,
    Candidate,
    ClosingError,
    RewardFailedError,
    RewardTooSlowError,
    SegmentKept,
    Spent,
    Text,
    TooLargeError,
    TooLongAskError,
)

TEXTS = ("how to bake bread", "how to grow tomatoes", "fix a bike", "mix water then flour please", "no thanks")
METHODS = (
    "identity",
    "bon(4)",
    "bop(3)",
    "soft_bon(4, temperature=0.1)",
    "itp(4, 0.1)",
    "mbr(4, 0.5)",
    "lstat(0, 0.5, 0.5)",
    "bon(6, stop=pandora(0.05), width=2)",
    "bon(5, stop=target(0.9, threshold=0.5))",
    "cards(target=0.5, max_proposals=4)",
    "rejection(target=0.5, max_proposals=4, parallel_proposals=2)",
    "ggro(num_candidates=3)",
    "ggro(num_candidates=3, score=exact, random_cuts=0.3, greedy=false)",
    "blockwise(2, boundary=length, max_segment=4)",
    "blockwise(3, first=tilted, boundary=entropy, min_segment=2)",
    "redraw(2, 2)",
    "args(top_k=3)",
    "sea(num_steps=2, num_chains=2)",
)
WITH_GRADIENT = (
    "ggro(num_candidates=3)",
    "blockwise(3, first=tilted, boundary=entropy, min_segment=2)",
    "sea(num_steps=2, num_chains=2)",
)


def letters(completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in letters(text)) / 10 for text in completions]


class Moody:
    """A reward that raises, sleeps or has no score where a prompt's column says so."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, prompts, completions, mood, **columns):
        if mood[0] == "raises":
            raise OSError("/secret/path: another's text")
        if mood[0] == "sleeps":
            self.go_on.wait(10)
        return [None if mood[0] == "silent" else float(len(letters(text))) for text in completions]


@pytest.fixture(scope="module")
def moody():
    return Moody()


@pytest.fixture(scope="module")
def rewards(tiny, moody):
    silent_ok = reward_from_function(moody, "moody")
    silent_ok._missing_ok = True
    return {
        "helpful": load_reward("helpful", RewardSpec(model=str(tiny.reward))),
        "harmless": load_reward("harmless", RewardSpec(model=str(tiny.other_reward))),
        "vowels": reward_from_function(vowels, "vowels"),
        "moody": silent_ok,
    }


@pytest.fixture
def answering(policy, rewards):
    made = Answering({"base": policy}, rewards, batch_size=8, reward_timeout_s=0.4)
    yield made
    made.close()
    assert not asyncio.run(made.state()).is_alive


def ask(method="bon(4)", criterion="helpful", text=TEXTS[0], seed=0, columns=None, **sampling) -> Ask:
    prompt = [{"role": "user", "content": text}]
    return Ask(
        "base",
        criterion,
        read_method(method),
        prompt,
        Sampling(**{"max_new_tokens": 9} | sampling),
        seed,
        columns or {},
    )


def mixture(number: int, seed: int, methods=METHODS) -> list[Ask]:
    """Asks of these methods, and all criteria, lengths, stop strings, temperatures and seeds."""
    rng = random.Random(seed)
    asks = []
    for i in range(number):
        method = methods[i % len(methods)]
        criterion = rng.choice(
            ("helpful", "harmless") if method in WITH_GRADIENT else ("helpful", "harmless", "vowels")
        )
        sampling = {
            "max_new_tokens": rng.randint(3, 14),
            "temperature": rng.choice([1.0, 1.2]),
            "stop": rng.choice([(), ("the",), ("e b",)]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        }
        asks.append(ask(method, criterion, rng.choice(TEXTS), rng.randrange(1000), **sampling))
    return asks


def counted(completion):
    """All of a completion but what is measured, and rewards."""
    candidates = [replace(candidate, reward=None) for candidate in completion.candidates]
    trace = [replace(segment, reward=0.0, threshold=0.0) for segment in completion.trace]
    cost = replace(completion.cost, seconds=0.0, peak_memory=0)
    return replace(completion, candidates=candidates, trace=tuple(trace), cost=cost)


def alone(policy, rewards, asked: Ask):
    """What the method's sampler answers."""
    sampler = serve(policy, rewards.get(asked.criterion), asked.method, asked.sampling)
    columns = {name: [value] for name, value in asked.columns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)  # of proposals that none of was accepted
        return sampler.sample([asked.prompt], seed=asked.seed, columns=columns)[0]


def assert_same(got, wanted) -> None:
    assert counted(got) == counted(wanted)
    for mine, theirs in zip(got.candidates, wanted.candidates, strict=True):
        assert mine.reward == pytest.approx(theirs.reward, abs=1e-5)
    assert [s.reward for s in got.trace] == pytest.approx([s.reward for s in wanted.trace], abs=1e-5)


async def settled(answering: Answering):
    """The state when nothing is under way any more, and the loop has heard of all who left."""
    heard = threading.Event()
    answering._loop.put(heard.set)
    assert await asyncio.to_thread(heard.wait, 30)
    for _ in range(200):
        state = await answering.state()
        if not (state.live or state.waiting or state.num_rows or answering._loop.lanes):
            return state
        await asyncio.sleep(0.01)
    raise AssertionError(state)


def assert_nothing_is_left(state) -> None:
    assert state.num_rows == 0
    assert state.live == state.waiting == {}
    assert state.fed == (
        state.answered.policy_tokens + state.lost[0],
        state.answered.reward_tokens + state.lost[1],
    )


def test_each_answer_is_the_one_that_its_sampler_gives_alone(policy, rewards, answering):
    asks = mixture(33, seed=1)

    async def go():
        together = await asyncio.gather(*map(answering.answer, asks))
        one_by_one = [await answering.answer(asked) for asked in asks[::4]]
        return together, one_by_one, await settled(answering)

    together, one_by_one, state = asyncio.run(go())
    for asked, answer in zip(asks, together, strict=True):
        assert_same(answer.completion, alone(policy, rewards, asked))
    for answer, again in zip(together[::4], one_by_one, strict=True):
        assert_same(again.completion, answer.completion)
    assert_nothing_is_left(state)
    assert state.lost == (0, 0)
    assert sum(a.completion.cost.policy_tokens for a in [*together, *one_by_one]) == state.fed[0]


def test_a_sampler_of_somebodys_own_answers_as_a_whole(policy, rewards, answering, tmp_path):
    """Although it derives from one of ours, and is asked while others are."""
    file = tmp_path / "own.py"
    file.write_text(
        "from iama.config.schema import Strict\n"
        "from inference.samplers.best_of import SelectionSampler\n"
        "from inference.samplers.serve import read_method, served_of\n"
        "class Last(SelectionSampler):\n"
        "    class Settings(Strict):\n"
        "        n: int = 3\n"
        "    def __init__(self, policy, reward, settings, sampling, batch_size):\n"
        "        super().__init__(policy, reward, served_of(read_method(f'bon({settings.n})')), sampling, batch_size)\n"
        "    def sample(self, prompts, *, seed, columns=None):\n"
        "        from dataclasses import replace\n"
        "        found = super().sample(prompts, seed=seed, columns=columns)\n"
        "        return [replace(c, chosen=len(c.candidates) - 1) for c in found]\n"
    )
    asks = [ask(f"{file}:Last(n=2)"), ask("bon(2)"), ask(f"{file}:Last")]

    async def go():
        return await asyncio.gather(*map(answering.answer, asks))

    answers = asyncio.run(go())
    for answer, asked in zip(answers, asks, strict=True):
        assert_same(answer.completion, alone(policy, rewards, asked))
    assert [answer.completion.chosen for answer in answers[::2]] == [1, 2]


def test_a_whole_answer_decodes_as_many_rows_as_configured(answering, tmp_path):
    file = tmp_path / "rows.py"
    file.write_text(
        "from iama.config.schema import Strict\n"
        "from inference.samplers.best_of import SelectionSampler\n"
        "from inference.samplers.serve import read_method, served_of\n"
        "class Rows(SelectionSampler):\n"
        "    class Settings(Strict):\n"
        "        pass\n"
        "    def __init__(self, policy, reward, settings, sampling, batch_size):\n"
        f"        with open({str(tmp_path / 'sizes')!r}, 'a') as file:\n"
        "            file.write(f'{batch_size} ')\n"
        "        super().__init__(policy, reward, served_of(read_method('bon(2)')), sampling, batch_size)\n"
    )
    asyncio.run(answering.answer(ask(f"{file}:Rows")))
    assert set((tmp_path / "sizes").read_text().split()) == {"8"}


def test_samplers_are_kept_by_the_event_loop_alone(answering, monkeypatch):
    """Long prompts are read in threads, which would push out each other's samplers."""
    threads = set()

    class Noted(dict):
        def __setitem__(self, key, sampler):
            threads.add(threading.current_thread())
            super().__setitem__(key, sampler)

    monkeypatch.setattr("inference.serving.answering.LONG_PROMPT", 10)
    monkeypatch.setattr("inference.serving.answering.MAX_SAMPLERS", 1)
    answering._samplers = Noted()
    asks = [ask("bon(2)", max_new_tokens=number) for number in (2, 3, 4)]

    async def go():
        return await asyncio.gather(*map(answering.answer, asks))

    assert len(asyncio.run(go())) == 3
    assert threads == {threading.current_thread()}
    assert len(answering._samplers) == 1


def test_no_reward_is_needed_for_a_single_sample(policy, rewards, answering):
    asked = ask("identity", None)
    answer = asyncio.run(answering.answer(asked))
    assert_same(answer.completion, alone(policy, rewards, asked))
    assert answer.completion.reward is None
    assert (answer.num_sampled, answer.num_rejected) == (len(answer.completion.token_ids), 0)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_that_are_told_are_the_text(answering, method):
    asks = [ask(method, text=text, seed=seed, stop=("e b", "bread")) for seed, text in enumerate(TEXTS[:3])]
    told: list[list] = [[] for _ in asks]

    async def go():
        pairs = zip(asks, told, strict=True)
        return await asyncio.gather(*(answering.answer(asked, events.append) for asked, events in pairs))

    for answer, events in zip(asyncio.run(go()), told, strict=True):
        completion = answer.completion
        assert "".join(event.text for event in events if isinstance(event, Text)) == completion.text
        assert all(event.text for event in events if isinstance(event, Text))
        kept = [event.segment for event in events if isinstance(event, SegmentKept)]
        assert tuple(kept) == (() if method.startswith("redraw") else completion.trace)
        spent = [event.num_sampled for event in events if isinstance(event, Spent)]
        assert spent == sorted(spent)
        assert all(number <= answer.num_sampled for number in spent)
        candidates = [event for event in events if isinstance(event, Candidate)]
        if completion.trace or method.startswith(("identity", "args", "sea")):
            assert candidates == []
            continue
        drawn, scored = ([c for c in candidates if (c.reward is None) == is_drawn] for is_drawn in (True, False))
        wanted = [Candidate(i, c.text, len(c.token_ids), c.reward) for i, c in enumerate(completion.candidates)]
        assert scored == wanted
        assert sorted(drawn, key=lambda c: c.index) == [replace(c, reward=None) for c in wanted]
        assert isinstance(events[-1], Text)


def test_what_a_reward_does_wrong_fails_that_ask_alone(policy, rewards, answering, moody):
    asks = {mood: ask(criterion="moody", columns={"mood": mood}) for mood in ("raises", "silent", "sleeps", "well")}

    async def go():
        answers = await asyncio.gather(*map(answering.answer, asks.values()), return_exceptions=True)
        moody.go_on.set()
        return dict(zip(asks, answers, strict=True)), await settled(answering)

    got, state = asyncio.run(go())
    assert_same(got["well"].completion, alone(policy, rewards, asks["well"]))
    assert isinstance(got["sleeps"], RewardTooSlowError)
    for mood in ("raises", "silent"):
        assert isinstance(got[mood], RewardFailedError)
        assert "criterion 'moody'" in str(got[mood])
        assert "secret" not in str(got[mood])
        assert "another" not in str(got[mood])
    assert_nothing_is_left(state)


def test_a_reward_that_hangs_keeps_no_whole_answer_waiting(policy, rewards, answering, moody):
    moody.go_on.clear()
    asks = [ask("args(top_k=3)", "moody", columns={"mood": mood}) for mood in ("sleeps", "well", "raises")]

    async def go():
        return await asyncio.gather(*map(answering.answer, asks), return_exceptions=True)

    slow, well, failed = asyncio.run(go())
    moody.go_on.set()
    assert isinstance(slow, RewardTooSlowError)
    assert_same(well.completion, alone(policy, rewards, asks[1]))
    assert isinstance(failed, RewardFailedError)


@pytest.mark.parametrize(
    "method", ["bon(4)", "cards(target=9, max_proposals=2)", "args(top_k=3)", "sea(num_steps=1, num_chains=1)"]
)
def test_an_answer_that_is_too_long_for_its_reward_is_the_asks_mistake(policy, tiny, method):
    reward = load_reward("short", RewardSpec(model=str(tiny.reward)))
    asked = ask(method, "short")
    (ids,) = reward.classifier.render([asked.prompt], [""])
    reward.scorer = replace(reward.classifier, context_length=len(ids) + 1)
    answering = Answering({"base": policy}, {"short": reward})
    with pytest.raises(
        TooLongAskError, match=r"^the reward of criterion 'short' cannot read .*lower max_tokens"
    ) as told:
        asyncio.run(answering.answer(asked))
    answering.close()
    assert (told.value.status, told.value.code) == (400, "context_length_exceeded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "bon(4)",
        "bon(4, stop=pandora(0.001))",
        "cards(target=9, max_proposals=2, max_segment=4)",
        "blockwise(2, boundary=length, max_segment=4)",
        "ggro(num_candidates=3, score=exact, random_cuts=0.3, greedy=false)",
    ],
)
def test_an_answer_that_outgrows_its_reward_takes_no_other_with_it(policy, tiny, method, caplog):
    """What the others had read and drawn is not read and drawn again."""
    reward = load_reward("short", RewardSpec(model=str(tiny.reward)))
    how = {"max_new_tokens": 12}
    asks = [ask(method, "short", seed=seed, **how) for seed in range(4)]
    asks.insert(2, ask(method, "short", "mix water then flour please " * 12, **how))
    long, brief = (len(reward.classifier.render([asked.prompt], [""])[0]) for asked in asks[2:0:-1])
    assert long > brief + 12
    reward.scorer = replace(reward.classifier, context_length=long + 3)
    answering = Answering({"base": policy}, {"short": reward}, batch_size=32)

    async def go():
        return await asyncio.gather(*map(answering.answer, asks), return_exceptions=True), await settled(answering)

    got, state = asyncio.run(go())
    failed = got.pop(2)
    answering.close()
    assert isinstance(failed, TooLongAskError)
    assert_nothing_is_left(state)
    for answer, asked in zip(got, [*asks[:2], *asks[3:]], strict=True):
        assert_same(answer.completion, alone(policy, {"short": reward}, asked))
    most = 8 if "bon" in method or "ggro" in method else 2  # rows of the one that fails
    assert state.lost[0] <= num_tokens(policy, asks[2]) + most * 12
    assert state.lost[1] <= 2 * long
    assert "tried again" not in caplog.text


def test_a_utility_that_fails_fails_that_ask_alone(answering, tmp_path):
    file = tmp_path / "utility.py"
    file.write_text("def broken(texts, others):\n    raise TypeError('/secret/path')\n")

    async def go():
        asks = [ask(f"mbr(4, 0.5, utility={file}:broken)"), ask("mbr(4, 0.5)")]
        return await asyncio.gather(*map(answering.answer, asks), return_exceptions=True)

    failed, well = asyncio.run(go())
    assert type(failed) is AnswerError
    assert str(failed) == "mbr could not compare the candidates"
    assert well.completion.text


def test_a_rule_that_takes_its_time_holds_up_no_other_ask(answering, monkeypatch):
    threads = []

    def slow(rewards_RM, n, *prior):
        threads.append(threading.current_thread())
        return np.zeros(rewards_RM.shape)

    monkeypatch.setattr(stopping, "beacon_index", slow)
    answer = asyncio.run(answering.answer(ask("bon(4, stop=beacon(0.05))")))
    assert len(answer.completion.candidates) == 1
    assert threads
    assert threading.main_thread() not in threads


def test_a_missing_score_is_no_failure_where_nothing_is_ranked(answering):
    answer = asyncio.run(answering.answer(ask("identity", "moody", columns={"mood": "silent"})))
    assert answer.completion.reward != answer.completion.reward


def test_a_guided_answer_keeps_no_score_waiting(policy, rewards, monkeypatch):
    """By a reward that is code, of which each score waits for its turn alone."""
    go_on, original = threading.Event(), SegmentLoop.step

    def step(loop):
        go_on.wait(10)
        return original(loop)

    monkeypatch.setattr(SegmentLoop, "step", step)
    made = Answering({"base": policy}, rewards, num_private=1)

    async def go():
        guided = asyncio.ensure_future(made.answer(ask("cards(target=9, max_proposals=2)", "vowels")))
        while not (await made.state()).live.get("guided"):
            await asyncio.sleep(0.001)
        selected = await asyncio.wait_for(made.answer(ask("bon(2)", "vowels")), 5)
        is_first = not guided.done()
        go_on.set()
        return is_first, selected, await guided

    is_first, selected, guided = asyncio.run(go())
    made.close()
    assert is_first
    assert_same(selected.completion, alone(policy, rewards, ask("bon(2)", "vowels")))
    assert_same(guided.completion, alone(policy, rewards, ask("cards(target=9, max_proposals=2)", "vowels")))


def test_no_more_calls_of_a_reward_go_on_at_a_time_than_configured(policy):
    lock, going, most = threading.Lock(), 0, 0

    def counting(prompts, completions, **columns):
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        time.sleep(0.005)
        with lock:
            going -= 1
        return vowels(prompts, completions)

    rewards = {"counting": reward_from_function(counting, "counting")}
    made = Answering({"base": policy}, rewards, num_private=2)
    methods = ("bon(4)", "cards(target=9, max_proposals=2)", "args(top_k=2)") * 3
    asks = [ask(method, "counting", seed=seed) for seed, method in enumerate(methods)]

    async def go():
        return await asyncio.gather(*map(made.answer, asks))

    assert len(asyncio.run(go())) == len(asks)
    made.close()
    assert most == 2


@pytest.mark.parametrize("mood", ["raises", "silent"])
def test_a_reward_that_fails_while_it_guides_fails_that_ask_alone(answering, mood):
    cards = "cards(target=9, max_proposals=2)"

    async def go():
        asks = [ask(cards, "moody", columns={"mood": each}) for each in (mood, "well")]
        return await asyncio.gather(*map(answering.answer, asks), return_exceptions=True)

    failed, well = asyncio.run(go())
    assert isinstance(failed, RewardFailedError)
    assert well.completion.trace


def test_what_is_told_to_may_fail_for_itself_alone(answering):
    def refuse(event):
        raise OSError("gone")

    async def go():
        asks = [ask(method) for method in ("identity", "bon(4)", "cards(target=9, max_proposals=2)", "args(top_k=3)")]
        told = (answering.answer(asked, refuse) for asked in asks)
        untold = (answering.answer(asked) for asked in asks)
        return await asyncio.gather(*told, *untold, return_exceptions=True), await settled(answering)

    answers, state = asyncio.run(go())
    assert all(isinstance(answer, AnswerError) for answer in answers[:4])
    assert all(answer.completion.text for answer in answers[4:])
    assert_nothing_is_left(state)


def test_cancelling_frees_rows_at_once(answering, moody):
    """While samples are drawn, while a prompt is held between rounds, and while a score is waited for."""
    asks = [
        ask("bon(8)", max_new_tokens=60),
        ask("bon(40, stop=target(0.9, threshold=99))", max_new_tokens=60),
        ask("cards(target=99, max_proposals=5)", max_new_tokens=60),
        ask("bon(2)", "moody", columns={"mood": "sleeps"}, max_new_tokens=2),
    ]
    moody.go_on.clear()

    async def go():
        tasks = [asyncio.ensure_future(answering.answer(asked)) for asked in asks]
        while sum((await answering.state()).live.values()) < len(asks):
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        gone = await asyncio.gather(*tasks, return_exceptions=True)
        moody.go_on.set()
        return gone, await settled(answering)

    gone, state = asyncio.run(go())
    assert all(isinstance(answer, asyncio.CancelledError) for answer in gone)
    assert_nothing_is_left(state)
    assert sum(state.lost) > 0


@pytest.mark.slow
def test_nothing_is_left_of_300_asks_of_which_many_are_cancelled(policy, rewards, answering, monkeypatch):
    for reward in rewards.values():
        RewardRows(reward)  # which tries once whether a model reads in pieces
    made: list[Rows] = []
    original = Rows.__init__

    def noted(self, *arguments):
        original(self, *arguments)
        if threading.current_thread().name != "iama-whole":
            made.append(self)

    monkeypatch.setattr(Rows, "__init__", noted)
    rng = random.Random(3)
    asks = mixture(290, seed=2, methods=METHODS[:-2]) + mixture(10, seed=3, methods=METHODS[-2:])
    rng.shuffle(asks)

    async def one(asked):
        task = asyncio.ensure_future(answering.answer(asked, (lambda _: None) if rng.random() < 0.5 else None))
        if rng.random() < 0.4:
            await asyncio.sleep(rng.random())
            task.cancel()
        return await task

    async def go():
        clients = asyncio.Semaphore(32)

        async def client(asked):
            async with clients:
                return await one(asked)

        answers = await asyncio.gather(*map(client, asks), return_exceptions=True)
        return answers, await settled(answering)

    answers, state = asyncio.run(go())
    cancelled = [isinstance(answer, asyncio.CancelledError) for answer in answers]
    assert 20 < sum(cancelled) < 150
    assert [a for a, gone in zip(answers, cancelled, strict=True) if not gone and isinstance(a, BaseException)] == []
    assert_nothing_is_left(state)
    assert all(rows.num_used == 0 for rows in made)
    for asked, answer in list(zip(asks, answers, strict=True))[::7]:
        if not isinstance(answer, BaseException):
            assert_same(answer.completion, alone(policy, rewards, asked))


def num_tokens(policy, asked: Ask) -> int:
    """Of the prompt."""
    return len(render_prompt(policy.tokenizer, asked.prompt))


class Failing:
    """Lets passes of `Rows` fail where a predicate says so."""

    def __init__(self, monkeypatch, model, error: Exception, fails) -> None:
        self.num_failed = 0
        original = Rows.extend

        def extend(rows, slots, tokens):
            if rows._model is model and fails(rows, slots, tokens):
                self.num_failed += 1
                raise error
            return original(rows, slots, tokens)

        monkeypatch.setattr(Rows, "extend", extend)


def test_where_memory_runs_out_the_batch_is_halved_and_answers_stay(policy, rewards, answering, monkeypatch, caplog):
    asks = mixture(14, seed=5)
    wanted = [alone(policy, rewards, asked) for asked in asks]
    error = torch.OutOfMemoryError("too much")
    failing = Failing(monkeypatch, policy.model, error, lambda rows, slots, _: len(slots) > 2)
    told: list[list] = [[] for _ in asks]

    async def go():
        pairs = zip(asks, told, strict=True)
        return await asyncio.gather(*(answering.answer(asked, events.append) for asked, events in pairs))

    answers = asyncio.run(go())
    assert failing.num_failed > 0
    assert "out of memory with 8 rows; going on with 4" in caplog.text
    for answer, completion, events in zip(answers, wanted, told, strict=True):
        if "parallel" not in str(completion.trace):
            assert_same(answer.completion, completion)
        assert "".join(event.text for event in events if isinstance(event, Text)) == completion.text
        drawn = [event.index for event in events if isinstance(event, Candidate) and event.reward is None]
        assert len(drawn) == len(set(drawn))


def test_an_ask_that_memory_does_not_suffice_for_fails_alone(policy, rewards, answering, monkeypatch):
    large, small = ask(text=TEXTS[3] * 2), [ask(seed=seed) for seed in range(4)]
    wanted = [alone(policy, rewards, asked) for asked in small]
    least = num_tokens(policy, large)
    error = torch.OutOfMemoryError("too much")
    Failing(monkeypatch, policy.model, error, lambda rows, slots, tokens: max(map(len, tokens)) >= least)

    async def go():
        return await asyncio.gather(*map(answering.answer, [*small[:2], large, *small[2:]]), return_exceptions=True)

    got = asyncio.run(go())
    assert isinstance(got.pop(2), TooLargeError)
    for answer, completion in zip(got, wanted, strict=True):
        assert_same(answer.completion, completion)


def test_an_ask_that_breaks_a_lane_fails_alone(policy, rewards, answering, monkeypatch, caplog):
    poison, others = ask(text=TEXTS[3] * 2), [ask(seed=seed) for seed in range(4)]
    least = num_tokens(policy, poison)
    Failing(
        monkeypatch,
        policy.model,
        ZeroDivisionError("/secret"),
        lambda rows, slots, tokens: max(map(len, tokens)) >= least,
    )

    async def go():
        answers = await asyncio.gather(
            *map(answering.answer, [*others[:2], poison, *others[2:]]), return_exceptions=True
        )
        return answers, await answering.answer(others[0]), await settled(answering)

    got, later, state = asyncio.run(go())
    failed = got.pop(2)
    assert type(failed) is AnswerError
    assert str(failed) == "policy 'base' could not answer this request"
    assert "tried again one by one" in caplog.text
    monkeypatch.undo()
    for answer, asked in zip([*got, later], [*others, others[0]], strict=True):
        assert_same(answer.completion, alone(policy, rewards, asked))
    assert_nothing_is_left(state)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy": "other"}, "policy 'other' is not served; ask for one of base"),
        ({"criterion": "kind"}, "criterion 'kind' is not served; ask for one of helpful, harmless, vowels, moody"),
        ({"criterion": None}, "bon(4) selects by a reward"),
        ({"method": read_method("cards")}, "CARDS has no target"),
        ({"method": read_method(WITH_GRADIENT[0]), "criterion": "vowels"}, "needs the gradient of a reward"),
        ({"sampling": Sampling(max_new_tokens=500)}, "exceeds the 128 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_pass(answering, changes, told):
    with pytest.raises(BadAskError, match=r"^[^\n]*$") as caught:
        asyncio.run(answering.answer(replace(ask(), **changes)))
    assert told in str(caught.value)
    assert asyncio.run(answering.state()).fed == (0, 0)


def test_closing_fails_what_is_under_way(policy, rewards, moody):
    made = Answering({"base": policy}, rewards)
    moody.go_on.clear()
    asks = [ask("bon(64)", max_new_tokens=100), ask("identity", "moody", columns={"mood": "sleeps"}, max_new_tokens=1)]

    async def go():
        tasks = [asyncio.ensure_future(made.answer(asked)) for asked in asks]
        while not (await made.state()).live:
            await asyncio.sleep(0.001)
        threading.Timer(0.3, moody.go_on.set).start()
        await asyncio.to_thread(made.close)
        return await asyncio.gather(*tasks, made.answer(ask()), return_exceptions=True)

    assert [type(error) for error in asyncio.run(go())] == [ClosingError] * 3
    assert not asyncio.run(made.state()).is_alive


def test_rows_that_become_free_go_to_the_asks_that_have_fewest(answering):
    """An ask for one sample comes after one for 200, and is answered before it."""

    async def go():
        many = asyncio.ensure_future(answering.answer(ask("bon(200)", max_new_tokens=12)))
        while not (await answering.state()).live:
            await asyncio.sleep(0.001)
        await answering.answer(ask("identity", max_new_tokens=12))
        is_first = not many.done()
        many.cancel()
        return is_first

    assert asyncio.run(go())


def test_a_row_more_goes_to_the_request_that_has_fewest(policy, prompts_ids):
    decoder = Decoder(policy, 8, is_fair=True)
    streams = stream_keys(0, [1] * 9, range(9))
    requests = [Samples(0, prompts_ids[0], streams[:n], Sampling(max_new_tokens=30)) for n in (9, 1, 9, 2)]
    decoder.add(requests[0])
    decoder.step()
    assert requests[0].num_live == 8
    for request in requests[1:]:
        decoder.add(request)
    decoder.drop(requests[0])
    decoder.step()
    assert [request.num_live for request in requests[1:]] == [1, 5, 2]
    for request in requests[1:]:
        decoder.drop(request)
    assert decoder.num_rows == 0
