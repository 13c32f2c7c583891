"""`iama tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iama.cli.app import app, prepare
from iama.cli.as_json import print_json
from iama.cli.evaluate import model_paths, settings_from_file
from iama.cli.options import EVALUATE, AsJson
from iama.errors import ConfigError, RunError
from iama.files import check_folder, check_rewritable
from iama.nearest import meant
from iama.reading import read_json
from iama.tables import print_table, wide_console

if TYPE_CHECKING:
    from iama.config.files import EvaluationConfig
    from iama.config.methods import Tunable
    from inference.hedging.tuning_file import Calibration, TunedMethod

DEFAULT_METHODS = ("bon", "bop")
NUM_BOOTSTRAP = 1000
UNUSED = ("budgets=[1]", "trained_budget=1", "win_rate_baseline=null")


@app.command(short_help="Find how hard to push each proxy reward before gold falls.", rich_help_panel=EVALUATE)
def tune(
    pools: Annotated[list[Path] | None, typer.Option("--pool", help="Scored pool file. Repeatable.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Evaluation file (YAML) whose policies and rewards give the pools.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="With --config: override a key: a.b=c. Repeatable.")
    ] = None,
    criteria: Annotated[
        list[str] | None, typer.Option("--criterion", help="Else all that have gold scores. Repeatable.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="bon, bop, bop_zt, 'soft_bon(16)' or 'itp(16)'; else bon and bop. Repeatable."),
    ] = None,
    proxy_column: Annotated[str | None, typer.Option(help="With --pool: else NAME, the criterion's.")] = None,
    gold_column: Annotated[str | None, typer.Option(help="With --pool: else NAME/gold.")] = None,
    report_column: Annotated[
        str | None, typer.Option(help="With --pool: other gold scores, by which what was chosen is reported.")
    ] = None,
    max_budget: Annotated[
        int | None, typer.Option(help="Most draws to try; else a quarter of a prompt's scored samples.", min=2)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tuning.json.")] = Path("runs/tune"),
    as_json: AsJson = False,
) -> None:
    """Find how hard to push each proxy reward before gold falls, on calibration prompts with gold scores.

    Example: iama tune --pool base.jsonl --criterion helpful --method bon --method "soft_bon(16)" --out runs/tune

    Example: iama tune --config configs/demo-evaluate.yaml --set prompts.path=runs/demo/world/prompts-validation.jsonl
    """
    if (config is None) == (not pools):
        raise ConfigError("give --pool FILE for scored completions, or --config FILE to have them made (and not both)")
    check_folder(out, "--out")
    check_rewritable(out / "tuning.json")
    settings = None if config is None else _settings(config, overrides or [], criteria or [])
    tunables = _tunables(methods, settings)
    columns = {"proxy": proxy_column, "gold": gold_column, "report": report_column}
    _check_options(settings, columns, overrides)
    prepare([] if settings is None else model_paths(settings))
    from rich.console import Console

    from inference.evaluation.calibration import ColumnNames, for_tuning, scored_by_plan, scored_files, tuning_of
    from inference.evaluation.describe import judge_lines
    from inference.evaluation.plan import make_plan
    from inference.hedging.tuning_file import save_tuning

    if settings is None:
        scored = scored_files(pools or [], criteria or [], ColumnNames(**columns))
        num_bootstrap, seed = NUM_BOOTSTRAP, 0
    else:
        plan = make_plan(for_tuning(settings, out))
        for line in judge_lines(plan):
            typer.echo(line, err=True)
        scored = scored_by_plan(plan)
        num_bootstrap, seed = settings.num_bootstrap, settings.seed
    with Console(stderr=True).status("tuning"):
        tuning = tuning_of(scored, tunables, max_budget=max_budget, num_bootstrap=num_bootstrap, seed=seed)
    path = save_tuning(out, tuning)
    if as_json:
        print_json("tune", tuning_file=path, tuning=read_json(path, RunError, "run it again"))
        return
    for calibration in tuning.calibrations:
        _show(calibration)
    typer.echo(f"tuning: {path}")


def _settings(config: Path, overrides: list[str], criteria: list[str]) -> EvaluationConfig:
    """The evaluation without budgets, which the pools do not depend on; criteria as asked for, else those with gold."""
    settings = settings_from_file(config, [*overrides, *UNUSED])
    names = [c.name for c in settings.criteria]
    unknown = [name for name in criteria if name not in names]
    if unknown:
        raise ConfigError(
            f"--criterion {unknown[0]!r} is not in {config}; {meant(unknown[0], names)}choose among {', '.join(names)}"
        )
    wanted = [c for c in settings.criteria if c.name in (criteria or names)]
    if not criteria and any(c.gold is not None for c in wanted):
        for criterion in (c for c in wanted if c.gold is None):
            typer.echo(f"note: criterion {criterion.name!r} has no gold reward and is not tuned", err=True)
        wanted = [c for c in wanted if c.gold is not None]
    return settings.model_copy(update={"criteria": wanted})


def _tunables(methods: list[str] | None, settings: EvaluationConfig | None) -> list[Tunable]:
    """What to tune: the flags, else what the file's methods leave to be tuned, else the default."""
    from iama.config.methods import find_tunable, read_tunable

    if methods:
        tunables = [read_tunable(method) for method in methods]
    else:
        left = [find_tunable(method) for method in ([] if settings is None else settings.methods)]
        tunables = [tunable for tunable in left if tunable is not None] or [read_tunable(m) for m in DEFAULT_METHODS]
    return list(dict.fromkeys(tunables))


