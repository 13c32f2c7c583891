"""Errors that a user can mend, each told in one line: the value, where it came from, what to write instead.

Values come from files, flags and servers, so no message is shown before `without_secrets` has read it.
"""

import os
import re

_ADDRESS = re.compile(r"(?<=://)[^\s'\"<>]+")
_IN_QUERY = re.compile(
    r"(?i)([?&#][\w-]*(?:key|token|secret|password|passwd|pwd|signature|sig|credential|auth)=)"
    r"[^&\s'\"<>]*[^&\s'\"<>.,:;)\]}]"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
_SECRET_NAME = re.compile(r"(?i)(^|_)(API_?KEYS?|KEYS?|TOKENS?|SECRETS?|\w*PASSWORD|PASSWD|PASS|CREDENTIALS?)\d*$")
SHORTEST_SECRET = 8
"""Characters of a variable's value that is taken for a secret; shorter ones occur in words."""


def without_secrets(text: str) -> str:
    """The text without logins and keys in addresses, and without what a variable such as `HF_TOKEN` holds."""
    text = _BEARER.sub(r"\1***", _IN_QUERY.sub(r"\1***", _ADDRESS.sub(_without_login, text)))
    for name, value in os.environ.items():
        if not _SECRET_NAME.search(name):
            continue
        for secret in (value.strip(), *re.split(r"[\s,]+", value)):  # a variable may hold several keys
            if len(secret) >= SHORTEST_SECRET and secret in text:
                text = text.replace(secret, f"${name}")
    return text


def _without_login(address: re.Match[str]) -> str:
    _, at, rest = address[0].rpartition("@")
    return f"***@{rest}" if at else rest


class IamaError(ValueError):
    """Base of every error caused by input; the command line prints it without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class ConfigError(IamaError):
    """A configuration file, flag or override that cannot be used."""


class ModelError(IamaError):
    """A model, tokenizer or adapter directory that cannot be loaded."""


class DataError(IamaError):
    """Prompts that are missing, malformed or do not fit the model."""


class RewardError(IamaError):
    """A reward that cannot be loaded or that returned something unusable."""


class TooLongError(RewardError):
    """A prompt that has, with its answer, more tokens than the reward reads."""


class RunError(IamaError):
    """A run directory that is in the way, incomplete or damaged."""


class IamaWarning(UserWarning):
    """Something configured is not used, or is used in a way that may surprise."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))
