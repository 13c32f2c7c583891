"""From a configuration to a reward: a dict from each kind's name to how it is checked and loaded.

A new kind is a `Scorer` and an entry of `KINDS`. A configuration asks for it as `kind: NAME(SETTING=VALUE)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iama.config.specs import RewardSpec
from iama.errors import RewardError
from iama.prompts.render import Prompt
from iama.rewards.classifier import check_classifier, load_classifier
from iama.rewards.ensemble import Ensemble, check_scales, member_name
from iama.rewards.function import load_function_scorer
from iama.rewards.judge import check_judge, load_judge
from iama.rewards.reward import Reward, Scorer
from iama.rewards.verifier import check_verifier, load_verifier


@dataclass(frozen=True)
class Kind:
    """How a kind of reward is made of its specification; both functions take what names the reward in errors.

    `check` makes the checks that need no weights; without it, loading is the check. It also gets a prompt, which must
    suit the reward, or None. `may_be_missing` says that only whoever uses a score can say what its absence means.
    """

    load: Callable[[RewardSpec, str], Scorer]
    check: Callable[[RewardSpec, str, Prompt | None], None] | None = None
    may_be_missing: bool = False


KINDS = {
    "model": Kind(load_classifier, check_classifier),
    "function": Kind(load_function_scorer),
    "judge": Kind(load_judge, check_judge, may_be_missing=True),
    "verifier": Kind(load_verifier, check_verifier),
}
"""Kinds of rewards by name. An ensemble, which is made of these, and a column, which scores nothing, are none."""


def load_reward(name: str, spec: RewardSpec, *, missing_ok: bool = False) -> Reward:
    """Load a reward; raises `RewardError` or `ModelError` with what to mend.

    A judge's score may always be missing: only whoever uses it can say what an unparsable answer means there.
    """
    source = f"reward {name!r}"
    may_be_missing = missing_ok or any(_kind(part, source).may_be_missing for part in spec.parts)
    if spec.ensemble is None:
        return Reward(name, _kind(spec, source).load(spec, source), spec.scale, missing_ok=may_be_missing)
    check_scales(spec.ensemble, source)
    members = [
        load_reward(member_name(name, number), member, missing_ok=missing_ok)
        for number, member in enumerate(spec.ensemble.members)
    ]
    return Reward(name, Ensemble(spec.ensemble, members), spec.scale, missing_ok=may_be_missing)


def check_reward(name: str, spec: RewardSpec, prompt: Prompt | None = None) -> None:
    """Make the checks of `load_reward` that need no weights in memory; `prompt` must suit the reward."""
    source = f"reward {name!r}"
    if spec.ensemble is not None:
        check_scales(spec.ensemble, source)
        for number, member in enumerate(spec.ensemble.members):
            check_reward(member_name(name, number), member, prompt)
        return
    kind = _kind(spec, source)
    if kind.check is None:
        kind.load(spec, source)
    else:
        kind.check(spec, source, prompt)


def _kind(spec: RewardSpec, source: str) -> Kind:
    if spec.column is not None:
        raise RewardError(
            f"{source}: column {spec.column!r} belongs to pool files, whose samples have scores already; here a reward "
            "must score texts: give a model, function, judge, verifier or ensemble"
        )
    if spec.kind_name not in KINDS:
        raise RewardError(f"{source}: kind {spec.kind!r} is not known; write one of {', '.join(KINDS)}")
    return KINDS[spec.kind_name]
