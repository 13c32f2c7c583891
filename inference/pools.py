"""Pools of samples and their scores, kept on disk prompt by prompt as an evaluation goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iama.cost import Cost
from iama.render import render_prompt
from inference.decode import iter_decode, response_text
from inference.policy import load_policy, resolve_paths
from inference.random_streams import prompt_keys
from inference.store import append_line, digest, fingerprint, read_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from iama.config import EvaluationConfig
    from iama.rewards import Reward
    from iama.specs import PolicySpec, RewardSpec

    Floats = NDArray[np.float64]
    Advance = Callable[[int], None]


@dataclass(frozen=True)
class SampledPool:
    """A policy's samples: texts `[P][S]`, their lengths in tokens `[P, S]`, prompts' lengths and costs `[P]`.

    `keys` identify the lines (prompt, policy, sampling and seed), `truncated_PS` marks samples cut at
    `max_new_tokens`.
    """

    keys: list[str]
    texts: list[list[str]]
    lengths_PS: NDArray[np.int64]
    truncated_PS: NDArray[np.bool_]
    costs: list[Cost]

    @property
    def prefill_tokens(self) -> Floats:
        """Tokens of each prompt, `[P]`."""
        return np.asarray([cost.policy_prefill_tokens for cost in self.costs], dtype=np.float64)

    @property
    def decode_tokens(self) -> Floats:
        """Mean decode tokens (forwarded) of one sample of each prompt, `[P]`."""
        mean_P: Floats = (self.lengths_PS - 1).mean(axis=1)
        return mean_P


def pool_keys(spec: PolicySpec, name: str, rows: Sequence[dict[str, Any]], config: EvaluationConfig) -> list[str]:
    """A key a prompt: a hash of everything that determines its samples."""
    base, adapter = resolve_paths(name, spec)
    template = Path(spec.chat_template).read_text(encoding="utf-8") if spec.chat_template else None
    settings = {
        "base": fingerprint(Path(base)),
        "adapter": fingerprint(Path(adapter)) if adapter else None,
        "template": template,
        "dtype": spec.dtype,
        "sampling": config.sampling.model_dump(),
        "num_samples": config.num_samples,
        "seed": config.seed,
    }
    seen: dict[str, int] = {}
    keys = []
    for row in rows:
        prompt = json.dumps(row["prompt"], sort_keys=True)
        seen[prompt] = seen.get(prompt, 0) + 1
        keys.append(digest({**settings, "prompt": prompt, "occurrence": seen[prompt]}))
    return keys


def sample_pool(
    name: str, spec: PolicySpec, rows: Sequence[dict[str, Any]], config: EvaluationConfig, advance: Advance
) -> SampledPool:
    """A policy's pool; prompts already in its file are read, the others sampled and appended.

    `advance` is told the number of samples of each finished prompt.
    """
    path = Path(config.output_dir) / "pools" / f"{_file_name(name)}.jsonl"
    keys = pool_keys(spec, name, rows, config)
    lines = read_lines(path)
    missing = [i for i, key in enumerate(keys) if key not in lines]
    advance(config.num_samples * (len(rows) - len(missing)))
    if missing:
        policy = load_policy(name, spec, config.sampling)
        prompts_ids = [render_prompt(policy.tokenizer, row["prompt"]) for row in rows]
        streams = prompt_keys(prompts_ids)
        for index, responses, cost in iter_decode(
            policy,
            [prompts_ids[i] for i in missing],
            config.num_samples,
            config.sampling,
            seed=config.seed,
            batch_size=config.batch_size,
            keys=[streams[i] for i in missing],
        ):
            line: dict[str, Any] = {
                "key": keys[missing[index]],
                "prompt": missing[index],
                "texts": [response_text(policy, r.token_ids, config.sampling.stop) for r in responses],
                "lengths": [len(r.token_ids) for r in responses],
                "truncated": [int(r.finish_reason == "length") for r in responses],
                "cost": [cost.policy_prefill_tokens, cost.policy_decode_tokens, cost.seconds],
            }
            append_line(path, line)
            lines[line["key"]] = line
            advance(config.num_samples)
    return _as_pool([lines[key] for key in keys])


def score_pool(
    pool: SampledPool,
    policy_name: str,
    reward: Reward,
    spec: RewardSpec,
    rows: Sequence[dict[str, Any]],
    known: dict[tuple[int, str], float],
    config: EvaluationConfig,
    advance: Advance,
) -> tuple[Floats, Cost]:
    """Scores `[P, S]` of a pool, each distinct text of a prompt scored once, and what that cost.

    `known` (prompt index, text) carries scores over from other policies. A model's scores are kept on disk; a
    function's are computed afresh, since no hash could tell whether the code that it calls has changed.
    """
    reward_key = _reward_key(spec)
    path = Path(config.output_dir) / "scores" / f"{_file_name(policy_name)}.{reward_key[:12]}.jsonl"
    lines = read_lines(path) if spec.model is not None else {}
    scores_PS, total = [], Cost()
    for i, (row, texts) in enumerate(zip(rows, pool.texts, strict=True)):
        key = digest([reward_key, pool.keys[i], row])
        if key in lines:
            known.update(zip(((i, text) for text in texts), lines[key]["scores"], strict=True))
        else:
            fresh = [text for text in dict.fromkeys(texts) if (i, text) not in known]
            columns = {name: [value] * len(fresh) for name, value in row.items() if name != "prompt"}
            new, cost = reward.score([row["prompt"]] * len(fresh), fresh, columns) if fresh else ([], Cost())
            known.update(zip(((i, text) for text in fresh), new, strict=True))
            total += cost
            if spec.model is not None:
                append_line(path, {"key": key, "prompt": i, "scores": [known[i, text] for text in texts]})
        scores_PS.append([known[i, text] for text in texts])
        advance(1)
    return np.asarray(scores_PS, dtype=np.float64), total


def _as_pool(lines: list[dict[str, Any]]) -> SampledPool:
    costs = [Cost(line["cost"][0], line["cost"][1], seconds=line["cost"][2]) for line in lines]
    return SampledPool(
        keys=[line["key"] for line in lines],
        texts=[line["texts"] for line in lines],
        lengths_PS=np.asarray([line["lengths"] for line in lines], dtype=np.int64),
        truncated_PS=np.asarray([line["truncated"] for line in lines], dtype=np.bool_),
        costs=costs,
    )


def _reward_key(spec: RewardSpec) -> str:
    model = fingerprint(Path(spec.model)) if spec.model is not None else None
    scale = [spec.scale.model_dump()] if spec.scale is not None else []
    return digest([model, spec.function, spec.head, spec.sign, spec.dtype, *scale])


def _file_name(name: str) -> str:
    """A policy's name as a file name; names that would clash or leave the folder get a hash."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return safe if safe == name else f"{safe}-{digest(name)[:8]}"
