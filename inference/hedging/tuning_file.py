"""`tuning.json`: what `iama tune` found, for which policy and rewards; and `bon(tuned)` with the number from there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from iama.config.methods import Method, written_tuned
from iama.config.schema import Strict, validate
from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaWarning
from iama.files import absent, write_atomically
from iama.prompts.render import Prompt
from iama.reading import read_object
from inference.hedging.tune import Tuned
from inference.pools.format import HeaderPolicy
from inference.pools.journal import digest
from inference.pools.score import reward_key
from inference.samplers.serve import read_method

FILE_NAME = "tuning.json"
FORMAT = 1


class Report(Strict):
    """Gold by scores that chose nothing, at the setting that was chosen and for a single sample: means over prompts."""

    gold: float
    single: float
    gain_ci95: tuple[float, float]


class TunedMethod(Strict):
    """A method's setting, with the seconds that finding it took."""

    result: Tuned
    draws: float
    """Mean number of draws as the method is served, which soft Best-of-N on ranks needs fewer of than its n."""
    report: Report | None = None
    """Where the calibration has a column to report by."""
    seconds: float


class TunedCriterion(Strict):
    """The rewards that were used."""

    name: str
    proxy: RewardSpec
    gold: RewardSpec
    report: RewardSpec | None = None
    """Other scores of the same judge, at which gold is reported for what was chosen by `gold`."""
    proxy_key: str
    """Hash of what decides the order in which the proxy puts texts, as far as it is known (`order_key`)."""
    gold_key: str
    """The same of gold, whichever draw of a judge it is."""


class Calibration(Strict):
    """What was tuned on one pool of samples: a policy by a criterion's proxy and gold."""

    policy: HeaderPolicy
    system_prompt: str | None = None
    sampling: Sampling | None = None
    """None where the pool does not tell."""
    criterion: TunedCriterion
    prompt_ids: list[str]
    """Of the prompts that were used (`inference.pools.file.prompt_ids`)."""
    text_ids: list[str]
    """Of the same prompts, whatever form they are written in (`text_id`)."""
    num_left_out: int = 0
    """Prompts with scores for less than half of their samples."""
    num_missing: int = 0
    """Samples of the prompts used that lack one of their scores."""
    num_samples: int = Field(ge=1)
    """A prompt."""
    correlation: float
    """Of proxy and gold within prompts."""
    correlation_ci95: tuple[float, float]
    safe_samples: int = Field(ge=1)
    """Largest n of Best-of-n at which the correlation alone, the lower end of its interval, guarantees that gold has
    risen; 1: none."""
    safe_searched: int = Field(ge=1)
    """The largest n that was looked at for `safe_samples`."""
    generation_seconds: float | None = None
    """What drawing the samples took, as far as it is known."""
    methods: dict[str, TunedMethod]
    """By the method as evaluations name it: `bon(tuned)`, `soft_bon(16, tuned)`."""


class Tuning(Strict):
    """`tuning.json`."""

    format: Literal[1] = 1
    seed: int
    num_bootstrap: int
    versions: dict[str, str]
    calibrations: Annotated[list[Calibration], Field(min_length=1)]


def order_key(spec: RewardSpec) -> str:
    """`reward_key` without scale and engine, which do not change which of two texts is better.

    A function is known by its name, a column too, and a model on the hub; their contents are not.
    """
    return reward_key(spec.placed(engine="transformers").model_copy(update={"scale": None}))


def gold_key(spec: RewardSpec) -> str:
    """`order_key`, the same for every draw of a judge's answers."""
    judge = None if spec.judge is None else spec.judge.model_copy(update={"draw": 0})
    return order_key(spec.model_copy(update={"judge": judge}))


def text_id(prompt: Prompt) -> str:
    """Hash of what is asked: the turns up to the last user message, or the text, without blanks around them.

    A question keeps it as text and as a message, and under another system prompt.
    """
    if isinstance(prompt, str):
        return digest(prompt.strip())[:16]
    turns = [(message["role"], message["content"].strip()) for message in prompt if message["role"] != "system"]
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=len(turns) - 1)
    asked = turns[: last + 1] or [("system", prompt[-1]["content"].strip())]
    return digest(asked[0][1] if len(asked) == 1 else asked)[:16]


