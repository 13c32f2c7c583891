"""`iama pool`: sample many completions of every prompt into a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama.cli.app import (
    app,
    cluster_of,
    given_options,
    manifest_of,
    note_differences,
    prepare,
    sampling_of,
    spread_over,
    system_prompt_of,
    tell_pool,
    vllm_options,
)
from iama.cli.options import (
    POOLS,
    AsJson,
    ChatTemplate,
    Device,
    Dtype,
    MaxNewTokens,
    MinP,
    Ray,
    RayGpusPerWorker,
    RayWorkers,
    RepetitionPenalty,
    Stop,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    VllmOptions,
)
from iama.errors import ConfigError
from iama.nearest import meant
from iama.progress import progress_bar

if TYPE_CHECKING:  # each command imports what it needs when it runs
    from iama.config.specs import PromptsSpec, Sampling
    from inference.pools.engines import Draw

ENGINES = ("transformers", "vllm", "openai")
_HERE, _SERVER = ENGINES[:2], ENGINES[2:]
ENGINES_OF = {
    **dict.fromkeys(("policy", "adapter", "chat_template", "trust_remote_code", "device", "dtype"), _HERE),
    **dict.fromkeys(("url", "model", "api_key_env", "concurrency", "timeout_s", "num_retries"), _SERVER),
    "batch_size": ("transformers",),
    "vllm": ("vllm",),
}
"""Which engines have a use for an option, where not all have."""


@dataclass(frozen=True)
class Order:
    """What is to be sampled, whichever the engine."""

    name: str
    rows: list[dict[str, Any]]
    system_prompt: str | None
    sampling: Sampling
    num_samples: int
    seed: int


@app.command(short_help="Sample many completions of every prompt into a file.", rich_help_panel=POOLS)
def pool(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Argument(
            help="Pool file to write (.jsonl, .jsonl.gz, .jsonl.zst, .parquet). What a kill left is completed."
        ),
    ],
    prompts: Annotated[str, typer.Option(help="A .jsonl, .json, .csv or .parquet file, or a dataset (org/name).")],
    n: Annotated[int, typer.Option(help="Samples a prompt.", min=1)],
    policy: Annotated[str | None, typer.Option(help="Model directory, or an exported adapter.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory to put on the policy.")] = None,
    chat_template: ChatTemplate = None,
    name: Annotated[str | None, typer.Option(help="The policy's name in the file; else its folder's.")] = None,
    engine: Annotated[str, typer.Option(help="transformers, vllm, or openai (any compatible server).")] = ENGINES[0],
    vllm: VllmOptions = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="Of the server, e.g. http://localhost:8000/v1. Repeat it for several of one model."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The server's name for the model.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Variable with the server's key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 8,
    timeout_s: Annotated[float, typer.Option(help="Seconds for an attempt, from request to whole reply.")] = 600.0,
    num_retries: Annotated[int, typer.Option(help="Further attempts where the server is overloaded.", min=0)] = 4,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="A parameter that the server refuses: temperature, max_tokens, seed or n. Repeatable."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Ours=theirs, e.g. prompt=question. Repeatable.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="The first so many prompts.", min=1)] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Before every prompt; rewards do not see it. Else that of iama.json; '': none.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option(help="With transformers the same seed gives the same samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows that transformers decodes together.", min=1)] = 256,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    shard: Annotated[str | None, typer.Option(help="i/n: that part of the prompts only; see iama merge.")] = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_gpus_per_worker: RayGpusPerWorker = None,
    as_json: AsJson = False,
) -> None:
    """Sample many completions of every prompt into a file, for iama score and iama evaluate.

    Example: iama pool base.jsonl --prompts runs/demo/world/prompts-test.jsonl --policy runs/demo/world/policy --n 64

    Example: iama pool big.jsonl --prompts test.jsonl --n 64 --engine openai --url http://localhost:8000/v1 --model big

    Example: iama pool big.jsonl --prompts test.jsonl --policy models/big --n 64 --ray 10.0.0.1:6379 --ray-workers 8
    """
    _check_ray(ray, engine, shard)
    _check_engine(engine, given_options(context))
    if not 0 < timeout_s < math.inf:
        raise ConfigError(f"--timeout-s {timeout_s}: write a number of seconds above 0")
    manifest = None if policy is None else manifest_of(policy, adapter)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": stop or None}
    given |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    _check_left_out(leave_out or [], engine, given)
    sampling = sampling_of(given, manifest)
    note_differences(manifest, sampling)
    system_prompt = system_prompt_of(system_prompt, manifest)
    source = _prompts_spec(prompts, subset, split, column or [], max_prompts)
    name = name or Path(adapter or policy or model or "").name
    prepare([policy, adapter, prompts])
    cluster = cluster_of(ray, ray_workers, ray_gpus_per_worker)
    from iama.prompts.data import read_prompts
    from inference.evaluation.shards import parse_shard
    from inference.pools.engines import spread_draw
    from inference.pools.fill import fill_pool

    part = None if shard is None else parse_shard(shard)
    rows = read_prompts(source)
    order = Order(name, rows, system_prompt, sampling, n, seed)
    if engine == "openai":
        asked = {"timeout_s": timeout_s, "num_retries": num_retries, "concurrency": concurrency}
        header, begin = _remote(order, tuple(url or ()), model or "", api_key_env, asked, tuple(leave_out or ()))
    else:
        spec: dict[str, Any] = {"path": policy, "adapter": adapter, "device": device, "dtype": dtype}
        spec |= {"engine": engine, "vllm": vllm_options(vllm)}
        spec |= {"chat_template": chat_template, "trust_remote_code": trust_remote_code}
        header, begin = _local(order, spec, batch_size)
    if part is not None:
        header["part"] = {"index": part.index, "count": part.count, "num_prompts": len(rows)}
    indices = list(range(len(rows))) if part is None else part.indices(len(rows))
    with spread_over(cluster) as spread, progress_bar(f"sampling {name}, {n} a prompt", "prompts", len(indices)) as bar:
        filled = fill_pool(out, header, rows, spread_draw(spread, begin), bar, indices)
    tell_pool("pool", out, filled, as_json=as_json)


def _check_ray(address: str | None, engine: str, shard: str | None) -> None:
    if address is None:
        return
    if engine == "openai":
        raise ConfigError(
            f"--ray {address} has no use with --engine openai: the server does the work; drop one of them"
        )
    if shard is not None:
        raise ConfigError(f"--ray {address} shares the work out over a cluster, --shard {shard} by hand; give one")


def _check_engine(engine: str, given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an engine without its options, or with those of another, which it would not look at."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r} is not known; {meant(engine, ENGINES)}write {', '.join(ENGINES)}")
    for option in ("url", "model") if engine == "openai" else ("policy",):
        if option not in given:
            raise ConfigError(f"--engine {engine} needs {_flag(option)}")
    for option, value in given.items():
        if engine not in ENGINES_OF.get(option, ENGINES):
            written = ", ".join(value) if isinstance(value, list) else value
            told = _flag(option) if value is True else f"{_flag(option)} {written!r}"
            raise ConfigError(f"{told} has no use with --engine {engine}; drop it, or choose another engine")


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


def _local(order: Order, raw: dict[str, Any], batch_size: int) -> tuple[dict[str, Any], Callable[[], Draw]]:
    """Header of a policy that is loaded, and what loads and draws; prompts that do not fit are refused here."""
    from iama.config.schema import validate
    from iama.config.specs import PolicySpec
    from iama.prompts.conversations import render_prompts
    from iama.prompts.data import with_system_prompt
    from inference.engine.policy import read_policy_files
    from inference.engine.responses import check_fit
    from inference.pools.engines import local_draw
    from inference.pools.fill import draw_alike, pool_header

    spec = validate(raw, PolicySpec, "command line")
    given = (order.name, spec, order.system_prompt, order.num_samples, order.sampling, order.seed, batch_size)
    local_draw(*given)  # whatever it refuses
    tokenizer, context_length, ends = read_policy_files(order.name, spec)
    prompts = [with_system_prompt(row["prompt"], order.system_prompt) for row in order.rows]
    ids = render_prompts(tokenizer, prompts, ends, f"policy {order.name!r}")
    check_fit(order.name, tokenizer, context_length, ids, order.sampling)
    settings = (order.system_prompt, spec.engine, order.sampling, order.num_samples, order.seed)
    header = pool_header(order.name, spec, *settings)
    return header, partial(draw_alike, header, spec, partial(local_draw, *given, ids))


def _remote(
    order: Order, urls: tuple[str, ...], model: str, api_key_env: str, asked: dict[str, Any], leave_out: tuple[str, ...]
) -> tuple[dict[str, Any], Callable[[], Draw]]:
    """Header and draw of a model on servers, which is known by its name and their addresses only."""
    from iama.config.specs import LAW
    from iama.rewards.remote import Endpoint
    from inference.pools.engines import openai_draw
    from inference.pools.fill import engine_header

    source = "--engine openai"
    endpoint = Endpoint(urls, model, api_key_env, **asked, source=source, leave_out=leave_out, setting=_flag)
    policy = {"name": order.name, "path": model, "fingerprint": f"{model} at {', '.join(sorted(urls))}"}
    settings = (order.system_prompt, "openai", order.sampling, order.num_samples, order.seed)
    draw = openai_draw(endpoint, order.sampling, order.num_samples, order.seed, order.system_prompt)
    return engine_header(policy, *settings, left_out=[name for name in leave_out if name in LAW]), lambda: draw


def _check_left_out(names: Sequence[str], engine: str, given: dict[str, Any]) -> None:
    """Refuse parameters that cannot be left out, and values for those that are."""
    from iama.config.specs import LEAVABLE

    for name in names:
        if engine != "openai" or name not in LEAVABLE:
            raise ConfigError(f"--leave-out {name!r}: with --engine openai write {', '.join(LEAVABLE)}")
        value = given.get({"max_tokens": "max_new_tokens"}.get(name, name))
        if value is not None:
            raise ConfigError(f"{_flag(name)} {value:g} has no use with --leave-out {name}; drop one of the two")


def _flag(setting: str) -> str:
    """The flag of a setting that an endpoint knows by its own name."""
    name = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}.get(setting, setting)
    return f"--{name.replace('_', '-')}"
