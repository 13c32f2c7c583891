"""`iama.json`: what an exported model was trained for, beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from iama.config.schema import Strict, validate
from iama.config.specs import RewardSpec, Sampling
from iama.errors import ModelError
from iama.files import absent
from iama.reading import read_object

FILE_NAME = "iama.json"


class ManifestCriterion(Strict):
    """A criterion that the model was trained for, with the operator that should serve it."""

    name: str
    operator: str
    weight: float
    reward: RewardSpec
    """The proxy reward, with its scale."""
    reward_revision: str | None = None
    """Of a reward model: the hub's commit, or a hash of the local folder's files."""
    member_revisions: tuple[str | None, ...] = ()
    """The same of an ensemble's members, in their order; empty for any other reward."""
    budget: float | None = None
    """Samples an answer that the operator draws on average; null where no number of samples serves it."""


class Manifest(Strict):
    """What the model was trained for, and how it was sampled in training."""

    format: Literal[1] = 1
    base_model: str
    base_revision: str | None = None
    """Of its weights: the hub's commit, or a hash of the local folder's .safetensors files; null where not known."""
    trust_remote_code: bool = False
    """Whether the base ran code of its own in training; whoever loads it must say so again."""
    criteria: Annotated[list[ManifestCriterion], Field(min_length=1)]
    estimator: str
    aggregate: str = "sum"
    weights: Literal["fixed", "simplex"] = Field("fixed", exclude_if=lambda weights: weights == "fixed")
    """simplex: each criterion's `weight` is a concentration of the Dirichlet law that groups drew theirs from."""
    sampling: Sampling
    system_prompt: str | None = Field(None, exclude_if=lambda text: text is None)
    """Before every prompt of the training that had no system message (`prompts.system_prompt`)."""
    seed: int
    versions: dict[str, str]


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest in a model folder, or None where there is none; `ModelError` if it is damaged."""
    path = folder / FILE_NAME
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        raise ModelError(f"{path} {absent(path)}; export the run again")
    return validate(read_object(path, ModelError, "export the run again"), Manifest, str(path))
