"""Whether a tokenizer and a chat template fit their model: what roll-outs and rewards read, looked at before a run.

Findings are pairs of words: what is wrong, and what to do. Each says whether the damage is sure.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from iama.prompts.render import Prompt, prompt_text

PROBE_CHARACTERS = 400
ANSWER = "word"
"""What the assistant says in the probe that looks for the end of a turn."""


@dataclass(frozen=True)
class Finding:
    """Something wrong: whether it is sure to spoil a run, what it is, and what to do."""

    is_fatal: bool
    detail: str
    remedy: str


def round_trip(tokenizer: Any, prompt: Prompt) -> Finding | None:
    """A text must come back from its tokens, but for spaces around it."""
    text = prompt_text(prompt)[:PROBE_CHARACTERS].strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        number = ids.count(tokenizer.unk_token_id)
        return Finding(
            False, f"{number} of {len(ids)} tokens of the first prompt are unknown", "is it the model's own?"
        )
    back = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if back == text:
        return None
    place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), 0)
    detail = f"the first prompt comes back changed: {text[place : place + 20]!r} as {back[place : place + 20]!r}"
    return Finding(False, detail, "is it the model's own, and meant for such text?")


def begin(tokenizer: Any, prompt: Prompt, ids: Sequence[int]) -> Finding | None:
    """Exactly one BOS, if the tokenizer has one and uses it; where it opens each turn, never two together."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return None
    remedy = "mend its chat_template.jinja, or the tokenizer's add_bos_token"
    if list(ids[:2]) == [bos, bos]:
        return Finding(True, f"a prompt begins with {tokenizer.bos_token!r} twice", remedy)
    if _opens_turns(tokenizer, prompt):
        return None
    if bos in ids[1:]:
        return Finding(False, f"{tokenizer.bos_token!r} also stands inside a prompt", remedy)
    if ids[:1] != [bos] and bos in tokenizer("a")["input_ids"][:1]:
        return Finding(False, f"texts begin with {tokenizer.bos_token!r}, but rendered prompts do not", remedy)
    return None


def _opens_turns(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether the template writes BOS before each role, as in ChatML with `<|im_start|>` for BOS."""
    if isinstance(prompt, str):
        return False
    written = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": ANSWER}], tokenize=False)
    return all(f"{tokenizer.bos_token}{message['role']}" in written for message in prompt)


def end(tokenizer: Any, stop_ids: Set[int], *, is_chat: bool) -> Finding | None:
    """Something must end a response; in a chat, what ends the assistant's turn must be among it."""
    if not stop_ids:
        return Finding(True, "no end token is known, so every roll-out is cut", "set the tokenizer's eos_token")
    if not is_chat:
        return None
    token = end_of_turn(tokenizer)
    if token is None:
        remedy = "check that the model ends its answers, or set policy.chat_template"
        return Finding(False, "the chat template ends the assistant's turn without a special token", remedy)
    if token in stop_ids:
        return None
    name = tokenizer.convert_ids_to_tokens(token)
    known = ", ".join(sorted(repr(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids))
    return Finding(
        True,
        f"the chat template ends a turn with {name!r}, but generation ends at {known} only",
        f"add {token} to eos_token_id in the model's generation_config.json, or make {name!r} the eos_token",
    )


def end_of_turn(tokenizer: Any) -> int | None:
    """The first special token that the chat template puts after an assistant's text; None if there is none."""
    exchange = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
    rendered = tokenizer.apply_chat_template(exchange, tokenize=False)
    tail = rendered.rpartition(ANSWER)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in special and i != tokenizer.unk_token_id), None)
