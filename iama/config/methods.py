"""Methods that serve a policy, as people write them: an operator, a rule of selection, or a guided method."""

from __future__ import annotations

import re
from typing import Any

import yaml

from iama.config.schema import parse_yaml
from iama.errors import ConfigError
from iama.objective.operators import OPERATORS

GUIDED = {
    "cards": "target=1.5",
    "rejection": "target=1.5",
    "args": "top_k=10",
    "ggro": "num_candidates=8",
    "sea": "num_steps=50",
}
"""Methods that are no operators, since the reward guides them while they write; each with a setting as an example."""
SELECTIONS = {"itp": ("n", "beta"), "mbr": ("n", "weight")}
"""Methods that keep one of their draws but are no operators, with the settings that may be written by place."""
EXAMPLES = (
    "identity, bon(4), bop(3), bop_zt(4), soft_bon(4, temperature=0.1), "
    "cards(target=1.5, entropy_threshold=2), rejection(target=1.5), args(top_k=10), ggro(num_candidates=8), "
    "sea(num_steps=50), itp(8, 0.1), mbr(8, 0.5)"
)

TUNABLE = {"bon": "n", "bop": "mu", "bop_zt": "lam", "soft_bon": "temperature", "itp": "beta"}
"""Methods whose number `iama tune` finds, and the name of that number."""
FIXED_DRAWS = {"soft_bon": "ranks=1", "itp": "batches=1"}
"""Those whose number of draws is given beforehand; they weigh the ranks of these draws, which they write so."""

CAPPED = ("bop", "bop_zt")
"""Those that may be served with a latency cap, which tuning does not look at."""


def read_family(text: str) -> tuple[str, int | None]:
    """What is to be tuned: a method's name, and the number of draws where that is given, as in `soft_bon(16)`.

    Raises `ConfigError` for anything else.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*", text)
    name, number = match.groups() if match else ("", None)
    if name not in TUNABLE or (name in FIXED_DRAWS) != (number is not None) or (number is not None and int(number) < 2):
        raise ConfigError(
            f"method {text!r} cannot be tuned; write bon, bop, bop_zt, soft_bon(16) or itp(16) (16 draws, at least 2)"
        )
    return name, None if number is None else int(number)


def tuned_family(method: str) -> tuple[str, int | None] | None:
    """What a method such as `bon(tuned)` or `soft_bon(16, tuned)` leaves to a tuning file; None for any other method.

    Settings may have their keys: `bon(n=tuned)`. Raises `ConfigError` for a method that has no such number, or is not
    written like these.
    """
    name, inside = _parts(method)
    parts = [part.rpartition("=") for part in inside.split(",")]
    given = [(key.strip(), value.strip()) for key, _, value in parts]
    if "tuned" not in [value for _, value in given]:
        return None
    try:
        return read_family(_without_tuned(name, given))
    except ConfigError as error:
        raise ConfigError(
            f"method {method!r}: no file of `iama tune` has such a number; write bon(tuned), bop(tuned), "
            "bop_zt(tuned), soft_bon(16, tuned), itp(16, tuned) or bop(tuned, cap=64)"
        ) from error


def tuned_cap(method: str) -> int | None:
    """The latency cap of a method such as `bop(tuned, cap=64)`, which `tuned_family` has read."""
    found = re.search(r"\bcap\s*=\s*(\d+)", method)
    return None if found is None else int(found[1])


def _without_tuned(name: str, given: list[tuple[str, str]]) -> str:
    """The family as `read_family` has it; raises `ConfigError` where another setting than its own number is tuned."""
    law = FIXED_DRAWS.get(name)
    places = ("n",) * (law is not None) + (TUNABLE.get(name, ""),)
    named = [(key or "".join(places[i : i + 1]), value) for i, (key, value) in enumerate(given)]
    settings = {key: value for key, value in named if f"{key}={value}" != law}  # which is how they are served anyway
    if settings.pop(places[-1], None) != "tuned" or len({key for key, _ in named}) < len(named):
        raise ConfigError(f"{name} has no setting that is tuned in this place")
    number = settings.pop("n", None)
    if name in CAPPED and re.fullmatch("[1-9][0-9]*", settings.get("cap", "")):
        del settings["cap"]
    if settings:
        raise ConfigError(f"{', '.join(settings)} cannot be set beside it")
    return name if number is None else f"{name}({number})"


def parse_guided(method: str) -> tuple[str | None, dict[str, Any]]:
    """Name and settings of a method such as `cards(target=1.5)`; the name is None for an operator and for a selection.

    Values are YAML; which keys a method has is checked where it is served. Raises `ConfigError` for what is neither.
    """
    name, inside = _parts(method)
    if name in OPERATORS or name in SELECTIONS:
        return None, {}
    if name not in GUIDED:
        raise ConfigError(f"method {method!r} is not known; write one of {EXAMPLES}")
    return name, _settings(method, inside, f"write key=value, e.g. {name}({GUIDED[name]})")


def parse_selection(method: str) -> tuple[str, dict[str, Any]] | None:
    """Name and settings of a selection such as `itp(8, 0.1, batches=1)`; None for any other method.

    The first settings may be written by place. Raises `ConfigError` for what is no setting.
    """
    name, inside = _parts(method)
    if name not in SELECTIONS:
        return None
    places = SELECTIONS[name]
    example = f"write at most {len(places)} by place, then key=value, e.g. {name}(8, {places[1]}=0.1)"
    return name, _settings(method, inside, example, places)


def _parts(method: str) -> tuple[str, str]:
    """A method's name (empty for what is not written like one) and what stands in its brackets."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", method)
    return (match[1], match[2] or "") if match else ("", "")


def _settings(method: str, inside: str, remedy: str, places: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values of `key=value`, or of one of the first `places` without its key."""
    settings: dict[str, Any] = {}
    for i, part in enumerate(filter(None, map(str.strip, inside.split(",")))):
        key, equals, value = map(str.strip, part.partition("="))
        if not equals and i < len(places):
            key, value = places[i], part
        if not (key and value):
            raise ConfigError(f"method {method!r}: {part!r} is no setting; {remedy}")
        if key in settings:
            raise ConfigError(f"method {method!r} sets {key!r} twice; write it once")
        try:
            settings[key] = parse_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"method {method!r}: {key} = {value!r} is no number, word or null") from error
    return settings


def written_with_target(method: str, target: float) -> str:
    """A guided method with its target, as people write it."""
    name, settings = parse_guided(method)
    given = {key: "null" if value is None else value for key, value in settings.items() if key != "target"}
    written = ", ".join(f"{key}={value}" for key, value in {"target": f"{target:.6g}", **given}.items())
    return f"{name}({written})"
