"""One renderer for training, generation and evaluation: prompts and answers to token ids.

A prompt has one of TRL's two formats: a text, or a list of messages. Texts are tokenized as they are, messages
go through the tokenizer's chat template; each yields exactly the ids that TRL's trainers feed to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from iama.errors import ModelError

if TYPE_CHECKING:  # not at start-up
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[Message]
NAME_LENGTH = 60
"""Characters of a prompt that stand in a message."""

POLICY_TEMPLATE = "set policy.chat_template to a .jinja file"
REWARD_TEMPLATE = "put a chat_template.jinja into that directory, or set `pair: true` for a model of pairs"


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids that the policy continues.

    Raises `ModelError` for messages when the tokenizer has no chat template, or one that refuses them.
    """
    if isinstance(prompt, str):
        return _ids(tokenizer(prompt))
    need_template(tokenizer, "the policy", POLICY_TEMPLATE)
    return _chat_ids(tokenizer, prompt, add_generation_prompt=True)


def render_exchange(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> list[int]:
    """Token ids of prompt and answer as a reward model reads them (TRL's RewardTrainer's format).

    Messages go through the reward model's own chat template; a text is followed by the end-of-sequence token.
    """
    if isinstance(prompt, str):
        return _ids(tokenizer(prompt + text + (tokenizer.eos_token or "")))
    need_template(tokenizer, "the reward", REWARD_TEMPLATE)
    exchange = [*prompt, {"role": "assistant", "content": text}]
    return _chat_ids(tokenizer, exchange, add_generation_prompt=False)


def render_exchanges(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[list[int]]:
    """`render_exchange` of many, tokenized together, which is quicker; the ids and errors are the same."""
    from transformers import PreTrainedTokenizerBase

    is_known = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template  # which takes many
    if not is_known or not prompts or not all(isinstance(prompt, list) for prompt in prompts):
        return [render_exchange(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    need_template(tokenizer, "the reward", REWARD_TEMPLATE)
    exchanges = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, texts, strict=True)]
    try:
        together = tokenizer.apply_chat_template(exchanges, add_generation_prompt=False, return_dict=True)
    except TemplateError:  # which exchange it is tells the one that fails alone
        return [render_exchange(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    rows: list[list[int]] = together["input_ids"]
    return rows


def render_pair(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> tuple[list[int], list[int] | None]:
    """Token ids of prompt and answer as the tokenizer's pair of texts, and the tokens' types where it knows types."""
    encoding = tokenizer(prompt_text(prompt), text)
    return _ids(encoding), encoding.get("token_type_ids")


def as_completion(prompt: Prompt, text: str) -> str | list[Message]:
    """The shape in which TRL hands a completion to reward functions."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def completion_text(completion: str | list[Message]) -> str:
    """The text of a completion in either shape."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people to read."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def prompt_name(prompt: Prompt) -> str:
    """A prompt in a message: what the user asked last, quoted, and where that is long its two ends."""
    if not isinstance(prompt, str):
        asked = [message for message in prompt if message["role"] == "user"] or prompt
        prompt = asked[-1]["content"]
    half = NAME_LENGTH // 2
    return repr(prompt if len(prompt) <= NAME_LENGTH else f"{prompt[:half]} ... {prompt[-half:]}")


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
    try:
        return _ids(
            tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)
        )
    except TemplateError as error:  # some know no system role, or want user and assistant to take turns
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} refuses messages with the roles {roles} ({reason}), "
            f"such as the prompt {prompt_name(messages)}; use messages that it knows, or another chat template"
        ) from error


def _ids(encoding: Any) -> list[int]:
    ids: list[int] = encoding["input_ids"]
    return ids


def need_template(tokenizer: PreTrainedTokenizerBase, where: str, remedy: str) -> None:
    """Raise `ModelError`, which begins with `where`, if messages cannot be rendered."""
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{where}: the prompt is a list of messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
            f"template; {remedy}, or use text prompts"
        )
