"""Where a policy is uncertain: entropy thresholds of segments, in nats or as a quantile of the policy's own tokens.

1.5 nats are rare for one model and everywhere for another, whose vocabulary is larger or whose training was shorter.
`quantile(0.9)` is the entropy that one token in ten of the policy's own samples reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, PlainSerializer

from iama.calls import read_call
from iama.config.methods import Method
from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError, DataError
from iama.models.flops import row_flops, size_of
from iama.prompts.conversations import render_prompts
from iama.prompts.render import Prompt
from inference.engine.decode import decode
from inference.engine.likelihood import token_entropies
from inference.engine.policy import AnyPolicy, Policy
from inference.engine.responses import check_fit

KEY = "entropy_threshold"


@dataclass(frozen=True)
class EntropyQuantile:
    """A threshold that is to be measured: the entropy below which a share of a policy's own tokens lies."""

    share: float

    def __str__(self) -> str:
        return f"quantile({self.share:g})"


def read_threshold(value: Any) -> Any:
    """`quantile(0.9)` as an `EntropyQuantile`; what is no text is given back as it is."""
    if not isinstance(value, str):
        return value
    remedy = f"{value!r} is no threshold; write nats such as 1.5, quantile(0.9), or null"
    try:
        call = read_call(value)
        ((name, share),) = [(call.name, float(text)) for key, text in call.arguments if key is None]
    except (ConfigError, ValueError):
        raise ValueError(remedy) from None
    if name != "quantile" or len(call.arguments) != 1 or not 0 < share < 1:
        raise ValueError(f"{remedy}; a quantile lies between 0 and 1")
    return EntropyQuantile(share)


def _nats(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= 0:
        raise ValueError(f"{value} is no entropy; write nats such as 1.5, quantile(0.9), or null")
    return read_threshold(value)


_AS_WRITTEN = PlainSerializer(lambda value: str(value) if isinstance(value, EntropyQuantile) else value)
SomeThreshold = Annotated[float | EntropyQuantile, BeforeValidator(_nats), _AS_WRITTEN]
"""Nats, or a quantile that is not measured yet."""
EntropyThreshold = Annotated[float | EntropyQuantile | None, BeforeValidator(_nats), _AS_WRITTEN]
"""The same, or null: never."""


def measured_nats(threshold: float | EntropyQuantile | None, name: str) -> float | None:
    """The threshold of a sampler that is about to run; raises `ConfigError` for one that nobody has measured."""
    if isinstance(threshold, EntropyQuantile):
        raise ConfigError(
            f"{name}: {KEY} = {threshold} is not measured yet; write nats, or take what calibrate_entropy measures"
        )
    return threshold


def calibrate_entropy(
    policy: AnyPolicy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    quantile: float,
    num_samples: int = 16,
    seed: int,
    batch_size: int = 256,
) -> tuple[float, Cost]:
    """The entropy (nats) below which a share of the tokens of unguided samples lies, and what measuring it cost.

    Entropies are those of the whole law at temperature 1, as samplers compare them, tokens of all prompts together.
    Raises `ConfigError` for a policy on vLLM, which does not tell them, and `DataError` where nothing was written.
    """
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy {policy.name!r}: vLLM tells no entropies to take a quantile of; write {KEY} in nats")
    ids = render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, f"policy {policy.name!r}")
    check_fit(policy.name, policy.tokenizer, policy.context_length, ids, sampling)
    drawn, cost = decode(policy, ids, num_samples, sampling, seed=seed, batch_size=batch_size)
    pairs = [(prompt, response.token_ids) for prompt, row in zip(ids, drawn, strict=True) for response in row]
    entropies = token_entropies(policy, [p for p, _ in pairs], [r for _, r in pairs], batch_size)
    lengths = [len(p) + len(r) for p, r in pairs]
    flops = float(row_flops(size_of(policy.model), 0, lengths).sum())
    read = Cost(policy_prefill_tokens=sum(lengths), sequential_steps=1, flops=flops)
    return quantile_of_entropies(entropies, quantile), cost + read


def quantile_of_entropies(entropies: Sequence[Sequence[float]], share: float) -> float:
    """A quantile over the tokens of all responses; `DataError` where there is none."""
    every = [value for row in entropies for value in row]
    if not every:
        raise DataError(f"all samples are empty, so there are no entropies to take quantile({share:g}) of; write nats")
    return float(np.quantile(every, share))


def with_nats(method: Method, nats: float) -> Method:
    """A guided method with its threshold as it was measured, in the first place."""
    return method.with_settings({KEY: f"{nats:.6g}"})