def _check_options(
    settings: EvaluationConfig | None, columns: dict[str, str | None], overrides: list[str] | None
) -> None:
    """Raise `ConfigError` for options that have no use with what is given."""
    if settings is None and overrides:
        raise ConfigError(f"--set {overrides[0]!r} belongs to --config; with --pool there is nothing to set")
    given = [name for name, column in columns.items() if column is not None]
    if settings is not None and given:
        raise ConfigError(
            f"--{given[0]}-column {columns[given[0]]!r} belongs to --pool; with --config the criterion's rewards count"
        )


# What is shown. ----------------------------------------------------------------------------------------


def _show(calibration: Calibration) -> None:
    _print_table(calibration)
    left_out = f" ({calibration.num_left_out} left out)" if calibration.num_left_out else ""
    seconds = sum(method.seconds for method in calibration.methods.values())
    drawing = calibration.generation_seconds
    typer.echo(
        f"{len(calibration.prompt_ids)} prompts{left_out} x {calibration.num_samples} samples, "
        f"{calibration.num_missing} of them without all scores; tuning took {seconds:.1f} s"
        + ("" if drawing is None else f", drawing the samples {drawing:.1f} s")
    )
    at_end = 1 < calibration.safe_samples == calibration.safe_searched
    safe = f"at least {calibration.safe_samples} (end of the search)" if at_end else str(calibration.safe_samples)
    correlation = f"{calibration.correlation:.2f} ({_interval(calibration.correlation_ci95, '.2f')})"
    typer.echo(
        f"corr(proxy, gold) = {correlation}: largest n with a guaranteed gold gain: {safe} (conservative: "
        "for the worst gold reward of the lowest correlation)"
    )


def _print_table(calibration: Calibration) -> None:
    """A row a method."""
    title = f"{calibration.policy.name}, {calibration.criterion.name}: best by gold"
    heads = ["samples", "gold", "gain", *(["gain by report"] if calibration.criterion.report is not None else [])]
    rows = [_cells(name, method) for name, method in calibration.methods.items()]
    print_table(wide_console(), title, ("method", "best", "hacking"), heads, rows)


def _cells(name: str, method: TunedMethod) -> list[str]:
    result, report = method.result, method.report
    gains = [f"{result.gain:+.3f} ({_interval(result.gain_ci95, '+.3f')})"]
    if report is not None:
        gains.append(f"{report.gold - report.single:+.3f} ({_interval(report.gain_ci95, '+.3f')})")
    gold = f"{result.gold:.3f} ({_interval(result.gold_ci95, '.3f')})"
    short = name.replace("(tuned)", "").replace(", tuned", "")
    return [short, result.written, _hacking(method), f"{method.draws:.3g}", gold, *gains]


def _interval(ends: tuple[float, float], form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def _hacking(method: TunedMethod) -> str:
    """Where gold falls, in a few words; the threshold is in samples where the number of samples is what is tuned."""
    result = method.result
    by_samples = result.knob in ("n", "mu", "lam")
    if result.regime == "never hacks":
        last = result.curve[-1]
        limit = f"up to {last.samples:.3g} samples" if by_samples else f"down to {last.knob:.3g} {result.knob}"
        return f"never, {limit}"
    if result.regime == "flat":
        return "none, gold is flat"
    if result.threshold is None:
        return f"{result.regime}, then rises again"
    unit = "samples" if by_samples else result.knob
    is_sure = result.loss_at_max_ci95[0] > 0  # else gold falls in the mean alone
    ends = ""
    if result.threshold_ci95 is not None:
        ends = f" ({_interval(result.threshold_ci95, '.3g')}{'' if is_sure else ' or never'})"
    always = "always, " if is_sure and result.regime == "always hacks" else ""
    return f"{always}from {result.threshold:.3g} {unit}{ends}"
