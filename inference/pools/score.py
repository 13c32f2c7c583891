"""Scoring pools, prompt by prompt: each distinct text once, kept in a journal, so that a killed job goes on.

What a prompt's scores are depends on nothing but the prompt, so that any split of the prompts over processes gives
what one process would.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from iama.arrays import Floats, Integers
from iama.config.specs import MAX_SCORE, RewardSpec
from iama.errors import RewardError, RunError
from iama.files import check_rewritable, locked
from iama.installation import find_file
from iama.machines import Work
from iama.models.fingerprint import fingerprint
from iama.reading import read_text
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.responses import Pool, PooledPrompt
from inference.engine.reward_rows import num_common, reads_in_pieces
from inference.pools.file import read_again, write_pool
from inference.pools.held import HeldSamples, stacked, table_of, tables
from inference.pools.journal import append_line, digest, read_lines

DISAGREEMENT = "/disagreement"
"""What is added to a column's name for how far an ensemble's members disagree."""


@dataclass(frozen=True)
class PoolScores:
    """A reward's scores of a pool: `values_PS`, NaN where one is missing.

    `tokens_PS` are the tokens of each text when read whole (prompt included; 0 for functions), and `prompt_tokens_P`
    those of them that all texts of a prompt share, if the reward reads in pieces (else 0). `seconds_P` is what a
    prompt's distinct texts took, `num_calls` how many texts were scored: those that were not known from elsewhere.
    `calls_per_text` rewards score each; of an ensemble, `flops_PS` and `disagreement_PS` are those of `TextScore`.
    """

    values_PS: Floats
    tokens_PS: Integers
    prompt_tokens_P: Integers
    seconds_P: Floats
    num_calls: int
    calls_per_text: int = 1
    flops_PS: Floats | None = None
    disagreement_PS: Floats | None = None


def score_pool(
    pool: Pool,
    reward: Reward | None,
    spec: RewardSpec,
    journal: Path,
    known: KnownScores | None,
    advance: Callable[[int], None],
) -> PoolScores:
    """Score each distinct text of a prompt once; `advance` is called with numbers of finished prompts.

    `known` has scores by prompt and text from other pools, and gains those of this one. Scores of models and judges,
    and of ensembles of these alone, are kept in `journal`, one line a prompt, which nobody else may be writing. A
    prompt that lacks a score is not kept, so that it can be asked for again. A function's are computed afresh, since
    no hash could tell whether the code that it calls has changed. A `column` is read from the samples and needs no
    reward, nor does a journal that holds all scores (`score_elsewhere`). Raises `RewardError`.
    """
    if spec.column is not None:
        advance(len(pool.prompts))
        return _stored_scores(pool, spec)
    is_kept = _is_kept(spec)
    key_of_reward, lines = reward_key(spec), read_lines(journal) if is_kept else {}
    num_calls = 0
    table = _Table()
    for prompt in pool.prompts:
        texts = prompt.texts
        distinct = list(dict.fromkeys(texts))
        key = digest([key_of_reward, prompt.prompt, prompt.columns, distinct]) if is_kept else ""
        before = {} if known is None else known.of(prompt.prompt_id, distinct)
        if key in lines and None not in lines[key]["values"]:
            scores, num_fresh = from_line(lines[key]), lines[key]["num_calls"]
        else:
            scores, num_fresh = _scores(reward, prompt, distinct, before)
            if is_kept and not any(math.isnan(score.value) for score in scores):
                append_line(journal, as_line(key, prompt.prompt_id, scores, num_fresh))
        num_calls += num_fresh
        now = dict(zip(distinct, scores, strict=True))
        if known is not None:
            known.add(prompt.prompt_id, now)
        table.add(texts, now)
        advance(1)
    return table.scores(num_calls, len(spec.parts) if reward is None else reward.num_calls)


def announcements(pool: Pool, reward: Reward, spec: RewardSpec) -> Iterator[str]:
    """A line for each judge that scoring a pool asks, who may charge for it: how often, and the price; asks nothing."""
    if all(part.judge is None for part in spec.parts):
        return
    pairs = [(prompt, text) for prompt in pool.prompts for text in dict.fromkeys(prompt.texts)]
    names = {name for prompt in pool.prompts for name in prompt.columns}
    columns = {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names}
    for member in reward.members or [reward]:
        line = member.announcement([prompt.prompt for prompt, _ in pairs], [text for _, text in pairs], columns)
        if line is not None:
            yield f"{member.name}: {line}"


class _Table:
    """A pool's scores, a prompt at a time."""

    def __init__(self) -> None:
        self._values: list[Floats] = []
        self._num_tokens: list[Integers] = []
        self._num_shared: list[int] = []
        self._seconds: list[float] = []
        self._of_ensemble: list[Floats] = []  # operations and disagreement, [2, S]

    def add(self, texts: Sequence[str], scores: Mapping[str, TextScore]) -> None:
        """A prompt's texts with the scores of the distinct ones."""
        place = {text: i for i, text in enumerate(scores)}
        index_S = [place[text] for text in texts]
        distinct = list(scores.values())
        self._values.append(np.asarray([score.value for score in distinct], dtype=np.float64)[index_S])
        self._num_tokens.append(np.asarray([score.num_tokens for score in distinct], dtype=np.int64)[index_S])
        self._num_shared.append(min(score.num_shared for score in distinct))
        self._seconds.append(sum(score.seconds for score in distinct))
        if distinct[0].flops is not None:
            more = [[score.flops for score in distinct], [score.disagreement for score in distinct]]
            self._of_ensemble.append(np.asarray(more, dtype=np.float64)[:, index_S])

    def scores(self, num_calls: int, calls_per_text: int) -> PoolScores:
        """All together."""
        flops_PS, disagreement_PS = np.stack(self._of_ensemble, axis=1) if self._of_ensemble else (None, None)
        return PoolScores(
            values_PS=stacked(self._values),
            tokens_PS=stacked(self._num_tokens).astype(np.int64),
            prompt_tokens_P=np.asarray(self._num_shared, dtype=np.int64),
            seconds_P=np.asarray(self._seconds),
            num_calls=num_calls,
            calls_per_text=calls_per_text,
            flops_PS=flops_PS,
            disagreement_PS=disagreement_PS,
        )