def save_tuning(folder: Path, tuning: Tuning) -> Path:
    """Write `tuning.json`, which is never seen half-written; NaN is refused, since JSON has none."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tuning.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / FILE_NAME, text + "\n")
    return folder / FILE_NAME


def load_tuning(path: Path) -> Tuning:
    """Read a tuning file; raises `DataError` where it is missing, damaged or of another format."""
    if not path.is_file():
        raise DataError(f"tuning file {str(path)!r} {absent(path)}; `iama tune --out FOLDER` writes {FILE_NAME}")
    raw = read_object(path, DataError, "it is damaged; run `iama tune` again")
    if "calibrations" not in raw:
        raise DataError(f"{path} is no tuning file; give the {FILE_NAME} that `iama tune` wrote")
    if raw.get("format") != FORMAT:
        raise DataError(f"{path} has format {raw.get('format')!r}, and {FORMAT} is known here; run `iama tune` again")
    try:
        return validate(raw, Tuning, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; run `iama tune` again") from error


# Numbers from the file. ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a tuned number is asked for: `policy` and `system_prompt` as a pool's header has them, and the rewards.

    `criterion` None: whichever has this proxy. `gold` None: what is served is not judged.
    """

    policy: Mapping[str, Any]
    system_prompt: str | None
    sampling: Sampling | None
    proxy: RewardSpec
    criterion: str | None
    gold: RewardSpec | None = None


def setting(calibration: Calibration, path: Path, method: Method) -> Method:
    """A method such as `bon(tuned)` with its number (and its cap); raises `ConfigError` where it was not tuned.

    A file from elsewhere chooses nothing but the number: another method than the one that was tuned is refused.
    """
    assert method.tunable is not None
    name = written_tuned(method.tunable)
    if name not in calibration.methods:
        raise ConfigError(
            f"{path}: {name} was not tuned for {calibration.policy.name!r} and {calibration.criterion.name!r}, only "
            f"{', '.join(calibration.methods)}; run `iama tune` with that method as well"
        )
    written = calibration.methods[name].result.written
    tuned = read_method(written)
    if tuned.name == "identity":
        return tuned
    if tuned.name != method.name or tuned.is_tuned or tuned.is_curve:
        raise ConfigError(f"{path}: {written!r} is no setting of {name}; run `iama tune` again")
    return tuned if method.cap is None else tuned.with_cap(method.cap)


def find(tuning: Tuning, path: Path, wanted: Wanted) -> Calibration:
    """The calibration of a policy, its sampling, and the proxy; raises `ConfigError` for another one, or several.

    A policy is known by its fingerprint, or by its name where one of the two has none. A proxy is known by what decides
    its order (`order_key`), but where one is a column of a pool file and the other is not, by the criterion's name. An
    `IamaWarning` tells what is known by a name alone, and of another gold reward.
    """
    proxy_key = order_key(wanted.proxy)
    checks: list[tuple[Callable[[Calibration], bool], Callable[[list[Calibration]], str]]] = [
        (lambda c: _is_policy(c, wanted), lambda left: _policy_words(left, wanted)),
        (lambda c: _is_proxy(c, wanted, proxy_key), lambda left: _proxy_words(left, wanted)),
        (
            lambda c: c.system_prompt == wanted.system_prompt,
            lambda left: f"tuned with the system prompt {_prompts_words(left)}, but it is {wanted.system_prompt!r}",
        ),
        (lambda c: not _sampling_words(c, wanted), lambda left: f"tuned with {_sampling_words(left[0], wanted)}"),
    ]
    left = tuning.calibrations
    for fits, explain in checks:
        kept = [calibration for calibration in left if fits(calibration)]
        if not kept:
            raise ConfigError(f"{path}: {explain(left)}; run `iama tune` for what is to be served")
        left = kept
    # Two policies may be one model under two names.
    left = [c for c in left if c.policy.name == wanted.policy["name"]] or left
    left = [c for c in left if c.criterion.name == wanted.criterion] or left
    names = list(dict.fromkeys(c.criterion.name for c in left))
    if len(names) > 1:
        raise ConfigError(
            f"{path}: the criteria {', '.join(names)} were tuned with this proxy; name one of them (`iama generate` "
            "takes --criterion)"
        )
    left = _of_one_sampling(path, left, wanted)
    _warn_of_trust(path, left[0], wanted)
    _warn_of_gold(path, left[0], wanted)
    return left[0]


def _is_policy(calibration: Calibration, wanted: Wanted) -> bool:
    key = "name" if _policy_by_name_only(calibration, wanted) else "fingerprint"
    return bool(getattr(calibration.policy, key) == wanted.policy[key])


def _policy_by_name_only(calibration: Calibration, wanted: Wanted) -> bool:
    return calibration.policy.fingerprint is None or wanted.policy["fingerprint"] is None


