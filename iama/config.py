"""Configuration: one frozen schema for training and one for evaluation. Importing it does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from iama.aggregates import parse_aggregate
from iama.operators import Operator, parse_operator
from iama.schema import Strict
from iama.specs import PolicySpec, RewardSpec, Sampling


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
    methods: Annotated[list[Literal["bon", "bop"]], Field(min_length=1)] = ["bon"]  # noqa: RUF012
    budgets: Annotated[list[int], Field(min_length=1)] = [1, 2, 4, 8, 16, 32, 64]  # noqa: RUF012
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
