"""A thousand requests of every kind at once, with clients that leave, bodies that are none, and a reward that fails."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import pytest
import torch

from iama.rewards.function import reward_from_function
from inference.samplers.serve import serve
from tests.inference.serving.served import Server, server

NUM_REQUESTS, NUM_CLIENTS, WARM_UP = 1000, 64, 200
PROMPTS = ("how to bake bread", "fix a bike", "mix water then flour please", "grow red tomatoes")
METHODS = ("single", "bon(4)", "bon(3)", "soft_bon(4, 0.5)", "bon(8, stop=pandora(0.1), width=2)")
GUIDED = "cards(quantile=0.5, entropy_threshold=2)"
BAD = (b"{", b'{"model": "base"}', b'{"model": "nobody", "messages": []}', b'{"model": "base", "messages": 3, "x": 1}')


class Flaky:
    """A reward that fails once in a hundred calls."""

    def __init__(self) -> None:
        self._lock, self.num_calls, self.num_failures = threading.Lock(), 0, 0
        self.fails = False

    def score(self, prompts, completions, **_):
        with self._lock:
            self.num_calls += 1
            if self.fails and self.num_calls % 100 == 7:
                self.num_failures += 1
                raise RuntimeError("not now")
        return [float(sum(letter in "aeiou" for letter in c[-1]["content"])) for c in completions]


def kinds() -> list[dict[str, Any]]:
    """Distinct requests."""
    rng = random.Random(0)
    return [
        {
            "model": f"base/{criterion}:{method}",
            "messages": [{"role": "user", "content": prompt}],
            "seed": rng.randrange(1000),
            "max_tokens": rng.choice((4, 12, 24)),
            "n": rng.choice((1, 1, 1, 2)) if criterion == "good" else 1,  # one that fails has no share of a reply
        }
        for criterion, methods in (("good", (*METHODS, GUIDED)), ("flaky", METHODS))
        for method in methods
        for prompt in PROMPTS
    ]


def expected(served: Server, body: dict[str, Any]) -> list[tuple[str, float | None]]:
    model = served.opened.catalogue.pick(body["model"])
    sampling = served.opened.catalogue.samplings["base"].model_copy(update={"max_new_tokens": body["max_tokens"]})
    sampler = serve(served.opened.policies["base"], served.opened.rewards[model.criterion], model.method, sampling)
    answers = [sampler.sample([body["messages"]], seed=body["seed"] + i)[0] for i in range(body["n"])]
    return [(answer.text, answer.reward) for answer in answers]


class Load:
    """Clients, and what they have seen; `spent` adds up usage and ledgers of the replies that came."""

    def __init__(self, served: Server, bodies: list[dict[str, Any]]) -> None:
        self.served, self.bodies, self.rng = served, bodies, random.Random(1)
        self.wanted = [expected(served, body) for body in bodies]
        self.statuses, self.spent = Counter[Any](), Counter[str]()

    async def run(self, number: int) -> None:
        numbers = iter(range(number))

        async def client() -> None:
            async with httpx2.AsyncClient(base_url=self.served.url, timeout=120) as http:
                for _ in numbers:
                    await self._one(http)

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))

    async def _one(self, http: httpx2.AsyncClient) -> None:
        draw, which = self.rng.random(), self.rng.randrange(len(self.bodies))
        stream, leaves_after = self.rng.random() < 0.4, self.rng.random() * 0.3
        path, headers = "/v1/chat/completions", {"Content-Type": "application/json"}
        if draw < 0.1:
            refused = await http.post(path, content=self.rng.choice(BAD), headers=headers)
            assert refused.status_code in (400, 404)
            self.statuses["bad"] += 1
            return
        body = self.bodies[which] | {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
        if draw < 0.25:  # of another policy, so that what is told of this one is what clients have seen
            body["model"] = body["model"].replace("base/", "other/")
            try:
                async with asyncio.timeout(leaves_after):
                    await http.post(path, json=body)
                self.statuses["came"] += 1
            except TimeoutError:
                self.statuses["left"] += 1
            return
        response = await http.post(path, json=body)
        choices, usage, error = parsed(response, stream)
        if error is not None:
            assert error["code"] == "reward_failed", error
            assert ":flaky" in body["model"].replace("/", ":")
            self.statuses["failed"] += 1
            return
        assert response.status_code == 200
        assert [text for text, _ in choices] == [text for text, _ in self.wanted[which]], body
        assert [told["reward"] for _, told in choices] == pytest.approx([r for _, r in self.wanted[which]], abs=1e-4)
        self.statuses["right"] += 1
        details = usage["completion_tokens_details"]
        self.spent.update(prompt=usage["prompt_tokens"], sampled=usage["completion_tokens"])
        self.spent.update(rejected=details["rejected_tokens"], reward=details["reward_tokens"])
        for _, told in choices:
            ledger = told["ledger"]
            self.spent.update(prefill=ledger["policy_prefill_tokens"], decode=ledger["policy_decode_tokens"])


def parsed(response: httpx2.Response, stream: bool) -> tuple[list[tuple[str, Any]], Any, Any]:
    """Texts with what `iama` tells of them, usage, and an error if there is one."""
    if response.status_code != 200 or not stream:
        reply = response.json()
        choices = [(choice["message"]["content"], choice["iama"]) for choice in reply.get("choices", ())]
        return choices, reply.get("usage"), reply.get("error")
    texts: dict[int, str] = {}
    told: dict[int, Any] = {}
    usage = None
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        part = json.loads(line[6:])
        if "error" in part:
            return [], None, part["error"]
        usage = part["usage"] or usage
        for choice in part["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
            told |= {index: choice["iama"]} if choice["finish_reason"] else {}
    return [(texts[index], told[index]) for index in sorted(told)], usage, None


def held_bytes() -> int:
    """Of tensors, once nobody uses them any more."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_requests_get_right_answers_and_leave_nothing_behind(raw_serving):
    flaky = Flaky()
    proxies = [criterion["proxy"] for criterion in raw_serving["criteria"]]
    raw = raw_serving | {
        "policies": raw_serving["policies"] | {"other": raw_serving["policies"]["base"]},
        "criteria": [
            {"name": "good", "proxy": proxies[0], "methods": [*METHODS, GUIDED]},
            {"name": "flaky", "proxy": proxies[1], "methods": list(METHODS)},
        ],
    }
    with server(raw, rewards={"flaky": reward_from_function(flaky.score, "flaky")}) as served:
        load = Load(served, kinds())
        flaky.fails = True
        asyncio.run(load.run(WARM_UP))
        wait_until_idle(served)
        before = held_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        asyncio.run(load.run(NUM_REQUESTS - WARM_UP))
        numbers = wait_until_idle(served)
        after = held_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load.statuses.total() == NUM_REQUESTS
    assert load.statuses["right"] > 0.6 * NUM_REQUESTS
    assert min(load.statuses[kind] for kind in ("bad", "left", "failed")) > 0, load.statuses
    counted = {kind: numbers.get(f'iama_tokens_total{{policy="base",kind="{kind}"}}') for kind in TOKENS}
    counted |= {kind: numbers.get(f'iama_ledger_tokens_total{{policy="base",kind="{kind}"}}') for kind in FED}
    assert counted == {kind: load.spent[kind] for kind in (*TOKENS, *FED)}
    assert after[0] <= 1.2 * before[0] + 1_000_000
    assert after[1] - before[1] < 100_000, "kilobytes"


