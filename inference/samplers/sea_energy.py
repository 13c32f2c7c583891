"""SEA's energy of response logits, with the hard text forward and its relaxation backward.

Of chain r the state is one logit vector a response position (papers: y in R^{T x V}). Its text is the argmax of each,
up to the first end token; what policy and reward read is always that text, so log-probability and reward are those of
ids. Backward, a position's one-hot weights stand for softmax(y), so that

    dE/dy = -J(softmax y)^T (log pi_ref(. | before) + E_policy g_policy + alpha E_reward g_reward)

with E the embedding tables and g the gradients of log pi_ref and of the reward with respect to the inputs. No one-hot
matrix is formed: inputs are looked up, and the state's positions lie end to end (N in all, of all chains), without
padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ModelError, RewardError
from iama.models.inputs import pad
from iama.rewards.reward import Reward
from inference.engine.policy import Policy
from inference.engine.prefix import Prefixes
from inference.engine.reward_gradient import EmbeddedReward, GradientRows, embedding_table
from inference.engine.reward_rows import reads_in_pieces
from inference.engine.rows import Rows
from inference.engine.vocabulary import end_tokens, special_tokens

BLOCK = 2**22  # logits whose gradient is formed at once
LOWEST = -1e4  # of log-probabilities in a gradient: a token that the policy rules out has -inf
NOT_FINITE = "is not finite; its weights are damaged, or use float32"


@dataclass(frozen=True)
class Models:
    """Policy and reward, whose token ids mean the same; `reward_source` names the reward in errors.

    `end_ids` end a text, and `silent_V` marks the ids that no text may hold. `in_pieces`: what stands before a response
    is read once by the reward, and not at every step.
    """

    policy: Policy
    reward: EmbeddedReward
    reward_source: str
    end_ids: frozenset[int]
    silent_V: torch.Tensor
    in_pieces: bool = False

    @classmethod
    def of(cls, policy: Policy, reward: Reward, sampling: Sampling) -> Self:
        """Raise `ConfigError` for a reward that does not score embeddings as it scores their tokens."""
        embedded, end_ids = EmbeddedReward(reward), end_tokens(policy, sampling)
        silent_V = silent_tokens(policy, len(embedded.embeddings), end_ids)
        in_pieces = reads_in_pieces(embedded.classifier) and len(embedded.embeddings) >= len(silent_V)
        return cls(policy, embedded, embedded.source, end_ids, silent_V, in_pieces)


def silent_tokens(policy: Policy, num_reward_tokens: int, end_ids: frozenset[int]) -> torch.Tensor:
    """Ids of the policy's logits that no chain may move to, `[V]`: they have no text, or no meaning for the reward."""
    size = policy.model.config.get_text_config(decoder=True).vocab_size
    silent_V = torch.ones(size, dtype=torch.bool)
    silent_V[: min(size, len(policy.tokenizer), num_reward_tokens)] = False
    special = [token_id for token_id in special_tokens(policy.tokenizer).values() if token_id < size]
    silent_V[special] = True
    silent_V[[token_id for token_id in end_ids if token_id < size]] = False
    return silent_V.to(policy.model.device)


