"""`iama evaluate` and `iama report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app, manifest_of, note_differences, prepare


@app.command()
def evaluate(
    config: Annotated[Path, typer.Option(help="Evaluation file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
) -> None:
    """Measure policies on held-out prompts: curves, savings, report. A killed evaluation, run again, resumes.

    Example: iama evaluate --config configs/demo-evaluate.yaml --set seed=1 --set output_dir=runs/demo/evaluation-1
    """
    from iama.config import EvaluationConfig
    from iama.schema import load_config

    settings = load_config(config, EvaluationConfig, overrides or [])
    rewards = [spec for c in settings.criteria for spec in (c.proxy, c.gold) if spec is not None]
    for name, spec in settings.policies.items():
        note_differences(manifest_of(spec.path, spec.adapter), settings.sampling, f"policy {name!r}: ")
    prepare([s for spec in settings.policies.values() for s in (spec.path, spec.adapter)] + [r.model for r in rewards])
    from rich.console import Console

    from inference.evaluate import check_inputs, describe
    from inference.evaluate import evaluate as run
    from inference.report import headline, print_tables, write_report

    if dry_run:
        typer.echo(describe(settings, check_inputs(settings)))
        return
    summary = run(settings)
    print_tables(summary, Console())
    typer.echo(f"report: {write_report(Path(settings.output_dir))}")
    typer.echo(headline(summary))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="An evaluation's output_dir.")]) -> None:
    """Rebuild report.html from summary.json.

    Example: iama report runs/demo/evaluation
    """
    from rich.console import Console

    from inference.report import headline, print_tables, write_report
    from inference.summary import load_summary

    path = write_report(folder)
    summary = load_summary(folder)
    print_tables(summary, Console())
    typer.echo(f"report: {path}")
    typer.echo(headline(summary))
