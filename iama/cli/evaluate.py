"""`iama evaluate` and `iama report`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama.cli.app import (
    app,
    cluster_of,
    manifest_of,
    note_differences,
    note_system_prompt,
    prepare,
    spread_over,
    warn_of_backslashes,
)
from iama.cli.as_json import print_json
from iama.cli.options import EVALUATE, AsJson, Ray, RayGpusPerWorker, RayWorkers
from iama.errors import ConfigError
from iama.tables import print_line, wide_console

if TYPE_CHECKING:
    from iama.config.files import EvaluationConfig
    from inference.engine.responses import Pool
    from inference.evaluation.summary import Summary


@app.command(short_help="Measure policies on held-out prompts; savings, report.", rich_help_panel=EVALUATE)
def evaluate(
    config: Annotated[Path | None, typer.Option(help="Evaluation file (YAML).")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c. Repeatable.")] = None,
    pools: Annotated[
        list[str] | None,
        typer.Option("--pool", help="NAME=FILE, completions of a policy; needs no --config. Repeatable."),
    ] = None,
    criteria: Annotated[
        list[str] | None,
        typer.Option("--criterion", help="With --pool: NAME=PROXY_COLUMN,GOLD_COLUMN; else all columns. Repeatable."),
    ] = None,
    trained: Annotated[str | None, typer.Option(help="With --pool: whose savings; else iama, or the last.")] = None,
    out: Annotated[str | None, typer.Option(help="With --pool: the evaluation's folder; else runs/evaluation.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: sample and score that part only; then run without it, in the same folder.")
    ] = None,
    devices: Annotated[str | None, typer.Option(help="auto (every GPU) or a number of processes.")] = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_gpus_per_worker: RayGpusPerWorker = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure policies on held-out prompts: curves, savings, report. A killed evaluation, run again, resumes.

    Example: iama evaluate --config configs/demo-evaluate.yaml --set seed=1 --set output_dir=runs/demo/evaluation-1

    Example: iama evaluate --pool base=base.jsonl --pool iama=iama.jsonl --criterion helpful=rm,judge

    Example: iama evaluate --config configs/demo-evaluate.yaml --ray 10.0.0.1:6379 --ray-gpus-per-worker 1
    """
    if ray is not None and (shard is not None or devices is not None):
        other = f"--shard {shard}" if shard is not None else f"--devices {devices}"
        raise ConfigError(f"--ray {ray} shares the work out over a cluster, {other} by hand; give one of the two")
    if shard is not None and devices is not None:
        raise ConfigError(f"--shard {shard} is one part, --devices {devices} runs all of them; give one of the two")
    settings, read = _settings(config, overrides or [], pools or [], criteria or [], trained, out)
    models = [(name, policy) for name, policy in settings.policies.items() if policy.path is not None]
    _note_training(settings)
    _note_engines({name: policy.engine for name, policy in models})
    prepare(model_paths(settings))
    from inference import evaluation
    from inference.evaluation.describe import describe, judge_lines
    from inference.evaluation.plan import make_plan
    from inference.evaluation.shards import parse_shard

    cluster = cluster_of(ray, ray_workers, ray_gpus_per_worker)
    plan = make_plan(settings, read)
    if dry_run:
        if as_json:
            print_json("evaluate", plan=describe(plan).splitlines())
        else:
            typer.echo(describe(plan))
        return
    if shard is not None:
        folder = evaluation.evaluate_shard(plan, parse_shard(shard))
        if as_json:
            print_json("evaluate", shard=shard, folder=folder)
        else:
            typer.echo(f"done: {folder}; then run without --shard")
        return
    for line in judge_lines(plan):
        typer.echo(line, err=True)
    if devices is not None:
        evaluation.evaluate_on_devices(plan, devices)
    with spread_over(cluster) as spread:
        summary = evaluation.evaluate(plan, spread=spread)
    written = [
        f"{row['policy']}, {row['criterion']}: {row['method']} is {row['written']}"
        for row in summary["curves"]
        if "written" in row and row["samples"] is None
    ]
    _tell("evaluate", summary, Path(settings.output_dir), written, as_json=as_json)


TOLD = (
    *("name", "trained", "references", "policies", "criteria", "methods", "num_prompts", "num_samples"),
    *("trained_budget", "savings", "averages", "quality", "hacking", "headroom", "recommendations"),
)
"""Keys of a summary that `--json` prints; `summary_file` has all."""


