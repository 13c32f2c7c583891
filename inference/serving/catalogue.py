"""What a server serves, by the names that clients use: `iama/harmless:bon(4)`, and what a request may change of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iama.config.methods import Method
from iama.config.serving import Hacking
from iama.config.specs import Sampling
from iama.errors import ConfigError, IamaError
from iama.nearest import meant
from iama.objective.operators import operator_of
from inference.samplers.serve import (
    check_served,
    most_draws,
    needs_target,
    quantile_of,
    read_method,
    served_of,
    with_threshold,
)
from inference.serving.refusals import RefusedError

SINGLE = "single"
NUM_NAMED = 12
"""Names that a refusal lists at most."""
MAX_METHOD = 200
"""Characters of a method that a client writes."""
MAX_NUMBER = 10_000
"""Largest number in it: an operator of millions of draws takes seconds to read."""
BUDGETS = {"bon": "n", "soft_bon": "n", "itp": "n", "mbr": "n", "bop": "mu"}
"""Methods whose number of samples a client may set, and the name of the number that says it."""
HACKED = ("bon", "bop", "bop_zt")
"""Methods that push the proxy as hard as the curves of an evaluation do."""
_NUMBER = re.compile(r"\d[\d_.]*(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Model:
    """One name: a policy, a criterion (None: a sample that no reward looks at), and a method as it is written.

    `method` is complete: it has its number and target.
    """

    policy: str
    criterion: str | None
    written: str
    method: Method

    @property
    def id(self) -> str:
        """The name."""
        return (
            f"{self.policy}:{self.written}"
            if self.criterion is None
            else f"{self.policy}/{self.criterion}:{self.written}"
        )


@dataclass(frozen=True)
class Bound:
    """Most samples of an answer, and why; `is_measured` by an evaluation, else by the configuration."""

    most: int
    reason: str
    is_measured: bool


@dataclass(frozen=True)
class Catalogue:
    """Every model by its id, and what is known of policies and criteria.

    `rewards` holds those of unguided samples by policy and criterion, where they were measured; `bounds` likewise.
    """

    models: Mapping[str, Model]
    samplings: Mapping[str, Sampling]
    rewards: Mapping[tuple[str, str], Sequence[float]] = field(default_factory=dict)
    bounds: Mapping[tuple[str, str], Sequence[Bound]] = field(default_factory=dict)
    hacking: Hacking = "refuse"
    max_budget: int = 64

    @property
    def policies(self) -> list[str]:
        """Names of the policies."""
        return list(self.samplings)

    def criteria(self, policy: str) -> list[str]:
        """Names of the criteria that a policy serves."""
        return list(dict.fromkeys(m.criterion for m in self.models.values() if m.policy == policy and m.criterion))

    def methods(self, policy: str, criterion: str) -> list[Model]:
        """The models of a policy and criterion, in the order of the configuration."""
        return [m for m in self.models.values() if (m.policy, m.criterion) == (policy, criterion)]

    def pick(
        self, name: str, criterion: str | None = None, method: str | None = None, budget: int | None = None
    ) -> Model:
        """The model of a name, with what a request changes of it.

        A name may leave out its method, which is then the criterion's first (without a criterion a single sample), and
        its criterion. Raises `RefusedError`: 404 for a name, 400 for a change.
        """
        policy, named_criterion, named_method = self._parts(name)
        chosen = named_criterion if criterion is None else criterion
        if criterion is not None:
            self._check_criterion(policy, criterion, "iama.criterion", 400)
        if method is not None:
            model = self._changed(policy, chosen, method, "iama.method", 400)
        elif named_method is not None:
            model = self._changed(policy, chosen, named_method, "model", 404)
        elif chosen is None:
            model = self.models[f"{policy}:{SINGLE}"]
        else:
            model = self.methods(policy, chosen)[0]
        return self._bounded(model if budget is None else self._at(model, budget))

    def _parts(self, name: str) -> tuple[str, str | None, str | None]:
        head, colon, method = name.partition(":")
        policy, slash, criterion = head.partition("/")
        if policy not in self.samplings:
            raise self._unknown(name)
        if slash:
            self._check_criterion(policy, criterion, "model", 404)
        return policy, criterion if slash else None, method if colon else None

    def _check_criterion(self, policy: str, criterion: str, param: str, status: int) -> None:
        known = self.criteria(policy)
        if criterion not in known:
            choices = f"choose {_listed(known)}" if known else "no criterion is served here"
            raise RefusedError(
                status, f"{param}: {_shown(criterion)} is no criterion of {policy!r}; {choices}", param, _code(status)
            )

    def _unknown(self, name: str) -> RefusedError:
        short = name if len(name) <= MAX_METHOD else ""
        return RefusedError(
            404,
            f"The model {_shown(name)} does not exist here; {meant(short, [*self.policies, *self.models])}GET "
            f"/v1/models lists {_listed(self.models)}",
            "model",
            "model_not_found",
        )

    def _changed(self, policy: str, criterion: str | None, text: str, param: str, status: int) -> Model:
        """The model with another method: one that is served, or an operator of a family that is."""
        plain = "".join(text.split())
        if plain in (SINGLE, "identity"):
            return Model(policy, criterion, SINGLE, read_method("identity"))
        if criterion is None:
            known = self.criteria(policy)
            told = f"choose a criterion for it: {_listed(known)}" if known else "no criterion is served here"
            kind = "selects by a reward" if plain else "is no method"
            raise RefusedError(status, f"{param}: {_shown(text)} {kind}; {told}", param, _code(status))
        served = self.methods(policy, criterion)
        for model in served:
            if "".join(model.written.split()) == plain:
                return model
        alike = [model for model in served if model.method.name == plain]
        if len(alike) == 1:  # its settings need not be repeated
            return alike[0]
        method = self._read(text, param, status, served)
        return Model(policy, criterion, method.text, self._complete(method, policy, criterion, param))

    def _read(self, text: str, param: str, status: int, served: Sequence[Model]) -> Method:
        """A method that a client has written; nothing is read that runs code, or takes long."""
        choices = f"choose {_listed([model.written for model in served])}, or another number of samples of one of these"
        refusal = RefusedError(status, f"{param}: {_shown(text)} is not served here; {choices}", param, _code(status))
        if len(text) > MAX_METHOD or any(_size(number) > MAX_NUMBER for number in _NUMBER.findall(text)):
            raise refusal
        try:
            method = read_method(text)
        except IamaError as error:
            raise refusal from error
        families = {(model.method.kind, model.method.name) for model in served}
        is_known = (method.kind, method.name) in families and method.kind in ("operator", "stopped", "rule")
        if not is_known or method.is_tuned or "utility" in method.settings:
            raise refusal
        try:
            check_served(method, Sampling())
        except IamaError as error:
            raise RefusedError(400, f"{param}: {error}", param, "invalid_method") from error
        return method

    def _complete(self, method: Method, policy: str, criterion: str, param: str) -> Method:
        sampling, rewards = self.samplings[policy], self.rewards.get((policy, criterion))
        if not needs_target(method, sampling):
            return method
        if rewards is None:
            raise RefusedError(
                400, f"{param}: {method.text!r} needs a measured reward; write its number", param, "invalid_method"
            )
        return completed(method, rewards, sampling)

    def _at(self, model: Model, budget: int) -> Model:
        """The model with another number of samples."""
        try:
            method = with_budget(model.method, budget)
            if method is None:
                raise RefusedError(
                    400,
                    f"iama.budget: {model.written!r} has no number of samples to set; leave it out, or choose "
                    + ("iama.criterion and iama.method" if model.criterion is None else "iama.method"),
                    "iama.budget",
                    "invalid_budget",
                )
            check_served(method, Sampling())
        except IamaError as error:
            raise RefusedError(400, f"iama.budget: {error}", "iama.budget", "invalid_budget") from error
        return Model(model.policy, model.criterion, method.text, method)

    def _bounded(self, model: Model) -> Model:
        """The model, refused or capped where it would draw more samples than is good."""
        number = budget_of(model.method)
        if model.id in self.models or number is None:
            return model
        if number > self.max_budget:
            raise RefusedError(
                400,
                f"{number:g} samples an answer are more than the {self.max_budget} that are served; ask for fewer",
                "iama.budget",
                "budget_too_large",
            )
        if model.criterion is None or self.hacking == "allow":
            return model
        bound = bound_of(self.bounds.get((model.policy, model.criterion), ()), model.method)
        if bound is None or number <= bound.most:
            return model
        capped = capped_at(model.method, bound.most) if self.hacking == "cap" else None
        if capped is None:
            raise RefusedError(
                400,
                f"{number:g} samples an answer are too many: {bound.reason}; ask for at most {bound.most}",
                "iama.budget",
                "budget_hacks",
            )
        return Model(model.policy, model.criterion, capped.text, capped)


def bound_of(bounds: Sequence[Bound], method: Method) -> Bound | None:
    """The tightest bound that holds for a method: a measured one only where it pushes as the measured curve does."""
    fitting = [bound for bound in bounds if not bound.is_measured or method.name in HACKED]
    return min(fitting, key=lambda bound: bound.most, default=None)


def budget_of(method: Method) -> float | None:
    """Samples that an answer draws on average, at most where it may stop early; None for a guided method."""
    if method.is_guided:
        return None
    if method.is_stopped:
        return float(most_draws(method))
    if method.kind == "rule":
        budget = served_of(method).budget
        return None if budget is None else float(budget)
    return operator_of(method.call).budget


def capped_at(method: Method, most: int) -> Method | None:
    """A method with so many samples; None where it cannot have that number."""
    try:
        return with_budget(method, most)
    except ConfigError:
        return None


def with_budget(method: Method, number: int) -> Method | None:
    """A method with another number of samples, or fewer; None where it has none to set, `single` too.

    Raises `ConfigError` where the number does not fit its other settings.
    """
    name = BUDGETS.get(method.name)
    if name is None:
        return None
    value = str(number - 1 if method.name == "bop" else number)
    if method.name == "itp" and str(method.settings.get("batches", 2)) == "2":  # two batches, and a last draw
        if number < 3:
            raise ConfigError(f"method {method.text!r} draws at least 3 samples, not {number}; ask for more")
        value = str((number - 1) // 2)
    pairs = list(method.call.arguments)
    place = next((i for i, (key, _) in enumerate(pairs) if key == name), None)
    place = next((i for i, (key, _) in enumerate(pairs[:1]) if key is None), None) if place is None else place
    if place is None:
        raise ConfigError(f"method {method.text!r} names no {name}; write it first")
    pairs[place] = (pairs[place][0], value)
    # A round is no wider than all draws.
    pairs = [(key, value if key == "width" and _size(word) > number else word) for key, word in pairs]
    written = ", ".join(word if key is None else f"{key}={word}" for key, word in pairs)
    return read_method(f"{method.name}({written})")


def completed(method: Method, rewards: Sequence[float], sampling: Sampling) -> Method:
    """A method that lacks a target or threshold, with that of these rewards of unguided samples."""
    if not needs_target(method, sampling):
        return method
    if method.is_stopped:
        return with_threshold(method, np.asarray(rewards))
    return method.with_target(float(np.quantile(rewards, quantile_of(method, sampling))))


def _size(number: str) -> float:
    try:
        return float(number)
    except ValueError:
        return 0.0


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
    return ", ".join(listed[:NUM_NAMED]) + more


def _code(status: int) -> str:
    return "model_not_found" if status == 404 else "invalid_value"
