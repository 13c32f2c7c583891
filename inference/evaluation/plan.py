"""What an evaluation will do: every check that needs no forward pass, and the list of pools it needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iama.config.methods import parse_guided, tuned_family
from iama.config.settings import CURVES
from iama.errors import ConfigError, DataError, RunError
from iama.prompts.data import read_prompts, with_system_prompt
from iama.prompts.render import prompt_text, render_prompt
from iama.rewards.judge import judge_plan
from inference.engine.flops import size_from_folder
from inference.engine.policy import load_tokenizer, resolve_paths
from inference.engine.responses import Pool, check_fit
from inference.evaluation.reward_checks import check_gradients, check_rewards, fits_rewards, reward_names
from inference.evaluation.summary import FILE_NAME
from inference.hedging.tuning_file import tuned_methods
from inference.pools.file import prompt_ids, read_pool
from inference.pools.fill import pool_header
from inference.pools.journal import digest
from inference.samplers.serve import needs_gradient, read_method, read_served
from inference.selection.rules import Served
from inference.statistics.break_even import TrainingRun, mean_prompt_tokens, read_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from iama.config.settings import EvaluationConfig
    from iama.config.specs import PolicySpec, RewardSpec
    from inference.engine.flops import ModelSize

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
    stored: Pool | None = None
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

    `num_samples` are used of every pool; `training` has each policy's runs, with their folders and mean prompt tokens.
    """

    rows: list[dict[str, Any]]
    dropped: int
    sources: list[Source]
    rewards: dict[RewardSpec, str]
    num_samples: int
    training: dict[str, list[tuple[Path, TrainingRun, float]]]
    tuned: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """By (policy, criterion, method) what a method such as `bon(tuned)` is there."""

    def written(self, policy: str, criterion: str, method: str) -> str:
        """A method with the number that was tuned for a policy and criterion; any other method as it is."""
        return self.tuned.get((policy, criterion, method), method)

    def source(self, policy: str, criterion: str) -> Source:
        """The pool that serves a criterion."""
        return next(s for s in self.sources if s.policy == policy and criterion in s.criteria)


def make_plan(config: EvaluationConfig) -> Plan:
    """Check prompts, methods, output folder, rewards and models; raises `IamaError`s, before anything expensive."""
    for method in config.methods:
        check_method(config, method)
    _check_folder(config)
    rewards = reward_names(config)
    stored = {name: read_pool(Path(p.pool)) for name, p in config.policies.items() if p.pool is not None}
    if config.prompts is None:  # lest resamples depend on the order of a file's lines
        stored = {name: _by_id(pool) for name, pool in stored.items()}
    rows = read_prompts(config.prompts) if config.prompts is not None else _stored_rows(stored)
    check_rewards(config, rewards, rows)
    rows, dropped = _fitting(config, rewards, rows)
    sources = [source for name in config.policies for source in _sources(config, name, rows, stored.get(name))]
    guided_by_gradient = [m for m in config.methods if is_guided(m) and needs_gradient(m, config.sampling)]
    if guided_by_gradient:
        sampled = [(source.policy, source.spec, c) for source in sources if source.spec for c in source.criteria]
        tokenizers = [(name, criterion, load_tokenizer(name, spec)[0]) for name, spec, criterion in sampled]
        check_gradients(config, guided_by_gradient, tokenizers)
    tuned = tuned_methods(config, rows, sources)
    return Plan(rows, dropped, sources, rewards, _num_samples(config, sources, tuned), _training(config), tuned)


def _by_id(pool: Pool) -> Pool:
    """Prompts by their ids, of which `h-2` comes before `h-10`."""
    return Pool(pool.header, sorted(pool.prompts, key=lambda p: (len(p.prompt_id), p.prompt_id)))


def _stored_rows(stored: dict[str, Pool]) -> list[dict[str, Any]]:
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


