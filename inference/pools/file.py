"""Pool files: a policy's completions with their scores, as JSON lines that any program can write.

The first line is a header. Then comes a block for each prompt: a prompt line, and a line for each sample. Lines of a
file from elsewhere may stand in any order, and the prompt may be on the sample lines. docs/pools.md has the format.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iama.cost import Cost
from iama.errors import DataError, RunError
from iama.files import append, locked, write_atomically, writing
from iama.prompts.render import Prompt
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.pools.format import HeaderPart, header_difference, parsed, read_header, read_line
from inference.pools.journal import digest


def prompt_ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """An id a row: a hash of its `prompt`, with the occurrence's number from the second on for repeated prompts."""
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        name = digest(row["prompt"])[:16]
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


# Reading. -----------------------------------------------------------------------------------------------


def read_pool(path: Path) -> Pool:
    """Read a pool file; raises `DataError` that names the line and what to write instead."""
    pool = _read(path)
    if not pool.prompts:
        raise DataError(f'{path}: no completions; add lines such as {{"prompt": ..., "text": ...}}')
    check_even(pool.prompts, str(path))
    stated, actual = pool.header["num_samples"], len(pool.prompts[0].samples)
    if stated not in (None, actual):
        raise DataError(f"{path}:1: num_samples is {stated}, but every prompt has {actual}; write {actual}")
    return Pool({**pool.header, "num_samples": actual}, pool.prompts)


def read_unfinished(path: Path) -> Pool:
    """Read a file that blocks are appended to, once a last block that a kill tore is cut off it."""
    _cut_torn_block(path)
    return _read(path)


def read_so_far(path: Path) -> Pool:
    """Read the whole blocks of a file that another process may be writing; the file stays as it is."""
    return _read(path, _whole_lines(path.read_bytes()))


def check_even(prompts: Sequence[PooledPrompt], where: str) -> None:
    """Raise `DataError` where prompts have unequal numbers of samples."""
    first = prompts[0]
    for prompt in prompts:
        if len(prompt.samples) != len(first.samples):
            raise DataError(
                f"{where}: prompt {prompt.prompt_id!r} has {len(prompt.samples)} samples, prompt {first.prompt_id!r} "
                f"has {len(first.samples)}; give every prompt as many: sample the rest, or delete what is too much"
            )


@dataclass
class _Block:
    """What the lines of a prompt have said so far; `where` is the first of them.

    `is_repeated`: two processes that drew the same prompt have both written it.
    """

    where: str
    is_repeated: bool = False
    prompt: Prompt | None = None
    columns: dict[str, Any] | None = None
    num_samples: int | None = None
    cost: Cost | None = None
    estimated: bool = True
    samples: dict[int, Response] = field(default_factory=dict)


def _read(path: Path, lines: Sequence[bytes] | None = None) -> Pool:
    """Every prompt in order of appearance; `lines` are the file's, else it is read."""
    header = read_header(path)
    blocks: dict[str, _Block] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file if lines is None else lines, start=1):
            if number > 1 and line.strip():
                where = f"{path}:{number}"
                _take(read_line(line, path, number), where, blocks)
    return Pool(header, [_finished(name, block) for name, block in blocks.items()])


def _take(row: dict[str, Any], where: str, blocks: dict[str, _Block]) -> None:
    """Note what a line says."""
    name = row["prompt_id"] if "prompt_id" in row else prompt_ids([row])[0]
    block = blocks.setdefault(name, _Block(where))
    for key in ("prompt", "columns"):
        if getattr(block, key) is None:
            setattr(block, key, row.get(key))
        elif key in row and row[key] != getattr(block, key):
            raise DataError(f"{where}: prompt {name!r} has another {key} here than before; give one id to each prompt")
    if "text" in row:
        _take_sample(row, name, where, block)
    elif block.num_samples is not None and row.get("num_samples") == block.num_samples:
        block.is_repeated = True
    else:
        block.num_samples = row.get("num_samples")
        block.cost = Cost(**row["cost"]) if "cost" in row else None
        block.estimated = row.get("estimated", block.cost is None)


