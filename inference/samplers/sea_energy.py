"""Descent on the energy of response logits, with the hard text forward and its relaxation backward: SEA's inner loop.

Of chain r the state is one logit vector a response position (papers: y in R^{T x V}). Its text is the argmax of each,
up to the first end token; what policy and reward read is always that text, so log-probability and reward are those of
ids. Backward, a position's one-hot weights stand for softmax(y), so that

    dE/dy = -J(softmax y)^T (log pi_ref(. | before) + E_policy g_policy + alpha E_reward g_reward)

with E the embedding tables and g the gradients of log pi_ref and of the reward with respect to the inputs. No one-hot
matrix is formed: inputs are looked up, and the state's positions lie end to end (N in all, of all chains), without
padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from iama.errors import ModelError, RewardError
from inference.engine.prefix import Prefixes
from inference.engine.reward_gradient import embedding_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inference.engine.policy import Policy
    from inference.engine.reward_gradient import EmbeddedReward
    from inference.samplers.sea import SeaSettings

BLOCK = 2**22  # logits whose gradient is formed at once
LOWEST = -1e4  # of log-probabilities in a gradient: a token that the policy rules out has -inf
NOT_FINITE = "is not finite; its weights are damaged, or use float32"


@dataclass(frozen=True)
class Models:
    """Policy and reward, whose token ids mean the same; `reward_source` names the reward in errors.

    `end_ids` end a text, and `silent_V` marks the ids that no text may hold.
    """

    policy: Policy
    reward: EmbeddedReward
    reward_source: str
    end_ids: frozenset[int]
    silent_V: torch.Tensor


@dataclass(frozen=True)
class Start:
    """What a chain begins with: the prompt as the policy reads it, the sampled response, and the reward's template
    before and after a response, all as token ids; `stream` addresses its random numbers."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    stream: int


@dataclass
class Reading:
    """What policy and reward make of the chains' texts.

    `log_probs_R` are nats of the text with its end token, `rewards_R` rewards, `num_text_R` tokens before the end
    token, `num_counted_R` with it. Gradients with respect to inputs are there where they were asked for.
    """

    log_probs_R: torch.Tensor
    rewards_R: torch.Tensor
    num_text_R: torch.Tensor
    num_counted_R: torch.Tensor
    log_laws_NV: torch.Tensor
    policy_gradient_ND: torch.Tensor | None = None
    reward_gradient_ND: torch.Tensor | None = None


