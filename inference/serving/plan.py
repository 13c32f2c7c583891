"""Every check of a server before weights are read: methods, rewards, policies, keys, and what an evaluation says."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from iama.config.files import EvaluationCriterion
from iama.config.manifest import load_manifest
from iama.config.methods import Method
from iama.config.schema import validate
from iama.config.serving import Keys, ServeConfig, ServedCriterion
from iama.config.specs import Sampling
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.prompts.conversations import render_prompts
from iama.prompts.data import fitting_prompts, read_prompts
from iama.prompts.render import Prompt
from iama.reading import read_text
from iama.rewards.load import Files, check_columns, check_reward
from inference.engine.policy import PolicyFiles, policy_fingerprint, read_policy_files
from inference.engine.vocabulary import policy_side
from inference.evaluation.reward_checks import check_gradients
from inference.evaluation.summary import Summary, load_summary
from inference.hedging.tuning_file import Wanted, find, load_tuning, setting
from inference.pools.fill import pool_header
from inference.samplers.serve import check_served, files_key, needs_gradient, needs_target, read_method
from inference.serving.catalogue import SINGLE, Bound, Model, bound_of, budget_of, capped_at

DEFAULT_METHODS = ("bon(4)",)
SHORTEST_KEY = 16
QUOTES = "\"'"
NAMED = re.compile(r"[A-Za-z_]\w*=[^=]")
"""A line of a shell's file; what is coded in base 64 has equals signs at its end alone."""


@dataclass(frozen=True)
class ServePlan:
    """What will be served; methods may still lack a target, which `opening.open_plan` measures."""

    config: ServeConfig
    models: tuple[Model, ...]
    samplings: dict[str, Sampling]
    bounds: dict[tuple[str, str], tuple[Bound, ...]]
    policy_files: dict[str, PolicyFiles]
    reward_files: dict[str, Files]
    prompts: tuple[Prompt, ...]
    """Of the calibration."""
    keys: tuple[str, ...]
    summary: Summary | None

    def describe(self) -> str:
        """What is served, in one line."""
        parts = [_counted(len(self.config.policies), "policy", "policies", self.config.policies)]
        names = [criterion.name for criterion in self.config.criteria]
        parts += [_counted(len(names), "criterion", "criteria", names)] if names else []
        methods = list(dict.fromkeys(model.written for model in self.models))
        parts.append(_counted(len(methods), "method", "methods", methods))
        number = len(self.models)
        return f"{'; '.join(parts)}: {number} model{'' if number == 1 else 's'}"


def _counted(number: int, one: str, many: str, names: Any) -> str:
    return f"{one if number == 1 else many} {', '.join(names)}"


def make_plan(config: ServeConfig, source: str) -> ServePlan:
    """Check all that can be checked without weights; raises `IamaError` with what to mend. `source` names the file."""
    keys = read_keys(config.keys, source)
    summary = None if config.evaluation is None else load_summary(Path(config.evaluation))
    samplings = {name: _sampling(config, name, source) for name in config.policies}
    files = {name: read_policy_files(name, spec) for name, spec in config.policies.items()}
    rows = [] if config.calibration is None else read_prompts(config.calibration)
    prompts = [row["prompt"] for row in rows]
    bounds = {
        (policy, criterion.name): tuple(_bounds(policy, criterion, summary))
        for policy in config.policies
        for criterion in config.criteria
    }
    models = [Model(policy, None, SINGLE, read_method("identity")) for policy in config.policies]
    for policy in config.policies:
        for criterion in config.criteria:
            models += _models(config, policy, criterion, samplings[policy], bounds[policy, criterion.name], source)
    plain = ["".join(model.id.split()) for model in models]
    twice = next((m.id for i, m in enumerate(models) if plain[i] in plain[:i]), None)
    if twice is not None:
        raise ConfigError(f"{source}: methods: {twice} is written twice; write it once")
    _check_targets(config, models, samplings, source)
    _check_used(config, summary, source)
    for model in models:
        fingerprint = partial(policy_fingerprint, model.policy, config.policies[model.policy])
        files_key(model.method, samplings[model.policy], model.policy, fingerprint, model.criterion)
    for policy, file in files.items():
        if config.criteria and prompts:
            ids = render_prompts(file.tokenizer, prompts, file.eos_token_ids, f"policy {policy!r}")
            assert config.calibration is not None
            lengths = [len(row) for row in ids]
            fitting_prompts(config.calibration, rows, lengths, file.context_length, samplings[policy].max_new_tokens)
    reward_files = {criterion.name: _checked_reward(criterion, prompts) for criterion in config.criteria}
    _check_gradients(config, models, samplings, files)
    return ServePlan(config, tuple(models), samplings, bounds, files, reward_files, tuple(prompts), keys, summary)


