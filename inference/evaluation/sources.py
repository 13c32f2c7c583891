"""The pools that an evaluation needs: which policy answers for which criteria, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from iama.config.files import EvaluationConfig
from iama.config.specs import PolicySpec
from iama.errors import DataError
from iama.models.flops import ModelSize, size_from_folder
from iama.prompts.conversations import render_prompts
from iama.prompts.data import with_system_prompt
from iama.prompts.render import prompt_name
from inference.engine.policy import PolicyFiles, read_policy_files, resolve_paths
from inference.engine.responses import Pool
from inference.pools.file import prompt_ids
from inference.pools.fill import pool_header
from inference.pools.journal import digest

Variant = tuple[PolicySpec, str | None]


@dataclass(frozen=True)
class Source:
    """A pool that is needed: its name, the policy that it belongs to, and the criteria that it serves.

    `spec` is the model that is sampled; `stored` the pool where it was sampled already, with its prompts in the
    evaluation's order. `prompts_ids` are the token ids of the prompts as the model reads them; none of a stored pool.
    """

    name: str
    policy: str
    criteria: tuple[str, ...]
    header: dict[str, Any]
    spec: PolicySpec | None = None
    system_prompt: str | None = None
    stored: Pool | None = None
    size: ModelSize | None = None
    prompts_ids: Sequence[Sequence[int]] = field(default=(), repr=False)

    def fingerprint(self) -> str | None:
        """The policy's, where it is known."""
        known: str | None = self.header["policy"]["fingerprint"]
        return known

    @property
    def file_name(self) -> str:
        """A name that changes with everything that determines the samples."""
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.name)
        decides = {key: value for key, value in self.header.items() if key != "versions"}
        return f"{safe}-{digest([self.name, decides])[:12]}"


@dataclass(frozen=True)
class Reading:
    """How a policy reads the prompts: what its files say of it, and each prompt's token ids."""

    files: PolicyFiles
    prompts_ids: list[list[int]]

    def at(self, indices: Sequence[int]) -> Reading:
        """The same of some of the prompts."""
        return replace(self, prompts_ids=[self.prompts_ids[i] for i in indices])


def read_variants(config: EvaluationConfig, rows: Sequence[Mapping[str, Any]]) -> dict[Variant, Reading]:
    """Every prompt rendered once for each model with a system prompt, whichever policies it serves."""
    readings: dict[Variant, Reading] = {}
    for name, policy in config.policies.items():
        if policy.pool is not None:
            continue
        for spec, system in (policy.variant(criterion.name) for criterion in config.criteria):
            if (spec, system) in readings:
                continue
            files = read_policy_files(name, spec)
            prompts = [with_system_prompt(row["prompt"], system) for row in rows]
            ids = render_prompts(files.tokenizer, prompts, files.eos_token_ids, f"policy {name!r}")
            readings[spec, system] = Reading(files, ids)
    return readings


def sources_of(
    config: EvaluationConfig,
    rows: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Pool],
    readings: Mapping[Variant, Reading],
) -> list[Source]:
    """The pools of all policies: one each, or where a policy differs by criterion one for each.

    Raises `DataError` where a stored pool lacks one of the prompts.
    """
    names = tuple(criterion.name for criterion in config.criteria)
    sources = []
    for name in config.policies:
        if name in stored:
            pool = _in_order(name, rows, stored[name])
            sources.append(Source(name, name, names, pool.header, stored=pool))
        else:
            sources += _sampled(config, name, readings)
    return sources


def _sampled(config: EvaluationConfig, name: str, readings: Mapping[Variant, Reading]) -> list[Source]:
    groups: dict[Variant, list[str]] = {}
    for criterion in config.criteria:
        groups.setdefault(config.policies[name].variant(criterion.name), []).append(criterion.name)
    return [
        Source(
            name if len(groups) == 1 else f"{name}@{'+'.join(criteria)}",
            name,
            tuple(criteria),
            pool_header(name, spec, system, spec.engine, config.sampling, config.num_samples, config.seed),
            spec,
            system,
            size=_size(name, spec),
            prompts_ids=readings[spec, system].prompts_ids,
        )
        for (spec, system), criteria in groups.items()
    ]


def _size(name: str, spec: PolicySpec) -> ModelSize:
    """Of the base model, also where `path` is an adapter that names it."""
    base, _ = resolve_paths(name, spec)
    return size_from_folder(base, f"policy {name!r}", trust_remote_code=spec.trust_remote_code)


def share_random_numbers(one: Source, other: Source) -> bool:
    """Whether samples of two pools in the same place were drawn with the same random numbers, as far as is known."""
    seed = one.header.get("seed")
    return one.name == other.name or (seed is not None and seed == other.header.get("seed"))


def prompts_by_id(pool: Pool) -> Pool:
    """A pool with its prompts by their ids, of which `h-2` comes before `h-10`."""
    return Pool(pool.header, sorted(pool.prompts, key=lambda p: (len(p.prompt_id), p.prompt_id)))


def stored_rows(stored: Mapping[str, Pool]) -> list[dict[str, Any]]:
    """The prompts that all pool files answer; raises `DataError` where one has more than the first."""
    first = next(iter(stored))
    rows = [{"prompt": p.prompt, **p.columns} for p in stored[first].prompts]
    for name, pool in stored.items():
        if len(pool.prompts) > len(rows):
            raise DataError(
                f"policy {name!r}: its pool has {len(pool.prompts)} prompts, that of {first!r} has {len(rows)}; all "
                "policies must answer the same prompts"
            )
    return rows


def _in_order(name: str, rows: Sequence[Mapping[str, Any]], pool: Pool) -> Pool:
    """A stored pool with the evaluation's prompts, in their order; raises `DataError` where one is missing."""
    ids = prompt_ids(rows)
    by_id = dict(zip(prompt_ids([{"prompt": p.prompt} for p in pool.prompts]), pool.prompts, strict=True))
    missing = [row for row, prompt_id in zip(rows, ids, strict=True) if prompt_id not in by_id]
    if missing:
        raise DataError(
            f"policy {name!r}: its pool has no completions for {len(missing)} of {len(rows)} prompts, the first is "
            f"{prompt_name(missing[0]['prompt'])}; all policies must answer the same prompts"
        )
    columns = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    prompts = [replace(by_id[key], prompt_id=key, columns=c) for key, c in zip(ids, columns, strict=True)]
    return Pool(pool.header, prompts)
