"""Methods that serve a policy, as people write them: an operator, or a guided method with its settings."""

from __future__ import annotations

import re
from typing import Any

import yaml

from iama.errors import ConfigError
from iama.operators import OPERATORS
from iama.schema import parse_yaml

GUIDED = {
    "cards": "target=1.5",
    "rejection": "target=1.5",
    "args": "top_k=10",
    "ggro": "num_candidates=8",
    "sea": "num_steps=50",
}
"""Methods that are no operators, since the reward guides them while they write; each with a setting as an example."""
EXAMPLES = (
    "identity, bon(4), bop(3), bop_zt(4), soft_bon(4, temperature=0.1), "
    "cards(target=1.5, entropy_threshold=2), rejection(target=1.5), args(top_k=10), ggro(num_candidates=8), "
    "sea(num_steps=50)"
)


def parse_guided(method: str) -> tuple[str | None, dict[str, Any]]:
    """Name and settings of a method such as `cards(target=1.5)`; the name is None for an operator.

    Values are YAML; which keys a method has is checked where it is served. Raises `ConfigError` for what is neither.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", method)
    name, inside = match.groups() if match else ("", None)
    if name in OPERATORS:
        return None, {}
    if name not in GUIDED:
        raise ConfigError(f"method {method!r} is not known; write one of {EXAMPLES}")
    settings: dict[str, Any] = {}
    for part in filter(None, map(str.strip, (inside or "").split(","))):
        key, _, value = map(str.strip, part.partition("="))
        if not (key and value):
            example = f"{name}({GUIDED[name]})"
            raise ConfigError(f"method {method!r}: {part!r} is no setting; write key=value, e.g. {example}")
        if key in settings:
            raise ConfigError(f"method {method!r} sets {key!r} twice; write it once")
        try:
            settings[key] = parse_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"method {method!r}: {key} = {value!r} is no number, word or null") from error
    return name, settings


def written_with_target(method: str, target: float) -> str:
    """A guided method with its target, as people write it."""
    name, settings = parse_guided(method)
    given = {key: "null" if value is None else value for key, value in settings.items() if key != "target"}
    written = ", ".join(f"{key}={value}" for key, value in {"target": f"{target:.6g}", **given}.items())
    return f"{name}({written})"
