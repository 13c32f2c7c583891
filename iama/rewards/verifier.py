"""Verifiers: rewards that check a final answer. `math` compares mathematical answers through math-verify."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import IamaWarning, RewardError
from iama.prompts.render import Prompt, completion_text, prompt_name
from iama.rewards.math_answers import in_full, math_verify, verify
from iama.rewards.reward import Columns, Scorer, TrlCompletion

_LATEX = ("$", "\\(", "\\[", "\\boxed")  # what marks mathematics in a text
_PLAIN = re.compile(r"\$-?\d{1,15}(\.\d{1,15})?\$")  # surely read, in no time
_IN_FULL = re.compile(r"-?(\d+(\.\d+)?[eE][+-]\d{2,3}|\d+ \d+/\d+)")  # as programs write numbers; `2e-7` may be Euler's


class MathVerifier(Scorer):
    """1 where the final answer of a completion equals that in `answer_column`, else 0.

    A completion without a readable answer is wrong, not missing. Reading and comparing have five seconds each (an
    answer may be 9^9^9^9); what takes longer counts as wrong. With `missing_ok`, a right answer that cannot be read
    gives no score (NaN) and one warning, else it is refused.
    """

    def __init__(self, answer_column: str, source: str) -> None:
        check_math_verify(source)
        self.answer_column, self.source = answer_column, source
        self.missing_ok = False
        self._has_warned = False

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores, at no cost; raises `RewardError` for a right answer that is missing or cannot be read (see above)."""
        if self.answer_column not in columns:
            raise RewardError(
                f"{self.source}: the prompts have no column {self.answer_column!r} (answer_column); "
                f"they have {sorted(columns)}"
            )
        pairs = [
            (final_answer(right), completion_text(completion))
            for right, completion in zip(columns[self.answer_column], completions, strict=True)
        ]
        scores = _scores(pairs)
        for prompt, right, score in zip(prompts, columns[self.answer_column], scores, strict=True):
            if score is None and not (self.missing_ok and self._has_warned):
                message = (
                    f"{self.source}: column {self.answer_column!r} of the prompt {prompt_name(prompt)} is "
                    f"{right!r}, in which math-verify finds no answer; write a number or LaTeX (words as "
                    "\\text{yes})"
                )
                if not self.missing_ok:
                    raise RewardError(message)
                self._has_warned = True
                warnings.warn(f"{message} (completions of such prompts have no score)", IamaWarning, stacklevel=2)
        return [math.nan if score is None else score for score in scores], Cost()


def load_verifier(spec: RewardSpec, source: str) -> MathVerifier:
    """The verifier that a reward names."""
    return MathVerifier(spec.answer_column, source)


def check_verifier(_spec: RewardSpec, source: str, _prompts: Sequence[Prompt]) -> None:
    """Raise `RewardError` where math-verify is not installed."""
    check_math_verify(source)


def check_math_verify(source: str) -> None:
    """Raise `RewardError` where math-verify is not installed."""
    try:
        math_verify()
    except ImportError as error:
        raise RewardError(f"{source}: needs the math-verify package; pip install 'iama[math]'") from error


def unreadable(rights: Sequence[Any]) -> list[int]:
    """Which right answers, by index, `MathVerifier` cannot read."""
    answers = [final_answer(right) for right in rights]
    doubtful = [answer for answer in dict.fromkeys(answers) if not _PLAIN.fullmatch(answer)]
    scores = dict(zip(doubtful, _scores([(answer, "") for answer in doubtful]), strict=True))
    return [i for i, answer in enumerate(answers) if answer in scores and scores[answer] is None]


def final_answer(right: Any) -> str:
    """A right answer as math-verify reads it: in dollars, of GSM8K's solutions what follows `####`, numbers in full."""
    if right is None or isinstance(right, bool | list | tuple | dict):
        right = ""
    text = str(right).rpartition("####")[2].strip()
    if _IN_FULL.fullmatch(text):
        text = in_full(text)
    return text if any(mark in text for mark in _LATEX) else f"${text}$"


def _scores(pairs: list[tuple[str, str]]) -> list[float | None]:
    """1 or 0 for each (right answer, completion), None where the right answer cannot be read.

    math-verify's limits on time are signals, which only a main thread may set: elsewhere a process of our own does it.
    """
    if threading.current_thread() is threading.main_thread():
        return [verify(right, text) for right, text in pairs]
    command = [sys.executable, "-m", "iama.rewards.math_answers"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(  # noqa: S603
        command, input=json.dumps(pairs), stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    scores: list[float | None] = json.loads(done.stdout)
    return scores
