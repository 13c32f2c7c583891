"""From a method as people write it to the sampler that serves it: what there is, by name, and how to add to it.

A sampler is a class that is made with `(policy, reward, settings, sampling, batch_size)` and answers prompts as
`Sampler` says. Its settings are a `Strict` model, whose fields are what people write: `toy(strength=2)`. A class in a
file of its own names that model as its attribute `Settings`, and is served as `path/to/toy.py:Toy(strength=2)`; one
that is known by a name stands in `SAMPLERS`. Some names mean something to those who serve it: settings with a field
`target` that is None are given a measured one (at the quantile of their field `quantile`), settings whose
`needs_gradient` is true need a reward that is a classifier with the policy's token ids, and settings that read files of
a policy and a reward check and hash them in a method `files_key`. A class attribute `dial` of the
settings names the fields that say how much is spent, for evaluations at several values of them
(`dial: ClassVar[tuple[str, ...]] = ("strength",)`).

A rule keeps one of a number of draws (`inference.selection.rules.Rule`); it stands in `RULES`. A stopping rule ends
the draws of Best-of-N early: `bon(64, stop=pandora(0.05), width=4)`; it stands in `inference.selection.stopping.STOPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import Field

from iama.arrays import Floats
from iama.calls import read_call
from iama.config.methods import Form, Method, parse_method, read_settings
from iama.config.schema import Strict, validate
from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError, RewardError
from iama.models.value_head import HeadRecord
from iama.objective.operators import (
    Entropic,
    LStatistic,
    Operator,
    RankOperator,
    operator_of,
    served_instead,
    written_arguments,
)
from iama.prompts.render import Prompt
from iama.rewards.function import load_function
from iama.rewards.reward import Reward
from inference.engine.policy import AnyPolicy, VllmPolicy
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.base import Sampler
from inference.samplers.best_of import SelectionSampler
from inference.samplers.blockwise import Blockwise, BlockwiseSettings
from inference.samplers.cards import (
    QUANTILE,
    Cards,
    CardsSettings,
    calibrate_target,
    calibration_rewards,
    rejection_settings,
)
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.redraw import Redraw, RedrawSettings
from inference.samplers.sea import Sea, SeaSettings
from inference.samplers.stopped import StoppedSampler
from inference.samplers.tilted import TiltedSettings, TiltedTokens
from inference.samplers.uncertainty import KEY, EntropyQuantile, calibrate_entropy, with_nats
from inference.selection.itp import ItpSettings, itp_rule
from inference.selection.lstat import lstat_rule
from inference.selection.mbr import MbrSettings, mbr_rule
from inference.selection.rules import Rule, Served
from inference.selection.stopping import (
    STOPS,
    BeaconSettings,
    Stopped,
    StopSettings,
    measured_threshold,
    needs_threshold,
    stop_text,
    stopped_text,
)
from inference.selection.stopping_beacon import check_horizon

CALIBRATION_BATCH = 256
S = TypeVar("S", bound=Strict)


class MakeSampler(Protocol):
    """A sampler's class, or a function in its place."""

    def __call__(self, policy: Any, reward: Reward, settings: Any, sampling: Sampling, batch_size: int, /) -> Sampler:
        """The sampler of a `Policy` (of those in `ON_VLLM` of a `VllmPolicy`, too).

        Raises `ConfigError` for a reward or settings that it cannot use.
        """
        ...


class GuidedEntry(NamedTuple):
    """A guided sampler: its settings, its class, an example of settings, and defaults that depend on the sampling.

    `places` are settings that may be written by their place.
    """

    settings: type[Strict]
    sampler: MakeSampler
    example: str = ""
    defaults: Callable[[Sampling], dict[str, Any]] | None = None
    places: tuple[str, ...] = ()


class RuleEntry(NamedTuple):
    """A rule that keeps one of its draws: its settings, what makes the rule of them, and an example of settings.

    Settings without a default may be written by their place.
    """

    settings: type[Strict]
    rule: Callable[[Any], Rule]
    example: str = ""


def _whole_responses(sampling: Sampling) -> dict[str, Any]:
    return rejection_settings(None, sampling.max_new_tokens).model_dump()


