"""From a configuration to a reward: a dict from each kind's name to how it is checked and loaded.

A new kind is a `Scorer`. A configuration asks for it as `kind: path/to/file.py:Class(SETTING=VALUE)`, or by the name
that it has in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from iama.config.specs import RewardSpec
from iama.errors import RewardError
from iama.prompts.render import Prompt
from iama.rewards.classifier import ClassifierFiles, check_classifier, load_classifier, load_weights
from iama.rewards.ensemble import Ensemble, check_scales, member_name
from iama.rewards.function import load_function, load_function_scorer
from iama.rewards.judge import check_judge, load_judge
from iama.rewards.reward import Reward, Scorer
from iama.rewards.verifier import check_verifier, load_verifier


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


KINDS = {
    "model": Kind(load_classifier, check_classifier),
    "function": Kind(load_function_scorer),
    "judge": Kind(load_judge, check_judge, may_be_missing=True),
    "verifier": Kind(load_verifier, check_verifier),
}
"""Kinds of rewards by name. An ensemble, which is made of these, and a column, which scores nothing, are none."""


def load_reward(name: str, spec: RewardSpec, *, missing_ok: bool = False, files: Files | None = None) -> Reward:
    """Load a reward; raises `RewardError` or `ModelError` with what to mend.

    A judge's score may always be missing: only whoever uses it can say what an unparsable answer means there. `files`
    are what `check_reward` read, which is not read again.
    """
    source = f"reward {name!r}"
    may_be_missing = missing_ok or any(_kind(part, source).may_be_missing for part in spec.parts)
    if spec.ensemble is None:
        return Reward(name, _scorer(spec, source, files or {}), spec.scale, missing_ok=may_be_missing)
    check_scales(spec.ensemble, source)
    members = [
        load_reward(member_name(name, number), member, missing_ok=missing_ok, files=files)
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


def _scorer(spec: RewardSpec, source: str, files: Files) -> Scorer:
    kind = _kind(spec, source)
    return load_weights(files[spec], spec, source) if spec in files else kind.load(spec, source)


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
            f"{source}: kind {spec.kind!r} is not known; write path/to/file.py:Class, or one of {', '.join(KINDS)}"
        )
    return KINDS[spec.kind_name]


def _load_class(spec: RewardSpec, source: str) -> Scorer:
    """A scorer of the user's own file, made with its settings."""
    make = load_function(spec.kind_name, source)
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
