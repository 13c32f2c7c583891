"""The command line itself, and what its commands share."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from iama.errors import IamaError, IamaWarning
from iama.installation import check_packages

if TYPE_CHECKING:
    from iama.config.manifest import Manifest
    from iama.config.specs import Sampling

app = typer.Typer(
    help="Inference-aware meta-alignment: sample, evaluate and export policies. Training: iama train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; a mistake in the input is one line on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        check_packages("inference", "trainers")
        app()
    except IamaError as error:
        fail(error)


def fail(error: IamaError) -> NoReturn:
    """End this process with one line."""
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; those of libraries do not concern the user of a command."""
    if issubclass(category, IamaWarning):
        sys.stderr.write(f"warning: {message}\n")


def prepare(model_paths: list[str | None]) -> None:
    """Settings that must stand before torch is imported, and no loading bars of libraries."""
    from iama.environment import prepare_environment

    prepare_environment(model_paths)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def manifest_of(policy: str, adapter: str | None) -> Manifest | None:
    """What the adapter, or else the policy, was trained for."""
    from iama.config.manifest import load_manifest

    return load_manifest(Path(adapter or policy))


def note_differences(manifest: Manifest | None, sampling: Sampling, where: str = "") -> None:
    """One line on stderr if a policy is not sampled as it was trained."""
    from iama.config.specs import sampling_differences

    differences = [] if manifest is None else sampling_differences(manifest.sampling, sampling)
    if differences:
        sys.stderr.write(f"note: {where}sampling differs from training: {', '.join(differences)}\n")
