"""An ask becomes an answer: each method as a small coroutine on the lanes of the one loop.

An answer is the one that `serve(policy, reward, method, sampling).sample([prompt], seed=seed)` gives, with the same
ledger (apart from seconds and memory), whoever else asks meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np

from iama.cost import Cost
from iama.errors import IamaError, RewardError, TooLongError
from iama.rewards.reward import Reward
from inference.engine.decode import Decoder, HeldPrompt, Samples
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys, stream_keys
from inference.engine.responses import PooledPrompt, Response, check_fit, pool_of, response_text
from inference.samplers.base import Completion, Sampler, render_checked
from inference.samplers.best_of import ScoredTexts, SelectionSampler, TextScorer, keep, number_and_choice
from inference.samplers.blockwise import Blockwise
from inference.samplers.cards import Cards
from inference.samplers.ggro import Ggro
from inference.samplers.guided import completion_of
from inference.samplers.segments import SegmentLoop, SegmentRequest
from inference.samplers.serve import serve
from inference.samplers.stopped import Going, StoppedSampler, rounds
from inference.selection.rules import rule_of
from inference.selection.stopping import Stopped
from inference.serving.asks import (
    LONG_PROMPT,
    MAX_KINDS,
    Answer,
    AnswerError,
    Ask,
    BadAskError,
    Candidate,
    Event,
    Logprobs,
    RewardFailedError,
    SegmentKept,
    Spent,
    Tell,
    Text,
    TooLongAskError,
    Wanted,
)
from inference.serving.logprobs import LikelihoodReader, Likelihoods, Vocabulary
from inference.serving.loop import Lane, Loop, Ticket, both, tokens_of, too_large
from inference.serving.pieces import TextPieces
from inference.serving.private import Job, RewardElsewhere, Threads, twin_policy, twin_reward

T = TypeVar("T")
LOGGER = logging.getLogger("iama.serving")
Guided: TypeAlias = Blockwise | Cards | Ggro
"""Samplers that stand on `SegmentLoop`, which requests enter and leave at any step."""
TELL_EVERY_S = 0.2
"""How often it is told what was spent."""
TEXT_EVERY_S = 0.05
"""How often further text of a single sample is told: a small model's tokens come sooner than a reader's eye follows."""
PATIENCE = 8
"""Turns that texts wait for more to be scored with them, while samples are drawn."""
MAX_SAMPLERS = 256
"""Samplers that are kept, each for a policy, criterion, method and sampling."""
PATH = re.compile(r"(?<![\w:/.])[\w.+-]*(?:/[\w.+-]+){2,}")
"""What may be a path of the server's, which nobody else has to know."""
CLOSE_WAIT_S = 5.0
"""How long threads of other people's code are waited for."""


@dataclass(frozen=True)
class State:
    """What goes on in the engine.

    `live` and `waiting` count asks by kind: single, selection, stopped, guided, whole. `fed` are all tokens that
    policies and rewards have read; `answered` is the sum of the ledgers of finished answers, and `lost` are tokens of
    asks that failed, were cancelled or were begun anew. Where nothing is under way, the tokens of these two together
    are those that were fed. `last_step` is in seconds of the epoch.
    """

    num_rows: int
    live: dict[str, int]
    waiting: dict[str, int]
    fed: tuple[int, int]
    answered: Cost
    lost: tuple[int, int]
    is_alive: bool
    last_step: float


@dataclass(eq=False)
class _Asked:
    """An ask under way, with what it is worked on with."""

    ask: Ask
    tell: Callable[[Event], None] | None
    wanted: Wanted
    policy: Policy
    reward: Reward | None
    sampler: Sampler
    ids: list[int]
    kind: str
    has_begun: bool = False
    spent: Cost = field(default_factory=Cost)  # by what is finished of it

    @cached_property
    def key(self) -> int:
        return prompt_keys([self.ids])[0]