def _tell(command: str, summary: Summary, folder: Path, notes: Sequence[str] = (), *, as_json: bool) -> Path:
    """Write the report, whose path it returns; print tables, notes and the headline, or what a script reads."""
    from inference.report import headline, print_tables, write_report

    path = write_report(folder)
    if as_json:
        _print_as_json(command, summary, report=path, summary_file=folder / "summary.json")
        return path
    console = wide_console()
    print_tables(summary, console)
    for note in notes:
        typer.echo(note)
    typer.echo(f"report: {path}")
    print_line(console, headline(summary))
    return path


def _print_as_json(command: str, summary: Summary, **files: Path) -> None:
    from inference.report import headline
    from inference.report.risks import find_risks

    risks = [{"subject": risk.subject, "level": risk.level, "words": risk.words} for risk in find_risks(summary)]
    told = {key: value for key, value in summary.items() if key in TOLD}
    print_json(command, headline=headline(summary), risks=risks, **files, **told)


def model_paths(settings: EvaluationConfig) -> list[str | None]:
    """Whatever may be a folder or a file here, or else a name on the hub."""
    policies = settings.policies.values()
    paths = [path for p in policies for path in (p.path, p.adapter, *(c.adapter for c in p.by_criterion.values()))]
    specs = [spec for c in settings.criteria for spec in (c.proxy, c.gold) if spec is not None]
    rewards = [part.looked_up for spec in specs for part in spec.parts]
    return [*paths, *rewards, None if settings.prompts is None else settings.prompts.path]


def _note_training(settings: EvaluationConfig) -> None:
    """Where a policy is not asked as it was trained, as far as its `iama.json` tells."""
    for name, policy in settings.policies.items():
        manifest = None if policy.path is None else manifest_of(policy.path, policy.adapter)
        note_differences(manifest, settings.sampling, f"policy {name!r}: ")
        if settings.prompts is not None and not policy.by_criterion:
            given = settings.prompts.system_prompt or policy.system_prompt
            note_system_prompt(manifest, given, f"policy {name!r}: ")


def _note_engines(engines: Mapping[str, str]) -> None:
    """A line on stderr where policies are not sampled by one engine."""
    if len(set(engines.values())) > 1:
        each = ", ".join(f"{name} by {engine}" for name, engine in engines.items())
        sys.stderr.write(f"note: sampled are {each}: seconds and memory compare engines, and not policies\n")


def _settings(
    config: Path | None,
    overrides: list[str],
    pools: list[str],
    criteria: list[str],
    trained: str | None,
    out: str | None,
) -> tuple[EvaluationConfig, dict[str, Pool]]:
    """From the file, or from pool files, which are given by their paths."""
    from iama.config.files import EvaluationConfig
    from iama.config.schema import apply_override, validate

    if (config is None) == (not pools):
        raise ConfigError("give --config FILE, or --pool NAME=FILE for completions that exist already (and not both)")
    if config is not None:
        if criteria or trained is not None or out is not None:
            raise ConfigError("--criterion, --trained and --out belong to --pool; write them into the file")
        return settings_from_file(config, overrides), {}
    from inference.evaluation.from_pools import config_from_pools
    from inference.pools.file import read_pool

    files = {}
    for text in pools:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in files:
            raise ConfigError(f"--pool {text!r}: write NAME=FILE, each name once, e.g. --pool base=base.jsonl")
        files[name] = Path(path)
    read = {str(path): read_pool(path) for path in files.values()}
    raw = config_from_pools(files, criteria, trained, "runs/evaluation" if out is None else out, read)
    if not any(override.startswith("trained_budget=") for override in overrides):
        sys.stderr.write(
            f"note: trained_budget is {raw['trained_budget']}: a 16th of the {raw['num_samples']} samples a prompt, "
            "1 at least and 4 at most; --set trained_budget=N tells savings and verdict at another\n"
        )
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, EvaluationConfig, "command line", overrides), read


def settings_from_file(config: Path, overrides: list[str]) -> EvaluationConfig:
    """An evaluation's settings, with what the file leaves out and the export tells."""
    from iama.config.files import EvaluationConfig
    from iama.config.schema import load_config

    settings = load_config(config, EvaluationConfig, overrides)
    warn_of_backslashes(settings.sampling.stop, f"{config}: stop {{!r}}", 'in YAML write "{}", in double quotes,')
    return _with_defaults_of_the_export(settings)


