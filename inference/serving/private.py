"""Threads for what must not hold up the one loop: other people's rewards, and samplers that answer as a whole.

Nobody can stop a thread. One that is too slow is left behind, and nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

from iama.cost import Cost
from iama.prompts.render import Prompt
from iama.rewards.classifier import Classifier
from iama.rewards.reward import Columns, Reward, TrlCompletion
from inference.engine.policy import Policy
from inference.serving.asks import AnswerError, ClosingError, RewardTooSlowError

T = TypeVar("T")
Scored: TypeAlias = tuple[list[float], Cost]
MOST_LEFT_BEHIND = 32
"""Threads that are left behind, before no further one is begun."""


@dataclass(eq=False)
class Job:
    """What runs in a thread: whether it is still wanted, and since when its current step has run."""

    work: Callable[[Job], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    begun: Callable[[], None]
    is_wanted: bool = True
    has_slot: bool = False
    step_began: float = 0.0

    def go_on(self) -> bool:
        """Begin a step; false where nobody wants the result any more."""
        self.step_began = time.monotonic()
        return self.is_wanted


class Threads:
    """At most `number` jobs at a time, each in a thread of its own; no step of one may take longer than `timeout_s`."""

    def __init__(self, name: str, number: int, timeout_s: float | None) -> None:
        self._name, self._number, self._timeout_s = name, number, timeout_s
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, threading.Thread] = {}  # those that are left behind, too
        self._is_closing = False

    async def run(self, work: Callable[[Job], T], begun: Callable[[], None] = lambda: None) -> T:
        """What `work` returns, or raises; `begun` is called once it runs.

        Raises `RewardTooSlowError` where a step takes too long. Cancelling ends the work with its step; where it takes
        none, its thread goes on alone.
        """
        if self._is_closing:
            raise ClosingError("the server is shutting down")
        loop = asyncio.get_running_loop()
        job = Job(work, loop, loop.create_future(), begun)
        with self._lock:
            self._waiting.append(job)
        self._start()
        try:
            return cast(T, await job.future)
        finally:
            job.is_wanted = False
            with self._lock, suppress(ValueError):  # it may have begun
                self._waiting.remove(job)

    def close(self, wait_s: float) -> None:
        """Want nothing any more, and give threads this long to end."""
        self._is_closing = True
        with self._lock:
            threads = [*self._running.values()]
            for job in [*self._running, *self._waiting]:
                job.is_wanted = False
                self._settle(job, None, ClosingError("the server is shutting down"))
        end = time.monotonic() + wait_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start(self) -> None:
        """Begin jobs that wait, if there is room."""
        with self._lock:
            while self._waiting and sum(job.has_slot for job in self._running) < self._number:
                job = self._waiting.popleft()
                if not job.is_wanted:
                    continue
                if len(self._running) >= self._number + MOST_LEFT_BEHIND:
                    error = RewardTooSlowError("earlier calls of the reward have not come back; try again later")
                    self._settle(job, None, error)
                    continue
                job.has_slot = True
                thread = threading.Thread(target=self._run, args=(job,), name=self._name, daemon=True)
                self._running[job] = thread
                thread.start()

    def _run(self, job: Job) -> None:
        result, error = None, None
        try:
            if job.go_on():
                with suppress(RuntimeError):
                    job.loop.call_soon_threadsafe(self._watch, job)
                result = job.work(job)
        except Exception as raised:
            error = raised
        except BaseException:
            error = AnswerError("the sampler ended its thread")
        with self._lock:
            del self._running[job]
        self._settle(job, result, error)
        self._start()

    def _settle(self, job: Job, result: Any, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the one who asked is gone, and his loop is closed
            job.loop.call_soon_threadsafe(_settle, job.future, result, error)

    # In the event loop of the one who waits. ---------------------------------------------------------------------

    def _watch(self, job: Job) -> None:
        job.begun()
        if self._timeout_s is not None:
            job.loop.call_later(self._timeout_s, self._look, job, self._timeout_s)

    def _look(self, job: Job, timeout_s: float) -> None:
        """Leave a job behind, and let another take its place, where its step has taken too long."""
        left = job.step_began + timeout_s - time.monotonic()
        with self._lock:
            if job not in self._running:
                return
            if left <= 0:
                job.has_slot = job.is_wanted = False
        if left > 0:
            job.loop.call_later(left, self._look, job, timeout_s)
            return
        _settle(job.future, None, RewardTooSlowError(f"the reward took longer than {timeout_s:g} s; ask for less"))
        self._start()


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # it may be that nobody waits


class RewardElsewhere(Reward):
    """A reward whose calls go through `call`, which has them made in another thread and gives what they give."""

    def __init__(self, reward: Reward, call: Callable[[Callable[[], Scored]], Scored]) -> None:
        self.__dict__.update(reward.__dict__)
        self._call = call

    def checked(self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns) -> Scored:
        """As the reward does it."""
        return self._call(lambda: super(RewardElsewhere, self).checked(prompts, completions, columns))


def twin_of(model: Any) -> Any:
    """A model on the same weights, whose modules, hooks and configuration are its own: for another thread."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def twin_policy(policy: Policy) -> Policy:
    """A policy for another thread."""
    return replace(policy, model=twin_of(policy.model))


def twin_reward(reward: Reward) -> Reward:
    """A reward for another thread; of one that is no classifier itself, the same: its calls come one by one."""
    classifier = reward.classifier
    if classifier is None or reward.scorer is not classifier:
        return reward
    twin = copy.copy(reward)
    twin.scorer = replace(classifier, model=twin_of(classifier.model))
    assert isinstance(twin.scorer, Classifier)
    return twin