class KnownScores:
    """Scores of texts under one reward, by prompt; a text is held as its digest, a score as its numbers."""

    def __init__(self) -> None:
        self._of_prompts: dict[str, list[tuple[bytes, Floats]]] = {}

    def of(self, prompt_id: str, texts: Sequence[str]) -> dict[str, TextScore]:
        """Those of the texts that are known."""
        rows = {
            digests[i * _DIGEST : (i + 1) * _DIGEST]: row
            for digests, scores in self._of_prompts.get(prompt_id, ())
            for i, row in enumerate(scores)
        }
        found = ((text, rows.get(_text_digest(text))) for text in texts) if rows else ()
        return {text: _from_numbers(row) for text, row in found if row is not None}

    def add(self, prompt_id: str, scores: Mapping[str, TextScore]) -> None:
        """More of a prompt's texts; of one that is known already the new score counts."""
        digests = b"".join(map(_text_digest, scores))
        rows = np.asarray([astuple(score) for score in scores.values()], dtype=np.float64)
        self._of_prompts.setdefault(prompt_id, []).append((digests, rows))


_DIGEST = 16


def _text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST).digest()


def _from_numbers(row: Floats) -> TextScore:
    """A score of its numbers; only an ensemble has operations."""
    value, num_tokens, num_shared, seconds, flops, disagreement = row.tolist()
    of_ensemble = () if math.isnan(flops) else (flops, disagreement)
    return TextScore(value, int(num_tokens), int(num_shared), seconds, *of_ensemble)


AT_ONCE = 4096
"""Prompts whose texts are held to be scored elsewhere."""
Unscored: TypeAlias = tuple[PooledPrompt, list[str]]
"""A prompt, without its samples, and texts of it."""


def score_elsewhere(
    pool: Pool,
    spec: RewardSpec,
    journal: Path,
    known: KnownScores | None,
    score: Work[Unscored, list[TextScore]],
    advance: Callable[[int], None],
) -> None:
    """Bring the journal of a reward that is a model up to the pool; `score_pool` then reads all scores from it.

    `score` gives the scores of texts of many prompts. Lines are those that `score_pool` would have written.
    """
    key_of_reward, lines = reward_key(spec), read_lines(journal)
    for start in range(0, len(pool.prompts), AT_ONCE):
        items: list[Unscored] = []
        rows: list[tuple[str, list[str], dict[str, TextScore]]] = []
        for prompt in pool.prompts[start : start + AT_ONCE]:
            distinct = list(dict.fromkeys(prompt.texts))
            key = digest([key_of_reward, prompt.prompt, prompt.columns, distinct])
            if key in lines:
                advance(1)
                continue
            before = {} if known is None else known.of(prompt.prompt_id, distinct)
            rows.append((key, distinct, before))
            items.append((replace(prompt, samples=()), [text for text in distinct if text not in before]))
        for place, scores in score(items):
            (key, distinct, before), (prompt, fresh) = rows[place], items[place]
            merged = before | dict(zip(fresh, scores, strict=True))
            append_line(journal, as_line(key, prompt.prompt_id, [merged[text] for text in distinct], len(fresh)))
            advance(1)


