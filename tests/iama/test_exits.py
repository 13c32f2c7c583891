"""What input, system, encodings and parsers throw is one line and exit code 2; mistakes of our own are tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import yaml
from pyarrow import ArrowInvalid
from safetensors import SafetensorError

from iama.cli import main as cli_main
from iama.cli.train import main as train_main
from iama.errors import IamaWarning, RunError, without_secrets
from iama.exits import told_in_one_line
from tests.processes import ROOT


def error_of(action) -> BaseException:
    with pytest.raises(Exception) as told:  # noqa: PT011 - whatever it is
        action()
    return told.value


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("(http://h/a?token=abc); next", "(http://h/a?token=***); next"),
        ("http://h/a?sig=a);b&x=1, next", "http://h/a?sig=***&x=1, next"),
        ("'http://me:pw@h/?api_key=abc'.", "'http://***@h/?api_key=***'."),
    ],
)
def test_a_secret_in_an_address_is_hidden_and_the_sentence_goes_on(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


FROM_OUTSIDE = [
    (RunError("first\nsecond"), "error: first second"),
    (
        RunError("prompts 'runs/demo/world/a.jsonl' does not exist; give one"),
        "error: prompts 'runs/demo/world/a.jsonl' does not exist; give one; `make demo` makes it",
    ),
    (OSError(28, "No space left on device"), "error: No space left on device"),
    (OSError(28, "No space left on device", "a.json"), "error: a.json: No space left on device"),
    (IsADirectoryError(21, "Is a directory", "a", None, "b"), "error: a -> b: Is a directory"),
    (ConnectionError("refused\nby them"), "error: refused by them"),
    (error_of(lambda: b"\xff".decode()), "error: a text that its encoding cannot hold ('utf-8' codec can't decode"),
    (error_of(lambda: "\ud800".encode()), "error: a text that its encoding cannot hold"),
    (error_of(lambda: json.loads("{")), "error: a file that cannot be read or written (Expecting property name"),
    (error_of(lambda: yaml.safe_load("a: [")), "error: a file that cannot be read or written (while parsing"),
    (ArrowInvalid("no\nmagic"), "error: a file that cannot be read or written (no magic)"),
    (SafetensorError("I/O error"), "error: a file that cannot be read or written (I/O error)"),
    (MemoryError(), "error: out of memory (MemoryError)"),
]


@pytest.mark.parametrize(("error", "line"), FROM_OUTSIDE, ids=[type(error).__name__ for error, _ in FROM_OUTSIDE])
def test_what_comes_from_outside_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        raise error
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError, KeyError, AssertionError, RecursionError, ValueError, AttributeError])
def test_mistakes_of_our_own_stay_tracebacks(error):
    with pytest.raises(error), told_in_one_line():
        raise error


@pytest.mark.parametrize(("raised", "code"), [(SystemExit(0), 0), (SystemExit(2), 2), (SystemExit(None), None)])
def test_other_ends_are_left_alone(capsys, raised, code):
    with pytest.raises(SystemExit) as ended, told_in_one_line():
        raise raised
    assert ended.value.code == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", [cli_main, train_main])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "--prompt", os.fsdecode(b"hi\xff")], "--prompt: 'hi\\udcff' is not UTF-8"),
        (["pool", os.fsdecode(b"--prompts=\xe9.csv")], "argument 2: '--prompts=\\udce9.csv' is not UTF-8"),
    ],
)
def test_an_argument_that_is_not_utf8(capsys, monkeypatch, command, arguments, line):
    monkeypatch.setattr(sys, "argv", ["iama", *arguments])
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_warning_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["iama", "--help"])
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    with pytest.raises(SystemExit):
        cli_main()
    capsys.readouterr()
    for message in ("odd settings", "odd settings", "others"):
        warnings.showwarning(IamaWarning(message), IamaWarning, "file.py", 1)
    assert capsys.readouterr().err == "warning: odd settings\nwarning: others\n"


def test_a_line_is_said_once_however_deep(capsys):
    with pytest.raises(SystemExit), told_in_one_line(), told_in_one_line():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


IAMA = [sys.executable, "-c", "from iama.cli import main; main()"]


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*IAMA, "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_output_that_the_disk_cannot_hold():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([*IAMA, "recipes"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


def test_a_terminal_without_a_character_gets_an_escape():
    script = "from iama.exits import told_in_one_line\nwith told_in_one_line(): print('na\\u00efve')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"na\\xefve\n")


WAITING = """
import sys, time, typer
from iama.cli.app import app, main
@app.command()
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(600)
sys.argv = ["iama", "wait"]
main()
"""


def test_ctrl_c_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted\n")
