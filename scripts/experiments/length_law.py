"""What the length experiment asks of a law of lengths: mass by zone, number of modes, the exact optimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments.rewards import LONG_TARGET, MAX_LENGTH, NEAR, SHORT_TARGET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WINDOW = 5  # tokens; sentences of the demo language come in few lengths, so the raw histogram is ragged
DIP = 0.005  # of the mass, per word


def zones(lengths: Floats) -> dict[str, NDArray[np.bool_]]:
    """Which lengths are near the short target, near the long one, and in the middle half of the gap."""
    quarter = (LONG_TARGET - SHORT_TARGET) / 4
    return {
        "short": np.abs(lengths - SHORT_TARGET) <= NEAR,
        "long": np.abs(lengths - LONG_TARGET) <= NEAR,
        "middle": (lengths >= SHORT_TARGET + quarter) & (lengths <= LONG_TARGET - quarter),
    }


def histogram(lengths: Floats) -> Floats:
    """Share of each length 0, 1, ..., MAX_LENGTH (and beyond, if there are longer ones)."""
    counts = np.bincount(lengths.astype(np.int64).ravel(), minlength=MAX_LENGTH + 1)
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def smoothed(share: Floats) -> Floats:
    """Moving average over WINDOW lengths."""
    return np.convolve(share, np.full(WINDOW, 1 / WINDOW), mode="same")


def modes(lengths: Floats) -> list[int]:
    """Lengths at the modes of the smoothed histogram; a dip shallower than DIP parts no two modes."""
    share = smoothed(histogram(lengths))
    found: list[int] = []
    top, bottom, climbing = 0, 0, True
    for length, height in enumerate([*share, 0.0]):
        if climbing and height > _height(share, top):
            top = length
        elif climbing and height < _height(share, top) - DIP:
            found.append(top)
            bottom, climbing = length, False
        elif not climbing and height < _height(share, bottom):
            bottom = length
        elif not climbing and height > _height(share, bottom) + DIP:
            top, climbing = length, True
    return found


def _height(share: Floats, length: int) -> float:
    return float(share[length]) if length < len(share) else 0.0


def theory_cdf(y: float, n: int) -> float:
    """The optimum's mass below a share `y` of the gap: beta 0, continuous lengths (the paper's proposition 3.1)."""
    power = 1 / (n - 1)
    return float(y**power / (y**power + (1 - y) ** power))
