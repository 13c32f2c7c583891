"""The one thread that steps models: lanes take turns, and each step is about one batched pass.

A `Lane` holds the tickets of one kind of work on one model, whose rows are decoded or scored side by side. Whoever asks
stands in an event loop of his own: what he hands in goes through an inbox, and what he hears comes by
`call_soon_threadsafe`, in order. So no state of a lane is touched by two threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch

from iama.cost import Cost
from iama.errors import ModelError
from iama.models.loading import is_out_of_memory
from inference.engine.decode import Decoder, HeldPrompt
from inference.serving.asks import AnswerError, ClosingError, TooLargeError

LOGGER = logging.getLogger("iama.serving")
CALM_STEPS = 1000
"""Steps without a lack of memory after which a lane's halved batch size is doubled again."""


class Work(Protocol):
    """A request of a lane."""

    error: Exception | None
    """Why it cannot be done, where it alone is at fault; nothing of the others is lost then."""


R = TypeVar("R", bound=Work)


class Worker(Protocol[R]):
    """What does the work of a lane for requests of one kind; after an error it is thrown away, with all its rows."""

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        ...

    @property
    def fed(self) -> tuple[int, int]:
        """Tokens that policy and reward have read."""
        ...

    batch_size: int
    """Rows side by side; it may grow between steps."""

    def add(self, request: R) -> None:
        """Let a request wait for rows."""
        ...

    def drop(self, request: R) -> None:
        """Give up a request that is not finished, and its rows."""
        ...

    def step(self) -> list[R]:
        """One step for all that is there; requests that are finished, or have an error."""
        ...


@dataclass(eq=False)
class Ticket(Generic[R]):
    """Work for a lane that somebody waits for.

    `begin` makes a fresh request, as often as the work is begun; `spent` is what was forwarded for one. `news` tells
    what is new since the last step, and is told by `hear` in the event loop of the one who waits. It must not tell
    anything twice where work is begun anew. `fail` makes an error of what the work raised.
    """

    begin: Callable[[], R]
    spent: Callable[[R], Cost]
    fail: Callable[[Exception], AnswerError]
    news: Callable[[R], list[Any]] | None = None
    hear: Callable[[Any], None] | None = None
    size: int = 1  # in rows, about
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    future: asyncio.Future[R] = field(init=False)
    is_over: bool = False  # finished, failed or dropped, as the lane sees it
    finished: R | None = None
    is_taken: bool = False  # by the one who waits

    def __post_init__(self) -> None:
        self.future = self.loop.create_future()


