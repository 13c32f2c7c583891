"""Types of numpy arrays, each under one name. A variable's name ends with its axes: `rewards_PGK` is `[P, G, K]`."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Indices: TypeAlias = NDArray[np.intp]
"""Places in an array, as `argsort` and `searchsorted` return them."""
Mask: TypeAlias = NDArray[np.bool_]
