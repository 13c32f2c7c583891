"""Who may ask: keys, hosts, origins; and how long: deadlines, drains, and clients that hang up."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
import time
from dataclasses import replace

import httpx2
import openai
import pytest

from iama.errors import ConfigError
from iama.rewards.function import reward_from_function
from inference.serving.answering import Answering
from inference.serving.app import make_app
from inference.serving.listening import bind
from inference.serving.run import serve
from inference.serving.service import Service
from tests.inference.serving.served import error_of, events, opened_plan, server

HELLO = [{"role": "user", "content": "how to bake bread"}]
KEYS = ("first-key-of-many-letters", "second-key-of-many-letters")


@pytest.fixture(scope="module")
def locked(raw_serving, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS))
    keys.chmod(0o600)
    more = {"keys": {"file": str(keys)}, "cors": ["https://app.example.org"], "hosts": ["iama.example.org"]}
    with server(raw_serving | {"methods": ["bon(2)"], "calibration": None} | more, key=KEYS[1]) as running:
        yield running


def basic(key: str) -> str:
    return f"Basic {base64.b64encode(f'anyone:{key}'.encode()).decode()}"


def test_every_route_but_health_needs_a_key(locked):
    with httpx2.Client(base_url=locked.url) as client:
        assert client.get("/health").status_code == 200
        for path in ("/", "/ready", "/metrics", "/v1/models", "/v1/iama", "/nothing", "/health/", "/healthy"):
            response = client.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")
            assert error_of(response)["code"] == "invalid_api_key"
        body = {"model": "base", "messages": HELLO}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        for wrong in ("Bearer x", "Bearer", "Basic !!", "Basic", basic("x"), "x", f"Bearer {KEYS[0]}x"):
            assert client.get("/v1/models", headers={"Authorization": wrong}).status_code == 401
        for key in KEYS:
            for right in (f"Bearer {key}", basic(key)):
                assert client.get("/v1/models", headers={"Authorization": right}).status_code == 200


def test_pages_of_listed_origins_may_ask_and_no_others(locked):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with httpx2.Client(base_url=locked.url) as client:
        listed = client.options("/v1/chat/completions", headers={"Origin": "https://app.example.org", **asks})
        assert listed.headers["access-control-allow-origin"] == "https://app.example.org"
        asked = client.get("/health", headers={"Origin": "https://app.example.org"})
        assert asked.headers["access-control-expose-headers"] == "Retry-After"
        other = client.options("/v1/chat/completions", headers={"Origin": "https://evil.example.org", **asks})
        assert "access-control-allow-origin" not in other.headers
    refused = locked.http.get("/v1/models", headers={"Origin": "https://app.example.org", "Authorization": "x"})
    assert refused.headers["access-control-allow-origin"] == "https://app.example.org"


def test_other_hosts_than_its_own_are_refused(locked):
    for host, status in (("iama.example.org", 200), ("IAMA.example.org:443", 200), ("evil.example.org", 403)):
        assert locked.http.get("/v1/models", headers={"Host": host}).status_code == status


class Waiting:
    """A reward that takes as long as it is told."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.reward = reward_from_function(self._score, "waiting")

    def _score(self, prompts, completions, **_):
        self.asked.set()
        self.go.wait(10)
        return [1.0] * len(prompts)


@pytest.fixture
def waiting(raw_serving):
    """A server whose only reward waits, with that reward."""
    reward = Waiting()
    raw = raw_serving | {"criteria": raw_serving["criteria"][1:], "calibration": None, "ping_s": 0.05, "drain_s": 5}
    raw["limits"] = raw_serving["limits"] | {"deadline_s": 0.6}
    with server(raw, rewards={"vowels": reward.reward}) as running:
        yield running, reward
        reward.go.set()


def test_what_takes_too_long_is_given_up_whole_and_streamed(waiting):
    served, _ = waiting
    body = {"model": "base/vowels:bon(2)", "messages": HELLO}
    late = served.http.post("/v1/chat/completions", json=body)
    assert (late.status_code, error_of(late)["code"]) == (504, "deadline_exceeded")
    with served.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        assert stream.status_code == 200, "it was kept alive, and so has begun"
        *_, last = events(stream)
    assert last["error"]["code"] == "deadline_exceeded"