def _policy_words(left: list[Calibration], wanted: Wanted) -> str:
    names, name = list(dict.fromkeys(c.policy.name for c in left)), wanted.policy["name"]
    if name in names:
        return f"tuned for another policy {name!r} (weights, tokenizer, chat template or precision differ)"
    return f"tuned for {', '.join(map(repr, names))}, and the policy {name!r} is another"


def _prompts_words(left: list[Calibration]) -> str:
    return " or ".join(dict.fromkeys(repr(c.system_prompt) for c in left))


def _one_is_a_column(one: RewardSpec, other: RewardSpec) -> bool:
    return (one.column is None) != (other.column is None)


def _is_proxy(calibration: Calibration, wanted: Wanted, proxy_key: str) -> bool:
    if _one_is_a_column(calibration.criterion.proxy, wanted.proxy):
        return wanted.criterion in (None, calibration.criterion.name)
    return calibration.criterion.proxy_key == proxy_key


def _proxy_words(left: list[Calibration], wanted: Wanted) -> str:
    names = dict.fromkeys(_named(c.criterion.proxy) for c in left)
    return f"tuned for the proxy {', '.join(names)}, and {_named(wanted.proxy)} is another, or has been changed"


def _named(spec: RewardSpec) -> str:
    value = getattr(spec, spec.source)
    shown = value if isinstance(value, str) else value.model if spec.judge is not None else f"{len(spec.parts)} rewards"
    return f"{spec.source} {shown!r}"


def _sampling_words(calibration: Calibration, wanted: Wanted) -> str:
    """Where two samplings differ; nothing where one of them is not known."""
    if calibration.sampling is None or wanted.sampling is None:
        return ""
    pairs = [(key, value, getattr(wanted.sampling, key)) for key, value in calibration.sampling]
    return "; ".join(f"{key} {before!r}, but it is {after!r}" for key, before, after in pairs if before != after)


def _of_one_sampling(path: Path, left: list[Calibration], wanted: Wanted) -> list[Calibration]:
    """Those of the sampling that is served, where it is known; raises `ConfigError` for several where it is not."""
    if wanted.sampling is not None:
        return [c for c in left if c.sampling is not None] or left
    other = next((c for c in left if c.sampling != left[0].sampling), None)
    if other is None:
        return left
    samplings = "a sampling that is known and one that is not"
    if left[0].sampling is not None and other.sampling is not None:
        pairs = [(key, value, getattr(other.sampling, key)) for key, value in left[0].sampling]
        samplings = "; ".join(f"{key} {value!r} and {another!r}" for key, value, another in pairs if value != another)
    raise ConfigError(
        f"{path}: {left[0].policy.name!r} was tuned with {samplings}, and the pool to be "
        "evaluated does not tell which it has; write `sampling` into its header (the file's first line)"
    )


def _warn_of_trust(path: Path, calibration: Calibration, wanted: Wanted) -> None:
    """Warn of what only a name stands for."""
    before, after = calibration.criterion.proxy, wanted.proxy
    code = [part.function or part.kind_name for part in after.parts if part.source in ("function", "kind")]
    trusted = []
    if _policy_by_name_only(calibration, wanted):
        trusted.append(f"the policy {calibration.policy.name!r} is the same model, since it has no fingerprint")
    if _one_is_a_column(before, after):
        name = calibration.criterion.name
        trusted.append(f"{name!r} was tuned with the {_named(before)}, and {_named(after)} gives the same scores")
    elif after.column is not None:
        trusted.append(f"{_named(after)} holds scores of the same reward")
    elif code:
        trusted.append(f"the code of {', '.join(code)} is unchanged")
    if calibration.sampling is None or wanted.sampling is None:
        trusted.append(f"{calibration.policy.name!r} is sampled as it was, since a pool's header has no `sampling`")
    if trusted:
        warnings.warn(f"{path}: taken on trust: {'; '.join(trusted)}", IamaWarning, stacklevel=2)


def _warn_of_gold(path: Path, calibration: Calibration, wanted: Wanted) -> None:
    """Warn of another gold reward, as far as it can be told: a column may hold the scores of any reward."""
    before, after = calibration.criterion, wanted.gold
    if after is None or _one_is_a_column(before.gold, after) or before.gold_key == gold_key(after):
        return
    warnings.warn(
        f"{path}: {before.name!r} was tuned for the gold {_named(before.gold)}, and {_named(after)} is another, or has "
        "been changed: what was best by the one need not be best by the other",
        IamaWarning,
        stacklevel=2,
    )
