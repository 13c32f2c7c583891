"""Configuration: one frozen schema for training and one for evaluation, read from YAML.

Unknown keys are refused with the nearest known one named. Importing this module does not import torch.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from iama.aggregates import parse_aggregate
from iama.errors import ConfigError
from iama.operators import Operator, parse_operator


class Strict(BaseModel):
    """Base of every block: frozen, no unknown keys, field docstrings are the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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


class EvaluationCriterion(Strict):
    """A criterion to judge: the proxy reward selects, the gold reward only judges."""

    name: str = Field(min_length=1)
    proxy: RewardSpec
    gold: RewardSpec | None = None


class TrainingCriterion(EvaluationCriterion):
    """A criterion to train for; its gold reward, if any, is logged and never used."""

    operator: str = "bon(4)"
    """What will serve it: identity, bon(N), bop(MU), bop_zt(LAM), soft_bon(N, TEMPERATURE), tilt(TEMPERATURE), ..."""
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _operator_parses(self) -> Self:
        parse_operator(self.operator)
        return self

    def parsed_operator(self) -> Operator:
        """The operator itself."""
        return parse_operator(self.operator)


def _distinct_names(criteria: list[Any]) -> None:
    names = [c.name for c in criteria]
    if len(set(names)) < len(names):
        raise ValueError(f"criteria names must differ, got {names}")