class Answering:
    """Answers asks side by side; `batch_size` is the number of rows that a lane decodes together.

    A reward may be called from several threads at once unless it is a classifier or an ensemble that holds one:
    `num_private` is how many calls of one such reward go on at a time, and how many guided answers by it. A call that
    takes longer than `reward_timeout_s` fails the ask.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        rewards: Mapping[str, Reward],
        *,
        batch_size: int = 64,
        num_private: int = 4,
        reward_timeout_s: float = 60.0,
    ) -> None:
        self._policies, self._rewards, self._batch_size = dict(policies), dict(rewards), batch_size
        self._loop = Loop()
        self._whole = Threads("iama-whole", 1, None)
        self._choosing = Threads("iama-choosing", num_private, reward_timeout_s)
        self._threads = {
            name: Threads(f"iama-reward-{name}", 1 if reward.classifiers else num_private, reward_timeout_s)
            for name, reward in self._rewards.items()
            if reward.classifier is None
        }
        # Of guided answers, whose calls of the reward take their turns with those of others.
        self._guiding = {name: Threads(f"iama-guided-{name}", num_private, None) for name in self._threads}
        self._twins: dict[tuple[str, str | None], tuple[Policy, Reward]] = {}  # of the one thread of `_whole`
        self._samplers: dict[tuple[Any, ...], Sampler] = {}
        self._kinds: dict[str, set[Any]] = {name: set() for name in policies}  # of prompts that templates write rightly
        self._vocabularies = {name: Vocabulary(policy) for name, policy in policies.items()}
        self._under_way: set[_Asked] = set()
        self._private: set[SegmentLoop[Any]] = set()
        self._answered = Cost()
        self._lost = (0, 0)
        self._lock = threading.Lock()
        self._private_fed = self._private_taken = (0, 0)  # tokens that no lane has fed, and those of them in ledgers

    async def answer(self, ask: Ask, tell: Tell | None = None, wanted: Wanted = Wanted()) -> Answer:  # noqa: B008
        """The answer; `tell` is called in this event loop, in the order in which things happen, with what is wanted.

        Raises an `AnswerError`. Cancelling frees the ask's rows before the next step; args, sea and samplers of
        somebody's own are not ended midway.
        """
        asked = answer = None
        try:
            policy, reward, sampler = self._served(ask)
            is_long = len(str(ask.prompt)) > LONG_PROMPT
            ids = await asyncio.to_thread(self._ids, ask, policy, reward) if is_long else self._ids(ask, policy, reward)
            asked = _Asked(ask, tell, wanted, policy, reward, sampler, ids, _kind(sampler))
            self._under_way.add(asked)
            completion = await self._answer(asked)
            logprobs: Logprobs | None = None
            if ask.num_top is not None:
                logprobs, cost = await self._judge(asked, ask.num_top, completion)
                completion = replace(completion, cost=completion.cost + cost)
            self._answered += completion.cost
            answer = Answer(completion, num_sampled(completion), logprobs)
            return answer
        except AnswerError:
            raise
        except Exception as error:
            LOGGER.exception("an ask failed")
            raise AnswerError("the server failed on this request") from error
        finally:
            if asked is not None:
                self._under_way.discard(asked)
                if answer is None:
                    self._lost = both(self._lost, tokens_of(asked.spent))

    async def state(self) -> State:
        """As it is now; of the lanes, after their last steps."""
        lanes = self._loop.state
        under_way = tuple(self._under_way)
        live = Counter(asked.kind for asked in under_way if asked.has_begun)
        waiting = Counter(asked.kind for asked in under_way if not asked.has_begun)
        private = [(loop.num_rows, loop.fed) for loop in tuple(self._private)]
        return State(
            num_rows=lanes.num_rows + sum(rows for rows, _ in private),
            live=dict(live),
            waiting=dict(waiting),
            fed=reduce(both, [fed for _, fed in private], both(lanes.fed, self._private_fed)),
            answered=self._answered,
            lost=both(both(self._lost, lanes.lost), _minus(self._private_fed, self._private_taken)),
            is_alive=self._loop.is_alive,
            last_step=self._loop.last_step,
        )

    async def aclose(self) -> None:
        """`close`, beside the event loop, in which those who asked are told meanwhile."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Fail what is under way with `ClosingError`, and end the threads; one that hangs is left behind."""
        self._loop.close()
        for threads in (*self._threads.values(), *self._guiding.values(), self._whole, self._choosing):
            threads.close(CLOSE_WAIT_S)

    def _served(self, ask: Ask) -> tuple[Policy, Reward | None, Sampler]:
        """What answers an ask; called in the event loop alone, since it keeps samplers."""
        if ask.policy not in self._policies:
            raise BadAskError(f"policy {ask.policy!r} is not served; ask for one of {', '.join(self._policies)}")
        if ask.criterion is not None and ask.criterion not in self._rewards:
            raise BadAskError(f"criterion {ask.criterion!r} is not served; ask for one of {', '.join(self._rewards)}")
        policy = self._policies[ask.policy]
        reward = None if ask.criterion is None else self._rewards[ask.criterion]
        return policy, reward, self._sampler(ask, policy, reward)

    def _ids(self, ask: Ask, policy: Policy, reward: Reward | None) -> list[int]:
        """The prompt as the policy reads it, after every further check that needs no pass; any thread may call it."""
        columns = {name: [value] for name, value in ask.columns.items()}
        if len(self._kinds[ask.policy]) >= MAX_KINDS:
            self._kinds[ask.policy].clear()
        try:
            if ask.prompt_ids is None:
                (ids,) = render_checked(policy, None, [ask.prompt], columns, ask.sampling, self._kinds[ask.policy])
            else:
                ids = list(ask.prompt_ids)
                check_fit(policy.name, policy.tokenizer, policy.context_length, [ids], ask.sampling)
        except IamaError as error:
            raise _bad(error) from error
        try:
            for classifier in [] if reward is None else reward.classifiers:
                classifier.render([ask.prompt], [""])
        except IamaError as error:
            LOGGER.info("criterion %r cannot read a prompt", ask.criterion, exc_info=error)
            raise BadAskError(
                f"the reward of criterion {ask.criterion!r} cannot read this prompt; shorten it, or change its roles"
            ) from error
        return ids

    def _sampler(self, ask: Ask, policy: Policy, reward: Reward | None) -> Sampler:
        key = (ask.policy, ask.criterion, ask.method.text, ask.sampling)
        if key not in self._samplers:
            try:
                sampler = serve(policy, reward, ask.method, ask.sampling, self._batch_size)
            except IamaError as error:
                raise _bad(error) from error
            if len(self._samplers) >= MAX_SAMPLERS:
                self._samplers.pop(next(iter(self._samplers)))
            self._samplers[key] = sampler
        return self._samplers[key]

    async def _answer(self, asked: _Asked) -> Completion:
        sampler = asked.sampler
        if asked.kind != "whole":
            if isinstance(sampler, SelectionSampler):
                return await self._select(asked, sampler)
            if isinstance(sampler, StoppedSampler):
                return await self._stop(asked, sampler)
            if isinstance(sampler, Guided):
                return await self._guide(asked, sampler)
        with _failing(partial(_guide_failed, asked.ask.policy, str(asked.ask.criterion))):
            completion = await self._whole.run(partial(self._sample_whole, asked), partial(_begin, asked))
        self._note_private(tokens_of(completion.cost), tokens_of(completion.cost))
        asked.spent += completion.cost
        _tell(asked, Text(completion.text))
        return completion

    # Draw, score, keep. ------------------------------------------------------------------------------------------

    async def _select(self, asked: _Asked, sampler: SelectionSampler) -> Completion:
        rule = rule_of(sampler.operator)
        (number,), (choice,) = number_and_choice([asked.ids], asked.ask.seed)
        is_single = asked.kind == "single"
        tells_text = is_single and asked.tell is not None and asked.wanted.text
        watch = _Watch(asked, TextPieces(asked.policy, asked.ask.sampling) if tells_text else None)
        samples, cost = await self._draw(asked, watch, 0, rule.num_draws(number))
        if watch.pieces is not None:
            _tell(asked, Text(watch.pieces.rest(samples[0].text)))
        if asked.reward is not None:
            samples, scoring = await self._score(asked, samples, 0, must_rank=not is_single)
            cost += scoring
        (drawn,) = pool_of([asked.ask.prompt], [samples], [cost]).prompts
        choose = partial(keep, rule, drawn, rule.is_capped(number), choice)
        if rule.utility is None:
            completion = choose()
        else:  # which compares all texts, and may be somebody's own
            with _failing(lambda _: AnswerError(f"{asked.ask.method.name} could not compare the candidates")):
                completion = await self._choosing.run(lambda _: choose())
        if watch.pieces is None:
            _tell(asked, Text(completion.text))
        return completion

    async def _stop(self, asked: _Asked, sampler: StoppedSampler) -> Completion:
        held, going, watch = HeldPrompt(), Going(), _Watch(asked, None)
        try:
            for first, number in rounds(sampler.stopped):
                samples, cost = await self._draw(asked, watch, first, number, held)
                samples, scoring = await self._score(asked, samples, first, must_rank=True)
                (scored,) = pool_of([asked.ask.prompt], [samples], [cost + scoring]).prompts
                if sampler.stopped.rule.threshold is not None:
                    going.add(scored, sampler.stopped)
                else:  # some rules take seconds, until their tables are made
                    await self._choosing.run(partial(_add, going, scored, sampler.stopped))
                if going.stopped:
                    break
        finally:
            self._loop.let_go(_policy_lane(asked), held)
        completion = going.completion(going.cost.peak_memory)
        _tell(asked, Text(completion.text))
        return completion

    async def _draw(
        self, asked: _Asked, watch: _Watch, first: int, number: int, held: HeldPrompt | None = None
    ) -> tuple[list[Response], Cost]:
        """Samples of the prompt, from the policy's lane."""
        places = np.arange(first, first + number)
        streams = stream_keys(asked.ask.seed, [asked.key] * number, places)
        policy, size = asked.policy, self._batch_size
        source = f"policy {policy.name!r}"
        ticket: Ticket[Samples] = Ticket(
            begin=lambda: Samples(0, asked.ids, streams, asked.ask.sampling, held=held),
            spent=_spent,
            fail=lambda _: AnswerError(f"{source} could not answer this request"),
            news=watch.news_of_round(first),
            hear=watch.hear,
        )
        make: Callable[[], Lane[Samples]] = partial(Lane, source, partial(Decoder, policy, is_fair=True), size)
        request = await self._loop.work(_policy_lane(asked), make, ticket)
        asked.spent += request.cost()
        watch.num_before += sum(map(len, request.tokens))
        return request.responses(policy), request.cost()

    async def _score(
        self, asked: _Asked, samples: Sequence[Response], first: int, *, must_rank: bool
    ) -> tuple[list[Response], Cost]:
        """Samples with their rewards."""
        reward, criterion = asked.reward, asked.ask.criterion
        assert reward is not None
        assert criterion is not None
        texts = [sample.text for sample in samples]
        if reward.classifier is not None:
            ticket: Ticket[ScoredTexts] = Ticket(
                begin=lambda: ScoredTexts(0, asked.ask.prompt, texts),
                spent=lambda request: request.cost,
                fail=partial(_reward_failed, criterion),
                size=len(texts),
            )
            source, size = f"reward {criterion!r}", reward.classifier.batch_size
            make: Callable[[], Lane[ScoredTexts]] = partial(Lane, source, partial(TextScorer, reward), size, PATIENCE)
            scored = await self._loop.work(("reward", criterion), make, ticket)
            rewards, cost = scored.rewards, scored.cost
        else:
            columns = {name: [value] * len(texts) for name, value in asked.ask.columns.items()}
            with _failing(partial(_reward_failed, criterion)):
                rewards, cost = await self._threads[criterion].run(
                    lambda _: reward.score([asked.ask.prompt] * len(texts), texts, columns)
                )
            self._note_private(tokens_of(cost), tokens_of(cost))
        asked.spent += cost
        if must_rank and any(map(math.isnan, rewards)):
            raise RewardFailedError(f"the reward of criterion {criterion!r} has no score for a candidate")
        scored_samples = [_scored(sample, value) for sample, value in zip(samples, rewards, strict=True)]
        if asked.kind != "single" and asked.wanted.events:
            for index, sample in enumerate(scored_samples, start=first):
                _tell(asked, Candidate(index, sample.text, len(sample.token_ids), sample.reward))
        return scored_samples, cost

    async def _judge(self, asked: _Asked, num_top: int, completion: Completion) -> tuple[Logprobs, Cost]:
        """Log-probabilities of an answer's tokens, and the pass that they took."""
        policy = asked.policy
        source = f"policy {policy.name!r}"
        ticket: Ticket[Likelihoods] = Ticket(
            begin=lambda: Likelihoods(asked.ids, completion.token_ids, num_top),
            spent=lambda request: request.cost,
            fail=lambda _: AnswerError(f"{source} could not give the log-probabilities of this answer"),
        )
        make: Callable[[], Lane[Likelihoods]] = partial(
            Lane, source, partial(LikelihoodReader, policy), self._batch_size, PATIENCE
        )
        judged = await self._loop.work(("likelihoods", asked.ask.policy), make, ticket)
        asked.spent += judged.cost
        vocabulary = self._vocabularies[asked.ask.policy]
        return vocabulary.logprobs(judged, completion.text, asked.ask.sampling), judged.cost

    # Guided. -----------------------------------------------------------------------------------------------------

    async def _guide(self, asked: _Asked, sampler: Guided) -> Completion:
        ask, reward, criterion = asked.ask, asked.reward, asked.ask.criterion
        assert reward is not None
        assert criterion is not None
        try:
            sampler.request(0, asked.ids, ask.prompt, ask.columns, asked.key, ask.seed)
        except IamaError as error:
            LOGGER.info("criterion %r cannot guide an answer", criterion, exc_info=error)
            raise BadAskError(
                f"the reward of criterion {criterion!r} cannot read the longest answer to this prompt; lower max_tokens"
            ) from error
        watch = _GuidedWatch(asked)
        columns = {} if reward.classifier is not None else ask.columns  # those who share a lane may have others

        def begin() -> Any:
            return sampler.request(0, asked.ids, ask.prompt, columns, asked.key, ask.seed)

        request: SegmentRequest
        if reward.classifier is not None:
            ticket: Ticket[Any] = Ticket(
                begin, _spent, partial(_guide_failed, ask.policy, criterion), watch.news, watch.hear
            )
            name = f"{ask.method.text} of policy {ask.policy!r} by {criterion!r}"
            key = ("guided", ask.policy, criterion, ask.method.text, ask.sampling)
            request = await self._loop.work(key, lambda: Lane[Any](name, sampler.loop, self._batch_size), ticket)
        else:
            asker = asyncio.get_running_loop()
            elsewhere = RewardElsewhere(reward, partial(self._call_reward, criterion, asker))
            work = partial(self._guide_alone, replace(sampler, reward=elsewhere), begin, watch, asker)
            with _failing(partial(_guide_failed, ask.policy, criterion)):
                request = await self._guiding[criterion].run(work, partial(_begin, asked))
            self._note_private((0, 0), tokens_of(request.cost()))
        asked.spent += request.cost()
        completion = completion_of(asked.policy, ask.sampling, request)
        watch.end(request, completion.text)
        return completion

    def _guide_alone(
        self,
        sampler: Guided,
        begin: Callable[[], Any],
        watch: _GuidedWatch,
        asker: asyncio.AbstractEventLoop,
        job: Job,
    ) -> SegmentRequest:
        """A guided answer by a loop of its own, in a thread of its own; unfinished where nobody wants it any more."""
        loop: SegmentLoop[Any] = sampler.loop(self._batch_size)
        request: SegmentRequest = begin()
        loop.add(request)
        self._private.add(loop)
        try:
            while job.go_on():
                if loop.step():
                    return request
                for item in watch.news(request):
                    asker.call_soon_threadsafe(partial(_hear_alone, watch, job, item))
            loop.drop(request)
            return request
        finally:
            self._private.discard(loop)
            self._note_private(loop.fed, (0, 0))

    def _note_private(self, fed: tuple[int, int], taken: tuple[int, int]) -> None:
        """Tokens that no lane has fed, and those that are in ledgers."""
        with self._lock:
            self._private_fed = both(self._private_fed, fed)
            self._private_taken = both(self._private_taken, taken)

    def _sample_whole(self, asked: _Asked, job: Job) -> Completion:
        """What no loop can be shared for."""
        ask = asked.ask
        name = ask.policy, ask.criterion
        assert asked.reward is not None
        if name not in self._twins:
            self._twins[name] = twin_policy(asked.policy), twin_reward(asked.reward)
        policy, reward = self._twins[name]
        if reward.classifier is None:  # other people's code, which may hang
            reward = RewardElsewhere(reward, partial(self._call_reward, str(ask.criterion), job.loop))
        sampler = serve(policy, reward, ask.method, ask.sampling, self._batch_size)
        columns = {key: [value] for key, value in ask.columns.items()}
        (completion,) = sampler.sample([ask.prompt], seed=ask.seed, columns=columns)
        return completion

    def _call_reward(self, criterion: str, loop: asyncio.AbstractEventLoop, work: Callable[[], T]) -> T:
        """What a call of a reward gives, for a thread that answers, which does not wait longer than others do."""
        return asyncio.run_coroutine_threadsafe(self._threads[criterion].run(lambda _: work()), loop).result()


