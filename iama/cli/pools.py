"""`iama pool`, `iama score` and `iama merge`: files of completions with their scores."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama.cli.app import app, manifest_of, note_differences, prepare
from iama.cli.generate import reward_spec, sampling_of
from iama.cli.options import MaxNewTokens, MinP, RepetitionPenalty, Stop, Temperature, TopK, TopP
from iama.errors import ConfigError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iama.config.specs import PromptsSpec, RewardSpec, Sampling
    from iama.rewards.judge import Judge
    from inference.engine.responses import Pool
    from inference.pools.fill import Draw

ENGINES = ("transformers", "vllm", "openai")
TIMEOUT_S, NUM_RETRIES = 600.0, 4


@dataclass(frozen=True)
class Order:
    """What is to be sampled, whichever the engine."""

    name: str
    rows: list[dict[str, Any]]
    system_prompt: str | None
    sampling: Sampling
    num_samples: int
    seed: int


@app.command()
def pool(
    out: Annotated[Path, typer.Argument(help="Pool file to write; one that a kill left unfinished is completed.")],
    prompts: Annotated[str, typer.Option(help="A .jsonl, .json, .csv or .parquet file, or a dataset (org/name).")],
    n: Annotated[int, typer.Option(help="Samples a prompt.", min=1)],
    policy: Annotated[str | None, typer.Option(help="Model directory, or an exported adapter.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory to put on the policy.")] = None,
    name: Annotated[str | None, typer.Option(help="The policy's name in the file; else its folder's.")] = None,
    engine: Annotated[str, typer.Option(help="transformers, vllm, or openai (any compatible server).")] = ENGINES[0],
    url: Annotated[str | None, typer.Option(help="Of the server, e.g. http://localhost:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The server's name for the model.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Variable with the server's key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Ours=theirs, e.g. prompt=question. Repeatable.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="The first so many prompts.", min=1)] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Before every prompt; rewards do not see it.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option(help="With transformers the same seed gives the same samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows that transformers decodes together.", min=1)] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    shard: Annotated[str | None, typer.Option(help="i/n: that part of the prompts only; see iama merge.")] = None,
) -> None:
    """Sample many completions of every prompt into a file, for iama score and iama evaluate.

    Example: iama pool base.jsonl --prompts runs/demo/world/prompts-test.jsonl --policy runs/demo/world/policy --n 64

    Example: iama pool big.jsonl --prompts test.jsonl --n 64 --engine openai --url http://localhost:8000/v1 --model big
    """
    _check_engine(engine, policy, url, model)
    manifest = None if policy is None else manifest_of(policy, adapter)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": stop or None}
    given |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    sampling = sampling_of(given, manifest)
    note_differences(manifest, sampling)
    source = _prompts_spec(prompts, subset, split, column or [], max_prompts)
    name = name or Path(adapter or policy or model or "").name
    prepare([policy, adapter, prompts])
    from iama.prompts.data import read_prompts
    from inference.evaluation.shards import parse_shard
    from inference.pools.fill import fill_pool

    part = None if shard is None else parse_shard(shard)
    rows = read_prompts(source)
    order = Order(name, rows, system_prompt, sampling, n, seed)
    if engine == "openai":
        header, draw = _remote(order, url or "", model or "", api_key_env, concurrency)
    else:
        spec = {"path": policy, "adapter": adapter, "device": device, "dtype": dtype}
        header, draw = _local(order, engine, spec, batch_size)
    indices = list(range(len(rows))) if part is None else part.indices(len(rows))
    with progress_bar(f"sampling {name}, {n} a prompt", "prompts", len(indices)) as advance:
        filled = fill_pool(out, header, rows, draw, advance, indices)
    typer.echo(f"pool: {out}: {_described(filled)}")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="Pool file to add a column to.", metavar="POOL")],
    column: Annotated[str, typer.Option(help="Name of the column: the criterion's, or for its gold reward NAME/gold.")],
    reward: Annotated[str | None, typer.Option(help="Classifier directory, or file.py:function.")] = None,
    head: Annotated[str | None, typer.Option(help="Output of a classifier with several, by label.")] = None,
    spec: Annotated[Path | None, typer.Option(help="A reward as YAML, for judges and verifiers too.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a column of that name.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Score every completion of a pool file and add the scores to it as a column. Killed, run again, it resumes.

    By convention a column is named like the criterion whose proxy reward it is, and that of the gold reward has /gold
    behind it: helpful, helpful/gold. Of an ensemble, a column with /disagreement behind its name holds the standard
    deviation over the members.

    Example: iama score base.jsonl --reward runs/demo/world/rm-helpful --column helpful
    """
    wanted = scoring_spec(reward, head, spec, {"device": device, "dtype": dtype})
    prepare([part.model for part in wanted.parts])
    from inference.pools.file import read_pool
    from inference.pools.fill import DISAGREEMENT, add_column

    read = read_pool(file)
    for name in [column] + [column + DISAGREEMENT] * (wanted.ensemble is not None):
        if not replace and any(name in sample.scores for prompt in read.prompts for sample in prompt.samples):
            raise ConfigError(f"{file} has a column {name!r} already; give --replace, or another --column")
    from iama.rewards.reward import load_reward
    from inference.evaluation.reward_checks import check_signature

    for part in wanted.parts:
        if part.function is not None:
            check_signature(column, part.function, set(read.prompts[0].columns))
    loaded = load_reward(column, wanted, missing_ok=True)
    for member in [loaded] if loaded.ensemble is None else loaded.ensemble.members:
        if member.judge is not None:
            typer.echo(f"{member.name}: {_judge_line(read, member.judge)}", err=True)
    with progress_bar(f"scoring {column}", "prompts", len(read.prompts)) as advance:
        values_PS = add_column(file, read, column, loaded, wanted, advance)
    import numpy as np

    missing = int(np.isnan(values_PS).sum())
    typer.echo(
        f"{column}: mean {np.nanmean(values_PS):.4g}, standard deviation {np.nanstd(values_PS):.4g}, "
        f"{missing} of {values_PS.size} scores missing"
    )


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Pool file to write.")],
    files: Annotated[list[Path], typer.Argument(help="Pool files with parts of the prompts.", metavar="POOL...")],
) -> None:
    """Put pool files with parts of the prompts together, such as those of iama pool --shard.

    Example: iama merge base.jsonl base-1.jsonl base-2.jsonl
    """
    if out.exists():
        raise RunError(f"{out} exists already; give another name for the merged pool, or delete it")
    from inference.pools.file import merge_pools, write_pool

    merged = merge_pools(files)
    write_pool(out, merged)
    typer.echo(f"pool: {out}: {_described(merged)}")