class ObjectiveConfig(Strict):
    """The objective: `aggregate_k(E_[operator_k] reward_k)`."""

    criteria: Annotated[list[TrainingCriterion], Field(min_length=1)]
    estimator: Literal["auto", "loo", "loo1", "plugin"] = "auto"
    """auto: leave-one-out for G >= 2N, leave-one-out-minus-one below; plugin: the paper's (biased)."""
    aggregate: str = "sum"
    """sum (weighted), min, or smooth_min(GAMMA)."""
    running_mean_decay: float = Field(0.9, ge=0, lt=1)
    """Of the values at which min and smooth_min take their slopes, per roll-out batch; 0: each batch's own values."""
    group_normalisation: bool = False
    """Divide by each group's standard deviation; only with `estimator: plugin`, as the paper's recipe."""
    on_nan: Literal["error", "drop"] = "error"
    """A completion for which a reward is None or NaN: stop, or leave it out of its group."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct_names(self.criteria)
        parse_aggregate(self.aggregate)
        if self.group_normalisation and self.estimator != "plugin":
            raise ValueError(f"group_normalisation needs estimator: plugin, not {self.estimator}")
        return self


class KLConfig(Strict):
    """How the policy is held near the reference, besides `trainer.beta`.

    The first variation carries a factor N, so the same beta weighs about N times less against Best-of-N than
    against a single sample. A target takes the choice of beta off your hands.
    """

    target: float | None = Field(None, gt=0)
    """KL to the reference (nats per token, as TRL logs it) that beta is steered to; without it beta is fixed."""
    gain: float = Field(0.1, gt=0, le=1)
    """Largest rise of log beta in one optimiser step; it falls by at most a fifth of that."""
    chi2: float = Field(0.0, ge=0)
    """Weight of a chi-squared penalty (sequence level), which bounds what over-optimising the proxy can cost."""


SAMPLING_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "max_new_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
}
"""Names that TRL and transformers use, and the field of `Sampling` that stands for each."""


def _no_stop(written: str) -> str:
    return (
        f"{written} cannot be used in training, where TRL ends a response at end tokens only; drop it here and set "
        "`stop` where the policy is served"
    )


class TrainingConfig(Strict):
    """A training run."""

    name: str
    output_dir: str
    """The run's folder: resolved config, metrics.jsonl, checkpoints, adapter."""
    policy: PolicySpec
    prompts: str
    """JSONL with a `prompt` a line; further columns go to the reward functions."""
    objective: ObjectiveConfig
    world_size: int = Field(1, ge=1)
    """Number of processes the run is meant for; another number is refused, since it would be another run."""
    seed: int = 0
    kl: KLConfig = KLConfig()
    sampling: Sampling = Sampling()
    """Of the roll-outs; `iama.json` carries it to whatever serves the model."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of TRL's GRPOConfig, unchanged, except those that `sampling` fills."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Any field of PEFT's LoraConfig, unchanged."""

    @field_validator("sampling")
    @classmethod
    def _no_stop_strings(cls, sampling: Sampling) -> Sampling:
        if sampling.stop:
            raise ValueError(_no_stop(f"stop {list(sampling.stop)}"))
        return sampling

    @field_validator("trainer")
    @classmethod
    def _sampling_has_its_block(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        nested = trainer.get("generation_kwargs")
        places = [("", trainer), ("generation_kwargs.", nested if isinstance(nested, dict) else {})]
        for prefix, block in places:
            for key, name in SAMPLING_NAMES.items():
                if key in block and name == "stop":
                    raise ValueError(_no_stop(f"{prefix}{key} = {block[key]!r}"))
                if key in block:
                    raise ValueError(f"{prefix}{key} = {block[key]!r} has one place: write `sampling.{name}` instead")
        return trainer


class EvaluationConfig(Strict):
    """An evaluation: policies x criteria x methods x budgets on held-out prompts."""

    name: str
    output_dir: str
    policies: Annotated[dict[str, PolicySpec], Field(min_length=1)]
    """By name; savings are measured for `iama` against `base` and `grpo`."""
    prompts: str
    max_prompts: int | None = Field(None, ge=1)
    criteria: Annotated[list[EvaluationCriterion], Field(min_length=1)]
    methods: Annotated[list[Literal["bon", "bop"]], Field(min_length=1)] = ["bon"]
    budgets: Annotated[list[int], Field(min_length=1)] = [1, 2, 4, 8, 16, 32, 64]
    num_samples: int = Field(256, ge=4)
    """Pool size a prompt; curves reach a quarter of it."""
    trained_budget: int = Field(4, ge=1)
    sampling: Sampling = Sampling()
    batch_size: int = Field(256, ge=1)
    """Rows decoded together."""
    num_bootstrap: int = Field(1000, ge=100)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct_names(self.criteria)
        too_big = [n for n in [*self.budgets, self.trained_budget] if not 1 <= n <= self.num_samples // 4]
        if too_big:
            raise ValueError(
                f"budgets {too_big} lie outside 1..{self.num_samples // 4}: an unbiased curve is reliable only up to "
                f"a quarter of num_samples = {self.num_samples}; raise num_samples or drop them"
            )
        return self


C = TypeVar("C", bound=Strict)


def load_config(path: Path, cls: type[C], overrides: list[str] | None = None) -> C:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML, list items by index) and validate.

    Raises `ConfigError`, one line per mistake: the key, its value, the file, and what to write.
    """
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(raw).__name__}")
    for override in overrides or []:
        _apply(raw, override)
    return validate(raw, cls, str(path))


def validate(raw: dict[str, Any], cls: type[C], source: str) -> C:
    """Validate a mapping; `ConfigError` names the keys, values and nearest known keys."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_message(item, cls, source) for item in error.errors())) from error


def nearest(key: str, known: list[str]) -> str:
    """A hint with the nearest known key, or all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"


def _message(item: Any, cls: type[Strict], source: str) -> str:
    location = [part for part in item["loc"] if part != "function-after"]
    key = ".".join(map(str, location)) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        return f"{source}: unknown key {key!r}; {nearest(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{source}: {key!r} is missing"
    value = "" if isinstance(item["input"], dict) else f" (got {str(item['input'])[:80]!r})"
    return f"{source}: {key}: {item['msg'].removeprefix('Value error, ')}{value}"


def _known_keys(cls: type[Strict], location: list[Any]) -> list[str]:
    """Field names of the block at `location`, found by walking the annotations."""
    block: Any = cls
    for part in location:
        if isinstance(part, str) and _is_block(block) and part in block.model_fields:
            block = block.model_fields[part].annotation
        block = next((b for b in _blocks(block)), block)
    return list(block.model_fields) if _is_block(block) else []


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Strict)


def _blocks(annotation: Any) -> list[type[Strict]]:
    """Config classes inside an annotation such as `list[Block]`, `dict[str, Block]` or `Block | None`."""
    if _is_block(annotation):
        return [annotation]
    return [b for argument in getattr(annotation, "__args__", ()) for b in _blocks(argument)]


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: write key=value, e.g. trainer.learning_rate=1e-3")
    *parents, last = path.split(".")
    block: Any = raw
    for part in parents:
        block = _child(block, part, override)
    try:
        parsed = parse_yaml(value)
        if isinstance(block, list):
            block[int(last)] = parsed
        else:
            block[last] = parsed
    except (IndexError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {override!r}: cannot set {last!r} ({error})") from error


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-3` is a number, as YAML 1.2 has it; PyYAML's 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML as configuration files, overrides and methods are read; raises `yaml.YAMLError` or `ValueError`."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _child(block: Any, part: str, override: str) -> Any:
    try:
        if isinstance(block, list):
            return block[int(part)]
        child = block.setdefault(part, {})
    except (IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"--set {override!r}: there is no {part!r} to set something in") from error
    if child is None:
        child = block[part] = {}
    return child
