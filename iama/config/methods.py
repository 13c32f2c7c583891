"""Methods that serve a policy, as people write them: `bon(4)`, `itp(8, 0.1)`, `cards(target=1.5)`, `bon(tuned)`.

`parse_method` reads a text once, where it enters: at `inference.serve`, in `iama generate`, in the plan of an
evaluation. What comes after works with a `Method`; its text stays the key of tables and journals.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from iama.calls import Call, read_call
from iama.errors import ConfigError
from iama.nearest import meant
from iama.objective.operators import OPERATORS
from iama.reading import parse_yaml

CURVES = ("bon", "bop")
"""Methods that an evaluation measures at every budget, from one pool."""
STOP = "stop"
"""The curve that an evaluation adds to `bon`: Best-of-N with stopping, tuned on other prompts."""
AT_EVERY_BUDGET = (*CURVES, STOP)
"""Methods that have a value and a cost at every budget."""
OPERATOR_EXAMPLES = "identity, bon(4), bop(3), bop_zt(4), lstat(0, 0.5, 0.5), soft_bon(4, temperature=0.1)"

TUNABLE = {"bon": "n", "bop": "mu", "bop_zt": "lam", "soft_bon": "temperature", "itp": "beta"}
"""Methods whose number `iama tune` finds, and the name of that number."""
FIXED_DRAWS = {"soft_bon": "ranks=1", "itp": "batches=1"}
"""Those whose number of draws is given beforehand; they weigh the ranks of these draws, which they write so."""
CAPPED = ("bop", "bop_zt")
"""Those that may be served with a latency cap, which tuning does not look at."""


class Tunable(NamedTuple):
    """What is tuned: a method's name, and its number of draws where that is not the number to find."""

    name: str
    num_draws: int | None


class Form(NamedTuple):
    """How a method that is no operator is written: an example of its settings, and which may stand without a key."""

    kind: Literal["rule", "guided"]
    example: str = ""
    places: tuple[str, ...] = ()


STOPPING = {"stop", "width"}
"""Settings of `bon` that stops early."""
STOPPED = Form("rule", "64, stop=pandora(0.05), width=4", ("n",))


