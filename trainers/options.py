"""Options of TRL that bend the objective: which are refused, which warned of, and which keep its direction.

The expected gradient of a step of TRL, over all groups, should point where the gradient of `R[pi]` points. For each
option below `scripts/experiments/direction.py` counts both out on a toy and writes their cosine to
`docs/results/direction.md`; below 0.99 an option is refused or warned of here. A test fails where the installed TRL has
an option, or a value of one, that is not named here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from iama.errors import ConfigError
from iama.nearest import meant
from iama.objective.estimators import takes_ratios
from iama.objective.objective import Objective

Setting = Literal["same", "later", "sampler"]
"""Where an option matters: the groups are the trained policy's own; an earlier policy drew them, since several updates
use them; another engine drew them, whose log-probabilities are not quite the trained policy's."""
Verdict = Literal["keeps", "unused", "warned", "refused"]

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
REFUSED_LOSSES = ("grpo", "sapo")
"""Known, and never accepted: no message offers them."""
LEVELS = ("token", "sequence")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
VLLM_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CHOICES = {
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": LEVELS,
    "multi_objective_aggregation": AGGREGATIONS,
    "vllm_importance_sampling_mode": VLLM_MODES,
}
"""Words that TRL looks at only once it trains."""


@dataclass(frozen=True, eq=False)
class Option:
    """Fields of GRPOConfig (`example`, which is measured), in which setting, and what comes of them."""

    example: Mapping[str, Any]
    setting: Setting
    verdict: Verdict
    holds: Callable[[Any], bool] = field(default=lambda _: False)
    """Of a GRPOConfig: whether the option is in force there."""
    says: str = ""
    """What it does, and what to write instead."""
    rows: Literal["all", "group", "one"] = "all"
    """What one forward pass and its division hold: all groups, a single group, a single completion."""
    named: tuple[str, ...] = ()
    """Fields that a message names; by default the first of the example."""

    @property
    def name(self) -> str:
        """The option as a configuration writes it."""
        written = ", ".join(f"{key}: {_written(value)}" for key, value in self.example.items())
        held = {"all": "", "group": ", one group a step", "one": ", one completion a pass"}[self.rows]
        return (written or "as TRL has them") + held


def _written(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def is_off_policy(args: Any) -> bool:
    """Whether another policy than the trained one draws the roll-outs: an earlier one, or another engine's."""
    return _uses_again(args) or bool(args.use_vllm)


def _uses_again(args: Any) -> bool:
    """TRL's own rule for when a batch of roll-outs outlives an update."""
    return bool(args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations))


def _corrects(args: Any) -> bool:
    return bool(args.use_vllm and args.vllm_importance_sampling_correction)