def _mbr(settings: MbrSettings) -> Rule:
    """The file of a `utility` is run."""
    utility: Any = None if settings.utility is None else load_function(settings.utility, "utility")
    return mbr_rule(settings, utility)


SAMPLERS: dict[str, GuidedEntry] = {
    "cards": GuidedEntry(CardsSettings, Cards, "target=1.5, entropy_threshold=2"),
    "rejection": GuidedEntry(CardsSettings, Cards, "target=1.5", _whole_responses),
    "args": GuidedEntry(ArgsSettings, Args, "top_k=10"),
    "ggro": GuidedEntry(GgroSettings, Ggro, "num_candidates=8"),
    "blockwise": GuidedEntry(BlockwiseSettings, Blockwise, "4, first=distinct", places=("m",)),
    "redraw": GuidedEntry(RedrawSettings, Redraw, "4, 8, 2", places=("n0", "rounds", "width")),
    "tilted_tokens": GuidedEntry(TiltedSettings, TiltedTokens, "2, head=runs/demo/value", places=("lam",)),
    "sea": GuidedEntry(SeaSettings, Sea, "num_steps=50"),
}
"""Guided samplers by the name of their method."""
ON_VLLM = ("cards", "rejection")
"""Those that run on vLLM, too."""
RULES: dict[str, RuleEntry] = {
    "itp": RuleEntry(ItpSettings, itp_rule, "8, 0.1"),
    "mbr": RuleEntry(MbrSettings, _mbr, "8, 0.5"),
}
"""Rules that keep one of their draws and are no operators, by the name of their method."""


def read_method(text: str) -> Method:
    """Read a method as people write it; raises `ConfigError` as `parse_method` does. Its settings are not checked."""
    forms = {name: Form("guided", entry.example, entry.places) for name, entry in SAMPLERS.items()}
    forms |= {name: Form("rule", entry.example, _required(entry.settings)) for name, entry in RULES.items()}
    return parse_method(text, forms)


def _required(settings: type[Strict]) -> tuple[str, ...]:
    return tuple(name for name, field in settings.model_fields.items() if field.is_required())


def serve(
    policy: AnyPolicy, reward: Reward | None, method: str | Method, sampling: Sampling, batch_size: int = 256
) -> Sampler:
    """The sampler of a method: an operator as the configuration and `iama.json` write it (`bon(4)`), one that stops
    early, a rule of `RULES`, a sampler of `SAMPLERS` with its settings, or `path/to/file.py:Class(...)`.

    Raises `ConfigError` as `read_method` and `check_served` do, for CARDS without a target and a stopping rule without
    a threshold, and for a reward whose gradient a method cannot use.
    """
    read = read_method(method) if isinstance(method, str) else method
    if isinstance(policy, VllmPolicy):
        check_vllm_serves(read, f"policy {policy.name!r}")
    if read.is_stopped:
        return StoppedSampler(policy, reward, stopped_of(read), sampling, batch_size)
    if not read.is_guided:
        return SelectionSampler(policy, reward, served_of(read), sampling, batch_size)
    entry = _entry(read)
    settings = _validated(read, entry, sampling)
    if reward is None:
        raise ConfigError(f"method {read.text!r} is guided by a reward; give one, or sample with method single")
    return entry.sampler(policy, reward, settings, sampling, batch_size)


def check_served(method: Method, sampling: Sampling) -> None:
    """Raise `ConfigError` for what cannot be served: settings that do not fit, a tilt, an entropic value, and
    weights of a series or an L-statistic that are no law.

    Loads no model. CARDS may lack its target, and a stopping rule its threshold.
    """
    if method.is_guided:
        settings_of(method, sampling)
    elif method.is_stopped:
        stop_settings(method)
    else:
        served_of(method)


def check_vllm_serves(method: Method, source: str) -> None:
    """Raise `ConfigError` for a method that steers the policy token by token."""
    if method.is_guided and method.name not in ON_VLLM:
        raise ConfigError(
            f"{source}: method {method.text!r} needs this package's own engine; write engine: transformers, or "
            f"{', '.join(ON_VLLM)} or a method that selects among whole samples, e.g. bon(8)"
        )
    threshold = method.settings.get(KEY)
    if method.is_guided and isinstance(threshold, str):
        raise ConfigError(
            f"{source}: method {method.text!r}: vLLM tells no entropies of which {threshold} could be taken; write nats"
        )


