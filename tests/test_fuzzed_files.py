"""Whatever becomes of a file, its reader reads the very numbers that stand there, or says in one line what is wrong.

Each example spoils a file in one of many ways; what is read is held against a reader that takes everything.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.manifest import load_manifest
from iama.config.schema import load_config
from iama.config.specs import PromptsSpec
from iama.errors import IamaError
from iama.prompts.data import read_prompts
from inference.evaluation.summary import load_summary
from inference.evaluation.tables import Tables, load_tables, save_tables
from inference.hedging.tuning_file import load_tuning
from inference.pools.file import read_pool
from inference.pools.journal import read_lines
from inference.report import headline, print_tables
from inference.report.html import render_html
from tests.inference.hedging.test_tuning_file import scored, tuning
from tests.inference.report_summary import make_summary

MANY = settings(max_examples=300, suppress_health_check=list(HealthCheck))
ROOT = Path(__file__).parents[1]

# Files as they should be. -------------------------------------------------------------------------------

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 16, "stop": ["\n"]}
HEADER = {"iama_pool": 1, "policy": {"name": "base"}, "sampling": SAMPLING, "num_samples": 2, "seed": 3}
COST = {"policy_prefill_tokens": 3, "policy_decode_tokens": 4, "seconds": 0.5}
POOL: list[Any] = [
    HEADER,
    {"prompt_id": "p", "prompt": "a?", "columns": {"k": [1, 2.5, {"x": -1}]}, "num_samples": 2, "cost": COST},
    {"prompt_id": "p", "sample": 0, "text": "é", "token_ids": [1, 2], "scores": {"h": 1.5, "g": None}},
    {"prompt_id": "p", "sample": 1, "text": "b", "num_tokens": 7, "scores": {"h": -2, "g": 0.25}, "segments": []},
    {"prompt": [{"role": "user", "content": "q"}], "text": "c", "scores": {"h": 1e-3, "g": 2}},
    {"prompt": [{"role": "user", "content": "q"}], "text": "d", "scores": {"h": 0.0, "g": 3}},
]
PROMPTS: list[Any] = [
    {"prompt": "how?", "answer": 7, "weights": [0.5, 1e-3, {"a": 3}], "note": "x"},
    {"prompt": "why?", "answer": 10**20, "weights": [], "note": None},
    {"prompt": "wo—?", "answer": -1.25, "weights": [0], "note": "007"},
]
REWARD = {"model": "m", "scale": {"mean": 0.5, "std": 2.0}}
TRAINING = {
    "name": "n",
    "output_dir": "runs/n",
    "policy": {"path": "p"},
    "prompts": {"path": "p.jsonl", "max_prompts": 9},
    "objective": {
        "criteria": [{"name": "c", "proxy": {"model": "m", "scale": {"mean": 0.5, "std": 2}}, "weight": 1.5}]
    },
    "world_size": 2,
    "seed": 4,
    "kl": {"target": 0.1, "chi2": 0.5},
    "sampling": {"temperature": 0.7, "max_new_tokens": 48},
    "trainer": {"learning_rate": 1e-3, "max_steps": 7, "beta": 0.2, "generation_kwargs": {"num_beams": 1}},
    "lora": {"r": 16, "lora_alpha": 32.5},
}
EVALUATION = {
    "name": "n",
    "output_dir": "runs/n",
    "policies": {"base": {"path": "p"}, "iama": {"path": "q", "training_run": ["a"]}},
    "prompts": "p.jsonl",
    "criteria": [{"name": "c", "proxy": {"model": "m"}, "gold": {"function": "f.py:g"}}],
    "budgets": [1, 2, 4],
    "num_samples": 16,
    "trained_budget": 2,
    "sampling": SAMPLING,
    "num_bootstrap": 200,
    "seed": 5,
}
MANIFEST = {
    "format": 1,
    "base_model": "b",
    "criteria": [{"name": "c", "operator": "bon(4)", "weight": 1.5, "reward": REWARD, "budget": 4}],
    "estimator": "loo",
    "sampling": SAMPLING,
    "seed": 3,
    "versions": {"iama": "1"},
}
TUNING = tuning(scored()).model_dump(mode="json")
SUMMARY = {key: value[:1] if isinstance(value, list) else value for key, value in make_summary().items()}
JOURNAL: list[Any] = [{"key": "a", "values": [1.5, 2], "num_calls": 2}, {"key": "b", "values": [-1e-9], "num_calls": 1}]


# What becomes of them. ----------------------------------------------------------------------------------

ODD = [
    "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-999", "-0", "-0.0", "0", "1", "-1", "2.0", "1.5", "1E3",
    "9007199254740993", str(10**30), "1" * 400, "1" * 5000, "true", "false", "null", '"x"', '"1.5"', '""', "[]", "{}",
    "[1]", '{"a": 1e999}', '{"a": NaN}', '[{"b": [[NaN]]}]', '{"a": 1, "a": 2}', '{"b": {"a": 1, "\\u0061": 2}}',
    '"\\ud800"', '{"\\udc00": 1}', '"\\u0000"', "[" * 90 + "]" * 90, "[" * 30000 + "]" * 30000, "01", "+1", "1.", ".5",
    "0x10", "1_0", "1:30", "010", ".inf", ".nan", "-.INF", "1e3", "~", "yes", "2024-01-01", "{", "\t1", "'a'", "&a 1",
    "*a", "!!float 1e999", "!!binary aGk=", "!!int x",
]  # fmt: skip
"""In the place of a value, as text."""
PIECES = [b"\n", b'"', b"{", b"]", b"e9", b"\t", b"\0", b"\xef\xbb\xbf"]
HOLE, TWIN = "@@hole@@", "@@twin@@"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(value))
    block = copy
    for key in path[:-1]:
        block = block[key]
    change(block, path[-1])
    return copy


@st.composite
def spoiled_values(draw: Any, value: Any) -> str:
    """JSON of a value in which one place was removed, written twice, or replaced by something odd."""
    path = draw(st.sampled_from(places(value)[1:]))
    how = draw(st.sampled_from(["replaced", "replaced", "replaced", "removed", "twice"]))
    if how == "removed":
        return json.dumps(changed(value, path, lambda block, key: block.pop(key)))
    odd = draw(st.sampled_from(ODD))
    if how == "replaced" or not isinstance(path[-1], str):

        def fill(block: Any, key: Any) -> None:
            block[key] = HOLE

        return json.dumps(changed(value, path, fill)).replace(f'"{HOLE}"', odd, 1)

    def twin(block: Any, key: Any) -> None:
        block[TWIN] = HOLE

    text = json.dumps(changed(value, path, twin))
    return text.replace(f'"{TWIN}"', json.dumps(path[-1]), 1).replace(f'"{HOLE}"', odd, 1)


@st.composite
def spoiled_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes of which some were changed, cut out, doubled, put in, or in another encoding."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        how = draw(st.integers(0, 6))
        piece = draw(
            st.binary(max_size=3) | st.sampled_from([b"\n", b'"', b"{", b"]", b"e9", b"\t", b"\0", b"\xef\xbb\xbf"])
        )
        data = [
            data[:start] + piece + data[end:],
            data[:start] + data[end:],
            data[:end] + data[start:],
            data[:start],
            data[:start] + bytes([(draw(st.integers(0, 255)))]) + data[start + 1 :],
            data[:start] + piece + data[start:],
            data,
        ][how]
        if how == 6:
            encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"]))
            data = data.decode("utf-8", "ignore").encode(encoding, "ignore")
    return data


def as_json(value: Any) -> st.SearchStrategy[bytes]:
    whole = json.dumps(value, indent=1).encode()
    return st.one_of(spoiled_values(value).map(str.encode), spoiled_bytes(whole))


def as_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """A line a row, one of them or the whole file spoiled."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]

    @st.composite
    def one_line(draw: Any) -> bytes:
        number = draw(st.integers(0, len(rows) - 1))
        spoiled = draw(spoiled_values(rows[number]))
        return "\n".join([*lines[:number], spoiled, *lines[number + 1 :], ""]).encode()

    return st.one_of(one_line(), spoiled_bytes("\n".join([*lines, ""]).encode()))


