"""What a configuration names: policies, rewards, and how a policy is sampled."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from iama.calls import read_call
from iama.config.schema import Strict
from iama.errors import without_secrets
from iama.reading import parse_yaml

Dtype = Literal["float32", "bfloat16", "float16"]
LAW = ("temperature", "max_tokens")
LEAVABLE = (*LAW, "seed", "n")
"""Parameters of a request that can be left to the server; those of `LAW` decide which answers are likely."""


class VllmSettings(Strict):
    """Arguments of vLLM's `LLM`, by its names: those that decide speed and memory, none that decides the law."""

    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes, else 0.92: lower it where a reward lives there, too."""
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    """Memory of keys and values, in the place of that share; on a CPU else VLLM_CPU_KVCACHE_SPACE, or 2 GiB."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of a prompt with its answer, else as many as the model reads."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Rows that are decoded together."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Tokens that are read in one step."""
    tensor_parallel_size: int | None = Field(None, ge=1)
    """GPUs that share a model."""
    enforce_eager: bool | None = None
    """Compile nothing: a quicker start, slower steps."""
    enable_prefix_caching: bool | None = None
    block_size: int | None = Field(None, ge=1)
    """Tokens of a block of keys and values, of which the prefix cache keeps whole ones: else 16, on a CPU 128."""


NO_SETTINGS = VllmSettings()
Engine = Literal["transformers", "vllm"]
"""What runs a model: this package's engine on transformers, or vLLM."""


def check_vllm_settings(engine: Engine, settings: VllmSettings, device: str) -> None:
    """Refuse settings of an engine that is not used, and a device, which vLLM does not take."""
    if engine == "transformers" and settings != NO_SETTINGS:
        raise ValueError("`vllm` has no use with engine: transformers; write engine: vllm, or drop it")
    if engine == "vllm" and device != "auto":
        raise ValueError(
            f"device {device!r} has no use with engine: vllm, which takes the devices that it finds; drop it, and set "
            "e.g. CUDA_VISIBLE_DEVICES"
        )


class PolicySpec(Strict):
    """A policy: a Hugging Face model directory or hub name (org/name), with or without an adapter."""

    path: str
    """Base or merged model."""
    adapter: str | None = None
    """PEFT adapter directory to put on it. A training starts from its weights, and `path` stays the reference."""
    dtype: Dtype = "float32"
    device: str = "auto"
    """`auto` (the first GPU, else the CPU) or a torch device."""
    chat_template: str | None = None
    """A .jinja file, for a model whose tokenizer has no chat template of its own."""
    trust_remote_code: bool = False
    engine: Engine = Field("transformers", exclude_if=lambda engine: engine == "transformers")
    """What samples it."""
    vllm: VllmSettings = Field(NO_SETTINGS, exclude_if=lambda settings: settings == NO_SETTINGS)
    """With engine: vllm, what vLLM is told."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_vllm_settings(self.engine, self.vllm, self.device)
        return self


MAX_SCORE = 1e50
"""The largest size of a score: squares of its squares, and sums of these, must be floats, too."""


class RewardScale(Strict):
    """Mean of a reward over samples, and its standard deviation within a prompt (`iama standardise` measures them)."""

    mean: float
    std: float = Field(gt=0)


def check_no_secret(url: str, api_key_env: str | None = None) -> None:
    """Raise `ValueError` for a login in an address, or a key in the place of its variable's name; it shows neither."""
    if any(letter in url for letter in "@?#"):
        raise ValueError(
            "the url holds a user or a query, which would be written into files; put the key into the environment "
            "variable that api_key_env names, and end the url with its path"
        )
    if api_key_env is not None and (not _VARIABLE.fullmatch(api_key_env) or KEY_LIKE.match(api_key_env)):
        raise ValueError(
            "api_key_env must be the name of an environment variable, which holds the key, and not the key itself; "
            "write e.g. OPENAI_API_KEY"
        )


_SECRET_SETTING = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password|passwd)$")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEY_LIKE = re.compile(r"(?=.*[0-9])(?=.*[a-z]).{20}")
"""As no variable is named."""


