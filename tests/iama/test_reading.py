"""What others write is read strictly: whatever is not as it seems is one line with the file and the line number."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.schema import load_config
from iama.config.specs import PromptsSpec
from iama.errors import ConfigError, DataError, IamaError, ModelError
from iama.models.loading import check_model_dir
from iama.prompts.data import read_prompts
from iama.reading import check_finite, parse_json, parse_yaml, read_json, read_text
from tests.conftest import Tiny


def refusal(action, kind: type[IamaError] = IamaError) -> str:
    with pytest.raises(kind) as told:
        action()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("naïve".encode("latin-1"), "f.txt:1: not UTF-8 (byte 2); save the file as UTF-8"),
        (b"one\ntwo\n\xff", "f.txt:3: not UTF-8 (byte 8)"),
        ("naïve".encode("utf-16"), "f.txt: not UTF-8 but UTF-16; save the file as UTF-8"),
        ("naïve".encode("utf-32"), "f.txt: not UTF-8 but UTF-32"),
        (b"\x1f\x8b\x08", "f.txt: compressed (gzip); unpack it first"),
        ("one\ntwo".encode("utf-16-le"), "f.txt:1: a zero byte, as in UTF-16 and in binary files"),
    ],
)
def test_text_in_another_encoding(tmp_path, data, told):
    (tmp_path / "f.txt").write_bytes(data)
    assert refusal(lambda: read_text(tmp_path / "f.txt", ModelError), ModelError).startswith(f"{tmp_path}/{told}")


def test_text_is_read_as_it_is(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes("\ufeffnaïve\r\n\u2028".encode())
    assert read_text(path) == "naïve\r\n\u2028"
    assert "Is a directory" in refusal(lambda: read_text(tmp_path))
    assert "No such file" in refusal(lambda: read_text(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1,\n "b": {"a": 2,\n\n "a": 3}}', "4: the key 'a' is written twice, in lines 2 and 4; write it once"),
        ('[{"a": 1}, {"\\u0061": 1, "a": 2}]', "1: the key 'a' is written twice, in line 1; write it once"),
        ('{"a": "NaN",\n "b": [[NaN]]}', "2: NaN is not JSON, write null for a missing number"),
        ("[1,\n-Infinity]", "2: -Infinity is not JSON, write null"),
        ('{"a": "1e999", "b":\n 1e999}', "2: 1e999 is beyond what floats can hold; write null for a missing number"),
        ("[-1E+400]", "1: -1E+400 is beyond what floats can hold"),
        ("[1e-400]", "1: 1e-400 is nearer to 0 than floats can hold; write 0"),
        ('{"a": "\\ud800"}', "1: '\\ud800' is half a character, which UTF-8 cannot hold; write \\ufffd"),
        ('{"a"\n1}', "2: not JSON (Expecting ':' delimiter); mend it"),
        ("[" * 101 + "]" * 101, "1: not JSON that can be read (nested too deep); mend it"),
        ("[" * 100_000, "1: not JSON that can be read (nested too deep); mend it"),
        (
            "[1,\n-" + "9" * 5000 + "]",
            "2: an integer of 5000 digits, which is too long to be read; write a shorter one",
        ),
        ("", "1: not JSON (Expecting value); mend it"),
    ],
)
def test_json(tmp_path, text, told):
    (tmp_path / "f.json").write_text(text)
    read = refusal(lambda: read_json(tmp_path / "f.json", ConfigError, "mend it"), ConfigError)
    assert read.startswith(f"{tmp_path / 'f.json'}:{told}")
    line = int(told.partition(":")[0])
    later = refusal(lambda: parse_json(text, "g", ConfigError, "mend it", first_line=41))
    assert later.startswith(f"g:{40 + line}:")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a":[' + "0,\n" * 200_000 + "NaN]}", "body:200001: NaN is not JSON"),
        ('{"%s":1,"%s":2}' % (("https://" * 50_000,) * 2), "body:1: the key 'https://"),
        ("[" + "9" * 200_000 + ".0]", "body:1: 99999"),
        ("[0." + "0" * 200_000 + "1]", "body:1: 0.000"),
    ],
    ids=["many values", "long key", "large number", "small number"],
)
def test_a_long_text_is_refused_at_once_and_in_few_words(text, told):
    start = time.process_time()
    with pytest.raises(DataError, match=re.escape(told)) as error:
        parse_json(text, "body", DataError, "send one JSON object")
    assert time.process_time() - start < 5  # minutes where the time grows with the square
    assert len(str(error.value)) < 200


def test_json_that_is_fine():
    text = (
        '{"a": [-0.0, 0e5, 1e308, 0.0e-999, 12345678901234567890], "b": {"a": null}, "c": "NaN \\ud83d\\ude00 {\\"a"}'
    )
    text = "[" * 90 + text + "]" * 90
    assert parse_json(text, "f", DataError, "") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "f:5: the key 'c' is written twice, in lines 3 and 5; write it once"),
        ("t: {r: 1, s: 2,\n  r: 3}", "f:2: the key 'r' is written twice, in lines 1 and 2"),
        ("- a: 1\n  'a': 2", "f:2: the key 'a' is written twice, in lines 1 and 2"),
        ("1: a\n0x1: b", "f:2: the key 1 is written twice, in lines 1 and 2"),
        ("x: &x {p: 1}\ny:\n  <<: *x\n  <<: *x", "f:4: the key '<<' is written twice, in lines 3 and 4"),
        ("a: .inf", "f:1: .inf is no finite number; write a finite number"),
        ("b: 1\na: [-.Inf]", "f:2: -.Inf is no finite number"),
        ("a: .NaN", "f:1: .NaN is no finite number"),
        ("a: 1e999", "f:1: 1e999 is beyond what floats can hold"),
        ("a: 1.0e-999", "f:1: 1.0e-999 is nearer to 0 than floats can hold; write 0"),
        ("a: 010", "f:1: 010 is another number to some readers; write it without a leading 0, or quote it"),
        ("a: 1:30", "f:1: 1:30 is another number to some readers"),
        ("a:\n\t- 1", "f:2: not valid YAML (a tab; indent with blanks)"),
        ("a: b: c", "f:1: not valid YAML (mapping values are not allowed here)"),
        ("a: 1\n---\nb: 2", "f:2: not valid YAML (but found another document)"),
        ("a: &x [*x]", "f: not valid YAML (more than 1000000 values, or a block that holds itself)"),
        ("[" * 101 + "]" * 101, "f: not YAML that can be read (nested too deep"),
        ("[" * 20_000, "f: not YAML that can be read (nested too deep"),
        ('a: "\\ud800"', "f: not valid YAML (a text: '\\ud800' is half a character"),
        ("a: \x07", "f: not valid YAML (unacceptable character #x0007"),
        ("a: !!binary aGk=", "f: not valid YAML (bytes \"b'hi'\" is neither text nor number; quote it)"),
        ("a: !!python/object:os.x {}", "f:1: could not determine a constructor"),
        ("b: 1\na: " + "9" * 5000, "f:2: an integer of 5000 digits, which is too long to be read; write a shorter one"),
        ("? [1, 2]\n: 3", "f:1: not valid YAML (found unhashable key)"),
        (
            "\n".join(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]" for i in range(1, 9)).replace("*x1", "1"),
            "f: ",
        ),
    ],
)
def test_yaml(text, told):
    assert refusal(lambda: parse_yaml(text, "f"), ConfigError).startswith(told)


def test_yaml_that_is_fine():
    text = "b: &b {x: 1, y: [1e-3, 1_000, 0x10]}\na: &a\n  <<: *b\n  x: 2\nc:\n  <<: *a\n  z: 2024-01-01\nd: -0.0"
    inner = {"x": 1, "y": [0.001, 1000, 16]}
    assert parse_yaml(text) == {"b": inner, "a": inner | {"x": 2}, "c": inner | {"x": 2, "z": "2024-01-01"}, "d": 0.0}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, "here is nan"),
        ([1, {"a": (2.0, -math.inf)}], "here.1.a.1 is -inf; write a finite number, or leave it out"),
    ],
)
def test_numbers_within_values(value, told):
    assert refusal(lambda: check_finite(value, "here")).startswith(told)
    check_finite([1, {"a": (2.0, None, "nan", True, 10**400)}], "here")


# Doors. -------------------------------------------------------------------------------------------------

BLOCK = (
    "name: n\noutput_dir: o\npolicy: {path: p}\nprompts: q\nobjective:\n  criteria: [{name: c, proxy: {model: m}}]\n"
)


@pytest.mark.parametrize(
    ("text", "overrides", "told"),
    [
        (
            BLOCK + "trainer:\n  learning_rate: 1e-3\n  max_steps: 2\n  learning_rate: 1e-6\n",
            [],
            "f.yaml:10: the key 'learning_rate' is written twice, in lines 8 and 10; write it once",
        ),
        (BLOCK + "seed: 1\nlora: {r: 2}\nseed: 2\n", [], "f.yaml:9: the key 'seed' is written twice, in lines 7 and 9"),
        (BLOCK + "trainer: {learning_rate: .nan}\n", [], "f.yaml:7: .nan is no finite number"),
        (BLOCK + "kl: {target: 1e999}\n", [], "f.yaml:7: 1e999 is beyond what floats can hold"),
        (BLOCK + "sampling: {max_new_tokens: true}\n", [], "sampling.max_new_tokens: true would be read as 1; write 1"),
        (BLOCK + "kl: {chi2: 9007199254740993}\n", [], "chi2: 9007199254740993 would be read as 9007199254740992.0"),
        (BLOCK, ["trainer.beta=.inf"], "--set 'trainer.beta=.inf': cannot set 'beta' (.inf is no finite number"),
        (BLOCK, ["trainer={a: 1, a: 2}"], "cannot set 'trainer' (the key 'a' is written twice, in line 1"),
        (BLOCK, ["seed=true"], "seed: true would be read as 1"),
        (BLOCK, ["world_size=1", "seed=-1"], "--set: seed: Input should be greater than or equal to 0"),
        (BLOCK + "seed: -1\n", ["world_size=1"], "f.yaml: seed: Input should be"),
    ],
)
def test_configurations(tmp_path, text, overrides, told):
    (tmp_path / "f.yaml").write_text(text)
    assert told in refusal(lambda: load_config(tmp_path / "f.yaml", TrainingConfig, overrides), ConfigError)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_configurations_in_another_encoding(tmp_path, encoding):
    (tmp_path / "f.yaml").write_bytes("name: naïve\n".encode(encoding))
    told = refusal(lambda: load_config(tmp_path / "f.yaml", EvaluationConfig), ConfigError)
    assert told.startswith(f"{tmp_path / 'f.yaml'}:")
    assert "save the file as UTF-8" in told


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.jsonl", '{"prompt": "a", "w": 1}\n{"prompt": "b", "w": [1, 1e999]}\n', "p.jsonl:2: 1e999 is beyond"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b", "prompt": "c"}\n',
            "p.jsonl:3: the key 'prompt' is written twice",
        ),
        ("p.jsonl", '{"prompt": "a", "w": {"x": NaN}}\n', "p.jsonl:1: NaN is not JSON"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": "b", "w": Infinity}]', "p.json:2: Infinity is not JSON"),
    ],
)
def test_prompts(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    assert told in refusal(lambda: read_prompts(PromptsSpec(path=str(tmp_path / name))), DataError)


def test_prompts_in_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [{"prompt": "a", "w": {"x": [1.0, 2.0]}}, {"prompt": "b", "w": {"x": [1.0, math.nan]}}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    told = refusal(lambda: read_prompts(PromptsSpec(path=str(path))), DataError)
    assert "p.parquet: row 2: column 'w'.x.1 is nan; write a finite number, or leave it out" in told
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["prompt", "w", "w"])
    parquet.write_table(twice, path)
    assert "two columns of the same name" in refusal(lambda: read_prompts(PromptsSpec(path=str(path))), DataError)


def test_an_index_of_weights(tiny: Tiny, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    told = refusal(lambda: check_model_dir(str(tmp_path), "policy.path"), ModelError)
    assert "model.safetensors.index.json:1: the key 'a' is written twice" in told
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "is damaged; save the model again" in refusal(lambda: check_model_dir(str(tmp_path), "policy.path"))