_SIGN = "reads the sign of an advantage, and the first variation is known only up to a constant"
_LENGTH = "divides a completion's loss by its length, which trains another objective; write loss_type: dapo or dr_grpo"
OPTIONS = (
    Option({}, "same", "keeps"),
    Option({"loss_type": "dr_grpo"}, "same", "keeps"),
    Option({"loss_type": "bnpo"}, "same", "keeps"),
    Option({"loss_type": "luspo"}, "same", "keeps"),
    Option({"loss_type": "luspo", "importance_sampling_level": "sequence"}, "same", "keeps"),
    Option({"loss_type": "cispo"}, "same", "keeps"),
    Option({"loss_type": "vespo"}, "same", "keeps"),
    Option({"loss_type": "grpo"}, "same", "refused", lambda args: args.loss_type == "grpo", _LENGTH),
    Option({"loss_type": "sapo"}, "same", "refused", lambda args: args.loss_type == "sapo", _LENGTH),
    Option({"loss_type": "dr_grpo"}, "same", "keeps", rows="group"),
    Option({"loss_type": "luspo"}, "same", "keeps", rows="group"),
    Option({"loss_type": "dapo"}, "same", "keeps", rows="group"),
    Option(
        {"loss_type": "bnpo"},
        "same",
        "warned",
        lambda args: args.loss_type == "bnpo" and args.per_device_train_batch_size < args.num_generations,
        "divides by the tokens of the few completions of one forward pass; write loss_type: dapo or dr_grpo, or raise "
        "per_device_train_batch_size",
        rows="one",
    ),
    Option({"importance_sampling_level": "sequence"}, "same", "keeps"),
    Option({"epsilon": 0.1}, "same", "keeps"),
    Option({"epsilon_high": 0.28}, "same", "keeps"),
    Option({"delta": 1.5}, "same", "keeps"),
    Option(
        {"delta": 0.9},
        "same",
        "refused",
        lambda args: args.delta is not None and args.delta < 1,
        "lies below 1, so that nothing with an advantage above 0 trains; leave it out, or raise it",
    ),
    Option(
        {"top_entropy_quantile": 0.5},
        "same",
        "refused",
        lambda args: args.top_entropy_quantile < 1,
        "leaves tokens out of the gradient, which trains another objective; leave it out",
    ),
    Option(
        {"mask_truncated_completions": True},
        "same",
        "warned",
        lambda args: bool(args.mask_truncated_completions),
        "trains the value of the completions that end, as if no other existed, and nothing keeps the others rare; "
        "leave it out, or let num_generations exceed the operator's draws by those that are cut",
    ),
    Option(
        {"entropy_coef": 0.1},
        "same",
        "warned",
        lambda args: args.entropy_coef != 0 or bool(args.use_adaptive_entropy),
        "adds the tokens' entropy, times the coefficient, to what is maximised; leave it out, and regularise with beta",
        named=("entropy_coef", "use_adaptive_entropy"),
    ),
    Option(
        {"scale_rewards": "batch"},
        "same",
        "unused",
        lambda args: args.scale_rewards == "batch",
        "is not used: the advantages of the objective are not rescaled",
    ),
    Option(
        {"multi_objective_aggregation": "normalize_then_sum"},
        "same",
        "unused",
        lambda args: args.multi_objective_aggregation != "sum_then_normalize",
        "is not used: the objective aggregates and weighs the rewards",
    ),
    Option(
        {"reward_weights": [1.0]},
        "same",
        "unused",
        lambda args: args.reward_weights is not None,
        "is not used: the objective aggregates and weighs the rewards",
    ),
    Option(
        {"num_iterations": 2},
        "later",
        "warned",
        lambda args: _uses_again(args),
        "lets later updates see groups of an older policy, and clips its ratios; write num_iterations: 1, and leave "
        "steps_per_generation and generation_batch_size out",
        named=("num_iterations", "steps_per_generation", "generation_batch_size"),
    ),
    Option({"num_iterations": 2, "importance_sampling_level": "sequence"}, "later", "warned"),
    Option({"num_iterations": 2, "epsilon": 0.1}, "later", "warned"),
    Option({"num_iterations": 2, "epsilon": 0.4}, "later", "warned"),
    Option({"num_iterations": 2, "delta": 2.0}, "later", "warned"),
    Option({"num_iterations": 2, "loss_type": "cispo", "epsilon_high": 5.0}, "later", "warned"),
    Option(
        {"loss_type": "vespo", "num_iterations": 2},
        "later",
        "refused",
        lambda args: args.loss_type == "vespo" and is_off_policy(args),
        f"{_SIGN}; write loss_type: dapo",
    ),
    Option(
        {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
        "later",
        "refused",
        lambda args: args.off_policy_mask_threshold is not None,
        f"{_SIGN}; leave it out",
    ),
    Option({}, "sampler", "keeps"),
    Option({"vllm_importance_sampling_mode": "sequence_truncate"}, "sampler", "keeps"),
    Option({"vllm_importance_sampling_clip_max": 2.0}, "sampler", "keeps"),
    Option({"loss_type": "dr_grpo"}, "sampler", "keeps"),
    Option(
        {"vllm_importance_sampling_clip_max": 1.1},
        "sampler",
        "warned",
        lambda args: (
            _corrects(args)
            and args.vllm_importance_sampling_clip_max is not None
            and args.vllm_importance_sampling_clip_max < 2
        ),
        "lies below 2, where it cuts weights of completions that the policy likes better than the sampler did; "
        "leave it out",
    ),
    Option(
        {"vllm_importance_sampling_clip_min": 0.8},
        "sampler",
        "warned",
        lambda args: _corrects(args) and (args.vllm_importance_sampling_clip_min or 0.0) > 0.5,
        "lies above 0.5, where it cuts weights of completions that the policy likes less than the sampler did; "
        "leave it out",
    ),
    Option(
        {"vllm_importance_sampling_mode": "token_truncate"},
        "sampler",
        "warned",
        lambda args: _corrects(args) and args.vllm_importance_sampling_mode.startswith("token"),
        "weighs tokens, where the operator ranks whole completions; write vllm_importance_sampling_mode: sequence_mask",
    ),
    Option({"vllm_importance_sampling_mode": "token_mask"}, "sampler", "warned"),
    Option(
        {"vllm_importance_sampling_correction": False},
        "sampler",
        "warned",
        lambda args: bool(args.use_vllm) and not args.vllm_importance_sampling_correction,
        "leaves the difference between vLLM's policy and the trained one uncorrected; leave it out",
    ),
    Option({"loss_type": "vespo"}, "sampler", "refused"),
    Option({"off_policy_mask_threshold": 0.01}, "sampler", "refused"),
)
"""All that were measured. Those without a rule of their own fall under that of another."""

REVERSING: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "epsilon",
        lambda args: not args.epsilon > 0,
        "is not above 0, so that what improves is clipped, or every weight is 0; write e.g. epsilon: 0.2",
    ),
    (
        "epsilon_high",
        lambda args: args.epsilon_high is not None and not args.epsilon_high > 0,
        "is not above 0, so that what improves is clipped, or descends; leave it out, or write e.g. 0.28",
    ),
    (
        "delta",
        lambda args: args.delta is not None and math.isnan(args.delta),
        "is no number; leave it out",
    ),
    (
        "vllm_importance_sampling_clip_max",
        lambda args: (
            _corrects(args)
            and args.vllm_importance_sampling_clip_max is not None
            and not args.vllm_importance_sampling_clip_max > 0
        ),
        "is not above 0, so that every weight is 0 or below; leave it out",
    ),
)
"""Values of fields that reverse or end the gradient: refused, without a row of the page. Field, when, what it does."""

