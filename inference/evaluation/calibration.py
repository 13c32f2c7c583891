"""From pools of samples with proxy and gold scores to what `tuning.json` holds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from iama.arrays import Floats, Mask
from iama.config.files import EvaluationConfig
from iama.config.methods import Tunable, written_tuned
from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaError, IamaWarning
from iama.objective.operators import identity
from iama.prompts.render import Prompt, prompt_name
from inference.engine.responses import Pool
from inference.evaluation.evaluate import evaluate_pools
from inference.evaluation.from_pools import GOLD
from inference.evaluation.plan import Plan
from inference.evaluation.provenance import versions
from inference.evaluation.rows.values import pool_values
from inference.hedging.guarantee import pool_proxy_gain, safe_samples, within_prompt_correlation
from inference.hedging.tune import tune
from inference.hedging.tuning_file import (
    Calibration,
    Report,
    TunedCriterion,
    TunedMethod,
    Tuning,
    gold_key,
    order_key,
    text_id,
)
from inference.pools.file import prompt_ids, read_pool
from inference.pools.format import HeaderPolicy
from inference.pools.score import score_pool
from inference.samplers.serve import read_method, served_of
from inference.selection.rules import Served
from inference.statistics.bootstrap import MIN_PROMPTS, Interval, mean_interval, percentile_interval, prompt_weights


@dataclass(frozen=True)
class Scored:
    """A policy's samples of prompts with a criterion's scores `[P, S]`, NaN where one is missing."""

    header: dict[str, Any]
    criterion: TunedCriterion
    ids: list[str]
    """Of the prompts (`inference.pools.file.prompt_ids`)."""
    prompts: list[Prompt]
    proxy_PS: Floats
    gold_PS: Floats
    report_PS: Floats | None
    generation_seconds: float | None

    @property
    def name(self) -> str:
        """For people."""
        return f"policy {self.header['policy']['name']!r}, criterion {self.criterion.name!r}"


@dataclass(frozen=True)
class ColumnNames:
    """Names of columns of a pool file that do not follow the convention."""

    proxy: str | None = None
    gold: str | None = None
    report: str | None = None


# Where scores come from. --------------------------------------------------------------------------------


def scored_files(paths: Sequence[Path], criteria: Sequence[str], columns: ColumnNames) -> list[Scored]:
    """Of pool files, by criterion; without any named, by every column that has a gold column beside it.

    Raises `ConfigError` where columns are missing or one stands for two things, and what `read_pool` raises.
    """
    given = columns.proxy or columns.gold or columns.report
    if given and len(criteria) > 1:
        raise ConfigError(f"column {given!r} is given for {len(criteria)} criteria; tune one of them at a time")
    scored = []
    for path in paths:
        pool = read_pool(path)
        pool_ids = prompt_ids([{"prompt": p.prompt} for p in pool.prompts])
        # By their ids, lest resamples depend on the order of a file's lines.
        order = sorted(range(len(pool_ids)), key=pool_ids.__getitem__)
        pool = Pool(pool.header, [pool.prompts[i] for i in order])
        names = list(criteria) or ([columns.proxy] if columns.proxy else _conventional(path, pool, columns))
        ids = [pool_ids[i] for i in order]
        scored += [_of_columns(path, pool, name, columns, ids) for name in names]
    return scored


def _conventional(path: Path, pool: Pool, columns: ColumnNames) -> list[str]:
    there = list(pool.prompts[0].samples[0].scores)
    names = [name for name in there if name + GOLD in there]
    if not names:
        raise ConfigError(
            f"{path}: no criterion has gold scores, without which nothing can be tuned (columns: "
            f"{', '.join(there) or 'none'}); add them with `iama score {path} --column NAME{GOLD}`, or name the "
            "columns with --proxy-column and --gold-column"
        )
    if len(names) > 1 and (columns.gold or columns.report):
        raise ConfigError(f"{path}: --gold-column and --report-column need --criterion, one of {', '.join(names)}")
    return names


def _of_columns(path: Path, pool: Pool, name: str, columns: ColumnNames, ids: list[str]) -> Scored:
    proxy, gold = columns.proxy or name, columns.gold or name + GOLD
    there = list(pool.prompts[0].samples[0].scores)
    used = [column for column in (proxy, gold, columns.report) if column is not None]
    for column in used:
        if column not in there:
            role = "proxy" if column == proxy else "gold" if column == gold else "report"
            raise ConfigError(
                f"{path}: criterion {name!r} has no {role} scores: there is no column {column!r}, only "
                f"{', '.join(there) or 'none'}; add it with `iama score {path} --column {column}`, or name another "
                f"with --{role}-column"
            )
    if len(set(used)) < len(used):
        raise ConfigError(f"{path}: criterion {name!r} uses a column twice ({', '.join(used)}); give each its own")
    specs = [RewardSpec(column=column) for column in used]
    values = [score_pool(pool, None, spec, path, None, lambda _: None).values_PS for spec in specs]
    return Scored(
        header=pool.header,
        criterion=_criterion(name, *specs),
        ids=ids,
        prompts=[prompt.prompt for prompt in pool.prompts],
        proxy_PS=values[0],
        gold_PS=values[1],
        report_PS=values[2] if columns.report is not None else None,
        generation_seconds=_seconds(pool),
    )


def scored_by_plan(plan: Plan, console: Console | None = None) -> list[Scored]:
    """Of the policies of a plan `for_tuning`, drawn and scored as `iama evaluate` does it, into its folder.

    A killed run goes on where it was. An `IamaWarning` tells of a noisy judge, one set of whose answers both chooses
    and reports. Raises what `evaluate` raises.
    """
    _warn_of_noisy_gold(plan.config)
    evaluation = evaluate_pools(plan, console)
    ids, prompts = prompt_ids(plan.rows), [row["prompt"] for row in plan.rows]
    scored = []
    for source in plan.sources:
        for criterion in (c for c in plan.config.criteria if c.name in source.criteria):
            proxy_PS, gold_PS = evaluation.scores_of(source.policy, criterion)
            assert criterion.gold is not None
            assert gold_PS is not None
            tuned = _criterion(criterion.name, criterion.proxy, criterion.gold)
            seconds = _seconds(evaluation.measured.pools[source.name])
            scored.append(Scored(source.header, tuned, ids, prompts, proxy_PS, gold_PS, None, seconds))
    return scored


def for_tuning(config: EvaluationConfig, out: Path) -> EvaluationConfig:
    """An evaluation's pools only, in a folder of their own; raises `ConfigError` for a criterion without gold."""
    for criterion in config.criteria:
        if criterion.gold is None:
            raise ConfigError(
                f"criterion {criterion.name!r} has no gold reward, without which nothing can be tuned; give it one, or "
                "choose others with --criterion"
            )
    return config.model_copy(update={"output_dir": str(out), "methods": ["bon"], "tuning": None})


