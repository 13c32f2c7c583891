"""Scores of one prompt's distinct texts, with what reading each took, and their line in a journal."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inference.engine.reward_rows import num_common, reads_in_pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.rewards.reward import Reward
    from inference.engine.responses import PooledPrompt


_COLUMNS = ("num_tokens", "num_shared", "seconds")
_OF_ENSEMBLES = ("flops", "disagreement")


@dataclass(frozen=True)
class TextScore:
    """A text's score, its tokens as the reward reads them (0 for functions), and what reading it took.

    `num_shared` of the tokens are the prompt's, which a reward that reads in pieces reads once for all texts. Of an
    ensemble, `flops` are its members' operations and `disagreement` how far they disagree (`Reward.disagreement`).
    """

    value: float
    num_tokens: int
    num_shared: int
    seconds: float
    flops: float | None = None
    disagreement: float | None = None


def score_texts(reward: Reward, prompt: PooledPrompt, texts: list[str]) -> list[TextScore]:
    """Scores of texts of one prompt, in one call of the reward; seconds in equal shares."""
    if not texts:
        return []
    start = time.perf_counter()
    prompts = [prompt.prompt] * len(texts)
    more: list[tuple[float, ...]] = [()] * len(texts)
    if reward.classifier is None:
        columns = {name: [value] * len(texts) for name, value in prompt.columns.items()}
        values, cost = reward.score(prompts, texts, columns)
        each, rest = divmod(cost.reward_tokens, len(texts))
        counts, shared = [each + (i < rest) for i in range(len(texts))], [0] * len(texts)
        if reward.members:
            more = [(cost.flops / len(texts), found) for found in reward.disagreement(prompts, texts, columns)]
    else:
        ids = reward.classifier.render(prompts, texts)
        values = reward.finish(prompts, texts, reward.classifier.score_ids(ids))
        counts, shared = [len(row) for row in ids], _num_shared(reward, prompt, ids)
    seconds = (time.perf_counter() - start) / len(texts)
    rows = zip(zip(values, counts, shared, strict=True), more, strict=True)
    return [TextScore(*told, seconds, *of_ensemble) for told, of_ensemble in rows]


def _num_shared(reward: Reward, prompt: PooledPrompt, ids: Sequence[Sequence[int]]) -> list[int]:
    """Tokens at each text's beginning that the prompt with any answer has; 0 where texts are read whole.

    As `scoring.RewardRows` counts, the last token is always read, since it is where the score is.
    """
    assert reward.classifier is not None
    if not reads_in_pieces(reward.classifier):
        return [0] * len(ids)
    (empty,) = reward.classifier.render([prompt.prompt], [""])
    return [min(num_common(empty, row), len(row) - 1) for row in ids]


def as_line(key: str, prompt_id: str, scores: Sequence[TextScore], num_calls: int) -> dict[str, Any]:
    """A prompt's distinct texts in a journal; null for a missing score."""
    names = _COLUMNS if scores[0].flops is None else (*_COLUMNS, *_OF_ENSEMBLES)
    columns = {name: [_as_json(getattr(score, name)) for score in scores] for name in names}
    values = [_as_json(score.value) for score in scores]
    return {"key": key, "prompt_id": prompt_id, "values": values, **columns, "num_calls": num_calls}


def _as_json(value: float) -> float | None:
    return None if math.isnan(value) else value


def from_line(line: dict[str, Any]) -> list[TextScore]:
    """What `as_line` wrote."""
    names = [name for name in ("values", *_COLUMNS, *_OF_ENSEMBLES) if name in line]
    columns = [[math.nan if value is None else value for value in line[name]] for name in names]
    return [TextScore(*told) for told in zip(*columns, strict=True)]
