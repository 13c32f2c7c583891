"""`iama distill`: a reward model, or a value head of the policy, that learns the scores in a pool file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iama.cli.app import app, given_options, prepare
from iama.cli.as_json import print_json
from iama.cli.options import POOLS, AsJson, ChatTemplate, Device, Dtype
from iama.errors import ConfigError, DataError
from iama.progress import progress_bar

if TYPE_CHECKING:  # each command imports what it needs when it runs
    from iama.config.specs import PolicySpec
    from inference.engine.responses import Pool
    from trainers.value_head import HeadSettings

OF_REWARD = ("max_steps", "batch_size", "learning_rate")
OF_HEAD = ("rank", "ridge", "adapter", "chat_template", "dtype")
"""Options that only one of the two has a use for."""


@app.command(short_help="Train one reward model, or a value head, on the scores in a pool file.", rich_help_panel=POOLS)
def distill(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Pool file with several samples a prompt.", metavar="POOL")],
    column: Annotated[str, typer.Option(help="Scores to learn, e.g. an ensemble's; see iama score.")],
    out: Annotated[Path, typer.Option(help="New folder for the reward model or value head.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Language model or classifier of one output to begin with. Of a value head the policy, if it is not "
            "where the pool says."
        ),
    ] = None,
    value_head: Annotated[
        bool,
        typer.Option("--value-head", help="Fit a head that foretells the scores of the policy, for tilted_tokens."),
    ] = False,
    rank: Annotated[int, typer.Option(help="Of a value head: numbers that describe a token.", min=1)] = 16,
    ridge: Annotated[float, typer.Option(help="Of a value head: how far its numbers are held down.")] = 0.01,
    adapter: Annotated[str | None, typer.Option(help="Of a value head: the policy's, if not the pool's.")] = None,
    chat_template: ChatTemplate = None,
    dtype: Dtype = "float32",
    max_steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Pairs of answers a step.", min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW at its highest; then it falls as a cosine.")] = 1e-5,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that only judge the result.")] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Of the head, the pairs and the prompts that are held out.", min=0, max=2**32 - 1)
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a reward model on the margins between the scores of a prompt's samples, and judge it on other prompts.

    It costs one model, also where its teacher is an ensemble. All weights of the base are trained.

    With --value-head: fit what the policy's next token is worth, from its own samples, for
    iama generate --method tilted_tokens.

    Example: iama distill base.jsonl --column helpful --base runs/demo/world/policy --out runs/demo/rm-distilled
    --max-steps 300 --learning-rate 1e-3

    Example: iama distill base.jsonl --column helpful --value-head --out runs/demo/value/helpful
    """
    _check_options(given_options(context), value_head=value_head)
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} must lie between 0 and 1, e.g. 0.1")
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--learning-rate {learning_rate:g} must be positive and finite, e.g. 1e-5")
    if not 0 < ridge < float("inf"):
        raise ConfigError(f"--ridge {ridge:g} must be positive and finite, e.g. 0.01")
    prepare([base, adapter])
    from inference.pools.file import read_pool

    read = read_pool(file)
    if value_head:
        from trainers.value_head import HeadSettings

        _fit_head(
            file,
            read,
            _policy_of(read, file, base, adapter, chat_template, dtype, device),
            HeadSettings(column, rank, ridge, held_out, seed),
            out,
            as_json=as_json,
        )
        return
    assert base is not None
    scores = _column(read, column, file)
    from trainers.distill import DistillSettings
    from trainers.distill import distill as run

    settings = DistillSettings(base, column, max_steps, batch_size, learning_rate, held_out, seed, device)
    with progress_bar(f"distilling {column}", "steps", max_steps) as advance:
        result = run([prompt.prompt for prompt in read.prompts], read.texts, scores, settings, out, advance)
    if as_json:
        print_json("distill", reward_model=out, **asdict(result))
        return
    typer.echo(
        f"prompts: {result.num_trained} to learn from, {result.num_held_out} held out; {result.num_unscored} of "
        f"{result.num_pairs} pairs of answers lack a score and are left out"
    )
    typer.echo(
        f"loss: {result.first_loss:.3g} at first, {result.last_loss:.3g} in the end (squared margins, in units of the "
        f"scores' standard deviation within a prompt, {result.spread:.3g})"
    )
    typer.echo(f"held out: agreement {result.agreement:.3f}, R^2 of margins {result.r_squared:.3f}")
    typer.echo(f"reward model: {out}")


def _column(pool: Pool, name: str, file: Path) -> list[list[float]]:
    """Scores `[P][S]`, NaN where one is missing; raises `DataError` for a single sample or a column that is absent."""
    if len(pool.prompts[0].samples) < 2:
        raise DataError(f"{file} has one sample a prompt, which has no margins; draw several (iama pool --n 16)")
    for prompt in pool.prompts:
        for number, sample in enumerate(prompt.samples):
            if name not in sample.scores:
                columns = ", ".join(sorted(sample.scores)) or "none"
                raise DataError(
                    f"{file}: sample {number} of prompt {prompt.prompt_id!r} has no score {name!r} (there: {columns}); "
                    "add the column with `iama score`"
                )
    rows = [[sample.scores[name] for sample in prompt.samples] for prompt in pool.prompts]
    return [[float("nan") if score is None else score for score in row] for row in rows]