def _training(config: EvaluationConfig) -> dict[str, list[tuple[Path, TrainingRun, float]]]:
    """What the runs of the trained policy and the references did; raises `RunError` or `DataError` if not known."""
    policies = {name: config.policies[name] for name in (config.trained, *config.references) if name in config.policies}
    folders = {name: [Path(folder) for folder in policy.training_run] for name, policy in policies.items()}
    return {name: [(f, read_run(f), mean_prompt_tokens(f)) for f in found] for name, found in folders.items() if found}


def check_method(config: EvaluationConfig, method: str) -> None:
    """Raise `ConfigError` for a method that cannot be evaluated."""
    if method in CURVES:
        return
    if tuned_family(method) is not None:
        if config.tuning is None:
            raise ConfigError(
                f"methods: {method!r} takes its number from a file of `iama tune`; name it with "
                "tuning: FOLDER/tuning.json, or write the number"
            )
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
    """Raise `ConfigError` for a method that draws more than a quarter of a pool, where no curve is reliable."""
    draws = read_served(method).budget if method not in CURVES and not is_guided(method) else None
    if draws is not None and draws > num_samples // 4:
        raise ConfigError(
            f"methods: {method!r} keeps one of {draws:g} samples, more than a quarter of {told}; raise num_samples or "
            "lower the method's number"
        )


def is_guided(method: str) -> bool:
    """Whether a method writes its own answers, and takes none from a pool."""
    return method not in CURVES and parse_guided(method)[0] is not None


def _sources(config: EvaluationConfig, name: str, rows: list[dict[str, Any]], stored: Pool | None) -> list[Source]:
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
            size=_size(name, spec),
        )
        for (spec, system), criteria in groups.items()
    ]


def _size(name: str, spec: PolicySpec) -> ModelSize:
    """Of the base model, also where `path` is an adapter that names it."""
    base, _ = resolve_paths(name, spec)
    return size_from_folder(base, f"policy {name!r}", trust_remote_code=spec.trust_remote_code)


def _in_order(name: str, rows: list[dict[str, Any]], pool: Pool) -> Pool:
    """A stored pool with the evaluation's prompts, in their order; raises `DataError` where one is missing."""
    ids = prompt_ids(rows)
    by_id = dict(zip(prompt_ids([{"prompt": p.prompt} for p in pool.prompts]), pool.prompts, strict=True))
    missing = [row for row, own in zip(rows, ids, strict=True) if own not in by_id]
    if missing:
        raise DataError(
            f"policy {name!r}: its pool has no completions for {len(missing)} of {len(rows)} prompts, the first is "
            f"{prompt_text(missing[0]['prompt'])[:60]!r}; all policies must answer the same prompts"
        )
    columns = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    return Pool(
        pool.header, [replace(by_id[own], prompt_id=own, columns=c) for own, c in zip(ids, columns, strict=True)]
    )


def _num_samples(config: EvaluationConfig, sources: list[Source], tuned: Mapping[Any, str]) -> int:
    """Samples a prompt that are used of every pool: as many as are configured, or as the smallest stored pool has.

    Raises `ConfigError` where that is too few for the budgets.
    """
    sizes = {s.name: config.num_samples if s.stored is None else len(s.stored.prompts[0].samples) for s in sources}
    smallest = min((min(size, config.num_samples), name) for name, size in sizes.items())
    baseline = 1 if config.win_rate_baseline is None else config.win_rate_baseline.samples
    largest = max([*config.budgets, config.trained_budget, baseline])
    if largest > smallest[0] // 4:
        raise ConfigError(
            f"budget {largest} is more than a quarter of the {smallest[0]} samples a prompt in the pool of "
            f"{smallest[1]!r}, where no curve is reliable; lower budgets, trained_budget and "
            "win_rate_baseline.samples, or draw more samples"
        )
    for method in [*(m for m in config.methods if tuned_family(m) is None), *tuned.values()]:
        check_draws(method, smallest[0], f"the {smallest[0]} samples a prompt in the pool of {smallest[1]!r}")
    return smallest[0]