def settings_of(method: Method, sampling: Sampling) -> Any:
    """The settings of a guided method, a model of its own; a class in a file is loaded, which runs the file."""
    return _validated(method, _entry(method), sampling)


def _validated(method: Method, entry: GuidedEntry, sampling: Sampling) -> Strict:
    defaults = {} if entry.defaults is None else entry.defaults(sampling)
    return validate(defaults | dict(method.settings), entry.settings, f"method {method.text!r}")


def _entry(method: Method) -> GuidedEntry:
    if ":" not in method.name:
        return SAMPLERS[method.name]
    source, reference = f"method {method.text!r}", method.name
    try:
        loaded: Any = load_function(reference, source, "sampler", "ClassName")
    except RewardError as error:
        raise ConfigError(str(error)) from error
    settings = getattr(loaded, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Strict) and hasattr(loaded, "sample")):
        raise ConfigError(
            f"{source}: {reference!r} is no sampler; write a class with `Settings`, a model of its settings that "
            "derives from iama.config.schema.Strict, and `sample(prompts, *, seed, columns=None)`"
        )
    return GuidedEntry(settings, loaded)


def served_of(method: Method) -> Served:
    """What keeps one of its draws; raises `ConfigError` for an operator that is no way to sample.

    The file of a `utility` is run.
    """
    if method.kind == "rule":
        entry, source = RULES[method.name], f"method {method.text!r}"
        settings = _rule_settings(method)
        try:
            return entry.rule(settings)
        except RewardError as error:
            raise RewardError(f"{source}: {error}") from error
    operator = operator_of(method.call)
    if isinstance(operator, LStatistic) and operator.is_law:
        return lstat_rule(operator)
    if operator.budget is None or not isinstance(operator, Served):
        raise ConfigError(
            f"operator {method.text!r} is what training assumes, not a way to sample; {_instead(operator)}"
        )
    return operator


def _rule_settings(method: Method) -> Strict:
    entry, source = RULES[method.name], f"method {method.text!r}"
    return _with_all(dict(method.settings), entry.settings, source, f"{method.name}({entry.example})")


def _with_all(given: dict[str, Any], settings: type[S], source: str, example: str) -> S:
    """The settings; `ConfigError` with an example where one is missing."""
    lacking = [name for name in _required(settings) if name not in given]
    if lacking:
        raise ConfigError(f"{source}: {lacking[0]!r} is missing; write e.g. {example}")
    return validate(given, settings, source)


def meaning_of(method: Method, sampling: Sampling) -> tuple[object, ...]:
    """What a method does, however it is written: two are the same if their meanings are equal.

    Raises `ConfigError` as `check_served` does.
    """
    if method.is_curve or method.is_tuned:
        return method.kind, method.name, method.tunable, method.cap
    if method.is_stopped:
        settings, name, rule = stop_settings(method)
        return method.kind, settings.n, settings.width, name, rule
    if method.is_guided:
        return method.kind, method.name, settings_of(method, sampling)
    if method.kind == "rule":
        return method.kind, method.name, _rule_settings(method)
    return method.kind, method.name, written_arguments(method.call)


def _instead(operator: Operator) -> str:
    """What to write for an operator that no sampler serves."""
    method = served_instead(operator)
    if isinstance(operator, Entropic):
        if operator.beta < 0:
            return f"it weighs the worst answers, which no choice among draws does; serve a single sample, {method}"
        if method == "single":
            return f"its beta is so small that it is the mean; serve a single sample, {method}"
        return f"its value is what the tilt at temperature 1/beta earns, less its KL; serve {method} or cards"
    if isinstance(operator, LStatistic):
        best = f", or bon({operator.num_draws})"
        return f"negative weights are no probabilities; serve a single sample, {method}{best}"
    if isinstance(operator, RankOperator):
        total = float(operator.pgf(np.ones(1))[0])
        return f"its weights sum to {total:g}, not to 1; divide them by that, or serve {method}"
    return f"serve it with the sampler that it stands for, e.g. {method} or cards"