def _check_options(given: dict[str, object], *, value_head: bool) -> None:
    """Raise `ConfigError` for an option that has no use, and where --base is missing."""
    useless = next((name for name in (OF_REWARD if value_head else OF_HEAD) if name in given), None)
    if useless is not None:
        flag, told = f"--{useless.replace('_', '-')}", "with" if value_head else "without"
        raise ConfigError(f"{flag} {given[useless]} has no use {told} --value-head; drop one of the two")
    if not value_head and "base" not in given:
        raise ConfigError("--base is missing: the model to begin with; or add --value-head to fit one on the policy")


# A value head. ------------------------------------------------------------------------------------------


def _policy_of(
    pool: Pool,
    file: Path,
    base: str | None,
    adapter: str | None,
    chat_template: str | None,
    dtype: str,
    device: str,
) -> PolicySpec:
    """The policy that drew a pool; raises `DataError` where it is not known, or is not the one that is given."""
    from iama.config.schema import validate
    from iama.config.specs import PolicySpec
    from inference.engine.policy import policy_fingerprint

    known = pool.header["policy"]
    if pool.header["method"] is not None:
        raise DataError(
            f"{file} holds answers by {pool.header['method']}, and a value head learns from samples that the policy "
            "drew by itself; give a pool of iama pool"
        )
    if known["fingerprint"] is None or not (base or known["path"]) or pool.header["engine"] == "openai":
        raise DataError(
            f"{file} does not tell which local model drew it, and a value head stands on that; draw one with "
            "iama pool --policy DIR"
        )
    path = {"path": known["path"], "adapter": known["adapter"]} if base is None else {"path": base}
    given = {**path, **({} if adapter is None else {"adapter": adapter})}
    raw = {**given, "chat_template": chat_template, "dtype": dtype, "device": device}
    spec = validate(raw, PolicySpec, "command line")
    if policy_fingerprint(known["name"], spec) != known["fingerprint"]:
        where = spec.path if spec.adapter is None else f"{spec.path} with {spec.adapter}"
        raise DataError(
            f"{file} was drawn by another policy than {where} (weights, tokenizer, chat template or --dtype differ); "
            "give that which drew it with --base, --adapter, --chat-template and --dtype"
        )
    return spec


def _fit_head(file: Path, pool: Pool, spec: PolicySpec, settings: HeadSettings, out: Path, *, as_json: bool) -> None:
    """Fit, save and tell."""
    from iama.models.value_head import HeadPolicy
    from iama.prompts.conversations import render_prompts
    from iama.prompts.data import with_system_prompt
    from inference.engine.policy import load_policy
    from trainers.value_head import ScoredSamples, fit_value_head

    scores = _column(pool, settings.reward, file)
    for prompt in pool.prompts:
        if not all(sample.has_ids for sample in prompt.samples):
            raise DataError(
                f"{file}: prompt {prompt.prompt_id!r} has a sample without token_ids, and a value head learns from "
                "tokens; draw the pool with iama pool"
            )
    header = pool.header
    policy = load_policy(header["policy"]["name"], spec)
    prompts = [with_system_prompt(prompt.prompt, header["system_prompt"]) for prompt in pool.prompts]
    samples = ScoredSamples(
        prompts,
        render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, f"policy {policy.name!r}"),
        [[sample.token_ids for sample in prompt.samples] for prompt in pool.prompts],
        scores,
        sum(prompt.cost.flops for prompt in pool.prompts),
    )
    drawn = {"file": str(file), "sampling": header["sampling"], "system_prompt": header["system_prompt"]}
    whose = HeadPolicy.model_validate(header["policy"])
    with progress_bar(f"reading samples of {policy.name}", "prompts", len(prompts)) as advance:
        record = fit_value_head(policy.model, samples, whose, drawn, settings, out, advance)
    if as_json:
        print_json("distill", value_head=out, **record.model_dump(mode="json"))
        return
    fit, cost = record.held_out, record.cost
    typer.echo(
        f"prompts: {record.pool.num_prompts} to learn from, {record.pool.num_held_out} held out; "
        f"{record.pool.num_tokens} tokens"
    )
    typer.echo(
        f"held out: R^2 {fit.r_squared:.3f} ({fit.r_squared_within:.3f} within a prompt), Spearman {fit.spearman:.3f}"
    )
    typer.echo(
        f"cost: {cost.seconds:.1f} s, {(cost.hidden_flops + cost.fit_flops) / 1e9:.3g} GFLOPs, and "
        f"{cost.samples_flops / 1e9:.3g} GFLOPs for the samples"
    )
    typer.echo(f"value head: {out}; serve it with iama generate --method 'tilted_tokens(2, head={out})'")
