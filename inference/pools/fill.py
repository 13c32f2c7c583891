"""Filling pool files with samples, and scoring them: prompt by prompt, so that a killed job goes on where it was.

What a prompt's samples and scores are depends on nothing but the prompt, so that any split of the prompts over
processes gives what one process would.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iama import __version__
from iama.arrays import Floats, Integers
from iama.cost import Cost
from iama.errors import DataError, IamaWarning, RewardError, RunError
from iama.installation import find_file
from iama.models.fingerprint import fingerprint
from iama.prompts.data import with_system_prompt
from iama.prompts.render import render_prompt
from inference.engine.decode import iter_decode
from inference.engine.policy import load_policy, resolve_paths
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.pools.file import append_block, open_unfinished, prompt_ids, read_pool, write_pool
from inference.pools.format import full_header
from inference.pools.journal import append_line, digest, read_lines
from inference.pools.text_scores import TextScore, as_line, from_line, score_texts

if TYPE_CHECKING:
    from iama.config.specs import PolicySpec, RewardSpec, Sampling
    from iama.rewards.reward import Reward

Advance: TypeAlias = Callable[[int], None]
Rows: TypeAlias = Sequence[dict[str, Any]]
Draw: TypeAlias = Callable[[Rows, Sequence[int]], Iterator[tuple[int, list[Response], Cost, bool]]]
"""From all rows and the indices of those to draw: (index, samples, cost, whether it is estimated), as they are done."""

DISAGREEMENT = "/disagreement"
"""What is added to a column's name for how far an ensemble's members disagree."""
PACKAGES = {"transformers": ("torch", "transformers", "peft"), "vllm": ("torch", "vllm"), "openai": ("openai",)}


# Samples. -----------------------------------------------------------------------------------------------


def pool_header(
    name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    engine: str,
    sampling: Sampling,
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The header of a local policy's pool, with a fingerprint of all in its folders that decides the samples."""
    base, adapter = resolve_paths(name, spec)
    template = find_file(spec.chat_template).read_text(encoding="utf-8") if spec.chat_template else None
    folders = [fingerprint(Path(base)), fingerprint(Path(adapter)) if adapter else None]
    policy = {
        "name": name,
        "path": spec.path,
        "adapter": spec.adapter,
        "fingerprint": digest([*folders, template, spec.dtype]),
    }
    return engine_header(policy, system_prompt, engine, sampling, num_samples, seed)


def engine_header(
    policy: dict[str, Any], system_prompt: str | None, engine: str, sampling: Sampling, num_samples: int, seed: int
) -> dict[str, Any]:
    """A header with the versions of the engine's packages."""
    raw = {
        "iama_pool": 1,
        "policy": policy,
        "engine": engine,
        "sampling": sampling.model_dump(),
        "num_samples": num_samples,
        "seed": seed,
        "versions": {"iama": __version__, "python": platform.python_version(), **_versions(engine)},
        "system_prompt": system_prompt,
    }
    return full_header(raw, "pool header")


def fill_pool(
    path: Path, header: dict[str, Any], rows: Rows, draw: Draw, advance: Advance, indices: Sequence[int] | None = None
) -> Pool:
    """The pool of the rows (of those at `indices`), in their order; what the file lacks is drawn and appended.

    `advance` is told numbers of finished prompts. What else the file holds stays there. Raises `RunError` where the
    file has another header, `DataError` where it is damaged or a row's columns cannot be written.
    """
    header = full_header(header, "pool header")
    wanted = range(len(rows)) if indices is None else indices
    names = prompt_ids(rows)
    stored = open_unfinished(path, header)
    found = {prompt.prompt_id: prompt for prompt in stored.prompts}
    missing = [i for i in wanted if names[i] not in found]
    advance(len(wanted) - len(missing))
    if missing:
        if found and stored.header["versions"] != header["versions"]:
            was, now = stored.header["versions"], header["versions"]
            warnings.warn(f"{path} was begun with {was} and goes on with {now}", IamaWarning, stacklevel=2)
        _check_columns(rows)
        for index, samples, cost, estimated in draw(rows, missing):
            assert len(samples) == header["num_samples"]
            row = rows[index]
            block = PooledPrompt(names[index], row["prompt"], _columns(row), tuple(samples), cost, estimated)
            append_block(path, block)
            found[names[index]] = block
            advance(1)
    return Pool(stored.header, [replace(found[names[i]], columns=_columns(rows[i])) for i in wanted])


