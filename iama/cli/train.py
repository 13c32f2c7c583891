"""`iama train`, and what `train_iama.py` starts: training itself is `trainers.run.train`."""

from __future__ import annotations

import sys

import typer

from iama.cli.app import app
from iama.cli.options import TRAIN
from iama.exits import check_arguments, told_in_one_line
from iama.installation import check_packages


@app.command(
    short_help="Train a LoRA adapter with non-linear GRPO.",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=TRAIN,
)
def train(context: typer.Context) -> None:
    """Train a LoRA adapter with non-linear GRPO, in one process (iama train --help).

    Several: deepspeed --num_gpus 2 --module trainers.run --config NAME
    """
    sys.argv = ["iama train", *context.args]
    main()


def main() -> None:
    """Start training with the arguments of this process; all ways to start it come here."""
    with told_in_one_line():
        check_arguments(sys.argv[1:])
        check_packages("trainers")
        from trainers.run.train import main as train_main

        train_main()
