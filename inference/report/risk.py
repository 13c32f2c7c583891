"""One thing that could be wrong with a trained policy or with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Risk:
    """A finding: `seen`, `none` (measured, and nothing found), `unknown` (not measured) or `info` (a plain figure).

    `brief` says it in plain words: a sentence, or for `none` what was not found. `severity` is from 0, no concern, over
    1, keep in mind, and 2, act, to 3, rely on nothing before it is settled. `place` is the part of the page that has
    the figures.
    """

    subject: str
    level: Literal["seen", "none", "unknown", "info"]
    words: str
    brief: str = ""
    severity: float = 0.0
    place: str = "all-risks"
