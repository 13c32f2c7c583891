"""From a configuration to a reward: a dict from each kind's name to how it is checked and loaded.

A new kind is a `Scorer`. A configuration asks for it as `kind: path/to/file.py:Class(SETTING=VALUE)`, or by the name
that it has in `KINDS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from iama.config.specs import RewardSpec
from iama.errors import IamaWarning, RewardError
from iama.nearest import meant
from iama.prompts.data import PromptRows
from iama.prompts.render import Prompt, prompt_name
from iama.rewards.classifier import (
    Classifier,
    ClassifierFiles,
    LastRead,
    check_classifier,
    load_weights,
    read_files,
    sharing,
)
from iama.rewards.ensemble import Ensemble, check_scales, member_name
from iama.rewards.function import check_function, load_function, load_function_scorer
from iama.rewards.judge import check_judge, load_judge
from iama.rewards.reward import Reward, Scorer
from iama.rewards.users_code import IN_TRAINING, LOGGERS, users_code
from iama.rewards.verifier import MathVerifier, check_verifier, load_verifier, unreadable
from iama.rewards.vllm_classifier import check_vllm_classifier, load_vllm_classifier


@dataclass(frozen=True)
class Kind:
    """How a kind of reward is made of its specification; both functions take what names the reward in errors.

    `check` makes the checks that need no weights; without it, loading is the check. It also gets the prompts, which
    must all suit the reward; of a model it returns what it has read. `may_be_missing` says that only whoever uses a
    score can say what its absence means.
    """

    load: Callable[[RewardSpec, str], Scorer]
    check: Callable[[RewardSpec, str, Sequence[Prompt]], ClassifierFiles | None] | None = None
    may_be_missing: bool = False


Files: TypeAlias = Mapping[RewardSpec, ClassifierFiles]
"""What was read of the reward models, an ensemble's members by themselves."""
Shared: TypeAlias = dict[tuple[str, str, str], Classifier]
"""Models by path, dtype and device, whose heads may be several rewards."""


def _load_model(spec: RewardSpec, source: str) -> Scorer:
    return _model_of(read_files(spec, source), spec, source)


def _model_of(files: ClassifierFiles, spec: RewardSpec, source: str, shared: Shared | None = None) -> Scorer:
    """The model whose files were read, on its engine; of one that is `shared` already, another head."""
    if spec.engine == "vllm":
        check_vllm_classifier(spec, files, source)
        return load_vllm_classifier(files, spec, source)
    if shared is None:
        return load_weights(files, spec, source)
    key = (str(spec.model), spec.dtype, spec.device)
    if key not in shared:
        shared[key] = load_weights(files, spec, source, LastRead())
    return sharing(shared[key], files.head, spec, source)


def _check_model(spec: RewardSpec, source: str, prompts: Sequence[Prompt]) -> ClassifierFiles:
    files = check_classifier(spec, source, prompts)
    if spec.engine == "vllm":
        check_vllm_classifier(spec, files, source)
    return files


KINDS = {
    "model": Kind(_load_model, _check_model),
    "function": Kind(load_function_scorer),
    "judge": Kind(load_judge, check_judge, may_be_missing=True),
    "verifier": Kind(load_verifier, check_verifier),
}
"""Kinds of rewards by name. An ensemble, which is made of these, and a column, which scores nothing, are none."""


def load_reward(
    name: str,
    spec: RewardSpec,
    *,
    missing_ok: bool = False,
    files: Files | None = None,
    shared: Shared | None = None,
) -> Reward:
    """Load a reward; raises `RewardError` or `ModelError` with what to mend.

    A judge's score may always be missing: only whoever uses it can say what an unparsable answer means there. `files`
    are what `check_reward` read, which is not read again. Rewards that score the same texts one after the other may
    share their models: give all of them the same dict, empty at first.
    """
    source = f"reward {name!r}"
    may_be_missing = missing_ok or any(_kind(part, source).may_be_missing for part in spec.parts)
    if spec.ensemble is None:
        scorer = _scorer(spec, source, files or {}, shared)
        if isinstance(scorer, MathVerifier):
            scorer.missing_ok = missing_ok
        return Reward(name, scorer, spec.scale, missing_ok=may_be_missing)
    check_scales(spec.ensemble, source)
    members = [
        load_reward(member_name(name, number), member, missing_ok=missing_ok, files=files, shared=shared)
        for number, member in enumerate(spec.ensemble.members)
    ]
    return Reward(name, Ensemble(spec.ensemble, members), spec.scale, missing_ok=may_be_missing)


