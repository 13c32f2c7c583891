"""Ensembles of weak proxies in the hedging experiment: members' scores as one, and gold under Best-of-n by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iama.rewards.ensemble import aggregate, within_prompt_spread
from scripts.experiments.hedging_values import FAR, NEARER, expected, gap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.experiments.common import Estimate
    from scripts.experiments.hedging_values import Cell, Floats

DISTILLED = "distilled"


def as_one(members_KPM: Floats, reference_KPM: Floats, how: str, *, by_prompt: bool = True) -> Floats:
    """Members' scores as one, `[P, M]`, put on one scale first.

    By prompt: less the member's mean over the prompt's own samples, in its deviation within a prompt of the reference,
    so that no member is the lower one at a prompt by what it adds to all answers there. Otherwise by one mean and one
    deviation over all of the reference, as an earlier page had it.
    """
    if by_prompt:
        mean_KP1 = members_KPM.mean(axis=2, keepdims=True)
        std_K = np.asarray([within_prompt_spread(scores_PR) for scores_PR in reference_KPM])
    else:
        mean_KP1 = reference_KPM.mean(axis=(1, 2), keepdims=True)
        std_K = reference_KPM.std(axis=(1, 2))
    scaled_KPM = (members_KPM - mean_KP1) / std_K[:, None, None]
    return aggregate(scaled_KPM.reshape(len(std_K), -1), how).reshape(scaled_KPM.shape[1:])


def members_gold(cell: Cell) -> Floats:
    """Gold `[P, N]` of Best-of-n, n in `NS` up to `FAR`, by a single member: mean over the members."""
    curves = [_nearer(proxy_PM, cell) for proxy_PM in cell.test.members_KPM]
    return np.asarray(np.mean(curves, axis=0))


def ensemble_gold(cell: Cell, how: str, *, by_prompt: bool = True) -> Floats:
    """Gold `[P, N]` of Best-of-n by an ensemble (see `as_one`), or by the reward distilled from its mean."""
    if how == DISTILLED:
        assert cell.test.distilled_PM is not None
        return _nearer(cell.test.distilled_PM, cell)
    return _nearer(as_one(cell.test.members_KPM, cell.calibration.members_KPM, how, by_prompt=by_prompt), cell)


def agreement(cell: Cell) -> Floats:
    """Correlations within prompts `[4]`: a member with gold, the mean with gold, two members, those given gold.

    Means over members and pairs of them; `given gold` is the partial correlation, of what gold does not explain.
    """
    members_KPM = cell.test.members_KPM
    num_members, num_prompts, size = members_KPM.shape
    rows_RPM = np.concatenate([members_KPM, _mean_of(cell)[None], cell.test.gold_PS[None, :, :size]])
    centred_RPM = rows_RPM - rows_RPM.mean(axis=2, keepdims=True)
    r = np.corrcoef(centred_RPM.reshape(num_members + 2, num_prompts * size))
    with_gold_K = r[:num_members, -1]
    a, b = np.triu_indices(num_members, 1)
    given_gold = (r[a, b] - with_gold_K[a] * with_gold_K[b]) / np.sqrt(
        (1 - with_gold_K[a] ** 2) * (1 - with_gold_K[b] ** 2)
    )
    return np.asarray([with_gold_K.mean(), r[num_members, -1], r[a, b].mean(), given_gold.mean()])


def _mean_of(cell: Cell) -> Floats:
    return as_one(cell.test.members_KPM, cell.calibration.members_KPM, "mean")


def _nearer(proxy_PM: Floats, cell: Cell) -> Floats:
    return expected("bon", NEARER, proxy_PM, cell.test.gold_PS[:, : proxy_PM.shape[1]])


def peak(golds: Sequence[Floats]) -> int:
    """The n of the highest gold, of means over prompts and seeds; `golds` `[P, N]` of each seed."""
    best = np.mean([gold_PN.mean(axis=0) for gold_PN in golds], axis=0).argmax()
    return NEARER[int(best)]


@dataclass(frozen=True)
class Delay:
    """The n of an ensemble's highest gold and of one member's, and gold at `FAR` above one member's."""

    peak: int
    single_peak: int
    gap: Estimate

    @property
    def met(self) -> bool:
        """The bar: a peak at no smaller n, and more gold at `FAR`, the interval above 0."""
        return self.peak >= self.single_peak and self.gap.ci95[0] > 0


def delay(cells: Sequence[Cell], how: str, *, by_prompt: bool = True) -> Delay:
    """An ensemble beside one member, over the cells of a policy."""
    single, own = [members_gold(c) for c in cells], [ensemble_gold(c, how, by_prompt=by_prompt) for c in cells]
    k = NEARER.index(FAR)
    return Delay(peak(own), peak(single), gap([o[:, k] for o in own], [s[:, k] for s in single]))