def test_what_never_had_its_turn_may_be_asked_again(raw_serving):
    """Nothing is wrong with it: another time there is a place."""
    reward = Waiting()
    raw = raw_serving | {"criteria": raw_serving["criteria"][1:], "calibration": None, "ping_s": 0.05}
    raw["limits"] = raw_serving["limits"] | {"deadline_s": 3, "max_running": 1}
    body = {"model": "base/vowels:bon(2)", "messages": HELLO}
    replies = []

    def ask():
        replies.append(served.http.post("/v1/chat/completions", json=body))

    with server(raw, rewards={"vowels": reward.reward}) as served:
        reward.go.set()
        assert served.http.post("/v1/chat/completions", json=body).status_code == 200
        reward.go.clear()
        reward.asked.clear()
        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads[0].start()
        assert reward.asked.wait(10)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        reward.go.set()
        metrics = served.http.get("/metrics").text
    assert sorted(reply.status_code for reply in replies) == [503, 503, 504]
    late = [reply for reply in replies if reply.status_code == 503]
    for reply in late:
        error = error_of(reply)
        assert error["code"] == "queue_timeout"
        assert re.fullmatch(
            r"The request waited [23]\.\d s of 3 s for its turn, and was given up; try again later", error["message"]
        )
        assert int(reply.headers["Retry-After"]) >= 1
        assert "x-should-retry" not in reply.headers
    assert 'code="queue_timeout"} 2' in metrics


def test_the_openai_client_does_not_ask_again_for_what_takes_too_long(waiting):
    """Left to itself it asks three times, and each takes as long."""
    served, reward = waiting
    patient = served.openai.with_options(max_retries=2)
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="was given up"):
        patient.chat.completions.create(model="base/vowels:bon(2)", messages=HELLO)
    reward.go.set()
    assert 'route="/v1/chat/completions",status="504"} 1' in served.http.get("/metrics").text
    assert time.monotonic() - began < 5


def test_a_server_that_ends_finishes_what_runs_and_refuses_the_rest(waiting):
    served, reward = waiting
    body = {"model": "base/vowels:bon(2)", "messages": HELLO}
    replies = []
    asking = threading.Thread(target=lambda: replies.append(served.http.post("/v1/chat/completions", json=body)))
    asking.start()
    assert reward.asked.wait(10)
    ending = threading.Thread(target=served.close)
    ending.start()
    until = time.monotonic() + 5
    while (refused := httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=5)).status_code != 503:
        assert time.monotonic() < until
    assert error_of(refused)["code"] == "shutting_down"
    assert refused.headers["retry-after"]
    reward.go.set()
    asking.join()
    ending.join()
    assert replies[0].status_code == 200


def test_rows_of_clients_that_hang_up_are_freed(raw_serving):
    """Whole and streamed, in the middle of an answer: the engine holds no row soon after."""
    long = {"model": "base/good:bon(8)", "messages": HELLO, "max_tokens": 100, "n": 4}
    with server(raw_serving | {"methods": ["bon(4)"]}) as served:
        for stream in (False, True):
            for _ in range(4):
                with httpx2.Client(base_url=served.url, timeout=httpx2.Timeout(5, read=0.03)) as client:
                    try:
                        with client.stream("POST", "/v1/chat/completions", json=long | {"stream": stream}) as response:
                            next(response.iter_raw())
                    except httpx2.ReadTimeout:
                        pass
            until = time.monotonic() + 5
            while True:
                text = served.http.get("/metrics").text
                if "iama_rows 0\n" in text and "iama_requests_running 0\n" in text:
                    break
                assert time.monotonic() < until, text
                time.sleep(0.02)
        assert 'status="499"' in text
        assert served.http.post("/v1/chat/completions", json=long | {"n": 1}).status_code == 200


def test_of_two_servers_that_start_together_the_second_is_told(raw_serving):
    plan, opened = opened_plan({**raw_serving, "port": 0})
    with bind(plan.config) as first:  # binding alone does not keep another server out; listening does
        late = replace(plan, config=plan.config.model_copy(update={"port": first.getsockname()[1]}))
        with bind(late.config) as second:
            first.listen()

            async def start() -> None:
                engine = Answering(opened.policies, opened.rewards, batch_size=2, num_private=1, reward_timeout_s=1)
                await serve(late, opened.catalogue, engine, second, asyncio.get_running_loop().create_future())

            with pytest.raises(ConfigError, match=r"cannot listen on .*Address already in use"):
                asyncio.run(start())


def test_health_tells_of_an_engine_that_has_stopped(raw_serving):
    plan, opened = opened_plan(raw_serving | {"methods": ["bon(2)"], "calibration": None})
    engine = Answering(opened.policies, opened.rewards)
    service = Service(opened.catalogue, plan.policy_files, engine, plan.config.limits)
    app = make_app(plan.config, plan, service)

    async def ask(path: str) -> int:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get(path)).status_code

    assert [asyncio.run(ask(path)) for path in ("/health", "/ready")] == [200, 200]
    engine.close()
    assert [asyncio.run(ask(path)) for path in ("/health", "/ready")] == [503, 503]
