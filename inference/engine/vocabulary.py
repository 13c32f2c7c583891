"""Tokens of a vocabulary that are no text, and whether a policy and a reward have one vocabulary."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from iama.config.specs import Sampling
from iama.errors import ConfigError
from iama.rewards.reward import Reward
from inference.engine.policy import AnyPolicy, Policy

INSTEAD = "use method cards or bon instead"
NUM_SHOWN = 3


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of the tokens that `skip_special_tokens` leaves out of a text."""
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def end_tokens(policy: AnyPolicy, sampling: Sampling) -> frozenset[int]:
    """Token ids that end a response: the policy's, and stop strings that are special tokens."""
    special = special_tokens(policy.tokenizer)
    return policy.eos_token_ids | {special[stop] for stop in sampling.stop if stop in special}


def check_shared_vocabulary(policy: Policy, reward: Reward, method: str) -> None:
    """Raise `ConfigError` unless the reward is a classifier whose token ids mean what the policy's mean.

    An id that only one of the two tokenizers has must be a special token, such as padding that was added; an id of
    both that names different texts may be only where both are special and neither ends a response.
    """
    classifier = reward.classifier
    if classifier is None or classifier.pair:
        kind = "an ensemble, not one classifier" if reward.members else "no classifier"
        kind = kind if classifier is None else "a classifier of pairs of texts"
        raise ConfigError(
            f"{method} needs the gradient of a reward, and {reward.name!r} is {kind}; {instead_of(method)}"
        )
    side = policy_side(policy.name, policy.tokenizer, policy.eos_token_ids)
    check_same_ids(side, reward_side(classifier.source, classifier.path, classifier.tokenizer), method)


def instead_of(method: str) -> str:
    """What else to use where a method cannot have its gradient."""
    other = {"ggro": "ggro(score=exact)", "blockwise": "blockwise(first=distinct)"}.get(method)
    return INSTEAD if other is None else INSTEAD.replace("use", f"use {other}, or")


@dataclass(frozen=True)
class Side:
    """A model's tokenizer, its end tokens, and what errors call it."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    ends: Set[int | None]


def policy_side(name: str, tokenizer: PreTrainedTokenizerBase, ends: Set[int]) -> Side:
    """A policy's, with all tokens that end its responses."""
    return Side(f"policy {name!r}", tokenizer, ends)


def reward_side(source: str, path: str, tokenizer: PreTrainedTokenizerBase) -> Side:
    """A classifier's."""
    return Side(f"{source} ({path!r})", tokenizer, {tokenizer.eos_token_id})


def check_same_ids(policy: Side, reward: Side, method: str) -> None:
    """`check_shared_vocabulary` of tokenizers alone."""
    sides = (policy, reward)
    texts = [{index: token for token, index in side.tokenizer.get_vocab().items()} for side in sides]
    special = [set(special_tokens(side.tokenizer).values()) for side in sides]
    ends = {*policy.ends, *reward.ends}

    def agrees(index: int) -> bool:
        text, other = (side.get(index) for side in texts)
        if text == other:
            return True
        if text is not None and other is not None:
            return index not in ends and all(index in side for side in special)
        return index in special[0 if other is None else 1]

    differing = [index for index in sorted(texts[0].keys() | texts[1].keys()) if not agrees(index)]
    if differing:
        shown = ", ".join(f"{i} ({texts[0].get(i)!r} and {texts[1].get(i)!r})" for i in differing[:NUM_SHOWN])
        raise ConfigError(
            f"{method} needs one vocabulary, but {policy.name} and {reward.name} differ in {len(differing)} token ids, "
            f"e.g. {shown}; {instead_of(method)}"
        )
