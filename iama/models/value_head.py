"""What a policy's next token is worth: a small head on its last hidden state, as files keep it.

`Q(h, v) = f(h) + A(h) B_v`, with `f` and `A` affine in the hidden state `h` that the output matrix reads, and `B` a few
numbers a token. A folder holds a head as `value_head.json` (what it is, and how good) and `value_head.safetensors`.
`trainers.value_head` fits one, `inference.samplers.tilted` samples with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from iama.config.schema import Strict, validate
from iama.config.specs import Sampling
from iama.errors import ModelError
from iama.files import absent
from iama.models.fingerprint import fingerprint
from iama.reading import read_object

FILE_NAME = "value_head.json"
WEIGHTS = "value_head.safetensors"
REMEDY = "fit one with iama distill POOL --column NAME --value-head --out FOLDER"


class HeadPolicy(Strict):
    """The policy that a head stands on, as the pool of its samples names it."""

    name: str
    path: str | None = None
    adapter: str | None = None
    fingerprint: str
    """Of all that decides the policy's answers."""


class HeadPool(Strict):
    """What a head was fitted on."""

    file: str
    num_prompts: int = Field(ge=1)
    """Prompts that were learnt from."""
    num_held_out: int = Field(ge=1)
    """Prompts that only judged."""
    num_samples: int = Field(ge=1)
    """Scored samples of all prompts together."""
    num_tokens: int = Field(ge=1)
    """Sampled tokens that were learnt from."""
    sampling: Sampling
    system_prompt: str | None = None


class HeadFit(Strict):
    """How well a head foretells the final reward from a single token, on the prompts that were held out.

    `r_squared`: the share of the rewards' squared deviations that it explains, 1 at best; `within` of those from the
    mean of the prompt. `spearman`: its rank correlation with the rewards. All over tokens.
    """

    r_squared: float
    r_squared_within: float
    spearman: float


class HeadCost(Strict):
    """What a head took, in floating-point operations and seconds. What scoring the pool took is not in its file.

    `samples_flops` drew the pool, `hidden_flops` read it again, `fit_flops` solved for the head.
    """

    samples_flops: float = Field(ge=0)
    hidden_flops: float = Field(ge=0)
    fit_flops: float = Field(ge=0)
    read_tokens: int = Field(ge=0)
    """Tokens of all scored samples, each with its prompt: what a reward reads of them."""
    seconds: float = Field(ge=0)
    """Of reading and fitting."""

    @property
    def flops(self) -> float:
        """All of them."""
        return self.samples_flops + self.hidden_flops + self.fit_flops