def scoring(name: str, spec: RewardSpec, key: str) -> Work[Unscored, list[TextScore]]:
    """Scores by a reward that is a model, which is loaded here; raises `RewardError` where its key is not `key`."""
    if reward_key(spec) != key:
        raise RewardError(
            f"reward {name!r}: {spec.model!r} holds other files here than where the run was started; copy them to "
            "every node, or share the file system"
        )
    reward = load_reward(name, spec)

    def work(items: Sequence[Unscored]) -> Iterator[tuple[int, list[TextScore]]]:
        for place, (prompt, texts) in enumerate(items):
            yield place, score_texts(reward, prompt, texts)

    return work


def alone_at(journal: Path, spec: RewardSpec) -> AbstractContextManager[object]:
    """Be the only one who writes a journal of scores, where the reward's are kept."""
    return locked(journal) if _is_kept(spec) else nullcontext()


def _is_kept(spec: RewardSpec) -> bool:
    return all(part.source in ("model", "judge") for part in spec.parts)


def _scores(
    reward: Reward | None, prompt: PooledPrompt, distinct: Sequence[str], known: Mapping[str, TextScore]
) -> tuple[list[TextScore], int]:
    """Scores of a prompt's distinct texts, and how many of these were not known."""
    assert reward is not None
    fresh = [text for text in distinct if text not in known]
    new = dict(zip(fresh, score_texts(reward, prompt, fresh), strict=True))
    return [new[text] if text in new else known[text] for text in distinct], len(fresh)


def reward_key(spec: RewardSpec) -> str:
    """Hash of what a reward's scores depend on, as far as its specification and its files tell."""
    source = getattr(spec, spec.source)
    if spec.model is not None:
        source = [fingerprint(Path(spec.model)), spec.head, spec.dtype, *(["pair"] if spec.pair else [])]
        source += ["vllm"] if spec.engine == "vllm" else []  # whose rounding is another
    elif spec.judge is not None:
        asked = spec.judge.model_dump(include={"model", "mode", "baseline_column", "temperature", "draw", "max_tokens"})
        asked |= spec.judge.model_dump(include={"lowest", "highest", "leave_out"})
        source = [asked, read_text(Path(spec.judge.prompt_file), RewardError)]
    elif spec.verifier is not None:
        source = [spec.verifier, spec.answer_column]
    elif spec.ensemble is not None:
        members = [reward_key(member) for member in spec.ensemble.members]
        source = [members, spec.ensemble.aggregate, spec.ensemble.coefficient]
    scale = None if spec.scale is None else spec.scale.model_dump()
    return digest([spec.source, source, spec.sign, scale])


def guide_key(spec: RewardSpec) -> str:
    """`reward_key` with the text of the file that a function or a kind of somebody's own stands in.

    What that file imports is not known.
    """
    texts = [read_text(path, RewardError) for part in spec.parts if (path := _code_file(part)) is not None]
    return digest([reward_key(spec), texts]) if texts else reward_key(spec)


def _code_file(spec: RewardSpec) -> Path | None:
    """The file of the code that loading a reward runs; None without code, and where it stands in no Python file."""
    if spec.code is None:
        return None
    name = spec.code.rpartition(":")[0]
    if name.endswith(".py"):
        return find_file(name)
    module = importlib.util.find_spec(name)
    origin = "" if module is None else module.origin or ""
    return Path(origin) if origin.endswith(".py") else None


def _stored_scores(pool: Pool, spec: RewardSpec) -> PoolScores:
    """Scores that the samples hold, with sign and scale."""
    name = spec.column
    assert name is not None
    columns = []
    for prompt in pool.prompts:
        table = table_of(prompt.samples)
        if name not in table.columns:
            number = table.lacking.get(name, 0)
            there = ", ".join(sorted(prompt.samples[number].scores)) or "none"
            raise RewardError(
                f"the pool of {pool.header['policy']['name']!r}: sample {number} of prompt {prompt.prompt_id!r} "
                f"has no score {name!r} (there: {there}); add the column with `iama score`"
            )
        columns.append(table.scores[name])
    values_PS = stacked(columns) * spec.sign
    if spec.scale is not None:
        with np.errstate(over="ignore"):
            values_PS = (values_PS - spec.scale.mean) / spec.scale.std
    if (np.abs(values_PS) > MAX_SCORE).any():
        raise RewardError(f"column {name!r}: its scale {spec.scale} makes some scores too large; measure it again")
    tokens_PS, zeros_P = np.zeros(values_PS.shape, dtype=np.int64), np.zeros(len(values_PS), dtype=np.int64)
    spread_PS = _stored_disagreement(pool, name, values_PS)
    return PoolScores(values_PS, tokens_PS, zeros_P, zeros_P.astype(np.float64), 0, disagreement_PS=spread_PS)