def needs_gradient(method: Method, sampling: Sampling) -> bool:
    """Whether a method guides by the gradient of a reward that shares the policy's token ids."""
    return method.is_guided and bool(getattr(settings_of(method, sampling), "needs_gradient", False))


def draws(method: Method, sampling: Sampling) -> bool:
    """Whether a method draws tokens from the sampling's law, as one of somebody's own is taken to do.

    Of any other `stop` and `max_new_tokens` alone matter.
    """
    return method.name not in SAMPLERS or bool(getattr(settings_of(method, sampling), "draws", True))


def files_key(
    method: Method, sampling: Sampling, policy: str, fingerprint: Callable[[], str | None], reward: str | None
) -> str:
    """A hash of the files that a guided method reads for a policy and a reward; empty where it reads none.

    `fingerprint` gives that of policy `policy`, and `reward` is a criterion, None where it is not known. Raises
    `ModelError` for files that are not there, or belong to others.
    """
    check = getattr(settings_of(method, sampling), "files_key", None) if method.is_guided else None
    return "" if check is None else str(check(f"method {method.text!r}, policy {policy!r}", fingerprint(), reward))


def fitted_for(
    method: Method, sampling: Sampling, policy: str, fingerprint: Callable[[], str | None], reward: str | None
) -> HeadRecord | None:
    """What was fitted for a guided method, None where nothing was; arguments and errors are those of `files_key`."""
    read = getattr(settings_of(method, sampling), "fitted", None) if method.is_guided else None
    if read is None:
        return None
    record = read(f"method {method.text!r}, policy {policy!r}", fingerprint(), reward)
    assert isinstance(record, HeadRecord)
    return record


def needs_target(method: Method, sampling: Sampling) -> bool:
    """Whether a guided method has to be given a target, or a stopping rule a threshold, before it can run."""
    if method.is_stopped:
        return lacks_threshold(method)
    return method.is_guided and getattr(settings_of(method, sampling), "target", 0.0) is None


def quantile_of(method: Method, sampling: Sampling) -> float:
    """The quantile of the policy's rewards that a missing target is."""
    quantile = getattr(settings_of(method, sampling), "quantile", None)
    return QUANTILE if quantile is None else float(quantile)


def entropy_share_of(method: Method, sampling: Sampling) -> float | None:
    """The quantile of the policy's own entropies that a guided method's threshold is; None where it has its nats."""
    threshold = getattr(settings_of(method, sampling), KEY, None) if method.is_guided else None
    return threshold.share if isinstance(threshold, EntropyQuantile) else None


def dial_of(method: Method) -> tuple[str, ...]:
    """The settings that a guided method's dial sets, in the order that a value names them; none without a dial.

    A class in a file is loaded, which runs the file.
    """
    return tuple(getattr(_entry(method).settings, "dial", ())) if method.is_guided else ()


def at_dial(method: Method, value: float | str) -> Method:
    """A guided method with its dial at a value: `sea` at `20x2` is `sea(num_steps=20, num_chains=2)`.

    Raises `ConfigError` for a value that names another number of settings than the dial has, or one that the method
    sets already. Whether the settings fit `check_served` tells.
    """
    names = dial_of(method)
    words = str(value).split("x") if len(names) > 1 else [str(value)]
    if not names:
        raise ConfigError(f"method {method.text!r} has no dial; list the settings that you want in `methods`")
    if len(words) != len(names):
        example = "x".join(str(10 * 2**i) for i in range(len(names)))
        raise ConfigError(f"{value!r} is no {' x '.join(names)}; write numbers with x between them, e.g. {example}")
    twice = [name for name in names if method.settings.get(name) is not None]
    if twice:
        raise ConfigError(f"method {method.text!r} sets {twice[0]} already; drop it there, or drop the dial")
    return method.with_settings(dict(zip(names, (word.strip() for word in words), strict=True)))