class HeadRecord(Strict):
    """`value_head.json`."""

    format: Literal[1] = 1
    policy: HeadPolicy
    reward: str
    """The pool's column of rewards."""
    pool: HeadPool
    hidden_size: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    rank: int = Field(ge=1)
    """Numbers a token in B."""
    ridge: float = Field(ge=0)
    """Of least squares, a share of the features' own squares."""
    spread: float = Field(gt=0)
    """Standard deviation of Q over the tokens that were learnt from: the unit of a sampler's strength."""
    held_out: HeadFit
    cost: HeadCost
    versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class ValueHead:
    """A head with its record: `f_D1`, `A_DR` with the constant in the last row, and `B_VR`, all float32."""

    record: HeadRecord
    f_D: torch.Tensor
    A_DR: torch.Tensor
    B_VR: torch.Tensor

    def values(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Q of every token after each hidden state, `[N, V]`, in units of the reward, float64."""
        h_ND = with_constant(hidden_ND)
        return (h_ND @ self.f_D.double())[:, None] + h_ND @ self.A_DR.double() @ self.B_VR.double().T

    @property
    def flops_per_token(self) -> float:
        """Operations of what sampling a token takes: A(h), and its product with every B_v; f is the same for all."""
        (size, rank), vocabulary = self.A_DR.shape, len(self.B_VR)
        return 2.0 * rank * (size + vocabulary)


def with_constant(hidden_ND: torch.Tensor) -> torch.Tensor:
    """Hidden states with a last entry of 1, float64."""
    hidden_ND = hidden_ND.double()
    return torch.cat([hidden_ND, hidden_ND.new_ones(len(hidden_ND), 1)], dim=1)


# Files. -----------------------------------------------------------------------------------------------------------


def save_head(folder: Path, head: ValueHead) -> None:
    """Write a head into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"f": head.f_D, "A": head.A_DR, "B": head.B_VR}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / FILE_NAME).write_text(head.record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, source: str) -> HeadRecord:
    """A head's record, without its weights; raises `ModelError` naming `source` for what is no head."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ModelError(f"{source}: {str(path)!r} {absent(path)}; {REMEDY}")
    return validate(read_object(path, ModelError, REMEDY), HeadRecord, str(path))


def find_record(where: Path, source: str, fingerprint: str | None, reward: str | None) -> tuple[Path, HeadRecord]:
    """The head of a policy for a reward: `where` itself, or the one of the folders in it that belongs to both.

    `fingerprint` is the policy's, `reward` the reward's name; None: not known, and whichever there is will do. Raises
    `ModelError` naming `source` where there is none, or several.
    """
    if not where.is_dir():
        raise ModelError(f"{source}: the value head {str(where)!r} {absent(where)}; {REMEDY}")
    folders = [where] if (where / FILE_NAME).is_file() else sorted(path.parent for path in where.glob(f"*/{FILE_NAME}"))
    if not folders:
        raise ModelError(f"{source}: {str(where)!r} holds no {FILE_NAME}, nor does a folder in it; {REMEDY}")
    found = [(folder, read_record(folder, source)) for folder in folders]
    of_policy = [pair for pair in found if fingerprint is None or pair[1].policy.fingerprint == fingerprint]
    if not of_policy:
        others = ", ".join(sorted({repr(record.policy.name) for _, record in found}))
        raise ModelError(
            f"{source}: the value head {str(where)!r} was fitted on another policy ({others}; fingerprints differ), "
            f"and its values mean nothing here; {REMEDY} on a pool of this policy's samples"
        )
    fitting = [pair for pair in of_policy if reward is None or pair[1].reward == reward]
    if not fitting:
        names = ", ".join(sorted({repr(record.reward) for _, record in of_policy}))
        raise ModelError(
            f"{source}: the value head {str(where)!r} foretells {names}, not {reward!r}; {REMEDY} with "
            f"--column {reward}, or name the column as the reward is named"
        )
    if len(fitting) > 1:
        several = ", ".join(str(folder) for folder, _ in fitting)
        raise ModelError(f"{source}: several value heads would do ({several}); name one of these folders")
    return fitting[0]


def load_head(folder: Path, source: str) -> ValueHead:
    """A head with its weights; raises `ModelError` naming `source` where they are not what the record says.

    A few are kept in memory, as long as their files are the same.
    """
    return _loaded(folder, source, fingerprint(folder))


@lru_cache(maxsize=4)
def _loaded(folder: Path, source: str, _: str) -> ValueHead:
    record, path = read_record(folder, source), folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{source}: {str(path)!r} {absent(path)}; {REMEDY}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{source}: {path} is damaged ({error}); {REMEDY}") from error
    size = record.hidden_size + 1
    wanted = {"f": (size,), "A": (size, record.rank), "B": (record.vocabulary, record.rank)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ModelError(f"{source}: {path} holds {found}, where its record says {wanted}; {REMEDY}")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ModelError(f"{source}: {path} holds numbers that are not finite; {REMEDY}")
    return ValueHead(record, tensors["f"].float(), tensors["A"].float(), tensors["B"].float())


# Hidden states. -----------------------------------------------------------------------------------------------------


def output_size(model: Any, source: str) -> tuple[int, int]:
    """Size of the hidden state that a model's output matrix reads, and of the vocabulary that it gives.

    Raises `ModelError` naming `source` for a model without such a matrix.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None:
        kind = getattr(model.config, "model_type", "?")
        raise ModelError(f"{source}: a {kind} model has no output matrix that a value head could stand on")
    return int(weight.shape[1]), int(weight.shape[0])


@contextmanager
def hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """While a model is called: what its output matrix reads, a tensor `[R, T, D]` a call."""
    seen: list[torch.Tensor] = []

    def note(_module: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