# What is read. ------------------------------------------------------------------------------------------


def read(reader: Callable[[], Any]) -> Any:
    """What a reader gives, None where it refuses; anything but one line fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return reader()
        except IamaError as error:
            told = str(error)
    assert "\n" not in told
    assert len(told) < 3000
    return None


def plain(data: bytes) -> Any:
    """JSON by the standard reader, which takes NaN, infinity and repeated keys; the latter are marked."""

    def marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key was written twice, and it was read"
        return dict(pairs)

    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=marked)


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Numbers, truth values and None within a value, with their places."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from numbers(item, (*path, key))
    elif not isinstance(value, str):
        yield path, value


def same(one: Any, other: Any) -> bool:
    """The same number, and no truth value in the place of one."""
    if isinstance(one, float) and isinstance(other, float) and math.copysign(1, one) != math.copysign(1, other):
        return False
    return isinstance(one, bool) == isinstance(other, bool) and one == other and abs(one or 0) != math.inf


def check_same(written: Any, found: Any) -> None:
    """Every number that is written stands at its place in what was found."""
    there = dict(numbers(found))
    for path, value in numbers(written):
        assert path in there, f"{path} is not read"
        assert same(value, there[path]), f"{path}: {value!r} was read as {there[path]!r}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.slow
@MANY
@given(data=as_lines(POOL))
def test_pools(folder, data):
    path = write(folder, "pool.jsonl", data)
    pool = read(lambda: read_pool(path))
    if pool is None:
        return
    lines = [plain(line) for line in data.split(b"\n") if line.strip()]
    check_same(
        {**lines[0], "num_samples": None} | lines[0], {**pool.header, "num_samples": lines[0].get("num_samples")}
    )
    written = [line for line in lines[1:] if "text" in line]
    found = [sample for prompt in pool.prompts for sample in prompt.samples]
    assert len(written) == len(found)
    by_text = {sample.text: sample for sample in found}
    for line in written:
        sample = by_text[line["text"]]
        check_same(line.get("scores", {}), sample.scores)
        check_same(line.get("token_ids") or [], sample.token_ids)
        assert line.get("num_tokens") in (None, sample.num_tokens)
    for line in lines[1:]:
        prompt = next(p for p in pool.prompts if p.prompt_id == line.get("prompt_id") or p.prompt == line.get("prompt"))
        check_same(line.get("columns", {}), prompt.columns)
        check_same(line.get("cost", {}), vars(prompt.cost))


@pytest.mark.slow
@MANY
@given(data=as_lines(PROMPTS))
def test_prompts_as_lines(folder, data):
    path = write(folder, "prompts.jsonl", data)
    rows = read(lambda: read_prompts(PromptsSpec(path=str(path))))
    if rows is not None:
        written = [plain(line) for line in data.split(b"\n") if line.strip()]
        check_same(written, rows)
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in written]


@pytest.mark.slow
@MANY
@given(data=as_json(PROMPTS))
def test_prompts_as_a_list(folder, data):
    path = write(folder, "prompts.json", data)
    rows = read(lambda: read_prompts(PromptsSpec(path=str(path))))
    if rows is not None:
        check_same(plain(data), rows)


@MANY
@given(data=spoiled_bytes(b'prompt,answer\n"how, so?",007\nwhy?,"1e999"\n'))
def test_prompts_as_csv(folder, data):
    path = write(folder, "prompts.csv", data)
    rows = read(lambda: read_prompts(PromptsSpec(path=str(path))))
    if rows is not None:
        header, *cells = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
        assert [[row[name] for name in header] for row in rows] == cells


NESTED = st.recursive(
    st.floats() | st.integers(-(2**63), 2**63 - 1) | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@MANY
@given(value=NESTED, others=st.lists(NESTED, max_size=2))
def test_numbers_in_parquet(folder, value, others):
    rows = [{"prompt": "q", "x": item} for item in (value, *others)]
    try:
        table = pa.Table.from_pylist(rows)
        parquet.write_table(table, folder / "prompts.parquet")
    except (pa.ArrowException, OverflowError):  # values of unlike kinds, or no fields: not a file that anybody has
        return
    found = read(lambda: read_prompts(PromptsSpec(path=str(folder / "prompts.parquet"))))
    has_bad = any(isinstance(x, float) and not math.isfinite(x) for _, x in numbers(table.to_pylist()))
    assert (found is None) == has_bad
    if found is not None:
        check_same(table.to_pylist(), found)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_parquet_files_that_are_damaged(folder, data):
    path = folder / "damaged.parquet"
    if not path.exists():
        parquet.write_table(pa.Table.from_pylist([{"prompt": f"q{i}", "x": [i, i / 7]} for i in range(50)]), path)
    spoiled = write(folder, "spoiled.parquet", data.draw(spoiled_bytes(path.read_bytes())))
    read(lambda: read_prompts(PromptsSpec(path=str(spoiled))))


@MANY
@given(data=st.data())
def test_tables(folder, data):
    """Every number is under a checksum."""
    key = ("iama", "helpful", "bon", "proxy")
    whole = Tables({key: np.arange(6.0).reshape(2, 3)}, {key: np.full((2, 3), np.nan)})
    if not (folder / "whole" / "prompt_values.npz").exists():
        (folder / "whole").mkdir()
        save_tables(folder / "whole", whole)
    write(folder, "prompt_values.npz", data.draw(spoiled_bytes((folder / "whole" / "prompt_values.npz").read_bytes())))
    found = read(lambda: load_tables(folder))
    if found is not None:
        for there, written in ((found.values, whole.values), (found.costs, whole.costs)):
            assert there.keys() == written.keys()
            np.testing.assert_array_equal(there[key], written[key])


def yaml_of(value: Any) -> st.SearchStrategy[bytes]:
    """JSON is YAML, too; and YAML as people write it."""
    block = yaml.safe_dump(value, sort_keys=False).encode()
    return st.one_of(spoiled_values(value).map(str.encode), spoiled_bytes(block), spoiled_values(value).map(in_blocks))


def in_blocks(text: str) -> bytes:
    """The topmost keys on lines of their own."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return text.encode()
    return "".join(f"{key}: {text_of(value)}\n" for key, value in pairs).encode()


