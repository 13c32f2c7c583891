"""The body of a request: every field that OpenAI has is read, refused by its name, or has a value without effect."""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from iama.config.serving import Limits
from iama.config.specs import Sampling
from iama.prompts.render import Message, Prompt
from inference.samplers.serve import draws
from inference.serving.catalogue import SINGLE, Catalogue, Model
from inference.serving.refusals import RefusedError

Route = Literal["chat", "completions"]
Body: TypeAlias = Mapping[str, Any]
MAX_SEED = 2**63 - 1
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and as what they are read."""

SHARED = {
    "model", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop", "seed",
    "stream", "stream_options", "logprobs", "user", "safety_identifier", "prompt_cache_key", "iama",
}  # fmt: skip
LABELS = ("user", "safety_identifier", "prompt_cache_key")
"""Texts by which a client names whom an answer is for; no answer depends on them."""
FIELDS: dict[Route, set[str]] = {
    "chat": {*SHARED, "messages", "max_completion_tokens", "top_logprobs"},
    "completions": {*SHARED, "prompt"},
}
EXTRAS = {"criterion", "method", "budget", "seed", "return_candidates", "events"}
"""Fields of `iama`."""
MEANINGLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "no tools are called here"),
    "tool_choice": (("none", "auto"), "no tools are called here"),
    "parallel_tool_calls": ((True, False), "no tools are called here"),
    "functions": (([],), "no functions are called here"),
    "function_call": (("none", "auto"), "no functions are called here"),
    "response_format": (({"type": "text"},), "answers are plain text"),
    "logit_bias": (({},), "the law of the policy is served as it is"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "best_of": ((1,), "choose a criterion and a method such as bon(4)"),
    "echo": ((False,), "put prompt and answer together yourself"),
    "suffix": (("",), "answers go on from the prompt alone"),
    "modalities": ((["text"],), "answers are plain text"),
    "audio": ((), "answers are plain text"),
    "prediction": ((), "answers are not predicted"),
    "reasoning_effort": ((), "iama.budget sets how much is spent on an answer"),
    "verbosity": ((), "max_tokens bounds an answer"),
    "web_search_options": ((), "nothing is searched for"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "prompt_cache_options": (({},), "a prompt is read once for all its answers, and not kept"),
    "prompt_cache_retention": ((), "a prompt is read once for all its answers, and not kept"),
    "moderation": ((), "answers are not moderated"),
    "use_beam_search": ((False,), "answers are sampled"),
    "ignore_eos": ((False,), "an end token ends an answer"),
    "length_penalty": ((1,), "answers are sampled"),
}
"""Fields that are not supported: values that ask for nothing (null does, too), and what to know instead."""


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: `n` answers to each prompt, the i-th of all with `seed` + i."""

    route: Route
    model: Model
    prompts: tuple[Prompt, ...]
    n: int
    sampling: Sampling
    has_max_tokens: bool
    seed: int
    stream: bool = False
    include_usage: bool = False
    events: bool = False
    return_candidates: bool = False
    num_top: int | None = None
    """Likeliest tokens beside each token's log-probability; None: neither is asked for."""

    @property
    def num_choices(self) -> int:
        """Answers in all."""
        return self.n * len(self.prompts)


def read_body(body: Any, route: Route, catalogue: Catalogue, limits: Limits) -> Asked:
    """What a body asks for; raises `RefusedError`, which names the first field that cannot be had."""
    if not isinstance(body, dict):
        raise _refused('The body must be a JSON object, such as {"model": ..., ...}', None)
    _refuse_unknown(body, route)
    extras = _extras(body.get("iama"))
    model = catalogue.pick(_required(body, "model", _text), extras["criterion"], extras["method"], extras["budget"])
    prompts = _messages(body, limits) if route == "chat" else _prompts(body, limits)
    n = _given(body, "n", _whole(1, limits.n), 1)
    if n * len(prompts) > limits.n:
        raise _refused(f"n: {len(prompts)} prompts x {n} answers are more than {limits.n}; ask for fewer", "n")
    stream = _given(body, "stream", _flag, False)
    include_usage = _stream_options(body, stream)
    sampling, has_max_tokens = _sampling(body, route, catalogue.samplings[model.policy], model, limits)
    seed = extras["seed"] if extras["seed"] is not None else _given(body, "seed", _seed, None)
    for label in LABELS:
        _given(body, label, _text, None)
    if extras["events"] and not stream:
        raise _refused("iama.events: events are told in a stream; set stream: true", "iama.events")
    return Asked(
        route=route,
        model=model,
        prompts=prompts,
        n=n,
        sampling=sampling,
        has_max_tokens=has_max_tokens,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        stream=stream,
        include_usage=include_usage,
        events=bool(extras["events"]),
        return_candidates=bool(extras["return_candidates"]),
        num_top=_logprobs(body, route),
    )