def _check_used(config: ServeConfig, summary: Summary | None, source: str) -> None:
    """What is written must be served: methods need a criterion, and a file is warned of that nothing looks at."""
    selects = next((text for text in config.methods or () if text not in (SINGLE, "identity")), None)
    if selects is not None and not config.criteria:
        raise ConfigError(
            f"{source}: methods: {selects!r} selects by a reward, and there is no criterion; write `criteria` (with "
            "--policy: --reward CRITERION=DIR), or leave methods out"
        )
    for criterion in config.criteria:
        methods = criterion.methods or config.methods or DEFAULT_METHODS
        if criterion.tuning is not None and not any(read_method(text).is_tuned for text in methods):
            told = f"{source}: criterion {criterion.name!r}: tuning {criterion.tuning!r} is not used"
            warnings.warn(f"{told}; add a method such as bon(tuned), or drop it", IamaWarning, stacklevel=2)
    if summary is not None:
        names = (config.policies, [criterion.name for criterion in config.criteria])
        if not any(row["policy"] in names[0] and row["criterion"] in names[1] for row in summary["curves"]):
            policies = ", ".join(dict.fromkeys(row["policy"] for row in summary["curves"]))
            criteria = ", ".join(dict.fromkeys(row["criterion"] for row in summary["curves"]))
            told = f"{source}: evaluation {config.evaluation!r} measured nothing that is served"
            remedy = f"its policies are {policies}, its criteria {criteria}: name yours so, or drop it"
            warnings.warn(f"{told}; {remedy}", IamaWarning, stacklevel=2)
        unbounded = [criterion.name for criterion in config.criteria if criterion.max_budget is None]
        number = summary.get("num_seeds", 1)
        if number > 1 and unbounded and config.hacking != "allow":
            told = (
                f"{source}: evaluation {config.evaluation!r} is of {number} seeds, which together tell no fall of gold"
            )
            remedy = f"hacking: {config.hacking} bounds {', '.join(unbounded)} by no measurement"
            remedy += "; write max_budget there, or give the folder of one seed"
            warnings.warn(f"{told}, so that {remedy}", IamaWarning, stacklevel=2)


def _sampling(config: ServeConfig, policy: str, source: str) -> Sampling:
    """What the configuration writes over the sampling of a policy's training, as `iama generate` has it."""
    spec = config.policies[policy]
    manifest = load_manifest(Path(spec.adapter or spec.path))
    settings = (Sampling() if manifest is None else manifest.sampling).model_dump()
    settings |= {name: getattr(config.sampling, name) for name in config.sampling.model_fields_set}
    sampling = validate(settings, Sampling, source)
    if sampling.max_new_tokens > config.limits.max_tokens:
        raise ConfigError(
            f"{source}: sampling.max_new_tokens = {sampling.max_new_tokens} of policy {policy!r} exceeds "
            f"limits.max_tokens = {config.limits.max_tokens}; raise the limit, or write less"
        )
    return sampling


def _models(
    config: ServeConfig,
    policy: str,
    criterion: ServedCriterion,
    sampling: Sampling,
    bounds: Sequence[Bound],
    source: str,
) -> list[Model]:
    models = []
    for text in criterion.methods or config.methods or DEFAULT_METHODS:
        if text in (SINGLE, "identity"):
            continue
        method = read_method(text)
        if method.is_curve:
            raise ConfigError(f"{source}: methods: {text!r} has no number of samples here; write {text}(4)")
        served, written = method, method.text
        if method.is_tuned:
            served = _tuned(method, policy, criterion, config, sampling, source)
        check_served(served, sampling)
        bounded = _bounded(config, policy, criterion.name, served, bounds, method.is_tuned, source)
        if bounded is not served:
            served, written = bounded, bounded.text
        models.append(Model(policy, criterion.name, written, served))
    return list({model.written: model for model in models}.values()) if config.hacking == "cap" else models


def _tuned(
    method: Method, policy: str, criterion: ServedCriterion, config: ServeConfig, sampling: Sampling, source: str
) -> Method:
    """The method with its number from the criterion's tuning file."""
    if criterion.tuning is None:
        raise ConfigError(
            f"{source}: criterion {criterion.name!r}: {method.text!r} takes its number from a file of `iama tune`; "
            "set `tuning: FOLDER/tuning.json` there, or write the number"
        )
    path = Path(criterion.tuning)
    header = pool_header(policy, config.policies[policy], None, "transformers", sampling, 1, 0)
    calibration = find(
        load_tuning(path), path, Wanted(header["policy"], None, sampling, criterion.proxy, criterion.name)
    )
    return setting(calibration, path, method)


def _bounds(policy: str, criterion: ServedCriterion, summary: Summary | None) -> list[Bound]:
    """Most samples that a criterion is worth: as configured, and as an evaluation saw gold fall."""
    bounds = []
    if criterion.max_budget is not None:
        reason = f"max_budget of {criterion.name!r} is {criterion.max_budget}"
        bounds.append(Bound(criterion.max_budget, reason, is_measured=False))
    rows = [] if summary is None else summary["hacking"]
    onsets = [
        row["onset"]
        for row in rows
        if (row["policy"], row["criterion"], row["method"]) == (policy, criterion.name, "bon") and row["onset"]
    ]
    if summary is not None and onsets:
        onset = min(onset for onset in onsets if onset is not None)
        before = [
            row["samples"]
            for row in summary["curves"]
            if (row["policy"], row["criterion"], row["method"]) == (policy, criterion.name, "bon")
            and row["samples"] is not None
            and row["samples"] < onset
        ]
        reason = f"the evaluation saw the gold reward of {criterion.name!r} fall from {onset:g} samples on"
        bounds.append(Bound(max(before, default=1), reason, is_measured=True))
    return bounds


