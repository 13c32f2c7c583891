"""The two file schemas, both frozen: training and evaluation. Importing them does not import torch."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from iama.config.methods import find_tunable
from iama.config.schema import Strict
from iama.config.specs import (
    NO_SETTINGS,
    Dtype,
    Engine,
    PolicySpec,
    PromptsSpec,
    RewardSpec,
    Sampling,
    VllmSettings,
    check_vllm_settings,
)
from iama.errors import without_secrets
from iama.nearest import nearest
from iama.objective.aggregates import parse_aggregate
from iama.objective.estimators import Estimator, check_normalisation
from iama.objective.operators import Operator, parse_operator
from iama.objective.simplex import Weights, check_simplex

OnNan = Literal["error", "drop", "skip_criterion"]


class EvaluationCriterion(Strict):
    """A criterion to judge: the proxy reward selects, the gold reward only judges."""

    name: str = Field(min_length=1)
    proxy: RewardSpec
    gold: RewardSpec | None = None


class TrainingCriterion(EvaluationCriterion):
    """A criterion to train for; its gold reward, if any, is logged and never used."""

    operator: str = "bon(4)"
    """What will serve it: identity, bon(N), bop(MU), bop_zt(LAM), soft_bon(N, TEMPERATURE), tilt(TEMPERATURE),
    series(...), lstat(...), entropic(BETA)"""
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _is_scored_here(self) -> Self:
        for role, spec in (("proxy", self.proxy), ("gold", self.gold)):
            if spec is not None and any(part.engine != "transformers" for part in spec.parts):
                raise ValueError(f"{role}: engine: vllm is for evaluations; training scores with transformers; drop it")
        return self

    @model_validator(mode="after")
    def _operator_parses(self) -> Self:
        if find_tunable(self.operator) is not None:
            raise ValueError(
                f"operator {self.operator!r}: training needs a number; write the one that `iama tune` printed, e.g. "
                "bon(4); `tuned` is for evaluation and `iama generate`"
            )
        _read_once(self.operator)
        return self

    def parsed_operator(self) -> Operator:
        """The operator itself."""
        return _read_once(self.operator)


_read_once = cache(parse_operator)  # by the text: a criterion holds no operator, which cannot be pickled


def _distinct_names(criteria: list[Any]) -> None:
    names = [c.name for c in criteria]
    if len(set(names)) < len(names):
        raise ValueError(f"criteria names must differ, got {names}")


def gold_name(criterion: str) -> str:
    """Name of the reward function that carries a criterion's gold reward."""
    return f"{criterion}_gold"