# What is told. ---------------------------------------------------------------------------------------------------


class _News(NamedTuple):
    """What a lane tells of samples: the first one's new tokens, samples that have ended, tokens sampled so far."""

    tokens: list[int]
    ended: list[tuple[int, list[int]]]
    num_sampled: int | None


class _Watch:
    """Tells of samples as they are drawn; `pieces` of a single one, whose text is told while it comes."""

    def __init__(self, asked: _Asked, pieces: TextPieces | None) -> None:
        self.pieces = pieces
        self._asked = asked
        self.num_before = 0  # tokens sampled in earlier rounds

    def news_of_round(self, first: int) -> Callable[[Samples], list[Any]]:
        """What is new, for the loop's thread; samples of the round have the indices from `first` on."""
        asked, tells_text = self._asked, self.pieces is not None
        tells_candidates = asked.kind != "single" and asked.wanted.events
        num_told, text_at = 0, 0.0
        told, told_at, num_before, spent = set[int](), 0.0, self.num_before, 0

        def news(request: Samples) -> list[Any]:
            nonlocal num_told, text_at, told_at, spent
            if not asked.has_begun and request.seconds > 0:
                asked.has_begun = True
            if asked.tell is None:
                return []
            tokens: list[int] = []
            ended: list[tuple[int, list[int]]] = []
            now, num_sampled = time.monotonic(), None
            if tells_text:
                is_due = now - text_at >= TEXT_EVERY_S or any(request.reasons)
                tokens = request.tokens[0][num_told:] if request.tokens and is_due else []
                if tokens:
                    num_told, text_at = num_told + len(tokens), now
            elif tells_candidates:
                for i in range(len(request.tokens)):
                    if i not in told and request.reasons[i]:
                        told.add(i)
                        ended.append((first + i, request.tokens[i]))
            if asked.wanted.events and now - told_at >= TELL_EVERY_S:
                told_at, before = now, spent
                spent = max(spent, num_before + sum(map(len, request.tokens)))
                num_sampled = spent if spent > before else None
            return [_News(tokens, ended, num_sampled)] if tokens or ended or num_sampled else []

        return news

    def hear(self, item: _News) -> None:
        """Tell it, in the asker's loop."""
        if item.tokens and self.pieces is not None:
            _tell(self._asked, Text(self.pieces.more(item.tokens)))
        for index, tokens in item.ended:
            text = response_text(self._asked.policy, tokens, self._asked.ask.sampling.stop)
            _tell(self._asked, Candidate(index, text, len(tokens)))
        if item.num_sampled:
            _tell(self._asked, Spent(item.num_sampled))


