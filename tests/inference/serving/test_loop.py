"""Lanes on their own: what happens to tickets when a worker fails, and who is told what."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
import torch

from iama.cost import Cost
from inference.serving import loop as loop_module
from inference.serving.asks import AnswerError, ClosingError, TooLargeError
from inference.serving.loop import Lane, Loop, Ticket


@dataclass(eq=False)
class Count:
    """A request that is finished after some steps; it may raise in one of them."""

    name: str
    left: int
    raises: Exception | None = None
    error: Exception | None = None


@dataclass
class Counting:
    """Counts requests down, a token each a step, at most `batch_size` at a time."""

    batch_size: int
    most: int = 100  # requests that memory suffices for
    refuses_drops: bool = False
    requests: list[Count] = field(default_factory=list)
    num_fed: int = 0
    seen: list[list[str]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.requests)

    @property
    def fed(self) -> tuple[int, int]:
        return self.num_fed, 0

    def add(self, request: Count) -> None:
        self.requests.append(request)

    def drop(self, request: Count) -> None:
        if self.refuses_drops:
            raise RuntimeError("no")
        self.requests.remove(request)

    def step(self) -> list[Count]:
        going = self.requests[: self.batch_size]
        self.seen.append([request.name for request in going])
        if len(going) > self.most:
            raise torch.OutOfMemoryError("too much")
        for request in going:
            if request.raises is not None:
                raise request.raises
            request.left -= 1
            self.num_fed += 1
        finished = [request for request in going if request.left == 0]
        self.requests = [request for request in self.requests if request not in finished]
        return finished


@pytest.fixture
def looped():
    made = Loop()
    yield made
    made.close()
    assert not made.is_alive


class Lab:
    """A lane of counting workers, all of which see into one list."""

    def __init__(self, **options) -> None:
        self.seen: list[list[str]] = []
        self.options, self.sizes = options, list[int]()

    def make(self) -> Lane[Count]:
        def worker(batch_size: int) -> Counting:
            self.sizes.append(batch_size)
            return Counting(batch_size, seen=self.seen, **self.options)

        return Lane("counting", worker, 8)


def ticket(name: str, steps: int = 3, raises: Exception | None = None, **how) -> Ticket[Count]:
    made: Ticket[Count] = Ticket(
        begin=lambda: Count(name, steps, raises),
        spent=lambda request: Cost(policy_decode_tokens=steps - request.left),
        fail=lambda error: AnswerError(f"{name} failed"),
        **how,
    )
    return made


async def all_of(looped: Loop, lab: Lab, tickets: list[Ticket[Count]]):
    work = (looped.work("key", lab.make, each) for each in tickets)
    results = await asyncio.gather(*work, return_exceptions=True)
    for _ in range(100):
        if not looped.lanes:
            break
        await asyncio.sleep(0.005)
    assert not looped.lanes
    assert looped.state.num_rows == looped.state.num_tickets == 0
    return results


def names(results) -> list[str]:
    return [str(result) if isinstance(result, BaseException) else result.name for result in results]


def test_requests_are_stepped_side_by_side(looped):
    lab = Lab()

    async def go():
        return await all_of(looped, lab, [ticket("a", 50), ticket("b", 40), ticket("c", 1)])

    assert names(asyncio.run(go())) == ["a", "b", "c"]
    assert ["a", "b"] in lab.seen or ["a", "b", "c"] in lab.seen
    assert looped.state.fed == (91, 0)
    assert looped.state.lost == (0, 0)


def test_the_one_that_raises_is_found_and_the_others_go_on(looped):
    lab = Lab()

    async def go():
        bad = ticket("bad", 30, ZeroDivisionError("secret"))
        return await all_of(looped, lab, [ticket("a", 60), ticket("b", 30), bad, ticket("c", 30)])

    assert names(asyncio.run(go())) == ["a", "b", "bad failed", "c"]
    assert ["bad"] in lab.seen
    assert looped.state.fed[0] == 120 + looped.state.lost[0]


def test_memory_that_suffices_for_fewer_halves_the_batch(looped, caplog):
    lab = Lab(most=3)

    async def go():
        return await all_of(looped, lab, [ticket(name, 20) for name in "abcdefgh"])

    assert names(asyncio.run(go())) == list("abcdefgh")
    assert set(lab.sizes) == {8, 4, 2}
    assert "going on with 2" in caplog.text


def test_memory_that_suffices_for_none_fails_them(looped):
    lab = Lab(most=0)

    async def go():
        return await all_of(looped, lab, [ticket("a"), ticket("b")])

    assert [type(result) for result in asyncio.run(go())] == [TooLargeError] * 2


def test_a_halved_batch_grows_again_when_memory_suffices(looped, monkeypatch):
    monkeypatch.setattr(loop_module, "CALM_STEPS", 10)
    lab = Lab(most=3)

    async def go():
        first = asyncio.ensure_future(all_of(looped, lab, [ticket(name, 200) for name in "abcd"]))
        await asyncio.sleep(0)
        while 2 not in lab.sizes:
            await asyncio.sleep(0.001)
        lab.options["most"] = 100
        return await first

    assert names(asyncio.run(go())) == list("abcd")
    assert max(map(len, lab.seen[len(lab.seen) // 2 :])) > 2


def test_what_cannot_be_given_up_is_given_up_with_its_worker(looped):
    lab = Lab(refuses_drops=True)

    async def go():
        gone = asyncio.ensure_future(looped.work("key", lab.make, ticket("gone", 10**9)))
        stays = asyncio.ensure_future(all_of(looped, lab, [ticket("stays", 300)]))
        while ["gone", "stays"] not in lab.seen:
            await asyncio.sleep(0.001)
        gone.cancel()
        return await asyncio.gather(gone, stays, return_exceptions=True)

    gone, stays = asyncio.run(go())
    assert isinstance(gone, asyncio.CancelledError)
    assert names(stays) == ["stays"]


def test_news_come_in_order_and_once_although_work_is_begun_anew(looped):
    lab, heard, told = Lab(most=1), list[int](), set[int]()

    def news(request: Count) -> list[int]:
        fresh = {20 - request.left} - told
        told.update(fresh)
        return sorted(fresh)

    async def go():
        return await all_of(looped, lab, [ticket("a", 20, news=news, hear=heard.append), ticket("b", 20)])

    assert names(asyncio.run(go())) == ["a", "b"]
    assert heard == sorted(set(heard))
    assert heard[-1] == 20


@pytest.mark.parametrize("of", ["news", "begin", "hear"])
def test_what_a_ticket_does_wrong_is_its_own_failure(looped, of):
    lab = Lab()

    def fails(*_):
        raise ZeroDivisionError

    async def go():
        bad = ticket("bad", 40, news=lambda _: [1], hear=lambda _: None)
        setattr(bad, of, fails)
        return await all_of(looped, lab, [ticket("a", 50), bad, ticket("b", 50)])

    a, failed, b = asyncio.run(go())
    assert isinstance(failed, AnswerError)
    assert names([a, b]) == ["a", "b"]


def test_a_lane_that_cannot_be_made_fails_its_ticket(looped):
    def make():
        raise ZeroDivisionError

    async def go():
        with pytest.raises(AnswerError, match="a failed"):
            await looped.work("key", make, ticket("a"))
        return await all_of(looped, Lab(), [ticket("b")])

    assert names(asyncio.run(go())) == ["b"]


def test_an_event_loop_that_is_gone_stops_nobody(looped):
    lab = Lab()

    async def leave():
        looped.put(lambda: looped._enter("key", lab.make, ticket_of_the_gone))

    async def make():
        return ticket("gone", 5)

    ticket_of_the_gone = asyncio.run(make())
    asyncio.run(leave())
    assert names(asyncio.run(all_of(looped, lab, []))) == []

    async def go():
        return await all_of(looped, lab, [ticket("a")])

    assert names(asyncio.run(go())) == ["a"]


def test_after_closing_nobody_waits():
    made, lab = Loop(), Lab()

    async def go():
        going = asyncio.ensure_future(made.work("key", lab.make, ticket("a", 10**9)))
        while not lab.seen:
            await asyncio.sleep(0.001)
        made.close()
        return await asyncio.gather(going, made.work("key", lab.make, ticket("b")), return_exceptions=True)

    assert [type(result) for result in asyncio.run(go())] == [ClosingError] * 2
    assert made.state.num_tickets == 0
