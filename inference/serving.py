"""From a method as people write it to the sampler that serves it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from iama.config import validate
from iama.errors import ConfigError
from iama.operators import parse_operator
from inference.cards import Cards, CardsSettings, calibrate_target, rejection_settings
from inference.samplers import SelectionSampler, Served
from inference.token_search import Args, ArgsSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.config import Sampling
    from iama.render import Prompt
    from iama.rewards import Reward
    from inference.policy import Policy
    from inference.samplers import Sampler

GUIDED = ("cards", "rejection", "args")
"""Methods that are no operators: their settings are written `cards(target=1.5, entropy_threshold=2)`."""
CALIBRATION_BATCH = 256


def serve(policy: Policy, reward: Reward | None, method: str, sampling: Sampling, batch_size: int = 256) -> Sampler:
    """The sampler of a method: an operator as the configuration and `iama.json` write it (`bon(4)`), `cards(...)`,
    `rejection(...)` or `args(...)` with the fields of their settings.

    Raises `ConfigError` for what cannot be served: a tilt, a series that is no law, CARDS without a target.
    """
    name, settings = parse_guided(method)
    if name is None:
        return _selection(policy, reward, method, sampling, batch_size)
    if reward is None:
        raise ConfigError(f"{name} is guided by a reward; give one, or sample with method single")
    if name == "args":
        return Args(policy, reward, validate(settings, ArgsSettings, method), sampling, batch_size)
    return Cards(policy, reward, cards_settings(name, settings, sampling, method), sampling, batch_size)


def parse_guided(method: str) -> tuple[str | None, dict[str, Any]]:
    """Name and settings of a method such as `cards(target=1.5)`; the name is None if it is not one of `GUIDED`."""
    match = re.fullmatch(rf"({'|'.join(GUIDED)})(?:\((.*)\))?", method.strip())
    if match is None:
        return None, {}
    settings = {}
    for part in filter(None, map(str.strip, (match[2] or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"method {method!r}: {part!r} is no setting; write key=value, e.g. cards(target=1.5)")
        settings[key.strip()] = yaml.safe_load(value)
    return match[1], settings


def with_target(
    policy: Policy, reward: Reward, method: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> str:
    """`cards` or `rejection` with a target: without one, what `calibrate_target` measures on these prompts.

    Any other method is given back as it is. The calibration's samples are in no completion's cost.
    """
    name, settings = parse_guided(method)
    if name not in ("cards", "rejection") or settings.get("target") is not None:
        return method
    cards_settings(name, settings, sampling, method)  # what is wrong with it is told before anything is drawn
    # Another seed than the responses', since proposals begin with the same random numbers.
    target = calibrate_target(policy, reward, prompts, sampling, seed=seed + 1, batch_size=CALIBRATION_BATCH)
    written = ", ".join(f"{key}={'null' if value is None else value}" for key, value in settings.items())
    return f"{name}(target={target:.6g}{', ' if written else ''}{written})"


def cards_settings(name: str, settings: dict[str, Any], sampling: Sampling, method: str) -> CardsSettings:
    """Settings of `cards`, or of `rejection`: whole responses against the target."""
    if name == "rejection":
        settings = rejection_settings(None, sampling.max_new_tokens).model_dump() | settings
    return validate(settings, CardsSettings, f"method {method!r}")


def _selection(policy: Policy, reward: Reward | None, operator: str, sampling: Sampling, batch_size: int) -> Sampler:
    parsed = parse_operator(operator)
    if parsed.budget is None or not isinstance(parsed, Served):
        raise ConfigError(
            f"operator {operator!r} is what training assumes, not a way to sample; serve it with the sampler that it "
            f"stands for, e.g. --method 'soft_bon(16, {getattr(parsed, 'temperature', 0.1):g})' or --method cards"
        )
    return SelectionSampler(policy, reward, parsed, sampling, batch_size)
