"""Whatever system, encodings and parsers throw at a command is one line, and nothing is half-written."""

from __future__ import annotations

import json
import os
import resource
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.errors import IamaWarning
from inference.evaluation.evaluate import evaluate
from inference.evaluation.from_pools import config_from_pools
from inference.evaluation.plan import make_plan
from inference.evaluation.summary import load_summary


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with a pool, and with whatever stands in the way."""
    monkeypatch.chdir(tmp_path)
    lines = [{"iama_pool": 1, "policy": {"name": "base"}}]
    lines += [{"prompt": f"q {p}", "text": "a" * (s + 1), "scores": {"h": s}} for p in range(40) for s in range(4)]
    Path("pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines[1:] = [
        {"prompt": f"q {p}", "text": f"a {s}", "scores": {"h": s, "g": (p * s) % 7}} for p in range(8) for s in range(8)
    ]
    Path("many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("letters.py").write_text(
        "def count(prompts, completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    Path("folder").mkdir()
    Path("utf16.yaml").write_bytes("function: letters.py:count\n".encode("utf-16"))
    Path("latin.jsonl").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("twice.yaml").write_text("function: letters.py:count\nbatch_size: 2\nbatch_size: 3\n")
    Path("deep.yaml").write_text("[" * 9000)
    Path("broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    Path("inf.jsonl").write_text(Path("pool.jsonl").read_text().replace('"h": 3', '"h": 1e999', 1))
    return tmp_path


def seen(folder: Path) -> list[tuple[str, int, bytes]]:
    """Every file there is, hidden ones too."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [(str(p), p.stat().st_mode, p.read_bytes()) for p in paths]


SCORE = ("score", "pool.jsonl", "--column", "brief")
POOL = ("pool", "new.jsonl", "--n", "2", "--engine", "openai", "--url", "http://localhost:1/v1", "--model", "m")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*SCORE, "--spec", "utf16.yaml"), "utf16.yaml: not UTF-8 but UTF-16; save the file as UTF-8"),
        ((*SCORE, "--spec", "twice.yaml"), "twice.yaml:3: the key 'batch_size' is written twice, in lines 2 and 3"),
        ((*SCORE, "--spec", "deep.yaml"), "deep.yaml: not YAML that can be read (nested too deep"),
        ((*SCORE, "--spec", "folder"), "config file 'folder' is no file"),
        (("score", "folder", "--column", "b", "--reward", "letters.py:count"), "'folder' is a folder"),
        (
            ("score", "latin.jsonl", "--column", "b", "--reward", "letters.py:count"),
            "latin.jsonl:1: not UTF-8 (byte 3)",
        ),
        (("score", "inf.jsonl", "--column", "b", "--reward", "letters.py:count"), "inf.jsonl:5: 1e999 is beyond"),
        (("merge", "pool.jsonl/new.jsonl", "pool.jsonl"), "cannot be written: "),
        (("merge", "n" * 300, "pool.jsonl"), "File name too long"),
        (("recipes", "qwen-1.5b-24gb", "--out", "pool.jsonl/new.yaml"), "pool.jsonl"),
        (
            ("tune", "--pool", "many.jsonl", "--proxy-column", "h", "--gold-column", "g", "--out", "pool.jsonl"),
            "--out 'pool.jsonl' is a file; give a folder",
        ),
        (("report", "pool.jsonl"), "'pool.jsonl' is no folder; run"),
        (("report", "nowhere"), "'nowhere' does not exist; run"),
        (("report", "folder"), "'folder' holds no summary.json; run"),
        ((*POOL, "--prompts", "broken.parquet"), "broken.parquet: not Parquet"),
        ((*POOL, "--prompts", "latin.jsonl"), "latin.jsonl:1: not UTF-8 (byte 3)"),
        ((*POOL, "--prompts", "pool.jsonl"), "pool.jsonl:1: it has the columns|no 'prompt' among"),
    ],
)
def test_one_line(run, files, arguments, told):
    before = seen(files)
    code, out, err = run(*arguments)
    errors = [line for line in err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert (code, len(errors)) == (2, 1), err
    assert any(part in errors[0] for part in told.split("|"))
    assert seen(files) == before
    assert "Traceback" not in out + err


def test_a_full_disk(run, files):
    """The pool is as it was, and the same command goes on once there is room."""
    before = seen(files)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code, _, err = run(*SCORE, "--reward", "letters.py:count")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err.splitlines()[-1]) == (2, "error: pool.jsonl cannot be written: File too large")
    assert seen(files) == before
    assert run(*SCORE, "--reward", "letters.py:count")[0] == 0
    assert json.loads(Path("pool.jsonl").read_text().splitlines()[-1])["scores"].keys() == {"h", "brief"}


@pytest.mark.parametrize("kind", ["link", "hard link", "read-only", "private"])
def test_a_pool_stays_what_it_was(run, files, kind):
    """Its mode stays, the target of a link is scored, and what would become another file is refused unscored."""
    os.umask(0o022)
    path = Path("pool.jsonl")
    if kind == "link":
        path = Path("link.jsonl")
        path.symlink_to("pool.jsonl")
    elif kind == "hard link":
        Path("other.jsonl").hardlink_to(path)
    else:
        path.chmod(0o444 if kind == "read-only" else 0o600)
    before = seen(files)
    code, _, err = run("score", path, "--column", "brief", "--reward", "letters.py:count")
    if kind in ("hard link", "read-only"):
        assert code == 2
        assert ("has 2 names" if kind == "hard link" else "is read-only") in err
        assert seen(files) == before
    else:
        assert code == 0
        assert [(name, mode) for name, mode, _ in seen(files)] == [(name, mode) for name, mode, _ in before]
        assert path.is_symlink() == (kind == "link")
        assert '"brief"' in Path("pool.jsonl").read_text()


def test_two_evaluations_into_one_folder_at_once(files):
    """The second waits; of another configuration, it is refused then, and the first one's results stay."""
    raw = config_from_pools({"base": Path("many.jsonl")}, ["c=h,g"], None, "evaluation") | {"num_bootstrap": 100}
    plans = [make_plan(validate(raw | {"seed": seed}, EvaluationConfig, "test")) for seed in (0, 1)]
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as executor:
        warnings.filterwarnings("ignore", category=IamaWarning)
        done = [executor.submit(evaluate, plan) for plan in plans]
        (told,) = [str(job.exception()) for job in done if job.exception() is not None]
    assert told.startswith("output_dir 'evaluation' holds another evaluation (seed was ")
    seed = load_summary(Path("evaluation"))["config"]["seed"]
    assert done[seed].exception() is None
    assert sorted(path.name for path in Path("evaluation").iterdir()) == ["prompt_values.npz", "summary.json"]
