"""`iama export`: a trained adapter or model with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app, prepare
from iama.cli.as_json import print_json
from iama.cli.options import TRAIN, AsJson, TrustRemoteCode
from iama.errors import ConfigError


@app.command(rich_help_panel=TRAIN)
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
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: Annotated[str | None, typer.Option(help="ORG/NAME to upload the export to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
    as_json: AsJson = False,
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

    named = Names(base_model, rewards)
    for note in export_run(run, out, merge, named, evaluation, trust_remote_code=trust_remote_code):
        typer.echo(f"note: {note}", err=True)
    if not as_json:
        typer.echo(f"exported: {out}")
    pushed = None if push_to_hub is None else push(out, push_to_hub, private=private)
    if as_json:
        print_json("export", exported=out, pushed=pushed)
    elif pushed is not None:
        typer.echo(f"pushed: {pushed}")
