"""Pool files: a policy's completions with their scores, as JSON lines that any program can write.

The first line is a header. Then comes a block for each prompt: a prompt line, and a line for each sample. Lines of a
file from elsewhere may stand in any order, and the prompt may be on the sample lines. The format is in
docs/reference/pool-files.md.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from iama.cost import Cost
from iama.errors import DataError, RunError
from iama.files import append, encoded, locked, replacing, writing
from iama.prompts.render import Prompt
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.pools.format import HeaderPart, header_difference, parse_header, parsed
from inference.pools.held import Holder, SampleTable, Spool, table_of
from inference.pools.journal import digest
from inference.pools.storage import file_digest, is_plain, opened, parsed_lines, read_header, write_lines

_TOGETHER = 16 << 20
"""About the bytes of samples that wait in memory for being put away together."""
_PER_SAMPLE, _PER_TOKEN = 800, 36
_TAIL = 1 << 16


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
    """Read a pool file; raises `DataError` that names the line and what to write instead.

    Its samples are held (`inference.pools.held`): numbers in memory, texts in a temporary file.
    """
    with opened(path) as contents:
        pool = _read(contents.header, contents.rows)
        digest = contents.digest
    if not pool.prompts:
        raise DataError(f'{path}: no completions; add lines such as {{"prompt": ..., "text": ...}}')
    check_even(pool.prompts, str(path))
    stated, actual = pool.header["num_samples"], len(pool.prompts[0].samples)
    if stated not in (None, actual):
        raise DataError(f"{path}:1: num_samples is {stated}, but every prompt has {actual}; write {actual}")
    return Pool({**pool.header, "num_samples": actual}, pool.prompts, digest)


def read_again(path: Path, pool: Pool) -> Pool:
    """What a file holds now; the pool that was read from it before, where no byte of it has changed."""
    return pool if path.is_file() and pool.digest == file_digest(path) else read_pool(path)


def read_unfinished(path: Path) -> Pool:
    """Read a file that blocks are appended to, once a last block that a kill tore is cut off it."""
    _cut_torn_block(path)
    with opened(path, digested=False) as contents:
        return _read(contents.header, contents.rows)


def read_so_far(path: Path) -> Pool:
    """Read the whole blocks of a file that another process may be writing; the file stays as it is."""
    size = _whole_size(path)
    with path.open("rb") as file:
        lines = _up_to(file, size)
        header = parse_header(next(lines, b""), path)
        return _read(header, parsed_lines(lines, path))


def _up_to(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines within the first bytes of a file."""
    while (left := size - file.tell()) > 0:
        yield file.readline(left)


def check_even(prompts: Sequence[PooledPrompt], where: str) -> None:
    """Raise `DataError` where prompts have unequal numbers of samples."""
    first = prompts[0]
    for prompt in prompts:
        if len(prompt.samples) != len(first.samples):
            raise DataError(
                f"{where}: prompt {prompt.prompt_id!r} has {len(prompt.samples)} samples, prompt {first.prompt_id!r} "
                f"has {len(first.samples)}; give every prompt as many: sample the rest, or delete what is too much"
            )


@dataclass(slots=True)
class _Block:
    """What the lines of a prompt have said so far; `where` is the first of them.

    `is_repeated`: two processes that drew the same prompt have both written it.
    """

    where: str
    samples: Holder
    is_repeated: bool = False
    prompt: Prompt | None = None
    columns: dict[str, Any] | None = None
    num_samples: int | None = None
    cost: Cost | None = None
    estimated: bool = True


def _read(header: dict[str, Any], rows: Iterable[tuple[str, dict[str, Any]]]) -> Pool:
    """Every prompt in order of appearance."""
    spool = Spool()
    blocks: dict[str, _Block] = {}
    waiting: dict[str, _Block] = {}  # blocks with texts in memory
    size = 0
    for where, row in rows:
        name, block = _take(row, where, blocks, spool)
        waiting[name] = block
        size += len(row.get("text", "")) + _PER_SAMPLE + _PER_TOKEN * len(row.get("token_ids") or ())
        if size > _TOGETHER:
            for block in waiting.values():
                block.samples.flush()
            waiting.clear()
            size = 0
    return Pool(header, [_finished(name, blocks.pop(name)) for name in list(blocks)])


def _take(row: dict[str, Any], where: str, blocks: dict[str, _Block], spool: Spool) -> tuple[str, _Block]:
    """Note what a line says, with the block that it belongs to."""
    name = row["prompt_id"] if "prompt_id" in row else prompt_ids([row])[0]
    block = blocks.get(name)
    if block is None:
        block = blocks[name] = _Block(where, Holder(spool))
    for key in ("prompt", "columns"):
        if key in row:
            if getattr(block, key) is None:
                setattr(block, key, row[key])
            elif row[key] != getattr(block, key):
                raise DataError(
                    f"{where}: prompt {name!r} has another {key} here than before; give one id to each prompt"
                )
    if "text" in row:
        _take_sample(row, name, where, block)
    elif block.num_samples is not None and row.get("num_samples") == block.num_samples:
        block.is_repeated = True
    else:
        block.num_samples = row.get("num_samples")
        block.cost = Cost(**row["cost"]) if "cost" in row else None
        block.estimated = row.get("estimated", block.cost is None)
    return name, block


