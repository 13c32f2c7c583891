"""Parts of an evaluation, processes of it, and kills: the same numbers, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from iama.cli.app import app
from iama.config.files import EvaluationConfig
from iama.errors import ConfigError, RunError
from iama.models.fingerprint import fingerprint
from inference.evaluation.plan import leaves
from inference.evaluation.shards import Shard, gpu_of, new_lines, num_devices, parse_shard, run_shards, take_over
from inference.evaluation.summary import load_summary
from inference.pools import engines
from tests.inference.evaluation.running import evaluate, evaluate_shard
from tests.inference.evaluation.test_evaluate import changed, without_clock
from tests.processes import begin_python, run_python

NUM_SAMPLES = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")


@pytest.fixture(scope="module")
def raw(tmp_path_factory, tiny, adapter_dir, gold_file) -> dict:
    """Five prompts, two of them the same."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = tiny.prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines, lines[1]]) + "\n")
    base = {"path": str(tiny.policy)}
    return {
        "name": "sharded",
        "output_dir": "",
        "policies": {"base": base, "iama": base | {"adapter": str(adapter_dir)}},
        "prompts": str(prompts),
        "criteria": [
            {"name": "c", "proxy": {"model": str(tiny.reward)}, "gold": {"model": str(tiny.other_reward)}},
            {"name": "brief", "proxy": {"function": f"{gold_file}:brief"}, "gold": {"function": f"{gold_file}:vowels"}},
        ],
        "methods": ["bon", "bop"],
        "budgets": [1, 2],
        "num_samples": NUM_SAMPLES,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 8},
        "num_bootstrap": 100,
    }


@pytest.fixture
def config(raw, tmp_path) -> EvaluationConfig:
    return EvaluationConfig.model_validate(raw | {"output_dir": str(tmp_path / "evaluation")})


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """The evaluation by one process, without its output_dir."""
    folder = tmp_path_factory.mktemp("whole")
    return numbers(evaluate(EvaluationConfig.model_validate(raw | {"output_dir": str(folder / "evaluation")})))


def numbers(summary) -> dict[str, object]:
    """All that must not depend on how an evaluation was run, by dotted key."""
    stored = json.loads(json.dumps(without_clock(summary)))
    del stored["config"]["output_dir"]
    return leaves(stored)


def differing(summary, whole) -> list[str]:
    """Where a summary's numbers are others; pytest's own comparison of all of them would take minutes."""
    found = numbers(summary)
    return [
        f"{key}: {found.get(key)} {whole.get(key)}" for key in {**found, **whole} if found.get(key) != whole.get(key)
    ]


