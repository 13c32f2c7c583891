"""A watchdog: it knows which phase a process is in, and ends the process when a phase takes too long.

A distributed run whose processes wait for each other waits for ever, and says nothing. Every process has a watchdog of
its own; the one that is stuck and those that wait for it all end, each naming its phase, and leave a traceback. The
first traceback in the run folder tells the others: the one that is stuck may have entered its phase much later.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback

EXIT_CODE = 124
"""Of a process that the watchdog ended, as of the command `timeout`."""
BACKSTOP_S = 60.0
"""So much later the interpreter's own timer ends a process whose threads cannot run."""
POLL_S = 1.0
"""Between two looks at the run folder, for the traceback of another process."""
GRACE_S = 5.0
"""Between the error and the end: a launcher ends all processes with the first, and each should say where it is."""


class Watchdog:
    """Ends the process when a phase is longer than `limit_s` seconds (None: never); a context, inert outside it.

    Phases: `start` (models, process group, engine), `roll-out`, `reward`, `step`, `save`. The clock starts anew with
    every change of phase. The error is one line on stderr that names phase, step, seconds and process; the traceback
    of every thread goes to `hang-rank-N.txt` in `folder`; the exit code is 124. Where no Python thread can run (a
    native call that holds the interpreter's lock), Python's `faulthandler` prints the traceback and exits with 1.
    """

    def __init__(self, limit_s: float | None, folder: Path | None = None) -> None:
        self._limit_s = limit_s
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # A thread of its own: a file system that does not answer must not keep the other from its clock.
        self._folder_thread = threading.Thread(target=self._look, name="watchdog-folder", daemon=True)
        self._another_hangs = threading.Event()
        self._state = ("start", time.monotonic())  # one assignment, so that the thread never sees half of it
        self._step = 0
        self._traces: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._enter("start")
        if self._limit_s is not None:
            self._traces = self._traces_now()
            self._thread.start()
            self._folder_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._stop.set()
            self._thread.join()
            self._folder_thread.join(timeout=POLL_S)  # it may wait for the file system
            faulthandler.cancel_dump_traceback_later()

    @property
    def current(self) -> str:
        """The phase in force."""
        return self._state[0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase, then in the former one again, each with a fresh clock."""
        before = self.current
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def enter(self, name: str, step: int) -> None:
        """Be in a phase from here on; `step` counts from 1, 0 is before the first."""
        self._step = step
        self._enter(name)

    def _enter(self, name: str) -> None:
        self._state = (name, time.monotonic())
        if self._limit_s is not None and not self._stop.is_set() and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._limit_s + BACKSTOP_S, exit=True, file=sys.__stderr__)

    def _run(self) -> None:
        assert self._limit_s is not None
        pause_s = min(1.0, self._limit_s / 4)
        while not self._stop.wait(pause_s):
            phase, since = self._state
            seconds = time.monotonic() - since
            if seconds > self._limit_s:
                self._end(phase, seconds, f"longer than watch.max_phase_s = {self._limit_s:g}")
            if self._another_hangs.is_set():
                self._end(phase, seconds, "and ends because another process has been in its phase too long")

    def _look(self) -> None:
        """Wait for a traceback that was not there, or was another one, when this process began."""
        while not self._stop.wait(POLL_S):
            if self._traces_now().items() - self._traces.items():
                self._another_hangs.set()
                return

    def _traces_now(self) -> dict[str, int]:
        """Time of change by name of the tracebacks in the run folder; earlier runs may have left some."""
        if self._folder is None:
            return {}
        try:
            return {path.name: path.stat().st_mtime_ns for path in self._folder.glob("hang-rank-*.txt")}
        except OSError:  # a file that goes between the listing and the question, a disk that fails
            return {}

    def _end(self, phase: str, seconds: float, why: str) -> None:
        """Say which phase hangs, leave the traceback, and end the process, whatever its threads do."""
        rank = os.environ.get("RANK", "0")
        trace = None if self._folder is None else self._folder / f"hang-rank-{rank}.txt"
        where = "the traceback follows" if trace is None else f"the traceback goes to {trace}, or follows"
        # Before the disk is touched, which may be what hangs; one write, newline included: processes share the stream.
        sys.stderr.write(
            f"error: process {rank} has been in the phase {phase!r} of step {self._step} for {seconds:.0f} s, {why}; "
            f"{where}; mend what hangs, or raise the limit (null: none)\n"
        )
        sys.stderr.flush()
        _write_traceback(trace)
        sys.stdout.flush()
        time.sleep(GRACE_S)
        os._exit(EXIT_CODE)


def _write_traceback(path: Path | None) -> None:
    """Write every thread's traceback to a file, or to stderr where it cannot be made."""
    if path is not None:
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file)
            return
    faulthandler.dump_traceback(file=sys.__stderr__ or 2)


class PhaseMarks(TrainerCallback):
    """Tells a watchdog about steps and checkpoints; roll-outs and rewards tell it themselves."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Forward, backward and optimiser."""
        self._watchdog.enter("step", state.global_step + 1)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Logging, and a checkpoint where transformers has decided on one."""
        self._watchdog.enter("save" if control.should_save else "step", state.global_step)

    def on_epoch_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint at the end of an epoch."""
        if control.should_save:
            self._watchdog.enter("save", state.global_step)

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """The checkpoint is there."""
        self._watchdog.enter("step", state.global_step)