TOUCHING = frozenset(
    {
        "loss_type",
        "importance_sampling_level",
        "epsilon",
        "epsilon_high",
        "delta",
        "num_iterations",
        "steps_per_generation",
        "generation_batch_size",
        "mask_truncated_completions",
        "top_entropy_quantile",
        "off_policy_mask_threshold",
        "scale_rewards",
        "multi_objective_aggregation",
        "reward_weights",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "vespo_k_pos",
        "vespo_lambda_pos",
        "vespo_k_neg",
        "vespo_lambda_neg",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
        "entropy_coef",
        "use_adaptive_entropy",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
        "beta",
        "use_bias_correction_kl",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "router_aux_loss_coef",
    }
)
"""Fields of GRPOConfig from which the loss, the mask or the advantages follow."""


def check_options(args: Any, where: str = "") -> list[str]:
    """Warnings about a GRPOConfig, one line each; `where` stands before a field's name.

    Raises `ConfigError` for an option under which plainly another objective would be trained.
    """
    for key, known in CHOICES.items():
        if (value := getattr(args, key)) not in known:
            offered = [word for word in known if word not in REFUSED_LOSSES]
            told = f"{where}{key} {value!r} is not known; {meant(str(value), offered)}"
            raise ConfigError(f"{told}write one of {', '.join(offered)}")
    for key, reverses, says in REVERSING:
        if reverses(args):
            raise ConfigError(f"{where}{key} = {getattr(args, key)!r} {says}")
    messages = []
    for option in OPTIONS:
        if not option.holds(args):
            continue
        keys = option.named or (next(iter(option.example)),)
        block = where.rpartition(" ")[2]
        named, *others = (f"{block}{key} = {getattr(args, key)!r}" for key in keys)
        named += f" with {', '.join(others)}" if others else ""
        message = f"{where.removesuffix(block)}{named} {option.says}"
        if option.verdict == "refused":
            raise ConfigError(message)
        messages.append(message)
    return messages


def check_engine(args: Any, objective: Objective) -> list[str]:
    """Warnings about criteria whose operator cannot correct for groups that vLLM drew, one line each."""
    return [
        f"criterion {c.name!r}: {c.operator.name} under estimator {objective.estimator_of(c.operator)!r} has no place "
        "for the ratios of the trained policy to vLLM's, so that their difference biases its gradient; "
        f"{'write estimator: auto' if takes_ratios(c.operator, 'auto') else 'write bon(n), or use_vllm: false'}"
        for c in objective.criteria
        if args.use_vllm and not takes_ratios(c.operator, objective.estimator)
    ]