def _with_defaults_of_the_export(settings: EvaluationConfig) -> EvaluationConfig:
    """Sampling and budget that the file leaves out, as the trained policy's `iama.json` has them."""
    policy = settings.policies.get(settings.trained)
    manifest = None if policy is None or policy.path is None else manifest_of(policy.path, policy.adapter)
    if manifest is None:
        return settings
    exported: dict[str, Any] = {"sampling": manifest.sampling}
    budgets = {c.budget for c in manifest.criteria}
    if len(budgets) == 1 and (budget := budgets.pop()) is not None and float(budget).is_integer():
        exported["trained_budget"] = int(budget)
    used = {key: value for key, value in exported.items() if key not in settings.model_fields_set}
    changed = {key: value for key, value in used.items() if value != getattr(settings, key)}
    if not changed:
        return settings
    sys.stderr.write(f"note: {' and '.join(changed)} as in the iama.json of policy {settings.trained!r}\n")
    from iama.config.schema import validate

    return validate({**settings.model_dump(exclude_unset=True), **changed}, type(settings), "iama.json")


@app.command(short_help="Rebuild report.html, compare evaluations, or combine seeds.", rich_help_panel=EVALUATE)
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="An evaluation's output_dir; two with --compare, several with --combine.")
    ],
    compare: Annotated[bool, typer.Option("--compare", help="Put two evaluations side by side.")] = False,
    combine: Annotated[bool, typer.Option("--combine", help="Evaluations that differ in their seeds, as one.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --compare: file, else compare.html in the second. With --combine: folder, else nothing is kept."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show the page that is written in your browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rebuild report.html from summary.json, compare two evaluations, or combine the seeds of one.

    Example: iama report runs/demo/evaluation --open

    Example: iama report runs/seed-0 runs/seed-1 runs/seed-2 --combine --out runs/combined
    """
    if compare and combine:
        raise ConfigError("--compare puts evaluations side by side, --combine makes one of them; give one of the two")
    if combine and show and out is None:
        raise ConfigError("--open shows a page, and --combine writes one only where --out DIR says so; add --out DIR")
    if compare and as_json:
        raise ConfigError("--json has no use with --compare; read each evaluation's: iama report FOLDER --json")
    if combine:
        path = _combine(folders, out, as_json=as_json)
    else:
        path = _compare(folders, out) if compare else _rebuild(folders, out, as_json=as_json)
    if show and path is not None:
        from inference.report import open_page

        open_page(path)


def _rebuild(folders: list[Path], out: Path | None, *, as_json: bool) -> Path:
    from inference.evaluation.summary import load_summary

    _check_number(folders, 1, "one folder (or two and --compare, or several and --combine)")
    if out is not None:
        raise ConfigError(f"--out {str(out)!r} goes with --compare; a report is written into its evaluation's folder")
    return _tell("report", load_summary(folders[0]), folders[0], as_json=as_json)


def _compare(folders: list[Path], out: Path | None) -> Path:
    from inference.report import print_comparison, write_comparison

    _check_number(folders, 2, "two folders with --compare")
    path = write_comparison(folders[0], folders[1], out)
    print_comparison(folders[0], folders[1], wide_console())
    typer.echo(f"comparison: {path}")
    return path


def _combine(folders: list[Path], out: Path | None, *, as_json: bool) -> Path | None:
    """Print what the seeds say together, and keep it where a folder is named."""
    from inference.evaluation.combine import combine_evaluations, save_combined
    from inference.report import headline, print_differences, print_tables, write_report

    if len(folders) < 2:
        raise ConfigError(f"iama report --combine takes two folders or more, got {len(folders)}: {folders[0]}")
    summary, console = combine_evaluations(folders), wide_console()
    if as_json:
        files = {}
        if out is not None:
            save_combined(out, summary)
            files = {"report": write_report(out), "summary_file": out / "summary.json"}
        _print_as_json("report", summary, **files)
        return files.get("report")
    print_tables(summary, console)
    print_differences(summary, console)
    path = None
    if out is not None:
        save_combined(out, summary)
        path = write_report(out)
        typer.echo(f"report: {path}")
    print_line(console, headline(summary))
    return path


def _check_number(folders: list[Path], number: int, wanted: str) -> None:
    if len(folders) != number:
        raise ConfigError(f"iama report takes {wanted}, got {len(folders)}: {' '.join(map(str, folders))}")
