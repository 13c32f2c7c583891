"""`iama standardise` and `iama export`: before training, and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app, prepare


@app.command()
def standardise(
    config: Annotated[Path, typer.Option(help="Training file (YAML).")],
    num_prompts: Annotated[int, typer.Option(help="Prompts to sample, from the start of the file.")] = 64,
    num_samples: Annotated[int, typer.Option(help="Samples a prompt, from the policy before training.")] = 8,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c. Repeatable.")] = None,
) -> None:
    """Measure each proxy reward's scale on samples of the reference policy, and print it as configuration.

    Example: iama standardise --config configs/demo.yaml --num-prompts 32
    """
    from iama.config import TrainingConfig
    from iama.schema import load_config

    settings = load_config(config, TrainingConfig, overrides or [])
    paths = [settings.policy.path, settings.policy.adapter, settings.prompts.path]
    prepare([*paths, *(c.proxy.model for c in settings.objective.criteria)])
    from rich.console import Console

    with Console(stderr=True).status("sampling the reference policy and scoring"):
        from inference.standardise import measure_scales

        scales = measure_scales(settings, num_prompts, num_samples)
    for index, (criterion, scale) in enumerate(zip(settings.objective.criteria, scales, strict=True)):
        typer.echo(f"# {criterion.name}")
        typer.echo(f"--set 'objective.criteria.{index}.proxy.scale={{mean: {scale.mean:.6g}, std: {scale.std:.6g}}}'")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output_dir of a finished training run.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter or model.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a plain model instead of an adapter.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Name to record for the base, e.g. its hub name; else the path that was trained.")
    ] = None,
) -> None:
    """Export a trained adapter with its card and iama.json.

    Example: iama export runs/demo/iama --out runs/demo/merged --merge
    """
    prepare([])
    from trainers.export import export_run

    export_run(run, out, merge, base_model)
    typer.echo(f"exported: {out}")
