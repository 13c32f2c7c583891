"""Whether a chat template writes every conversation as it must, before anything runs.

Each kind is tried with long words of ours, and each prompt with its own. A kind is the roles of the messages, in their
order, with the fields that they have besides.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Hashable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from iama.errors import IamaWarning, ModelError
from iama.prompts.render import (
    POLICY_TEMPLATE,
    REWARD_TEMPLATE,
    Message,
    Prompt,
    need_template,
    prompt_text,
    render_prompt,
)

if TYPE_CHECKING:  # not at start-up
    from transformers import PreTrainedTokenizerBase

LONG = " ".join(f"word{number}" for number in range(300))
"""Ends the words that a template is tried with: it may cut long ones."""
ANSWER = f"theanswer {LONG}"
"""What the assistant says where a template is tried."""
THINKS = re.compile(r"<think(ing)?>\s*(</think(ing)?>)?\s*$")
"""What a generation prompt may open, or leave out, that a finished answer does not show."""
TAKEN_OUT = re.compile(r"^.*</think(?:ing)?>|/(?:no_)?think\b|/system_override\b", re.DOTALL)
"""What templates rightly take out of a message: earlier thoughts, and switches of thinking."""
REWRITTEN = ("tool", "function", "ipython")
"""Roles whose contents templates may write as JSON."""


def check_exchanges(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], source: str, checked: set[Any] | None = None
) -> None:
    """Raise `ModelError` for the first prompt that a reward model's template refuses or loses a message of.

    Kinds and prompts in `checked` are passed over, and new ones are put there; it is for prompts that come in pieces,
    whose numbers say nothing.
    """
    has_numbers, checked = checked is None, set() if checked is None else checked
    for number, prompt, messages in _first_of_kinds(prompts, checked):
        where = f"{source}: {_named(number if has_numbers else None, prompt)}"
        need_template(tokenizer, where, REWARD_TEMPLATE)
        written = _written(tokenizer, [*messages, _answer()], where, add_generation_prompt=False)
        _refuse_lost(tokenizer, [*messages, _answer()], written, where)
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            continue
        key = blake2b(repr(prompt).encode(), digest_size=16).digest()  # nobody's words are kept
        if key in checked:
            continue
        where = f"{source}: {_named(number if has_numbers else None, prompt)}"
        _refuse_changed(tokenizer, prompt, [*prompt, _answer()], where, add_generation_prompt=False)
        checked.add(key)  # not of a prompt that was refused


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    ends: Collection[int],
    source: str,
    checked: set[Any] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts that a policy continues, `ends` being the tokens that end its responses.

    Kinds in `checked` are not tried again, and new ones are put there; it is for prompts that come one by one.

    Raises `ModelError` for the first prompt that the template refuses, loses a message of or does not end where an
    answer begins, and for one that ends with an end token. Warns where a finished answer does not begin as it was asked
    for.
    """
    for number, prompt, messages in _first_of_kinds(prompts, set() if checked is None else checked):
        where = f"{source}: {_named(number, prompt)}"
        need_template(tokenizer, where, POLICY_TEMPLATE)
        _check_generation_prompt(tokenizer, messages, where)
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            where = f"{source}: {_named(number, prompt)}"
            _refuse_changed(tokenizer, prompt, prompt, where, add_generation_prompt=True)
    rows = [render_prompt(tokenizer, prompt) for prompt in prompts]
    for number, (prompt, ids) in enumerate(zip(prompts, rows, strict=True), start=1):
        if ids and ids[-1] in ends and _is_special(tokenizer, ids[-1]):
            raise ModelError(f"{source}: {_named(number, prompt)} {_ends_itself(tokenizer, prompt, ids[-1])}")
    return rows


def _is_special(tokenizer: Any, token_id: int) -> bool:
    """Whether a token is no word: where a word ends responses, prompts may end with it."""
    return token_id in tokenizer.all_special_ids or token_id in tokenizer.get_added_vocab().values()


def _first_of_kinds(prompts: Sequence[Prompt], checked: set[Any]) -> Iterator[tuple[int, Prompt, list[Message]]]:
    """Of every kind of conversation the first, numbered, and its messages with a word in the place of each content."""
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            continue
        kind: Hashable = tuple((message["role"], *sorted(message)) for message in prompt)
        if kind not in checked:
            words = [f"message{place}. {LONG}" if message["content"] else "" for place, message in enumerate(prompt)]
            messages = [{**message, "content": word} for message, word in zip(prompt, words, strict=True)]
            yield number, prompt, messages
            checked.add(kind)  # not of a prompt that was refused


def _named(number: int | None, prompt: Prompt) -> str:
    text = repr(prompt_text(prompt)[:60])
    return f"the prompt {text}" if number is None else f"prompt {number} ({text})"


