"""Ensembles: several rewards as one, on a common scale, so that what fools one member does not fool them all.

Mean and minimum are those of Coste et al. 2024 (arXiv 2310.02743), median and mean minus standard deviation those of
Eisenstein et al. 2024 (arXiv 2312.09244), who also show the limit: members that were trained alike share their errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np

from iama.arrays import Floats
from iama.config.specs import EnsembleSpec, RewardSpec
from iama.cost import Cost
from iama.errors import RewardError
from iama.prompts.render import Prompt, completion_text
from iama.rewards.reward import Columns, Reward, Scorer, TrlCompletion

NUM_KEPT = 4096  # texts whose disagreement is remembered


def aggregate(scores_MR: Floats, how: str, coefficient: float = 0.5) -> Floats:
    """One score a text, `[R]`, of members' scores `[M, R]` on one scale; NaN where a member has none.

    `how` is mean, median, min or mean_minus_std (mean less `coefficient` times `disagreement`).
    """
    if how == "median":
        scores_R = np.median(_without_missing(scores_MR), axis=0)
    elif how == "min":
        scores_R = scores_MR.min(axis=0)
    else:
        assert how in ("mean", "mean_minus_std"), how
        scores_R = scores_MR.mean(axis=0)
    if how == "mean_minus_std":
        scores_R = scores_R - coefficient * disagreement(scores_MR)
    return np.where(np.isnan(scores_MR).any(axis=0), np.nan, scores_R)


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
    several = [scores for scores in known if scores.size > 1]
    if not any(np.ptp(scores) for scores in several):
        return 0.0
    return float(np.sqrt(np.mean([scores.var() for scores in several])))


def _without_missing(scores_MR: Floats) -> Floats:
    """NaN as 0: a median would warn of it."""
    return np.where(np.isnan(scores_MR), 0.0, scores_MR)


class Ensemble(Scorer):
    """Rewards on one scale as one scorer.

    A score is NaN where a member has none (which members refuse unless they were loaded with `missing_ok`).
    """

    def __init__(self, spec: EnsembleSpec, members: Sequence[Reward]) -> None:
        self.spec, self._members = spec, tuple(members)
        self._kept: dict[str, float] = {}  # disagreement by text, the latest last

    @property
    def members(self) -> Sequence[Reward]:
        """The rewards that are combined."""
        return self._members

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores, and what all members read for them: tokens and operations add up.

        No member waits for another, so that sequential steps are those of one.
        """
        results = [member.checked(prompts, completions, columns) for member in self._members]
        scores_MR = np.asarray([scores for scores, _ in results], dtype=np.float64)
        self._keep(_keys(prompts, completions, columns), disagreement(scores_MR).tolist())
        scores_R = aggregate(scores_MR, self.spec.aggregate, self.spec.coefficient)
        return scores_R.tolist(), reduce(Cost.beside, (cost for _, cost in results))

    def disagreement(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> list[float]:
        """`disagreement` of each text on the members' scale; what `score` met lately is not read again.

        NaN where a member has no score.
        """
        keys = _keys(prompts, completions, columns)
        if any(key not in self._kept for key in keys):
            self.score(prompts, completions, columns)
        return [self._kept[key] for key in keys]

    def _keep(self, keys: Sequence[str], values: Sequence[float]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._kept.pop(key, None)
            self._kept[key] = value
        for key in list(self._kept)[: -max(NUM_KEPT, len(keys))]:
            del self._kept[key]


def _keys(prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns) -> list[str]:
    """What a text's scores depend on, hashed."""
    # In training TRL hands over its own state beside the columns.
    values = [(name, column) for name, column in sorted(columns.items()) if isinstance(column, Sequence)]
    rows = [
        (prompt, completion_text(completion), [(name, column[i]) for name, column in values])
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    return [hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).hexdigest() for row in rows]


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