class _GuidedWatch:
    """Tells of a guided answer: segments that are kept."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._pieces = TextPieces(asked.policy, asked.ask.sampling)
        self._num_told = 0  # segments; of the loop's thread
        self._told_at, self._spent = 0.0, 0
        self._last: Any = None  # the last segment, whose text is known when all is

    def news(self, request: SegmentRequest) -> list[Any]:
        """What is new, for the loop's thread."""
        if not self._asked.has_begun and request.seconds > 0:
            self._asked.has_begun = True
        if self._asked.tell is None:
            return []
        items: list[Any] = []
        start = sum(segment.num_tokens for segment in request.trace[: self._num_told])
        for segment in request.trace[self._num_told :]:
            items.append((segment, request.tokens[start : start + segment.num_tokens]))
            start += segment.num_tokens
            self._num_told += 1
        if self._asked.wanted.events and time.monotonic() - self._told_at >= TELL_EVERY_S:
            self._told_at = time.monotonic()
            spent = sum(segment.num_tokens + segment.wasted_tokens for segment in request.trace) + request.num_drawn
            if spent > self._spent:  # it may be begun anew
                self._spent = spent
                items.append(Spent(spent))
        return items

    def hear(self, item: Any) -> None:
        """Tell it, in the asker's loop; a segment when it is known whether it is the last."""
        if isinstance(item, Spent):
            _tell(self._asked, item)
            return
        self._tell_last(None)
        self._last = item

    def end(self, request: SegmentRequest, text: str) -> None:
        """Tell what is left of the whole text."""
        for item in self.news(request):
            self.hear(item)
        self._tell_last(text)

    def _tell_last(self, text: str | None) -> None:
        if self._last is not None:
            segment, tokens = self._last
            piece = self._pieces.more(tokens)
            if text is not None:
                piece += self._pieces.rest(text)
            _tell(self._asked, SegmentKept(segment, piece))
            _tell(self._asked, Text(piece))
            self._last = None


