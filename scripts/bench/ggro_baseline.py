"""GGRO on stock transformers, one prompt at a time: what `make bench` compares with. Frozen: do not speed it up.

An honest reference: the published procedure (arXiv 2606.09635) without the two things that it computes and throws away,
its pass of the reward over soft tokens and the gradient of a segment's last candidate. As published, the policy's cache
lives as long as a candidate, so that each candidate reads the prompt and all that is kept; the reward reads, and
differentiates, each candidate's whole row; and a candidate is known as a repetition when it is decoded and scored.

It covers the setting of the bench alone: greedy decoding, no end tokens, no segment cut by its length. The gradient is
that of input embeddings with frozen weights, where the public code forms that of dense one-hot rows. Given the same
models it answers what `inference.samplers.ggro` answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Baseline:
    """Models, their weights frozen, and the method's settings (names as in `inference.samplers.ggro.GgroSettings`)."""

    policy: Any
    reward: Any
    num_candidates: int
    entropy_threshold: float
    min_segment: int
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """Token ids of a response, its segments' lengths, and how many candidates were decoded for each."""

    token_ids: list[int]
    segments: list[int]
    num_decoded: list[int]


def respond(setup: Baseline, prompt_ids: list[int], template: tuple[list[int], list[int]]) -> Answer:
    """Answer a prompt; `template` is what the reward reads before and after a response."""
    answer = Answer([], [], [])
    while len(answer.token_ids) < setup.max_new_tokens:
        best, number = next_segment(setup, prompt_ids, template, answer.token_ids)
        answer.token_ids.extend(best)
        answer.segments.append(len(best))
        answer.num_decoded.append(number)
    return answer


def next_segment(
    setup: Baseline, prompt_ids: list[int], template: tuple[list[int], list[int]], tokens: list[int]
) -> tuple[list[int], int]:
    """The best candidate for the segment after `tokens`, and how many were decoded."""
    candidates: list[tuple[float, list[int]]] = []
    nudge = None
    for number in range(1, setup.num_candidates + 1):
        new, options = decode(setup, prompt_ids, tokens, nudge)
        reward, inputs_TD = read(setup, [*template[0], *tokens, *new, *template[1]], number < setup.num_candidates)
        if any(new == other for _, other in candidates):
            break
        candidates.append((float(reward.detach()), new))
        if inputs_TD is not None:
            (gradient_TD,) = torch.autograd.grad(reward, inputs_TD)
            nudge = promising(setup, options, new[0], gradient_TD[len(template[0]) + len(tokens)])
    return max(candidates, key=lambda pair: pair[0])[1], number


@torch.inference_mode()
def decode(setup: Baseline, prompt_ids: list[int], tokens: list[int], nudge: int | None) -> tuple[list[int], list[int]]:
    """A segment up to an uncertain token or the end, and the likeliest tokens in its first place."""
    cache, new = DynamicCache(), list[int]()
    logits_V = forward(setup, [*prompt_ids, *tokens], cache)
    options: list[int] = logits_V.topk(setup.top_k).indices.tolist()
    while True:
        token = nudge if nudge is not None and not new else int(logits_V.argmax())
        is_last = len(tokens) + len(new) + 1 == setup.max_new_tokens
        if len(new) + 1 >= setup.min_segment and not is_last:
            law_V = torch.softmax(logits_V.double(), dim=-1)
            if float(torch.special.entr(law_V).sum()) >= setup.entropy_threshold:
                return new, options
        new.append(token)
        if is_last:
            return new, options
        logits_V = forward(setup, [token], cache)


def forward(setup: Baseline, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    """Logits `[V]` after further tokens."""
    inputs = torch.tensor([ids], device=setup.policy.device)
    logits_V: torch.Tensor = setup.policy(
        input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[0, -1]
    return logits_V


def read(setup: Baseline, ids: list[int], with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reward of a row, and the embeddings `[T, D]` to differentiate it by, if any."""
    with torch.set_grad_enabled(with_gradient):
        embedded_TD = setup.reward.get_input_embeddings()(torch.tensor(ids, device=setup.reward.device)).detach()
        embedded_TD.requires_grad_(with_gradient)
        reward: torch.Tensor = setup.reward(inputs_embeds=embedded_TD[None], use_cache=False).logits[0, 0]
    return reward, embedded_TD if with_gradient else None


def promising(setup: Baseline, options: list[int], current: int, gradient_D: torch.Tensor) -> int:
    """The option of the best first-order score `g . E_v`; the token that stands there has 0."""
    scores_K = setup.reward.get_input_embeddings().weight.detach()[options] @ gradient_D
    scores_K = torch.where(torch.tensor(options, device=scores_K.device) == current, 0.0, scores_K)
    return options[int(scores_K.argmax())]
