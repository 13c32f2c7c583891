"""Requests over a real socket, by the official client where it can ask them."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iama.rewards.function import reward_from_function
from inference.samplers.serve import serve
from inference.serving.replies import sse
from tests.inference.serving.served import error_of, events, server

HELLO = [{"role": "user", "content": "how to bake bread"}]
CARDS = "base/good:cards(quantile=0.5, entropy_threshold=2)"


class Slow:
    """A reward that waits until it is let go, and fails on some texts."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.go.set()
        self.fails = ""
        self.reward = reward_from_function(self._score, "slow")

    def _score(self, prompts, completions, **_):
        self.asked.set()
        self.go.wait(20)
        if self.fails == "raise":
            raise RuntimeError("secret /etc/passwd")
        return [float("nan") if self.fails == "nan" else float(len(str(c))) for c in completions]


@pytest.fixture(scope="module")
def slow():
    return Slow()


@pytest.fixture(scope="module")
def served(raw_serving, slow):
    raw = raw_serving | {
        "criteria": [*raw_serving["criteria"], {"name": "slow", "proxy": raw_serving["criteria"][1]["proxy"]}],
        "ping_s": 0.1,
    }
    raw["limits"] = raw_serving["limits"] | {"deadline_s": 5, "max_running": 3, "max_waiting": 2}
    with server(raw, rewards={"slow": slow.reward}) as running:
        yield running


def test_no_event_holds_what_a_client_may_take_for_the_end_of_a_line():
    text = "a\x85b\u2028c\u2029d\ne\r\x0bé"
    event = sse({"text": text})
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event.removeprefix(b"data: ")) == {"text": text}


def expected(served, name, prompt=HELLO, seed=7, **changes):
    """The completion of `iama generate`, which is `serve(...).sample(...)`."""
    model = served.opened.catalogue.pick(name)
    policy, reward = served.opened.policies[model.policy], served.opened.rewards.get(model.criterion)
    sampling = served.opened.catalogue.samplings[model.policy].model_copy(update=changes)
    return serve(policy, reward, model.method, sampling).sample([prompt], seed=seed)[0]