TOKENS, FED = ("prompt", "sampled", "rejected", "reward"), ("prefill", "decode")


def wait_until_idle(served: Server) -> dict[str, float]:
    """The metrics, once nothing is under way: no row is held, and what was fed is in ledgers or was lost."""
    until = time.monotonic() + 20
    while True:
        text = served.http.get("/metrics").text
        pairs = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
        numbers = {name: float(value) for name, _, value in pairs}
        if not (numbers["iama_rows"] or numbers["iama_requests_running"] or numbers["iama_requests_waiting"]):
            break
        assert time.monotonic() < until, text
        time.sleep(0.05)
    policies = ("base", "other")
    fed = numbers['iama_fed_tokens_total{model="policy"}'] - numbers['iama_lost_tokens_total{model="policy"}']
    ledgers = [
        numbers.get(f'iama_ledger_tokens_total{{policy="{policy}",kind="{kind}"}}', 0.0)
        for policy in policies
        for kind in FED
    ]
    assert fed == sum(ledgers)
    rewards = [numbers.get(f'iama_tokens_total{{policy="{policy}",kind="reward"}}', 0.0) for policy in policies]
    assert numbers['iama_fed_tokens_total{model="reward"}'] - numbers['iama_lost_tokens_total{model="reward"}'] == sum(
        rewards
    )
    return numbers
