"""What an evaluation will do: every check that needs no forward pass, and the list of pools it needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iama.config import CURVES
from iama.data import read_prompts, with_system_prompt
from iama.errors import ConfigError, DataError, RunError
from iama.judges import judge_plan
from iama.methods import parse_guided
from iama.operators import parse_operator
from iama.render import prompt_text, render_prompt
from iama.rewards import check_reward
from inference.break_even import TrainingRun, mean_prompt_tokens, read_run
from inference.decode import check_fit
from inference.flops import size_from_folder
from inference.policy import load_tokenizer
from inference.pool_file import PoolFile, prompt_ids, read_pool
from inference.pools import pool_header
from inference.samplers import Served
from inference.serving import read_method
from inference.store import digest
from inference.summary import FILE_NAME

if TYPE_CHECKING:
    from iama.config import EvaluationConfig, EvaluationCriterion
    from iama.specs import PolicySpec, RewardSpec
    from inference.flops import ModelSize

ABSENT = "(not set)"
CHARS_PER_TOKEN = 4


@dataclass(frozen=True)
class Source:
    """A pool that is needed: its name, the policy that it belongs to, and the criteria that it serves.

    `spec` is the model that is sampled; `stored` the pool where it was sampled already, with its prompts in the
    evaluation's order.
    """

    name: str
    policy: str
    criteria: tuple[str, ...]
    header: dict[str, Any]
    spec: PolicySpec | None = None
    system_prompt: str | None = None
    stored: PoolFile | None = None
    size: ModelSize | None = None

    @property
    def file_name(self) -> str:
        """A name that changes with everything that determines the samples."""
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.name)
        decides = {key: value for key, value in self.header.items() if key != "versions"}
        return f"{safe}-{digest([self.name, decides])[:12]}"


@dataclass(frozen=True)
class Plan:
    """Prompts, pools, and the rewards by specification with their names; `dropped` prompts were too long.

    `num_samples` is what every pool has; `training` the runs that made the trained policy, with mean prompt tokens.
    """

    rows: list[dict[str, Any]]
    dropped: int
    sources: list[Source]
    rewards: dict[RewardSpec, str]
    num_samples: int
    training: list[tuple[TrainingRun, float]]

    def source(self, policy: str, criterion: str) -> Source:
        """The pool that serves a criterion."""
        return next(s for s in self.sources if s.policy == policy and criterion in s.criteria)


def make_plan(config: EvaluationConfig) -> Plan:
    """Check prompts, methods, output folder, rewards and models; raises `IamaError`s, before anything expensive."""
    _check_folder(config)
    for method in config.methods:
        check_method(config, method)
    rewards = _reward_names(config)
    stored = {name: read_pool(Path(p.pool)) for name, p in config.policies.items() if p.pool is not None}
    rows = read_prompts(config.prompts) if config.prompts is not None else _stored_rows(stored)
    for spec, reward_name in rewards.items():
        _check_reward(config, reward_name, spec)
    rows, dropped = _fitting(config, rows)
    sources = [source for name in config.policies for source in _sources(config, name, rows, stored.get(name))]
    return Plan(rows, dropped, sources, rewards, _num_samples(config, sources), _training(config))


def _stored_rows(stored: dict[str, PoolFile]) -> list[dict[str, Any]]:
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


def _training(config: EvaluationConfig) -> list[tuple[TrainingRun, float]]:
    """What the trained policy's runs did; raises `RunError` and `DataError` where that cannot be told."""
    policy = config.policies.get(config.trained)
    folders = [] if policy is None else [Path(folder) for folder in policy.training_run]
    return [(read_run(folder), mean_prompt_tokens(folder)) for folder in folders]


def check_method(config: EvaluationConfig, method: str) -> None:
    """Raise `ConfigError` for a method that cannot be evaluated."""
    if method in CURVES:
        return
    read = read_method(method, config.sampling)
    pooled = [name for name, policy in config.policies.items() if policy.pool is not None]
    if not isinstance(read, Served) and pooled:
        raise ConfigError(
            f"methods: {method!r} writes under the reward's guidance and needs a model, but policy {pooled[0]!r} is a "
            "pool file; drop the method, or give the policy's path"
        )
    check_draws(method, config.num_samples, f"num_samples = {config.num_samples}")


def check_draws(method: str, num_samples: int, told: str) -> None:
    """Raise `ConfigError` for an operator that draws more than a quarter of a pool, where no curve is reliable."""
    draws = parse_operator(method).budget if method not in CURVES and not is_guided(method) else None
    if draws is not None and draws > num_samples // 4:
        raise ConfigError(
            f"methods: {method!r} keeps one of {draws:g} samples, more than a quarter of {told}; raise num_samples or "
            "lower the method's number"
        )