@pytest.mark.parametrize("name", ["base:single", "base/good:bon(4)", "base/good:bon(3)", "base/vowels:bon(2)", CARDS])
def test_an_answer_is_that_of_iama_generate_whole_and_streamed(served, name):
    client, wanted = served.openai, expected(served, name)
    whole = client.chat.completions.create(model=name, messages=HELLO, seed=7)
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (wanted.text, wanted.finish_reason)
    assert whole.model == name
    told = choice.model_extra["iama"]
    assert told["reward"] == wanted.reward
    assert (told["policy"], told["seed"], told["num_candidates"]) == ("base", 7, len(wanted.candidates))
    counted = ("policy_tokens", "reward_calls", "reward_tokens")
    assert [told["ledger"][key] for key in counted] == [wanted.cost.as_dict()[key] for key in counted]
    pieces = list(
        client.chat.completions.create(
            model=name, messages=HELLO, seed=7, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == wanted.text
    assert pieces[0].choices[0].delta.role == "assistant"
    last = pieces[-2].choices[0]
    assert last.finish_reason == wanted.finish_reason
    ignored = {"seconds", "peak_memory", "ledger"}
    streamed = last.model_extra["iama"]
    assert {k: v for k, v in streamed.items() if k not in ignored} == {
        k: v for k, v in told.items() if k not in ignored
    }
    assert pieces[-1].usage == whole.usage


def test_usage_counts_all_that_was_sampled_and_the_prompt_once(served):
    name = "base/good:bon(4)"
    wanted = [expected(served, name, seed=seed) for seed in (7, 8)]
    reply = served.openai.chat.completions.create(
        model=name, messages=HELLO, seed=7, n=2, extra_body={"iama": {"return_candidates": True}}
    )
    assert [choice.message.content for choice in reply.choices] == [completion.text for completion in wanted]
    sampled = sum(len(c.token_ids) for completion in wanted for c in completion.candidates)
    usage = reply.usage
    assert usage.completion_tokens == sampled
    assert usage.prompt_tokens == wanted[0].cost.policy_prefill_tokens
    assert usage.total_tokens == usage.prompt_tokens + sampled
    details = usage.completion_tokens_details
    assert details.rejected_tokens == sampled - sum(len(completion.token_ids) for completion in wanted)
    assert details.reward_tokens == sum(completion.cost.reward_tokens for completion in wanted)
    for choice, completion in zip(reply.choices, wanted, strict=True):
        told = choice.model_extra["iama"]
        kept = [candidate for candidate in told["candidates"] if candidate["kept"]]
        assert [candidate["text"] for candidate in told["candidates"]] == [c.text for c in completion.candidates]
        assert [candidate["text"] for candidate in kept] == [completion.text]
        assert told["rank"] == 1


def test_the_criterion_method_and_budget_of_extra_body_decide(served):
    reply = served.openai.chat.completions.create(
        model="base", messages=HELLO, extra_body={"iama": {"criterion": "good", "budget": 2, "seed": 7}}
    )
    assert reply.model == "base/good:bon(2)"
    assert reply.choices[0].message.content == expected(served, "base/good:bon(2)").text


def test_texts_are_continued_and_stop_strings_cut(served):
    reply = served.openai.completions.create(model="base", prompt=["how to", "fix a"], seed=7, max_tokens=6)
    wanted = [
        expected(served, "base", prompt, seed, max_new_tokens=6) for prompt, seed in (("how to", 7), ("fix a", 8))
    ]
    assert [choice.text for choice in reply.choices] == [completion.text for completion in wanted]
    stop = wanted[0].text[2:4]
    cut = served.openai.completions.create(model="base", prompt="how to", seed=7, max_tokens=6, stop=[stop])
    assert cut.choices[0].text == wanted[0].text.partition(stop)[0]
    greedy = [
        served.openai.completions.create(model="base", prompt="how to", temperature=0, seed=seed).choices[0].text
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_events_tell_of_candidates_segments_and_tokens(served):
    def told(name):
        body = {"model": name, "messages": HELLO, "seed": 7, "stream": True, "iama": {"events": True}}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            parts = list(events(response))
        assert parts[-1] == "[DONE]"
        extras = [part["iama"] for part in parts[:-1] if not part["choices"]]
        assert all(extra["choice"] == 0 and extra["seconds"] >= 0 for extra in extras)
        return extras, parts[-2]["choices"][0]["iama"]

    extras, _ = told("base/good:bon(4)")
    scored = [extra for extra in extras if extra["event"] == "candidate" and extra["reward"] is not None]
    wanted = expected(served, "base/good:bon(4)")
    assert {e["index"]: (e["text"], e["reward"]) for e in scored} == {
        i: (c.text, c.reward) for i, c in enumerate(wanted.candidates)
    }
    extras, last = told(CARDS)
    segments = [extra for extra in extras if extra["event"] == "segment"]
    trace = expected(served, CARDS).trace
    assert [segment["num_tokens"] for segment in segments] == [segment.num_tokens for segment in trace]
    assert [segment["reward"] for segment in last["segments"]] == [segment.reward for segment in trace]


def test_models_are_listed_and_unknown_ones_are_not_found(served):
    client = served.openai
    names = [model.id for model in client.models.list()]
    assert names[:3] == ["base:single", "base/good:bon(4)", "base/good:soft_bon(4, 0.5)"]
    assert [client.models.retrieve(name).id for name in names] == names
    assert client.models.retrieve("base/good").id == "base/good:bon(4)"
    with pytest.raises(openai.NotFoundError, match="did you mean 'base/good:bon"):
        client.models.retrieve("bass/good:bon(4)")
    with pytest.raises(openai.NotFoundError, match="did you mean 'base/good:bon"):
        client.chat.completions.create(model="bass/good:bon(4)", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match=r"tools .* is not supported"):
        client.chat.completions.create(model="base", messages=HELLO, tools=[{"type": "function"}])


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"[1]", "application/json", 400, "must be a JSON object"),
        (b'{"model": "\\ud800"}', "application/json", 400, "half a character"),
        (b'{"a": ' * 1500 + b"1" + b"}" * 1500, "application/json", 400, "nested too deep"),
        (b'{"n": NaN}', "application/json", 400, "NaN"),
        (b"\xff\xfe", "application/json", 400, "not UTF-8"),
        (b"{}", "text/plain", 415, "Content-Type: application/json"),
        (b"{" + b" " * 30_000, "application/json", 413, "longer than 20000 bytes"),
    ],
)
def test_bodies_that_cannot_be_read_are_told_in_one_sentence(served, content, kind, status, said):
    response = served.http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert said in error_of(response)["message"]
    chunked = served.http.post("/v1/chat/completions", content=iter([content]), headers={"Content-Type": kind})
    assert chunked.status_code == status


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "logprobs",
        "iama",
        "tools",
        "user",
        "response_format",
        "repetition_penalty",
        "max_completion_tokens",
    ]
)
MALFORMED = st.one_of(
    st.binary(max_size=40),
    JSON.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode()),
    st.dictionaries(NAMES | st.text(max_size=6), JSON, max_size=5).map(lambda body: json.dumps(body).encode()),
    st.tuples(NAMES, JSON).map(
        lambda pair: json.dumps({"model": "base", "messages": HELLO, "x": 0} | dict([pair])).encode()
    ),
)