def _fitting(
    config: EvaluationConfig, rewards: dict[RewardSpec, str], rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """The prompts that leave every policy room for an answer and that every reward can read, and how many do not.

    Raises `DataError` for one that does not, unless such prompts are to be dropped, and where none is left.
    """
    drop = config.prompts is not None and config.prompts.too_long == "drop"
    remedy = "leave it out" + ("" if config.prompts is None else " (prompts.too_long: drop)")
    keep = fits_rewards(rewards, rows, None if drop else remedy)
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
            f"{config.sampling.max_new_tokens}, or are too long for a reward; lower it or give shorter prompts"
        )
    return kept, len(rows) - len(kept)


def _check_folder(config: EvaluationConfig) -> None:
    """Refuse a folder that holds something else, or results of another configuration, lest they be overwritten."""
    folder = Path(config.output_dir)
    if (folder / "metrics.jsonl").is_file():
        raise RunError(f"output_dir {config.output_dir!r} holds a training run; give the evaluation its own folder")
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        stored = _given(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no evaluation's, or damaged; delete it, or choose another output_dir") from error
    present = _given(config.model_dump(mode="json"))
    told = [
        f"{key} was {stored.get(key, ABSENT)!r}, is {present.get(key, ABSENT)!r}"
        for key in {**present, **stored}
        if stored.get(key, ABSENT) != present.get(key, ABSENT)
    ]
    if told:
        changes = "; ".join([*told[:3], *["..."] * bool(told[3:])])
        raise RunError(
            f"output_dir {config.output_dir!r} holds another evaluation ({changes}); "
            f"delete its {FILE_NAME} to replace it, or choose another output_dir"
        )


def _given(config: Any) -> dict[str, Any]:
    """What a configuration sets; a setting that came later is null in all that were made before."""
    return {key: value for key, value in leaves(config).items() if value is not None}


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as one level, by dotted key; a list of plain values is one value."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, item in value.items() for k, v in leaves(item, f"{key}.{name}" if key else name).items()}


def judge_lines(config: EvaluationConfig, plan: Plan) -> list[str]:
    """What each judge will be asked and what that costs at most; answers that are kept already are not counted off."""
    lines = []
    for spec, name in plan.rewards.items():
        for judge in [part.judge for part in spec.parts if part.judge is not None]:
            criteria = {c.name for c in config.criteria if spec in (c.proxy, c.gold)}
            lengths = [n for s in plan.sources if criteria & set(s.criteria) for n in _num_chars(config, plan, s)]
            lines.append(f"{name}: at most {judge_plan(judge, len(lengths), sum(lengths) / len(lengths))}")
    return lines


def _num_chars(config: EvaluationConfig, plan: Plan, source: Source) -> list[int]:
    """Characters of every prompt with its answer that are scored; answers yet to be drawn count as long as can be."""
    prompts = [len(prompt_text(row["prompt"])) for row in plan.rows]
    if source.stored is None:
        limit = CHARS_PER_TOKEN * config.sampling.max_new_tokens
        return [length + limit for length in prompts for _ in range(config.num_samples)]
    answers = [[len(text) for text in texts[: plan.num_samples]] for texts in source.stored.texts]
    return [length + answer for length, row in zip(prompts, answers, strict=True) for answer in row]


def tuned_lines(plan: Plan) -> list[str]:
    """What each method that is written `tuned` is for each policy and criterion."""
    told = plan.tuned.items()
    return [f"{policy}, {criterion}: {method} is {written}" for (policy, criterion, method), written in told]


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
    lines += tuned_lines(plan)
    if guided:
        answers = len(guided) * len(drawn) * len(plan.rows)
        lines.append(f"guided methods: at most {answers * len(config.criteria):,} answers by {', '.join(guided)}")
    return "\n".join(lines)