def _take_sample(row: dict[str, Any], name: str, where: str, block: _Block) -> None:
    number = row.get("sample", len(block.samples))
    ids, count = row.get("token_ids"), row.get("num_tokens")
    if ids is not None:
        if count not in (None, len(ids)):
            raise DataError(f"{where}: num_tokens is {count}, but token_ids are {len(ids)}; leave num_tokens out")
        count = None
    sample = Response(
        row["text"],
        tuple(ids or ()),
        row.get("finish_reason", "unknown"),
        length=count,
        scores=row.get("scores", {}),
        segments=tuple(row.get("segments", ())),
        is_empty=ids is not None and not ids,
    )
    if number in block.samples and not (block.is_repeated and sample == block.samples[number]):
        raise DataError(f"{where}: prompt {name!r} has a sample {number} already; number its samples from 0 on")
    block.samples[number] = sample


def _finished(name: str, block: _Block) -> PooledPrompt:
    count = len(block.samples)
    if block.prompt is None:
        raise DataError(f"{block.where}: prompt_id {name!r} is never given its prompt; add 'prompt' to the line")
    if block.num_samples not in (None, count) or not count:
        raise DataError(
            f"{block.where}: prompt {name!r} has {count} of {block.num_samples or 'its'} samples, so the file is "
            "unfinished; run again what writes it, or delete that prompt's lines"
        )
    if max(block.samples) != count - 1:
        raise DataError(
            f"{block.where}: the {count} samples of prompt {name!r} are numbered up to {max(block.samples)}; number "
            "them from 0 on, or leave 'sample' out"
        )
    samples = tuple(block.samples[number] for number in range(count))
    cost = _cost_of_lengths(samples) if block.cost is None else block.cost
    return PooledPrompt(name, block.prompt, block.columns or {}, samples, cost, block.estimated)


def _cost_of_lengths(samples: Sequence[Response]) -> Cost:
    """What is known of a cost that is not given: tokens fed back, one less than each sample has."""
    return Cost(policy_decode_tokens=sum(max((sample.num_tokens or 0) - 1, 0) for sample in samples))


# Writing. -----------------------------------------------------------------------------------------------


def write_pool(path: Path, pool: Pool) -> None:
    """Write a whole file, which is never seen half-written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(pool.header, ensure_ascii=False) + "\n" + "".join(map(_block, pool.prompts)))


def append_block(path: Path, prompt: PooledPrompt) -> None:
    """Append a prompt's lines, whole or not at all; by the only one who writes the file."""
    append(path, _block(prompt))


def open_unfinished(path: Path, header: dict[str, Any]) -> Pool:
    """What a file of this header holds already; a file that is not there is begun. Nobody else may be writing it.

    Raises `RunError` where it holds samples of another policy, sampling, seed or part, and leaves it as it is; without
    a sample, as a run leaves it that failed at its first prompt, it is begun anew.
    """
    if not path.is_file() or not path.stat().st_size:
        write_pool(path, Pool(header, []))
    stored = read_header(path)
    difference = header_difference(stored, header) or _part_difference(stored, header)
    if difference is not None and not read_so_far(path).prompts:
        write_pool(path, Pool(header, []))
    elif difference is not None:
        raise RunError(f"{path} holds other samples ({difference}); choose another file, or delete it to sample afresh")
    return read_unfinished(path)


def _part_difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Another part of the prompts than the file's, which its header would not tell of; None where it is the same."""
    was, now = (
        header.get("part") and f"{header['part']['index']}/{header['part']['count']}" for header in (stored, wanted)
    )
    return f"part was {was}, is {now}" if was and now and was != now else None


def union(path: Path, pool: Pool) -> None:
    """Append to a file the prompts of a pool of the same header that it lacks; raises `RunError` for another header."""
    with locked(path):
        there = {prompt.prompt_id for prompt in open_unfinished(path, pool.header).prompts}
        for prompt in pool.prompts:
            if prompt.prompt_id not in there:
                append_block(path, prompt)