class Energy:
    """`-(log pi_ref + alpha * reward)` of the texts of R chains, read together, and its gradient in the state.

    The policy reads prompts once, the reward its whole rows at every step.
    """

    def __init__(self, models: Models, starts: Sequence[Start], alpha: float) -> None:
        policy, self._reward = models.policy, models.reward
        self._sources = f"policy {policy.name!r}", models.reward_source
        self._alpha, self._starts = alpha, starts
        self.device = device = policy.model.device
        self.dtype = torch.float64 if policy.model.dtype == torch.float64 else torch.float32
        self._end_ids = torch.tensor(sorted(models.end_ids), device=device)
        self._policy_table = embedding_table(policy.model)
        self.silent_V = models.silent_V
        self.keys = [start.stream % 2**63 for start in starts]
        self.sizes = [len(start.token_ids) for start in starts]
        self.row_N = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(self.sizes)).to(device)
        self._place_N = torch.cat([torch.arange(size) for size in self.sizes]).to(device)
        # What the policy reads: the prompt's last token, then the response but for its last.
        self._ids_RT = _padded([[start.prompt_ids[-1], *start.token_ids] for start in starts], device)
        self.sampled_N = self._ids_RT[self.row_N, self._place_N + 1]
        self._prompts = Prefixes(policy.model, [start.prompt_ids[:-1] for start in starts])

    def split(self, tensor_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A packed tensor's part of each chain."""
        return torch.split(tensor_N, self.sizes)

    def read(self, tokens_N: torch.Tensor, *, with_gradient: bool) -> Reading:
        """Read the texts; raises `ModelError` or `RewardError` for what is not finite."""
        num_counted_R, num_text_R = self._lengths(tokens_N)
        counts_N = self._place_N < num_counted_R[self.row_N]
        log_laws_NV, log_probs_R, policy_gradient_ND = self._read_policy(tokens_N, counts_N, with_gradient)
        rewards_R, reward_gradient_ND = self._read_reward(
            tokens_N, num_text_R.tolist(), with_gradient and self._alpha > 0
        )
        return Reading(
            log_probs_R, rewards_R, num_text_R, num_counted_R, log_laws_NV, policy_gradient_ND, reward_gradient_ND
        )

    def gradient(self, reading: Reading, state_NV: torch.Tensor) -> torch.Tensor:
        """dE/dy, `[N, V]`, 0 after a text's end; it takes the place of the reading's `log_laws_NV`."""
        assert reading.policy_gradient_ND is not None
        weight_NV = reading.log_laws_NV.clamp_(min=LOWEST)
        counts_N1 = (self._place_N < reading.num_counted_R[self.row_N]).unsqueeze(1)
        policy_table = self._policy_table[: weight_NV.shape[1]]
        reward_table = self._reward.embeddings[: weight_NV.shape[1]]
        num_rows = max(1, BLOCK // weight_NV.shape[1])
        for begin in range(0, len(weight_NV), num_rows):
            rows = slice(begin, begin + num_rows)
            block_NV = weight_NV[rows]
            block_NV += (reading.policy_gradient_ND[rows] @ policy_table.T).to(self.dtype)
            if reading.reward_gradient_ND is not None:
                pull_NV = (reading.reward_gradient_ND[rows] @ reward_table.T).to(block_NV)
                block_NV[:, : len(reward_table)].add_(pull_NV, alpha=self._alpha)
            softmax_pullback_(block_NV, state_NV[rows]).mul_(counts_N1[rows]).neg_()
        return weight_NV

    def _lengths(self, tokens_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each text with its first end token, and without it."""
        is_end_N = torch.isin(tokens_N, self._end_ids)
        sizes_R = torch.tensor(self.sizes, device=self.device)
        after_N = torch.where(is_end_N, self._place_N + 1, sizes_R[self.row_N])
        counted_R = sizes_R.scatter_reduce(0, self.row_N, after_N, "amin")
        ended_R = torch.zeros_like(sizes_R).scatter_reduce(
            0, self.row_N, (is_end_N & (self._place_N + 1 == counted_R[self.row_N])).long(), "amax"
        )
        return counted_R, counted_R - ended_R

    def _read_policy(
        self, tokens_N: torch.Tensor, counts_N: torch.Tensor, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Next-token log-probabilities, their sum over the text, and its gradient in the inputs."""
        self._ids_RT[self.row_N, self._place_N + 1] = tokens_N
        with torch.set_grad_enabled(with_gradient):
            inputs_RTD = self._policy_table[self._ids_RT[:, :-1]].requires_grad_(with_gradient)
            logits_RTV = self._prompts.logits(inputs_RTD)
        where = self.row_N, self._place_N
        log_laws_NV = logits_RTV.detach()[where].to(self.dtype).log_softmax(dim=-1)
        log_probs_N = log_laws_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1) * counts_N
        log_probs_R = log_probs_N.new_zeros(len(self.sizes)).index_add(0, self.row_N, log_probs_N)
        if not bool(log_probs_R.isfinite().all()):
            raise ModelError(f"{self._sources[0]}: the log-probability of a text {NOT_FINITE}")
        if not with_gradient:
            return log_laws_NV, log_probs_R, None
        pull_NV = log_laws_NV.exp().neg_()
        pull_NV[torch.arange(len(tokens_N), device=self.device), tokens_N] += 1
        pull_RTV = torch.zeros_like(logits_RTV)
        pull_RTV[where] = pull_NV.mul_(counts_N.unsqueeze(1)).to(logits_RTV.dtype)
        (gradient_RTD,) = torch.autograd.grad(logits_RTV, inputs_RTD, pull_RTV)
        if not bool(gradient_RTD.isfinite().all()):
            raise ModelError(f"{self._sources[0]}: the gradient in its inputs {NOT_FINITE}")
        is_read_N1 = (self._place_N + 1 < gradient_RTD.shape[1]).unsqueeze(1)
        place_N = (self._place_N + 1).clamp(max=gradient_RTD.shape[1] - 1)
        return log_laws_NV, log_probs_R, gradient_RTD[self.row_N, place_N] * is_read_N1

    def _read_reward(
        self, tokens_N: torch.Tensor, num_text: Sequence[int], with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rewards of the texts within the reward's template, and their gradients in the inputs, 0 after the text."""
        ids = [
            [*start.before, *tokens[:number].tolist(), *start.after]
            for start, tokens, number in zip(self._starts, self.split(tokens_N.cpu()), num_text, strict=True)
        ]
        rows = [self._reward_inputs(row).requires_grad_(with_gradient) for row in ids]
        with torch.set_grad_enabled(with_gradient):
            rewards_R = self._reward.scores(rows)
        values_R = rewards_R.detach().to(self.device, self.dtype)
        if not bool(values_R.isfinite().all()):
            raise RewardError(f"{self._sources[1]}: the score of a text {NOT_FINITE}")
        if not with_gradient:
            return values_R, None
        gradients = torch.autograd.grad(rewards_R.sum(), rows)
        parts = []
        for start, size, number, gradient_TD in zip(self._starts, self.sizes, num_text, gradients, strict=True):
            begin = len(start.before)
            parts += [gradient_TD[begin : begin + number], gradient_TD.new_zeros(size - number, gradient_TD.shape[1])]
        gradient_ND = torch.cat(parts)
        if not bool(gradient_ND.isfinite().all()):
            raise RewardError(f"{self._sources[1]}: the gradient in its inputs {NOT_FINITE}")
        return values_R, gradient_ND

    def _reward_inputs(self, ids: Sequence[int]) -> torch.Tensor:
        """Inputs of a row, `[T, D]`; a token that the reward lacks gives 0."""
        table = self._reward.embeddings
        ids_T = torch.tensor(ids, device=table.device)
        return table[ids_T.clamp(max=len(table) - 1)] * (ids_T < len(table)).unsqueeze(1)


class Chains:
    """R chains on their way: their states `state_NV`, and the best text of each so far, by reward or by energy.

    Positions after a text's end have no gradient, but Adam's momentum and noise move them on: where the end token goes
    to a later place, or away, tokens come to light that no energy has judged.

    `best_N` are the tokens of the best texts with what follows their ends, `best_step_R` the step that each was found
    after and `num_kept_R` how many tokens belong to it, end token included. `rewards_SR`, `log_probs_SR` and
    `num_text_SR` tell of the texts before the first step and after each.
    """

    def __init__(self, energy: Energy, settings: SeaSettings) -> None:
        self._energy, self._settings = energy, settings
        self._generators = [torch.Generator(energy.device).manual_seed(key) for key in energy.keys]
        silent_V = energy.silent_V
        self.rewards_SR: list[list[float]] = []
        self.log_probs_SR: list[list[float]] = []
        self.num_text_SR: list[list[int]] = []
        tokens_N = energy.sampled_N
        with_gradient = settings.num_steps > 0
        if settings.init == "random":
            self.state_NV = torch.zeros(len(tokens_N), len(silent_V), dtype=energy.dtype, device=energy.device)
            self._add_noise(1.0)
            self.state_NV.masked_fill_(silent_V, -torch.inf)
            tokens_N = self.state_NV.argmax(dim=-1)
        self._reading = energy.read(tokens_N, with_gradient=with_gradient)
        if settings.init == "sample":
            self.state_NV = start_state(self._reading.log_laws_NV, tokens_N, silent_V, settings.margin)
            assert torch.equal(self.state_NV.argmax(dim=-1), tokens_N), "step 0 does not decode to the sample"
        self.best_N = tokens_N
        self._best_R = torch.full_like(self._reading.rewards_R, -torch.inf)
        self.num_kept_R = torch.zeros_like(self._reading.num_text_R)
        self.best_step_R = torch.zeros_like(self.num_kept_R)
        self._note(tokens_N)

    def run(self) -> None:
        """All steps."""
        settings = self._settings
        kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.SGD
        optimiser = kind([self.state_NV], lr=settings.learning_rate)
        last = settings.num_steps - 1
        for step in range(settings.num_steps):
            self.state_NV.grad = self._energy.gradient(self._reading, self.state_NV)
            optimiser.step()
            if settings.noise and step < last:
                self._add_noise(settings.noise * (1 - step / last))
            tokens_N = self.state_NV.argmax(dim=-1)
            self._reading = self._energy.read(tokens_N, with_gradient=step < last)
            self._note(tokens_N)
        self.state_NV.grad = None

    def _note(self, tokens_N: torch.Tensor) -> None:
        """Keep what was read, and the texts that are better than any before."""
        reading, settings = self._reading, self._settings
        value_R = reading.rewards_R
        if settings.keep == "energy":
            value_R = reading.log_probs_R + settings.alpha * value_R
        is_better_R = value_R > self._best_R
        self.best_N = torch.where(is_better_R[self._energy.row_N], tokens_N, self.best_N)
        self._best_R = torch.where(is_better_R, value_R, self._best_R)
        self.num_kept_R = torch.where(is_better_R, reading.num_counted_R, self.num_kept_R)
        self.best_step_R = torch.where(is_better_R, len(self.rewards_SR), self.best_step_R)
        self.rewards_SR.append(reading.rewards_R.tolist())
        self.log_probs_SR.append(reading.log_probs_R.tolist())
        self.num_text_SR.append(reading.num_text_R.tolist())

    def _add_noise(self, spread: float) -> None:
        """Normal noise, each chain's from its own generator, so that no batch changes it."""
        for generator, part_TV in zip(self._generators, self._energy.split(self.state_NV), strict=True):
            noise_TV = torch.randn(part_TV.shape, generator=generator, dtype=part_TV.dtype, device=part_TV.device)
            part_TV.add_(noise_TV, alpha=spread)


def start_state(
    log_laws_NV: torch.Tensor, tokens_N: torch.Tensor, silent_V: torch.Tensor, margin: float
) -> torch.Tensor:
    """The policy's own logits, with the sampled token raised by `margin` above the greatest: `[N, V]`.

    Tokens that no text may hold get -inf, unless they were sampled; they stay there, as their gradient is 0.
    """
    greatest_N1 = log_laws_NV.amax(dim=-1, keepdim=True)
    state_NV = log_laws_NV.masked_fill(silent_V, -torch.inf)
    return state_NV.scatter_(1, tokens_N.unsqueeze(1), greatest_N1 + margin)


def softmax_pullback_(weight_NV: torch.Tensor, state_NV: torch.Tensor) -> torch.Tensor:
    """A gradient in the weights softmax(y), brought back to y in place: `p (v - <p, v>)`."""
    law_NV = state_NV.softmax(dim=-1)
    mean_N1 = torch.linalg.vecdot(law_NV, weight_NV).unsqueeze(1)
    return weight_NV.sub_(mean_N1).mul_(law_NV)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
