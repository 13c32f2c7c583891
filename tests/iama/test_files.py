"""Files keep what they are to their owner, whoever writes them at once, and whatever the system refuses."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from iama.errors import IamaWarning, RunError
from iama.files import append, building, is_temporary, locked, temporary_name, write_atomically
from tests.processes import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def together(jobs: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _folder(path: Path) -> None:
    path.mkdir()


def _hard(path: Path) -> None:
    path.write_text("old")
    path.with_name("other").hardlink_to(path)


def _read_only(path: Path) -> None:
    path.write_text("old")
    path.chmod(0o444)


def _circle(path: Path) -> None:
    path.symlink_to(path)


class TestRewriting:
    @pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755, 0o640])
    def test_mode_stays(self, tmp_path, mode):
        path = tmp_path / "a.json"
        path.write_text("old")
        path.chmod(mode)
        write_atomically(path, "new")
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == mode

    def test_a_new_file_has_the_mode_that_the_umask_gives(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_atomically(tmp_path / "a.json", "new")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
    def test_owner_and_group_stay(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")
        os.chown(path, 1234, 2345)
        path.chmod(0o4750)
        write_atomically(path, "new")
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o4750)

    def test_attributes_stay(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")
        try:
            os.setxattr(path, "user.origin", b"survey")
        except OSError:
            pytest.skip("the file system has no extended attributes")
        write_atomically(path, "new")
        assert os.getxattr(path, "user.origin") == b"survey"

    def test_behind_links_the_target_is_written(self, tmp_path):
        (tmp_path / "there").mkdir()
        target = tmp_path / "there" / "pool.jsonl"
        target.write_text("old")
        (tmp_path / "link").symlink_to(target)
        (tmp_path / "far").symlink_to("link")
        write_atomically(tmp_path / "far", "new")
        assert target.read_text() == "new"
        assert (tmp_path / "far").is_symlink()
        assert (tmp_path / "link").is_symlink()
        (tmp_path / "dangling").symlink_to(tmp_path / "there" / "later")
        write_atomically(tmp_path / "dangling", "begun")
        assert (tmp_path / "there" / "later").read_text() == "begun"
        assert names(tmp_path / "there") == ["later", "pool.jsonl"]

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (_folder, "is a folder"),
            (_hard, r"has 2 names \(hard links\)"),
            (_read_only, "is read-only"),
            (os.mkfifo, "is no file but"),
            (_circle, "is no file but"),
        ],
    )
    def test_what_would_become_another_file_is_refused(self, tmp_path, make: Callable[[Path], None], told):
        path = tmp_path / "a.json"
        make(path)
        before = [(p.name, p.lstat().st_ino, p.lstat().st_mode) for p in sorted(tmp_path.iterdir())]
        with pytest.raises(RunError, match=told) as refusal:
            write_atomically(path, "new")
        assert "\n" not in str(refusal.value)
        assert [(p.name, p.lstat().st_ino, p.lstat().st_mode) for p in sorted(tmp_path.iterdir())] == before

    def test_what_the_system_refuses_is_one_line_and_the_old_file_stays(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text("old")
        with full_disk(1000), pytest.raises(RunError, match=r"a\.json cannot be written: File too large"):
            write_atomically(path, "x" * 5000)
        assert path.read_text() == "old"
        with pytest.raises(RunError, match="cannot be written: File name too long"):
            write_atomically(tmp_path / ("n" * 300), "new")
        with pytest.raises(RunError, match="cannot be written: Not a directory"):
            write_atomically(path / "b.json", "new")
        with pytest.raises(RunError, match=r"cannot be written: '\\ud83d' is half a character"):
            write_atomically(path, "\ud83d")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.json"]

    def test_names_as_long_as_they_may_be(self, tmp_path):
        path = tmp_path / ("ü" * 127)
        with locked(path):
            write_atomically(path, "new")
        assert path.read_text() == "new"
        assert names(tmp_path) == [path.name]

    def test_what_killed_runs_left_goes_and_what_is_being_written_stays(self, tmp_path):
        path = tmp_path / "a.json"
        left = [tmp_path / ".a.json.0123abcd.tmp", tmp_path / ".a.json.tmp"]
        others = [tmp_path / ".b.json.0123abcd.tmp", tmp_path / ".a.json.mine.tmp"]
        for file in [*left, *others]:
            file.write_text("torn")
        assert all(map(is_temporary, [*left, temporary_name(path)]))
        texts = [str(i) * 200_000 for i in range(8)]
        together([partial(write_atomically, path, text) for text in texts])
        assert path.read_text() in texts
        assert names(tmp_path) == sorted(["a.json", *(file.name for file in others)])


class TestAppending:
    def test_a_full_disk_leaves_whole_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        append(path, "one\n")
        with full_disk(1000), pytest.raises(RunError, match=r"a\.jsonl cannot be written: File too large"):
            append(path, "x" * 5000 + "\n")
        assert path.read_text() == "one\n"
        append(path, "two\n")
        assert path.read_text() == "one\ntwo\n"
        with pytest.raises(RunError, match="cannot be written: Is a directory"):
            append(tmp_path, "one\n")
        with pytest.raises(RunError, match="full cannot be written: No space left on device"):
            append(Path("/dev/full"), "one\n")


HOLDER = """
import sys, time
from pathlib import Path
from iama.files import locked
with locked(Path(sys.argv[1])):
    Path(sys.argv[1] + ".held").touch()
    time.sleep(600)
