"""What an evaluation checks of its rewards before anything is sampled; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from transformers import AutoTokenizer

from iama.config.files import EvaluationConfig, EvaluationCriterion
from iama.config.methods import Method
from iama.config.specs import JudgeSpec, RewardSpec
from iama.errors import ConfigError, DataError
from iama.models.loading import loading
from iama.prompts.data import PromptRows
from iama.prompts.render import prompt_name
from iama.rewards.classifier import read_files, render_rewarded
from iama.rewards.load import check_columns, check_reward
from inference.engine.vocabulary import Side, check_same_ids, instead_of, reward_side


def reward_names(config: EvaluationConfig) -> dict[RewardSpec, str]:
    """Every distinct reward once with its name, so that a spec shared by criteria is loaded and scored once."""
    names: dict[RewardSpec, str] = {}
    for criterion in config.criteria:
        _check_winners_curse(criterion)
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                names.setdefault(spec, f"{criterion.name} ({role})")
    return names


def check_rewards(config: EvaluationConfig, names: dict[RewardSpec, str], rows: PromptRows) -> None:
    """Check that every reward can be loaded, reads the prompts' format, and has the columns that it needs."""
    for spec, name in names.items():
        if spec.column is not None:
            _check_column(config, name, spec)
            continue
        check_reward(name, spec, [row["prompt"] for row in rows])
        check_columns(name, spec, rows)


def fits_rewards(names: Mapping[RewardSpec, str], rows: PromptRows, remedy: str | None) -> list[bool]:
    """Which prompts each reward model can read, with an empty answer at least.

    Raises `DataError`, which ends with `remedy`, for the first that one cannot, unless `remedy` is None.
    """
    keep = [True] * len(rows)
    for part, name in ((part, name) for spec, name in names.items() for part in spec.parts):
        if part.model is None:
            continue
        model, files = part.model, read_files(part, f"reward {name!r}")
        limit = files.context_length
        if limit is None:
            continue
        for i, row in enumerate(rows):
            num_tokens = len(render_rewarded(files, part, row["prompt"], ""))
            if num_tokens > limit and remedy is not None:
                raise DataError(
                    f"reward {name!r}: prompt {i + 1} ({prompt_name(row['prompt'])}) has {num_tokens} tokens "
                    f"without an answer, but {model!r} reads at most {limit}; {remedy}"
                )
            keep[i] &= num_tokens <= limit
    return keep


def check_gradients(
    criteria: Sequence[EvaluationCriterion],
    methods: Sequence[Method],
    policies: Sequence[tuple[str, Side]],
) -> None:
    """Raise `ConfigError` where a proxy has no gradient, or has other token ids than a policy that it guides.

    `methods` are those that need the gradient; `policies` are those that are sampled, each with a criterion that it
    serves.
    """
    for method in methods:
        for criterion in criteria:
            model, source = criterion.proxy.model, f"reward '{criterion.name} (proxy)'"
            if model is None:
                raise ConfigError(
                    f"methods: {method.text!r} needs the gradient of a reward, and {source} is no classifier; "
                    f"{instead_of(method.name)}, or evaluate that criterion by itself"
                )
            if criterion.proxy.engine != "transformers":
                raise ConfigError(
                    f"methods: {method.text!r} needs the gradient of a reward, and {source} is run by "
                    f"{criterion.proxy.engine}; write engine: transformers there"
                )
            if criterion.proxy.pair:
                raise ConfigError(
                    f"methods: {method.text!r} needs the gradient of a reward, and {source} reads pairs of texts; "
                    f"{instead_of(method.name)}, or evaluate that criterion by itself"
                )
            with loading(model, source):
                reward = reward_side(source, model, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
            for served, policy in policies:
                if served == criterion.name:
                    check_same_ids(policy, reward, method.name)


def _check_column(config: EvaluationConfig, name: str, spec: RewardSpec) -> None:
    sampled = [policy for policy, p in config.policies.items() if p.pool is None]
    if sampled:
        raise ConfigError(
            f"reward {name!r} is the column {spec.column!r} of a pool file, but policy {sampled[0]!r} is a model that "
            "has yet to be sampled; give a reward that can score it"
        )


def _check_winners_curse(criterion: EvaluationCriterion) -> None:
    """Selecting and reporting by the same noisy answers would overstate what was selected."""
    golds = () if criterion.gold is None else criterion.gold.parts
    for judge, gold in product(*([part.judge for part in parts] for parts in (criterion.proxy.parts, golds))):
        if judge is None or gold is None or judge.used_temperature == 0:
            continue
        if _answers_of(judge) == _answers_of(gold):
            raise ConfigError(
                f"criterion {criterion.name!r}: proxy and gold are the same answers of a judge at temperature "
                f"{judge.used_temperature:g}, which overstates what it selects; set gold.judge.draw: 1"
            )


def _answers_of(judge: JudgeSpec) -> dict[str, Any]:
    """What decides a judge's answers; where it is asked, and how its answers are put on a scale, does not."""
    return judge.model_dump(
        include={"model", "prompt_file", "mode", "baseline_column", "temperature", "max_tokens", "draw", "leave_out"}
    )
