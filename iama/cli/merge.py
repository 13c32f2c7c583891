"""`iama merge`: put pool files with parts of the prompts together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app, tell_pool
from iama.cli.options import POOLS, AsJson
from iama.errors import RunError
from iama.files import check_rewritable, locked


@app.command(short_help="Put pool files with parts of the prompts together.", rich_help_panel=POOLS)
def merge(
    out: Annotated[Path, typer.Argument(help="Pool file to write.")],
    files: Annotated[list[Path], typer.Argument(help="Pool files with parts of the prompts.", metavar="POOL...")],
    as_json: AsJson = False,
) -> None:
    """Put pool files with parts of the prompts together, such as those of iama pool --shard.

    Of one file, a copy in another form: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.

    Example: iama merge base.jsonl base-1.jsonl base-2.jsonl

    Example: iama merge base.parquet base.jsonl
    """
    from inference.pools.file import merge_pools, write_pool

    check_rewritable(out)
    with locked(out):
        if out.exists():
            raise RunError(f"{out} exists already; give another name for the merged pool, or delete it")
        merged = merge_pools(files)
        write_pool(out, merged)
    tell_pool("merge", out, merged, as_json=as_json)