@pytest.mark.slow
def test_500_malformed_bodies_are_refused_with_a_sentence(served):
    client = served.http

    @settings(max_examples=500, suppress_health_check=list(HealthCheck))
    @given(content=MALFORMED, path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
    def send(content, path):
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, content
        error_of(response)

    send()


def test_prompts_that_do_not_fit_are_refused_and_defaults_shrink(served):
    def ask(words, **more):
        return served.http.post("/v1/completions", json={"model": "base", "prompt": "bake " * words, "seed": 7, **more})

    too_long = error_of(ask(200))
    assert too_long["code"] == "context_length_exceeded"
    assert "more than the 128 tokens that 'base' reads of prompt and answer together; shorten it" in too_long["message"]
    assert "max_tokens" not in too_long["message"]
    fits = error_of(ask(30, max_tokens=100))
    assert fits["code"] == "context_length_exceeded"
    most = int(fits["message"].rpartition("set max_tokens to at most ")[2])
    assert ask(30, max_tokens=most).status_code == 200
    assert ask(30, max_tokens=most + 1).status_code == 400
    shrunk = ask(122)
    assert shrunk.status_code == 200
    assert shrunk.json()["usage"]["total_tokens"] <= 128


def test_a_prompt_beside_a_long_one_has_the_room_that_it_has_alone(served):
    short, long = "how to bake bread", "bake " * 123

    def ask(prompt, **more):
        body = {"model": "base", "prompt": prompt, "seed": 7, **more}
        reply = served.http.post("/v1/completions", json=body)
        assert reply.status_code == 200
        return [choice["text"] for choice in reply.json()["choices"]]

    room = 128 - len(served.opened.policies["base"].tokenizer(long)["input_ids"])
    assert room < served.opened.catalogue.samplings["base"].max_new_tokens
    assert ask([short, long])[0] == ask(short)[0]
    assert ask([long, short])[0] == ask(long)[0]
    assert ask([short, long], max_tokens=room)[0] == ask(short, max_tokens=room)[0]


def test_routes_and_ways_that_are_not_there_are_told(served):
    client = served.http
    assert client.get("/v1/nothing").status_code == 404
    assert "There is no route '/nothing' here; the routes are /, " in error_of(client.get("/nothing"))["message"]
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/chat/completions"):
        said = error_of(client.post(path, json={}))["message"]
        assert said.endswith("did you mean /v1/chat/completions?; the base URL of a client ends in /v1, once")
    for path, meant in (("/models", "/v1/models"), ("/v1/models/", "/v1/models"), ("/v1/health/", "/health")):
        assert error_of(client.get(path))["message"].endswith(f"did you mean {meant}?")
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models/base", "GET, HEAD"),
    ):
        response = client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert error_of(response)["code"] == "method_not_allowed"
        assert f"{method} is not taken at {path}; send {allowed.partition(',')[0]}" in error_of(response)["message"]
    assert "once `cors` lists that origin" in error_of(client.options("/v1/chat/completions"))["message"]
    for path in ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/base", "/v1/iama"):
        head, got = client.head(path), client.get(path)
        assert (head.status_code, head.content, head.headers["content-type"]) == (
            200, b"", got.headers["content-type"],
        )  # fmt: skip
    refused = client.get("/v1/models", headers={"Host": "evil.example"})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "https://a.b"}).headers