def _warn_of_noisy_gold(config: EvaluationConfig) -> None:
    for criterion in config.criteria:
        judges = [] if criterion.gold is None else [part.judge for part in criterion.gold.parts]
        noisy = next((judge for judge in judges if judge is not None and judge.used_temperature > 0), None)
        if noisy is not None:
            warnings.warn(
                f"criterion {criterion.name!r}: its gold judge answers at temperature {noisy.used_temperature:g}, and "
                "the same answers choose the setting and report its gold, which they overstate; score a pool with two "
                "draws of the judge, and tune with --pool, --gold-column and --report-column",
                IamaWarning,
                stacklevel=3,
            )


def _criterion(name: str, proxy: RewardSpec, gold: RewardSpec, report: RewardSpec | None = None) -> TunedCriterion:
    keys = {"proxy_key": order_key(proxy), "gold_key": gold_key(gold)}
    return TunedCriterion(name=name, proxy=proxy, gold=gold, report=report, **keys)


def _seconds(pool: Pool) -> float | None:
    return sum(prompt.cost.seconds for prompt in pool.prompts) or None


# Tuning. ------------------------------------------------------------------------------------------------


def tuning_of(
    pools: Sequence[Scored], tunables: Sequence[Tunable], *, max_budget: int | None, num_bootstrap: int, seed: int
) -> Tuning:
    """Every method tuned on every pool; raises `DataError` or `ConfigError`, with the policy and criterion named."""
    keys = [(*_policy_key(pool), pool.criterion.name) for pool in pools]
    twice = next((pool for i, pool in enumerate(pools) if keys[i] in keys[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice.name}: given twice; put the parts of a pool together with `iama merge`")
    calibrations = [
        calibrate(pool, tunables, max_budget=max_budget, num_bootstrap=num_bootstrap, seed=seed) for pool in pools
    ]
    return Tuning(seed=seed, num_bootstrap=num_bootstrap, versions=versions(), calibrations=calibrations)


def _policy_key(pool: Scored) -> tuple[Any, ...]:
    policy = pool.header["policy"]
    return policy["name"], policy["fingerprint"], pool.header["system_prompt"], str(pool.header["sampling"])


def calibrate(
    pool: Scored, tunables: Sequence[Tunable], *, max_budget: int | None, num_bootstrap: int, seed: int
) -> Calibration:
    """Every method tuned on one pool.

    A sample without one of its scores is left out, a prompt that has less than half of its samples left is left out
    whole, with an `IamaWarning`. Raises `DataError` or `ConfigError` as `tune` does.
    """
    known_PS = _known(pool)
    kept_P = _kept(pool.name, known_PS)
    kept = np.flatnonzero(kept_P).tolist()
    num_known_P = known_PS[kept_P].sum(axis=1)
    fewest = int(num_known_P.min())
    _check_size(pool.name, fewest, tunables, max_budget)
    if max_budget is None:
        _warn_of_the_fewest(pool, kept[int(num_known_P.argmin())], fewest)
    proxy_PS, gold_PS = (np.where(known_PS, values_PS, np.nan)[kept_P] for values_PS in (pool.proxy_PS, pool.gold_PS))
    report_PS = None if pool.report_PS is None else pool.report_PS[kept_P]
    limit = fewest // 4 if max_budget is None else max_budget
    try:
        correlation = within_prompt_correlation(proxy_PS, gold_PS)
        interval = correlation_interval(proxy_PS, gold_PS, num_bootstrap, seed)
        safe = safe_samples(min(correlation, interval[0]), pool_proxy_gain(proxy_PS, limit))
        scores = (proxy_PS, gold_PS, report_PS)
        methods = {
            written_tuned(tunable): _tuned(*scores, tunable, max_budget, num_bootstrap, seed) for tunable in tunables
        }
    except IamaError as error:
        raise type(error)(f"{pool.name}: {error}") from error
    header = pool.header
    return Calibration(
        policy=HeaderPolicy.model_validate(header["policy"]),
        system_prompt=header["system_prompt"],
        sampling=None if header["sampling"] is None else Sampling.model_validate(header["sampling"]),
        criterion=pool.criterion,
        prompt_ids=[pool.ids[i] for i in kept],
        text_ids=[text_id(pool.prompts[i]) for i in kept],
        num_left_out=int((~kept_P).sum()),
        num_missing=int((~known_PS[kept_P]).sum()),
        num_samples=known_PS.shape[1],
        correlation=correlation,
        correlation_ci95=interval,
        safe_samples=safe,
        safe_searched=limit,
        generation_seconds=pool.generation_seconds,
        methods=methods,
    )


def correlation_interval(proxy_PS: Floats, gold_PS: Floats, num_bootstrap: int, seed: int) -> Interval:
    """95 % of `within_prompt_correlation`, prompts resampled; both scores `[P, S]` are NaN where one is missing.

    A replicate in which no prompt's proxy or gold differs counts as no correlation.
    """
    proxy_PS, gold_PS = (scores - np.nanmean(scores, axis=1, keepdims=True) for scores in (proxy_PS, gold_PS))
    degrees_P = np.isfinite(proxy_PS).sum(axis=1) - 1
    pairs = ((proxy_PS, gold_PS), (proxy_PS, proxy_PS), (gold_PS, gold_PS))
    moments_P3 = np.stack([np.nansum(one * other, axis=1) / degrees_P for one, other in pairs], axis=1)
    shared_B, proxy_B, gold_B = (prompt_weights(len(proxy_PS), num_bootstrap, seed) @ moments_P3).T
    scale_B = np.sqrt(proxy_B * gold_B)
    low, high = percentile_interval(np.where(scale_B > 0, shared_B / np.where(scale_B > 0, scale_B, 1.0), 0.0))
    return max(low, -1.0), min(high, 1.0)


def _check_size(where: str, num_known: int, tunables: Sequence[Tunable], max_budget: int | None) -> None:
    """Raise `DataError` for more draws than the scored samples of a prompt allow."""
    if num_known < 8:
        raise DataError(f"{where}: a prompt has {num_known} samples with all scores; at least 8 are needed, better 64")
    if max_budget is not None and max_budget > num_known:
        raise DataError(f"{where}: --max-budget {max_budget} is more than the {num_known} scored samples of a prompt")
    limit = num_known // 4 if max_budget is None else max_budget
    for name, num_draws in tunables:
        if num_draws is not None and num_draws > limit:
            bound = f"--max-budget {limit}"
            if max_budget is None:
                bound = f"{limit}, a quarter of the {num_known} scored samples of a prompt, where estimates turn noisy"
            raise DataError(
                f"{where}: {name}({num_draws}) draws more than {bound}; write fewer draws, score more samples, or "
                "raise --max-budget"
            )


def _warn_of_the_fewest(pool: Scored, index: int, num_known: int) -> None:
    """Warn where one prompt's missing scores make every prompt's search shorter."""
    num_samples = pool.proxy_PS.shape[1]
    if num_known // 4 < num_samples // 4:
        warnings.warn(
            f"{pool.name}: the prompt {prompt_name(pool.prompts[index])} has all scores for {num_known} of "
            f"{num_samples} samples only, so that at most {num_known // 4} draws are tried instead of "
            f"{num_samples // 4}; add its scores, or leave it out",
            IamaWarning,
            stacklevel=3,
        )


def _tuned(
    proxy_PS: Floats,
    gold_PS: Floats,
    report_PS: Floats | None,
    tunable: Tunable,
    max_budget: int | None,
    num_bootstrap: int,
    seed: int,
) -> TunedMethod:
    """One method's setting, with what other gold scores say of it."""
    name, num_draws = tunable
    start = time.perf_counter()
    result = tune(
        proxy_PS, gold_PS, name, num_draws=num_draws, max_budget=max_budget, num_bootstrap=num_bootstrap, seed=seed
    )
    seconds = time.perf_counter() - start
    served = served_of(read_method(result.written))
    report = None if report_PS is None else _report(proxy_PS, report_PS, served, num_bootstrap, seed)
    assert served.budget is not None
    return TunedMethod(result=result, draws=served.budget, report=report, seconds=seconds)


def _kept(where: str, known_PS: Mask) -> Mask:
    """Prompts with all scores for half of their samples or more; `DataError` for too few, a warning for any."""
    kept_P: Mask = 2 * known_PS.sum(axis=1) >= known_PS.shape[1]
    if kept_P.sum() < MIN_PROMPTS:
        raise DataError(
            f"{where}: {kept_P.sum()} of {len(kept_P)} prompts have scores for half of their samples or more, and at "
            f"least {MIN_PROMPTS} are needed; add the missing proxy or gold scores, or more prompts"
        )
    if not kept_P.all():
        message = f"{where}: {(~kept_P).sum()} of {len(kept_P)} prompts have scores for less than half of their samples"
        warnings.warn(f"{message} and are left out", IamaWarning, stacklevel=3)
    return kept_P


def _known(pool: Scored) -> Mask:
    """Which samples have all their scores."""
    known_PS = ~(np.isnan(pool.proxy_PS) | np.isnan(pool.gold_PS))
    return known_PS if pool.report_PS is None else known_PS & ~np.isnan(pool.report_PS)


def _report(proxy_PS: Floats, report_PS: Floats, served: Served, num_bootstrap: int, seed: int) -> Report:
    """Other gold scores at the setting that was chosen, and for a single sample."""
    single_P, chosen_P = pool_values(proxy_PS, report_PS, [identity(), served]).T
    gain = mean_interval(chosen_P - single_P, num_bootstrap=num_bootstrap, seed=seed)
    assert gain is not None
    assert gain.ci95 is not None  # there are enough prompts, or `_kept` has refused them
    return Report(gold=float(chosen_P.mean()), single=float(single_P.mean()), gain_ci95=gain.ci95)