def merge_pools(paths: Sequence[Path]) -> Pool:
    """One pool of the prompts of several, in the files' order.

    Raises `RunError` for another header and for parts of `iama pool --shard` that are missing or unfinished,
    `DataError` for a prompt that is in two of them or unlike columns of scores.
    """
    pools = [read_pool(path) for path in paths]
    first, header = paths[0], pools[0].header
    columns = set(pools[0].prompts[0].samples[0].scores)
    homes: dict[str, Path] = {}
    for path, pool in zip(paths, pools, strict=True):
        difference = header_difference(header, pool.header)
        if difference is not None:
            raise RunError(f"{path} holds other samples than {first} ({difference}); merge only parts of one pool")
        for prompt in pool.prompts:
            where = f"{path}: prompt {prompt.prompt_id!r}"
            if prompt.prompt_id in homes:
                raise DataError(f"{where} is in {homes[prompt.prompt_id]} as well; leave one of the files out")
            homes[prompt.prompt_id] = path
            there = set.intersection(*(set(sample.scores) for sample in prompt.samples))
            if lacking := sorted(columns - there):
                raise DataError(
                    f"{where} lacks the scores {', '.join(lacking)}, which {first} has; score it alike first"
                )
            if more := sorted({name for sample in prompt.samples for name in sample.scores} - columns):
                raise DataError(f"{first} lacks the scores {', '.join(more)}, which {where} has; score it alike first")
    _check_parts(paths, pools)
    return Pool(
        {key: value for key, value in header.items() if key != "part"},
        [prompt for pool in pools for prompt in pool.prompts],
    )


def _check_parts(paths: Sequence[Path], pools: Sequence[Pool]) -> None:
    """Raise `RunError` where all files say which part they are, and together lack prompts."""
    parts = [HeaderPart.model_validate(pool.header["part"]) for pool in pools if pool.header.get("part")]
    found = sum(len(pool.prompts) for pool in pools)
    if len(parts) < len(pools) or found >= parts[0].num_prompts:
        return
    reasons = [
        f"{path} has {len(pool.prompts)} of the {part.size} prompts of part {part.index}/{part.count}"
        for path, pool, part in zip(paths, pools, parts, strict=True)
        if len(pool.prompts) < part.size
    ]
    if len({part.count for part in parts}) == 1:
        there = {part.index for part in parts}
        count = parts[0].count
        reasons += [f"no file holds part {i}/{count}" for i in range(1, count + 1) if i not in there]
    raise RunError(
        f"{found} of {parts[0].num_prompts} prompts are there: {'; '.join(reasons)}; sample what is missing with "
        "`iama pool --shard`, and merge all parts"
    )


def _block(prompt: PooledPrompt) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _rows(prompt))


def _rows(prompt: PooledPrompt) -> Iterator[dict[str, Any]]:
    yield {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "columns": prompt.columns,
        "num_samples": len(prompt.samples),
        "cost": asdict(prompt.cost),
        "estimated": prompt.estimated,
    }
    for number, sample in enumerate(prompt.samples):
        row: dict[str, Any] = {"prompt_id": prompt.prompt_id, "sample": number, "text": sample.text}
        row["finish_reason"] = sample.finish_reason
        if sample.num_tokens is not None:
            row["num_tokens"] = sample.num_tokens
        if sample.has_ids:
            row["token_ids"] = sample.token_ids
        if sample.segments:
            row["segments"] = sample.segments
        yield {**row, "scores": sample.scores}


def _cut_torn_block(path: Path) -> None:
    """Cut off what a kill left of a block, and give a last line its end."""
    data = path.read_bytes()
    lines = _whole_lines(data)
    length = sum(map(len, lines))
    if length < len(data):
        with writing(path):
            os.truncate(path, length)
    if not lines[-1].endswith(b"\n"):
        append(path, "\n")


def _whole_lines(data: bytes) -> list[bytes]:
    """The lines of a file without those of a torn block.

    Blocks are appended whole, so only the last one can be torn: its lines are fewer than its first one says.
    """
    lines = data.splitlines(keepends=True)
    kept = len(lines)
    if not lines[-1].endswith(b"\n") and parsed(lines[-1]) is None:
        kept -= 1
    last = next((i for i in reversed(range(kept)) if _is_prompt_line(parsed(lines[i]))), None)
    if last is not None and kept - last - 1 < (parsed(lines[last]) or {}).get("num_samples", 0):
        kept = last
    return lines[:kept]


def _is_prompt_line(row: dict[str, Any] | None) -> bool:
    return row is not None and "prompt" in row and "text" not in row
