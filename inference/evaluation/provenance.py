"""What numbers come from: what the trained policy was trained for, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from iama import __version__
from iama.config.files import EvaluationConfig
from iama.config.manifest import load_manifest
from inference.evaluation.training_cost import read_config


def manifest_of(config: EvaluationConfig) -> dict[str, Any] | None:
    """What the trained policy was trained for: from the `iama.json` of an export, else from its training run."""
    policy = config.policies.get(config.trained)
    if policy is None:
        return None
    folder = policy.adapter or policy.path
    manifest = None if folder is None else load_manifest(Path(folder))
    if manifest is not None:
        return manifest.model_dump(mode="json")
    objectives = [read_config(Path(run)).get("objective") for run in policy.training_run]
    return objectives[0] if len(objectives) == 1 else None


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    numbers: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    return {"iama": __version__, "python": platform.python_version(), **numbers}
