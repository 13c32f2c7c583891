"""Judges against a real local server: what is read from answers, what is kept, and what it costs."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iama.config.schema import validate
from iama.config.specs import JudgeSpec, RewardSpec
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.rewards.judge import (
    AnswerCache,
    Judge,
    fill,
    judge_plan,
    parse_number,
    parse_verdict,
    question_key,
    read_template,
)
from iama.rewards.load import check_reward, load_reward
from tests.openai_server import OpenAIServer

POINTWISE = "Rate from 1 to 10.\nQuestion: {prompt}\nAnswer: {completion}\nNumber:"
PAIRWISE = "{prompt} || {first} || {second}"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def judge_spec(server: OpenAIServer | None, folder: Path, template: str = POINTWISE, **changes: Any) -> JudgeSpec:
    file = folder / "judge.txt"
    file.write_text(template, encoding="utf-8")
    url = "http://localhost:1/v1" if server is None else server.url
    fields = {"url": url, "model": "org/judge", "prompt_file": str(file), "cache": str(folder / "cache")}
    return JudgeSpec(**{**fields, **changes})


def pairwise(server: OpenAIServer | None, folder: Path, **changes: Any) -> JudgeSpec:
    return judge_spec(server, folder, PAIRWISE, mode="pairwise", baseline_column="base", **changes)


def length(body: dict[str, Any]) -> str:
    """A judge that counts the answer's letters."""
    found = re.search(r"Answer: (.*)\nNumber:", body["messages"][0]["content"], re.DOTALL)
    assert found is not None
    return f" {len(found[1])}\n"


def test_a_judge_on_several_servers(server: OpenAIServer, tmp_path: Path) -> None:
    """One of them is dead; the addresses decide no answer, and stand in the plan. One address is dumped as before."""
    server.answer = length
    urls = ["http://127.0.0.1:1/v1", server.url]
    spec = validate(judge_spec(server, tmp_path).model_dump() | {"url": urls}, JudgeSpec, "here")
    assert judge_plan(spec, 1, 8.0).startswith(f"judge org/judge at {urls[0]}, {urls[1]}: 1 requests")
    with pytest.warns(IamaWarning, match=r"at 'http://127.0.0.1:1/v1' gave no answer"):
        scores, _ = load_reward("r", RewardSpec(judge=spec)).score(["a"] * 3, ["one", "three", "eleven"], {})
    assert scores == [3.0, 5.0, 6.0]
    assert question_key(spec, "x") == question_key(judge_spec(server, tmp_path), "x")
    assert judge_spec(server, tmp_path).model_dump()["url"] == server.url
    for wrong, told in (
        ([], "url lists no server"),
        (["http://a/v1", "http://me:key@b/v1"], "holds a user or a query"),
    ):
        with pytest.raises(ConfigError, match=told):
            validate(spec.model_dump() | {"url": wrong}, JudgeSpec, "here")
    with pytest.raises(ConfigError, match="is given twice"):
        check_reward("r", RewardSpec(judge=spec.model_copy(update={"url": (server.url, server.url)})))


