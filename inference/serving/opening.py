"""From a plan to a server that can answer: models are loaded, what is missing is measured, everything is tried once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from iama.errors import IamaError
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.policy import Policy, load_policy
from inference.samplers.cards import calibration_rewards
from inference.samplers.serve import serve
from inference.serving.catalogue import Catalogue, Model, completed
from inference.serving.plan import ServePlan

Bar: TypeAlias = Callable[[str, str, int], AbstractContextManager[Callable[[int], None]]]
"""`iama.progress.progress_bar`, or something in its place."""


class Opened(NamedTuple):
    """Loaded policies and rewards by name, and what is served of them."""

    policies: dict[str, Policy]
    rewards: dict[str, Reward]
    catalogue: Catalogue


def open_plan(plan: ServePlan, bar: Bar) -> Opened:
    """Load everything, and measure targets and the range of usual rewards where there are prompts to do so.

    Raises `IamaError` for what cannot be served, before any request comes.
    """
    config = plan.config
    with bar("loading", "models", len(config.policies) + len(config.criteria)) as advance:
        policies, rewards = {}, {}
        for name, spec in config.policies.items():
            policies[name] = load_policy(name, spec, plan.samplings[name])
            advance(1)
        for criterion in config.criteria:
            files = plan.reward_files[criterion.name]
            rewards[criterion.name] = load_reward(criterion.name, criterion.proxy, files=files)
            advance(1)
    measured = _calibrate(plan, policies, rewards, bar)
    models = [_complete(model, plan, measured) for model in plan.models]
    for model in models:
        _try(model, plan, policies, rewards)
    catalogue = Catalogue(
        models={model.id: model for model in models},
        samplings=plan.samplings,
        rewards=measured,
        bounds=plan.bounds,
        hacking=config.hacking,
        max_budget=config.limits.max_budget,
    )
    return Opened(policies, rewards, catalogue)


def _calibrate(
    plan: ServePlan, policies: dict[str, Policy], rewards: dict[str, Reward], bar: Bar
) -> dict[tuple[str, str], list[float]]:
    """Rewards of unguided samples by policy and criterion; none without prompts.

    Drawn with another seed than an answer's, as `with_target` does.
    """
    pairs = [(policy, criterion) for policy in policies for criterion in rewards] if plan.prompts else []
    measured = {}
    if not pairs:
        return {}
    with bar("measuring targets", "policies x criteria", len(pairs)) as advance:
        for policy, criterion in pairs:
            measured[policy, criterion], _ = calibration_rewards(
                policies[policy],
                rewards[criterion],
                plan.prompts,
                plan.samplings[policy],
                num_samples=plan.config.calibration_samples,
                seed=plan.config.seed + 1,
                batch_size=plan.config.batch_size,
            )
            advance(1)
    return measured


def _complete(model: Model, plan: ServePlan, measured: dict[tuple[str, str], list[float]]) -> Model:
    if model.criterion is None or (model.policy, model.criterion) not in measured:
        return model
    rewards = measured[model.policy, model.criterion]
    return replace(model, method=completed(model.method, rewards, plan.samplings[model.policy]))


def _try(model: Model, plan: ServePlan, policies: dict[str, Policy], rewards: dict[str, Reward]) -> None:
    """Make the sampler, which looks at policy, reward and settings together."""
    reward: Any = None if model.criterion is None else rewards[model.criterion]
    try:
        serve(policies[model.policy], reward, model.method, plan.samplings[model.policy], plan.config.batch_size)
    except IamaError as error:
        raise type(error)(f"{model.id}: {error}") from error