def _bounded(
    config: ServeConfig,
    policy: str,
    criterion: str,
    method: Method,
    bounds: Sequence[Bound],
    is_tuned: bool,
    source: str,
) -> Method:
    """The method, which the configuration itself may push too far; tuned by gold, it cannot."""
    number = budget_of(method)
    bound = bound_of([bound for bound in bounds if not (is_tuned and bound.is_measured)], method)
    if number is None or bound is None or number <= bound.most:
        return method
    told = f"{source}: {policy}/{criterion}:{method.text} draws {number:g} samples, and {bound.reason}"
    if config.hacking == "allow":
        warnings.warn(f"{told}; it is served, since hacking: allow", IamaWarning, stacklevel=2)
        return method
    capped = capped_at(method, bound.most) if config.hacking == "cap" else None
    if capped is None:
        raise ConfigError(f"{told}; write at most {bound.most}, or hacking: allow")
    warnings.warn(f"{told}; it is served as {capped.text}", IamaWarning, stacklevel=2)
    return capped


def _check_targets(config: ServeConfig, models: Sequence[Model], samplings: dict[str, Sampling], source: str) -> None:
    if config.calibration is not None:
        return
    lacking = next((model for model in models if needs_target(model.method, samplings[model.policy])), None)
    if lacking is not None:
        what = "threshold" if lacking.method.is_stopped else "target"
        raise ConfigError(
            f"{source}: method {lacking.written!r} has no {what}; write it, or give prompts to measure it on at the "
            "start, e.g. `calibration: {path: prompts.jsonl, max_prompts: 8}`"
        )


def _checked_reward(criterion: ServedCriterion, prompts: Sequence[Prompt]) -> Files:
    """Requests bring a prompt and no further columns, which some rewards read."""
    files = check_reward(criterion.name, criterion.proxy, prompts)
    try:
        check_columns(criterion.name, criterion.proxy, [{"prompt": prompt} for prompt in prompts or ["a prompt"]])
    except RewardError as error:
        raise RewardError(
            f"criterion {criterion.name!r}: its reward reads more than prompt and answer, and a request to a server "
            f"brings no further columns; serve another reward ({error})"
        ) from error
    return files


def _check_gradients(
    config: ServeConfig,
    models: Sequence[Model],
    samplings: dict[str, Sampling],
    files: dict[str, PolicyFiles],
) -> None:
    for criterion in config.criteria:
        for policy, file in files.items():
            guided = [
                model.method
                for model in models
                if (model.policy, model.criterion) == (policy, criterion.name)
                and needs_gradient(model.method, samplings[policy])
            ]
            judged = EvaluationCriterion(name=criterion.name, proxy=criterion.proxy)
            side = policy_side(policy, file.tokenizer, file.eos_token_ids)
            check_gradients([judged], guided, [(criterion.name, side)])


# Keys. ----------------------------------------------------------------------------------------------------------------


def read_keys(keys: Keys | None, source: str) -> tuple[str, ...]:
    """The API keys; none where none are configured. Raises `ConfigError`, which shows no key."""
    if keys is None:
        return ()
    if keys.variable is not None:
        where, text = f"{source}: keys.variable {keys.variable}", os.environ.get(keys.variable, "")
        found = text.replace(",", " ").split()
        remedy = "put one or more keys into that variable, separated by blanks"
    else:
        assert keys.file is not None
        path = Path(keys.file)
        where, remedy = f"{source}: keys.file {keys.file!r}", "write one key a line"
        if not path.is_file():
            problem = "is no file" if path.exists() else "does not exist"
            raise ConfigError(f"{where} {problem}; make one with `openssl rand -hex 24 > {path.name}`")
        lines = [line.strip() for line in read_text(path, ConfigError).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            warnings.warn(f"{where} can be read by others on this machine; chmod 600", IamaWarning, stacklevel=2)
    if not found:
        raise ConfigError(f"{where} holds no key; {remedy}")
    for number, key in enumerate(found, start=1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"{where}: key {number} of {len(found)} must be at least {SHORTEST_KEY} letters, digits and signs "
                "without blanks; make one with `openssl rand -hex 24`"
            )
        if key[0] in QUOTES or key[-1] in QUOTES or NAMED.match(key):
            raise ConfigError(
                f"{where}: key {number} of {len(found)} has quotes or NAME= around it, which clients would have to "
                "send; write the key alone"
            )
    return tuple(dict.fromkeys(found))
