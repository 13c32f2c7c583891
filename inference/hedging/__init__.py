"""Hedging: how hard a proxy reward may be pushed before the gold reward falls."""

from inference.hedging.guarantee import safe_samples
from inference.hedging.tune import Tuned, tune

__all__ = ["Tuned", "safe_samples", "tune"]
