"""What an evaluation will do: every check that needs no forward pass, and all that is known before the first.

`make_plan` runs once a command; whatever works on an evaluation takes its plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from iama.config.files import EvaluationConfig
from iama.config.methods import Method
from iama.config.specs import RewardSpec
from iama.errors import ConfigError, DataError, RunError
from iama.files import check_folder
from iama.models.vllm import check_sampling, check_vllm
from iama.prompts.data import PromptRows, read_prompts
from iama.reading import read_object
from inference.engine.responses import Pool, check_fit
from inference.engine.vocabulary import policy_side
from inference.evaluation.dials import Dial, read_dials, with_dials
from inference.evaluation.reward_checks import check_gradients, check_rewards, fits_rewards, reward_names
from inference.evaluation.sources import Reading, Source, Variant, prompts_by_id, read_variants, sources_of, stored_rows
from inference.evaluation.stopping_halves import check_halves
from inference.evaluation.summary import FILE_NAME
from inference.evaluation.training_cost import Training, training_runs
from inference.evaluation.tuned import tuned_methods
from inference.pools.file import read_pool
from inference.samplers.serve import (
    check_served,
    check_vllm_serves,
    files_key,
    meaning_of,
    most_draws,
    needs_gradient,
    read_method,
    served_of,
)

ABSENT = "(not set)"


@dataclass(frozen=True)
class Plan:
    """An evaluation that was checked: its configuration, prompts, pools, methods, and rewards with their names.

    `dropped` prompts were too long. `num_samples` are used of every pool. `training` has each policy's runs. Of a
    method with a dial `methods` has its points.
    """

    config: EvaluationConfig
    rows: list[dict[str, Any]]
    dropped: int
    sources: list[Source]
    rewards: dict[RewardSpec, str]
    methods: tuple[Method, ...]
    num_samples: int
    training: dict[str, list[Training]]
    tuned: dict[tuple[str, str, str], Method] = field(default_factory=dict)
    """By (policy, criterion, method as written) what a method such as `bon(tuned)` is there."""
    dials: dict[str, Dial] = field(default_factory=dict)
    """By method as `methods` names it."""

    def written(self, policy: str, criterion: str, method: Method) -> Method:
        """A method with the number that was tuned for a policy and criterion; any other method as it is."""
        return self.tuned.get((policy, criterion, method.text), method)

    def source(self, policy: str, criterion: str) -> Source:
        """The pool that serves a criterion."""
        return next(s for s in self.sources if s.policy == policy and criterion in s.criteria)


def make_plan(config: EvaluationConfig, read: Mapping[str, Pool] | None = None) -> Plan:
    """Check prompts, methods, output folder, rewards and models; raises `IamaError`s, before anything expensive.

    `read` are pools by file that were read already.
    """
    written = tuple(read_method(text) for text in config.methods)
    dials = read_dials(config, written)
    methods = with_dials(written, dials)
    for method in methods:
        _check_method(config, method)
    _check_distinct(config, methods)
    check_results(config)
    _check_engines(config)
    rewards = reward_names(config)
    files = {name: policy.pool for name, policy in config.policies.items() if policy.pool is not None}
    stored = {name: (read or {}).get(file) or read_pool(Path(file)) for name, file in files.items()}
    if config.prompts is None:  # lest resamples depend on the order of a file's lines
        stored = {name: prompts_by_id(pool) for name, pool in stored.items()}
    rows = read_prompts(config.prompts) if config.prompts is not None else stored_rows(stored)
    check_rewards(config, rewards, rows)
    readings = read_variants(config, rows)
    kept = _fitting(config, rewards, rows, readings)
    dropped, rows = len(rows) - len(kept), [rows[i] for i in kept]
    readings = {variant: reading.at(kept) for variant, reading in readings.items()}
    sources = sources_of(config, rows, stored, readings)
    _check_gradients(config, methods, sources, readings)
    _check_files(config, methods, sources)
    tuned = tuned_methods(config, methods, rows, sources)
    check_halves(methods, rows)
    num_samples = _num_samples(config, sources, [*(m for m in methods if not m.is_tuned), *tuned.values()])
    return Plan(config, rows, dropped, sources, rewards, methods, num_samples, training_runs(config), tuned, dials)


def _check_method(config: EvaluationConfig, method: Method) -> None:
    """Raise `ConfigError` for a method that cannot be evaluated."""
    if method.is_curve:
        return
    if method.is_tuned:
        if config.tuning is None:
            raise ConfigError(
                f"methods: {method.text!r} takes its number from a file of `iama tune`; name it with "
                "tuning: FOLDER/tuning.json, or write the number"
            )
        return
    check_served(method, config.sampling)
    on_vllm = next((name for name, policy in config.policies.items() if policy.engine == "vllm"), None)
    if method.is_guided and on_vllm is not None:
        check_vllm_serves(method, f"methods, policies.{on_vllm}")
    pooled = [name for name, policy in config.policies.items() if policy.pool is not None]
    if method.is_guided and pooled:
        raise ConfigError(
            f"methods: {method.text!r} writes under the reward's guidance and needs a model, but policy {pooled[0]!r} "
            "is a pool file; drop the method, or give the policy's path"
        )
    _check_draws(method, config.num_samples, f"num_samples = {config.num_samples}")


def _check_engines(config: EvaluationConfig) -> None:
    """Raise `ConfigError` where vLLM is asked for and is not installed, or would change the sampling."""
    for name, policy in config.policies.items():
        if policy.engine == "vllm":
            check_vllm(f"policies.{name}")
            check_sampling(config.sampling, f"policies.{name}, engine: vllm")


def _check_distinct(config: EvaluationConfig, methods: Sequence[Method]) -> None:
    """Raise `ConfigError` for two methods that are the same, written alike or not."""
    meanings = [meaning_of(method, config.sampling) for method in methods]
    for i, meaning in enumerate(meanings):
        if meaning in meanings[:i]:
            first = methods[meanings.index(meaning)].text
            raise ConfigError(f"methods: {methods[i].text!r} is the same as {first!r}; write it once")


def _check_draws(method: Method, num_samples: int, limit: str) -> None:
    """Raise `ConfigError` for a method that draws more than a quarter of a pool, where no curve is reliable."""
    if method.is_stopped:
        draws: float | None = most_draws(method)
    else:
        draws = None if method.is_curve or method.is_guided else served_of(method).budget
    if draws is not None and draws > num_samples // 4:
        raise ConfigError(
            f"methods: {method.text!r} keeps one of {draws:g} samples, more than a quarter of {limit}; raise "
            "num_samples or lower the method's number"
        )


def _check_gradients(
    config: EvaluationConfig,
    methods: Sequence[Method],
    sources: Sequence[Source],
    readings: Mapping[Variant, Reading],
) -> None:
    """Raise `ConfigError` where a proxy cannot guide a policy by its gradient and a method asks for that."""
    guided = [method for method in methods if needs_gradient(method, config.sampling)]
    policies = [
        (criterion, policy_side(source.policy, files.tokenizer, files.eos_token_ids))
        for source in sources
        if source.spec is not None
        for files in [readings[source.spec, source.system_prompt].files]
        for criterion in source.criteria
    ]
    check_gradients(config.criteria, guided, policies)


def _check_files(config: EvaluationConfig, methods: Sequence[Method], sources: Sequence[Source]) -> None:
    """Raise `ModelError` where a method lacks what it reads for a policy and a criterion."""
    for method, source in product((method for method in methods if method.is_guided), sources):
        for criterion in source.criteria:
            files_key(method, config.sampling, source.policy, source.fingerprint, criterion)


def _num_samples(config: EvaluationConfig, sources: Sequence[Source], methods: Sequence[Method]) -> int:
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
    for method in methods:
        _check_draws(method, smallest[0], f"the {smallest[0]} samples a prompt in the pool of {smallest[1]!r}")
    return smallest[0]


def _fitting(
    config: EvaluationConfig,
    rewards: Mapping[RewardSpec, str],
    rows: PromptRows,
    readings: Mapping[Variant, Reading],
) -> list[int]:
    """Indices of the prompts that leave every policy room for an answer and that every reward can read.

    Raises `DataError` for one that does not, unless such prompts are to be dropped, and where none is left.
    """
    drop = config.prompts is not None and config.prompts.too_long == "drop"
    remedy = "leave it out" + ("" if config.prompts is None else " (prompts.too_long: drop)")
    keep = fits_rewards(rewards, rows, None if drop else remedy)
    for name, policy in config.policies.items():
        variants = [] if policy.path is None else [policy.variant(criterion.name) for criterion in config.criteria]
        for reading in (readings[variant] for variant in dict.fromkeys(variants)):
            files = reading.files
            if not drop:
                check_fit(name, files.tokenizer, files.context_length, reading.prompts_ids, config.sampling)
            elif files.context_length is not None:
                room = files.context_length - config.sampling.max_new_tokens
                keep = [fits and len(ids) <= room for fits, ids in zip(keep, reading.prompts_ids, strict=True)]
    kept = [i for i, fits in enumerate(keep) if fits]
    if not kept:
        raise DataError(
            f"all {len(rows)} prompts leave some policy no room for sampling.max_new_tokens = "
            f"{config.sampling.max_new_tokens}, or are too long for a reward; lower it or give shorter prompts"
        )
    return kept


def check_results(config: EvaluationConfig) -> None:
    """Refuse a folder that holds something else, or results of another configuration, lest they be overwritten."""
    folder = Path(config.output_dir)
    check_folder(folder, "output_dir")
    if (folder / "metrics.jsonl").is_file():
        raise RunError(f"output_dir {config.output_dir!r} holds a training run; give the evaluation its own folder")
    path = folder / FILE_NAME
    if not path.is_file():
        return
    remedy = "no evaluation's, or damaged; delete it, or choose another output_dir"
    written = read_object(path, RunError, remedy).get("config")
    if not isinstance(written, dict):
        raise RunError(f"{path}: {remedy}")
    stored = _given(written)
    present = _given(config.model_dump(mode="json"))
    stored["output_dir"] = present["output_dir"]  # the folder may have been moved
    changes = [
        f"{key} was {stored.get(key, ABSENT)!r}, is {present.get(key, ABSENT)!r}"
        for key in {**present, **stored}
        if _in_any_order(key, stored.get(key, ABSENT)) != _in_any_order(key, present.get(key, ABSENT))
    ]
    if changes:
        listed = "; ".join([*changes[:3], *["..."] * bool(changes[3:])])
        raise RunError(
            f"output_dir {config.output_dir!r} holds another evaluation ({listed}); "
            f"delete its {FILE_NAME} to replace it, or choose another output_dir"
        )


def _in_any_order(key: str, value: Any) -> Any:
    """A setting as it is compared: numbers of samples and the values of a dial mean the same in any order."""
    return sorted(value, key=str) if key.partition(".")[0] == "budgets" and isinstance(value, list) else value


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
