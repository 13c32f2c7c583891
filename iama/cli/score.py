"""`iama score`: score the completions in a pool file and add the scores as a column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama.cli.app import app, given_options, prepare, scoring_spec
from iama.cli.as_json import print_json
from iama.cli.options import POOLS, AsJson, Device, Dtype, Head, RewardFlag
from iama.errors import ConfigError
from iama.progress import progress_bar

if TYPE_CHECKING:
    from iama.config.specs import RewardSpec


@app.command(short_help="Score every completion of a pool file, as a new column.", rich_help_panel=POOLS)
def score(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Pool file to add a column to.", metavar="POOL")],
    column: Annotated[str, typer.Option(help="Name of the column: the criterion's, or for its gold reward NAME/gold.")],
    reward: RewardFlag = None,
    head: Head = None,
    spec: Annotated[Path | None, typer.Option(help="A reward as YAML, for judges and verifiers too.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a column of that name.")] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Score every completion of a pool file and add the scores to it as a column. Killed, run again, it resumes.

    By convention a column is named like the criterion whose proxy reward it is, and that of the gold reward has /gold
    behind it: helpful, helpful/gold. Of an ensemble, a column with /disagreement behind its name holds the standard
    deviation over the members.

    Example: iama score base.jsonl --reward runs/demo/world/rm-helpful --column helpful
    """
    name = column.removesuffix("/gold")
    if not name or name != name.strip() or not name.isprintable():
        raise ConfigError(
            f"--column {column!r} is no name of a criterion; write letters without blanks around them, e.g. helpful"
        )
    wanted = scoring_spec(reward, head, spec, {"device": device, "dtype": dtype})
    _check_placement(given_options(context), wanted, spec)
    prepare([part.looked_up for part in wanted.parts])
    from inference.pools.file import read_pool
    from inference.pools.score import DISAGREEMENT, add_column, announcements, has_column

    read = read_pool(file)
    for name in [column] + [column + DISAGREEMENT] * (wanted.ensemble is not None):
        if not replace and has_column(read, name):
            raise ConfigError(f"{file} has a column {name!r} already; give --replace, or another --column")
    from iama.rewards.load import check_columns, check_reward, load_reward

    check_columns(column, wanted, [{**p.columns, "prompt": p.prompt} for p in read.prompts], missing_ok=True)
    is_model = any(part.model is not None for part in wanted.parts)  # of any other kind, loading is the check
    files = check_reward(column, wanted, [p.prompt for p in read.prompts]) if is_model else {}
    loaded = load_reward(column, wanted, missing_ok=True, files=files)
    for line in announcements(read, loaded, wanted):
        typer.echo(line, err=True)
    with progress_bar(f"scoring {column}", "prompts", len(read.prompts)) as advance:
        values_PS = add_column(file, read, column, loaded, wanted, advance)
    import numpy as np

    from inference.statistics.controls import is_constant

    if is_constant(values_PS):
        same = f"{column!r} is the same for all answers to each prompt, so choosing by it would be chance"
        typer.echo(f"note: {same}", err=True)
    missing = int(np.isnan(values_PS).sum())
    mean, std = float(np.nanmean(values_PS)), float(np.nanstd(values_PS))
    if as_json:
        counts = {"num_missing": missing, "num_scores": values_PS.size}
        print_json("score", pool=file, column=column, mean=mean, std=std, **counts)
    else:
        told = f"{missing} of {values_PS.size} scores missing"
        typer.echo(f"{column}: mean {mean:.4g}, standard deviation {std:.4g}, {told}")


def _check_placement(given: Mapping[str, Any], wanted: RewardSpec, spec: Path | None) -> None:
    """Raise `ConfigError` for a `--device` or `--dtype` that nothing would look at."""
    for name in ("device", "dtype"):
        if name in given and spec is not None:
            raise ConfigError(f"--{name} {given[name]!r} belongs to --reward; write {name}: {given[name]} into {spec}")
        if name in given and wanted.model is None:
            raise ConfigError(f"--{name} {given[name]!r} belongs to a model, not to a {wanted.source}; drop it")