class JudgeSpec(Strict):
    """A language model that judges, behind an OpenAI-compatible endpoint."""

    url: str | tuple[str, ...]
    """Address of the endpoint, e.g. http://localhost:8000/v1; a list: of several servers of the same model."""
    model: str
    prompt_file: str
    """Text with {prompt} and {completion}; pairwise with {prompt}, {first} and {second}."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: a number; pairwise: against `baseline_column` in both orders, 1 won, 0.5 tie or disagreement, 0."""
    baseline_column: str | None = None
    """Column of the prompts with the text to compare with; pairwise only."""
    lowest: float = 1.0
    highest: float = 10.0
    """A pointwise answer must be one number from `lowest` to `highest`; anything else is unparsable."""
    temperature: float = Field(0.0, ge=0)
    draw: int = Field(0, ge=0)
    """Which of a noisy judge's independent answers; give proxy and gold different ones."""
    max_tokens: int = Field(16, ge=1)
    concurrency: int = Field(8, ge=1)
    """Requests at a time, over all processes of a training."""
    num_retries: int = Field(4, ge=0)
    timeout_s: float = Field(60.0, gt=0)
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server that needs none takes any."""
    leave_out: tuple[Literal["temperature", "max_tokens", "seed"], ...] = Field((), exclude_if=lambda names: not names)
    """Parameters that are not sent, for a server that refuses them."""
    cache: str = "runs/judge-cache"
    """Folder of answers by a hash of all that was sent, so that nothing is asked twice."""
    input_price: float = Field(0.0, ge=0)
    """Currency units for a million prompt tokens, to show the cost beforehand."""
    output_price: float = Field(0.0, ge=0)

    @property
    def used_temperature(self) -> float:
        """The temperature at which it answers; one that is left out is 1 by the protocol."""
        return 1.0 if "temperature" in self.leave_out else self.temperature

    @model_validator(mode="after")
    def _baseline_fits(self) -> Self:
        if (self.mode == "pairwise") != (self.baseline_column is not None):
            raise ValueError("mode: pairwise needs `baseline_column`, and mode: pointwise has no use for it")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} must be below highest {self.highest:g}")
        for name in self.leave_out:
            if name != "seed" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} {getattr(self, name):g} has no use where leave_out names it; drop one of them"
                )
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the servers."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        if not self.urls:
            raise ValueError("url lists no server; write one like http://localhost:8000/v1")
        for url in self.urls:
            check_no_secret(url, self.api_key_env)
        return self


class EnsembleSpec(Strict):
    """Several rewards as one, on a common scale: each member has a `scale`, or all are on one by themselves."""

    members: tuple[RewardSpec, ...]
    """At least two rewards that score texts; none of them an ensemble or a column."""
    aggregate: Literal["mean", "median", "min", "mean_minus_std"] = "mean"
    """Of the members' scores. mean_minus_std: less `coefficient` times their standard deviation."""
    coefficient: float = Field(0.5, ge=0)
    same_scale: bool = False
    """The members are on one scale by themselves, and need no `scale`."""

    @model_validator(mode="after")
    def _members_fit(self) -> Self:
        if len(self.members) < 2:
            raise ValueError(f"an ensemble needs at least 2 members, got {len(self.members)}")
        for number, member in enumerate(self.members):
            if member.source in ("ensemble", "column"):
                remedy = "list its members here" if member.ensemble else "give a reward that scores texts"
                raise ValueError(f"members.{number}: the source {member.source} is none for a member; {remedy}")
        if self.coefficient != 0.5 and self.aggregate != "mean_minus_std":
            raise ValueError(f"`coefficient` belongs to aggregate: mean_minus_std, not to {self.aggregate}")
        return self


SOURCES = ("model", "function", "judge", "verifier", "ensemble", "column", "kind")