def _take_sample(row: dict[str, Any], name: str, where: str, block: _Block) -> None:
    number = row.get("sample", block.samples.size)
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
    if number not in block.samples:
        block.samples.add(number, sample)
    elif not (block.is_repeated and sample == block.samples.get(number)):
        raise DataError(f"{where}: prompt {name!r} has a sample {number} already; number its samples from 0 on")


def _finished(name: str, block: _Block) -> PooledPrompt:
    count = block.samples.size
    if block.prompt is None:
        raise DataError(f"{block.where}: prompt_id {name!r} is never given its prompt; add 'prompt' to the line")
    if block.num_samples not in (None, count) or not count:
        raise DataError(
            f"{block.where}: prompt {name!r} has {count} of {block.num_samples or 'its'} samples, so the file is "
            "unfinished; run again what writes it, or delete that prompt's lines"
        )
    if block.samples.largest != count - 1:
        raise DataError(
            f"{block.where}: the {count} samples of prompt {name!r} are numbered up to {block.samples.largest}; number "
            "them from 0 on, or leave 'sample' out"
        )
    samples = block.samples.held()
    cost = _cost_of_lengths(samples.table) if block.cost is None else block.cost
    return PooledPrompt(name, block.prompt, block.columns or {}, samples, cost, block.estimated)


def _cost_of_lengths(table: SampleTable) -> Cost:
    """What is known of a cost that is not given: tokens fed back, one less than each sample has."""
    return Cost(policy_decode_tokens=int(np.maximum(table.num_tokens_S - 1, 0).sum()))


# Writing. -----------------------------------------------------------------------------------------------


def write_pool(path: Path, pool: Pool) -> None:
    """Write a whole file, which is never seen half-written; compressed or as Parquet, as the end of its name says."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".parquet":
            from inference.pools.parquet import write_parquet

            try:
                write_parquet(file, pool.header, pool.prompts)
            except UnicodeEncodeError as error:
                encoded(path, error.object)  # which says what is wrong
                raise
        else:
            header = json.dumps(pool.header, ensure_ascii=False) + "\n"
            blocks = itertools.chain([header], map(_block, pool.prompts))
            write_lines(path, file, (encoded(path, block) for block in blocks))


def append_block(path: Path, prompt: PooledPrompt) -> None:
    """Append a prompt's lines to a plain file, whole or not at all; by the only one who writes the file."""
    assert is_plain(path), path
    append(path, _block(prompt))


def open_unfinished(path: Path, header: dict[str, Any]) -> Pool:
    """What a file of this header holds already; a file that is not there is begun. Nobody else may be writing it.

    Raises `RunError` where it holds samples of another policy, sampling, seed or part, and leaves it as it is; without
    a sample, as a run leaves it that failed at its first prompt, it is begun anew.
    """
    if not path.is_file() or not path.stat().st_size:
        write_pool(path, Pool(header, []))
    stored = read_header(path)
    if _difference(stored, header) is not None and not read_so_far(path).prompts:
        write_pool(path, Pool(header, []))
    else:
        check_header(path, stored, header)
    return read_unfinished(path)


def check_header(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `RunError` where a file holds samples of another policy, sampling, seed or part."""
    difference = _difference(stored, wanted)
    if difference is not None:
        raise RunError(f"{path} holds other samples ({difference}); choose another file, or delete it to sample afresh")


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    return header_difference(stored, wanted) or _part_difference(stored, wanted)


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
            table = table_of(prompt.samples)
            if lacking := sorted(columns - set(table.columns)):
                raise DataError(
                    f"{where} lacks the scores {', '.join(lacking)}, which {first} has; score it alike first"
                )
            if more := sorted(set(table.scores) - columns):
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
    size = _whole_size(path)
    if size < path.stat().st_size:
        with writing(path):
            os.truncate(path, size)
    with path.open("rb") as file:
        file.seek(max(size - 1, 0))
        is_ended = file.read(1) == b"\n"
    if not is_ended:
        append(path, "\n")


def _whole_size(path: Path) -> int:
    """Bytes of a file without those of a torn block, which is looked for from its end on.

    Blocks are appended whole, so only the last one can be torn: its lines are fewer than its first one says.
    """
    size = path.stat().st_size
    length = _TAIL
    with path.open("rb") as file:
        while True:
            start = max(size - length, 0)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
            torn = _torn_lines(lines[1:] if start else lines, is_all=not start)
            if torn is not None:
                return size - sum(map(len, torn))
            length *= 2


def _torn_lines(lines: list[bytes], *, is_all: bool) -> list[bytes] | None:
    """The lines of a torn block at the end of a file; None where its beginning may lie before the lines given."""
    kept = len(lines)
    if kept and not lines[-1].endswith(b"\n") and parsed(lines[-1]) is None:
        kept -= 1
    last = next((i for i in reversed(range(kept)) if _is_prompt_line(parsed(lines[i]))), None)
    if last is None and not is_all:
        return None
    if last is not None and kept - last - 1 < (parsed(lines[last]) or {}).get("num_samples", 0):
        kept = last
    return lines[kept:]


def _is_prompt_line(row: dict[str, Any] | None) -> bool:
    return row is not None and "prompt" in row and "text" not in row
