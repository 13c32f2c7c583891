"""Hedging: how hard a proxy reward may be pushed before the gold reward falls.

Read `tune` first: it finds the strength of a method with the most gold on calibration prompts. `laws` has the methods
that can be tuned, `search` the maxima of gold along one of them, `scores` the checks of what is given, `tuning_file`
what `iama tune` writes and an evaluation reads. `guarantee` bounds Best-of-n from the rewards' correlation alone.
"""

from inference.hedging.guarantee import safe_samples
from inference.hedging.tune import Tuned, tune

__all__ = ["Tuned", "safe_samples", "tune"]