def _check_engine(engine: str, policy: str | None, url: str | None, model: str | None) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r} is not known; write {', '.join(ENGINES)}")
    wanted = {"--url": url, "--model": model} if engine == "openai" else {"--policy": policy}
    for flag, value in wanted.items():
        if value is None:
            raise ConfigError(f"--engine {engine} needs {flag}")
    for flag, value in {"--policy": policy, "--url": url, "--model": model}.items():
        if value is not None and flag not in wanted:
            raise ConfigError(f"{flag} {value!r} has no use with --engine {engine}; drop it, or choose another engine")


def _prompts_spec(
    path: str, subset: str | None, split: str | None, columns: list[str], max_prompts: int | None
) -> PromptsSpec:
    from iama.config.schema import validate
    from iama.config.specs import PromptsSpec

    named = {}
    for text in columns:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--column {text!r}: write ours=theirs, e.g. prompt=question")
        named[ours] = theirs
    raw = {"path": path, "subset": subset, "split": split, "columns": named, "max_prompts": max_prompts}
    return validate(raw, PromptsSpec, "command line")


def _local(order: Order, engine: str, raw: dict[str, Any], batch_size: int) -> tuple[dict[str, Any], Draw]:
    """Header and draw of a policy that runs in this process; prompts that do not fit are refused here."""
    from iama.config.schema import validate
    from iama.config.specs import PolicySpec
    from iama.prompts.data import with_system_prompt
    from iama.prompts.render import render_prompt
    from inference.engine.policy import load_tokenizer
    from inference.engine.responses import check_fit
    from inference.pools.engines import vllm_draw
    from inference.pools.fill import pool_header, transformers_draw

    spec = validate(raw, PolicySpec, "command line")
    given = (order.name, spec, order.system_prompt, order.num_samples, order.sampling, order.seed)
    draw = vllm_draw(*given) if engine == "vllm" else transformers_draw(*given, batch_size)
    tokenizer, context_length = load_tokenizer(order.name, spec)
    prompts = [with_system_prompt(row["prompt"], order.system_prompt) for row in order.rows]
    ids = [render_prompt(tokenizer, prompt) for prompt in prompts]
    check_fit(order.name, tokenizer, context_length, ids, order.sampling)
    settings = (order.system_prompt, engine, order.sampling, order.num_samples, order.seed)
    return pool_header(order.name, spec, *settings), draw