def _refuse_unknown(body: Body, route: Route) -> None:
    known = FIELDS[route]
    for name, value in body.items():
        if name in known:
            continue
        if name in MEANINGLESS:
            fine, remedy = MEANINGLESS[name]
            if value is None or any(
                type(value) is type(v) and value == v for v in (*fine, *map(float, _numbers(fine)))
            ):
                continue
            raise _refused(f"{name} = {_shown(value)} is not supported; leave it out ({remedy})", name, "unsupported")
        raise _refused(
            f"{_shown(name)} is no field that is known here; {_hint(name, known)}", name[:80], "unknown_field"
        )


def _numbers(values: tuple[Any, ...]) -> list[int]:
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool)]


def _extras(value: Any) -> dict[str, Any]:
    """The fields of `iama`, None where they are not given."""
    given = {} if value is None else value
    if not isinstance(given, dict):
        raise _refused(f'iama: write an object, such as {{"criterion": ...}}, not {_shown(value)}', "iama")
    for name in given:
        if name not in EXTRAS:
            raise _refused(f"iama: {_shown(name)} is not known; {_hint(name, EXTRAS)}", "iama", "unknown_field")
    readers: dict[str, Callable[[Any, str], Any]] = {
        "criterion": _text,
        "method": _text,
        "budget": _whole(1, 10_000),
        "seed": _seed,
        "return_candidates": _flag,
        "events": _flag,
    }
    return {name: _given(given, name, reader, None, "iama.") for name, reader in readers.items()}


def _stream_options(body: Body, stream: bool) -> bool:
    """Whether the usage is wanted at the end of a stream."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _refused(f"stream_options: write an object, not {_shown(options)}", "stream_options")
    if not stream:
        raise _refused("stream_options: there is no stream; set stream: true, or leave it out", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise _refused(f"stream_options: {_shown(name)} is not known; write include_usage", "stream_options")
    if _given(options, "include_obfuscation", _flag, False, "stream_options."):
        raise _refused(
            "stream_options.include_obfuscation: streams are not padded here; leave it out", "stream_options"
        )
    include: bool = _given(options, "include_usage", _flag, False, "stream_options.")
    return include


def _logprobs(body: Body, route: Route) -> int | None:
    """How many of the likeliest tokens are wanted beside each token's log-probability; None: neither."""
    if route == "completions":
        number: int | None = None if body.get("logprobs") is False else _given(body, "logprobs", _whole(0, 5), None)
        return number
    number = _given(body, "top_logprobs", _whole(0, 20), None)
    if _given(body, "logprobs", _flag, False):
        return number or 0
    if number:
        raise _refused(f"top_logprobs = {number} are told with log-probabilities; set logprobs: true", "top_logprobs")
    return None


# Prompts. -------------------------------------------------------------------------------------------------------------


def _messages(body: Body, limits: Limits) -> tuple[Prompt, ...]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise _refused('messages: write a list of messages, such as [{"role": "user", "content": ...}]', "messages")
    if len(given) > limits.messages:
        raise _refused(f"messages: {len(given)} are more than {limits.messages}; send fewer", "messages")
    messages = [_message(message, f"messages.{i}") for i, message in enumerate(given)]
    _check_length(sum(len(message["content"]) for message in messages), "messages", limits)
    return (messages,)


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise _refused(f"{where}: write an object with role and content, not {_shown(given)}", where)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        why = " (no tools are called here)" if role in ("tool", "function") else ""
        raise _refused(f"{where}.role: {_shown(role)} is not known{why}; write {', '.join(ROLES)}", f"{where}.role")
    for name, value in given.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise _refused(f"{where}.{name[:40]} is not supported; leave it out", f"{where}.{name[:40]}", "unsupported")
    return {"role": ROLES[role], "content": _content(given.get("content"), f"{where}.content")}


def _content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise _refused(f"{where}: write a text, or a list of parts of the type text, not {_shown(given)}", where)
    texts = []
    for i, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = _shown(kind) if isinstance(part, dict) else _shown(part)
            raise _refused(f"{where}.{i}: {shown} is no text; policies here read text alone", where, "unsupported")
        extra = next((name for name in part if name not in ("type", "text")), None)
        if extra is not None or not isinstance(part.get("text"), str):
            raise _refused(f'{where}.{i}: write {{"type": "text", "text": ...}} and nothing else', where)
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(body: Body, limits: Limits) -> tuple[Prompt, ...]:
    given = body.get("prompt")
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _refused("prompt: write a text, or a list of texts; token ids are not read", "prompt")
    if any(not text for text in texts):
        raise _refused("prompt: an empty text has nothing to go on from; write something", "prompt")
    if len(texts) > limits.n:
        raise _refused(f"prompt: {len(texts)} texts are more than {limits.n}; send fewer", "prompt")
    _check_length(sum(map(len, texts)), "prompt", limits)
    return tuple(texts)


