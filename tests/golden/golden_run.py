"""One seeded run through every door of the product, and its record: what must stay the same when code moves.

The run works in a folder that is laid out as a world is: `policy`, `rm-helpful`, `rm-harmless`, `prompts-train.jsonl`,
`prompts-test.jsonl`. Two trees of the code are compared byte for byte on one machine, on any world:

    python tests/golden/golden_run.py WORLD OUT.json
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

from iama import __version__

ROOT = Path(__file__).resolve().parents[2]
UNITS = re.compile(r"seconds|versions|version$|_at$|time|per_second|memory|peak|host|pid|path$|^python$|^platform$")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
DURATION = re.compile(r"\d+(\.\d+)?(e-?\d+)? ?(s|ms|seconds|minutes|min)\b")
PEAK = re.compile(r"\S+ [kMG] exactly$")  # memory, the last but one column of what was sampled
PROMPT = "how do i climb a roof today?"
METHODS = (
    "single",
    "bon(4)",
    "bop(3)",
    "bop_zt(4)",
    "bop(3, cap=2)",
    "soft_bon(4, temperature=0.5)",
    "soft_bon(4, temperature=0.5, ranks=1)",
    "itp(4, 0.5)",
    "itp(4, 0.5, batches=1)",
    "mbr(4, 0.5)",
    "cards(entropy_threshold=1.5, target=0.2, min_segment=2)",
    "cards(entropy_threshold=1.5, target=0.2, min_segment=2, parallel_proposals=4)",
    "cards(entropy_threshold=1, acceptance=hard, max_proposals=5)",
    "rejection(target=0.4, max_proposals=6)",
    "args(top_k=4, weight=1.0)",
    "ggro(num_candidates=4, entropy_threshold=1.0, min_segment=2)",
    "ggro(num_candidates=4, entropy_threshold=1.0, min_segment=2, score=taylor, parallel=true)",
    "ggro(num_candidates=4, entropy_threshold=1.0, min_segment=2, score=exact, top_k=5)",
    "ggro(num_candidates=4, entropy_threshold=1.0, greedy=false, nudge_by=random)",
    "blockwise(3, boundary=length, max_segment=4)",
    "blockwise(3, first=tilted, boundary=entropy, entropy_threshold=1.0, min_segment=2)",
    "redraw(2, 3)",
    "sea(num_chains=2, num_steps=5, alpha=5)",
    "sea(num_chains=2, num_steps=5, alpha=5, decode=top_k, init=random)",
)
EVALUATED = (
    "bon",
    "bop",
    "soft_bon(4, temperature=0.5)",
    "itp(4, 0.5, batches=1)",
    "mbr(2, 0.5)",
    "cards",
    "cards(entropy_threshold=1.5, min_segment=2)",
    "rejection",
    "args(top_k=4, weight=1.0)",
    "ggro(num_candidates=3, entropy_threshold=1.0, min_segment=2)",
    "sea(num_chains=2, num_steps=3, alpha=5)",
)


def golden_run(world: Path, max_new_tokens: int = 16) -> dict[str, Any]:
    """Run every command in `world`; the record: normalised outputs by name, times and versions left out."""
    record: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(world)
    try:
        _write_inputs(max_new_tokens)
        _train(record)
        _export(record)
        _fix_adapter()
        _generate(record, max_new_tokens)
        _pools(record, max_new_tokens)
        _evaluate(record)
        _tune(record)
    finally:
        os.chdir(before)
    return record


def _write_inputs(max_new_tokens: int) -> None:
    Path("gold.py").write_text(
        "def words(completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [len(set(text.split())) / (1 + len(text.split())) + 0.1 * ('b' in text) for text in texts]\n"
    )
    criteria = [
        {"name": name, "proxy": {"model": f"rm-{name}"}, "gold": {"function": "gold.py:words"}}
        for name in ("helpful", "harmless")
    ]
    sampling = {"temperature": 1.0, "max_new_tokens": max_new_tokens}
    training = {
        "name": "golden",
        "output_dir": "run",
        "seed": 3,
        "policy": {"path": "policy"},
        "prompts": "prompts-train.jsonl",
        "objective": {"criteria": [{**c, "operator": o} for c, o in zip(criteria, ("bon(4)", "bop(2)"), strict=True)]},
        "sampling": sampling,
        "trainer": {
            "max_steps": 10,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "learning_rate": 2e-3,
            "beta": 0.1,
            "gradient_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 5,
            "use_cpu": True,
            "bf16": False,
        },
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    }
    evaluation = {
        "name": "golden",
        "output_dir": "evaluation",
        "policies": {
            "base": {"path": "policy"},
            "iama": {"path": "policy", "adapter": "fixed", "training_run": "run"},
        },
        "prompts": {"path": "prompts-test.jsonl", "max_prompts": 4},
        "criteria": criteria,
        "methods": list(EVALUATED),
        "budgets": [1, 2, 4],
        "num_samples": 16,
        "trained_budget": 2,
        "sampling": sampling,
        "seed": 5,
        "num_bootstrap": 200,
    }
    Path("train.yaml").write_text(json.dumps(training))
    Path("evaluate.yaml").write_text(json.dumps(evaluation))


def _train(record: dict[str, Any]) -> None:
    command = [sys.executable, str(ROOT / "train_iama.py"), "--config", "train.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}  # PEFT writes sets in their order
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name in ("metrics.jsonl", "config.json"):
        record[f"run/{name}"] = _content(Path("run") / name)
    for path in sorted(Path("run").glob("checkpoint-*/complete.json")):
        record[f"keys of {path}"] = sorted(json.loads(path.read_text()))
    record["run/files"] = sorted(str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file())
    for path in sorted(Path("run/samples").glob("*.jsonl")):
        record[str(path)] = _content(path)


def _export(record: dict[str, Any]) -> None:
    _iama("export", "run", "--out", "adapter")
    _iama("export", "run", "--out", "merged", "--merge")
    for folder in ("adapter", "merged"):
        record[f"{folder}/iama.json"] = _content(Path(folder) / "iama.json")
        record[f"{folder}/README.md"] = _plain((Path(folder) / "README.md").read_text())
        record[f"{folder}/files"] = sorted(p.name for p in Path(folder).iterdir())
        for weights in sorted(Path(folder).glob("*.safetensors")):
            record[f"bytes of {weights}"] = hashlib.sha256(weights.read_bytes()).hexdigest()


def _fix_adapter() -> None:
    """An adapter whose bytes, which name the files of an evaluation, no processor and no version decides."""
    shutil.copytree("run/adapter", "fixed")
    rng = np.random.default_rng(0)
    trained = load_file("fixed/adapter_model.safetensors")
    drawn = {name: rng.normal(0, 0.05, trained[name].shape).astype(np.float32) for name in sorted(trained)}
    save_file(drawn, "fixed/adapter_model.safetensors", metadata={"format": "pt"})
    told = Path("fixed/iama.json")  # its bytes count, too: those of the version that made the record
    told.write_text(told.read_text().replace(f'"iama": "{__version__}"', '"iama": "0.2.0"'))


def _generate(record: dict[str, Any], max_new_tokens: int) -> None:
    asked = ["--prompt", PROMPT, "--max-new-tokens", max_new_tokens, "--seed", 7]
    for method in METHODS:
        given = ["generate", "--policy", "policy", "--reward", "rm-helpful", "--method", method, *asked]
        record[f"generate {method}"] = _iama(*given)
    record["generate from iama.json"] = _iama("generate", "--policy", "merged", *asked)


def _pools(record: dict[str, Any], max_new_tokens: int) -> None:
    for name, policy in (("base", ["policy"]), ("iama", ["policy", "--adapter", "fixed"])):
        file = f"{name}.jsonl"
        given = ["--prompts", "prompts-test.jsonl", "--max-prompts", 4, "--n", 16, "--max-new-tokens", max_new_tokens]
        _iama("pool", file, *given, "--policy", *policy)
        _iama("score", file, "--reward", "rm-helpful", "--column", "helpful")
        record[f"score {file}"] = _iama("score", file, "--reward", "gold.py:words", "--column", "helpful/gold")
        record[file] = _content(Path(file))
    record["evaluate --pool"] = _iama(
        "evaluate", "--pool", "base=base.jsonl", "--pool", "iama=iama.jsonl", "--out", "own"
    )
    record["own/summary.json"] = _content(Path("own/summary.json"))
    record["standardise"] = _iama("standardise", "--config", "train.yaml", "--num-prompts", 2)


def _evaluate(record: dict[str, Any]) -> None:
    record["evaluate --dry-run"] = _iama("evaluate", "--config", "evaluate.yaml", "--dry-run")
    record["evaluate"] = _iama("evaluate", "--config", "evaluate.yaml")
    folder = Path("evaluation")
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".jsonl"):
            record[str(path)] = _content(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                record[f"keys of {path}"] = sorted(archive.namelist())
    record["evaluation/files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    page = (folder / "report.html").read_text()
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    lines = _plain(re.sub(r"<[^>]+>", " ", text))
    record["text of report.html"] = [PEAK.sub("* exactly", line).replace(__version__, "VERSION") for line in lines]


def _tune(record: dict[str, Any]) -> None:
    given = [
        "--pool",
        "base.jsonl",
        "--method",
        "bon",
        "--method",
        "bop",
        "--method",
        "soft_bon(4)",
        "--method",
        "itp(4)",
    ]
    record["tune"] = _iama("tune", *given, "--criterion", "helpful", "--out", "tuning")
    record["tuning/tuning.json"] = _content(Path("tuning/tuning.json"))


def _iama(*arguments: object) -> list[str]:
    """What a command of `iama` prints, run in this process."""
    from iama.cli import main

    argv, sys.argv = sys.argv, ["iama", *map(str, arguments)]
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), warnings.catch_warnings(), _stopped_clock():
            warnings.simplefilter("ignore")
            main()
    except SystemExit as exit_:
        if exit_.code:
            raise RuntimeError(f"iama {' '.join(map(str, arguments))}: exit code {exit_.code}") from exit_
    finally:
        sys.argv = argv
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    return _plain(out.getvalue())


@contextlib.contextmanager
def _stopped_clock() -> Iterator[None]:
    """Seconds are a unit of cost like any other, and choose between methods: here nothing takes any."""
    with mock.patch("time.perf_counter", return_value=0.0):
        yield


def _plain(text: str) -> list[str]:
    """Lines without colours, durations and repeated spaces."""
    text = DURATION.sub("* s", ANSI.sub("", text)).replace(str(ROOT), "ROOT")
    return [line for line in (re.sub(r"\s+", " ", line).strip() for line in text.splitlines()) if line]


def _content(path: Path) -> Any:
    """JSON or JSON lines, without what a run's clock or environment decides."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in text.splitlines()]
    return _without_times(json.loads(text))


def _without_times(value: Any, key: str = "") -> Any:
    if UNITS.search(key):
        return "*"
    if isinstance(value, dict):
        return {name: _without_times(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import tempfile

    source, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(source, Path(scratch) / "world")
        made = golden_run(Path(scratch) / "world", max_new_tokens=32)
    target.write_text(json.dumps(made, indent=1) + "\n")
