"""How pool files are stored: as lines, plain or compressed, or as Parquet. The end of a file's name decides.

Lines are appended to plain files alone. All others are written whole (`inference.pools.fill` says what is done
meanwhile), so that none is ever seen with half of a compressed piece at its end.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]

from iama.errors import DataError
from iama.files import absent
from iama.reading import reason
from inference.pools.format import parse_header, read_line

ENDINGS = {".gz": "gzip", ".zst": "Zstandard", ".parquet": "Parquet"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_BLOCK = 1 << 20


class Contents(NamedTuple):
    """A file's header, every further line or row with where it stands, and a digest of its bytes."""

    header: dict[str, Any]
    rows: Iterator[tuple[str, dict[str, Any]]]
    digest: str


def is_plain(path: Path) -> bool:
    """Whether lines can be appended to a file of this name."""
    return path.suffix not in ENDINGS


def unfinished(path: Path) -> Path:
    """The plain file that samples are appended to, until a file that can only be written whole has all of them."""
    return path.with_name(f"{path.name}.unfinished.jsonl")


def read_header(path: Path) -> dict[str, Any]:
    """The header of a pool file, with every field of `Header`."""
    with opened(path, digested=False) as contents:
        return contents.header


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return _digest(file)


@contextmanager
def opened(path: Path, *, digested: bool = True) -> Iterator[Contents]:
    """Read a pool file; raises `DataError` for a damaged one, also while its rows are read."""
    if not path.is_file() and unfinished(path).is_file():
        raise DataError(
            f"pool file {str(path)!r} is not finished, what there is of it lies in {unfinished(path)}; run again what "
            "writes it"
        )
    if not path.is_file():
        raise DataError(f"pool file {str(path)!r} {absent(path)}; `iama pool` makes one")
    with path.open("rb") as file:
        _check_ending(path, file.read(4))
        file.seek(0)
        digest = _digest(file) if digested else ""
        file.seek(0)
        if path.suffix == ".parquet":
            from inference.pools.parquet import read_parquet

            yield Contents(*read_parquet(path, file), digest)
        else:
            lines = iter(_lines(path, file))
            header = parse_header(next(lines, b""), path)
            yield Contents(header, parsed_lines(lines, path), digest)


def parsed_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines behind the header, each with where it stands."""
    for number, line in enumerate(lines, start=2):
        if line.strip():
            yield f"{path}:{number}", read_line(line, path, number)


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _check_ending(path: Path, beginning: bytes) -> None:
    """Raise `DataError` where a file is not what its name says."""
    if not beginning and path.suffix in ENDINGS:
        raise DataError(f"{path} is empty; fetch or write it again")
    found = next((ending for magic, ending in _MAGIC.items() if beginning.startswith(magic)), None)
    if found is not None and path.suffix != found:
        raise DataError(f"{path}: {ENDINGS[found]}, whatever its name says; let its name end in {found}")
    if found is None and path.suffix in ENDINGS:
        raise DataError(
            f"{path}: not {ENDINGS[path.suffix]}, whatever its name says; a file of plain lines is named .jsonl"
        )


def _lines(path: Path, file: BinaryIO) -> Iterable[bytes]:
    if is_plain(path):
        return file
    if path.suffix == ".gz":
        return _split(path, gzip.GzipFile(fileobj=file, mode="rb").read)
    return _split(path, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd").read)


def _split(path: Path, read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Lines of a compressed file; raises `DataError` where it is torn or damaged."""
    rest = b""
    while True:
        try:
            data = read(_BLOCK)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: torn or damaged {ENDINGS[path.suffix]} data ({reason(error)}); fetch or write it again"
            ) from error
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


# Writing. -----------------------------------------------------------------------------------------------


def write_lines(path: Path, file: BinaryIO, blocks: Iterable[bytes]) -> None:
    """Write blocks of lines as the file's name says; the same bytes for the same blocks."""
    if path.suffix == ".gz":
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed:
            for block in blocks:
                packed.write(block)
    elif path.suffix == ".zst":
        for block in _gathered(blocks):
            file.write(pa.compress(block, codec="zstd", asbytes=True))
    else:
        file.writelines(blocks)


def _gathered(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks put together to about a megabyte, each of which becomes a frame."""
    gathered = bytearray()
    for block in blocks:
        gathered += block
        if len(gathered) >= _BLOCK:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