def is_guided(method: str) -> bool:
    """Whether a method writes its own answers, and takes none from a pool."""
    return method not in CURVES and parse_guided(method)[0] is not None


def prompt_keys_of(rows: list[dict[str, Any]]) -> list[str]:
    """Prompts as text, equal ones told apart by their occurrence."""
    seen: dict[str, int] = {}
    keys = []
    for row in rows:
        text = json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)
        seen[text] = seen.get(text, 0) + 1
        keys.append(f"{seen[text]} {text}")
    return keys


def _sources(config: EvaluationConfig, name: str, rows: list[dict[str, Any]], stored: PoolFile | None) -> list[Source]:
    """The pools of a policy: one, or where it differs by criterion one for each."""
    policy = config.policies[name]
    names = tuple(c.name for c in config.criteria)
    if stored is not None:
        return [Source(name, name, names, stored.header, stored=_in_order(name, rows, stored))]
    groups: dict[tuple[PolicySpec, str | None], list[str]] = {}
    for criterion in names:
        groups.setdefault(policy.variant(criterion), []).append(criterion)
    return [
        Source(
            name if len(groups) == 1 else f"{name}@{'+'.join(criteria)}",
            name,
            tuple(criteria),
            pool_header(name, spec, system, "transformers", config.sampling, config.num_samples, config.seed),
            spec,
            system,
            size=size_from_folder(spec.path, f"policy {name!r}", trust_remote_code=spec.trust_remote_code),
        )
        for (spec, system), criteria in groups.items()
    ]


def _in_order(name: str, rows: list[dict[str, Any]], pool: PoolFile) -> PoolFile:
    """A stored pool with the evaluation's prompts, in their order; raises `DataError` where one is missing."""
    by_key = dict(zip(prompt_keys_of([{"prompt": p.prompt} for p in pool.prompts]), pool.prompts, strict=True))
    missing = [row for row, key in zip(rows, prompt_keys_of(rows), strict=True) if key not in by_key]
    if missing:
        raise DataError(
            f"policy {name!r}: its pool has no completions for {len(missing)} of {len(rows)} prompts, the first is "
            f"{prompt_text(missing[0]['prompt'])[:60]!r}; all policies must answer the same prompts"
        )
    ids = prompt_ids(rows)
    columns = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    found = [by_key[key] for key in prompt_keys_of(rows)]
    return PoolFile(
        pool.header, [replace(p, prompt_id=i, columns=c) for p, i, c in zip(found, ids, columns, strict=True)]
    )


def _num_samples(config: EvaluationConfig, sources: list[Source]) -> int:
    """Samples a prompt that every pool has; raises `ConfigError` where a stored pool is too small for the budgets."""
    smallest = min(
        (len(s.stored.prompts[0].samples) if s.stored is not None else config.num_samples, s.name) for s in sources
    )
    baseline = 1 if config.win_rate_baseline is None else config.win_rate_baseline.samples
    largest = max([*config.budgets, config.trained_budget, baseline])
    if largest > smallest[0] // 4:
        raise ConfigError(
            f"budget {largest} is more than a quarter of the {smallest[0]} samples a prompt in the pool of "
            f"{smallest[1]!r}, where no curve is reliable; lower budgets, trained_budget and "
            "win_rate_baseline.samples, or draw more samples"
        )
    for method in config.methods:
        check_draws(method, smallest[0], f"the {smallest[0]} samples a prompt in the pool of {smallest[1]!r}")
    return smallest[0]


