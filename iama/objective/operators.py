"""Operators: what training knows of a sampler, and how the configuration writes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from iama.calls import Call, read_call
from iama.errors import ConfigError
from iama.nearest import meant, nearest
from iama.objective.entropic import Entropic, entropic
from iama.objective.order_operators import LStatistic, lstat
from iama.objective.rank_operators import RankOperator, bon, bop, bop_zt, identity, series
from iama.objective.soft_operators import SoftBestOfN, Tilt, soft_bon, tilt

__all__ = [
    "Entropic",
    "LStatistic",
    "Operator",
    "RankOperator",
    "SoftBestOfN",
    "Tilt",
    "bon",
    "bop",
    "bop_zt",
    "entropic",
    "identity",
    "lstat",
    "parse_operator",
    "series",
    "served_instead",
    "soft_bon",
    "tilt",
]

Operator = RankOperator | LStatistic | SoftBestOfN | Tilt | Entropic
OPERATORS: dict[str, Callable[..., Operator]] = {
    "identity": identity,
    "bon": bon,
    "bop": bop,
    "bop_zt": bop_zt,
    "soft_bon": soft_bon,
    "tilt": tilt,
    "series": series,
    "lstat": lstat,
    "entropic": entropic,
}
EXAMPLES = (
    "identity, bon(4), bop(3), bop_zt(4), soft_bon(4, 0.1), tilt(0.1, cap=1), series(0, 1), lstat(0, 1, 0), entropic(2)"
)
_FLAT = 1e-6  # an entropic value below is the mean to rounding
SERVED_ONLY = {
    "itp": "bon(k) with the same mean quantile, e.g. bon(4) for itp(16, 0.02) or bon(3) for itp(8, 0.1)",
    "mbr": "bon(n), the same choice without the texts",
}
"""Ways to serve that are no operators, and what to train in their place."""


def parse_operator(text: str) -> Operator:
    """Read an operator as the configuration writes it, e.g. `bon(4)`, `bop(mu=3)` or `tilt(0.1, cap=1.5)`.

    Raises `ConfigError` naming the text and what can be written.
    """
    return operator_of(read_call(text))


def served_instead(operator: Operator) -> str:
    """The method, as `iama generate --method` takes it, that stands nearest to an operator which no sampler serves."""
    if isinstance(operator, Tilt):
        return soft_bon(16, operator.temperature).name
    if isinstance(operator, Entropic) and operator.beta > _FLAT:
        return soft_bon(16, 1 / operator.beta).name
    if isinstance(operator, RankOperator):
        return bon(operator.smallest_group).name
    return "single"  # it weighs the worst, which no choice among draws does


def operator_of(call: Call) -> Operator:
    """The operator of a call that was read; raises what `parse_operator` raises."""
    text, name = call.text, call.name
    if name in SERVED_ONLY:
        raise ConfigError(f"operator {text!r} is a way to serve, not one to train for; write {SERVED_ONLY[name]}")
    if name not in OPERATORS:
        raise ConfigError(f"operator {text!r} is not known; {meant(name, OPERATORS, text)}write one of {EXAMPLES}")
    kept = [value if key is None else f"{key}={value}" for key, value in call.arguments if key not in ("stop", "width")]
    if len(kept) < len(call.arguments):
        raise ConfigError(
            f"operator {text!r}: stop and width are ways to serve bon(n), not to train; write {name}({', '.join(kept)})"
        )
    try:
        arguments = _arguments(OPERATORS[name], call)
        return OPERATORS[name](*arguments.args, **arguments.kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise ConfigError(f"operator {shown!r}: {error}; write it like {EXAMPLES}") from error


def written_arguments(call: Call) -> dict[str, object]:
    """The arguments of an operator's call by name, defaults included: what tells whether two calls are the same."""
    bound = _arguments(OPERATORS[call.name], call)
    bound.apply_defaults()
    return dict(bound.arguments)


def _arguments(build: Callable[..., Operator], call: Call) -> inspect.BoundArguments:
    """The arguments as numbers, bound to the operator's signature, whose annotations say which are whole."""
    positional = [value for key, value in call.arguments if key is None]
    keywords = {key: value for key, value in call.arguments if key is not None}
    signature = inspect.signature(build)
    unknown = next((key for key in keywords if key not in signature.parameters), None)
    if unknown is not None:
        takes = nearest(unknown, signature.parameters, "it takes")
        known = takes if signature.parameters else "it takes nothing"
        raise ConfigError(f"operator {call.text[:80]!r}: {call.name} has no {unknown!r}; {known}")
    bound = signature.bind(*positional, **keywords)
    for name, value in bound.arguments.items():
        read = _READERS.get(str(signature.parameters[name].annotation), _real)
        bound.arguments[name] = tuple(map(read, value)) if isinstance(value, tuple) else read(value)
    return bound


def _flag(text: str) -> bool:
    if text.strip() not in ("0", "1"):
        raise ValueError(f"{text.strip()!r} is neither 0 nor 1")
    return text.strip() == "1"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text.strip()[:20]!r} is not a whole number in digits that can be read") from error


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text.strip()[:20]!r} is no number") from error


_READERS: dict[str, Callable[[str], float]] = {"int": _whole, "int | None": _whole, "bool": _flag}
