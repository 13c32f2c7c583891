"""Finished evaluations that differ in their seeds, as one: the numbers that their tables of values give together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.errors import RunError
from inference.evaluation.compare import combine_runs, quality_intervals
from inference.evaluation.question import Question
from inference.evaluation.summary import FILE_NAME, Summary, load_summary, save_summary
from inference.evaluation.tables import FILE_NAME as TABLES_NAME
from inference.evaluation.tables import Tables, load_tables
from inference.statistics.bootstrap import interval_row
from inference.statistics.recommend import key_of
from inference.statistics.savings import Difference, paired_difference
from inference.statistics.summary_rows import ConstantRow, Costs, CurveExtras, CurveRow, MissingRow, QualityRow

ALIKE = ("trained", "references", "policies", "criteria", "methods", "trained_budget", "num_samples")
"""What evaluations that are combined have in common."""
FREE: dict[str, frozenset[str]] = {
    "prompts": frozenset(),
    "sampling": frozenset(),
    "num_answers": frozenset(),
    "policies": frozenset({"path", "adapter", "pool", "training_run", "chat_template", "device", "trust_remote_code"}),
    "criteria": frozenset(
        {"device", "batch_size", "url", "cache", "concurrency", "num_retries", "timeout_s", "api_key_env"}
        | {"input_price", "output_price", "draw"}
    ),
}
"""Settings that they have in common, and what within each may differ: where things lie, and which draw of a judge."""


def combine_evaluations(folders: Sequence[Path]) -> Summary:
    """The summary of several seeds, one folder each.

    Savings and differences are those of `combine_runs`; curves and quality are means over seeds, with intervals over
    seeds and prompts. What one seed alone can tell is left empty: hacking, controls, win rates, recommendations, the
    break-even, the headroom, samples, costs of scoring and examples. Settings that differ stand in `config` as a list,
    a value a seed. Raises `RunError` where a folder holds no evaluation, or one that does not go with the first.
    """
    summaries = [load_summary(folder) for folder in folders]
    _check_alike(folders, summaries)
    prompts = {s.get("prompts_digest") for s in summaries}
    same_prompts = len(prompts) == 1 and None not in prompts
    distinct = [s.get("num_distinct_prompts", s["num_prompts"]) for s in summaries]
    seen = [s.get("num_seen_prompts") for s in summaries]
    first, config = summaries[0], summaries[0]["config"]
    question = Question(
        first["trained_budget"],
        first["trained"],
        first["references"],
        config["num_bootstrap"],
        config["seed"],
        dials_of(first["curves"]),
        same_prompts=same_prompts,
    )
    seeds = [load_tables(folder) for folder in folders]
    return Summary(
        **combine_runs(folders, question),
        curves=[_curve_row(seeds, rows, question) for rows in zip(*(s["curves"] for s in summaries), strict=True)],
        quality=_quality(seeds, summaries, question),
        missing=_missing_rows(summaries),
        constant=_constant_rows(summaries),
        stop_settings=[],
        hacking=[],
        controls=[],
        win_rates=[],
        recommendations=[],
        break_even=[],
        headroom=None,
        sampling=[],
        costs=[],
        examples=[],
        name=f"{first['name']}, {len(folders)} seeds",
        trained=first["trained"],
        references=first["references"],
        policies=first["policies"],
        criteria=first["criteria"],
        methods=first["methods"],
        num_prompts=sum(s["num_prompts"] for s in summaries),
        num_distinct_prompts=sum(distinct[:1] if same_prompts else distinct),
        prompts_digest=first.get("prompts_digest") if same_prompts else None,
        num_seen_prompts=None if None in seen else sum(filter(None, seen)),
        num_seeds=len(summaries),
        dropped_prompts=sum(s["dropped_prompts"] for s in summaries),
        num_samples=first["num_samples"],
        trained_budget=first["trained_budget"],
        manifest=first["manifest"],
        config=_together([s["config"] for s in summaries], _listed),
        versions=_together([s["versions"] for s in summaries], _listed),
    )


def save_combined(folder: Path, summary: Summary) -> None:
    """Write `summary.json` into a folder of its own; raises `RunError` where an evaluation's results lie there."""
    if (folder / TABLES_NAME).exists():
        raise RunError(f"{str(folder)!r} holds an evaluation of one seed, and its {FILE_NAME}; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_summary(folder, summary)


def _check_alike(folders: Sequence[Path], summaries: Sequence[Summary]) -> None:
    """Raise `RunError` for evaluations that cannot be combined, or one that is given twice."""
    seen: list[Any] = []
    for folder, summary in zip(folders, summaries, strict=True):
        differing = [key for key in ALIKE if summary.get(key) != summaries[0].get(key)]
        points = [[key_of(row) for row in s["curves"]] for s in (summary, summaries[0])]
        if differing or points[0] != points[1]:
            raise RunError(
                f"{str(folder)!r} has other {differing[0] if differing else 'budgets'} than {str(folders[0])!r}; "
                "combine evaluations that differ in their seeds only"
            )
        others = list(_differing(_deciding(summary["config"]), _deciding(summaries[0]["config"])))
        if others:
            raise RunError(
                f"{str(folder)!r} was evaluated with another {', '.join(others)} than {str(folders[0])!r}; combine "
                "evaluations that differ in their seeds only"
            )
        settings = {key: value for key, value in summary["config"].items() if key != "output_dir"}
        if settings in seen:
            raise RunError(
                f"{str(folder)!r} has the same configuration and seed as {str(folders[seen.index(settings)])!r}; give "
                "each seed once"
            )
        seen.append(settings)


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in `FREE` without what may differ."""
    settings = {"num_answers": 1} | {key: value for key, value in config.items() if key in FREE}
    return {key: _without(value, FREE[key]) for key, value in settings.items()}


def _without(value: Any, names: frozenset[str]) -> Any:
    """A setting without the fields of these names, and without those that are not given."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in names and item not in (None, [], {})}
        return {key: _without(item, names) for key, item in kept.items()}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _differing(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the settings that differ, such as `sampling.temperature` and `criteria.0.gold.model`."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = (dict(enumerate(items)) for items in (one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield name
        return
    for key in dict.fromkeys([*one, *other]):
        yield from _differing(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))


def _curve_row(seeds: Sequence[Tables], rows: Sequence[CurveRow], question: Question) -> CurveRow:
    """A point of a curve over all seeds; KL is the mean of the seeds' where all have the same kind of it."""
    first = rows[0]
    column = (first["samples"] or 1) - 1
    proxy, gold = (
        _estimate([tables.values.get((*key_of(first)[:3], metric)) for tables in seeds], column, question)
        for metric in ("proxy", "gold")
    )
    same_kind = len({row["kl_kind"] for row in rows}) == 1
    return {
        "policy": first["policy"],
        "criterion": first["criterion"],
        "method": first["method"],
        "samples": first["samples"],
        **_costs(rows),
        "proxy": None if proxy is None else proxy.mean,
        "proxy_ci95": None if proxy is None else interval_row(proxy.ci95),
        "gold": None if gold is None else gold.mean,
        "gold_ci95": None if gold is None else interval_row(gold.ci95),
        "kl": _mean([row["kl"] for row in rows]) if same_kind else None,
        "kl_kind": first["kl_kind"] if same_kind else None,
        **_extras(rows),
        "num_prompts": sum(row["num_prompts"] for row in rows),
    }


def _costs(rows: Sequence[CurveRow]) -> Costs:
    return {
        "policy_tokens": _mean([row["policy_tokens"] for row in rows]),
        "policy_prefill_tokens": _mean([row["policy_prefill_tokens"] for row in rows]),
        "policy_decode_tokens": _mean([row["policy_decode_tokens"] for row in rows]),
        "reward_calls": _mean([row["reward_calls"] for row in rows]),
        "reward_tokens": _mean([row["reward_tokens"] for row in rows]),
        "backward_tokens": _mean([row["backward_tokens"] for row in rows]),
        "sequential_steps": _mean([row["sequential_steps"] for row in rows]),
        "flops": _mean([row["flops"] for row in rows]),
        "seconds": _mean([row["seconds"] for row in rows]),
    }


def dials_of(rows: Sequence[CurveRow]) -> dict[str, list[str]]:
    """The points of each method with a dial, in their order."""
    dials: dict[str, dict[str, None]] = {}
    for row in rows:
        if "dial" in row:
            dials.setdefault(row["dial"], {})[row["method"]] = None
    return {name: list(points) for name, points in dials.items()}


def _extras(rows: Sequence[CurveRow]) -> CurveExtras:
    extras: CurveExtras = {}
    disagreement, draws = ([row.get(key) for row in rows] for key in ("disagreement", "draws"))
    if None not in disagreement:
        extras["disagreement"] = _mean(disagreement)
    if None not in draws:
        extras["draws"] = _mean(draws)
    if "dial" in rows[0] and "value" in rows[0]:
        extras["dial"], extras["value"] = rows[0]["dial"], rows[0]["value"]
    return extras


def _estimate(values: Sequence[Floats | None], column: int, question: Question) -> Difference | None:
    """Mean over seeds and prompts with its interval.

    Prompts without a value are left out: of seeds that answered the same ones, those that lack it in some seed.
    """
    columns = [values_PN[:, column] for values_PN in values if values_PN is not None]
    if len(columns) < len(values):
        return None
    if question.same_prompts:
        known_P = ~np.isnan(columns).any(axis=0)
        known = [value_P[known_P] for value_P in columns]
    else:
        known = [value_P[~np.isnan(value_P)] for value_P in columns]
    if not all(map(len, known)):
        return None
    return paired_difference([(value_P, np.zeros_like(value_P)) for value_P in known], **question.bootstrap)


def _quality(
    seeds: Sequence[Tables], summaries: Sequence[Summary], question: Question
) -> dict[str, dict[str, QualityRow]]:
    """Means over seeds; of the trained policy with intervals over seeds and prompts."""
    quality: dict[str, dict[str, QualityRow]] = _together([s["quality"] for s in summaries], _mean)
    for policy, rows in quality.items():
        for criterion, row in rows.items():
            is_trained = policy == question.trained
            found = quality_intervals(seeds, question, criterion, row["method"]) if is_trained else {}
            row["against"] = {name: {"without": ci95, "worst_with": None} for name, ci95 in found.items()}
    return quality


def _missing_rows(summaries: Sequence[Summary]) -> list[MissingRow]:
    """Missing scores of all seeds together; a seed without a row has none missing, and its samples count."""
    seeds = [({_missing_key(row): row for row in s["missing"]}, s["num_prompts"]) for s in summaries]
    combined: list[MissingRow] = []
    for key in dict.fromkeys(key for rows, _ in seeds for key in rows):
        first, size = next((rows[key], num_prompts) for rows, num_prompts in seeds if key in rows)
        there = [rows[key] for rows, _ in seeds if key in rows]
        complete = [first["num_samples"] * num_prompts // size for rows, num_prompts in seeds if key not in rows]
        row = first.copy()
        row["num_missing"] = sum(row["num_missing"] for row in there)
        row["num_samples"] = sum(row["num_samples"] for row in there) + sum(complete)
        combined.append(row)
    return combined


def _constant_rows(summaries: Sequence[Summary]) -> list[ConstantRow]:
    """Scores that some seed has constant, each once."""
    rows = [row for summary in summaries for row in summary.get("constant", [])]
    return list({(row["policy"], row["criterion"], row["metric"]): row for row in rows}.values())


def _missing_key(row: MissingRow) -> tuple[str, str, str, str | None]:
    return row["policy"], row["criterion"], row["metric"], row.get("method")


def _mean(values: Sequence[Any]) -> float | None:
    """The mean of numbers, None where one is not known."""
    return None if None in values else float(np.mean(values))


def _together(values: Sequence[Any], differing: Callable[[Sequence[Any]], Any]) -> Any:
    """Values of the seeds as one: blocks key by key, values that are equal as they are, others as `differing` says."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _together([value.get(key) for value in values], differing) for key in keys}
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return [_together(items, differing) for items in zip(*values, strict=True)]
    return differing(values)


def _listed(values: Sequence[Any]) -> Any:
    """Settings that differ: texts one after the other, so that a page can show them, anything else as a list."""
    return ", ".join(values) if all(isinstance(value, str) for value in values) else list(values)