def _hear_alone(watch: _GuidedWatch, job: Job, item: Any) -> None:
    if job.is_wanted and not job.future.done():
        try:
            watch.hear(item)
        except Exception as error:
            job.is_wanted = False
            failed = AnswerError("the answer could not be told to the one who asked")
            failed.__cause__ = error
            job.future.set_exception(failed)


def _tell(asked: _Asked, event: Event) -> None:
    if asked.tell is not None and event != Text(""):
        asked.tell(event)


# Small things. ---------------------------------------------------------------------------------------------------


def num_sampled(completion: Completion) -> int:
    """Tokens that were sampled for an answer: those of all candidates, and those that were not kept."""
    candidates = sum(len(candidate.token_ids) for candidate in completion.candidates)
    return candidates + sum(segment.wasted_tokens for segment in completion.trace)


def _kind(sampler: Sampler) -> str:
    """How it is answered; a class of somebody's own, which may derive from ours, as a whole."""
    if type(sampler) is SelectionSampler:
        return "single" if rule_of(sampler.operator).name == "identity" else "selection"
    if type(sampler) is StoppedSampler:
        return "stopped"
    return "guided" if type(sampler) in get_args(Guided) else "whole"


def _policy_lane(asked: _Asked) -> tuple[str, str]:
    return "policy", asked.ask.policy