def _fitting(config: EvaluationConfig, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The prompts that leave every policy room for an answer, and how many do not; `DataError` unless to be dropped."""
    keep = [True] * len(rows)
    drop = config.prompts is not None and config.prompts.too_long == "drop"
    for name, policy in config.policies.items():
        if policy.pool is not None:
            continue
        for spec, system in dict.fromkeys(policy.variant(c.name) for c in config.criteria):
            tokenizer, context_length = load_tokenizer(name, spec)
            ids = [render_prompt(tokenizer, with_system_prompt(row["prompt"], system)) for row in rows]
            if not drop:
                check_fit(name, tokenizer, context_length, ids, config.sampling)
            elif context_length is not None:
                room = context_length - config.sampling.max_new_tokens
                keep = [fits and len(row) <= room for fits, row in zip(keep, ids, strict=True)]
    kept = [row for row, fits in zip(rows, keep, strict=True) if fits]
    if not kept:
        raise DataError(
            f"all {len(rows)} prompts leave some policy no room for sampling.max_new_tokens = "
            f"{config.sampling.max_new_tokens}; lower it or give shorter prompts"
        )
    return kept, len(rows) - len(kept)


def _check_reward(config: EvaluationConfig, name: str, spec: RewardSpec) -> None:
    if spec.column is None:
        check_reward(name, spec)
        return
    sampled = [policy for policy, p in config.policies.items() if p.pool is None]
    if sampled:
        raise ConfigError(
            f"reward {name!r} is the column {spec.column!r} of a pool file, but policy {sampled[0]!r} is a model that "
            "has yet to be sampled; give a reward that can score it"
        )


def _reward_names(config: EvaluationConfig) -> dict[RewardSpec, str]:
    """Every distinct reward once with its name, so that a spec shared by criteria is loaded and scored once."""
    names: dict[RewardSpec, str] = {}
    for criterion in config.criteria:
        _check_winners_curse(criterion)
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                names.setdefault(spec, f"{criterion.name} ({role})")
    return names


def _check_winners_curse(criterion: EvaluationCriterion) -> None:
    """Selecting and reporting by the same noisy answers would overstate what was selected."""
    judge = criterion.proxy.judge
    if judge is not None and judge.temperature > 0 and criterion.gold == criterion.proxy:
        raise ConfigError(
            f"criterion {criterion.name!r}: proxy and gold are the same answers of a judge at temperature "
            f"{judge.temperature:g}, which overstates what it selects; set gold.judge.draw: 1"
        )


def _check_folder(config: EvaluationConfig) -> None:
    """Refuse a folder that holds something else, or results of another configuration, lest they be overwritten."""
    folder = Path(config.output_dir)
    if (folder / "metrics.jsonl").is_file():
        raise RunError(f"output_dir {config.output_dir!r} holds a training run; give the evaluation its own folder")
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        stored = leaves(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no evaluation's, or damaged; choose another output_dir or delete it") from error
    present = leaves(config.model_dump(mode="json"))
    told = [
        f"{key} was {stored.get(key, ABSENT)!r}, is {present.get(key, ABSENT)!r}"
        for key in {**present, **stored}
        if stored.get(key, ABSENT) != present.get(key, ABSENT)
    ]
    if told:
        changes = "; ".join([*told[:3], *["..."] * bool(told[3:])])
        raise RunError(
            f"output_dir {config.output_dir!r} holds another evaluation ({changes}); "
            f"choose another output_dir, or delete its {FILE_NAME} to replace it"
        )


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as one level, by dotted key; a list of plain values is one value."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, item in value.items() for k, v in leaves(item, f"{key}.{name}" if key else name).items()}


def judge_lines(config: EvaluationConfig, plan: Plan) -> list[str]:
    """What each judge will be asked and what that costs at most; answers that are kept already are not counted off."""
    texts = [prompt_text(row["prompt"]) for row in plan.rows]
    mean_chars = sum(map(len, texts)) / len(texts) + CHARS_PER_TOKEN * config.sampling.max_new_tokens
    lines = []
    for spec, name in plan.rewards.items():
        if spec.judge is not None:
            judged = sum(
                any(spec in (c.proxy, c.gold) and c.name in s.criteria for c in config.criteria) for s in plan.sources
            )
            number = len(plan.rows) * plan.num_samples * judged
            lines.append(f"{name}: at most {judge_plan(spec.judge, number, mean_chars)}")
    return lines


def describe(config: EvaluationConfig, plan: Plan) -> str:
    """The plan of an evaluation with an estimate of its cost, for `--dry-run`."""
    drawn = [source for source in plan.sources if source.stored is None]
    num = len(plan.rows) * config.num_samples
    guided = [method for method in config.methods if is_guided(method)]
    lines = [
        f"{config.name}: {len(config.policies)} policies ({', '.join(config.policies)}) x {len(plan.rows)} prompts, "
        f"criteria {', '.join(c.name for c in config.criteria)}, methods {', '.join(config.methods)}, budgets "
        f"{config.budgets}; into {config.output_dir}",
        f"to sample: {len(drawn)} pools of {num} responses, {num * len(drawn)} in all, at most "
        f"{num * len(drawn) * config.sampling.max_new_tokens:,} tokens",
        f"to score: at most {num * len(plan.sources):,} texts with each of {len(plan.rewards)} rewards",
    ]
    if plan.dropped:
        lines.append(f"{plan.dropped} prompts are too long and are left out")
    lines += judge_lines(config, plan)
    if guided:
        answers = len(guided) * len(drawn) * len(plan.rows)
        lines.append(f"guided methods: at most {answers * len(config.criteria):,} answers by {', '.join(guided)}")
    return "\n".join(lines)