def with_target(
    policy: AnyPolicy, reward: Reward, method: Method, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> tuple[Method, Cost]:
    """A method with a target or threshold, and what it cost to measure a missing one on these prompts.

    Measured is what `calibrate_target` does; of a stopping rule, what it makes of the same samples; of an entropy that
    is a quantile, what `calibrate_entropy` does. It is in no completion's cost. A method that lacks none is given back
    as it is.
    """
    # Another seed than the responses', since proposals begin with the same random numbers.
    how: Any = {"seed": seed + 1, "batch_size": CALIBRATION_BATCH}
    spent = Cost()
    share = entropy_share_of(method, sampling)
    if share is not None:
        nats, spent = calibrate_entropy(policy, prompts, sampling, quantile=share, **how)
        method = with_nats(method, nats)
    if not needs_target(method, sampling):
        return method, spent
    if method.is_stopped:
        rewards, cost = calibration_rewards(policy, reward, prompts, sampling, **how)
        return with_threshold(method, np.asarray(rewards)), spent + cost
    quantile = quantile_of(method, sampling)
    target, cost = calibrate_target(policy, reward, prompts, sampling, quantile=quantile, **how)
    return method.with_target(target), spent + cost


# Stopping. -------------------------------------------------------------------------------------------------------


class StoppedSettings(Strict):
    """Best-of-N that stops early."""

    n: int = Field(ge=1)
    """Most draws."""
    stop: str
    """The rule: pandora(0.05), beacon(0.05), target(0.9)."""
    width: int = Field(1, ge=1)
    """Draws of a round: they are drawn side by side, and the rule is asked after each round."""


def stop_settings(method: Method) -> tuple[StoppedSettings, str, StopSettings]:
    """The settings of a method that stops, its rule's name, and the rule's settings; raises `ConfigError`."""
    source, examples = f"method {method.text!r}", [f"{name}({entry.example})" for name, entry in STOPS.items()]
    if "stop" not in method.settings:
        raise ConfigError(f"{source}: width belongs to a stopping rule; add e.g. stop={examples[0]}, or drop it")
    call = read_call(str(method.settings["stop"]))
    if call.name not in STOPS:
        raise ConfigError(f"{source}: stop = {call.text!r} is no stopping rule; write one of {', '.join(examples)}")
    example = f"bon(64, stop={call.text})"
    settings = _with_all({**method.settings, "stop": call.text}, StoppedSettings, source, example)
    if settings.width > settings.n:
        raise ConfigError(
            f"{source}: a round of width = {settings.width} exceeds n = {settings.n}; write at most width={settings.n}"
        )
    entry, told = STOPS[call.name], f"{source}, stop={call.text}"
    form = Form("rule", entry.example, _required(entry.settings))
    rule = _with_all(read_settings(call, form, told), entry.settings, told, f"stop={call.name}({entry.example})")
    if isinstance(rule, BeaconSettings):
        check_horizon(settings.n, rule.weight, told)
    return settings, call.name, rule


def stopped_of(method: Method) -> Stopped:
    """What a method that stops does; raises `ConfigError` as `stop_settings` does, and where a threshold is missing."""
    settings, name, rule = stop_settings(method)
    if needs_threshold(rule):
        raise ConfigError(
            f"method {method.text!r}: {settings.stop} stops at a reward that has to be measured; write it, e.g. "
            f"{settings.stop.strip().removesuffix(')')}, threshold=1.5), or let `iama generate` or `iama evaluate` "
            "measure it"
        )
    return Stopped(settings.n, STOPS[name].rule(rule), settings.width)


def most_draws(method: Method) -> int:
    """The n of a method that stops."""
    return stop_settings(method)[0].n


def lacks_threshold(method: Method) -> bool:
    """Whether a method stops at a reward that has yet to be measured."""
    return method.is_stopped and needs_threshold(stop_settings(method)[2])


def with_threshold(method: Method, rewards: Floats) -> Method:
    """A method that stops at a reward with that reward, measured from rewards that are no draws of its answers."""
    settings, name, rule = stop_settings(method)
    threshold = measured_threshold(rule, rewards)
    words = stop_text(name, type(rule).model_validate({**rule.model_dump(exclude={"law"}), "threshold": threshold}))
    return read_method(stopped_text(settings.n, words, settings.width))
