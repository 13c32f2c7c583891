"""The schema of `iama serve`, frozen like the other two. Importing it does not import torch."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from iama.config.files import EvaluationCriterion
from iama.config.schema import Strict
from iama.config.specs import KEY_LIKE, PolicySpec, PromptsSpec, Sampling

Hacking = Literal["refuse", "cap", "allow"]
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names of policies and criteria: they are parts of a model's id, `iama/harmless:bon(4)`."""
HOST = re.compile(r"[\w.-]+(:\d+)?|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?(:\d+)?")
"""What a Host header may hold: a name or a number, with or without a port."""


class ServedCriterion(EvaluationCriterion):
    """A criterion that is served: the proxy reward selects. A gold reward has no use here."""

    methods: tuple[str, ...] | None = Field(None, min_length=1)
    """Methods of this criterion, in the place of those of all."""
    tuning: str | None = None
    """The `tuning.json` of `iama tune` that methods such as `bon(tuned)` take their numbers from."""
    max_budget: int | None = Field(None, ge=1)
    """Samples an answer beyond which gold is known to fall; see `hacking`."""

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        _check_name("criteria.name", self.name)
        if self.gold is not None:
            raise ValueError(f"criterion {self.name!r}: `gold` judges and is not asked while serving; drop it")
        if self.proxy.column is not None:
            raise ValueError(
                f"criterion {self.name!r}: proxy: column {self.proxy.column!r} holds scores of a pool file, and new "
                "answers have none there; give a reward that scores texts"
            )
        return self


class Keys(Strict):
    """Where the server's API keys stand: one a line in a file, or separated by blanks or commas in a variable."""

    file: str | None = None
    """Lines that begin with # are comments."""
    variable: str | None = None
    """Name of an environment variable."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.file is None) == (self.variable is None):
            raise ValueError("give exactly one of `file` and `variable`")
        named = self.variable is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.variable)
        if not named or KEY_LIKE.match(self.variable or ""):
            raise ValueError("variable must be the name of an environment variable, and not a key itself")
        if self.file is not None and KEY_LIKE.match(self.file) and not re.search(r"[./\\]", self.file):
            raise ValueError("file must be the path of a file that holds keys, and not a key itself")
        return self


class Limits(Strict):
    """What a request may ask for, and how many are taken at a time."""

    max_running: int = Field(64, ge=1)
    """Requests that are worked on together."""
    max_waiting: int = Field(256, ge=0)
    """Requests that wait for their turn; any more are refused (429)."""
    deadline_s: float = Field(300.0, gt=0)
    """A request that takes longer, its wait for its turn included, is given up (504; 503 if it mostly waited)."""
    body_bytes: int = Field(1 << 20, ge=1)
    """Of a request's body (413)."""
    messages: int = Field(256, ge=1)
    prompt_characters: int = Field(200_000, ge=1)
    """Of all messages together."""
    n: int = Field(8, ge=1)
    """Answers to a request."""
    max_tokens: int = Field(4096, ge=1)
    """Of an answer."""
    stop: int = Field(16, ge=0)
    """Stop strings."""
    stop_characters: int = Field(256, ge=1)
    """Of one of them."""
    max_budget: int = Field(64, ge=1)
    """Samples that a request may ask for an answer."""


class ServeConfig(Strict):
    """A server: every policy x criterion x method under a name of its own."""

    command: ClassVar[str | None] = "iama serve"

    policies: Annotated[dict[str, PolicySpec], Field(min_length=1)]
    """By name."""
    criteria: list[ServedCriterion] = Field(default_factory=list)
    """Else those of the first policy that has an `iama.json`; without any, single samples alone are served."""
    methods: list[str] | None = Field(None, min_length=1)
    """What serves a criterion that names none: `single`, `bon(4)`, `cards(quantile=0.9)`; else the operators of
    `iama.json`, else bon(4). The first is the criterion's own; `single` is served in any case."""
    sampling: Sampling = Sampling()
    """Of requests that say nothing else; what is not written here is taken from a policy's `iama.json`."""
    calibration: PromptsSpec | None = None
    """Prompts whose unguided samples give the methods the targets that they lack, and the range of usual rewards."""
    calibration_samples: int = Field(16, ge=2)
    """Samples a prompt."""
    evaluation: str | None = None
    """Folder of an evaluation of these policies: where gold begins to fall, and what the page tells of savings."""
    hacking: Hacking = "refuse"
    """Budgets above a criterion's `max_budget`, or where the evaluation saw gold fall: refuse, cap or allow."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0: any that is free."""
    keys: Keys | None = None
    """API keys; without them the server can be reached from its own machine alone."""
    hosts: tuple[str, ...] = ()
    """Names under which clients reach the server, where a proxy stands before it; else any on a network, and those of
    the machine itself on loopback."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may ask, e.g. https://app.example.org."""
    limits: Limits = Limits()
    ping_s: float = Field(5.0, gt=0)
    """A stream that has nothing to say sends a comment after so many seconds."""
    drain_s: float = Field(30.0, ge=0)
    """After SIGTERM what runs may go on for so long."""
    reward_timeout_s: float = Field(60.0, gt=0)
    """A reward that takes longer fails the request that asked (504)."""
    batch_size: int = Field(64, ge=1)
    """Rows decoded together."""
    num_private: int = Field(2, ge=1)
    """Calls of one reward that is code, side by side, and as many guided answers by it. `args`, `sea`, `redraw`,
    `tilted_tokens` and samplers of your own are answered one at a time, whatever this says."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the calibration; requests bring their own."""

    @model_validator(mode="before")
    @classmethod
    def _no_key_itself(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("keys"), (str, list, tuple)):
            raise ValueError("keys: write where they stand, {file: PATH} or {variable: NAME}, and not a key itself")
        return raw

    @field_validator("policies")
    @classmethod
    def _are_ours(cls, policies: dict[str, PolicySpec]) -> dict[str, PolicySpec]:
        for name, policy in policies.items():
            _check_name("policies", name)
            if policy.engine != "transformers":
                raise ValueError(f"{name}: engine: {policy.engine} is not served; write engine: transformers")
        return policies

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host):
                name = urlsplit(host).hostname or "iama.example.org"
                raise ValueError(f"{host!r} is no host's name, as a Host header has it; write e.g. {name}")
        return hosts

    @field_validator("cors")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != origin
            ):
                raise ValueError(f"{origin!r} is no origin; write scheme, host and port, e.g. https://app.example.org")
        return origins

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [criterion.name for criterion in self.criteria]
        if len(set(names)) < len(names):
            raise ValueError(f"criteria names must differ, got {names}")
        if "*" in self.cors and self.keys is None:
            raise ValueError("cors: '*' lets every page that is open on this machine ask; set `keys`, or list origins")
        if self.keys is None and not self.is_loopback:
            raise ValueError(
                f"host {self.host!r} lets others ask, and there are no keys; set keys.file or keys.variable, or "
                "host: 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether the server is reached from its own machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_name(where: str, name: Any) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} is part of a model's id; write letters, digits, and . _ - between them")
