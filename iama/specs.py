"""What a configuration names: policies, rewards, and how a policy is sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from iama.schema import Strict

Dtype = Literal["float32", "bfloat16", "float16"]


class PolicySpec(Strict):
    """A policy: a Hugging Face model directory or hub name (org/name), with or without an adapter."""

    path: str
    """Base or merged model."""
    adapter: str | None = None
    """PEFT adapter directory to put on it."""
    dtype: Dtype = "float32"
    device: str = "auto"
    """`auto` (the first GPU, else the CPU) or a torch device."""
    chat_template: str | None = None
    """A .jinja file, for a model whose tokenizer has no chat template of its own."""
    trust_remote_code: bool = False


class RewardScale(Strict):
    """Mean and standard deviation of a reward on reference samples (`iama standardise` measures them)."""

    mean: float
    std: float = Field(gt=0)


class RewardSpec(Strict):
    """A reward: a sequence classifier (`model`) or a TRL reward function (`function`)."""

    model: str | None = None
    head: str | int | None = None
    """Label or index of the output that is the reward; required if the model has more than one."""
    sign: Literal[1, -1] = 1
    """-1 for a cost."""
    function: str | None = None
    """`path/to/file.py:name` or `package.module:name` of a function (prompts, completions, **columns)."""
    scale: RewardScale | None = None
    """Standardise: (reward - mean) / std, fixed once for the run, never per group."""
    batch_size: int = Field(64, ge=1)
    dtype: Dtype = "float32"
    device: str = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of `model` (a sequence classifier) and `function`")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"function {self.function!r} needs the form path/to/file.py:name or package.module:name")
        if self.function is not None and (self.head is not None or self.sign != 1):
            raise ValueError("`head` and `sign` belong to a `model`; let the function return what is wanted")
        return self


class Sampling(Strict):
    """How a policy is sampled, in training, generation and evaluation alike; plain sampling by default.

    Same meaning and order as in transformers' `generate`: repetition penalty, temperature, top_k, top_p, min_p.
    """

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that together reach this probability; 1: all."""
    top_k: int = Field(0, ge=0)
    """Keep this many of the likeliest tokens; 0: all."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens less likely than this share of the likeliest one's probability; 0: none."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divides the positive logits, and multiplies the negative ones, of tokens that prompt or response hold."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A response ends before the first of these strings."""
    max_new_tokens: int = Field(128, ge=1)

    @field_validator("stop", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"write a list of strings, [{value!r}]")
        return value


def sampling_differences(trained: Sampling, used: Sampling) -> list[str]:
    """Each setting in which two samplings differ, as text: `temperature 0.7 (trained with 1.0)`."""
    pairs = [(name, getattr(trained, name), getattr(used, name)) for name in Sampling.model_fields]
    return [f"{name} {_show(value)} (trained with {_show(before)})" for name, before, value in pairs if value != before]


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