def _answer() -> Message:
    return {"role": "assistant", "content": ANSWER}


def _written(tokenizer: Any, messages: list[Message], where: str, *, add_generation_prompt: bool) -> str:
    """The text that a template makes of messages."""
    try:
        written: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{where}: the chat template of {tokenizer.name_or_path!r} is not valid Jinja "
            f"(line {error.lineno}: {' '.join(str(error.message).split())}); mend that line"
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        if _reads_lists(tokenizer, messages):
            raise ModelError(f"{where}: {_wants_lists(tokenizer)}") from error
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"{where}: the chat template of {tokenizer.name_or_path!r} refuses messages with the roles {roles} "
            f"({' '.join(str(error).split())}); use messages that it knows, or another chat template"
        ) from error
    return written


def _refuse_lost(tokenizer: Any, messages: list[Message], written: str, where: str) -> None:
    shown = (message for message in messages if "tool_calls" not in message)  # whose content may be passed over
    lost = next((message for message in shown if message["content"] not in written), None)
    if lost is None:
        return
    if _reads_lists(tokenizer, messages):
        raise ModelError(f"{where}: {_wants_lists(tokenizer)}")
    what = "the answer" if lost["content"] == ANSWER else f"the message of the role {lost['role']!r}"
    how = "cuts" if lost["content"].split()[0] in written else "leaves out"
    raise ModelError(_told_of_loss(tokenizer, where, f"{how} {what}"))


def _refuse_changed(
    tokenizer: Any, prompt: list[Message], messages: list[Message], where: str, *, add_generation_prompt: bool
) -> None:
    """Refuse what a template does to a prompt by its own words; `messages` are those of the prompt, and an answer."""
    written = _written(tokenizer, messages, where, add_generation_prompt=add_generation_prompt)
    for message in prompt:
        if message["role"] in REWRITTEN or "tool_calls" in message:
            continue
        if not all(part.strip() in written for part in TAKEN_OUT.split(message["content"])):
            what = f"leaves out, or changes, words of the message of the role {message['role']!r}"
            raise ModelError(_told_of_loss(tokenizer, where, what))


def _told_of_loss(tokenizer: Any, where: str, what: str) -> str:
    return (
        f"{where}: the chat template of {tokenizer.name_or_path!r} {what}; mend the template, or write prompts that it "
        "shows whole"
    )


def _wants_lists(tokenizer: Any) -> str:
    return (
        f"the chat template of {tokenizer.name_or_path!r} reads contents as lists of parts, and loses those that are "
        "texts; give it a template that writes message['content'] as it is"
    )


def _reads_lists(tokenizer: Any, messages: list[Message]) -> bool:
    """Whether the template shows contents that are lists of parts, as those of models of images do."""
    listed = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        written = tokenizer.apply_chat_template(listed, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError):
        return False
    return all(message["content"] in written for message in messages) and not re.search("['\"]type['\"]", written)


def _check_generation_prompt(tokenizer: Any, messages: list[Message], where: str) -> None:
    """An answer must go on where its prompt ends."""
    asked = _written(tokenizer, messages, where, add_generation_prompt=True)
    _refuse_lost(tokenizer, messages, asked, where)
    whole = [*messages, _answer()]
    finished = _written(tokenizer, whole, where, add_generation_prompt=False)
    _refuse_lost(tokenizer, whole, finished, where)
    begun = asked if finished.startswith(asked) else THINKS.sub("", asked)
    if not finished.startswith(begun):
        warnings.warn(
            f"{where}: the chat template of {tokenizer.name_or_path!r} ends a prompt with {asked[-30:]!r}, but does "
            "not begin an answer so; its `add_generation_prompt` should write what stands before an assistant's words",
            IamaWarning,
            stacklevel=1,
        )
        return
    between = finished[len(begun) : finished.rindex(ANSWER)].strip()
    if between and asked == _written(tokenizer, messages, where, add_generation_prompt=False):
        raise ModelError(
            f"{where}: the chat template of {tokenizer.name_or_path!r} has no generation prompt, so the policy would "
            f"answer before {between!r}; add {{% if add_generation_prompt %}}{between}{{% endif %}} to its end"
        )


def _ends_itself(tokenizer: Any, prompt: Prompt, end: int) -> str:
    """Why a prompt's last token is one that ends a response, and what to do."""
    name = tokenizer.convert_ids_to_tokens(end)
    told = f"ends with {name!r}, which ends a response, so that the policy would go on behind its end"
    if not isinstance(prompt, str):
        return f"{told}; mend the generation prompt of its chat template"
    if tokenizer("a")["input_ids"][-1:] == [end]:
        return (
            f"{told}; the tokenizer puts it behind every text: take it out of post_processor in tokenizer.json, and "
            "set add_eos_token: false in tokenizer_config.json"
        )
    return f"{told}; leave it out of the prompt"
