"""From a request that was read to its answers: the prompt is checked, a place is waited for, the engine is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from iama.config.serving import Limits
from iama.config.specs import Sampling
from iama.errors import IamaError
from iama.prompts.conversations import render_prompts
from iama.prompts.render import Prompt
from inference.engine.policy import PolicyFiles
from inference.serving.asks import LONG_PROMPT, MAX_KINDS, Answer, AnswerError, Ask, Event, Wanted
from inference.serving.catalogue import Catalogue
from inference.serving.fields import Asked, Route, read_body
from inference.serving.gate import Gate
from inference.serving.metrics import Metrics
from inference.serving.refusals import RefusedError
from inference.serving.remote_engine import Engine

logger = logging.getLogger("iama.serving")
TellOf: TypeAlias = Callable[[int, Event], None]
"""Called with the number of the choice."""
DoneOf: TypeAlias = Callable[[int, Answer], None]
"""Called with the number of the choice, once it is answered."""
ONCE = {"x-should-retry": "false"}
"""Of what would fail again: the openai client asks for the same twice more where this is not said."""
MOST_WAITED = 0.5
"""Of the time that a request has: one that waited longer for its turn was not too much by itself."""
BROKEN = "the server failed on this request; its log says how"


class Ready(NamedTuple):
    """A request whose prompts were read by the policy's tokenizer: they fit.

    Each has a sampling of its own, lest its answer depend on the room that a longer one leaves.
    """

    asked: Asked
    prompts_ids: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.prompts_ids))


class Service:
    """Answers requests on one event loop; long prompts are read in threads beside it."""

    def __init__(
        self, catalogue: Catalogue, policies: Mapping[str, PolicyFiles], engine: Engine, limits: Limits
    ) -> None:
        self.catalogue, self.limits = catalogue, limits
        self.gate = Gate(limits.max_running, limits.max_waiting)
        self.metrics = Metrics(catalogue)
        self._policies, self._engine = policies, engine
        self._kinds: dict[str, set[Any]] = {name: set() for name in policies}

    async def is_alive(self) -> bool:
        """Whether the engine can answer."""
        return (await self._engine.state()).is_alive

    async def metrics_text(self) -> str:
        """For Prometheus."""
        return self.metrics.text(
            await self._engine.state(),
            {
                "iama_requests_running": ("Requests that are worked on.", self.gate.num_running),
                "iama_requests_waiting": ("Requests that wait for their turn.", self.gate.num_waiting),
            },
        )

    async def read(self, body: Any, route: Route) -> Ready:
        """What a body asks for, checked as far as it can be without the engine; raises `RefusedError`."""
        self.gate.check()
        asked = read_body(body, route, self.catalogue, self.limits)
        if sum(len(str(prompt)) for prompt in asked.prompts) > LONG_PROMPT:
            return await asyncio.to_thread(self._fit, asked)
        return self._fit(asked)

    def _fit(self, asked: Asked) -> Ready:
        prompts_ids = tuple(self._ids(asked.model.policy, prompt) for prompt in asked.prompts)
        longest = max(map(len, prompts_ids))
        limit = self._policies[asked.model.policy].context_length
        sampling = asked.sampling
        room = sampling.max_new_tokens if limit is None else limit - longest
        if room < (sampling.max_new_tokens if asked.has_max_tokens else 1):
            with_most = f", with max_tokens = {sampling.max_new_tokens}" if room >= 1 else ""
            remedy = f"shorten it, or set max_tokens to at most {room}" if room >= 1 else "shorten it"
            raise RefusedError(
                400,
                f"The prompt has {longest} tokens{with_most}: more than the {limit} tokens that "
                f"{asked.model.policy!r} reads of prompt and answer together; {remedy}",
                "messages" if asked.route == "chat" else "prompt",
                "context_length_exceeded",
            )
        rooms = (sampling.max_new_tokens if limit is None else limit - len(ids) for ids in prompts_ids)
        most = (min(room, sampling.max_new_tokens) for room in rooms)
        return Ready(
            asked, prompts_ids, tuple(sampling.model_copy(update={"max_new_tokens": number}) for number in most)
        )

    def _ids(self, name: str, prompt: Prompt) -> tuple[int, ...]:
        policy = self._policies[name]
        if len(self._kinds[name]) >= MAX_KINDS:
            self._kinds[name] = set()
        param = "prompt" if isinstance(prompt, str) else "messages"
        try:
            kinds = self._kinds[name]
            (ids,) = render_prompts(policy.tokenizer, [prompt], policy.eos_token_ids, f"policy {name!r}", kinds)
        except IamaError as error:
            logger.info("a prompt was refused: %s", error)
            raise RefusedError(400, _unreadable(name, policy, prompt), param, "invalid_prompt") from error
        if not ids:
            raise RefusedError(400, f"{param}: the prompt has no tokens; write something", param, "invalid_prompt")
        return tuple(ids)

    async def answer(self, ready: Ready, tell: TellOf, done: DoneOf | None = None) -> list[Answer]:
        """The answers in the order of their choices, worked on side by side; raises `RefusedError`.

        One that fails ends the others. Whoever cancels this ends all.
        """
        asked, came, waited_s = ready.asked, time.monotonic(), None
        try:
            async with asyncio.timeout(self.limits.deadline_s), self.gate.place():
                waited_s = time.monotonic() - came
                if asked.num_choices == 1:
                    return [await self._answer_one(ready, 0, tell, done)]
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._answer_one(ready, index, tell, done))
                        for index in range(asked.num_choices)
                    ]
                return [task.result() for task in tasks]
        except BaseExceptionGroup as errors:
            first = next((e for e in errors.exceptions if isinstance(e, RefusedError)), errors.exceptions[0])
            raise first from None
        except TimeoutError:
            waited_s = time.monotonic() - came if waited_s is None else waited_s
            if waited_s > MOST_WAITED * self.limits.deadline_s:
                self.metrics.failures.add(1, asked.model.criterion or "", "queue_timeout")
                raise RefusedError(
                    503,
                    f"The request waited {waited_s:.1f} s of {self.limits.deadline_s:g} s for its turn, and was given "
                    "up; try again later",
                    None,
                    "queue_timeout",
                    {"Retry-After": str(self.gate.pause_s())},
                ) from None
            self.metrics.failures.add(1, asked.model.criterion or "", "deadline")
            raise RefusedError(
                504,
                f"The request took longer than {self.limits.deadline_s:g} s and was given up; ask for less",
                None,
                "deadline_exceeded",
                ONCE,
            ) from None

    async def _answer_one(self, ready: Ready, index: int, tell: TellOf, done: DoneOf | None) -> Answer:
        asked, place = ready.asked, index // ready.asked.n
        model = asked.model
        ask = Ask(
            model.policy,
            model.criterion,
            model.method,
            asked.prompts[place],
            ready.samplings[place],
            asked.seed + index,
            num_top=asked.num_top,
            prompt_ids=ready.prompts_ids[place],
        )
        try:
            answer = await self._engine.answer(ask, partial(tell, index), Wanted(asked.stream, asked.events))
        except AnswerError as error:
            self.metrics.failures.add(1, model.criterion or "", error.code)
            again = {} if error.may_pass else ONCE
            raise RefusedError(error.status, str(error), None, error.code, again) from error
        self.metrics.note(model, answer)
        if done is not None:
            done(index, answer)
        return answer


def _unreadable(name: str, policy: PolicyFiles, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return f"prompt: {name!r} cannot go on from it, since it ends with what ends an answer; leave that out"
    if policy.tokenizer.chat_template is None:
        return f"messages: {name!r} has no chat template; send a prompt to /v1/completions"
    roles = ", ".join(message["role"] for message in prompt[:8])
    return f"messages: the chat template of {name!r} does not take these messages (roles: {roles}); change them"
