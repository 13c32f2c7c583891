"""`iama standardise` and `iama export`: before training, and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app, prepare
from iama.errors import ConfigError


@app.command()
def standardise(
    config: Annotated[Path | None, typer.Option(help="Training file (YAML).")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool file with samples of the reference, in its place.")] = None,
    spec: Annotated[Path | None, typer.Option(help="With --pool: a reward as YAML.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts, from the start of the file.", min=1)] = 64,
    num_samples: Annotated[int, typer.Option(help="Samples a prompt, from the policy before training.", min=1)] = 8,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c. Repeatable.")] = None,
) -> None:
    """Measure each proxy reward's scale on samples of the reference policy, and print it as configuration.

    Of an ensemble, the scale of every member too. With --pool and --spec, the reward is printed with its scale.

    Example: iama standardise --config configs/demo.yaml --num-prompts 32

    Example: iama standardise --pool base.jsonl --spec ensemble.yaml > scaled.yaml
    """
    if pool is not None or spec is not None:
        if pool is None or spec is None or config is not None or overrides:
            raise ConfigError("give --pool FILE with --spec FILE, or --config FILE (and not both)")
        _standardise_on_pool(pool, spec, num_prompts, num_samples)
    elif config is None:
        raise ConfigError("give --config FILE, or --pool FILE with --spec FILE")
    else:
        _standardise_config(config, num_prompts, num_samples, overrides)


def _standardise_config(config: Path, num_prompts: int, num_samples: int, overrides: list[str] | None) -> None:
    """By samples that are drawn as training will draw them; printed as overrides."""
    from iama.config.schema import load_config
    from iama.config.settings import TrainingConfig

    settings = load_config(config, TrainingConfig, overrides or [])
    paths = [settings.policy.path, settings.policy.adapter, settings.prompts.path]
    prepare([*paths, *(part.model for c in settings.objective.criteria for part in c.proxy.parts)])
    from rich.console import Console

    with Console(stderr=True).status("sampling the reference policy and scoring"):
        from inference.pools.standardise import measure_scales

        rewards = measure_scales(settings, num_prompts, num_samples)
    for index, (criterion, reward) in enumerate(zip(settings.objective.criteria, rewards, strict=True)):
        typer.echo(f"# {criterion.name}")
        members = () if reward.ensemble is None else reward.ensemble.members
        places = [("", reward), *((f"ensemble.members.{i}.", member) for i, member in enumerate(members))]
        for place, part in places:
            if part.scale is not None:
                scale = f"{{mean: {part.scale.mean:.6g}, std: {part.scale.std:.6g}}}"
                typer.echo(f"--set 'objective.criteria.{index}.proxy.{place}scale={scale}'")


def _standardise_on_pool(pool: Path, spec: Path, num_prompts: int, num_samples: int) -> None:
    """By samples that a file holds; printed as the reward's YAML."""
    import yaml

    from iama.cli.pools import scoring_spec

    wanted = scoring_spec(None, None, spec, {})
    prepare([part.model for part in wanted.parts])
    from inference.evaluation.reward_checks import check_signature
    from inference.pools.file import read_pool
    from inference.pools.standardise import measure_on_pool

    read = read_pool(pool)
    for part in wanted.parts:
        if part.function is not None:
            check_signature("--spec", part.function, set(read.prompts[0].columns))
    found = measure_on_pool(wanted, read, num_prompts, num_samples)
    typer.echo(yaml.safe_dump(found.model_dump(mode="json", exclude_unset=True), sort_keys=False).rstrip())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output_dir of a finished training run.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter or model.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a plain model instead of an adapter.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Public name of the base (org/name); then no path of this machine is recorded.")
    ] = None,
    reward_name: Annotated[
        list[str] | None, typer.Option(help="CRITERION=ORG/NAME, public name of a reward model. Repeatable.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of iama evaluate on this run: the card tells quality without a sampler.")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="ORG/NAME to upload the export to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
) -> None:
    """Export a trained adapter with its card and iama.json.

    Example: iama export runs/demo/iama --out runs/demo/merged --merge --evaluation runs/demo/evaluation
    """
    if push_to_hub is not None and base_model is None:
        raise ConfigError(f"--push-to-hub {push_to_hub} needs --base-model ORG/NAME, the base's public name")
    if private and push_to_hub is None:
        raise ConfigError("--private belongs to --push-to-hub ORG/NAME")
    rewards = {}
    for text in reward_name or []:
        criterion, equals, name = text.partition("=")
        if not (criterion and equals and name):
            raise ConfigError(f"--reward-name {text!r}: write CRITERION=ORG/NAME")
        rewards[criterion] = name
    prepare([push_to_hub])
    from trainers.export.export import Names, export_run
    from trainers.export.publish import push

    for note in export_run(run, out, merge, Names(base_model, rewards), evaluation):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"exported: {out}")
    if push_to_hub is not None:
        typer.echo(f"pushed: {push(out, push_to_hub, private=private)}")
