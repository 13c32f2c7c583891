from __future__ import annotations

from dataclasses import replace

import pytest
from test_catalogue import catalogue

from iama.cost import Cost
from inference.engine.responses import Response
from inference.samplers.base import Completion, Segment
from inference.serving.answering import State
from inference.serving.asks import Answer
from inference.serving.metrics import BUCKETS, WINDOW, Metrics

IDLE = State(0, {}, {}, (0, 0), Cost(), (0, 0), is_alive=True, last_step=0.0)


def numbers(metrics: Metrics, state: State = IDLE) -> dict[str, float]:
    pairs = [line.rpartition(" ") for line in metrics.text(state, {}).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


def answer(reward: float | None, **more) -> Answer:
    cost = Cost(policy_prefill_tokens=5, policy_decode_tokens=2, reward_calls=1, reward_tokens=9)
    return Answer(Completion((Response("x", (1, 2, 3), reward=reward),), 0, cost, **more), 7)


def test_labels_are_escaped_and_every_name_has_its_type():
    metrics = Metrics(catalogue())
    metrics.requests.add(2, 'a"b\\c\nd', "200")
    text = metrics.text(IDLE, {"iama_waiting": ("Now.", 3.0)})
    assert r'iama_requests_total{route="a\"b\\c\nd",status="200"} 2' in text.splitlines()
    assert "iama_waiting 3" in text.splitlines()
    typed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert len(typed) == text.count("# TYPE") == text.count("# HELP")
    assert {name.partition("{")[0] for name in numbers(metrics)} <= typed | {f"{n}_total" for n in typed}


def test_buckets_are_cumulative():
    metrics = Metrics(catalogue())
    for seconds in (0.001, BUCKETS[0], 0.3, 1000.0):
        metrics.whole.observe(seconds, "bon(4)")
    found = numbers(metrics)
    counts = [found[f'iama_request_seconds_bucket{{method="bon(4)",le="{end}"}}'] for end in (*BUCKETS, "+Inf")]
    assert counts == sorted(counts)
    assert (counts[0], counts[-2], counts[-1]) == (2, 3, 4)
    assert found['iama_request_seconds_sum{method="bon(4)"}'] == pytest.approx(1000.311)


def test_tokens_and_calls_are_those_of_the_answers():
    metrics, model = Metrics(catalogue()), catalogue().pick("iama/helpful:bon(4)")
    for _ in range(2):
        metrics.note(model, answer(1.0))
    found = numbers(metrics)
    counts = {
        kind: found[f'iama_tokens_total{{policy="iama",kind="{kind}"}}'] for kind in ("sampled", "kept", "rejected")
    }
    assert counts == {"sampled": 14, "kept": 6, "rejected": 8}
    assert found['iama_ledger_tokens_total{policy="iama",kind="prefill"}'] == 10
    assert found['iama_reward_calls_total{criterion="helpful"}'] == 2
    assert found['iama_answers_total{policy="iama",criterion="helpful",method="bon(4)"}'] == 2


def test_monitors_look_back_on_the_last_answers():
    served = catalogue(rewards={("iama", "helpful"): [0.0, 1.0]})
    metrics, model = Metrics(served), served.pick("iama/helpful:cards(target=1.5)")
    kept = Segment(3, 1.0, 0.5, 2, forced=False, wasted_tokens=4)
    for i in range(WINDOW + 10):
        reward = 100.0 if i < 10 else 2.0 if i % 2 else 0.0  # the first ten are forgotten
        metrics.note(model, answer(reward, trace=(kept, replace(kept, forced=True)), fallback=i % 5 == 0))
    labels = '{policy="iama",criterion="helpful",method="cards(target=1.5)"}'
    found = numbers(metrics)
    assert found[f"iama_proxy_mean{labels}"] == pytest.approx(1.0)
    assert found[f"iama_above_calibration_share{labels}"] == pytest.approx(0.5)
    assert found[f"iama_fallback_share{labels}"] == pytest.approx(0.2)
    assert found[f"iama_acceptance{labels}"] == pytest.approx(1 / 3), "of 2 + 1 that were tested one was accepted"


def test_a_method_of_a_client_s_own_goes_by_its_name():
    served = catalogue()
    metrics = Metrics(served)
    assert metrics.way_of(served.pick("iama/helpful:bon(7)")) == ("iama", "helpful", "bon(...)")
    assert metrics.way_of(served.pick("iama/helpful:bon(4)")) == ("iama", "helpful", "bon(4)")
    assert metrics.way_of(served.pick("iama/helpful:single")) == ("iama", "helpful", "single")
    assert metrics.way_of(served.pick("iama")) == ("iama", "", "single")


def test_the_engine_tells_what_it_holds_and_what_was_lost():
    state = replace(IDLE, num_rows=5, live={"single": 2}, fed=(100, 50), lost=(10, 0))
    found = numbers(Metrics(catalogue()), state)
    assert found["iama_rows"] == 5
    assert found['iama_answers_running{kind="single"}'] == 2
    assert found['iama_fed_tokens_total{model="policy"}'] == 100
    assert found['iama_lost_tokens_total{model="policy"}'] == 10