def test_scores_through_the_reward_interface(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = length
    reward = load_reward("r", RewardSpec(judge=judge_spec(server, tmp_path)))
    message = [{"role": "user", "content": "a question"}]
    scores, cost = reward.score([message, "text", message], ["four", "sevenly", "four"], {"topic": ["x"] * 3})
    assert scores == [4.0, 7.0, 4.0]
    asked = [body["messages"] for body in server.requests]
    assert sorted(m[0]["content"].split("\n")[1] for m in asked) == ["Question: a question", "Question: text"]
    assert all(len(m) == 1 and m[0]["role"] == "user" for m in asked)
    num_words = sum(len(m[0]["content"].split()) for m in asked)
    assert (cost.reward_calls, cost.reward_tokens) == (3, num_words + 2)  # the same text twice is read once
    assert {(b["temperature"], b["max_tokens"]) for b in server.requests} == {(0.0, 16)}
    assert isinstance(reward.scorer, Judge)
    assert (reward.scorer.num_asked, reward.scorer.num_unparsable) == (2, 0)


def test_user_text_is_never_a_placeholder(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = lambda body: "3"
    judge = Judge(judge_spec(server, tmp_path), "here")
    judge.score(["{completion} {x} {0} %s"], ["{prompt} {{}} {"], {})
    wanted = "Rate from 1 to 10.\nQuestion: {completion} {x} {0} %s\nAnswer: {prompt} {{}} {\nNumber:"
    assert server.requests[0]["messages"][0]["content"] == wanted


@given(prompt=st.text(), completion=st.text())
def test_filling_keeps_every_text(prompt: str, completion: str) -> None:
    filled = fill("<{prompt}|{completion}|{prompt}>", {"prompt": prompt, "completion": completion})
    assert filled == f"<{prompt}|{completion}|{prompt}>"


@given(st.decimals(min_value=1, max_value=10, places=2), st.sampled_from(["{}", " {}", "{}\n", "\t{} "]))
def test_numbers_within_the_range_are_read(number: Any, frame: str) -> None:
    assert parse_number(frame.format(number), 1, 10) == float(number)


@given(st.text(alphabet="0123456789.,+-/eE inf٣\n", max_size=8) | st.text())
def test_everything_else_is_missing(reply: str) -> None:
    """The reference: a number written out in decimal, from 1 to 10."""
    text = reply.strip()
    digits = text.removeprefix("-").split(".")
    is_number = len(digits) <= 2 and all(d.isascii() and d.isdigit() for d in digits)
    number = parse_number(reply, 1, 10)
    if is_number and 1 <= float(text) <= 10:
        assert number == float(text)
    else:
        assert math.isnan(number)


@pytest.mark.parametrize(
    "reply",
    ["", "7/10", "7 8", "Score: 7", "7.", ".5", "1e1", "11", "0", "-3", "nan", "inf", "٣", "7\n8", "seven", "+7"],
)
def test_replies_that_are_not_one_number(reply: str) -> None:
    assert math.isnan(parse_number(reply, 1, 10))


def test_verdicts_are_exact() -> None:
    assert [parse_verdict(reply) for reply in ("A", " B\n", "tie")] == [1.0, 0.0, 0.5]
    assert all(math.isnan(parse_verdict(reply)) for reply in ("", "a", "A.", "A B", "Tie", "C", "[[A]]", "Answer: A"))


def test_an_unparsable_answer_is_missing_counted_and_told_once(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = lambda body: ("I think it deserves 7", "length") if "bad" in str(body) else "5"
    reward = load_reward("r", RewardSpec(judge=judge_spec(server, tmp_path), scale={"mean": 1.0, "std": 2.0}))
    pattern = r"reward 'r': the judge answered 'I think.*max_tokens \(16\).*one number from 1 to 10.*missing"
    with pytest.warns(IamaWarning, match=pattern):
        scores = reward(["p"] * 3, ["good", "bad", "bad too"])
    assert scores[0] == 2.0
    assert math.isnan(scores[1])
    assert math.isnan(scores[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(reward(["p"], ["bad three"])[0])
    assert isinstance(reward.scorer, Judge)
    assert reward.scorer.num_unparsable == 3


@pytest.mark.parametrize("first", ["A", "B", "tie", "?"])
@pytest.mark.parametrize("second", ["A", "B", "tie", "?"])
def test_pairwise_asks_in_both_orders(server: OpenAIServer, tmp_path: Path, first: str, second: str) -> None:
    server.answer = lambda body: first if "|| mine || other" in body["messages"][0]["content"] else second
    judge = Judge(pairwise(server, tmp_path), "here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)
        (score,), _ = judge.score(["p"], ["mine"], {"base": ["other"]})
    asked = sorted(body["messages"][0]["content"] for body in server.requests)
    assert asked == ["p || mine || other", "p || other || mine"]
    if "?" in (first, second):
        assert math.isnan(score)
    else:
        assert score == {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)


def test_a_judge_that_prefers_the_first_gives_ties(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = lambda body: "A"
    scores, _ = Judge(pairwise(server, tmp_path), "here").score(["p", "q"], ["x", "same"], {"base": ["y", "same"]})
    assert scores == [0.5, 0.5]
    assert server.num_requests == 3  # a text against itself is one question


def test_pairwise_needs_its_column(server: OpenAIServer, tmp_path: Path) -> None:
    judge = Judge(pairwise(server, tmp_path), "reward 'r'")
    with pytest.raises(RewardError, match=r"reward 'r': the prompts have no column 'base'.*\['topic'\]"):
        judge.score(["p"], ["x"], {"topic": ["t"]})
    with pytest.raises(RewardError, match="column 'base' of the prompt 'which one' is None"):
        judge.score(["p", "which one"], ["x", "x"], {"base": ["y", None]})
    assert server.num_requests == 0


def test_nothing_is_asked_twice(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = length
    spec = judge_spec(server, tmp_path)
    texts = ["one", "three", "seven"]
    first = Judge(spec, "here")
    assert first.count_requests(["p"] * 3, texts, {}) == (3, 0)
    before = first.score(["p"] * 3, texts, {})
    again = Judge(spec.model_copy(update={"url": "http://localhost:1/v1", "concurrency": 1}), "here")
    assert again.count_requests(["p"] * 4, [*texts, "unseen"], {}) == (4, 3)
    assert again.score(["p"] * 3, texts, {}) == before  # tokens too
    assert (server.num_requests, again.num_asked) == (3, 0)


def test_an_unparsable_answer_is_asked_for_once_by_each_run(server: OpenAIServer, tmp_path: Path) -> None:
    """Within a run it is kept in memory; on disk it would be there for ever, whatever becomes of the server."""
    server.answer = lambda body: "no idea" if "Answer: x" in str(body) else "5"
    judge = Judge(judge_spec(server, tmp_path), "here")
    with pytest.warns(IamaWarning, match="no idea"):
        assert math.isnan(judge.score(["p", "p"], ["x", "good"], {})[0][0])
    assert math.isnan(judge.score(["p"], ["x"], {})[0][0])
    assert (server.num_requests, judge.num_asked, judge.num_unparsable) == (2, 2, 2)
    assert "no idea" not in cache_file(tmp_path).read_text()
    server.answer = lambda body: "7"
    mended = Judge(judge_spec(server, tmp_path), "here")
    assert mended.count_requests(["p", "p"], ["x", "good"], {}) == (2, 1)
    assert mended.score(["p", "p"], ["x", "good"], {})[0] == [7.0, 5.0]


def test_an_unparsable_answer_that_was_kept_before_is_asked_for_again(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = lambda body: "7"
    spec = judge_spec(server, tmp_path)
    (tmp_path / "cache").mkdir()
    key = question_key(spec, fill(POINTWISE, {"prompt": "p", "completion": "x"}))
    (tmp_path / "cache" / "org_judge.jsonl").write_text(json.dumps(answer_row(key, "no idea")) + "\n")
    for _ in range(2):
        assert Judge(spec, "here").score(["p"], ["x"], {})[0] == [7.0]
    assert server.num_requests == 1


@pytest.mark.parametrize(("mode", "text"), [("pointwise", "1"), ("pairwise", "A")])
def test_an_answer_that_was_cut_is_missing_and_not_kept(
    server: OpenAIServer, tmp_path: Path, mode: str, text: str
) -> None:
    """It may be the beginning of 10; one that was kept before does not count either."""
    server.answer = lambda body: (text, "length")
    spec = (judge_spec if mode == "pointwise" else pairwise)(server, tmp_path, max_tokens=1)
    with pytest.warns(IamaWarning, match=rf"answered '{text}' and was cut at max_tokens \(1\).*or raise max_tokens"):
        scores, _ = Judge(spec, "here").score(["p"], ["x"], {"base": ["y"]})
    assert math.isnan(scores[0])
    filled = {"prompt": "p", "completion": "x", "first": "x", "second": "y"}
    key = question_key(spec, fill(read_template(spec, "here"), filled))
    AnswerCache(tmp_path / "cache" / "org_judge.jsonl", bool).append(
        answer_row(key, text) | {"finish_reason": "length"}
    )
    judge = Judge(spec, "here")
    assert judge.count_requests(["p"], ["x"], {"base": ["y"]})[1] == 0
    server.answer = lambda body: text
    assert judge.score(["p"], ["x"], {"base": ["y"]})[0] == [1.0 if mode == "pointwise" else 0.5]


@pytest.mark.parametrize("left_out", [["temperature"], ["max_tokens"], ["seed"], []])
def test_what_is_left_out_is_not_sent(server: OpenAIServer, tmp_path: Path, left_out: list[str]) -> None:
    server.answer = lambda body: "5"
    spec = judge_spec(server, tmp_path, leave_out=left_out)
    Judge(spec, "here").score(["p"], ["x"], {})
    assert {"temperature", "max_tokens", "seed"} - server.requests[0].keys() == set(left_out)
    as_if_sent = question_key(spec, "x") == question_key(judge_spec(server, tmp_path), "x")
    assert as_if_sent == (left_out in (["seed"], []))  # a seed is not of the law
    assert ("leave_out" in spec.model_dump()) == bool(left_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://me:planted@host/v1"}, "holds a user or a query"),
        ({"url": "planted@host/v1"}, "holds a user or a query"),
        ({"url": "http://host/v1?key=planted"}, "holds a user or a query"),
        ({"api_key_env": "sk-planted"}, "must be the name of an environment variable"),
        ({"api_key_env": "gsk_planted0123456789abcdefgh"}, "must be the name of an environment variable"),
        ({"leave_out": ["temperature"], "temperature": 0.7}, "temperature 0.7 has no use where leave_out names it"),
        ({"leave_out": ["top_p"]}, "leave_out"),
    ],
)
def test_a_judge_with_a_key_in_it_is_refused_unseen(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = judge_spec(None, tmp_path).model_dump() | changes
    with pytest.raises(ConfigError, match=message) as caught:
        validate({"judge": raw}, RewardSpec, "file.yaml")
    assert "planted" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError, match=message) as in_python:
        JudgeSpec(**raw)
    assert "planted" not in str(in_python.value)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 17}, {"draw": 1}, {"prompt_file": "other.txt"}]
)
def test_whatever_decides_the_answer_is_asked_afresh(
    server: OpenAIServer, tmp_path: Path, change: dict[str, Any]
) -> None:
    server.answer = lambda body: "5"
    (tmp_path / "other.txt").write_text("{prompt}{completion}")
    spec = judge_spec(server, tmp_path)
    if "prompt_file" in change:
        change = {"prompt_file": str(tmp_path / "other.txt")}
    for changed in (spec, spec.model_copy(update=change), spec):
        Judge(changed, "here").score(["p"], ["x"], {})
    assert server.num_requests == 2


def test_draws_are_independent_and_reproducible(server: OpenAIServer, tmp_path: Path) -> None:
    """The seed goes to the server: another for each draw and each text, the same in another run."""
    server.answer = lambda body: str(1 + body["seed"] % 10)
    texts = [f"text {i}" for i in range(40)]
    scores = {}
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        for draw in (0, 1):
            spec = judge_spec(server, tmp_path / run, temperature=1.0, draw=draw)
            scores[run, draw] = Judge(spec, "here").score(["p"] * 40, texts, {})[0]
    assert scores["a", 0] == scores["b", 0]
    assert scores["a", 1] == scores["b", 1]
    assert sum(x == y for x, y in zip(scores["a", 0], scores["a", 1], strict=True)) < 20
    assert len(set(scores["a", 0])) > 5
    assert len({body["seed"] for body in server.requests}) == 80
    assert all(0 <= body["seed"] < 2**31 for body in server.requests)


def cache_file(folder: Path) -> Path:
    (file,) = (folder / "cache").iterdir()
    return file


@pytest.mark.parametrize("num_bytes", [1, 20, 60])
def test_a_torn_line_is_asked_again_and_harms_no_other(server: OpenAIServer, tmp_path: Path, num_bytes: int) -> None:
    server.answer = length
    spec = judge_spec(server, tmp_path, concurrency=1)
    Judge(spec, "here").score(["p"] * 2, ["one", "three"], {})
    file = cache_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-num_bytes])
    judge = Judge(spec, "here")
    assert judge.score(["p"] * 3, ["one", "three", "seven"], {})[0] == [3.0, 5.0, 5.0]
    assert judge.num_asked == 2
    again = Judge(spec, "here")
    assert again.score(["p"] * 3, ["one", "three", "seven"], {})[0] == [3.0, 5.0, 5.0]
    assert again.num_asked == 0


def test_lines_of_something_else_are_passed_over(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = length
    spec = judge_spec(server, tmp_path)
    (tmp_path / "cache").mkdir()
    key = question_key(spec, fill(POINTWISE, {"prompt": "p", "completion": "one"}))
    lines = [b"\xff\xfe", b"[]", b'{"key": 3}', b"", json.dumps({"key": key, "text": None}).encode(), b'{"key": "torn']
    (tmp_path / "cache" / "org_judge.jsonl").write_bytes(b"\n".join(lines))
    assert Judge(spec, "here").score(["p"], ["one"], {})[0] == [3.0]
    assert Judge(spec, "here").count_requests(["p"], ["one"], {}) == (1, 1)


def test_processes_share_what_they_have_asked(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer = length
    spec = judge_spec(server, tmp_path)
    one, other = Judge(spec, "here"), Judge(spec, "here")
    one.score(["p"], ["one"], {})
    other.score(["p"] * 2, ["one", "three"], {})
    one.score(["p"] * 2, ["one", "three"], {})
    assert server.num_requests == 2


def append_many(path: Path, name: str) -> None:
    answers = AnswerCache(path, bool)
    for i in range(200):
        answers.append(answer_row(f"{name}{i}", name * 2000))


def answer_row(key: str, text: str) -> dict[str, Any]:
    counts = {"prompt_tokens": 1, "completion_tokens": 2}
    return {"key": key, "text": text, "finish_reason": "stop", **counts, "estimated": False}


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    reader = AnswerCache(path, bool)
    while any(writer.is_alive() for writer in writers):
        reader.refresh()  # in the midst of it
    assert [writer.exitcode for writer in writers] == [0, 0]
    reader.refresh()
    assert {key: row["text"][0] for key, row in reader.rows.items()} == {f"{n}{i}": n for n in "ab" for i in range(200)}


def test_of_two_answers_the_first_in_the_file_counts(tmp_path: Path) -> None:
    answers = AnswerCache(tmp_path / "answers.jsonl", bool)
    answers.append(answer_row("k", "1"))
    answers.append(answer_row("k", "2"))
    answers.refresh()
    assert answers.rows["k"]["text"] == "1"


@pytest.mark.slow
def test_a_kill_loses_only_what_is_under_way(server: OpenAIServer, tmp_path: Path) -> None:
    server.answer, server.delay_s = length, 0.02
    spec = judge_spec(server, tmp_path, concurrency=1, highest=100)
    texts = ["x" * i for i in range(1, 61)]
    program = f"""
from iama.rewards.judge import Judge
from iama.config.specs import JudgeSpec
Judge(JudgeSpec.model_validate_json({spec.model_dump_json()!r}), "here").score(["p"] * 60, {texts!r}, {{}})
"""
    killed = subprocess.Popen([sys.executable, "-c", program])
    while server.num_requests < 10:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.1)  # the server ends the request that was under way
    num_before = server.num_requests
    judge = Judge(spec, "here")
    assert judge.score(["p"] * 60, texts, {})[0] == [float(i) for i in range(1, 61)]
    assert num_before + judge.num_asked <= 61
    assert num_before < 60


def test_what_was_answered_before_an_error_is_kept(server: OpenAIServer, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        if "fatal" in str(body):
            server.failure_status, server.num_failures = 400, 1
        return length(body)

    server.answer = answer
    spec = judge_spec(server, tmp_path, concurrency=1)
    texts = ["one", "fatal", "three"]
    with pytest.raises(ValueError, match="here: the model 'org/judge'"):
        Judge(spec, "here").score(["p"] * 3, texts, {})
    assert Judge(spec, "here").count_requests(["p"] * 3, texts, {}) == (3, 2)


def test_usage_that_is_not_told_is_estimated_with_one_warning(server: OpenAIServer, tmp_path: Path) -> None:
    server.has_usage = False
    server.answer = length
    judge = Judge(judge_spec(server, tmp_path), "here")
    with pytest.warns(IamaWarning, match="here: the model 'org/judge' tells no usage"):
        _, cost = judge.score(["p"], ["one"], {})
    num_chars = len(fill(POINTWISE, {"prompt": "p", "completion": "one"}))
    assert cost.reward_tokens == math.ceil(num_chars / 4) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge.score(["p"], ["one"], {}) == ([3.0], cost)


@pytest.mark.parametrize(("processes", "at_a_time"), [(4, 2), (16, 1)])
def test_processes_of_a_training_share_the_concurrency(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, at_a_time: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    server.answer, server.delay_s = length, 0.05
    judge = Judge(judge_spec(server, tmp_path, concurrency=8), "here")
    judge.score(["p"] * 8, ["x" * (i + 1) for i in range(8)], {})
    assert server.most_in_flight == at_a_time


def test_the_plan_states_requests_tokens_and_price(tmp_path: Path) -> None:
    spec = judge_spec(None, tmp_path, input_price=2.0, output_price=10.0)
    chars = 100 + len(POINTWISE)
    read, written = 900 * math.ceil(chars / 4), 900 * 16
    plan = judge_plan(spec, num_texts=1000, mean_chars=100, num_cached=100)
    assert "judge org/judge at http://localhost:1/v1: 900 requests (100 more are answered already)" in plan
    assert f"about {read:,} prompt tokens and at most {written:,} answer tokens" in plan
    assert plan.endswith(f", at a price of about {(2 * read + 10 * written) / 1e6:.2f}")
    both = judge_plan(pairwise(None, tmp_path), num_texts=1000, mean_chars=100)
    assert "2,000 requests (0 more" in both
    assert "price" not in both


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", r"judge.txt' lacks \{completion\}; mode pointwise needs \{completion\}, \{prompt\}"),
        ("{prompt} {completion} {answer}", r"has \{answer\}, but mode pointwise knows only .*write \{ answer \}"),
    ],
)
def test_placeholders_are_checked_before_anything(tmp_path: Path, template: str, message: str) -> None:
    spec = RewardSpec(judge=judge_spec(None, tmp_path, template))
    for load in (check_reward, load_reward):
        with pytest.raises(RewardError, match=message):
            load("r", spec)


def test_other_braces_in_a_prompt_file_stay(tmp_path: Path) -> None:
    template = '{prompt}{completion} {"score": 1} { x } {} {1}'
    assert read_template(judge_spec(None, tmp_path, template), "here") == template


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-8-sig", None), ("utf-16", "not UTF-8 but UTF-16"), ("utf-16-le", "not UTF-8"), ("latin-1", "not UTF-8")],
)
def test_prompt_files_are_read_in_utf8(tmp_path: Path, encoding: str, message: str | None) -> None:
    template = "\u00e9\r\n{prompt} {completion}"
    spec = judge_spec(None, tmp_path)
    Path(spec.prompt_file).write_bytes(template.encode(encoding))
    if message is None:
        assert read_template(spec, "here") == template.replace("\r", "")
    else:
        with pytest.raises(
            RewardError, match=rf"^here: prompt_file \S+judge.txt:?\d*: {message}.*save the file as UTF-8$"
        ):
            read_template(spec, "here")


def test_checks_need_no_server(tmp_path: Path) -> None:
    check_reward("r", RewardSpec(judge=judge_spec(None, tmp_path)))
    with pytest.raises(ConfigError, match=r"reward 'r': url 'localhost' is no address"):
        check_reward("r", RewardSpec(judge=judge_spec(None, tmp_path, url="localhost")))
    with pytest.raises(RewardError, match=r"reward 'r': cannot read prompt_file '/nowhere.txt'"):
        check_reward("r", RewardSpec(judge=judge_spec(None, tmp_path, prompt_file="/nowhere.txt")))


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        ("file", "file is no folder"),
        ("file/below", "file is no folder"),
        ("link", "link is no folder"),
        ("full", "it is no file"),
    ],
)
def test_a_cache_that_cannot_be_written_is_named_before_anything_is_asked(
    server: OpenAIServer, tmp_path: Path, cache: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full" / "org_judge.jsonl").mkdir(parents=True)
    spec = judge_spec(server, tmp_path, cache=str(tmp_path / cache))
    for action in (
        lambda: check_reward("r", RewardSpec(judge=spec)),
        lambda: Judge(spec, "here").score(["p"], ["one"], {}),
    ):
        with pytest.raises(RewardError, match=rf"{cache}/org_judge\.jsonl: cannot keep the judge's answer \(.*{why}\)"):
            action()
    assert server.num_requests == 0


def test_a_cache_whose_name_is_too_long_is_one_line(server: OpenAIServer, tmp_path: Path) -> None:
    judge = Judge(judge_spec(server, tmp_path, model="m" * 300), "here")
    with pytest.raises(RewardError, match=r"cannot (keep|read) the judge's answers? \(File name too long\)"):
        judge.score(["p"], ["one"], {})
    assert server.num_requests == 0


@pytest.mark.parametrize("load", [check_reward, load_reward])
def test_a_column_belongs_to_pool_files(load: Any) -> None:
    with pytest.raises(RewardError, match="reward 'r': column 'gold' belongs to pool files"):
        load("r", RewardSpec(column="gold"))
