from __future__ import annotations

import asyncio

import pytest

from inference.serving.gate import Gate
from inference.serving.refusals import RefusedError


def test_places_go_to_those_that_wait_in_their_order_and_one_too_many_is_refused():
    async def main() -> None:
        gate, order, leave = Gate(2, 3), [], [asyncio.Event() for _ in range(5)]

        async def work(number: int) -> None:
            async with gate.place():
                order.append(number)
                await leave[number].wait()

        tasks = [asyncio.create_task(work(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert (order, gate.num_running, gate.num_waiting, gate.is_full) == ([0, 1], 2, 3, True)
        with pytest.raises(RefusedError) as refused:
            async with gate.place():
                pass
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        tasks[3].cancel()  # while it waits
        await asyncio.sleep(0)
        assert (gate.num_running, gate.num_waiting) == (2, 2)
        leave[1].set()
        await asyncio.sleep(0)
        tasks[2].cancel()  # when its turn has just come
        for event in leave:
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order[:2] == [0, 1]
        assert order[-1] == 4
        assert (gate.num_running, gate.num_waiting) == (0, 0)

    asyncio.run(main())


def test_one_that_runs_and_one_that_waits_may_be_given_up_in_the_same_moment():
    async def main() -> None:
        gate = Gate(1, 5)

        async def work() -> None:
            async with gate.place():
                await asyncio.sleep(10)

        tasks = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
        assert (gate.num_running, gate.num_waiting) == (0, 0)

    asyncio.run(main())


def test_a_closed_gate_lets_nobody_in_but_those_that_wait():
    async def main() -> None:
        gate, leave = Gate(1, 1), asyncio.Event()

        async def work() -> str:
            async with gate.place():
                await leave.wait()
                return "done"

        tasks = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0)
        gate.is_closed = True
        with pytest.raises(RefusedError) as refused:
            gate.check()
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        leave.set()
        assert await asyncio.gather(*tasks) == ["done", "done"]

    asyncio.run(main())