def _remote(order: Order, url: str, model: str, api_key_env: str, concurrency: int) -> tuple[dict[str, Any], Draw]:
    """Header and draw of a server's model, which is known by its name and address only."""
    from iama.rewards.remote import Endpoint
    from inference.pools.engines import openai_draw
    from inference.pools.fill import engine_header

    endpoint = Endpoint(url, model, api_key_env, TIMEOUT_S, NUM_RETRIES, concurrency, "--engine openai")
    policy = {"name": order.name, "path": model, "fingerprint": f"{model} at {url}"}
    settings = (order.system_prompt, "openai", order.sampling, order.num_samples, order.seed)
    draw = openai_draw(endpoint, order.sampling, order.num_samples, order.seed, order.system_prompt)
    return engine_header(policy, *settings), draw


def scoring_spec(reward: str | None, head: str | None, spec: Path | None, placement: dict[str, str]) -> RewardSpec:
    """The reward, from the flags or the file."""
    from iama.config.schema import load_config
    from iama.config.specs import RewardSpec

    if (reward is None) == (spec is None):
        raise ConfigError("give --reward DIR or file.py:function, or --spec FILE (and not both)")
    if spec is not None:
        if head is not None:
            raise ConfigError(f"--head {head!r} belongs to --reward; write it into {spec}")
        wanted = load_config(spec, RewardSpec)
    else:
        found = reward_spec(reward, head, placement, None, None)
        assert found is not None
        wanted = found
    if wanted.column is not None:
        raise ConfigError(f"{spec}: column {wanted.column!r} is no reward that can score; the file has it already")
    return wanted


def _judge_line(pool: Pool, judge: Judge) -> str:
    """What the judge will be asked, each distinct text of a prompt once, and what that costs at most."""
    from iama.prompts.render import as_completion, prompt_text
    from iama.rewards.judge import judge_plan

    pairs = [(prompt, text) for prompt in pool.prompts for text in dict.fromkeys(s.text for s in prompt.samples)]
    names = {name for prompt in pool.prompts for name in prompt.columns}
    columns = {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names}
    prompts = [prompt.prompt for prompt, _ in pairs]
    completions = [as_completion(prompt.prompt, text) for prompt, text in pairs]
    _, num_cached = judge.count_requests(prompts, completions, **columns)
    num_chars = sum(len(prompt_text(prompt.prompt)) + len(text) for prompt, text in pairs)
    return judge_plan(judge.spec, len(pairs), num_chars / len(pairs), num_cached)


def _described(pool: Pool) -> str:
    """Size, lengths as far as they are known, and what was cut."""
    samples = [sample for prompt in pool.prompts for sample in prompt.samples]
    known = [sample.num_tokens for sample in samples if sample.num_tokens is not None]
    cut = sum(sample.finish_reason == "length" for sample in samples)
    length = f", {sum(known) / len(known):.1f} tokens a sample" if known else ""
    return f"{len(pool.prompts)} prompts x {pool.header['num_samples']} samples{length}, {cut} cut at max_new_tokens"


@contextmanager
def progress_bar(description: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with count, rate and time left; yields what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    rate = TextColumn("{task.fields[rate]}")
    remaining = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    with Progress(*columns, rate, remaining, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[task].speed
            progress.update(task, rate="" if speed is None else f"{speed:,.1f}/s")

        yield advance