"""


def names_while_locked(path: Path) -> list[str]:
    with locked(path):
        return names(path.parent)


def build_half(out: Path) -> None:
    with building(out) as folder:
        folder.mkdir()
        (folder / "a").write_text("half")
        raise ZeroDivisionError


class TestLocks:
    def test_one_at_a_time(self, tmp_path):
        path = tmp_path / "count"
        path.write_text("0")

        def add() -> None:
            for _ in range(20):
                with locked(path):
                    number = int(path.read_text())
                    time.sleep(0.0005)
                    write_atomically(path, str(number + 1))

        with pytest.warns(IamaWarning, match="another process is writing .*count; waiting for it"):
            together([add] * 4)
        assert path.read_text() == "80"
        assert names(tmp_path) == ["count"]

    def test_whoever_holds_is_waited_for_or_refused_and_a_killed_one_holds_nothing(self, tmp_path):
        path = tmp_path / "pool.jsonl"
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], cwd=ROOT)
        while not (tmp_path / "pool.jsonl.held").exists():
            time.sleep(0.01)
        with pytest.raises(RunError, match="mine"), locked(path, "mine"):
            pass
        killer = threading.Timer(0.2, holder.kill)
        killer.start()
        with pytest.warns(IamaWarning, match="waiting for it"):
            held = names_while_locked(path)
        assert holder.wait() == -signal.SIGKILL
        assert held == [".pool.jsonl.lock", "pool.jsonl.held"]
        assert names(tmp_path) == ["pool.jsonl.held"]

    def test_a_link_and_its_target_are_one_file(self, tmp_path):
        (tmp_path / "link").symlink_to("target")
        with locked(tmp_path / "target"), pytest.raises(RunError, match="mine"), locked(tmp_path / "link", "mine"):
            pass

    def test_where_there_can_be_no_lock(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(RunError, match=r"pool.jsonl cannot be written: (Not a directory|File exists)"),
            locked(tmp_path / "file" / "pool.jsonl"),
        ):
            pass


class TestFolders:
    def test_whole_or_not_at_all(self, tmp_path):
        out = tmp_path / "there" / "out"
        with pytest.raises(ZeroDivisionError):
            build_half(out)
        assert names(tmp_path / "there") == []
        (tmp_path / "there" / ".out.0123abcd.tmp").mkdir()
        (tmp_path / "there" / ".out.b.0123abcd.tmp").mkdir()
        out.mkdir()
        with building(out) as folder:
            folder.mkdir()
            (folder / "a").write_text("whole")
        assert names(tmp_path / "there") == [".out.b.0123abcd.tmp", "out"]
        assert (out / "a").read_text() == "whole"
        for taken in (out, out / "a"):
            with pytest.raises(RunError, match="exists and is not empty; choose a new folder"), building(taken):
                pass

    def test_two_at_once(self, tmp_path):
        """The second waits, and is then refused: nothing of it is mixed into the first."""
        out, told = tmp_path / "out", []

        def build() -> None:
            try:
                with building(out) as folder:
                    folder.mkdir()
                    time.sleep(0.1)
                    (folder / threading.current_thread().name).touch()
            except RunError as error:
                told.append(str(error))

        with pytest.warns(IamaWarning, match="waiting for it"):
            together([build] * 2)
        assert len(told) == 1
        assert "exists and is not empty" in told[0]
        assert len(names(out)) == 1
        assert names(tmp_path) == ["out"]
