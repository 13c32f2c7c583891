"""From a method as people write it to the sampler that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iama.config.methods import parse_guided, parse_selection, written_with_target
from iama.config.schema import validate
from iama.cost import Cost
from iama.errors import ConfigError
from iama.objective.operators import parse_operator
from iama.rewards.reward import load_function
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.best_of import SelectionSampler
from inference.samplers.cards import Cards, CardsSettings, calibrate_target, rejection_settings
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Sea, SeaSettings
from inference.selection.itp import ItpSettings, itp_rule
from inference.selection.mbr import MbrSettings, mbr_rule
from inference.selection.rules import Served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.config.specs import Sampling
    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.samplers.base import Sampler

CALIBRATION_BATCH = 256
GuidedSettings = CardsSettings | ArgsSettings | GgroSettings | SeaSettings


def serve(policy: Policy, reward: Reward | None, method: str, sampling: Sampling, batch_size: int = 256) -> Sampler:
    """The sampler of a method: an operator as the configuration and `iama.json` write it (`bon(4)`), or `itp(...)`,
    `mbr(...)`, `cards(...)`, `rejection(...)`, `args(...)`, `ggro(...)`, `sea(...)` with the fields of their settings.

    Raises `ConfigError` as `read_method` does, for CARDS without a target, and for a reward whose gradient a method
    cannot use.
    """
    read = read_method(method, sampling)
    if isinstance(read, Served):
        return SelectionSampler(policy, reward, read, sampling, batch_size)
    if reward is None:
        raise ConfigError(f"method {method!r} is guided by a reward; give one, or sample with method single")
    if isinstance(read, ArgsSettings):
        return Args(policy, reward, read, sampling, batch_size)
    if isinstance(read, GgroSettings):
        return Ggro(policy, reward, read, sampling, batch_size)
    if isinstance(read, SeaSettings):
        return Sea(policy, reward, read, sampling, batch_size)
    return Cards(policy, reward, read, sampling, batch_size)


def read_method(method: str, sampling: Sampling) -> Served | GuidedSettings:
    """What a method asks for: an operator or rule that keeps one of its draws, or a guided method's settings.

    Loads no model. CARDS may lack its target. Raises `ConfigError` for what cannot be served: an unknown name,
    settings that do not fit, a tilt, a series that is no law.
    """
    name, settings = parse_guided(method)
    if name is None:
        return read_served(method)
    others: dict[str, type[GuidedSettings]] = {"args": ArgsSettings, "ggro": GgroSettings, "sea": SeaSettings}
    if name in others:
        return validate(settings, others[name], f"method {method!r}")
    if name == "rejection":  # whole responses against the target
        settings = rejection_settings(None, sampling.max_new_tokens).model_dump() | settings
    return validate(settings, CardsSettings, f"method {method!r}")


def needs_gradient(method: str, sampling: Sampling) -> bool:
    """Whether a method guides by the gradient of a reward that shares the policy's token ids."""
    read = read_method(method, sampling)
    return isinstance(read, SeaSettings) or (isinstance(read, GgroSettings) and read.needs_gradient)


def with_target(
    policy: Policy, reward: Reward, method: str, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> tuple[str, Cost]:
    """`cards` or `rejection` with a target, and what it cost to measure a missing one on these prompts.

    Measured is what `calibrate_target` does; it is in no completion's cost. Any other method is given back as it is.
    """
    read = read_method(method, sampling)
    if not isinstance(read, CardsSettings) or read.target is not None:
        return method, Cost()
    # Another seed than the responses', since proposals begin with the same random numbers.
    target, cost = calibrate_target(policy, reward, prompts, sampling, seed=seed + 1, batch_size=CALIBRATION_BATCH)
    return written_with_target(method, target), cost


def read_served(method: str) -> Served:
    """What keeps one of its draws, as `read_method` does; the file of a `utility` is run."""
    selection = parse_selection(method)
    if selection is not None:
        return _selection(method, *selection)
    parsed = parse_operator(method)
    if parsed.budget is None or not isinstance(parsed, Served):
        raise ConfigError(
            f"operator {method!r} is what training assumes, not a way to sample; serve it with the sampler that it "
            f"stands for, e.g. --method 'soft_bon(16, {getattr(parsed, 'temperature', 0.1):g})' or --method cards"
        )
    return parsed


def _selection(method: str, name: str, settings: dict[str, Any]) -> Served:
    source = f"method {method!r}"
    if name == "itp":
        return itp_rule(validate(settings, ItpSettings, source))
    read = validate(settings, MbrSettings, source)
    utility: Any = None if read.utility is None else load_function(read.utility, f"{source}: utility")
    return mbr_rule(read, utility)
