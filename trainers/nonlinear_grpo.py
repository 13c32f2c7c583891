"""Non-linear GRPO on TRL's GRPOTrainer.

TRL computes advantages inside `_generate_and_score_completions`, from rewards that `_calculate_rewards` has
gathered over all processes. Those two methods are overridden: the first hands over the rewards of
whole groups (a group may straddle processes), the second puts the objective's advantages in the place of TRL's.
Where something else than `generate` draws (`_generate_single_turn`), TRL's log-probabilities are taken with each prompt
read once (`_get_per_token_logps_and_entropies`, see `trainers/passes.py`). No more is overridden.
What changes from step to step besides the weights lives in `trainers/control.py`. A contract test pins what is
relied on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from iama.arrays import Floats, Integers
from iama.config.files import KLConfig, OnNan
from iama.environment import disable_telemetry
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.nearest import meant
from iama.objective.objective import Objective
from iama.objective.regularisation import chi_squared, chi_squared_advantages
from iama.prompts.render import completion_text, prompt_name
from trainers.control import RollOuts, RunControl, RunningMean, check_kl
from trainers.options import check_engine, check_options
from trainers.passes import Logps, can_share, in_passes, most_passes, without_needless_checkpointing
from trainers.probe import METRIC, can_probe, check_roll_outs, tolerance_of
from trainers.run.watch import covariance_with_advantages_K, effective_prompts, lift_K, silent_share
from trainers.run.watchdog import Watchdog

disable_telemetry()

SKIP = (
    "; if that reward is for other prompts only, set objective.on_nan: skip_criterion: it then leaves the objective of "
    "those that it does not score"
)
"""What to do about rewards that are each for one task."""
Draw = Callable[["NonlinearGRPOTrainer", Sequence[Sequence[int]], Sequence[str]], list[list[int]] | None]
"""From the trainer, prompts' token ids and names of what they come with besides to completions, end token included.

None leaves a batch to `generate`, on all processes alike."""
LINEAR = {
    "reward": "linear_sum/mean",
    "reward_std": "linear_sum/std",
    "frac_reward_zero_std": "linear_sum/groups_without_spread",
}
"""TRL's names for statistics of the weighted sum of the rewards, and ours: no operator is in them."""


class NonlinearGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with one more argument, the `objective`; everything else is TRL's, unchanged.

    The objective's criteria are matched to the reward functions by name (a function's `__name__`). Reward
    functions that no criterion names are logged and do not train: that is the place of gold rewards.
    Options of TRL under which another objective would be trained are refused or warned of, see
    `trainers/options.py`; those that change nothing here (`reward_weights`, `scale_rewards`,
    `multi_objective_aggregation`) are warned of. What TRL logs of the weighted sum of the rewards is logged under names
    that say so (`LINEAR`). Source: Takakura et al. 2026, Algorithm 2.

    Four further arguments may be left out: `kl` (a target KL for an adaptive beta, a chi-squared penalty; by
    default TRL's fixed beta alone), `on_nan` ("drop" lets a completion without a score leave its group, and
    "skip_criterion" first lets a criterion that scores none of a prompt's completions leave that prompt's objective;
    by default a missing score is an error), `running_mean_decay` (of the criteria's values, from which an aggregate
    other than the weighted sum takes its weights), `roll_outs` (what draws completions in the place of `generate`, of
    the same law: `trainers/run/roll_outs.py`) and `vllm_tolerance` (how far vLLM's log-probabilities of the roll-outs
    may be from the trainer's, in nats a token, see `trainers/probe.py`; by default what fits the number formats).
    """

    _tag_names = ["trl", "nonlinear-grpo", "iama"]  # noqa: RUF012 - TRL's own declaration
    _name = "Non-linear GRPO"

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        kl: KLConfig | None = None,
        on_nan: OnNan = "error",
        running_mean_decay: float = 0.9,
        vllm_tolerance: float | None = None,
        roll_outs: Draw | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= running_mean_decay < 1:
            raise ConfigError(f"running_mean_decay {running_mean_decay} must lie in [0, 1), e.g. 0.9")
        if on_nan not in get_args(OnNan):
            hint, offered = meant(on_nan, get_args(OnNan)), ", ".join(get_args(OnNan))
            raise ConfigError(f"on_nan {on_nan!r} is not known; {hint}write one of {offered}")
        super().__init__(*args, **kwargs)
        skips, masks = on_nan == "skip_criterion", bool(self.mask_truncated_completions)
        self.objective = replace(objective, skip_criterion=skips, centred=masks)
        self._columns = _match_columns(objective, self.reward_func_names)
        self.objective.check(self.num_generations)
        self._check_options()
        weights = torch.zeros(len(self.reward_func_names))
        weights[self._columns] = torch.tensor([c.weight for c in objective.criteria])
        self.reward_weights = weights
        self._draw, self._reads_in_passes = roll_outs, False
        self._kl, self._on_nan, self._has_dropped = kl or KLConfig(), on_nan, False
        check_kl(self._kl, self.beta)
        self._absent_K: torch.Tensor | None = None
        self._is_told_of_cuts = False
        self.drawn_weights_PK: Floats | None = None
        self.vllm_tolerance = self._tolerance(vllm_tolerance) if self.use_vllm else None
        self.watchdog = Watchdog(None)  # whoever runs the trainer may put a live one here
        self._roll_outs = RollOuts()
        self._running: RunningMean | None = None
        if objective.needs_running_values:
            self._running = RunningMean(running_mean_decay, [0.0] * len(objective.criteria))
        if self._running is not None or self._kl.target is not None:
            self.add_callback(RunControl(self, self._kl, self._running))

    def _check_options(self) -> None:
        """Refuse or warn of what bends the objective."""
        for message in [*check_options(self.args), *check_engine(self.args, self.objective)]:
            warnings.warn(message, IamaWarning, stacklevel=3)

    def _tolerance(self, given: float | None) -> float | None:
        """How far vLLM may be from the trainer, in nats a token; None, with a warning, where they are not compared."""
        if can_probe(self.args):
            return given or tolerance_of(self)
        warnings.warn(
            "with generation_kwargs or vllm_structured_outputs_regex vLLM draws from a law that the trainer does not "
            "know: its roll-outs are not compared with the trained weights",
            IamaWarning,
            stacklevel=3,
        )
        return None

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        self._reads_in_passes = False
        if self._draw is not None and not self.use_vllm:
            beside = [*multimodal_fields, *(["images"] if images is not None else [])]
            completion_ids = self._draw(self, prompt_ids, beside)
            if completion_ids is not None:
                self._reads_in_passes = True
                return completion_ids, None  # TRL asks for log-probabilities of other engines only
        generated: tuple[list[list[int]], Any] = super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, *args, **kwargs
        )
        return generated

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        trls = super()._get_per_token_logps_and_entropies
        if not self._reads_in_passes or kwargs.get("compute_aux_loss"):
            whole: tuple[Any, Any, Any] = trls(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
            return whole

        def read(model: Any, ids: torch.Tensor, mask: torch.Tensor, width: int) -> Logps:
            logps, entropies, _ = trls(model, ids, mask, width, None, *args, **kwargs)
            return logps, entropies

        size = batch_size or len(input_ids)
        batches = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        with self.accelerator.autocast(), without_needless_checkpointing(self.model):
            shares, passes = can_share(self.model), most_passes(self.model)
            found = [
                in_passes(read, model, ids, mask, logits_to_keep, shares=shares, passes=passes) for ids, mask in batches
            ]
        entropies = [entropies for _, entropies in found if entropies is not None]
        return torch.cat([logps for logps, _ in found]), torch.cat(entropies) if entropies else None, None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        with self.watchdog.phase("reward"):
            rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._gathered_rewards = self._without_missing(rewards, prompts, completions)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with self.watchdog.phase("roll-out"):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode, size = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        if self.vllm_tolerance is not None:
            difference = check_roll_outs(self, output, self.vllm_tolerance)
            self._metrics[mode][METRIC] += [] if difference is None else [difference]
        self._rename_linear(mode)
        columns = self._gathered_rewards[:, self._columns].double().cpu().numpy()
        rewards_PGK = columns.reshape(-1, size, len(self._columns))
        if self.mask_truncated_completions:
            rewards_PGK = self._without_masked(output, rewards_PGK)
        if self._on_nan == "skip_criterion":
            self._log_skipped(rewards_PGK, mode)
        advantages_PG = self._advantages(rewards_PGK, mode, self._ratios(output, size))
        if self._has_advantages(size, mode):
            self._log_signal(advantages_PG, rewards_PGK, mode)
        if self._kl.chi2 > 0 and mode == "train":
            advantages_PG = advantages_PG + self._chi_squared_advantages(output, rewards_PGK)
        advantages = torch.from_numpy(advantages_PG.reshape(-1)).float()
        start = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[start : start + len(inputs)].to(self.accelerator.device)
        logged = self._logs["advantages"]  # the completions table shows what trains
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        return output

    def _without_masked(self, output: dict[str, Any], rewards_PGK: Floats) -> Floats:
        """The rewards, NaN for completions that TRL masks whole: they leave their group, and hold no rank in it."""
        is_masked = self.accelerator.gather(output["completion_mask"].sum(dim=1) == 0).cpu().numpy()
        without: Floats = np.where(is_masked.reshape(rewards_PGK.shape[:2])[:, :, None], np.nan, rewards_PGK)
        if self.model.training and not self._is_told_of_cuts:
            self._tell_of_cuts(np.isfinite(without).any(axis=2).sum(axis=1))
        return without

    def _tell_of_cuts(self, sizes_P: Integers) -> None:
        """Warn, once, where most groups hold too few completions that end for an operator's draws."""
        for c in self.objective.criteria:
            short = int((sizes_P < c.operator.smallest_group).sum())
            if 2 * short > len(sizes_P):
                self._is_told_of_cuts = True
                if self.accelerator.is_main_process:
                    message = (
                        f"criterion {c.name!r}: {short} of {len(sizes_P)} groups hold fewer than "
                        f"{c.operator.smallest_group} completions that end, which {c.operator.name} needs: fewer draws "
                        "are counted there; raise sampling.max_new_tokens, or trainer.num_generations"
                    )
                    warnings.warn(message, IamaWarning, stacklevel=2)
                return

    def _ratios(self, output: dict[str, Any], size: int) -> Floats | None:
        """`policy / sampler` of whole completions `[P, G]`, as TRL caps it; None where TRL has none.

        TRL weighs a completion's own score by it. The ratios of those that it is ranked among belong in the operator
        (`iama/objective/off_policy.py`). A ratio a token says nothing of whole completions; that it is one the mode
        tells all processes alike, and the width does not: one of them may hold completions of a single token only.
        """
        ratio = output.get("importance_sampling_ratio")
        if ratio is None or not self.vllm_importance_sampling_mode.startswith("sequence"):
            return None
        ratios: Floats = self.accelerator.gather(ratio).double().cpu().numpy().reshape(-1, size)
        return ratios

    def _rename_linear(self, mode: str) -> None:
        """Give what TRL logs of the weighted sum of the rewards, which is not the objective, names that say so."""
        metrics = self._metrics[mode]
        for name, honest in LINEAR.items():
            metrics[honest].append(metrics[name].pop())
            if not metrics[name]:
                del metrics[name]

    def _advantages(self, rewards_PGK: Floats, mode: str, ratios_PG: Floats | None) -> Floats:
        """Advantages `[P, G]`; logs each criterion's value under its own operator."""
        if not self._has_advantages(rewards_PGK.shape[1], mode):
            return np.zeros(rewards_PGK.shape[:2])  # evaluation reads rewards; its loss has no meaning here
        values_K = self.objective.values_K(rewards_PGK)
        for criterion, value in zip(self.objective.criteria, values_K.tolist(), strict=True):
            self._metrics[mode][f"value/{criterion.name}"].append(value)
        if self.objective.weights == "simplex":
            key = [self.args.seed, *self._roll_outs.next(self.state.global_step, mode)]
            weights_PK = self.objective.draw_weights(len(rewards_PGK), key)
            if mode == "train":
                self.drawn_weights_PK = weights_PK
            return self.objective.advantages(rewards_PGK, weights_PK=weights_PK, ratios_PG=ratios_PG)
        if self._running is None:
            return self.objective.advantages(rewards_PGK, ratios_PG=ratios_PG)
        if mode == "train":
            self._running.update(values_K)
        running_values_K = self._running.means()
        if np.isnan(running_values_K).all():  # nothing was trained on yet, or every completion so far was dropped
            return np.zeros(rewards_PGK.shape[:2])
        self._log_aggregate(running_values_K, mode)
        return self.objective.advantages(rewards_PGK, running_values_K, ratios_PG=ratios_PG)

    def _has_advantages(self, size: int, mode: str) -> bool:
        """Whether advantages are measured: smaller groups of an evaluation have other values, so that none are."""
        return mode == "train" or size >= self.num_generations

    def _log_skipped(self, rewards_PGK: Floats, mode: str) -> None:
        """Log how many prompts of the batch each criterion was left out of."""
        for criterion, number in zip(self.objective.criteria, self.objective.num_prompts_K(rewards_PGK), strict=True):
            self._metrics[mode][f"skipped/{criterion.name}"].append(float(len(rewards_PGK) - number))

    def _log_signal(self, advantages_PG: Floats, rewards_PGK: Floats, mode: str) -> None:
        """Log what groups say of the step: how many are silent, how few prompts make it, and each criterion's part."""
        metrics = self._metrics[mode]
        metrics["silent_groups"].append(silent_share(advantages_PG, rewards_PGK))
        metrics["effective_prompts"].append(effective_prompts(advantages_PG))
        covariance_K = covariance_with_advantages_K(advantages_PG, rewards_PGK)
        for criterion, lift, covariance in zip(self.objective.criteria, lift_K(rewards_PGK), covariance_K, strict=True):
            metrics[f"lift/{criterion.name}"].append(float(lift))
            metrics[f"covariance/{criterion.name}"].append(float(covariance))

    def _log_aggregate(self, running_values_K: Floats, mode: str) -> None:
        """Log the running values and `dg/dR_k`, the weights that the aggregate gives the criteria now."""
        slopes_K = self.objective.slopes(running_values_K)
        for criterion, value, slope in zip(self.objective.criteria, running_values_K, slopes_K, strict=True):
            self._metrics[mode][f"running/{criterion.name}"].append(float(value))
            self._metrics[mode][f"weight/{criterion.name}"].append(float(slope))

    def _chi_squared_advantages(self, output: dict[str, Any], rewards_PGK: Floats) -> Floats:
        """The penalty's part of the advantages `[P, G]`; logs the chi-squared divergence."""
        gathered = self.accelerator.gather(self._log_ratios(output)).cpu().numpy()
        is_dropped_PG = np.isnan(rewards_PGK).all(axis=2)  # `_without_missing` took all its rewards
        log_ratios_PG = np.where(is_dropped_PG, np.nan, gathered.reshape(is_dropped_PG.shape))
        self._metrics["train"]["chi2"].append(chi_squared(log_ratios_PG))
        return chi_squared_advantages(log_ratios_PG, self._kl.chi2)

    def _log_ratios(self, output: dict[str, Any]) -> torch.Tensor:
        """`log pi - log pi_ref` of this process's completions `[B]`, float64, at the roll-outs' temperature.

        NaN where TRL masks a whole completion (`mask_truncated_completions`).
        """
        if "pixel_values" in output:
            raise ConfigError("kl.chi2 reads text only, but the batch holds images; leave kl.chi2 out")
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        logps = output.get("old_per_token_logps")
        if logps is None:  # TRL leaves them out where they equal those of the coming update
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            rows, width = self.args.per_device_train_batch_size, mask.size(1)
            with torch.no_grad():
                logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, attention, width, rows)
        per_token: torch.Tensor = logps - output["ref_per_token_logps"]
        log_ratios = per_token.double().masked_fill(mask == 0, 0.0).sum(dim=1)
        return log_ratios.masked_fill(mask.sum(dim=1) == 0, math.nan)

    def _without_missing(self, rewards: torch.Tensor, prompts: Any, completions: Any) -> torch.Tensor:
        """Refuse rewards that are not finite, or, with `on_nan="drop"`, take completions without a score out.

        A dropped completion loses all its rewards, so that TRL leaves it out of its own means as well. Every process
        sees the same gathered rewards, so all of them act alike.
        """
        scores = rewards[:, self._columns]
        bad = ~torch.isfinite(scores)
        has_bad = bool(bad.any())
        other_tasks = self._of_other_tasks(scores)
        if (infinite := torch.isinf(scores)).any():
            what = self._first(infinite, scores, prompts, completions)
            raise RewardError(f"{what}; every completion needs a finite score")
        if has_bad and self._on_nan == "error":
            what = self._first(bad, scores, prompts, completions)
            remedy = SKIP if other_tasks.any() else "; on_nan: drop leaves completions without a score out"
            raise RewardError(f"{what}; every completion needs a finite score{remedy}")
        if self._on_nan == "error":
            return rewards
        if self._on_nan == "skip_criterion":
            bad = bad & ~(other_tasks & ~bad.all(dim=1, keepdim=True))
            has_bad = bool(bad.any())
        elif self._loses_all(other_tasks):
            what = self._first(other_tasks, scores, prompts, completions)
            raise RewardError(f"{what}, as for all of that prompt; on_nan: drop leaves no completion to train on{SKIP}")
        dropped = bad.any(dim=1)
        self._metrics["train" if self.model.training else "eval"]["dropped"].append(float(dropped.sum()))
        if has_bad and not self._has_dropped:
            self._has_dropped = True
            what = self._first(bad, scores, prompts, completions)
            hint = SKIP if self._on_nan == "drop" and other_tasks.any() else ""
            if self.accelerator.is_main_process:
                message = f"{what}; such completions leave their group (on_nan: {self._on_nan}){hint}"
                warnings.warn(message, IamaWarning, stacklevel=2)
        return rewards.masked_fill(dropped[:, None], math.nan) if has_bad else rewards

    def _loses_all(self, other_tasks: torch.Tensor) -> bool:
        """Whether rewards of different tasks leave no completion: of this batch and those before, since one counted.

        Not where one reward scores none of them: that may be a judge that is down.
        """
        if not other_tasks.any(dim=1).all():
            self._absent_K = None
            return False
        absent_K = other_tasks.all(dim=0)
        self._absent_K = absent_K if self._absent_K is None else absent_K & self._absent_K
        return not bool(self._absent_K.any())

    def _of_other_tasks(self, scores: torch.Tensor) -> torch.Tensor:
        """Where a criterion scores no completion of a prompt which another criterion scores, `[P * G, K]`."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        absent = torch.isnan(scores).reshape(-1, size, scores.shape[1]).all(dim=1)
        absent = absent & ~absent.all(dim=1, keepdim=True)
        return absent.repeat_interleave(size, dim=0)

    def _first(self, bad: torch.Tensor, scores: torch.Tensor, prompts: Any, completions: Any) -> str:
        """The first bad score with its reward, prompt and completion, in words."""
        row, column = bad.nonzero()[0].tolist()
        score = scores[row, column].item()
        prompt, completion = gather_object(list(prompts))[row], gather_object(list(completions))[row]
        returned = "None or NaN" if math.isnan(score) else score
        return (
            f"reward {self.objective.criteria[column].name!r} returned {returned} for the prompt "
            f"{prompt_name(prompt)} and the completion {completion_text(completion)[:80]!r}"
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