def transformers_draw(
    policy_name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    prompts_ids: Sequence[Sequence[int]] | None = None,
) -> Draw:
    """Draw with the engine of `inference.engine.decode`; the policy is loaded when something is drawn.

    `prompts_ids` are the token ids of all rows' prompts, where they are known already.
    """

    def draw(rows: Rows, indices: Sequence[int]) -> Iterator[tuple[int, list[Response], Cost, bool]]:
        policy = load_policy(policy_name, spec, sampling)
        ids = prompts_ids or [
            render_prompt(policy.tokenizer, with_system_prompt(row["prompt"], system_prompt)) for row in rows
        ]
        keys = prompt_keys(ids)  # of all rows, so that repeated prompts differ whichever are drawn here
        for place, responses, cost in iter_decode(
            policy,
            [ids[i] for i in indices],
            num_samples,
            sampling,
            seed=seed,
            batch_size=batch_size,
            keys=[keys[i] for i in indices],
        ):
            yield indices[place], responses, cost, False

    return draw


def _versions(engine: str) -> dict[str, str]:
    found = {}
    for name in PACKAGES[engine]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # which the engine will say, and what to do about it
            continue
    return found


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "prompt"}


def _check_columns(rows: Rows) -> None:
    """Raise `DataError` for NaN and infinity, which JSON has not, before anything is drawn."""
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"prompt {number}: column {name!r} is {value}; leave the column out or write a number")


# Scores. ------------------------------------------------------------------------------------------------


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
    known: dict[tuple[str, str], TextScore],
    advance: Advance,
) -> PoolScores:
    """Score each distinct text of a prompt once; `advance` is told numbers of finished prompts.

    `known` (prompt id, text) carries scores over from other pools. Scores of models and judges, and of ensembles of
    these alone, are kept in `journal`, one line a prompt; a function's are computed afresh, since no hash could tell
    whether the code that it calls has changed. A `column` is read from the samples and needs no reward. Raises
    `RewardError`.
    """
    if spec.column is not None:
        advance(len(pool.prompts))
        return _stored_scores(pool, spec)
    assert reward is not None
    is_kept = all(part.source in ("model", "judge") for part in spec.parts)
    own, lines = reward_key(spec), read_lines(journal) if is_kept else {}
    scored: list[list[TextScore]] = []
    num_calls = 0
    for prompt in pool.prompts:
        texts = [sample.text for sample in prompt.samples]
        distinct = list(dict.fromkeys(texts))
        key = digest([own, prompt.prompt, prompt.columns, distinct])
        if key in lines:
            found = from_line(lines[key])
            num_calls += lines[key]["num_calls"]
        else:
            fresh = [text for text in distinct if (prompt.prompt_id, text) not in known]
            new = dict(zip(fresh, score_texts(reward, prompt, fresh), strict=True))
            found = [new[text] if text in new else known[prompt.prompt_id, text] for text in distinct]
            num_calls += len(fresh)
            if is_kept:
                append_line(journal, as_line(key, prompt.prompt_id, found, len(fresh)))
        known.update(zip(((prompt.prompt_id, text) for text in distinct), found, strict=True))
        scored.append([known[prompt.prompt_id, text] for text in texts])
        advance(1)
    return PoolScores(
        values_PS=np.asarray([[s.value for s in row] for row in scored], dtype=np.float64),
        tokens_PS=np.asarray([[s.num_tokens for s in row] for row in scored], dtype=np.int64),
        prompt_tokens_P=np.asarray([min(s.num_shared for s in row) for row in scored], dtype=np.int64),
        seconds_P=np.asarray([_seconds(p, row) for p, row in zip(pool.prompts, scored, strict=True)]),
        num_calls=num_calls,
        calls_per_text=reward.num_calls,
        flops_PS=_told(scored, "flops"),
        disagreement_PS=_told(scored, "disagreement"),
    )


def _told(scored: Sequence[Sequence[TextScore]], name: str) -> Floats | None:
    """What is told of every text of an ensemble, `[P, S]`, or None."""
    values = [[getattr(score, name) for score in row] for row in scored]
    return None if not values or values[0][0] is None else np.asarray(values, dtype=np.float64)


