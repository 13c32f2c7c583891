"""What the server tells of itself: its models as OpenAI lists them, and all that the page shows."""

from __future__ import annotations

import time
from typing import Any

from iama import __version__
from iama.config.serving import ServeConfig
from inference.evaluation.summary import Summary
from inference.serving.catalogue import BUDGETS, Catalogue, Model, budget_of
from inference.serving.plan import ServePlan
from inference.serving.replies import number

CREATED = int(time.time())
CURVE_COLUMNS = (
    "policy", "criterion", "method", "samples", "written", "dial", "value", "draws", "proxy", "gold",
    "policy_tokens", "reward_tokens", "flops", "seconds",
)  # fmt: skip
SAVING_COLUMNS = (
    "criterion", "method", "metric", "reference", "samples", "ratio", "ci95", "censored", "hacked", "counts",
)  # fmt: skip
HACKING_COLUMNS = ("policy", "criterion", "method", "peak_samples", "peak_gold", "onset", "last_gold")


def listed_models(catalogue: Catalogue) -> dict[str, Any]:
    """The models as `GET /v1/models` lists them."""
    return {"object": "list", "data": [listed_model(name) for name in catalogue.models]}


def listed_model(name: str) -> dict[str, Any]:
    """One of them, as `GET /v1/models/NAME` shows it."""
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "iama"}


def information(config: ServeConfig, plan: ServePlan, catalogue: Catalogue) -> dict[str, Any]:
    """What the page needs: policies, criteria, methods, limits, the usual sampling, and what an evaluation measured."""
    limits = config.limits
    return {
        "version": __version__,
        "policies": [
            {
                "name": name,
                "sampling": sampling.model_dump(mode="json"),
                "context_length": plan.policy_files[name].context_length,
                "chat": plan.policy_files[name].tokenizer.chat_template is not None,
            }
            for name, sampling in catalogue.samplings.items()
        ],
        "criteria": [_criterion(criterion.name, config, catalogue) for criterion in config.criteria],
        "models": [_model(model) for model in catalogue.models.values()],
        "limits": {
            "n": limits.n,
            "max_tokens": limits.max_tokens,
            "max_budget": limits.max_budget,
            "prompt_characters": limits.prompt_characters,
            "messages": limits.messages,
            "deadline_s": limits.deadline_s,
        },
        "hacking": config.hacking,
        "evaluation": None if plan.summary is None else _evaluation(plan.summary),
    }


def _criterion(name: str, config: ServeConfig, catalogue: Catalogue) -> dict[str, Any]:
    """Bounds and the range of usual rewards by policy."""
    return {
        "name": name,
        "bounds": {
            policy: {"most": min(bound.most for bound in bounds), "reasons": [bound.reason for bound in bounds]}
            for policy in config.policies
            if (bounds := catalogue.bounds.get((policy, name)))
        },
        "range": {
            policy: [min(rewards), max(rewards)]
            for policy in config.policies
            if (rewards := catalogue.rewards.get((policy, name)))
        },
    }


def _model(model: Model) -> dict[str, Any]:
    budget = budget_of(model.method)
    return {
        "id": model.id,
        "policy": model.policy,
        "criterion": model.criterion,
        "method": model.written,
        "served_as": "single" if model.criterion is None else model.method.text,
        "family": "single" if model.criterion is None else model.method.name,
        "guided": model.method.is_guided,
        "budget": None if budget is None else number(budget),
        "takes_budget": model.method.name in BUDGETS,
    }


def _evaluation(summary: Summary) -> dict[str, Any]:
    """Curves, savings and where gold falls; no path and no prompt."""
    raw: dict[str, Any] = dict(summary)
    return {
        "name": summary["name"],
        "trained": summary["trained"],
        "references": summary["references"],
        "trained_budget": summary["trained_budget"],
        "num_prompts": summary["num_prompts"],
        "curves": [_columns(row, CURVE_COLUMNS) for row in raw["curves"]],
        "savings": [_columns(row, SAVING_COLUMNS) for row in raw["savings"]],
        "hacking": [_columns(row, HACKING_COLUMNS) for row in raw["hacking"]],
    }


def _columns(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}