def _check_length(number: int, param: str, limits: Limits) -> None:
    if number > limits.prompt_characters:
        raise _refused(
            f"{param}: {number} characters are more than {limits.prompt_characters}; shorten the prompt",
            param,
            "prompt_too_long",
        )


# Sampling. ------------------------------------------------------------------------------------------------------------


def _sampling(body: Body, route: Route, default: Sampling, model: Model, limits: Limits) -> tuple[Sampling, bool]:
    """The sampling, and whether the request bounds the answer's length itself."""
    most = _given(body, "max_tokens", _whole(1, limits.max_tokens), None)
    if route == "chat":
        newer = _given(body, "max_completion_tokens", _whole(1, limits.max_tokens), None)
        if None not in (most, newer) and most != newer:
            raise _refused(
                f"max_tokens = {most} and max_completion_tokens = {newer} contradict each other; send one",
                "max_tokens",
            )
        most = newer if most is None else most
    given: dict[str, Any] = {
        "temperature": _given(body, "temperature", _number(0, 100), None),
        "top_p": _given(body, "top_p", _number(0, 1, above=True), None),
        "top_k": _given(body, "top_k", _whole(-1, 2**31), None),
        "min_p": _given(body, "min_p", _number(0, 1, below=True), None),
        "repetition_penalty": _given(body, "repetition_penalty", _number(0.01, 100), None),
        "stop": _stop(body.get("stop"), limits),
        "max_new_tokens": most,
    }
    if given["top_k"] == -1:
        given["top_k"] = 0
    if given["temperature"] is not None and given["temperature"] < 1e-3:
        if given["temperature"] > 0:
            raise _refused("temperature: write 0 (the likeliest token always), or at least 0.001", "temperature")
        _refuse_greedy("temperature", 0, default, model)
        given |= {"temperature": 1.0, "top_k": 1}
    elif given["top_k"] == 1:
        _refuse_greedy("top_k", 1, default, model)
    return default.model_copy(update={k: v for k, v in given.items() if v is not None}), most is not None


def _refuse_greedy(name: str, value: int, default: Sampling, model: Model) -> None:
    """Raise where the likeliest token always leaves nothing to choose among."""
    if model.written != SINGLE and draws(model.method, default):
        raise _refused(
            f"{name} = {value} draws one answer again and again, and {model.written} chooses among different ones; "
            f"raise it, or ask for {model.policy}:{SINGLE}",
            name,
        )


def _stop(given: Any, limits: Limits) -> tuple[str, ...] | None:
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _refused(f"stop: write a text, or a list of texts that are not empty, not {_shown(given)}", "stop")
    if len(texts) > limits.stop:
        raise _refused(f"stop: {len(texts)} texts are more than {limits.stop}; send fewer", "stop")
    if any(len(text) > limits.stop_characters for text in texts):
        raise _refused(f"stop: a text is longer than {limits.stop_characters} characters; shorten it", "stop")
    return tuple(texts)


# Values. --------------------------------------------------------------------------------------------------------------


def _given(body: Body, name: str, reader: Callable[[Any, str], Any], default: Any, prefix: str = "") -> Any:
    value = body.get(name)
    return default if value is None else reader(value, f"{prefix}{name}")


def _required(body: Body, name: str, reader: Callable[[Any, str], Any]) -> Any:
    if body.get(name) is None:
        raise _refused(f"{name} is missing; write it", name)
    return reader(body[name], name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _refused(f"{name}: write a text, not {_shown(value)}", name)
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(f"{name}: write true or false, not {_shown(value)}", name)
    return value


def _seed(value: Any, name: str) -> int:
    return _whole(-MAX_SEED - 1, MAX_SEED)(value, name)


def _whole(low: int, high: int) -> Callable[[Any, str], int]:
    def read(value: Any, name: str) -> int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and value.is_integer():
            value, is_whole = int(value), True
        if not is_whole or not low <= value <= high:
            raise _refused(f"{name}: write a whole number from {low} to {high}, not {_shown(value)}", name)
        return int(value)

    return read


def _number(low: float, high: float, *, above: bool = False, below: bool = False) -> Callable[[Any, str], float]:
    def read(value: Any, name: str) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (above and value == low) or (below and value == high):
            lower, upper = "above" if above else "from", "to below" if below else "to"
            raise _refused(f"{name}: write a number {lower} {low:g} {upper} {high:g}, not {_shown(value)}", name)
        return float(value)

    return read


def _refused(message: str, param: str | None, code: str = "invalid_value") -> RefusedError:
    return RefusedError(400, message, param, code)


def _shown(value: Any) -> str:
    """A value of the client's own in a message: short, and on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of too many digits"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value) if isinstance(value, (str, int, float)) else "a list" if isinstance(value, list) else "an object"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _hint(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "leave it out"
