"""Dials of guided methods: the values that `budgets` names for a method, each a method of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iama.config.files import SAMPLES, DialValue, EvaluationConfig
from iama.config.methods import Method
from iama.config.specs import Sampling
from iama.errors import ConfigError
from iama.nearest import nearest
from inference.samplers.serve import at_dial, check_served, dial_of


@dataclass(frozen=True)
class Dial:
    """A guided method at several values of the settings that say how much it spends.

    `method` is the method as `methods` names it, `settings` what the dial sets, `values` the values as they are
    written, and `points` the method at each of them.
    """

    method: str
    settings: tuple[str, ...]
    values: tuple[str, ...]
    points: tuple[Method, ...]


def read_dials(config: EvaluationConfig, methods: Sequence[Method]) -> dict[str, Dial]:
    """The dials of a configuration, by method as it is written.

    Raises `ConfigError` for a key that names no method, or several, a method without a dial, a value that the method
    cannot have, the same value twice, and fewer than two values.
    """
    dials: dict[str, Dial] = {}
    for key, values in config.dials.items():
        method = _named(key, methods)
        if method.text in dials:
            raise ConfigError(f"budgets names {method.text!r} twice; write its values under one key")
        dials[method.text] = _dial(key, method, values, config.sampling)
    points = [point.text for dial in dials.values() for point in dial.points]
    twice = [text for text in points if points.count(text) > 1 or text in {m.text for m in methods}]
    if twice:
        raise ConfigError(f"methods and budgets name {twice[0]!r} twice; write it once")
    return dials


def with_dials(methods: Sequence[Method], dials: Mapping[str, Dial]) -> tuple[Method, ...]:
    """Methods with each dial's points in the place of its method."""
    return tuple(point for m in methods for point in (dials[m.text].points if m.text in dials else (m,)))


def _named(key: str, methods: Sequence[Method]) -> Method:
    """The method of a key, by its text or else by its name; a guided one before others of its name."""
    found = [m for m in methods if m.text == key] or [m for m in methods if m.is_guided and m.name == key]
    found = found or [m for m in methods if m.name == key][:1]
    if len(found) > 1:
        raise ConfigError(
            f"budgets.{key} may stand for {' or '.join(repr(m.text) for m in found)}; write the method as it stands"
        )
    if not found:
        known = [m.text for m in methods if m.is_guided]
        hint = nearest(key, [SAMPLES, *known], "keys")
        raise ConfigError(f"budgets.{key} names no method of `methods`; {hint}")
    if found[0].is_guided:
        return found[0]
    remedy = (
        f"write its numbers under budgets.{SAMPLES}" if found[0].is_curve else "list it at each number in `methods`"
    )
    raise ConfigError(f"budgets.{key}: {key!r} has no dial, it takes its answers from a pool; {remedy}")


def _dial(key: str, method: Method, values: Sequence[DialValue], sampling: Sampling) -> Dial:
    points = []
    for value in values:
        try:
            point = at_dial(method, value)
            check_served(point, sampling)
        except ConfigError as error:
            raise ConfigError(f"budgets.{key}: {error}") from error
        points.append(point)
    texts = [str(value) for value in values]
    twice = [text for i, text in enumerate(texts) if points[i] in points[:i]]
    if twice:
        raise ConfigError(f"budgets.{key} names {twice[0]} twice; write each value once")
    settings = dial_of(method)
    if len(points) < 2:
        example = f"{method.name}({', '.join(f'{name}=...' for name in settings)})"
        raise ConfigError(
            f"budgets.{key} = {list(values)} has fewer than two values, which give no curve; name more, or write one "
            f"as a method, {example}"
        )
    return Dial(method.text, settings, tuple(texts), tuple(points))
