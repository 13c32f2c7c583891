"""Ensembles of weak proxies in the hedging experiment: members' scores as one, and gold under Best-of-n by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.ensembles import aggregate
from scripts.experiments.hedging_values import NEARER, expected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripts.experiments.hedging_values import Cell, Floats

DISTILLED = "distilled"


def as_one(members_KPM: Floats, reference_KPM: Floats, how: str) -> Floats:
    """Members' scores as one, `[P, M]`, put on one scale first: mean and deviation over all of the reference."""
    flat_KR = reference_KPM.reshape(len(reference_KPM), -1)
    mean_K, std_K = flat_KR.mean(axis=1), flat_KR.std(axis=1)
    scaled_KPM = (members_KPM - mean_K[:, None, None]) / std_K[:, None, None]
    return aggregate(scaled_KPM.reshape(len(mean_K), -1), how).reshape(scaled_KPM.shape[1:])


def members_gold(cell: Cell) -> Floats:
    """Gold `[P, N]` of Best-of-n, n in `NS` up to `FAR`, by a single member: mean over the members."""
    curves = [_nearer(proxy_PM, cell) for proxy_PM in cell.test.members_KPM]
    return np.asarray(np.mean(curves, axis=0))


def ensemble_gold(cell: Cell, how: str) -> Floats:
    """Gold `[P, N]` of Best-of-n by an ensemble, or by the reward distilled from its mean."""
    if how == DISTILLED:
        assert cell.test.distilled_PM is not None
        return _nearer(cell.test.distilled_PM, cell)
    return _nearer(as_one(cell.test.members_KPM, cell.calibration.members_KPM, how), cell)


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
