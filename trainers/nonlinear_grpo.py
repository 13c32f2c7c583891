"""Non-linear GRPO on TRL's GRPOTrainer.

TRL computes advantages inside `_generate_and_score_completions`, from rewards that `_calculate_rewards` has
gathered over all processes. Those two methods are overridden and no more: the first hands over the rewards of
whole groups (a group may straddle processes), the second puts the objective's advantages in the place of TRL's.
A contract test pins both.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from trl import GRPOTrainer

from iama.environment import disable_telemetry
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.render import prompt_text

if TYPE_CHECKING:
    from iama.objective import Objective


disable_telemetry()


class NonlinearGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with one more argument, the `objective`; everything else is TRL's, unchanged.

    The objective's criteria are matched to the reward functions by name (a function's `__name__`). Reward
    functions that no criterion names are logged and do not train: that is the place of gold rewards.
    `reward_weights`, `scale_rewards` and `multi_objective_aggregation` have no effect; TRL's `reward` metric
    shows the linear sum with the criteria's weights. Source: Takakura et al. 2026, Algorithm 2.
    """

    _tag_names = ["trl", "nonlinear-grpo", "iama"]  # noqa: RUF012 - TRL's own declaration
    _name = "Non-linear GRPO"

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._columns = _match_columns(objective, self.reward_func_names)
        objective.check(self.num_generations)
        _warn_unused(self.args)
        weights = torch.zeros(len(self.reward_func_names))
        weights[self._columns] = torch.tensor([c.weight for c in objective.criteria])
        self.reward_weights = weights

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._refuse_missing(rewards, prompts)
        self._gathered_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode, size = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        columns = self._gathered_rewards[:, self._columns].double().cpu().numpy()
        rewards_PGK = columns.reshape(-1, size, len(self._columns))
        advantages = torch.from_numpy(self._advantages(rewards_PGK, mode).reshape(-1)).float()
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[start : start + len(inputs)].to(self.accelerator.device)
        logged = self._logs["advantages"]  # the completions table shows what trains
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        return output

    def _advantages(self, rewards_PGK: np.ndarray[Any, np.dtype[np.float64]], mode: str) -> Any:
        """Advantages `[P, G]`; logs each criterion's value under its own operator."""
        if mode == "eval" and rewards_PGK.shape[1] < self.num_generations:
            return np.zeros(rewards_PGK.shape[:2])  # evaluation reads rewards; its loss has no meaning here
        for name, value in self.objective.values(rewards_PGK).items():
            self._metrics[mode][f"value/{name}"].append(value)
        return self.objective.advantages(rewards_PGK)

    def _refuse_missing(self, rewards: torch.Tensor, prompts: Any) -> None:
        """Every process sees the same gathered rewards, so all of them stop together."""
        bad = (~torch.isfinite(rewards[:, self._columns])).nonzero()
        if len(bad) == 0:
            return
        row, column = bad[0].tolist()
        owner, local = divmod(row, len(prompts))
        mine = owner == self.accelerator.process_index
        where = f"the prompt {prompt_text(prompts[local])[:80]!r}" if mine else f"a prompt of process {owner}"
        score = rewards[row, self._columns[column]].item()
        raise RewardError(
            f"reward {self.objective.criteria[column].name!r} returned {'None or NaN' if math.isnan(score) else score} "
            f"for {where}; every completion needs a finite score"
        )


def _match_columns(objective: Objective, names: list[str]) -> list[int]:
    """Column of each criterion's reward among the trainer's reward functions."""
    for criterion in objective.criteria:
        if names.count(criterion.name) != 1:
            raise ConfigError(
                f"criterion {criterion.name!r} must be the name of exactly one reward function, but the reward "
                f"functions are named {names}; rename the criterion or set the function's __name__"
            )
    return [names.index(c.name) for c in objective.criteria]


def _warn_unused(args: Any) -> None:
    unused = {"reward_weights": None, "multi_objective_aggregation": "sum_then_normalize"}
    for name, default in unused.items():
        if getattr(args, name) != default:
            warnings.warn(
                f"{name} = {getattr(args, name)!r} is not used: the objective aggregates and weighs the rewards",
                IamaWarning,
                stacklevel=3,
            )
    if args.scale_rewards == "batch":
        message = "scale_rewards = 'batch' is not used: the advantages of the objective are not rescaled"
        warnings.warn(message, IamaWarning, stacklevel=3)