def work(folder: Path) -> Counter[tuple[str, str]]:
    """How often each unit of work was written: prompts of pools and answers, keys of scores and log-probabilities."""
    found: Counter[tuple[str, str]] = Counter()
    for kind in ("pools", "answers", "scores", "log_probabilities"):
        for path in (folder / kind).glob("*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                if "key" in line:
                    found[f"{kind}/{path.name}", line["key"]] += 1
                elif "prompt" in line:
                    found[f"{kind}/{path.name}", line["prompt_id"]] += 1
    return found


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many prompts each call of the engine was asked to sample."""
    asked = []
    real = engines.iter_decode
    monkeypatch.setattr(engines, "iter_decode", lambda p, ids, *a, **k: asked.append(len(ids)) or real(p, ids, *a, **k))
    return asked


@pytest.mark.parametrize("count", [2, 3, 6])  # of six one has no prompts
@pytest.mark.slow
def test_shards_together_are_the_whole(config, whole, drawn, count):
    for index in range(1, count + 1):
        folder = evaluate_shard(config, Shard(index, count))
        assert folder == Path(config.output_dir) / "shards" / f"{index}-of-{count}"
        assert not (Path(config.output_dir) / "summary.json").exists()
    assert sum(drawn) == 2 * 5
    drawn.clear()
    summary = evaluate(config)
    assert differing(summary, whole) == []
    assert drawn == []
    written = work(Path(config.output_dir))
    assert set(written.values()) == {1}
    evaluate(config)
    assert work(Path(config.output_dir)) == written


@pytest.mark.slow
def test_guided_answers_of_shards(config, raw, tmp_path):
    """A shard leaves to the whole what needs the quantile of the whole pool; the rest is as one process has it.

    Rewards of guided answers are read in batches of several prompts, so that they are equal up to rounding.
    """
    guided = changed(config, methods=["bon", "cards(target=0.5, max_proposals=2)", "cards(max_proposals=2)"])
    for index in (1, 2):
        folder = evaluate_shard(guided, Shard(index, 2))
        headers = [json.loads(path.read_text().splitlines()[0]) for path in (folder / "answers").iterdir()]
        assert {header["method"] for header in headers} == {"cards(target=0.5, max_proposals=2)"}
        assert len(headers) == 2 * 2
    found = numbers(evaluate(guided))
    wanted = numbers(evaluate(changed(guided, output_dir=str(tmp_path / "by one"))))
    assert list(found) == list(wanted)
    assert [key for key in wanted if not is_close(found[key], wanted[key])] == []


def is_close(found: object, wanted: object) -> bool:
    has_numbers = isinstance(wanted, float) or (
        isinstance(wanted, list) and bool(wanted) and isinstance(wanted[0], float)
    )
    return found == (pytest.approx(wanted, abs=1e-5, rel=1e-5) if has_numbers else wanted)


@pytest.mark.slow
def test_what_killed_shards_have_done_is_taken_over(config, whole, drawn):
    evaluate_shard(config, Shard(1, 2))
    begun = evaluate_shard(config, Shard(2, 2))
    for path in (begun / "pools").glob("base-*.jsonl"):
        path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote its last block
    for path in (begun / "pools").glob("iama-*.jsonl"):
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])  # killed before its first
    for path in (begun / "scores").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    drawn.clear()
    assert differing(evaluate(config), whole) == []
    assert drawn == [1, 2]
    assert set(work(Path(config.output_dir)).values()) == {1}


@pytest.mark.slow
def test_shards_of_other_settings_are_never_mixed_in(config, drawn):
    evaluate_shard(config, Shard(1, 2))
    evaluate_shard(changed(config, seed=1), Shard(2, 2))
    evaluate_shard(changed(config, sampling={"max_new_tokens": 7}), Shard(2, 2))
    drawn.clear()
    evaluate(config)
    assert drawn == [2, 2]
    files = [path.name for path in (Path(config.output_dir) / "pools").glob("base-*.jsonl")]
    assert len(files) == 3


def test_what_a_shard_is_writing_is_left_to_it(config):
    evaluate_shard(config, Shard(1, 2))
    files = [path for path in (Path(config.output_dir) / "shards").rglob("*.jsonl") if "1-of-2" in str(path)]
    for path in files:
        path.write_bytes(path.read_bytes()[:-5])
    torn = {path: path.read_bytes() for path in files}
    assert {path.parent.name for path in files} >= {"pools", "scores"}
    take_over(Path(config.output_dir))
    assert {path: path.read_bytes() for path in files} == torn
    assert set(work(Path(config.output_dir)).values()) == {1}


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, "01010"), ("", 2, "01010"), ("4,7", 2, "47474"), ("3", 1, "33333"), ("2, 5,-1,6", 2, "25252")],
)
def test_processes_stay_on_the_gpus_that_they_may_use(visible, count, names):
    assert [gpu_of(i, count, visible) for i in range(5)] == list(names)


def test_lines_are_counted_once(tmp_path):
    path, positions = tmp_path / "shards" / "1-of-1" / "pools" / "base.jsonl", {}
    path.parent.mkdir(parents=True)
    counts = [new_lines(tmp_path, positions)]
    for text in ("", "header\n", "one\ntwo\n", "", "thr", "ee\n"):
        with path.open("a") as file:
            file.write(text)
        counts.append(new_lines(tmp_path, positions))
    assert counts == [0, 0, 0, 2, 0, 0, 1]


def test_a_file_is_hashed_once_unless_it_changes(tmp_path, monkeypatch):
    read, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: read.append(1) or real(*a))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    assert len(read) == 1
    path.write_bytes(b"other")
    assert fingerprint(tmp_path) != first


def test_nothing_to_take_over(tmp_path):
    take_over(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for kind in ("pools", "scores"):  # the system fell before a shard had written anything
        (tmp_path / "shards" / "1-of-2" / kind).mkdir(parents=True)
        (tmp_path / "shards" / "1-of-2" / kind / "a.jsonl").touch()
    take_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def command(config: EvaluationConfig, *more: str) -> list[str]:
    path = Path(config.output_dir).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return ["-m", "iama.cli", "evaluate", "--config", str(path), *more]


@pytest.mark.slow
def test_devices_are_processes(config, whole):
    done = run_python(command(config, "--devices", "2"))
    assert done.returncode == 0, done.stderr
    folder = Path(config.output_dir)
    assert differing(load_summary(folder), whole) == []
    assert sorted(path.name for path in (folder / "shards").glob("*.log")) == ["1.log", "2.log"]
    parts = [work(folder / "shards" / f"{i}-of-2") for i in (1, 2)]
    assert [sum(key.startswith("pools/") for key, _ in part) for part in parts] == [2 * 3, 2 * 2]
    assert "report.html" in done.stdout


@pytest.mark.slow
def test_kills_cost_only_the_unit_in_flight(config, whole):
    """kill -9 whenever: what was written stays, is written once, and the numbers are the same."""
    folder, rng, seen = Path(config.output_dir), random.Random(3), Counter()
    killed = 0
    for _ in range(3):
        process = begin_python(command(config), OMP_NUM_THREADS="1")
        wanted = sum(seen.values()) + rng.randint(1, 6)
        end = time.monotonic() + 60
        while sum(whole_lines(folder).values()) < wanted and process.exitcode is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        present = whole_lines(folder)
        assert not seen - present  # nothing that was written is lost
        seen = present
    assert killed >= 2
    assert seen
    assert differing(evaluate(config), whole) == []
    final = work(folder)
    assert set(final.values()) == {1}
    assert set(seen) <= set(final)


def whole_lines(folder: Path) -> Counter[tuple[str, str]]:
    """Blocks and keys that stand in the files, those that a kill tore left out."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, size in (("pools", NUM_SAMPLES), ("answers", 1), ("scores", 0), ("log_probabilities", 0)):
        for path in (folder / kind).glob("*.jsonl"):
            complete = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            samples = Counter(line["prompt_id"] for line in complete if "text" in line)
            for line in complete:
                if "key" in line:
                    found[f"{kind}/{path.name}", line["key"]] += 1
                elif "prompt" in line and samples[line["prompt_id"]] == size:
                    found[f"{kind}/{path.name}", line["prompt_id"]] += 1
    return found


def test_a_failing_process_is_one_line(tmp_path):
    failing = ["-c", "import sys; print('first'); print('error: no such thing', file=sys.stderr); sys.exit(2)"]
    waiting = ["-c", "import time; time.sleep(600)"]
    start = time.monotonic()
    with pytest.raises(RunError, match=r"a shard failed: 'error: no such thing'; all of its output is in .*1\.log"):
        run_shards([failing, waiting], tmp_path, lambda _: None)
    assert time.monotonic() - start < 300  # the other one is ended


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "1/2/3", "-1/2"])
def test_bad_shards(text):
    with pytest.raises(ConfigError, match=r"--shard '.*': write i/n with 1 <= i <= n, e\.g\. 1/4"):
        parse_shard(text)


@pytest.mark.parametrize("text", ["0", "-1", "two", "²", ""])
def test_bad_devices(text):
    with pytest.raises(ConfigError, match=r"--devices '.*': write auto, or a number of processes"):
        num_devices(text)
    assert num_devices("3") == 3
    assert num_devices("auto") >= 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shard", "3/2"], "--shard '3/2'"),
        (["--devices", "none"], "--devices 'none'"),
        (["--shard", "1/2", "--devices", "2"], "give one of the two"),
    ],
)
def test_refused_before_anything_is_sampled(config, drawn, arguments, told):
    result = CliRunner().invoke(app, command(config, *arguments)[2:])
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)
    assert drawn == []
    assert not Path(config.output_dir).exists()
