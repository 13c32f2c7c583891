"""Tokens of a policy's vocabulary that are no text: special tokens, and those that end a response."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of the tokens that `skip_special_tokens` leaves out of a text."""
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def end_tokens(policy: Policy, sampling: Sampling) -> frozenset[int]:
    """Token ids that end a response: the policy's, and stop strings that are special tokens."""
    special = special_tokens(policy.tokenizer)
    return policy.eos_token_ids | {special[stop] for stop in sampling.stop if stop in special}