def _stored_disagreement(pool: Pool, name: str, values_PS: Floats) -> Floats | None:
    """What an ensemble's column has beside it, as it is (on the members' scale); None where scores are without one."""
    found = list(tables(pool))
    if not any(name + DISAGREEMENT in table.scores for table in found) and not np.isnan(values_PS).all():
        return None
    spread_PS = stacked([table.scores.get(name + DISAGREEMENT, np.full(table.size, np.nan)) for table in found])
    return None if np.isnan(spread_PS[~np.isnan(values_PS)]).any() else spread_PS


def add_column(
    path: Path, pool: Pool, name: str, reward: Reward, spec: RewardSpec, advance: Callable[[int], None]
) -> Floats:
    """Score a pool and write the scores `[P, S]` into its file as a column, which is there whole or not at all.

    An ensemble's disagreement goes into a column beside it (`DISAGREEMENT`), which any other reward takes away.
    A killed job goes on where it was, from a journal beside the file. Other processes may add other columns meanwhile.
    Raises `RewardError` if every score is missing, `RunError` if the file has other samples in the end than in the
    beginning, if another process has added the same column, and if the file cannot be rewritten.
    """
    target = check_rewritable(path)
    journal = target.with_name(f"{target.name}.{digest(name)[:8]}.scoring")
    with locked(journal):
        _check_unchanged(path, pool, read_again(path, pool), name)
        scores = score_pool(pool, reward, spec, journal, None, advance)
        values_PS = scores.values_PS
        if np.isnan(values_PS).all():
            raise RewardError(f"reward {reward.name!r} gave none of the {values_PS.size} texts of {path} a score")
        with locked(path):
            present = read_again(path, pool)
            _check_unchanged(path, pool, present, name)
            prompts = _with_scores(present.prompts, name, values_PS)
            prompts = _with_scores(prompts, name + DISAGREEMENT, scores.disagreement_PS)
            write_pool(path, Pool(present.header, prompts))
        journal.unlink(missing_ok=True)
    return values_PS


def _check_unchanged(path: Path, before: Pool, present: Pool, name: str) -> None:
    """Raise `RunError` for other samples than before, or a column of this name that was not there."""
    if present is before:
        return
    if present.texts != before.texts:
        raise RunError(f"{path} has been changed while it was scored; score it again")
    if has_column(present, name) and not has_column(before, name):
        raise RunError(
            f"another process has given {path} a column {name!r}; give --replace to overwrite it, or another --column"
        )


def has_column(pool: Pool, name: str) -> bool:
    """Whether some sample has a score of this name, or has it missing."""
    return any(name in table.scores for table in tables(pool))


def _with_scores(prompts: Sequence[PooledPrompt], name: str, values_PS: Floats | None) -> list[PooledPrompt]:
    """Prompts whose samples have these scores as the column `name`; None takes the column away."""
    changed = []
    for p, prompt in enumerate(prompts):
        assert isinstance(prompt.samples, HeldSamples), "a pool that was read from its file"
        samples = prompt.samples.with_scores(name, None if values_PS is None else values_PS[p])
        changed.append(replace(prompt, samples=samples))
    return changed


# Texts of one prompt. ---------------------------------------------------------------------------------------------


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
    reader = reward.reader
    if reader is None:
        columns = {name: [value] * len(texts) for name, value in prompt.columns.items()}
        values, cost = reward.score(prompts, texts, columns)
        each, rest = divmod(cost.reward_tokens, len(texts))
        counts, shared = [each + (i < rest) for i in range(len(texts))], [0] * len(texts)
        if reward.members:
            more = [(cost.flops / len(texts), spread) for spread in reward.disagreement(prompts, texts, columns)]
    else:
        scores, ids = reader.score_texts(prompts, texts)
        values = reward.finish(prompts, texts, scores)
        counts, shared = [len(row) for row in ids], _num_shared(reward, prompt, ids)
    seconds = (time.perf_counter() - start) / len(texts)
    rows = zip(zip(values, counts, shared, strict=True), more, strict=True)
    return [TextScore(*read, seconds, *of_ensemble) for read, of_ensemble in rows]


def _num_shared(reward: Reward, prompt: PooledPrompt, ids: Sequence[Sequence[int]]) -> list[int]:
    """Tokens at each text's beginning that the prompt with any answer has; 0 where texts are read whole.

    As `inference.engine.reward_rows.RewardRows` counts, the last token is always read, since it is where the score is.
    """
    if reward.classifier is None or not reads_in_pieces(reward.classifier):
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
    return [TextScore(*fields) for fields in zip(*columns, strict=True)]
