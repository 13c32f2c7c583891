"""TRL reward functions as rewards: `(prompts, completions, **columns) -> list[float | None]`, used unchanged.

Whatever form TRL takes works: async functions and objects, partials, tensors, arrays, generators. A function gets what
it names, or everything where it has `**columns`. It must return one number, or None, for each completion.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from iama.config.specs import RewardScale, RewardSpec
from iama.cost import Cost
from iama.errors import RewardError
from iama.installation import find_file
from iama.prompts.render import Prompt
from iama.rewards.reward import Columns, Reward, Scorer, TrlCompletion
from iama.rewards.users_code import IN_TRAINING, LOGGERS, as_scores, owned, users_code

RewardFunction: TypeAlias = Callable[..., Any]

ARGUMENTS = ("prompts", "completions")
"""What a function gets by these names everywhere; columns of a pool or of prompts come beside them."""


class FunctionScorer(Scorer):
    """A reward function; a score of None counts as NaN, and what the function reads is not known."""

    def __init__(self, function: RewardFunction, source: str = "reward", reference: str | None = None) -> None:
        self._function = function
        self._source = source
        self._reference = reference or str(getattr(function, "__name__", type(function).__name__))
        self._parameters = _parameters(function)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores, at no cost; raises `RewardError` where the function fails or returns something else."""
        check_arguments(self._parameters, self._source, self._reference, columns)
        given: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
        if self._parameters is not None:
            given |= {name: _log_nothing for name in LOGGERS if name in self._parameters and name not in given}
            if not any(p.kind is p.VAR_KEYWORD for p in self._parameters.values()):
                given = {name: value for name, value in given.items() if name in self._parameters}
        what = f"{self._source}: {self._reference}"
        with users_code(f"{what} failed", given):
            returned = self._function(**owned(given))
            if inspect.isawaitable(returned):
                returned = _result_of(returned)
            return as_scores(returned, len(prompts), what), Cost()


def load_function_scorer(spec: RewardSpec, source: str) -> FunctionScorer:
    """The function that a reward names."""
    assert spec.function is not None
    return FunctionScorer(_load_reward_function(spec.function, source), source, spec.function)


def reward_from_function(
    function: RewardFunction, name: str, scale: RewardScale | None = None, *, missing_ok: bool = False
) -> Reward:
    """Wrap a TRL reward function; a score of None counts as NaN."""
    return Reward(name, FunctionScorer(function, f"reward {name!r}"), scale, missing_ok=missing_ok)


# What a function is given. ------------------------------------------------------------------------------


def check_function(spec: RewardSpec, source: str, columns: Set[str]) -> None:
    """Raise `RewardError` for a function that cannot be called with these columns of the prompts."""
    assert spec.function is not None
    function = _load_reward_function(spec.function, source)
    check_arguments(_parameters(function), source, spec.function, columns)


def check_arguments(
    parameters: Mapping[str, inspect.Parameter] | None, source: str, reference: str, columns: Iterable[str]
) -> None:
    """Raise `RewardError` where a function needs what is not there, or a column has the name of an argument.

    `columns` are the names beside prompts and completions; in training those of TRL are among them.
    """
    there = set(columns)
    for name in ARGUMENTS:
        if name in there:
            raise RewardError(
                f"{source}: a column of the prompts is named {name!r}, as what every reward function gets; rename it, "
                f"e.g. with prompts.columns: {{my_{name}: {name}}}"
            )
    for parameter in (parameters or {}).values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RewardError(
                f"{source}: {reference} takes {parameter.name!r} by position only, and TRL hands everything over by "
                "name; leave out the `/`"
            )
        if parameter.default is not parameter.empty or parameter.name in {*there, *ARGUMENTS, *LOGGERS}:
            continue
        if parameter.name in IN_TRAINING:
            raise RewardError(
                f"{source}: {reference} needs {parameter.name!r}, which only training has; give it a default "
                f"({parameter.name}=None) and let it do without where texts are scored"
            )
        others = sorted(there.difference(IN_TRAINING, LOGGERS))
        raise RewardError(
            f"{source}: {reference!r} needs the column {parameter.name!r}, but the prompts have "
            f"{others or 'none'}; add it (a pool file has 'columns'), or rename one with prompts.columns"
        )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function by name; None of a callable that does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of TRL's loggers where there is nothing to log to."""


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all async functions, in a thread of its own: what they keep (clients, locks) belongs to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="iama-rewards", daemon=True).start()
    return loop


def _result_of(awaitable: Awaitable[Any]) -> Any:
    """What an async function returns, as TRL awaits it."""

    async def outcome() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except BaseException as error:
            return None, error

    result, error = asyncio.run_coroutine_threadsafe(outcome(), _event_loop()).result()
    if error is not None:
        raise error
    return result


def load_function(reference: str, source: str, kind: str = "function", name: str = "name") -> Callable[..., Any]:
    """Import `path/to/file.py:name` or `package.module:name`; importing runs that file's code.

    Errors call it a `kind`, with `name` in their example.
    """
    module_name, _, attribute = reference.rpartition(":")
    cannot = f"{source}: cannot import {kind} {reference!r}"
    hint = f"write path/to/file.py:{name} or package.module:{name}"
    file = find_file(module_name) if module_name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise RewardError(f"{cannot} (no such file: {file}); {hint}")
    with users_code(cannot):
        module = importlib.import_module(module_name) if file is None else _module_from_file(file, source)
    if not hasattr(module, attribute):
        raise RewardError(f"{cannot} ({module_name} has no attribute {attribute!r}); {hint}")
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"{source}: {reference!r} is not callable; name a function (prompts, completions, **columns)")
    loaded: Callable[..., Any] = function
    return loaded


def _load_reward_function(reference: str, source: str) -> RewardFunction:
    """`load_function`, but for classes and torch modules, which can be called and are no reward functions."""
    function = load_function(reference, source)
    if inspect.isclass(function):
        raise RewardError(
            f"{source}: {reference!r} is a class; make an object of it in that file (scorer = {function.__name__}()) "
            "and name that"
        )
    if hasattr(function, "state_dict") and hasattr(function, "forward"):
        raise RewardError(f"{source}: {reference!r} is a torch module; give the folder of its weights as `model:`")
    return function


def _module_from_file(path: Path, source: str) -> Any:
    """Import a file once per path, so that two functions of one file share its module; it may import its neighbours."""
    name = f"iama_user_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        _refuse_shadowed(path.resolve(), source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        folder = str(path.resolve().parent)
        sys.path.insert(0, folder)  # as for a program of its own
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)  # what it imports later; installed packages come first, or ours might be hidden
    return sys.modules[name]


def _refuse_shadowed(path: Path, source: str) -> None:
    """Raise `RewardError` where a file imports a neighbour whose name another module has already taken."""
    for name in _imported(path):
        beside = next(
            (p for p in (path.parent / f"{name}.py", path.parent / name / "__init__.py") if p.is_file()), None
        )
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if (
            beside is not None
            and name in sys.modules
            and (loaded is None or Path(loaded).resolve() != beside.resolve())
        ):
            raise RewardError(
                f"{source}: {path} imports {name!r}, which {beside} is, but another module of that name is loaded "
                f"({loaded or 'built in'}); rename that file"
            )


def _imported(path: Path) -> set[str]:
    """Names of the modules that a file imports; none of a file that is no Python, as importing it will say."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}
