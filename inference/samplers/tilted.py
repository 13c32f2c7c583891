"""Plain sampling, tilted towards what a value head foretells: `pi(v | h) exp(lam (Q(h, v) - E_pi Q) / spread)`.

The head (`iama.models.value_head`, fitted by `iama distill --value-head`) reads the hidden state that the policy has
anyhow, so that an answer costs hardly more than one sample. The head alone guides; the reward reads the finished text,
to tell what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from iama.config.schema import Strict
from iama.errors import ConfigError, ModelError
from iama.models.fingerprint import fingerprint
from iama.models.value_head import (
    HeadRecord,
    ValueHead,
    find_record,
    hidden_states,
    load_head,
    output_size,
    with_constant,
)
from iama.prompts.render import Prompt
from inference.engine.kv_cache import Step
from inference.engine.next_token import draw_tokens, probabilities
from inference.engine.policy import Policy, policy_fingerprint
from inference.engine.random_streams import Keys, stream_keys, uniforms
from inference.engine.rows import Rows
from inference.samplers.segments import (
    FirstTokens,
    Kept,
    Proposal,
    RowProposer,
    SegmentLoop,
    SegmentRequest,
    SegmentSampler,
    TextScores,
)


class TiltedSettings(Strict):
    """How strongly a value head tilts the policy, and among which tokens."""

    dial: ClassVar[tuple[str, ...]] = ("lam",)

    lam: float = Field(2.0, ge=0)
    """Strength: what a standard deviation of Q, over the tokens that the head was fitted on, adds to a token's
    log-probability; 0: the policy's own law."""
    head: str
    """Folder of a value head, or of several in folders of their own, of which that of the policy and the reward is
    taken."""
    min_p: float = Field(0.1, ge=0, le=1)
    """Unless `lam` is 0, only tokens are drawn that are at least so likely as this share of the likeliest: the head has
    seen too few others. A large vocabulary may want less."""

    def files_key(self, source: str, policy: str | None, reward: str | None) -> str:
        """A hash of the head for a policy (its fingerprint) and a reward; raises `ModelError` as `find_record` does."""
        return fingerprint(find_record(Path(self.head), source, policy, reward)[0])

    def fitted(self, source: str, policy: str | None, reward: str | None) -> HeadRecord:
        """What the head was fitted on, and what that took; arguments and errors are those of `files_key`."""
        return find_record(Path(self.head), source, policy, reward)[1]


@dataclass(frozen=True)
class TiltedTokens(SegmentSampler[SegmentRequest]):
    """The sampler; `batch_size` is the number of prompts that are answered together.

    The trace is one segment, the whole answer. The ledger has what the head multiplies. Raises `ModelError` for a head
    that is another policy's or another reward's, or does not fit the model.
    """

    policy: Policy
    settings: TiltedSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        record = self.head.record
        found = output_size(self.policy.model, f"policy {self.policy.name!r}")
        if found != (record.hidden_size, record.vocabulary):
            raise ModelError(
                f"tilted_tokens: the value head {self.settings.head!r} reads {record.hidden_size} numbers and values "
                f"{record.vocabulary} tokens, where policy {self.policy.name!r} has {found[0]} and {found[1]}; fit one "
                "on a pool of this policy's samples"
            )

    @cached_property
    def head(self) -> ValueHead:
        """That of the policy and the reward."""
        policy, name = self.policy, self.reward.name
        if policy.spec is None:
            raise ConfigError(
                f"tilted_tokens: which files policy {policy.name!r} comes from is not known, so that no value head can "
                "be told to be its own; load it with load_policy"
            )
        # A flag names no column; an evaluation says which of a criterion's rewards it is.
        reward = None if name.startswith("--") else name.removesuffix(" (proxy)")
        source = f"tilted_tokens, policy {policy.name!r}"
        own = policy_fingerprint(policy.name, policy.spec)
        return load_head(find_record(Path(self.settings.head), source, own, reward)[0], source)

    def request(self, index: int, prompt_ids: Sequence[int], prompt: Prompt, *rest: Any) -> SegmentRequest:
        """A prompt for `loop`; `rest` are its columns, key and seed."""
        return SegmentRequest(index, prompt_ids, prompt, *rest)

    def loop(self, batch_size: int) -> SegmentLoop[SegmentRequest]:
        """What answers requests, as many side by side."""
        rule = _Rule(self)
        rows = _HeadRows(self.policy, self.head.A_DR)
        proposer = RowProposer(self.policy, self.sampling, rule, rows)
        scores: TextScores[SegmentRequest] = TextScores(self.policy, self.reward, self.sampling, is_single=True)
        return SegmentLoop(proposer, rule, scores, batch_size)


