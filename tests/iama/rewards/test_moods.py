"""Servers that are not quite OpenAI's: every mood of one table, met by every command that asks a server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inference.pools.file import read_pool
from tests.openai_server import MOODS, OpenAIServer

pytestmark = pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
Run = Callable[..., tuple[int, str, str]]

EMPTY = r"gave [12] empty answers of [12] \(finish reasons: {}\); {}"
THOUGHT = r"raise (--max-new-tokens|max_tokens) \(16\) or turn the model's reasoning off"
# How each mood ends: good (or good in the end), empty, or failed; and what must be said, in one line.
EXPECTED: dict[str, tuple[str, str]] = {
    "error in a 200, once": ("good", ""),
    "error in words in a 200, once": ("good", ""),
    "error of a choice, once": ("good", ""),
    "finish reason error, once": ("good", ""),
    "page of a gateway, once": ("good", ""),
    "pause asked for, once": ("good", ""),
    "pause until a date, once": ("good", ""),
    "content in parts": ("good", ""),
    "content with thoughts": ("good", ""),
    "usage null": ("good", ""),
    "usage in texts": ("good", ""),
    "fewer choices": ("good", ""),
    "no finish reason": ("good", ""),
    "a mark before": ("good", ""),
    "n refused": ("good", ""),
    "n refused within a 500": ("good", ""),
    "gpt-5": (
        "good",
        r"refuses max_tokens 16 \(HTTP 400: Unsupported.*\); from now on it is sent as max_completion_tokens",
    ),
    "seed refused by FastAPI": (
        "good",
        r"refuses seed \d+ \(HTTP 422: body.seed: Extra inputs .*\); from now on it is left out",
    ),
    "seed refused by a gateway": (
        "good",
        r"refuses seed \d+ \(HTTP 422: body.seed: Extra inputs .*\); from now on it is left out",
    ),
    "seed refused in a text": (
        "good",
        r"refuses seed \d+ \(HTTP 400: parameter seed is not.*\); from now on it is left out",
    ),
    "no temperature": ("good", r"refuses temperature \S+ \(.*\); from now on it is left out, and .*by the protocol 1"),
    "reasoning to the limit": ("empty", EMPTY.format(r"length [12]; [12] with reasoning alone", THOUGHT)),
    "reasoning alone": ("empty", EMPTY.format(r"stop [12]; [12] with reasoning alone", THOUGHT)),
    "content null": ("empty", EMPTY.format(r"stop [12]", "see what the server makes")),
    "message null": ("empty", EMPTY.format(r"content_filter [12]", "see what")),
    "tool calls": ("empty", EMPTY.format(r"tool_calls [12]", "see what")),
    "error in a 200": ("failed", r"error 429 within HTTP 200: Rate limit exceeded: free-models.*num.retries \(1\)"),
    "error in a 200 with nulls": ("failed", r"429 within HTTP 200: Provider returned error; Too Many Requests"),
    "error in a 200 without a code": ("failed", r"\(HTTP 200: no credits left\)"),
    "error as a message": ("failed", r"\(HTTP 200: Unauthorized route\)"),
    "error of a choice": ("failed", r"error 403 within HTTP 200: flagged\); put a key that may use the model into"),
    "finish reason error": ("failed", r"\(HTTP 200: an answer ended with finish reason error\)"),
    "finish reason of a failure": ("failed", r"ended with finish reason insufficient_system_resource\)"),
    "max_tokens bounded": (
        "failed",
        r"HTTP 422: body.max_tokens: ensure .*equal to 8\).*write a (--max-new-tokens|max_tokens) that it takes",
    ),
    "choices null": ("failed", r"no completion: it has no list of choices"),
    "no choices": ("failed", r"no completion: it holds no choices"),
    "choices of something else": ("failed", r"no completion: a choice has neither message nor text, but is 3"),
    "content a number": ("failed", r"no completion: a choice's content is 8 and no text"),
    "page": (
        "failed",
        r"the reply is not JSON: Please log in\); check the model's name and that the url ends where /chat",
    ),
    "page of a gateway": ("failed", r"\(HTTP 502: Bad gateway\); see the server's log"),
    "errors of FastAPI": ("failed", r"\(HTTP 400: body.user: Field required\)"),
    "error in a message": ("failed", r"\(HTTP 400: bad words\)"),
    "error as an object": ("failed", r"\(HTTP 400: too long\)"),
    "error in a text": ("failed", r"\(HTTP 500: out \[31m of memory\)"),
    "error without a word": ("failed", r"\(HTTP 500: without a word\)"),
    "key repeated": ("failed", r"Incorrect API key provided: \$OPENAI_API_KEY\); put the key into .* OPENAI_API_KEY"),
    "no such model": ("failed", r"does not exist\); the server has no model of that name, but 'a', 'b'"),
    "a long pause": ("failed", r"daily limit; it asks for a pause of 86400 s"),
    "moved": ("failed", r"it sends on to https://example.org/v1/chat/completions\); write the url"),
    "dripping": ("failed", r"timed out after 0\.\d+ s\); is the server running\? else raise (--timeout-s|timeout_s)"),
}
# Those that are asked again.
PASSING = {name for name in MOODS if name.startswith(("error in a 200", "page of a", "dripping", "finish reason"))}
PASSING |= {"error in a text", "error without a word"}
PASSING -= {"error in a 200 without a code"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret")
    with OpenAIServer(lambda body: "8") as server:
        server.models = ["a", "b"]
        yield server


def pool_command(run: Run, server: OpenAIServer, folder: Path, *more: object) -> tuple[int, str, str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "3 + 5?"}]}) + "\n")
    asked = ("--engine", "openai", "--url", server.url, "--model", "judge", "--n", 2, "--max-new-tokens", 16)
    return run("pool", folder / "out.jsonl", "--prompts", prompts, *asked, *more)


def score_command(
    run: Run, server: OpenAIServer, folder: Path, timeout_s: float, num_retries: int
) -> tuple[int, str, str]:
    pool = folder / "pool.jsonl"
    if not pool.exists():
        lines = [{"iama_pool": 1, "policy": {"name": "p"}}, *({"prompt": "3 + 5?", "text": text} for text in "ab")]
        pool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judge.txt").write_text("{prompt} {completion}")
    judge = {"url": server.url, "model": "judge", "prompt_file": str(folder / "judge.txt"), "concurrency": 1}
    judge |= {"cache": str(folder / "cache"), "timeout_s": timeout_s, "num_retries": num_retries}
    (folder / "judge.yaml").write_text(json.dumps({"judge": judge}))
    return run("score", pool, "--spec", folder / "judge.yaml", "--column", "c")


def is_told(pattern: str, err: str) -> bool:
    """Whether a single line says it, and none is of a traceback."""
    lines = err.splitlines()
    return any(re.search(pattern, line) for line in lines) and not any("Traceback" in line for line in lines)


def test_every_mood_has_its_end() -> None:
    assert MOODS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("mood", MOODS)
def test_iama_pool_meets_every_mood(run: Run, server: OpenAIServer, tmp_path: Path, mood: str) -> None:
    server.mood = MOODS[mood]
    (end, words), timeout_s = EXPECTED[mood], 0.3 if mood == "dripping" else 30
    code, _, err = pool_command(run, server, tmp_path, "--timeout-s", timeout_s, "--num-retries", 1)
    assert is_told(words, err), err
    assert "sk-planted" not in err
    if end == "failed":
        assert code == 2
        assert err.splitlines()[-1].startswith("error: --engine openai: the model 'judge' at")
        is_asked_twice = mood in PASSING or re.search(
            "HTTP 4(00|22)", err
        )  # a single answer, too, is asked for in the latter case
        assert server.num_requests == (2 if is_asked_twice else 1)
        return
    assert code == 0, err
    texts = read_pool(tmp_path / "out.jsonl").texts
    assert texts == [["8", "8"]] if end == "good" else texts == [["", ""]]
    assert ("warning" in err) == bool(words)


@pytest.mark.parametrize("mood", MOODS)
def test_a_judge_meets_every_mood_and_can_be_asked_again(
    run: Run, server: OpenAIServer, tmp_path: Path, mood: str
) -> None:
    server.mood = MOODS[mood]
    (end, words), timeout_s = EXPECTED[mood], 0.3 if mood == "dripping" else 30
    code, _, err = score_command(run, server, tmp_path, timeout_s, num_retries=1)
    assert is_told(words, err), err
    assert "sk-planted" not in err
    if end == "failed":
        assert err.splitlines()[-1].startswith("error: reward 'c': the model 'judge' at")
        assert server.num_requests == (2 if mood in PASSING else 1)
    if end != "good":
        assert code == 2
        server.mood = None
        code, _, err = score_command(run, server, tmp_path, 30, num_retries=1)
    assert code == 0, err
    scores = [sample.scores["c"] for prompt in read_pool(tmp_path / "pool.jsonl").prompts for sample in prompt.samples]
    assert scores == [8.0, 8.0]