def check_reward(name: str, spec: RewardSpec, prompts: Sequence[Prompt] = ()) -> Files:
    """Make the checks of `load_reward` that need no weights in memory; all `prompts` must suit the reward.

    Returns what was read of its models, for `load_reward`.
    """
    source = f"reward {name!r}"
    if spec.ensemble is not None:
        check_scales(spec.ensemble, source)
        files: dict[RewardSpec, ClassifierFiles] = {}
        for number, member in enumerate(spec.ensemble.members):
            files |= check_reward(member_name(name, number), member, prompts)
        return files
    kind = _kind(spec, source)
    if kind.check is None:
        kind.load(spec, source)
        return {}
    read = kind.check(spec, source, prompts)
    return {} if read is None else {spec: read}


def check_columns(
    name: str, spec: RewardSpec, rows: PromptRows, *, in_training: bool = False, missing_ok: bool = False
) -> None:
    """Raise `RewardError` where a row of the prompts lacks what a reward reads, or holds what it cannot read.

    With `missing_ok`, right answers that cannot be read are warned of: their completions will have no score.
    """
    source = f"reward {name!r}"
    shapes = dict.fromkeys(frozenset(row) - {"prompt"} for row in rows)
    for part in spec.parts:
        if part.function is not None:
            for shape in shapes:
                _check_function(part, source, shape, in_training)
        elif part.verifier is not None:
            _check_has(part.answer_column, "answer_column", source, rows)
            _check_answers(part.answer_column, source, rows, missing_ok)
        elif part.judge is not None and part.judge.baseline_column is not None:
            _check_has(part.judge.baseline_column, "baseline_column", source, rows)


def _check_function(spec: RewardSpec, source: str, columns: frozenset[str], in_training: bool) -> None:
    """A function must take what it will be given; one that only training can call is warned of."""
    if not in_training:
        check_function(spec, source, columns)
        return
    for name in (*IN_TRAINING, *LOGGERS):
        if name in columns:
            raise RewardError(
                f"{source}: a column of the prompts is named {name!r}, as what TRL hands to reward functions; rename "
                f"it, e.g. with prompts.columns: {{my_{name}: {name}}}"
            )
    check_function(spec, source, columns.union(IN_TRAINING, LOGGERS))
    try:
        check_function(spec, source, columns)
    except RewardError as error:
        warnings.warn(f"{error}: generation and evaluation cannot use it", IamaWarning, stacklevel=2)


def _check_has(column: str, setting: str, source: str, rows: PromptRows) -> None:
    first = next((i for i, row in enumerate(rows) if column not in row), None)
    if first is not None:
        there = sorted(set(rows[first]) - {"prompt"})
        raise RewardError(
            f"{source}: prompt {first + 1} has no column {column!r} ({setting}), only {there}; name one that "
            "there is, or rename yours with prompts.columns"
        )


def _check_answers(column: str, source: str, rows: PromptRows, missing_ok: bool) -> None:
    bad = unreadable([row[column] for row in rows])
    if not bad:
        return
    numbers = ", ".join(str(i + 1) for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
    message = (
        f"{source}: math-verify finds no answer in column {column!r} of {len(bad)} of {len(rows)} prompts ({numbers}), "
        f"e.g. {rows[bad[0]][column]!r} of {prompt_name(rows[bad[0]]['prompt'])}"
    )
    if not missing_ok:
        raise RewardError(f"{message}; write a number or LaTeX (words as \\text{{yes}}), or leave these prompts out")
    warnings.warn(f"{message}; their completions have no score", IamaWarning, stacklevel=2)


def _scorer(spec: RewardSpec, source: str, files: Files, shared: Shared | None) -> Scorer:
    kind = _kind(spec, source)
    return _model_of(files[spec], spec, source, shared) if spec in files else kind.load(spec, source)


def _kind(spec: RewardSpec, source: str) -> Kind:
    if spec.column is not None:
        raise RewardError(
            f"{source}: column {spec.column!r} belongs to pool files, whose samples have scores already; here a reward "
            "must score texts: give a model, function, judge, verifier or ensemble"
        )
    if ":" in spec.kind_name:
        return Kind(_load_class)
    if spec.kind_name not in KINDS:
        raise RewardError(
            f"{source}: kind {spec.kind!r} is not known; {meant(str(spec.kind), KINDS)}"
            f"write path/to/file.py:Class, or one of {', '.join(KINDS)}"
        )
    return KINDS[spec.kind_name]


def _load_class(spec: RewardSpec, source: str) -> Scorer:
    """A scorer of the user's own file, made with its settings."""
    make = load_function(spec.kind_name, source)
    with users_code(f"{source}: kind {spec.kind!r}"):
        try:
            scorer = make(**spec.kind_settings)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{source}: kind {spec.kind!r}: {error}") from error
    if not isinstance(scorer, Scorer):
        raise RewardError(
            f"{source}: kind {spec.kind!r} gives a {type(scorer).__name__}, which is no scorer; write a class that "
            "derives from iama.rewards.reward.Scorer"
        )
    return scorer
