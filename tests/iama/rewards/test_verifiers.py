"""The verifier of mathematical answers: what counts as right, as wrong, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iama.config.specs import RewardSpec
from iama.errors import RewardError
from iama.rewards.load import check_reward, load_reward
from iama.rewards.reward import Reward


@pytest.fixture(scope="module")
def reward() -> Reward:
    return load_reward("r", RewardSpec(verifier="math"))


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ("42", "So the answer is 42."),
        (42, "I get $6 \\cdot 7$, hence \\boxed{42}"),
        (0.5, "The final answer is $\\frac{1}{2}$."),
        ("\\frac{1}{2}", "\\boxed{0.5}"),
        ("$\\frac{1}{2}$", "it is 1/2"),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
        ("x^2+1", "$1 + x^2$"),
        ("(1, 2]", "\\boxed{(1,2]}"),
        ("1,234", "The answer is 1234"),
        ("50\\%", "\\boxed{50\\%}"),
        ("Natalia sold 48/2 = 24 clips in May.\n#### 72", "The answer is \\boxed{72}."),
        (1e-07, "The answer is 0.0000001"),
        (1e-07, "\\boxed{1e-7}"),
        (-2.5e22, "The answer is -25000000000000000000000"),
        ("1e-07", "The answer is 0.0000001"),  # of a CSV file
        ("2e-7", "$2e - 7$"),  # Euler's number
        ("3 1/2", "The answer is 3.5"),
        ("-3 1/2", "$-3\\frac{1}{2}$"),
        ("7/2", "The answer is 3 1/2"),
        ("B", "\\boxed{B}"),
        ("\\text{yes}", "\\boxed{yes}"),
        ("5 apples", "The answer is 5"),
    ],
)
def test_right_answers(reward: Reward, right: object, text: str) -> None:
    assert reward(["p"], [text], answer=[right]) == [1.0]


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ("42", "So the answer is 41."),
        ("42", "42 is what I thought at first, but it is \\boxed{43}"),
        ("\\frac{1}{2}", "The answer is 2"),
        ("(1, 2]", "\\boxed{2}"),
        ("42", "I do not know."),
        ("42", ""),
        ("42", "\\boxed{"),
        ("Natalia sold 48/2 = 24 clips in May.\n#### 72", "The answer is \\boxed{24}."),
    ],
)
def test_wrong_and_missing_answers_are_zero(reward: Reward, right: object, text: str) -> None:
    assert reward(["p"], [text], answer=[right]) == [0.0]


@settings(max_examples=30)
@given(a=st.integers(-99, 99), b=st.integers(1, 30), c=st.integers(-99, 99), d=st.integers(1, 30))
def test_fractions_are_equal_as_numbers_are(a: int, b: int, c: int, d: int) -> None:
    reward = load_reward("r", RewardSpec(verifier="math", answer_column="gold"))
    scores = reward(["p"], [f"So we have $\\boxed{{\\frac{{{c}}}{{{d}}}}}$."], gold=[f"{a}/{b}"])
    assert scores == [float(a * d == b * c)]


def test_costs_no_tokens_and_reads_messages(reward: Reward) -> None:
    scores, cost = reward.score([[{"role": "user", "content": "q"}], "q"], ["is 4", "is 5"], {"answer": ["4", "4"]})
    assert scores == [1.0, 0.0]
    assert (cost.reward_calls, cost.reward_tokens) == (2, 0)


@pytest.mark.slow
def test_what_takes_too_long_is_wrong_and_silent(reward: Reward, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert reward(["p"], ["it is \\boxed{9^{9^{9^9}}}"], answer=["42"]) == [0.0]
    assert time.monotonic() - start < 100
    assert caplog.records == []


@pytest.mark.slow
def test_another_thread_gets_the_same(reward: Reward) -> None:
    texts = ["\\boxed{\\sqrt{12}}", "no", "\\boxed{9^{9^{9^9}}}"]
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(reward(["p"] * 3, texts, answer=["2\\sqrt{3}"] * 3)))
    thread.start()
    thread.join(60)
    assert found == [[1.0, 0.0, 0.0]]


def test_the_other_process_does_without_torch() -> None:
    """It is started for every batch of answers, and torch alone takes seconds to import."""
    program = (
        "import runpy, sys; runpy.run_module('iama.rewards.math_answers', run_name='__main__'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input='[["4", "is 4"]]', capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[1.0]"), done.stderr


@pytest.mark.parametrize(
    "right", ["", "???", None, "####", True, ["4"], {"a": 1}, "yes", "see figure", "72 dollars", "sin(x)"]
)
def test_a_right_answer_that_cannot_be_read_is_refused(reward: Reward, right: object) -> None:
    with pytest.raises(RewardError, match=r"reward 'r': column 'answer' of the prompt 'second one' is .*math-verify"):
        reward(["first one", "second one"], ["1", "1"], answer=["1", right])


def test_the_column_must_be_there(reward: Reward) -> None:
    with pytest.raises(RewardError, match=r"reward 'r': the prompts have no column 'answer'.*they have \['solution'\]"):
        reward(["p"], ["1"], solution=["1"])


@pytest.mark.parametrize("load", [check_reward, load_reward])
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RewardError, match=r"^reward 'r': needs the math-verify package; pip install 'iama\[math\]'$"):
        load("r", RewardSpec(verifier="math"))