def _add(going: Going, scored: PooledPrompt, stopped: Stopped, _: Job) -> None:
    going.add(scored, stopped)


def _begin(asked: _Asked) -> None:
    asked.has_begun = True


def _spent(request: Samples | SegmentRequest) -> Cost:
    """What was forwarded for a request that may not have begun."""
    return request.cost() if request.seconds > 0 else Cost()


def _scored(sample: Response, reward: float) -> Response:
    return Response(sample.text, sample.token_ids, sample.finish_reason, reward)


def _minus(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return left[0] - right[0], left[1] - right[1]


def _bad(error: IamaError) -> BadAskError:
    """What is wrong with an ask, without the server's paths."""
    return BadAskError(PATH.sub("...", str(error)))


def _reward_failed(criterion: str, error: Exception) -> AnswerError:
    reason = error.__cause__ or error
    if isinstance(error, TooLongError) or isinstance(reason, TooLongError):
        return TooLongAskError(
            f"the reward of criterion {criterion!r} cannot read this prompt with its answer; shorten it, or lower "
            "max_tokens"
        )
    told = "gave no usable score" if isinstance(reason, RewardError) else f"failed ({type(reason).__name__})"
    return RewardFailedError(f"the reward of criterion {criterion!r} {told} for this request")


def _guide_failed(policy: str, criterion: str, error: Exception) -> AnswerError:
    if isinstance(error, RewardError):
        return _reward_failed(criterion, error)
    return AnswerError(f"policy {policy!r} could not answer this request with the reward of {criterion!r}")


@contextmanager
def _failing(fail: Callable[[Exception], AnswerError]) -> Iterator[None]:
    """Whatever a thread of other people's code raises, as an error of the ask."""
    try:
        yield
    except (AnswerError, asyncio.CancelledError):
        raise
    except Exception as error:
        LOGGER.warning("a request failed", exc_info=error)
        raise too_large(error) or fail(error) from error
