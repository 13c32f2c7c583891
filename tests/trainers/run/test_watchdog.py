"""The watchdog, in real processes: a reward function that sleeps, and one that holds the interpreter's lock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.processes import run_python
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan
from trainers.run.train import run
from trainers.run.watchdog import EXIT_CODE, PhaseMarks, Watchdog, _write_traceback

ROOT = Path(__file__).parents[3]
SLEEPER = """
import time

calls = 0

def sleeper(completions, **columns):
    global calls
    calls += 1
    if calls == 2:
        time.sleep(600)
    return [float(len(str(c))) for c in completions]
"""
LIMIT_S = 30  # loading the tiny models must not take so long


@pytest.mark.slow
def test_a_reward_that_sleeps_ends_the_run_with_one_line(config_file, raw_config, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    criterion = {"name": "helpful", "proxy": {"function": f"{tmp_path / 'sleeper.py'}:sleeper"}, "operator": "bon(2)"}
    config = config_file(objective={"criteria": [criterion]}, watch={"max_phase_s": LIMIT_S})
    began = time.monotonic()
    done = run_python(["train_iama.py", "--config", config])
    assert done.returncode == EXIT_CODE, done.stderr[-2000:]
    assert time.monotonic() - began < 500  # the reward alone would take 600
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "process 0 has been in the phase 'reward' of step 2 for" in told
    assert f"watch.max_phase_s = {LIMIT_S}" in told
    trace = tmp_path / "run" / "hang-rank-0.txt"
    assert str(trace) in told
    assert "in sleeper" in trace.read_text()


HOLDS_THE_LOCK = """
import ctypes, sys
from trainers.run import watchdog
watchdog.BACKSTOP_S = 0.5
with watchdog.Watchdog(0.5) as dog, dog.phase("reward"):
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock
"""


@pytest.mark.slow
def test_a_process_whose_threads_cannot_run_ends_too():
    done = run_python(["-c", HOLDS_THE_LOCK])
    assert done.returncode == 1
    assert "Timeout" in done.stderr


TWO_RANKS = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from trainers.run.watchdog import Watchdog

dist.init_process_group("gloo")
with Watchdog(3.0 if dist.get_rank() == 0 else float(sys.argv[2]), Path(sys.argv[1])) as dog:
    dog.enter("step", 7)
    with dog.phase("reward" if dist.get_rank() == 1 else "roll-out"):
        if dist.get_rank() == 1:
            time.sleep(600)
        dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stuck_until_s", [3.0, 600.0])
def test_every_process_that_waits_ends_and_names_its_phase(tmp_path, stuck_until_s):
    """The one that is stuck says so, however much later than the others its own limit would come."""
    (tmp_path / "script.py").write_text(TWO_RANKS)
    (tmp_path / "hang-rank-1.txt").write_text("of an earlier run")
    start = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, str(tmp_path / "script.py"), str(tmp_path), str(stuck_until_s)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: process" in line]
    assert all("of step 7 for" in line for line in told)
    phases = {line.partition("error: ")[2][:9]: line.partition("phase ")[2].split()[0] for line in told}
    assert phases == {"process 0": "'roll-out'", "process 1": "'reward'"}
    assert "barrier" in (tmp_path / "hang-rank-0.txt").read_text()
    assert "script.py" in (tmp_path / "hang-rank-1.txt").read_text()


GROUP = """
import torch
from trainers.run.engine import leave_process_group, prepare_process_group
from iama.environment import prepare_environment
prepare_environment()
prepare_process_group(uses_deepspeed={uses_deepspeed}, timeout_s=4321)
group = torch.distributed.distributed_c10d._get_default_group()
print("timeout", group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
leave_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("uses_deepspeed", [True, False])
def test_the_process_group_in_force_waits_as_long_as_it_is_told(tmp_path, uses_deepspeed):
    (tmp_path / "script.py").write_text(GROUP.format(uses_deepspeed=uses_deepspeed))
    done = run_python([tmp_path / "script.py"], num_ranks=1 if uses_deepspeed else 2)
    assert "timeout 4321.0" in done.stdout.splitlines(), done.stderr[-2000:]


def test_a_traceback_without_a_folder_goes_to_stderr(tmp_path, capfd):
    _write_traceback(tmp_path / "none" / "hang-rank-0.txt")
    assert "test_a_traceback_without" in capfd.readouterr().err
    _write_traceback(tmp_path / "hang-rank-0.txt")
    assert capfd.readouterr().err == ""
    assert "test_a_traceback_without" in (tmp_path / "hang-rank-0.txt").read_text()


def test_phases_nest_and_each_starts_a_fresh_clock():
    dog = Watchdog(None)
    with dog, dog.phase("roll-out"):
        with dog.phase("reward"):
            assert dog.current == "reward"
            inner = dog._state[1]
        assert dog.current == "roll-out"
        assert dog._state[1] > inner
    with pytest.raises(KeyError), dog.phase("save"):
        raise KeyError
    assert dog.current == "start"


def test_a_save_is_known_before_it_begins():
    dog = Watchdog(None)
    marks, state = PhaseMarks(dog), SimpleNamespace(global_step=4)
    marks.on_step_begin(None, state, None)
    assert (dog.current, dog._step) == ("step", 5)
    state.global_step = 5
    marks.on_step_end(None, state, SimpleNamespace(should_save=True))
    assert (dog.current, dog._step) == ("save", 5)
    marks.on_save(None, state, None)
    assert dog.current == "step"
    marks.on_epoch_end(None, state, SimpleNamespace(should_save=False))
    assert dog.current == "step"
    marks.on_epoch_end(None, state, SimpleNamespace(should_save=True))
    assert (dog.current, dog._step) == ("save", 5)


class Recorder(Watchdog):
    """A watchdog that writes down what it is told."""

    def __init__(self):
        self.seen = []
        super().__init__(None)

    def _enter(self, name):
        if not self.seen or self.seen[-1] != (name, self._step):
            self.seen.append((name, self._step))
        super()._enter(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")
def test_a_run_tells_the_watchdog_its_phases(make_config):
    config = make_config(trainer__save_strategy="steps", trainer__save_steps=1)
    recorder = Recorder()
    build_trainer(make_plan(config, "test.yaml"), Console(quiet=True), watchdog=recorder).train()
    one = [("step", 1), ("roll-out", 1), ("reward", 1), ("roll-out", 1), ("step", 1), ("save", 1), ("step", 1)]
    assert recorder.seen == [*one, *((name, 2) for name, _ in one)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")
def test_a_finished_run_leaves_no_thread(make_config):
    import threading

    run(make_plan(make_config(trainer__max_steps=1), "test.yaml"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