class _HeadRows(Rows):
    """Rows that give the head's `A(h)` beside the logits, `[R, V + rank]` together."""

    def __init__(self, policy: Policy, A_DR: torch.Tensor) -> None:
        super().__init__(policy.model, f"policy {policy.name!r}")
        self._A_DR = A_DR.to(policy.model.device).double()

    def _forward(self, tokens: Sequence[Sequence[int]], step: Step) -> Any:
        with hidden_states(self._model) as seen:
            outputs = super()._forward(tokens, step)
        last_RD = seen[0][:, -1]
        outputs.logits = torch.cat([outputs.logits[:, -1].double(), with_constant(last_RD) @ self._A_DR], dim=1)
        return outputs


class _Rule:
    """The method's part in the loop: one proposal, which is the answer."""

    def __init__(self, sampler: TiltedTokens) -> None:
        head = sampler.head
        self._sampling, self._settings = sampler.sampling, sampler.settings
        self._source = f"policy {sampler.policy.name!r}"
        self._B_VR = head.B_VR.to(sampler.policy.model.device).double()
        self._unit, self._flops = head.record.spread, head.flops_per_token
        self.max_proposals = self.num_parallel = 1
        self.min_tokens = self.max_tokens = sampler.sampling.max_new_tokens

    def open(self, requests: Sequence[SegmentRequest]) -> list[FirstTokens]:
        """The answers."""
        return [[None] for _ in requests]

    def streams(self, request: SegmentRequest, numbers: Sequence[int]) -> Keys:
        """That of a single sample."""
        return stream_keys(request.seed, [request.key] * len(numbers), [0] * len(numbers))

    def choose(self, proposals: Sequence[Proposal], logits_RV: torch.Tensor) -> list[int]:
        """Tokens drawn from the tilted law, with the random numbers of plain decoding."""
        size, sampling = len(self._B_VR), self._sampling
        seen = None
        if sampling.repetition_penalty != 1:
            seen = [[*p.request.prompt_ids, *p.tokens] for p in proposals]
        law_RV = probabilities(logits_RV[:, :size], sampling, seen, source=self._source)
        values_RV = logits_RV[:, size:] @ self._B_VR.T / self._unit
        for proposal in proposals:
            proposal.request.flops += self._flops
        u_R = uniforms(np.asarray([p.stream for p in proposals]), np.asarray([len(p.tokens) for p in proposals]))
        tilted_RV = tilted(law_RV, values_RV, self._settings.lam, self._settings.min_p)
        tokens: list[int] = draw_tokens(tilted_RV, u_R).tolist()
        return tokens

    def ends(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Never before the answer does."""
        return [False] * len(proposals)

    def judge(self, request: SegmentRequest) -> Kept | FirstTokens:
        """Keep it."""
        assert request.best is not None
        return Kept(request.best, request.num_proposals)


def tilted(law_RV: torch.Tensor, values_RV: torch.Tensor, lam: float, min_p: float) -> torch.Tensor:
    """`law e^(lam values)` over tokens at least `min_p` times as likely as the likeliest: `[R, V]`, rows sum to 1.

    With `lam` = 0 it is the law itself. What is added to all values of a row, such as their mean, changes nothing.
    """
    if lam == 0:
        return law_RV
    log_RV = law_RV.log() + lam * values_RV
    return log_RV.masked_fill(law_RV < min_p * law_RV.amax(dim=1, keepdim=True), -torch.inf).softmax(dim=1)
