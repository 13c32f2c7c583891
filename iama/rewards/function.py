"""TRL reward functions as rewards: `(prompts, completions, **columns) -> list[float | None]`, used unchanged."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from iama.config.specs import RewardScale, RewardSpec
from iama.cost import Cost
from iama.errors import RewardError
from iama.installation import find_file
from iama.prompts.render import Prompt
from iama.rewards.reward import Columns, Reward, Scorer, TrlCompletion

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]


class FunctionScorer(Scorer):
    """A reward function; a score of None counts as NaN, and what the function reads is not known."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores, at no cost."""
        scores = self._function(prompts=prompts, completions=completions, **columns)
        return [math.nan if score is None else float(score) for score in scores], Cost()


def load_function_scorer(spec: RewardSpec, source: str) -> FunctionScorer:
    """The function that a reward names."""
    assert spec.function is not None
    return FunctionScorer(load_function(spec.function, source))


def reward_from_function(
    function: RewardFunction, name: str, scale: RewardScale | None = None, *, missing_ok: bool = False
) -> Reward:
    """Wrap a TRL reward function; a score of None counts as NaN."""
    return Reward(name, FunctionScorer(function), scale, missing_ok=missing_ok)


def load_function(reference: str, source: str) -> Callable[..., Any]:
    """Import `path/to/file.py:name` or `package.module:name`; importing runs that file's code."""
    module_name, _, attribute = reference.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _module_from_file(find_file(module_name))
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise RewardError(
            f"{source}: cannot import function {reference!r} ({error}); "
            "write path/to/file.py:name or package.module:name"
        ) from error
    if not callable(function):
        raise RewardError(f"{source}: {reference!r} is not callable; name a function (prompts, completions, **columns)")
    loaded: Callable[..., Any] = function
    return loaded


def _module_from_file(path: Path) -> Any:
    """Import a file once per path, so that two functions of one file share its module."""
    name = f"iama_user_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