def text_of(value: Any) -> str:
    """JSON of what `object_pairs_hook=list` gave; a key that was written twice still is."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return "{" + ", ".join(f"{json.dumps(key)}: {text_of(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "kind"), [(TRAINING, TrainingConfig), (EVALUATION, EvaluationConfig)])
@MANY
@given(data=st.data())
def test_configurations(folder, data, value, kind):
    content = data.draw(yaml_of(value))
    path = write(folder, "config.yaml", content)
    config = read(lambda: load_config(path, kind))
    if config is None:
        return
    written = yaml.safe_load(content.decode("utf-8-sig"))
    if isinstance(written.get("prompts"), str):
        written["prompts"] = {}
    found = config.model_dump()
    check_same(json.loads(json.dumps(written, default=str)), found | {"num_answers": 1} | found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "load"),
    [
        ("iama.json", MANIFEST, lambda path: load_manifest(path.parent)),
        ("tuning.json", TUNING, load_tuning),
        ("summary.json", SUMMARY, lambda path: load_summary(path.parent)),
    ],
)
@MANY
@given(data=st.data())
def test_our_own_files(folder, data, name, value, load):
    content = data.draw(as_json(value))
    path = write(folder, name, content)
    found = read(lambda: load(path))
    if found is not None:
        check_same(plain(content), found if isinstance(found, dict) else found.model_dump())
    if found is not None and name == "summary.json":
        render_html(found)
        print_tables(found, Console(file=io.StringIO()))
        headline(found)


@MANY
@given(data=as_lines(JOURNAL))
def test_journals(folder, data):
    path = write(folder, "journal.jsonl", data)
    rows = read(lambda: read_lines(path))
    if rows is not None:
        written = [plain(line) for line in data.split(b"\n")[:-1]]
        check_same({row["key"]: row for row in written}, rows)
