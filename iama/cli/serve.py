"""`iama serve`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama.cli.app import app, manifest_of, named_reward, note_differences, prepare, warn_of_backslashes
from iama.cli.generate import check_trained_operator, manifest_operator, manifest_reward
from iama.cli.options import ANSWER, ChatTemplate, Overrides, TrustRemoteCode
from iama.errors import ConfigError
from iama.stderr import log_to_stderr

if TYPE_CHECKING:
    from iama.config.manifest import Manifest, ManifestCriterion
    from iama.config.serving import ServeConfig
    from iama.config.specs import PolicySpec

COMMAND_LINE = "command line"
"""The source of settings that no file holds."""
INSTALL = "iama serve needs starlette and uvicorn; pip install 'iama[serve]'"


@app.command(short_help="Serve policies, criteria and methods behind the API of OpenAI.", rich_help_panel=ANSWER)
def serve(
    config: Annotated[Path | None, typer.Option(help="Serving file (YAML).")] = None,
    overrides: Overrides = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="Without --config: model directory, or exported adapter; NAME=DIR names it. Repeatable."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory to put on the policy.")] = None,
    chat_template: ChatTemplate = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option("--reward", help="With --policy: CRITERION=DIR, or CRITERION=file.py:function. Repeatable."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="With --policy: what is served, as iama generate takes it. Repeatable."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    host: Annotated[
        str | None, typer.Option(help="Else 127.0.0.1; another one needs API keys: --set keys.file=FILE.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Else 8000; 0: any that is free.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, load no weights, print the models.")
    ] = False,
) -> None:
    """Serve policies, each criterion under its methods, behind the API of OpenAI, with a page at /.

    Example: iama serve --config configs/demo-serve.yaml

    Example: iama serve --policy runs/demo/merged --reward helpful=runs/demo/world/rm-helpful --method "bon(4)"

    Example: iama serve --policy runs/demo/merged --host 0.0.0.0 --set keys.file=keys.txt --set limits.n=16
    """
    _check_installed()
    placed = {key: value for key, value in {"host": host, "port": port}.items() if value is not None}
    if config is not None:
        own = {
            "--policy": policies,
            "--adapter": adapter,
            "--reward": rewards,
            "--method": methods,
            "--chat-template": chat_template,
            "--trust-remote-code": trust_remote_code,
        }
        given = next((flag for flag, value in own.items() if value), None)
        if given is not None:
            raise ConfigError(f"{given} and --config {str(config)!r} both say what is served; write it into the file")
        settings, source = (
            _from_file(config, [*(overrides or []), *(f"--{k}={v}" for k, v in placed.items())]),
            str(config),
        )
    else:
        if not policies:
            raise ConfigError("give --config FILE, or --policy DIR with --reward CRITERION=DIR")
        named = {"adapter": adapter, "chat_template": chat_template, "trust_remote_code": trust_remote_code}
        settings = _from_flags(policies, named, rewards or [], methods or [], placed, overrides or [])
        source = COMMAND_LINE
    settings = _with_criteria(settings, source)
    for name, spec in settings.policies.items():
        _note(name, spec, settings)
    prepare(_model_paths(settings))
    settings = _with_operators(settings, source)
    _serve(settings, source, dry_run)


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ConfigError(INSTALL)


def _serve(settings: ServeConfig, source: str, dry_run: bool) -> None:
    """Check, load, and serve until the end."""
    if dry_run:
        from inference.serving.plan import make_plan

        plan = make_plan(settings, source)
        for model in plan.models:
            number = f" = {model.method.text}" if "tuned" in model.written else ""
            typer.echo(f"{model.id}{number}")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        where = f"http://{host}:{settings.port}" if settings.port else f"http://{host}, any free port"
        typer.echo(f"dry run: all checks passed; to be served: {plan.describe()}, at {where}")
        return
    from inference.serving.engine_process import EngineProcess
    from inference.serving.listening import bind

    log_to_stderr()
    with bind(settings) as taken, EngineProcess(settings, source) as process:
        from inference.serving.run import run  # while the other process loads

        run(settings, process, taken)


def _from_file(config: Path, overrides: list[str]) -> ServeConfig:
    from iama.config.schema import load_config
    from iama.config.serving import ServeConfig

    settings = load_config(config, ServeConfig, overrides)
    warn_of_backslashes(settings.sampling.stop, f"{config}: stop {{!r}}", 'in YAML write "{}", in double quotes,')
    return settings


def _from_flags(
    policies: list[str],
    named: dict[str, Any],
    rewards: list[str],
    methods: list[str],
    placed: dict[str, Any],
    overrides: list[str],
) -> ServeConfig:
    from iama.config.schema import apply_override, validate
    from iama.config.serving import ServeConfig

    if len(policies) > 1 and (flag := next((key for key, value in named.items() if value), None)):
        raise ConfigError(
            f"--{flag.replace('_', '-')} belongs to one policy, and --policy names {len(policies)}; write a file for "
            "--config"
        )
    served: dict[str, Any] = {}
    for policy in policies:
        name, path = _named(policy, named["adapter"])
        if name in served:
            raise ConfigError(f"--policy {policy!r}: {name!r} is served already; name it, as --policy OTHER={path}")
        served[name] = {"path": path, **named}
    criteria = []
    for text in rewards:
        criterion, equals, reward = text.partition("=")
        if not (criterion and equals and reward):
            raise ConfigError(f"--reward {text!r}: write CRITERION=DIR, e.g. --reward helpful={text}")
        criteria.append({"name": criterion, "proxy": named_reward(reward, None, {}).model_dump(exclude_unset=True)})
    raw: dict[str, Any] = {"policies": served, "criteria": criteria, **placed}
    if methods:
        raw["methods"] = methods
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, ServeConfig, "command line", overrides)


def _named(policy: str, adapter: str | None) -> tuple[str, str]:
    """Name and path of a `--policy`: NAME=DIR, or DIR, which is named by its folder."""
    from iama.config.serving import NAME

    name, equals, path = policy.partition("=")
    if not equals or Path(policy).exists():
        folder = Path(adapter or policy).resolve()
        name = folder.parent.name if folder.name == "adapter" else folder.name  # that of a run
        return name if NAME.fullmatch(name) else "policy", policy
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--policy {policy!r}: the name {name!r} is part of a model's id; write letters, digits, and . _ - between "
            f"them, e.g. --policy base={path}"
        )
    return name, path


def _manifest(settings: ServeConfig) -> tuple[str, Manifest] | None:
    """The first policy with an `iama.json`, and what that says."""
    for name, spec in settings.policies.items():
        manifest = manifest_of(spec.path, spec.adapter)
        if manifest is not None:
            return name, manifest
    return None


def _with_criteria(settings: ServeConfig, source: str) -> ServeConfig:
    """Criteria that are left out, as `iama.json` has them; no code of a stranger is run.

    Of those that flags name, a line on stderr says which of `iama.json` they leave out.
    """
    from iama.config.schema import validate
    from iama.config.serving import ServeConfig

    found = _manifest(settings)
    if found is None:
        return settings
    name, manifest = found
    if settings.criteria:
        served = {criterion.name for criterion in settings.criteria}
        left_out = [c.name for c in manifest.criteria if c.name not in served]
        if left_out and source == COMMAND_LINE:
            told = f"{', '.join(left_out)} of the iama.json of policy {name!r} not served; --reward NAME=DIR adds one"
            sys.stderr.write(f"note: {told}\n")
        return settings
    remedy = _remedy(manifest, source)
    criteria = [
        {"name": c.name, "proxy": manifest_reward(c, remedy).model_dump(exclude_unset=True)} for c in manifest.criteria
    ]
    sys.stderr.write(f"note: criteria as in the iama.json of policy {name!r}\n")
    return validate(settings.model_dump(exclude_unset=True) | {"criteria": criteria}, ServeConfig, source)


def _remedy(manifest: Manifest, source: str) -> str:
    """How to name all criteria of an `iama.json` by hand: by flags, where these can say what their rewards are."""
    names = ", ".join(c.name for c in manifest.criteria)
    if source != COMMAND_LINE:
        return f"write all criteria into {source}: {names}"
    flags = []
    for c in manifest.criteria:
        value = c.reward.model or c.reward.function
        if value is None or c.reward != type(c.reward).model_validate({c.reward.source: value}):
            return f"write a file for --config with all criteria: {names}"
        flags.append(f"--reward {shlex.quote(f'{c.name}={value}')}")
    return f"name all: {' '.join(flags)}"


def _with_operators(settings: ServeConfig, source: str) -> ServeConfig:
    """What serves a criterion where nothing is written: what `iama.json` says that it was trained for."""
    from iama.config.schema import validate
    from iama.config.serving import ServeConfig

    found = _manifest(settings)
    if found is None or settings.methods is not None:
        return settings
    name, manifest = found
    raw, known = settings.model_dump(exclude_unset=True), [c.name for c in manifest.criteria]
    for criterion in raw["criteria"]:
        if criterion.get("methods") is None and criterion["name"] in known:
            criterion["methods"] = [
                _operator(manifest.criteria[known.index(criterion["name"])], settings.policies[name])
            ]
    return validate(raw, ServeConfig, source)


def _operator(criterion: ManifestCriterion, spec: PolicySpec) -> str:
    """What a criterion was trained for, where a sampler serves it."""
    from inference.samplers.serve import read_method

    operator = manifest_operator(criterion)
    check_trained_operator(read_method(operator), criterion.name, spec.adapter or spec.path)
    return operator


def _note(name: str, spec: PolicySpec, settings: ServeConfig) -> None:
    """Where the sampling that the configuration writes is not that of training, and what requests must bring."""
    manifest = manifest_of(spec.path, spec.adapter)
    if manifest is not None:
        written = {key: getattr(settings.sampling, key) for key in settings.sampling.model_fields_set}
        note_differences(manifest, manifest.sampling.model_copy(update=written), f"policy {name!r}: ")
        if manifest.system_prompt is not None:
            told = f"trained after the system prompt {manifest.system_prompt!r}, which requests must bring"
            sys.stderr.write(f"note: policy {name!r}: {told}\n")


def _model_paths(settings: ServeConfig) -> list[str | None]:
    """Whatever may be a folder here, or else a name on the hub."""
    paths = [path for spec in settings.policies.values() for path in (spec.path, spec.adapter)]
    rewards = [part.looked_up for criterion in settings.criteria for part in criterion.proxy.parts]
    return [*paths, *rewards, None if settings.calibration is None else settings.calibration.path]