@dataclass(frozen=True)
class Method:
    """A method that was read. Two are equal if they are written alike.

    `kind`: a curve (measured at every budget), an operator, a rule that keeps one of its draws, Best-of-N that stops
    early, or a guided method, which asks the reward while it writes. `settings` are those of the last three; which keys
    a method has is checked where it is served. `tunable` and `cap` belong to a method that leaves its number to a
    tuning file.
    """

    text: str
    kind: Literal["curve", "operator", "rule", "stopped", "guided"] = field(compare=False)
    call: Call = field(compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tunable: Tunable | None = field(default=None, compare=False)
    cap: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What stands before the brackets."""
        return self.call.name

    @property
    def is_curve(self) -> bool:
        """Whether it stands for one operator a budget."""
        return self.kind == "curve"

    @property
    def is_guided(self) -> bool:
        """Whether it writes its own answers, and takes none from a pool."""
        return self.kind == "guided"

    @property
    def is_stopped(self) -> bool:
        """Whether a stopping rule may end its draws early."""
        return self.kind == "stopped"

    @property
    def is_tuned(self) -> bool:
        """Whether its number stands in a file of `iama tune`."""
        return self.tunable is not None

    def with_target(self, target: float) -> Method:
        """A guided method with its `target` set, in the first place; the `quantile` that it was taken at is dropped."""
        return self.with_settings({"target": f"{target:.6g}"}, drop=("quantile",))

    def with_settings(self, words: Mapping[str, str], drop: Collection[str] = ()) -> Method:
        """A guided method with some settings set, as they are written, in the first places."""
        given = {key: value for key, value in self.settings.items() if key not in {*words, *drop}}
        written = {**words, **{key: "null" if value is None else str(value) for key, value in given.items()}}
        text = f"{self.name}({', '.join(f'{key}={word}' for key, word in written.items())})"
        settings = {key: parse_yaml(word) for key, word in words.items()} | given
        return Method(text, self.kind, read_call(text), settings)

    def with_cap(self, cap: int) -> Method:
        """An operator of `CAPPED` with a latency cap, in the last place."""
        arguments = (*self.call.arguments, ("cap", str(cap)))
        words = [value if key is None else f"{key}={value}" for key, value in arguments]
        text = f"{self.name}({', '.join(words)})"
        return Method(text, self.kind, Call(text, self.name, arguments))


def parse_method(text: str, forms: Mapping[str, Form]) -> Method:
    """Read a method; `forms` are the rules and guided methods that there are, by name.

    `path/to/file.py:Class(key=value)` is a guided method of somebody's own. Raises `ConfigError` for a name that is
    not known, for what is no setting, and where `tuned` stands for a number that no tuning file has.
    """
    call = read_call(text)
    if text in CURVES:
        return Method(text, "curve", call)
    tunable, form = _tunable(call), _form(call, forms)
    kind = "operator" if form is None else form.kind
    if tunable is not None:
        return Method(text, kind, call, tunable=tunable, cap=_cap(call))
    _check_stopping(call)
    if call.name == "bon" and STOPPING & {key for key, _ in call.arguments}:
        return Method(text, "stopped", call, read_settings(call, STOPPED, f"method {text!r}"))
    return Method(text, kind, call, {} if form is None else read_settings(call, form, f"method {text!r}"))


def _check_stopping(call: Call) -> None:
    """Raise `ConfigError` for a stopping rule of another method than Best-of-N, or one without its key."""
    given = [f"{key}={value}" for key, value in call.arguments if key in STOPPING]
    if call.name == "bon":
        rules = [value for key, value in call.arguments if key is None and "(" in value]
        if rules:
            raise ConfigError(f"method {call.text!r}: a stopping rule has its key; write stop={rules[0]}")
    elif call.name in OPERATORS and given:
        number = next((value for _, value in call.arguments[:1] if _is_whole(value)), "64")
        written = ", ".join([number, *given])
        raise ConfigError(f"method {call.text!r}: stop and width belong to Best-of-N; write bon({written})")


def _form(call: Call, forms: Mapping[str, Form]) -> Form | None:
    """How a method is written; None for an operator."""
    if call.name in OPERATORS:
        return None
    if ":" in call.name:
        return Form("guided")
    if call.name not in forms:
        _check_brackets(call.text)
        guided = [f"{name}({form.example})" for name, form in forms.items() if form.kind == "guided"]
        rules = [f"{name}({form.example})" for name, form in forms.items() if form.kind == "rule"]
        rules.append(f"bon({STOPPED.example})")
        known = ", ".join([OPERATOR_EXAMPLES, *guided, *rules])
        hint = meant(call.name, [*OPERATORS, *forms, *CURVES], call.text)
        raise ConfigError(
            f"method {call.text!r} is not known; {hint}write one of {known}, or path/to/file.py:ClassName"
        )
    return forms[call.name]


def _check_brackets(text: str) -> None:
    """Raise `ConfigError` for a text whose brackets do not close, which may be half of a method."""
    opened, closed = text.count("("), text.count(")")
    if opened == closed:
        return
    found = f"{opened} opening and {closed} closing brackets"
    lacking = ")" * (opened - closed)
    remedy = f"write {text + lacking!r}" if lacking else "drop what closes too much"
    raise ConfigError(
        f"method {text!r} has {found}; {remedy}, or put the whole method into quotes where it stands in a list, since "
        f'a comma ends an item there, e.g. methods: [bon, "bon({STOPPED.example})"]'
    )


def read_settings(call: Call, form: Form, source: str) -> dict[str, Any]:
    """Values of `key=value`, or of one of the first places without its key; values are YAML.

    Raises `ConfigError`, which names the source, for what is neither.
    """
    settings: dict[str, Any] = {}
    for i, (written, value) in enumerate(call.arguments):
        key = form.places[i] if written is None and i < len(form.places) else written
        if not (key and value):
            piece = value if written is None else f"{written}={value}"
            raise ConfigError(f"{source}: {piece!r} is no setting; {_remedy(call.name, form)}")
        if key in settings:
            raise ConfigError(f"{source} sets {key!r} twice; write it once")
        try:
            settings[key] = parse_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {key} = {value!r} is no number, word or null") from error
    return settings


def _remedy(name: str, form: Form) -> str:
    first, *others = (piece.strip() for piece in form.example.split(","))
    if not form.places:
        return f"write key=value, e.g. {name}({first or 'key=value'})"
    number = len(form.places)
    last = [first, *others][number - 1].rpartition("=")[2]
    example = ", ".join([*[first, *others][: number - 1], f"{form.places[-1]}={last}"])
    return f"write at most {number} by place, then key=value, e.g. {name}({example})"


# Numbers that a tuning file has. ------------------------------------------------------------------------


def read_tunable(text: str) -> Tunable:
    """What is to be tuned, as `iama tune --method` takes it: `bon`, `soft_bon(16)`.

    Raises `ConfigError` for anything else.
    """
    call = read_call(text)
    values = [value if key is None else "?" for key, value in call.arguments]
    return _checked(text, call.name, ", ".join(values) or None)


def written_tuned(tunable: Tunable) -> str:
    """A tunable as evaluations name it: `bon(tuned)`, `soft_bon(16, tuned)`."""
    name, num_draws = tunable
    return f"{name}(tuned)" if num_draws is None else f"{name}({num_draws}, tuned)"


def find_tunable(text: str) -> Tunable | None:
    """What a method such as `bon(tuned)` or `soft_bon(16, tuned)` leaves to a tuning file; None for any other method.

    Settings may have their keys: `bon(n=tuned)`. Raises `ConfigError` for a method that has no such number, or is not
    written like these.
    """
    return _tunable(read_call(text))


def _is_whole(text: str) -> bool:
    """Whether a text is a whole number that can be read, as one of thousands of digits cannot."""
    return text.isdecimal() and len(text) < 10


def _checked(text: str, name: str, number: str | None) -> Tunable:
    fits = name in TUNABLE and (name in FIXED_DRAWS) == (number is not None)
    if not fits or (number is not None and not (_is_whole(number) and int(number) >= 2)):
        near = "" if name in TUNABLE else meant(name, TUNABLE, text)
        raise ConfigError(
            f"method {text!r} cannot be tuned; {near}write bon, bop, bop_zt, soft_bon(16) or itp(16) (16 draws, at "
            "least 2)"
        )
    return Tunable(name, None if number is None else int(number))


def _tunable(call: Call) -> Tunable | None:
    if "tuned" not in [value for _, value in call.arguments]:
        return None
    tunable = _without_tuned(call)
    if tunable is None:
        raise ConfigError(
            f"method {call.text!r}: no file of `iama tune` has such a number; write bon(tuned), bop(tuned), "
            "bop_zt(tuned), soft_bon(16, tuned), itp(16, tuned) or bop(tuned, cap=64)"
        )
    return tunable


def _without_tuned(call: Call) -> Tunable | None:
    """What is tuned; None where another setting than its own number is tuned, or one is set that may not be."""
    name = call.name
    places = (*(("n",) if name in FIXED_DRAWS else ()), TUNABLE.get(name, ""))
    named = [(key or "".join(places[i : i + 1]), value) for i, (key, value) in enumerate(call.arguments)]
    if len({key for key, _ in named}) < len(named):
        return None
    law = FIXED_DRAWS.get(name)
    settings = {key: value for key, value in named if f"{key}={value}" != law}  # which is how they are served anyway
    if settings.pop(places[-1], None) != "tuned":
        return None
    number = settings.pop("n", None)
    if name in CAPPED and _is_whole(settings.get("cap", "")) and int(settings["cap"]) > 0:
        del settings["cap"]
    if settings:
        return None
    try:
        return _checked(call.text, name, number)
    except ConfigError:
        return None


def _cap(call: Call) -> int | None:
    """The latency cap of a method such as `bop(tuned, cap=64)`."""
    return next((int(value) for key, value in call.arguments if key == "cap"), None)