class ObjectiveConfig(Strict):
    """The objective: `aggregate_k(E_[operator_k] reward_k)`."""

    criteria: Annotated[list[TrainingCriterion], Field(min_length=1)]
    estimator: Estimator = "auto"
    """auto: loo (leave-one-out) for G >= 2N, loo1 (leave-one-out-minus-one) below; loo2: loo1 with a larger baseline;
    tail: auto, extrapolated where G < N; plugin: the paper's (biased)."""
    aggregate: str = "sum"
    """sum (weighted), min, or smooth_min(GAMMA)."""
    weights: Weights = Field("fixed", exclude_if=lambda weights: weights == "fixed")
    """simplex: drawn anew for each group from a Dirichlet law, whose concentrations are the criteria's `weight`."""
    running_mean_decay: float = Field(0.9, ge=0, lt=1)
    """Of the values at which min and smooth_min take their slopes, per roll-out batch; 0: each batch's own values."""
    group_normalisation: bool = False
    """Divide by each group's standard deviation; only with `estimator: plugin`, as the paper's recipe."""
    on_nan: OnNan = "error"
    """A completion without a score (None or NaN): stop; drop: leave it out of its group; skip_criterion: as drop, but a
    criterion that scores no completion of a prompt is left out of that prompt's objective (tasks with rewards of their
    own)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct_names(self.criteria)
        names = [c.name for c in self.criteria]
        for c in self.criteria:
            if c.gold is not None and gold_name(c.name) in names:
                raise ValueError(
                    f"criterion {gold_name(c.name)!r} has the name under which the gold reward of {c.name!r} is "
                    "logged; rename it"
                )
        parse_aggregate(self.aggregate)
        if self.weights == "simplex":
            operators = [c.parsed_operator().name for c in self.criteria]
            check_simplex(operators, self.aggregate, self.on_nan == "skip_criterion")
        if self.group_normalisation:
            check_normalisation(self.estimator)
        return self


class KLConfig(Strict):
    """How the policy is held near the reference, besides `trainer.beta`.

    The first variation carries a factor N, so the same beta weighs about N times less against Best-of-N than
    against a single sample. A target takes the choice of beta off your hands.
    """

    target: float | None = Field(None, gt=0)
    """KL to the reference (nats per token, as TRL logs it) that beta is steered to; needs `trainer.beta` above 0, from
    which it starts. Without a target beta is fixed."""
    gain: float = Field(0.1, gt=0, le=1)
    """Largest change of log beta in one optimiser step; until the KL first reaches the target it falls by a fifth."""
    chi2: float = Field(0.0, ge=0)
    """Weight of a chi-squared penalty (sequence level), which bounds what over-optimising the proxy can cost."""


class WatchConfig(Strict):
    """When a run warns about itself, and when it ends itself; none of it changes what is trained."""

    clipped: float = Field(0.2, ge=0, le=1)
    """Warn above this share of completions that are cut at sampling.max_new_tokens."""
    silent: float = Field(0.5, ge=0, le=1)
    """Warn above this share of groups whose advantages are all zero: they teach nothing."""
    vanished: float = Field(0.4, ge=0, le=1)
    """Warn where a criterion's lift (best of a group less its mean) falls below this share of its beginning."""
    kl: float = Field(1.0, gt=0)
    """Warn above this KL to the reference, in nats per token."""
    kl_factor: float = Field(10.0, gt=1)
    """With kl.target: warn above this multiple of it, if that is less."""
    window: int = Field(20, ge=5)
    """Logged steps of a block, of which hacking and vanished modes are read."""
    stop_on_hacking: bool = False
    """End the run, adapter saved, when gold falls while its proxy rises."""
    max_phase_s: float | None = Field(3600.0, gt=0)
    """A phase (start, roll-out, reward, step, save) that takes longer ends the run with an error; null: never."""
    samples: int = Field(4, ge=0)
    """Completions kept in samples/ at a logged step."""
    vllm_tolerance: float | None = Field(None, gt=0, allow_inf_nan=False, exclude_if=lambda value: value is None)
    """With use_vllm: stop where vLLM's log-probabilities of the roll-outs are further from the trainer's, in nats a
    token; null: what fits the number formats in use, 0.0125 in float32 and float16, 0.1 in bfloat16."""


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

    command: ClassVar[str | None] = "iama train"

    name: str
    output_dir: str
    """The run's folder: resolved config, metrics.jsonl, checkpoints, adapter."""
    policy: PolicySpec
    prompts: PromptsSpec
    """Each with a `prompt`; further columns go to the reward functions."""
    objective: ObjectiveConfig
    world_size: int = Field(1, ge=1)
    """Number of processes the run is meant for; another number is refused, since it would be another run."""
    seed: int = Field(0, ge=0, lt=2**32)
    kl: KLConfig = KLConfig()
    watch: WatchConfig = WatchConfig()
    sampling: Sampling = Sampling()
    """Of the roll-outs; `iama.json` carries it to whatever serves the model."""
    rollouts: Literal["engine", "generate"] = Field("generate", exclude_if=lambda rollouts: rollouts == "generate")
    """What draws them: generate of transformers, or the engine that serves, of the same law; vLLM where
    `trainer.use_vllm` is set."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of TRL's GRPOConfig, unchanged, except those that `sampling` fills."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Any field of PEFT's LoraConfig, unchanged."""
    quantization: Literal["4bit"] | None = None
    """4bit: train on a base in NF4 (QLoRA); needs a GPU and iama[quantization]."""

    @field_validator("policy")
    @classmethod
    def _rolls_out_by_trl(cls, policy: PolicySpec) -> PolicySpec:
        if policy.engine != "transformers":
            raise ValueError(
                f"engine: {policy.engine} is what samples for an evaluation; for roll-outs write trainer.use_vllm: true"
            )
        return policy

    @field_validator("sampling")
    @classmethod
    def _no_stop_strings(cls, sampling: Sampling) -> Sampling:
        if sampling.stop:
            raise ValueError(_no_stop(f"stop {list(sampling.stop)}"))
        return sampling

    @field_validator("trainer", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, trainer: Any) -> Any:
        if not isinstance(trainer, dict):
            return trainer
        off = {key: "no" for key, value in trainer.items() if str(key).endswith("_strategy") and value is False}
        return {**trainer, **off}

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

    @field_validator("trainer")
    @classmethod
    def _holds_no_secret(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        for key, value in trainer.items():
            if value is not None and (key.endswith("_token") or without_secrets(str(value)) != str(value)):
                raise ValueError(
                    f"{key} holds a key or a login, which would be written into files; drop it here, and log in with "
                    "`hf auth login` or set the environment variable that the service reads, e.g. HF_TOKEN"
                )
        return trainer


class PolicyChange(Strict):
    """What a policy does differently for one criterion."""

    adapter: str | None = None
    system_prompt: str | None = None


class EvaluatedPolicy(Strict):
    """A policy to evaluate: a model (the fields of `PolicySpec`), or completions in a pool file."""

    path: str | None = None
    """Base or merged model."""
    adapter: str | None = None
    """PEFT adapter directory to put on it."""
    dtype: Dtype = "float32"
    device: str = "auto"
    chat_template: str | None = None
    trust_remote_code: bool = False
    engine: Engine = Field("transformers", exclude_if=lambda engine: engine == "transformers")
    """What samples it: transformers (this package's engine), or vllm."""
    vllm: VllmSettings = Field(NO_SETTINGS, exclude_if=lambda settings: settings == NO_SETTINGS)
    """With engine: vllm, what vLLM is told."""
    pool: str | None = None
    """A pool file with its completions, in the place of a model."""
    system_prompt: str | None = None
    """Put before every prompt that this policy answers; rewards do not see it."""
    by_criterion: dict[str, PolicyChange] = Field(default_factory=dict)
    """Another adapter or system prompt for a criterion: specialists, or a policy that is told its criterion."""
    training_run: tuple[str, ...] = ()
    """Folders of the runs that trained it, for the break-even; a list or one folder."""

    @field_validator("training_run", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _model_or_pool(self) -> Self:
        if (self.path is None) == (self.pool is None):
            raise ValueError("give exactly one of `path` (a model) and `pool` (a file of completions)")
        if self.pool is not None and (self.adapter or self.system_prompt or self.by_criterion):
            raise ValueError("a `pool` is sampled already; adapter, system_prompt and by_criterion belong to a model")
        if self.pool is not None and self.engine != "transformers":
            raise ValueError(f"a `pool` is sampled already; engine: {self.engine} belongs to a model")
        check_vllm_settings(self.engine, self.vllm, self.device)
        return self

    def variant(self, criterion: str) -> tuple[PolicySpec, str | None]:
        """The model and system prompt that serve a criterion; not of a pool."""
        assert self.path is not None
        change = self.by_criterion.get(criterion, PolicyChange())
        spec = PolicySpec(
            path=self.path,
            adapter=change.adapter or self.adapter,
            dtype=self.dtype,
            device=self.device,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            engine=self.engine,
            vllm=self.vllm,
        )
        return spec, change.system_prompt or self.system_prompt


class WinRateBaseline(Strict):
    """The policy and number of samples that win rates are counted against."""

    policy: str
    samples: int = Field(1, ge=1)


def _check_named(config: EvaluationConfig) -> None:
    """Refuse policies that are named and are none, and methods that are named twice."""
    named = {"trained": [config.trained], "references": config.references}
    for key in config.model_fields_set & set(named):
        for name in named[key]:
            if name not in config.policies:
                raise ValueError(
                    f"{key} names {name!r}, which is no policy; {nearest(name, config.policies, 'policies')}"
                )
    twice = [method for i, method in enumerate(config.methods) if method in config.methods[:i]]
    if twice:
        raise ValueError(f"methods names {twice[0]!r} twice; write it once")


def _check_budgets(config: EvaluationConfig) -> None:
    """Refuse numbers of samples that the pools are too small for, or that stand twice."""
    largest, told = config.num_samples // 4, ""
    if too_big := [n for n in config.budgets if not 1 <= n <= largest]:
        told = f"budgets {too_big} lie outside"
    elif config.trained_budget > largest:
        default = "" if "trained_budget" in config.model_fields_set else " (the default)"
        told = f"trained_budget = {config.trained_budget}{default} lies outside"
    if told:
        raise ValueError(
            f"{told} 1..{largest}: an unbiased curve is reliable only up to a quarter of num_samples = "
            f"{config.num_samples}; raise num_samples, or write less"
        )
    twice = [n for i, n in enumerate(config.budgets) if n in config.budgets[:i]]
    if twice:
        raise ValueError(f"budgets names {twice[0]} samples twice; write it once")


SAMPLES = "samples"
"""What the numbers of samples are called where `budgets` names the values of dials, too."""
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of samples where none are written."""
DialValue = int | float | str


def _check_samples(values: Any) -> None:
    """Refuse `budgets.samples` that are no whole numbers."""
    whole = isinstance(values, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in values)
    if values is not None and not whole:
        raise ValueError(f"budgets.{SAMPLES}: write a list of whole numbers, e.g. [1, 2, 4] (got {values!r})")


def _without_dials(raw: Any) -> Any:
    """A configuration whose `budgets` names dials, with the numbers of samples and the dials apart."""
    if not isinstance(raw, dict):
        return raw
    if "dials" in raw:
        raise ValueError("unknown key 'dials'; write `budgets: {samples: [1, 2, 4], cards: [0.5, 0.9]}`")
    if not isinstance(raw.get("budgets"), dict):
        return raw
    given = {str(key): value for key, value in raw["budgets"].items()}
    if not given:
        raise ValueError("budgets is empty; write numbers of samples, e.g. [1, 2, 4], or leave it out")
    _check_samples(given.get(SAMPLES))
    for key, values in given.items():
        known = isinstance(values, list) and all(isinstance(v, DialValue) and not isinstance(v, bool) for v in values)
        if not known:
            raise ValueError(f"budgets.{key}: write a list of numbers, or of texts such as 20x2 (got {values!r})")
    samples = {"budgets": given.pop(SAMPLES)} if SAMPLES in given else {}
    return {key: value for key, value in raw.items() if key != "budgets"} | samples | {"dials": given}


class EvaluationConfig(Strict):
    """An evaluation: policies x criteria x methods x budgets on held-out prompts."""

    command: ClassVar[str | None] = "iama evaluate"

    name: str
    output_dir: str
    policies: Annotated[dict[str, EvaluatedPolicy], Field(min_length=1)]
    """By name."""
    trained: str = "iama"
    """The policy whose savings are measured."""
    references: list[str] = Field(default_factory=lambda: ["base", "grpo"])
    """What it is compared with, as far as they are among `policies`; KL and fluency are measured by the first."""
    prompts: PromptsSpec | None = None
    """May be left out where every policy is a pool file, which holds its prompts."""
    criteria: Annotated[list[EvaluationCriterion], Field(min_length=1)]
    methods: list[str] = Field(default_factory=lambda: ["bon"], min_length=1)
    """bon and bop are measured at every budget from one pool; others, e.g. `cards(target=1.5)`, as they are written."""
    tuning: str | None = None
    """The `tuning.json` of `iama tune`, from which methods such as `bon(tuned)` take their numbers."""
    num_samples: int = Field(256, ge=4)
    """Pool size a prompt; curves reach a quarter of it."""
    budgets: list[int] = Field(
        default_factory=lambda given: [n for n in BUDGETS if n <= given.get("num_samples", 256) // 4], min_length=1
    )
    """Numbers of samples, else those of 1, 2, 4, ..., 64 that fit; or, by key, these as `samples` and the values of
    guided methods' dials: `{samples: [1, 2, 4], cards: [0.5, 0.9], sea: [10x1, 20x2]}`."""
    dials: dict[str, list[DialValue]] = Field(default_factory=dict)
    """By method, as `budgets` names them, where they are written."""
    num_answers: int = Field(1, ge=1)
    """Answers of each guided method to every prompt, by seeds of their own; values and costs are means over them."""
    trained_budget: int = Field(4, ge=1)
    win_rate_baseline: WinRateBaseline | None = None
    """Else the first reference's single sample."""
    sampling: Sampling = Sampling()
    log_probabilities: bool = True
    """Measure KL and fluency: two more forward passes over every pool."""
    batch_size: int = Field(256, ge=1)
    """Rows decoded together."""
    num_bootstrap: int = Field(1000, ge=100)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later is not written down where it is not used, and dials stand where they are written.

        So an evaluation that was made before there were several answers, or dials, is the same today.
        """
        fields: dict[str, Any] = dump(self)
        if fields.get("num_answers") == 1:
            del fields["num_answers"]
        if dials := fields.pop("dials", {}):
            fields["budgets"] = ({SAMPLES: fields["budgets"]} if "budgets" in fields else {}) | dials
        return fields

    @model_validator(mode="before")
    @classmethod
    def _dials_apart(cls, raw: Any) -> Any:
        return _without_dials(raw)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct_names(self.criteria)
        _check_budgets(self)
        names = [c.name for c in self.criteria]
        for name, policy in self.policies.items():
            unknown = [criterion for criterion in policy.by_criterion if criterion not in names]
            if unknown:
                raise ValueError(
                    f"policies.{name}.by_criterion names {unknown[0]!r}; {nearest(unknown[0], names, 'criteria')}"
                )
        if self.prompts is None and any(policy.pool is None for policy in self.policies.values()):
            raise ValueError("'prompts' is missing; only pool files hold prompts of their own")
        _check_named(self)
        baseline = self.win_rate_baseline
        if baseline is not None and baseline.policy not in self.policies:
            hint = nearest(baseline.policy, self.policies, "policies")
            raise ValueError(f"win_rate_baseline.policy {baseline.policy!r} is no policy; {hint}")
        return self
