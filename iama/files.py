"""Files that are whole or absent, files that lines are appended to, and who may write them.

A file is written under a name of its own and renamed. Whatever the system refuses is a `RunError` of one line: the
former file is as it was, and nothing is left beside it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from iama.errors import IamaWarning, RunError

NAME_BYTES = 200
"""A file's name may have 255 bytes; a hidden name beside it needs some more than the name itself."""


# Whole files and folders. -------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """The name under which a file or folder is made before it is complete, by the only one who may write it."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether this is something unfinished that a killed run left, or a lock."""
    return path.name.startswith(".") and path.name.endswith((".tmp", ".lock"))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written; see `replacing`."""
    data = encoded(path, text)
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file for the new content of `path`, which is never seen half-written.

    Behind a link its target is written. A file that is there keeps its mode, owner, group and attributes. Raises
    `RunError` where it cannot, and for all that `check_rewritable` refuses.
    """
    target = check_rewritable(path)
    with writing(path):
        temporary, handle = _begin(target)
        try:
            with os.fdopen(handle, "wb") as file:
                if target.exists():
                    _make_alike(handle, target)
                yield file
                file.flush()
                os.fsync(handle)  # some file systems tell only here that they are full
                temporary.replace(target)  # while it is open, and so known as somebody's
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sweep(target)


def check_rewritable(path: Path) -> Path:
    """Where a file that is to be rewritten lies, links followed; raises `RunError` for one that would become another.

    That is one with several names, one that nobody may write, and whatever is no file.
    """
    target = Path(os.path.realpath(path))
    with writing(path):
        try:
            found = target.lstat()
        except FileNotFoundError:
            return target
    if stat.S_ISDIR(found.st_mode):
        raise RunError(f"{path} is a folder; give the name of a file")
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path} is no file but a device, a pipe or a link to itself; give the name of a file")
    if found.st_nlink > 1:
        raise RunError(
            f"{path} has {found.st_nlink} names (hard links), which would become separate files; give it a copy of its "
            "own: cp it to another name, and rename that"
        )
    if not found.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise RunError(f"{path} is read-only; make it writable (chmod u+w), or give another name")
    return target


def absent(path: Path) -> str:
    """Why a path is no file that can be read."""
    if path.is_dir():
        return "is a folder, not a file"
    if path.exists() or path.is_symlink():
        return "is no file but a device, a pipe or a broken link"
    return "does not exist"


def lacks(folder: Path, name: str) -> str:
    """What is wrong with a folder in which a file is missing."""
    if folder.is_dir():
        return f"{str(folder)!r} holds no {name}"
    return f"{str(folder)!r} {'is no folder' if folder.exists() else 'does not exist'}"


def check_folder(path: Path, flag: str) -> None:
    """Raise `RunError` where a file lies in the place of a folder."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{flag} {str(path)!r} is a file; give a folder")


@contextmanager
def building(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A folder to make what `out` will be, which is there whole or not at all.

    Raises `RunError` where `out` holds something. Whoever else builds the same folder is waited for.
    """
    target = Path(os.path.realpath(out))
    with locked(out) as is_alone:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunError(f"{flag} {str(out)!r} exists and is not empty; choose a new folder")
        for left in _left_behind(target) if is_alone else ():
            shutil.rmtree(left, ignore_errors=True)
        temporary = _hidden(target, f"{secrets.token_hex(4)}.tmp")
        try:
            yield temporary
            if target.exists():
                target.rmdir()
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _hidden(target: Path, ending: str) -> Path:
    """A hidden name beside a file or folder."""
    name = target.name
    if len(name.encode(errors="surrogateescape")) > NAME_BYTES:
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        name = f"{os.fsencode(name)[: NAME_BYTES - 20].decode(errors='ignore')}-{digest}"
    return target.with_name(f".{name}.{ending}")


def _begin(target: Path) -> tuple[Path, int]:
    """A new file under a name that nobody has, held as long as it is open, so that nobody takes it for left behind."""
    while True:
        temporary = _hidden(target, f"{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks, on which nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_at(handle, temporary):
            return temporary, handle
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _sweep(target: Path) -> None:
    """Remove what killed processes left of this file, but nothing that is being written."""
    for path in _left_behind(target):
        with suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _left_behind(target: Path) -> list[Path]:
    """Whatever lies under a temporary name of this file or folder."""
    names = re.compile(re.escape(_hidden(target, "").name) + r"([0-9a-f]{8}\.)?tmp")
    try:
        return [path for path in target.parent.iterdir() if names.fullmatch(path.name)]
    except OSError:
        return []


def _make_alike(handle: int, target: Path) -> None:
    """Give a new file what the old one has besides its content; only what differs is touched."""
    old = target.stat()
    made = os.fstat(handle)
    if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(handle, old.st_uid, old.st_gid)
    if stat.S_IMODE(os.fstat(handle).st_mode) != stat.S_IMODE(old.st_mode):
        os.fchmod(handle, stat.S_IMODE(old.st_mode))
    theirs, ours = _attributes(target), _attributes(handle)
    for name in ours.keys() - theirs.keys():
        os.removexattr(handle, name)
    for name, value in theirs.items():
        if ours.get(name) != value:
            os.setxattr(handle, name, value)


def _attributes(file: Path | int) -> dict[str, bytes]:
    """Extended attributes, access lists among them; none where the system has none."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        return {name: os.getxattr(file, name) for name in os.listxattr(file)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        raise


# Lines. -------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    """Append a text and hand it to the operating system, whole or not at all. Nobody else may be writing the file."""
    left = memoryview(encoded(path, text))
    with writing(path), path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) or 0 :]
        except BaseException:
            with suppress(OSError):  # of a device, which has no length
                file.truncate(start)
            raise


def whole_lines(data: bytes) -> bytes:
    """What a file holds up to its last line end: a line that a kill tore is left out."""
    return data[: data.rfind(b"\n") + 1]


def encoded(path: Path, text: str) -> bytes:
    """A text for a file; raises `RunError` for half a character, which UTF-8 cannot hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RunError(
            f"{path} cannot be written: {half!a} is half a character, which UTF-8 cannot hold; find where it comes "
            "from, and write \\ufffd in its place"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while a file is written, as a `RunError` of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


# Who may write. -----------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[bool]:
    """Be the only one who writes a file or folder, whether it is there or not; a lock is a hidden file beside it.

    Another process that writes it is waited for, and a warning says so; with `refusal` it is a `RunError` instead. A
    process that is killed holds nothing. On a file system without locks a warning asks for care, and False is given.
    """
    lock = _hidden(Path(os.path.realpath(path)), "lock")
    with writing(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, path, refusal)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with suppress(OSError):
                lock.unlink()  # while it is held; whoever waits for it will notice, and make it anew
            os.close(handle)


def _acquire(lock: Path, path: Path, refusal: str | None) -> int | None:
    told = False
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if refusal is not None:
                    raise RunError(refusal) from None
                if not told:
                    warnings.warn(f"another process is writing {path}; waiting for it", IamaWarning, stacklevel=4)
                told = True
                fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                warnings.warn(
                    f"{path}: its file system has no locks ({error.strerror}); let no other process write it",
                    IamaWarning,
                    stacklevel=4,
                )
                lock.unlink(missing_ok=True)
                return None
            raise
        if _is_at(handle, lock):
            return handle
        os.close(handle)
