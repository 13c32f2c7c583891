"""`iama standardise`: measure the scale of rewards, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from iama.cli.app import app, prepare, scoring_spec
from iama.cli.as_json import print_json
from iama.cli.options import TRAIN, AsJson, Overrides
from iama.errors import ConfigError
from iama.tables import print_line


@app.command(short_help="Measure the scale of each proxy reward, before training.", rich_help_panel=TRAIN)
def standardise(
    config: Annotated[Path | None, typer.Option(help="Training file (YAML).")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool file with samples of the policy before training.")] = None,
    spec: Annotated[Path | None, typer.Option(help="With --pool: a reward as YAML.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts, from the start of the file.", min=1)] = 64,
    num_samples: Annotated[int, typer.Option(help="Samples a prompt, from the policy before training.", min=2)] = 8,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure each proxy reward's scale on samples of the policy before training, and print it as configuration.

    A scale is the mean of all scores and their deviation within a prompt. The policy is the one that training starts
    from, with its `policy.adapter`. Of an ensemble, the scale of every member too. With --pool and --spec, the reward
    is printed with its scale.

    Example: iama standardise --config configs/demo.yaml --num-prompts 32

    Example: iama standardise --pool base.jsonl --spec ensemble.yaml > scaled.yaml
    """
    if pool is not None or spec is not None:
        if pool is None or spec is None or config is not None or overrides:
            raise ConfigError("give --pool FILE with --spec FILE, or --config FILE (and not both)")
        _standardise_on_pool(pool, spec, num_prompts, num_samples, as_json=as_json)
    elif config is None:
        raise ConfigError("give --config FILE, or --pool FILE with --spec FILE")
    else:
        _standardise_config(config, num_prompts, num_samples, overrides, as_json=as_json)


def _standardise_config(
    config: Path, num_prompts: int, num_samples: int, overrides: list[str] | None, *, as_json: bool
) -> None:
    """By samples that are drawn as training will draw them; printed as overrides."""
    from iama.config.files import TrainingConfig
    from iama.config.schema import load_config

    settings = load_config(config, TrainingConfig, overrides or [])
    paths = [settings.policy.path, settings.policy.adapter, settings.prompts.path]
    prepare([*paths, *(part.looked_up for c in settings.objective.criteria for part in c.proxy.parts)])
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("sampling the policy and scoring"):
        from inference.pools.standardise import measure_scales

        rewards = measure_scales(settings, num_prompts, num_samples, lambda line: print_line(console, line))
    scales: dict[str, list[Scale]] = {}
    for index, (criterion, reward) in enumerate(zip(settings.objective.criteria, rewards, strict=True)):
        members = () if reward.ensemble is None else reward.ensemble.members
        places = [("", reward), *((f"ensemble.members.{i}.", member) for i, member in enumerate(members))]
        scales[criterion.name] = [
            Scale(f"objective.criteria.{index}.proxy.{place}scale", part.scale.mean, part.scale.std)
            for place, part in places
            if part.scale is not None
        ]
    if as_json:
        print_json("standardise", scales={name: [s._asdict() for s in found] for name, found in scales.items()})
        return
    for name, found in scales.items():
        typer.echo(f"# {name}")
        for scale in found:
            typer.echo(f"--set '{scale.key}={{mean: {scale.mean:.6g}, std: {scale.std:.6g}}}'")


class Scale(NamedTuple):
    """A reward's mean and standard deviation, and the key of the configuration that takes them."""

    key: str
    mean: float
    std: float


def _standardise_on_pool(pool: Path, spec: Path, num_prompts: int, num_samples: int, *, as_json: bool) -> None:
    """By samples that a file holds; printed as the reward's YAML."""
    import yaml

    wanted = scoring_spec(None, None, spec, {})
    prepare([part.looked_up for part in wanted.parts])
    from inference.pools.file import read_pool
    from inference.pools.standardise import measure_on_pool

    read = read_pool(pool)
    scaled = measure_on_pool(wanted, read, num_prompts, num_samples, lambda line: typer.echo(line, err=True))
    content = scaled.model_dump(mode="json", exclude_unset=True)
    if as_json:
        print_json("standardise", reward=content)
    else:
        typer.echo(yaml.safe_dump(content, sort_keys=False).rstrip())
