"""Tokens that were forwarded, and those that must be: both counted beside the ledger, from what the models are fed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from iama.prompts.render import Message, prompt_text
from iama.rewards.reward import Reward
from inference.samplers.base import Completion


@dataclass
class Fed:
    """Input ids of every forward of a model."""

    pad_id: int
    inputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens, padding excluded; no text of the bench holds the padding token."""
        return sum(int((ids != self.pad_id).sum()) for ids in self.inputs)

    @property
    def num_places(self) -> int:
        """Tokens and padding."""
        return sum(ids.numel() for ids in self.inputs)


@contextmanager
def watched(model: Any) -> Iterator[Fed]:
    """Note what a model is fed."""
    fed = Fed(model.config.pad_token_id)

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        fed.inputs.append(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


Scored = dict[str, list[tuple[str, float]]]  # a prompt's texts with their rewards, in order


@contextmanager
def recorded(reward: Reward) -> Iterator[Scored]:
    """Note which texts are scored, and their rewards."""
    scored: Scored = defaultdict(list)
    finish = reward.finish

    def note(prompts: Any, completions: Any, scores: list[float]) -> list[float]:
        rewards = finish(prompts, completions, scores)
        for prompt, text, value in zip(prompts, completions, rewards, strict=True):
            scored[prompt_text(prompt)].append((text, value))
        return rewards

    reward.finish = note  # type: ignore[method-assign]
    try:
        yield scored
    finally:
        del reward.finish


def policy_necessary(tokenizer: Any, prompts: Sequence[list[Message]], completions: Sequence[Completion]) -> int:
    """Policy tokens that must be forwarded: prompts once, and each proposed token once."""
    num_prompt = sum(
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        for prompt in prompts
    )
    trace = [segment for completion in completions for segment in completion.trace]
    return num_prompt + sum(segment.num_tokens + segment.wasted_tokens for segment in trace)


def reward_necessary(
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    completions: Sequence[Completion],
    scored: Mapping[str, Sequence[tuple[str, float]]],
) -> int:
    """Reward tokens that must be forwarded: prompts once, then each proposal's own text and the template's suffix.

    A proposal's own text is what it adds to the length of the answer that was accepted before it. For one proposal
    at a time.
    """
    total = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        texts = list(scored[prompt_text(prompt)])
        assert texts.pop(0)[0] == "", "the prompt's own reward comes first"
        before = num_read(tokenizer, prompt, "")
        total += before
        for segment in completion.trace:
            drawn, texts = texts[: segment.num_proposals], texts[segment.num_proposals :]
            suffix = num_suffix(tokenizer, prompt, drawn[0][0])
            total += sum(num_read(tokenizer, prompt, text) - before + suffix for text, _ in drawn)
            kept = max(drawn, key=lambda pair: pair[1]) if segment.forced else drawn[-1]
            before = num_read(tokenizer, prompt, kept[0])
        assert not texts
        assert kept[0] == completion.text
    return total


def num_read(tokenizer: Any, prompt: list[Message], text: str) -> int:
    """Tokens of a prompt with its answer, template included."""
    exchange = [*prompt, {"role": "assistant", "content": text}]
    return len(tokenizer.apply_chat_template(exchange, return_dict=True)["input_ids"])


def num_suffix(tokenizer: Any, prompt: list[Message], text: str) -> int:
    """Tokens that the template puts after an answer."""
    exchange = [*prompt, {"role": "assistant", "content": text}]
    written = tokenizer.apply_chat_template(exchange, tokenize=False)
    suffix = written[written.rindex(text) + len(text) :]
    return len(tokenizer(suffix, add_special_tokens=False)["input_ids"])