@dataclass(frozen=True)
class Start:
    """What a chain begins with: the prompt as the policy reads it, the sampled response, and the reward's template
    before and after a response, all as token ids; `stream` addresses its random numbers."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    stream: int

    @property
    def num_ahead(self) -> int:
        """Tokens that a reward which reads in pieces reads once: so many that one at least is left for every step."""
        return max(0, len(self.before) - (not self.after))


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

    Policy and reward read what stands before the responses once, where the reward can (`Models.in_pieces`).
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
        self._ids_RT = pad([[start.prompt_ids[-1], *start.token_ids] for start in starts], 0, device=device)
        self.sampled_N = self._ids_RT[self.row_N, self._place_N + 1]
        self._prompts = Prefixes(policy.model, [start.prompt_ids[:-1] for start in starts])
        self._rows = self._slots = None
        if models.in_pieces:
            classifier = self._reward.classifier
            self._rows = GradientRows(classifier.model, classifier.source)
            self._slots = self._rows.allocate(len(starts))
            begun = [(slot, start) for slot, start in zip(self._slots, starts, strict=True) if start.num_ahead]
            if begun:
                ahead = [start.before[: start.num_ahead] for _, start in begun]
                self._rows.extend([slot for slot, _ in begun], ahead)

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
        texts = [tokens[:number].tolist() for tokens, number in zip(self.split(tokens_N.cpu()), num_text, strict=True)]
        read = self._whole if self._rows is None else self._read_rest
        rewards_R, gradients = read(texts, with_gradient)
        values_R = rewards_R.to(self.device, self.dtype)
        if not bool(values_R.isfinite().all()):
            raise RewardError(f"{self._sources[1]}: the score of a text {NOT_FINITE}")
        if not with_gradient:
            return values_R, None
        parts = []
        for size, number, gradient_TD in zip(self.sizes, num_text, gradients, strict=True):
            parts += [gradient_TD[:number], gradient_TD.new_zeros(size - number, gradient_TD.shape[1])]
        gradient_ND = torch.cat(parts)
        if not bool(gradient_ND.isfinite().all()):
            raise RewardError(f"{self._sources[1]}: the gradient in its inputs {NOT_FINITE}")
        return values_R, gradient_ND

    def _read_rest(
        self, texts: Sequence[Sequence[int]], with_gradient: bool
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Rewards, and gradients `[T, D]` from each text's first token on; what stands before it is not read again."""
        assert self._rows is not None
        assert self._slots is not None
        for slot, start in zip(self._slots, self._starts, strict=True):
            self._rows.roll_back(slot, start.num_ahead)
        rest = [
            [*start.before[start.num_ahead :], *text, *start.after]
            for start, text in zip(self._starts, texts, strict=True)
        ]
        head = self._reward.classifier.head
        if not with_gradient:
            return self._reward.scaled(self._rows.extend(self._slots, rest)[:, head]), []
        logits, gradients = self._rows.extend_with_gradients(self._slots, rest, head)
        skipped = [len(start.before) - start.num_ahead for start in self._starts]
        parts = [self._reward.slope * gradient[number:] for number, gradient in zip(skipped, gradients, strict=True)]
        return self._reward.scaled(logits[:, head]), parts

    def _whole(
        self, texts: Sequence[Sequence[int]], with_gradient: bool
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The same of a reward that reads whole rows."""
        rows = [
            self._reward_inputs([*start.before, *text, *start.after]).requires_grad_(with_gradient)
            for start, text in zip(self._starts, texts, strict=True)
        ]
        with torch.set_grad_enabled(with_gradient):
            rewards_R = self._reward.scores(rows)
        if not with_gradient:
            return rewards_R, []
        gradients = torch.autograd.grad(rewards_R.sum(), rows)
        begun = [len(start.before) for start in self._starts]
        return rewards_R.detach(), [gradient[begin:] for begin, gradient in zip(begun, gradients, strict=True)]

    def _reward_inputs(self, ids: Sequence[int]) -> torch.Tensor:
        """Inputs of a row, `[T, D]`; a token that the reward lacks gives 0."""
        table = self._reward.embeddings
        ids_T = torch.tensor(ids, device=table.device)
        return table[ids_T.clamp(max=len(table) - 1)] * (ids_T < len(table)).unsqueeze(1)


def start_state(
    log_laws_NV: torch.Tensor, tokens_N: torch.Tensor, silent_V: torch.Tensor, margin: float
) -> torch.Tensor:
    """The policy's logits, with the sampled token raised by `margin` above the greatest: `[N, V]`.

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


def decode_top_k(
    models: Models, starts: Sequence[Start], states: Sequence[torch.Tensor], k: int
) -> tuple[list[list[int]], list[Cost]]:
    """Texts from the states `[T, V]` of chains: at each position the best of the policy's `k` likeliest next tokens
    that have a text.

    They end at an end token or with the state. Chains of one prompt that follow each other share its prefill, which is
    in the first one's cost.
    """
    rows = Rows(models.policy.model, f"policy {models.policy.name!r}")
    live, logits_RV, costs = _prefill(rows, starts)
    answers: list[list[int]] = [[] for _ in starts]
    while live:
        chains = list(live)
        state_RV = torch.stack([states[c][len(answers[c])] for c in chains])
        for c, token in zip(chains, _best_of_likeliest(models.silent_V, logits_RV, state_RV, k), strict=True):
            answers[c].append(token)
            if token in models.end_ids or len(answers[c]) == len(states[c]):
                rows.free([live.pop(c)])
        if live:
            logits_RV = rows.extend(list(live.values()), [answers[c][-1:] for c in live])
            for c, flops in zip(live, rows.last_flops.tolist(), strict=True):
                costs[c] += Cost(policy_decode_tokens=1, sequential_steps=1, flops=flops)
    return answers, costs


def _best_of_likeliest(silent_V: torch.Tensor, logits_RV: torch.Tensor, state_RV: torch.Tensor, k: int) -> list[int]:
    """Of each row the best by its state of the `k` likeliest tokens; where that is a silent one, of those with text."""
    number = min(k, logits_RV.shape[1])

    def best_R(logits_RV: torch.Tensor, state_RV: torch.Tensor) -> torch.Tensor:
        likeliest_RK = logits_RV.topk(number, dim=-1).indices
        best_R1 = state_RV.gather(1, likeliest_RK).argmax(dim=-1, keepdim=True)
        return likeliest_RK.gather(1, best_R1).squeeze(1)

    tokens_R = best_R(logits_RV, state_RV)
    is_silent_R = silent_V[tokens_R]
    if bool(is_silent_R.any()):
        heard = [values_RV.masked_fill(silent_V, -torch.inf) for values_RV in (logits_RV, state_RV)]
        tokens_R = torch.where(is_silent_R, best_R(*heard), tokens_R)
    tokens: list[int] = tokens_R.tolist()
    return tokens


def _prefill(rows: Rows, starts: Sequence[Start]) -> tuple[dict[int, int], torch.Tensor, list[Cost]]:
    """Slots by chain, the logits after their prompts `[R, V]`, and costs."""
    firsts = [c for c in range(len(starts)) if c == 0 or starts[c].prompt_ids is not starts[c - 1].prompt_ids]
    slots = rows.allocate(len(firsts))
    logits_PV = rows.extend(slots, [starts[c].prompt_ids for c in firsts])
    prompt_flops = rows.last_flops.tolist()
    costs = [Cost(sequential_steps=1)] * len(starts)
    sizes = np.diff([*firsts, len(starts)]).tolist()
    live: dict[int, int] = {}
    for c, slot, size, flops in zip(firsts, slots, sizes, prompt_flops, strict=True):
        costs[c] += Cost(policy_prefill_tokens=len(starts[c].prompt_ids), flops=flops)
        live |= zip(range(c, c + size), [slot, *rows.fork(slot, size - 1)], strict=True)
    return live, logits_PV.repeat_interleave(torch.tensor(sizes, device=logits_PV.device), dim=0), costs
