"""Evaluate policies x criteria x methods x budgets from one pool of samples a prompt and policy.

`evaluate` measures (`inference.evaluation.measure`), computes rows (`inference.evaluation.rows`) and writes
`summary.json`. It takes a plan (`inference.evaluation.plan.make_plan`), as do the parts of it on several devices.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from iama.files import check_rewritable, locked, write_atomically
from iama.machines import Spread, locally
from iama.progress import add_bar, progress_bars
from inference.evaluation.compare import compare_policies
from inference.evaluation.measure import measure, measure_pools
from inference.evaluation.measurements import Evaluation
from inference.evaluation.plan import Plan, check_results
from inference.evaluation.provenance import manifest_of, versions
from inference.evaluation.question import Question
from inference.evaluation.rows import risks
from inference.evaluation.rows.curves import curve_rows
from inference.evaluation.rows.examples import example_rows
from inference.evaluation.rows.headroom import headroom_figures
from inference.evaluation.rows.sampling import missing_rows, sampling_rows
from inference.evaluation.rows.scoring import reward_cost_rows
from inference.evaluation.rows.values import fill_tables
from inference.evaluation.shards import Shard, num_devices, run_shards, take_over
from inference.evaluation.stopping import add_stop_curve
from inference.evaluation.summary import FILE_NAME, Summary, save_summary
from inference.evaluation.tables import FILE_NAME as TABLES_NAME
from inference.evaluation.tables import Tables, save_tables
from inference.evaluation.training_cost import num_seen
from inference.pools.journal import digest


def evaluate(plan: Plan, console: Console | None = None, spread: Spread = locally) -> Summary:
    """Run an evaluation and write `summary.json` and `prompt_values.npz` into its folder.

    Models work where `spread` says, on a Ray cluster for instance (`iama.machines`); this process writes. Samples and
    scores are kept prompt by prompt, so a killed evaluation resumes; what shards have done is taken over.
    Raises `ModelError`, `RewardError` and `RunError`; what can be refused beforehand `make_plan` has refused.
    """
    folder = Path(plan.config.output_dir)
    with locked(folder / FILE_NAME):
        check_results(plan.config)  # of another configuration, it may just have been written
        _check_rewritable(folder)
        take_over(folder)
        tables, summary = summarise(measure(plan, folder, range(len(plan.rows)), console, spread))
        folder.mkdir(parents=True, exist_ok=True)
        save_tables(folder, tables)
        save_summary(folder, summary)
    return summary


def _check_rewritable(folder: Path) -> None:
    """Raise `RunError`, before anything is measured, where the results could not be written."""
    for name in (FILE_NAME, TABLES_NAME):
        check_rewritable(folder / name)


def evaluate_pools(plan: Plan, console: Console | None = None) -> Evaluation:
    """Only what `evaluate` would do first: draw every policy's pool and score it, in the same files."""
    take_over(Path(plan.config.output_dir))
    return measure_pools(plan, console)


def evaluate_shard(plan: Plan, shard: Shard, console: Console | None = None) -> Path:
    """Sample and score a shard's prompts only, into its own folder, which `evaluate` takes over later.

    Guided methods whose target or threshold is the whole pool's quantile are left to `evaluate`.
    """
    folder = shard.folder(Path(plan.config.output_dir))
    measure(plan, folder, shard.indices(len(plan.rows)), console)
    return folder


def evaluate_on_devices(plan: Plan, devices: str, console: Console | None = None) -> None:
    """Run all shards as processes of this machine, one a device; `evaluate` then has nothing left to measure."""
    count = num_devices(devices)
    config = plan.config
    folder = Path(config.output_dir)
    _check_rewritable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder / "shards" / "config.yaml"
    resolved.parent.mkdir(exist_ok=True)
    # Without defaults, since names that are written are checked.
    write_atomically(resolved, yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    command = ["-m", "iama.cli", "evaluate", "--config", str(resolved), "--shard"]
    total = sum(len(plan.rows) * (config.num_samples + 1) for source in plan.sources if source.stored is None)
    with progress_bars(console) as progress:
        advance = add_bar(progress, f"{count} processes", "lines", total)
        run_shards([[*command, f"{i}/{count}"] for i in range(1, count + 1)], folder, advance)


def summarise(evaluation: Evaluation) -> tuple[Tables, Summary]:
    """The table of values and costs by prompt, and every row of the summary."""
    config, plan = evaluation.config, evaluation.plan
    tables = fill_tables(evaluation)
    stop_settings = add_stop_curve(tables, evaluation)
    question = Question(
        config.trained_budget,
        config.trained,
        [name for name in config.references if name in config.policies],
        config.num_bootstrap,
        config.seed,
        {name: [point.text for point in dial.points] for name, dial in plan.dials.items()},
    )
    curves = curve_rows(evaluation, tables, stop_settings)
    results = compare_policies([tables], question)
    prompts = [digest(row["prompt"]) for row in plan.rows]
    summary = Summary(
        **results,
        curves=curves,
        quality=risks.quality_rows(evaluation, tables, question),
        hacking=risks.hacking_rows(config, tables),
        controls=risks.control_rows(evaluation),
        win_rates=risks.win_rate_rows(evaluation),
        recommendations=risks.recommendation_rows(config, tables, curves, stop_settings, prompts),
        break_even=risks.break_even_rows(evaluation, tables, results["savings"]),
        headroom=headroom_figures(evaluation),
        sampling=sampling_rows(evaluation),
        missing=missing_rows(evaluation),
        constant=risks.constant_rows(evaluation),
        stop_settings=stop_settings,
        costs=reward_cost_rows(evaluation),
        examples=example_rows(evaluation),
        name=config.name,
        trained=config.trained,
        references=list(question.references),
        policies=list(config.policies),
        criteria=[c.name for c in config.criteria],
        methods=list(config.methods),
        num_prompts=len(plan.rows),
        num_distinct_prompts=len(set(prompts)),
        prompts_digest=digest([row["prompt"] for row in plan.rows]),
        num_seen_prompts=num_seen(plan.rows, plan.training.get(config.trained, [])),
        num_seeds=1,
        dropped_prompts=plan.dropped,
        num_samples=plan.num_samples,
        trained_budget=config.trained_budget,
        manifest=manifest_of(config),
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
    return tables, summary