def both(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    """The sum of two numbers of tokens of policy and reward."""
    return left[0] + right[0], left[1] + right[1]


def tokens_of(cost: Cost) -> tuple[int, int]:
    """Tokens that policy and reward have read."""
    return cost.policy_tokens, cost.reward_tokens


@dataclass(frozen=True)
class LaneState:
    """What stands in a lane: rows in use, tickets, tokens that policy and reward have read, and what of them is in no
    ledger, since its work was given up or begun anew."""

    num_rows: int = 0
    num_tickets: int = 0
    fed: tuple[int, int] = (0, 0)
    lost: tuple[int, int] = (0, 0)

    def __add__(self, other: LaneState) -> LaneState:
        """Two lanes together."""
        return LaneState(
            self.num_rows + other.num_rows,
            self.num_tickets + other.num_tickets,
            both(self.fed, other.fed),
            both(self.lost, other.lost),
        )


class Lane(Generic[R]):
    """Tickets whose work is done side by side, and what keeps that up.

    Where memory runs out the batch size is halved; where anything else is raised, all are tried again one by one, and
    the one that raises alone fails. Either way work is begun anew: its random numbers are addressed, so that the
    answers are the same.
    """

    def __init__(self, name: str, make: Callable[[int], Worker[R]], batch_size: int, patience: int = 0) -> None:
        """While there is less than a batch, so many turns are let pass if other lanes have work."""
        self.name = name
        self.worker: Worker[R] | None = None
        self._make = make
        self._patience, self._num_waited = patience, 0
        self._full_size = self._batch_size = batch_size
        self._of: dict[R, Ticket[R]] = {}  # in the worker
        self._queue: deque[Ticket[R]] = deque()
        self._suspects: deque[Ticket[R]] = deque()  # to be tried alone
        self._alone: Ticket[R] | None = None  # the one that is
        self._num_calm = 0
        self._past = LaneState()  # of workers that are gone

    @property
    def has_work(self) -> bool:
        """Whether there is anything to step."""
        return bool(self._of or self._queue or self._suspects)

    @property
    def state(self) -> LaneState:
        """As it is now."""
        rows, fed = (0, (0, 0)) if self.worker is None else (self.worker.num_rows, self.worker.fed)
        return self._past + LaneState(rows, len(self.tickets), fed)

    @property
    def tickets(self) -> list[Ticket[R]]:
        """All that are not over."""
        return [*self._of.values(), *self._queue, *self._suspects]

    def add(self, ticket: Ticket[R]) -> None:
        """Let a ticket wait."""
        self._queue.append(ticket)

    def drop(self, ticket: Ticket[R]) -> None:
        """Give up a ticket, and its rows; one that is over is passed over."""
        if ticket.is_over:
            return
        ticket.is_over = True
        for line in (self._queue, self._suspects):
            if ticket in line:
                line.remove(ticket)
        request = next((request for request, other in self._of.items() if other is ticket), None)
        if request is not None:
            assert self.worker is not None
            del self._of[request]
            self._lose(ticket, request)
            try:
                self.worker.drop(request)
            except Exception:
                LOGGER.exception("%s: a request could not be given up; the others are begun anew", self.name)
                self._queue.extendleft(reversed(self._all_out()))
        self.rest()

    def _all_out(self) -> list[Ticket[R]]:
        """Give the worker up; the tickets that it had."""
        for request, ticket in self._of.items():
            self._lose(ticket, request)
        tickets = list(self._of.values())
        self._of, self._alone = {}, None
        self._discard()
        return tickets

    def _lose(self, ticket: Ticket[R], request: R) -> None:
        self._past += LaneState(lost=tokens_of(ticket.spent(request)))

    def waits(self) -> bool:
        """Whether it lets this turn pass, so that more is done together in the next."""
        self._num_waited += 1
        return self._num_waited <= self._patience and sum(ticket.size for ticket in self.tickets) < self._batch_size

    def step(self) -> list[tuple[Ticket[R], R | AnswerError]]:
        """One step; tickets that are over, with their finished requests or their errors."""
        self._num_waited = 0
        over = self._let_in()
        if self.worker is None:
            return over
        try:
            finished = self.worker.step() if self._of else []
        except Exception as error:
            return over + self._mend(error)
        self._calm()
        for request in finished:
            ticket = self._of.pop(request)
            ticket.is_over = True
            if request.error is not None:
                self._lose(ticket, request)
                over.append((ticket, self._error(ticket, request.error)))
                continue
            ticket.finished = request
            over.append((ticket, request))
        return over

    def going(self) -> list[tuple[Ticket[R], R]]:
        """Tickets that go on, with their requests."""
        return [(ticket, request) for request, ticket in self._of.items()]

    def rest(self) -> None:
        """Give the memory of an idle worker back."""
        if self.worker is not None and not self.has_work and self.worker.num_rows == 0:
            self._discard()
            self._batch_size = self._full_size

    def _let_in(self) -> list[tuple[Ticket[R], R | AnswerError]]:
        """Let tickets into the worker: all that wait, or one alone while there are suspects."""
        failed: list[tuple[Ticket[R], R | AnswerError]] = []
        if self._alone not in self._of.values():
            self._alone = None
        while self._alone is None and (line := self._suspects or self._queue):
            if line is self._suspects and self._of:
                break
            ticket = line.popleft()
            is_suspect = line is self._suspects
            try:
                if self.worker is None:
                    self.worker = self._make(self._batch_size)
                request = ticket.begin()
                self.worker.add(request)
            except Exception as error:
                ticket.is_over = True
                failed.append((ticket, self._error(ticket, error)))
                continue
            self._of[request] = ticket
            if is_suspect:
                self._alone = ticket
        return failed

    def _calm(self) -> None:
        self._num_calm += 1
        if self._num_calm >= CALM_STEPS and self._batch_size < self._full_size:
            self._num_calm = 0
            self._batch_size = min(2 * self._batch_size, self._full_size)
            if self.worker is not None:
                self.worker.batch_size = self._batch_size

    def _mend(self, error: Exception) -> list[tuple[Ticket[R], R | AnswerError]]:
        """Begin all anew after an error: with half the batch size, or one by one; or fail the one that is alone."""
        tickets = self._all_out()
        self._num_calm = 0
        if is_out_of_memory(error):
            error.__traceback__ = None  # which holds what the step held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if is_out_of_memory(error) and self._batch_size > 1:
            LOGGER.warning(
                "%s: out of memory with %d rows; going on with %d", self.name, self._batch_size, self._batch_size // 2
            )
            self._batch_size //= 2
            self._queue.extendleft(reversed(tickets))
            return []
        if len(tickets) != 1:
            LOGGER.warning(
                "%s: failed with %d requests, which are tried again one by one", self.name, len(tickets), exc_info=error
            )
            self._suspects.extend(tickets)
            return []
        self._queue.extendleft(reversed(self._suspects))  # found; the others may go side by side again
        self._suspects.clear()
        tickets[0].is_over = True
        return [(tickets[0], self._error(tickets[0], error))]

    def _error(self, ticket: Ticket[R], error: Exception) -> AnswerError:
        LOGGER.warning("%s: a request failed", self.name, exc_info=error)
        if isinstance(error, AnswerError):
            return error
        return too_large(error) or ticket.fail(error)

    def _discard(self) -> None:
        if self.worker is not None:
            self._past += LaneState(fed=self.worker.fed)
            self.worker = None


def too_large(error: Exception) -> TooLargeError | None:
    """What is told where an error, or the one that it came from, is a lack of memory; None for any other."""
    first = error.__cause__ if isinstance(error, ModelError) and isinstance(error.__cause__, Exception) else error
    if not is_out_of_memory(first):
        return None
    return TooLargeError("memory does not suffice for this request; ask for fewer or shorter answers")


class Loop:
    """The thread, its inbox, and the lanes."""

    def __init__(self) -> None:
        self.lanes: dict[Hashable, Lane[Any]] = {}
        """Of the thread alone."""
        self.state = LaneState()
        """Of all lanes together, as it was after the last step; for anybody to read."""
        self.last_step = time.time()
        """When a step ended, in seconds of the epoch."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._outbox: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._gone = LaneState()  # of lanes that were closed
        self._publish()
        self._thread = threading.Thread(target=self._run, name="iama-serving", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def put(self, action: Callable[[], None]) -> None:
        """Let the thread do something before its next step."""
        self._inbox.append(action)
        self._wake.set()

    async def work(self, key: Hashable, make: Callable[[], Lane[R]], ticket: Ticket[R]) -> R:
        """What a ticket's request is when it is finished; the lane is made where there is none of that key.

        Raises the ticket's error. Cancelling gives its rows up before the lane's next step.
        """
        if self._is_closing:
            raise ClosingError("the server is shutting down")
        self.put(partial(self._enter, key, make, ticket))
        if not self.is_alive:
            raise ClosingError("the server is shutting down")
        try:
            request = await ticket.future
            ticket.is_taken = True
            return request
        finally:
            self.put(partial(self._leave, key, ticket))

    def let_go(self, key: Hashable, held: HeldPrompt) -> None:
        """Give up the row of a prompt that was held for further rounds."""

        def action() -> None:
            if key in self.lanes:
                if isinstance(worker := self.lanes[key].worker, Decoder):
                    worker.let_go(held)
                self._tidy(key)

        self.put(action)

    def close(self) -> None:
        """Fail all that is not finished with `ClosingError`, and end the thread."""
        self._is_closing = True
        self._wake.set()
        self._thread.join()
        self._end()  # what came in meanwhile

    # In the thread. ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.clear()
            self._drain()
            at_work = [(key, lane) for key, lane in self.lanes.items() if lane.has_work]
            for key, lane in at_work:
                self._drain()
                if len(at_work) > 1 and lane.waits():
                    continue
                try:
                    self._turn(lane)
                except Exception:
                    LOGGER.exception("%s: the loop failed on it", lane.name)
                    self._fail_all(lane, AnswerError, "the server failed on this request")
                self._tidy(key)
                self._flush()
            if not at_work:
                self._flush()
                self._wake.wait(1.0)
        self._end()

    def _end(self) -> None:
        self._drain()
        for key, lane in [*self.lanes.items()]:
            self._fail_all(lane, ClosingError, "the server is shutting down")
            self._tidy(key)
        self._flush()

    def _fail_all(self, lane: Lane[Any], kind: type[AnswerError], message: str) -> None:
        for ticket in lane.tickets:
            lane.drop(ticket)
            self._tell(ticket.loop, partial(_settle, ticket, kind(message)))

    def _drain(self) -> None:
        while self._inbox:
            action = self._inbox.popleft()
            try:
                action()
            except Exception:
                LOGGER.exception("the loop could not do what it was asked")

    def _turn(self, lane: Lane[Any]) -> None:
        for ticket, result in lane.step():
            error = result if isinstance(result, AnswerError) else self._news(ticket, result)
            self._tell(ticket.loop, partial(_settle, ticket, error or result))
        for ticket, request in lane.going():
            error = self._news(ticket, request)
            if error is not None:
                lane.drop(ticket)
                self._tell(ticket.loop, partial(_settle, ticket, error))
        self.last_step = time.time()

    def _news(self, ticket: Ticket[Any], request: Any) -> AnswerError | None:
        """Tell what is new; the ticket's error where that cannot be made out."""
        if ticket.news is None or ticket.hear is None:
            return None
        try:
            items = ticket.news(request)
        except Exception as error:
            LOGGER.exception("what is new of an answer could not be made out")
            return ticket.fail(error)
        for item in items:
            self._tell(ticket.loop, partial(_hear, ticket, item))
        return None

    def _enter(self, key: Hashable, make: Callable[[], Lane[Any]], ticket: Ticket[Any]) -> None:
        if key not in self.lanes:
            try:
                self.lanes[key] = make()
            except Exception as error:
                self._tell(ticket.loop, partial(_settle, ticket, ticket.fail(error)))
                raise
        self.lanes[key].add(ticket)

    def _leave(self, key: Hashable, ticket: Ticket[Any]) -> None:
        if ticket.finished is not None and not ticket.is_taken:
            self._gone += LaneState(lost=tokens_of(ticket.spent(ticket.finished)))
        if key in self.lanes:
            self.lanes[key].drop(ticket)
            self._tidy(key)
        else:
            self._publish()

    def _tidy(self, key: Hashable) -> None:
        """Close a lane that has nothing left, and publish what stands in all."""
        if key not in self.lanes:
            return
        lane = self.lanes[key]
        lane.rest()
        if not lane.has_work and lane.worker is None:
            del self.lanes[key]
            self._gone += lane.state
        self._publish()

    def _publish(self) -> None:
        self.state = sum((lane.state for lane in self.lanes.values()), self._gone)

    def _tell(self, loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
        self._outbox.setdefault(loop, []).append(message)

    def _flush(self) -> None:
        """Send what is to be told, one call for each event loop."""
        for loop, messages in self._outbox.items():
            try:
                loop.call_soon_threadsafe(_deliver, messages)
            except RuntimeError:  # the one who asked is gone, and his loop is closed
                LOGGER.warning("an event loop was closed while an answer was written for it")
        self._outbox = {}


def _deliver(messages: list[Callable[[], None]]) -> None:
    for message in messages:
        message()


def _hear(ticket: Ticket[Any], item: Any) -> None:
    """Tell news to the one who waits, unless he has gone."""
    assert ticket.hear is not None
    if not ticket.future.done():
        try:
            ticket.hear(item)
        except Exception as error:
            LOGGER.exception("what an answer was told to failed")
            failed = AnswerError("the answer could not be told to the one who asked")
            failed.__cause__ = error
            ticket.future.set_exception(failed)


def _settle(ticket: Ticket[Any], result: Any) -> None:
    if not ticket.future.done():
        if isinstance(result, AnswerError):
            ticket.future.set_exception(result)
        else:
            ticket.future.set_result(result)