class RewardSpec(Strict):
    """A reward: exactly one of `model`, `function`, `judge`, `verifier`, `ensemble`, `column` and `kind`."""

    model: str | None = None
    """Directory or hub name of a sequence classifier, or the directory of a PEFT adapter on one."""
    head: str | int | None = None
    """Label or index of the classifier's output that is the reward; required if it has more than one."""
    sign: Literal[1, -1] = 1
    """-1 for a cost."""
    pair: bool | None = Field(None, exclude_if=lambda pair: pair is None)
    """Whether the classifier reads prompt and answer as a pair of texts (a cross-encoder), and not as one."""
    function: str | None = None
    """`path/to/file.py:name` or `package.module:name` of a function (prompts, completions, **columns)."""
    judge: JudgeSpec | None = None
    """A language model that judges."""
    verifier: Literal["math"] | None = None
    """math: 1 where the completion's final answer equals the prompt's `answer_column`, else 0 (needs iama[math])."""
    answer_column: str = "answer"
    ensemble: EnsembleSpec | None = None
    """Several rewards as one."""
    column: str | None = None
    """Scores that a pool file holds already; evaluation and tuning only."""
    kind: str | None = Field(None, exclude_if=lambda kind: kind is None)
    """`path/to/file.py:Class(SETTING=VALUE, ...)`, a scorer of your own; or its name in `iama.rewards.load.KINDS`."""
    scale: RewardScale | None = None
    """Standardise: (reward - mean) / std, fixed once for the run, never per group."""
    batch_size: int = Field(64, ge=1)
    dtype: Dtype = "float32"
    device: str = "auto"
    engine: Engine = Field("transformers", exclude_if=lambda engine: engine == "transformers")
    """What runs a `model`; vllm: its pooling runner."""
    vllm: VllmSettings = Field(NO_SETTINGS, exclude_if=lambda settings: settings == NO_SETTINGS)
    """With engine: vllm, what vLLM is told."""

    @property
    def source(self) -> str:
        """Which of `SOURCES` it is."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @property
    def kind_name(self) -> str:
        """The kind's name, as in `iama.rewards.load.KINDS`."""
        return self.source if self.kind is None else read_call(self.kind).name

    @property
    def kind_settings(self) -> dict[str, Any]:
        """The settings that `kind` has in its brackets; their values are YAML."""
        return {key: parse_yaml(value) for key, value in read_call(self.kind or "").arguments if key is not None}

    @property
    def code(self) -> str | None:
        """The code that loading the reward runs, `path/to/file.py:name` or `package.module:name`; None for any other.

        Of an ensemble ask its `parts`.
        """
        return self.kind_name if ":" in self.kind_name else self.function

    @property
    def looked_up(self) -> str | None:
        """What may be asked of the hub: a model's name, or any that the user's own code has; None where nothing is."""
        return self.model or self.code

    @property
    def parts(self) -> tuple[RewardSpec, ...]:
        """The rewards that score texts: an ensemble's members, else the reward itself."""
        return (self,) if self.ensemble is None else self.ensemble.members

    def placed(self, **placement: Any) -> RewardSpec:
        """The reward on another `device` or with another `dtype`; of an ensemble, all its members."""
        if self.ensemble is None:
            return self.model_copy(update=placement)
        members = tuple(member.placed(**placement) for member in self.ensemble.members)
        return self.model_copy(update={"ensemble": self.ensemble.model_copy(update={"members": members})})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(SOURCES)}, got {', '.join(given) or 'none'}")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"function {self.function!r} needs the form path/to/file.py:name or package.module:name")
        for name in ("head", "pair"):
            if self.model is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` belongs to a `model`, not to a {given[0]}")
        if self.ensemble is not None:
            for name in ("sign", "batch_size", "dtype", "device"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` belongs to the members of an ensemble, each of its own")
        if self.sign != 1 and self.source not in ("model", "column"):
            raise ValueError(f"`sign` belongs to a `model` or a `column`; let the {given[0]} return what is wanted")
        if self.verifier is None and self.answer_column != "answer":
            raise ValueError("`answer_column` belongs to a `verifier`")
        return self

    @model_validator(mode="after")
    def _engine_runs_a_model(self) -> Self:
        if self.model is None and self.engine != "transformers":
            raise ValueError(f"engine: {self.engine} belongs to a `model`, not to a {self.source}")
        check_vllm_settings(self.engine, self.vllm, self.device)
        return self

    @model_validator(mode="after")
    def _kind_is_a_call(self) -> Self:
        if self.kind is not None:
            self._check_kind(self.kind)
        return self

    def _check_kind(self, kind: str) -> None:
        call = read_call(kind)
        if call.name in SOURCES:
            raise ValueError(f"write `{call.name}:` itself, not kind {kind!r}")
        try:
            is_whole = bool(call.name) and all(key and value for key, value in call.arguments)
            settings = self.kind_settings
        except ValueError as error:
            raise ValueError(f"kind {kind!r}: write NAME(SETTING=VALUE, ...)") from error
        if not is_whole or len(settings) < len(call.arguments):
            raise ValueError(f"kind {kind!r}: write NAME(SETTING=VALUE, ...)")
        if any(_SECRET_SETTING.search(key or "") for key, _ in call.arguments) or without_secrets(kind) != kind:
            raise ValueError(
                f"the settings of {call.name} hold a key or a login, which would be written into files; let the class "
                "read it from an environment variable, whose name may be a setting, e.g. api_key_env=JUDGE_KEY"
            )


EnsembleSpec.model_rebuild()


class PromptsSpec(Strict):
    """Prompts: a file, or a dataset by name. A bare text is a `path`."""

    path: str
    """A .jsonl, .json, .csv or .parquet file, or the name of a dataset (org/name)."""
    subset: str | None = None
    """Configuration of a named dataset."""
    split: str | None = None
    """Split of a named dataset; required there if it has more than one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name: theirs, e.g. {prompt: question}. Columns that are not named keep their names."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message; text prompts become messages."""
    max_prompts: int | None = Field(None, ge=1)
    """The first so many."""
    too_long: Literal["error", "drop"] = "error"
    """A prompt that leaves a policy no room for max_new_tokens: refuse, or leave out (counted, and said)."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Sampling(Strict):
    """How a policy is sampled, in training, generation and evaluation alike; plain sampling by default.

    Same meaning and order as in transformers' `generate`: repetition penalty, temperature, top_k, top_p, min_p.
    """

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that together reach this probability; 1: all."""
    top_k: int = Field(0, ge=0)
    """Keep this many of the likeliest tokens; 1: the likeliest always; 0: all."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens less likely than this share of the likeliest one's probability; 0: none."""
    repetition_penalty: float = Field(1.0, ge=0.01)
    """Divides the positive logits, and multiplies the negative ones, of tokens that prompt or response hold."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A response ends before the first of these strings."""
    max_new_tokens: int = Field(128, ge=1)

    @field_validator("temperature", mode="before")
    @classmethod
    def _is_not_greedy(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value in (0, "0"):
            raise ValueError("must be above 0; for the likeliest token always, write `top_k: 1`")
        return value

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