def test_the_page_may_run_nothing_but_its_own_scripts(served):
    response = served.http.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.text.lstrip().lower().startswith("<!doctype html>")
    about = served.http.get("/v1/iama").json()
    assert {"policies", "criteria", "models", "limits", "evaluation"} <= set(about)
    assert about["evaluation"] is None
    assert "/" not in json.dumps(about["policies"])


@pytest.mark.parametrize(("fails", "status", "code"), [("raise", 502, "reward_failed"), ("nan", 502, "reward_failed")])
def test_a_reward_that_fails_fails_its_request_alone(served, slow, fails, status, code):
    slow.fails = fails
    try:
        for stream in (False, True):
            body = {"model": "base/slow:bon(4)", "messages": HELLO, "stream": stream}
            failed = served.http.post("/v1/chat/completions", json=body)
            if stream and failed.status_code == 200:  # candidates were told of before
                error = [part for part in events(failed) if part != "[DONE]"][-1]["error"]
            else:
                assert (failed.status_code, failed.headers["x-should-retry"]) == (status, "false")
                error = error_of(failed)
            assert error["code"] == code
            assert "passwd" not in error["message"]
    finally:
        slow.fails = ""
    assert served.openai.chat.completions.create(model="base/slow:bon(4)", messages=HELLO).choices


def idle(served, seconds=5.0):
    """Whether the engine holds nothing, soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if "iama_requests_running 0" in served.http.get("/metrics").text:
            return True
        time.sleep(0.02)
    return False


def test_too_many_requests_are_refused_and_clients_that_leave_make_room(served, slow):
    """A slow stream is kept alive by pings; what waits for its turn is bounded; who hangs up frees the place."""
    slow.go.clear()
    body = {"model": "base/slow:bon(4)", "messages": HELLO, "stream": True}
    streams, lines = [], []
    try:
        for _ in range(3):
            streams.append(served.http.stream("POST", "/v1/chat/completions", json=body))
            lines.append(streams[-1].__enter__().iter_lines())  # one that is dropped hangs up
            assert any(line == ": ping" for line in lines[-1])
        waiting = [threading.Thread(target=leave_soon, args=(served.url, body | {"stream": False})) for _ in range(2)]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + 5
        while "iama_requests_waiting 2" not in served.http.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.02)
        refused = served.http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert served.http.get("/ready").status_code == 429
        assert served.http.get("/health").status_code == 200
        for thread in waiting:
            thread.join()
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
        slow.go.set()
    assert idle(served)
    assert 'status="499"' in served.http.get("/metrics").text


def leave_soon(url, body):
    with suppress(httpx2.TimeoutException):
        httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=1)


def metrics_of(served) -> dict[str, float]:
    pairs = [line.rpartition(" ") for line in served.http.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in pairs}


def test_metrics_add_up(served):
    served.openai.chat.completions.create(model="base/good:bon(3)", messages=HELLO)
    before = metrics_of(served)['iama_tokens_total{policy="base",kind="sampled"}']
    usage = served.openai.chat.completions.create(model="base/good:bon(4)", messages=HELLO, n=2).usage
    after = metrics_of(served)
    assert after['iama_tokens_total{policy="base",kind="sampled"}'] == before + usage.completion_tokens
    kinds = {
        kind: after[f'iama_tokens_total{{policy="base",kind="{kind}"}}'] for kind in ("sampled", "kept", "rejected")
    }
    assert kinds["sampled"] == kinds["kept"] + kinds["rejected"]
    count = after['iama_request_seconds_count{method="bon(4)"}']
    assert after['iama_request_seconds_bucket{method="bon(4)",le="+Inf"}'] == count
    assert any('method="bon(...)"' in name for name in after), "numbers that clients write make no labels"
    assert not any("bon(3)" in name for name in after)
