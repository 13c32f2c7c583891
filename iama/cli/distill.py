"""`iama distill`: a reward model that learns the scores in a pool file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iama.cli.app import app, prepare
from iama.cli.as_json import print_json
from iama.cli.options import POOLS, AsJson, Device
from iama.errors import ConfigError, DataError
from iama.progress import progress_bar

if TYPE_CHECKING:  # each command imports what it needs when it runs
    from inference.engine.responses import Pool


@app.command(short_help="Train one reward model on the scores in a pool file.", rich_help_panel=POOLS)
def distill(
    file: Annotated[Path, typer.Argument(help="Pool file with several samples a prompt.", metavar="POOL")],
    column: Annotated[str, typer.Option(help="Scores to learn, e.g. an ensemble's; see iama score.")],
    base: Annotated[str, typer.Option(help="Language model or classifier of one output to begin with.")],
    out: Annotated[Path, typer.Option(help="New folder for the reward model.")],
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of answers a step.", min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW at its highest; then it falls as a cosine.")] = 1e-5,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that only judge the result.")] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Of the head, the pairs and the prompts that are held out.", min=0, max=2**32 - 1)
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a reward model on the margins between the scores of a prompt's samples, and judge it on other prompts.

    It costs one model, also where its teacher is an ensemble. All weights of the base are trained.

    Example: iama distill base.jsonl --column helpful --base runs/demo/world/policy --out runs/demo/rm-distilled
    --max-steps 300 --learning-rate 1e-3
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} must lie between 0 and 1, e.g. 0.1")
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate {learning_rate:g} must be positive and finite, e.g. 1e-5")
    prepare([base])
    from inference.pools.file import read_pool

    read = read_pool(file)
    scores = _column(read, column, file)
    from trainers.distill import DistillSettings
    from trainers.distill import distill as run

    settings = DistillSettings(base, column, max_steps, batch_size, learning_rate, held_out, seed, device)
    with progress_bar(f"distilling {column}", "steps", max_steps) as advance:
        result = run([prompt.prompt for prompt in read.prompts], read.texts, scores, settings, out, advance)
    if as_json:
        print_json("distill", reward_model=out, **asdict(result))
        return
    typer.echo(
        f"prompts: {result.num_trained} to learn from, {result.num_held_out} held out; {result.num_unscored} of "
        f"{result.num_pairs} pairs of answers lack a score and are left out"
    )
    typer.echo(
        f"loss: {result.first_loss:.3g} at first, {result.last_loss:.3g} in the end (squared margins, in units of the "
        f"scores' standard deviation within a prompt, {result.spread:.3g})"
    )
    typer.echo(f"held out: agreement {result.agreement:.3f}, R^2 of margins {result.r_squared:.3f}")
    typer.echo(f"reward model: {out}")


def _column(pool: Pool, name: str, file: Path) -> list[list[float]]:
    """Scores `[P][S]`, NaN where one is missing; raises `DataError` for a single sample or a column that is absent."""
    if len(pool.prompts[0].samples) < 2:
        raise DataError(f"{file} has one sample a prompt, which has no margins; draw several (iama pool --n 16)")
    for prompt in pool.prompts:
        for number, sample in enumerate(prompt.samples):
            if name not in sample.scores:
                columns = ", ".join(sorted(sample.scores)) or "none"
                raise DataError(
                    f"{file}: sample {number} of prompt {prompt.prompt_id!r} has no score {name!r} (there: {columns}); "
                    "add the column with `iama score`"
                )
    rows = [[sample.scores[name] for sample in prompt.samples] for prompt in pool.prompts]
    return [[float("nan") if score is None else score for score in row] for row in rows]
