"""Ensembles: several rewards as one, on a common scale, so that what fools one member does not fool them all.

Mean and minimum are those of Coste et al. 2024 (arXiv 2310.02743), median and mean minus standard deviation those of
Eisenstein et al. 2024 (arXiv 2312.09244), who also show the limit: members that were trained alike share their errors.
"""

from __future__ import annotations

import hashlib
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from iama.arrays import Floats
from iama.cost import Cost
from iama.errors import RewardError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from iama.config.specs import EnsembleSpec, RewardSpec
    from iama.prompts.render import Message, Prompt
    from iama.rewards.reward import Reward

NUM_KEPT = 4096  # texts whose disagreement is remembered


def aggregate(scores_MR: Floats, how: str, coefficient: float = 0.5) -> Floats:
    """One score a text, `[R]`, of members' scores `[M, R]` on one scale; NaN where a member has none.

    `how` is mean, median, min or mean_minus_std (mean less `coefficient` times `disagreement`).
    """
    if how == "median":
        found_R = np.median(_without_missing(scores_MR), axis=0)
    elif how == "min":
        found_R = scores_MR.min(axis=0)
    else:
        assert how in ("mean", "mean_minus_std"), how
        found_R = scores_MR.mean(axis=0)
    if how == "mean_minus_std":
        found_R = found_R - coefficient * disagreement(scores_MR)
    return np.where(np.isnan(scores_MR).any(axis=0), np.nan, found_R)


def disagreement(scores_MR: Floats) -> Floats:
    """Standard deviation over the members (of all M, not M - 1) of each text's scores `[M, R]`; NaN as in `aggregate`.

    It is 0 for equal scores, to the bit.
    """
    return np.asarray((scores_MR - scores_MR[:1]).std(axis=0), dtype=np.float64)


def within_prompt_spread(groups: Iterable[Floats]) -> float:
    """Root of the mean variance of a prompt's known scores, given each prompt's `[S]`; 0 where no prompt's differ.

    What prompts differ in by themselves does not count, since it never decides between the answers to one. Prompts
    with fewer than two scores say nothing of it.
    """
    known = [scores[~np.isnan(scores)] for scores in groups]
    told = [scores for scores in known if scores.size > 1]
    if not any(np.ptp(scores) for scores in told):
        return 0.0
    return float(np.sqrt(np.mean([scores.var() for scores in told])))


def _without_missing(scores_MR: Floats) -> Floats:
    """NaN as 0: a median would warn of it."""
    return np.where(np.isnan(scores_MR), 0.0, scores_MR)


class Ensemble:
    """Rewards on one scale as one scorer: (prompts, completions, **columns) -> (scores, tokens).

    A score is NaN where a member has none (which members refuse unless they were loaded with `missing_ok`).
    """

    def __init__(self, spec: EnsembleSpec, members: Sequence[Reward]) -> None:
        self.spec, self.members = spec, tuple(members)
        self._kept: dict[str, float] = {}  # disagreement by text, the latest last

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str | list[Message]], **columns: Any
    ) -> tuple[list[float], int]:
        """Scores, and the tokens that all members read."""
        found = [member.scored(prompts, completions, columns) for member in self.members]
        return self._aggregated([scores for scores, _ in found]).tolist(), sum(tokens for _, tokens in found)

    def read(
        self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[float], Cost]:
        """Scores of texts, and what all members spent on them: tokens, operations, calls and seconds add up.

        No member waits for another, so that sequential steps are those of one.
        """
        found = [member.score(prompts, texts, columns) for member in self.members]
        scores = [scores for scores, _ in found]
        self._keep(_keys(prompts, texts, columns), disagreement(np.asarray(scores, dtype=np.float64)).tolist())
        return self._aggregated(scores).tolist(), reduce(Cost.beside, (cost for _, cost in found))

    def disagreement(
        self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """`disagreement` of each text on the members' scale; what `read` met among its latest texts is not read again.

        NaN where a member has no score.
        """
        keys = _keys(prompts, texts, columns)
        if any(key not in self._kept for key in keys):
            self.read(prompts, texts, columns)
        return [self._kept[key] for key in keys]

    def _aggregated(self, scores: Sequence[Sequence[float]]) -> Floats:
        return aggregate(np.asarray(scores, dtype=np.float64), self.spec.aggregate, self.spec.coefficient)

    def _keep(self, keys: Sequence[str], values: Sequence[float]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._kept.pop(key, None)
            self._kept[key] = value
        for key in list(self._kept)[: -max(NUM_KEPT, len(keys))]:
            del self._kept[key]


def _keys(prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """What a text's scores depend on, hashed."""
    told = [
        (prompt, text, [(name, values[i]) for name, values in sorted(columns.items())])
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    return [hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).hexdigest() for row in told]


def member_name(name: str, number: int) -> str:
    """What member `number` (from 0) of a reward is called in errors, as its place in the configuration."""
    return f"{name}.members.{number}"


def check_scales(spec: EnsembleSpec, source: str) -> None:
    """Raise `RewardError` for a member whose scale is not known: an aggregate of unlike scales means nothing."""
    if spec.same_scale:
        return
    for number, member in enumerate(spec.members):
        if member.scale is None:
            raise RewardError(
                f"{source}: member {number} of the ensemble ({described(member)}) has no `scale`; measure it with "
                "`iama standardise --config RUN.yaml` or `iama standardise --pool POOL --spec REWARD.yaml`, or write "
                "`same_scale: true` if all members are on one scale"
            )


def described(spec: RewardSpec) -> str:
    """What a reward reads, in a few words: a path or a name, of an ensemble `min of A, B`."""
    if spec.ensemble is not None:
        return f"{spec.ensemble.aggregate} of {', '.join(map(described, spec.ensemble.members))}"
    if spec.judge is not None:
        return f"judge {spec.judge.model}"
    head = "" if spec.head is None else f", {spec.head}"
    return f"{getattr(spec, spec.source)}{head}"