def reward_key(spec: RewardSpec) -> str:
    """Hash of what a reward's scores depend on, as far as its specification and its files tell."""
    source = getattr(spec, spec.source)
    if spec.model is not None:
        source = [fingerprint(Path(spec.model)), spec.head, spec.dtype]
    elif spec.judge is not None:
        asked = spec.judge.model_dump(include={"model", "mode", "baseline_column", "temperature", "draw", "max_tokens"})
        asked |= spec.judge.model_dump(include={"lowest", "highest"})
        source = [asked, Path(spec.judge.prompt_file).read_text(encoding="utf-8")]
    elif spec.verifier is not None:
        source = [spec.verifier, spec.answer_column]
    elif spec.ensemble is not None:
        members = [reward_key(member) for member in spec.ensemble.members]
        source = [members, spec.ensemble.aggregate, spec.ensemble.coefficient]
    scale = None if spec.scale is None else spec.scale.model_dump()
    return digest([spec.source, source, spec.sign, scale])


def _seconds(prompt: PooledPrompt, row: Sequence[TextScore]) -> float:
    """What the distinct texts of a prompt took."""
    return sum({sample.text: score.seconds for sample, score in zip(prompt.samples, row, strict=True)}.values())


def _stored_scores(pool: Pool, spec: RewardSpec) -> PoolScores:
    """Scores that the samples hold, with sign and scale."""
    name = spec.column
    assert name is not None
    for prompt in pool.prompts:
        for number, sample in enumerate(prompt.samples):
            if name not in sample.scores:
                there = ", ".join(sorted(sample.scores)) or "none"
                raise RewardError(
                    f"the pool of {pool.header['policy']['name']!r}: sample {number} of prompt {prompt.prompt_id!r} "
                    f"has no score {name!r} (there: {there}); add the column with `iama score`"
                )
    values_PS = np.asarray([[s.scores[name] for s in prompt.samples] for prompt in pool.prompts], dtype=np.float64)
    values_PS = values_PS * spec.sign
    if spec.scale is not None:
        values_PS = (values_PS - spec.scale.mean) / spec.scale.std
    tokens_PS, zeros_P = np.zeros(values_PS.shape, dtype=np.int64), np.zeros(len(values_PS), dtype=np.int64)
    spread_PS = _stored_disagreement(pool, name, values_PS)
    return PoolScores(values_PS, tokens_PS, zeros_P, zeros_P.astype(np.float64), 0, disagreement_PS=spread_PS)


def _stored_disagreement(pool: Pool, name: str, values_PS: Floats) -> Floats | None:
    """What an ensemble's column has beside it, as it is (on the members' scale); None where scores are without one."""
    beside = [[sample.scores.get(name + DISAGREEMENT) for sample in prompt.samples] for prompt in pool.prompts]
    spread_PS = np.asarray(beside, dtype=np.float64)
    return None if np.isnan(spread_PS[~np.isnan(values_PS)]).any() else spread_PS


def add_column(path: Path, pool: Pool, name: str, reward: Reward, spec: RewardSpec, advance: Advance) -> Floats:
    """Score a pool and write the scores `[P, S]` into its file as a column, which is there whole or not at all.

    An ensemble's disagreement goes into a column beside it (`DISAGREEMENT`), which any other reward takes away.
    A killed job goes on where it was, from a journal beside the file. Raises `RewardError` if every score is missing,
    `RunError` if the file has other samples in the end than in the beginning.
    """
    journal = path.with_name(f"{path.name}.{digest(name)[:8]}.scoring")
    scores = score_pool(pool, reward, spec, journal, {}, advance)
    values_PS = scores.values_PS
    if np.isnan(values_PS).all():
        raise RewardError(f"reward {reward.name!r} gave none of the {values_PS.size} texts of {path} a score")
    present = read_pool(path)  # another column may have come in the meantime
    if present.texts != pool.texts:
        raise RunError(f"{path} has been changed while it was scored; score it again")
    prompts = _with_scores(present.prompts, name, values_PS)
    prompts = _with_scores(prompts, name + DISAGREEMENT, scores.disagreement_PS)
    write_pool(path, Pool(present.header, prompts))
    journal.unlink(missing_ok=True)
    return values_PS


def _with_scores(prompts: Sequence[PooledPrompt], name: str, values_PS: Floats | None) -> list[PooledPrompt]:
    """Prompts whose samples have these scores as the column `name`; None takes the column away."""
    found = []
    for p, prompt in enumerate(prompts):
        samples = []
        for s, sample in enumerate(prompt.samples):
            scores = dict(sample.scores)
            if values_PS is None:
                scores.pop(name, None)
            else:
                scores[name] = None if math.isnan(values_PS[p, s]) else float(values_PS[p, s])
            samples.append(replace(sample, scores=scores))
        found.append(replace(prompt, samples=tuple(samples)))
    return found
