"""Prompts, rendering, the cost ledger and atomic files."""

from __future__ import annotations

import csv
import datetime
import json
import re
import warnings
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from iama.config.schema import Strict, load_config
from iama.config.specs import PromptsSpec
from iama.errors import ConfigError, DataError, IamaWarning, ModelError
from iama.files import is_temporary, temporary_name, write_atomically
from iama.prompts.data import fitting_prompts, load_prompts, read_prompts, with_system_prompt
from iama.prompts.render import (
    as_completion,
    completion_text,
    prompt_text,
    render_exchange,
    render_exchanges,
    render_prompt,
)

MESSAGES = [{"role": "user", "content": "bake bread"}]
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "with flour"}
TURNS = [*MESSAGES, ANSWER, {"role": "user", "content": "how much?"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """What the datasets package keeps of a test goes with it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    """Rows in the format that the file's name says."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    else:
        frame.to_parquet(path)
    return path


def read(path, **fields):
    return read_prompts(PromptsSpec(path=str(path), **fields))


def refusal(path, **fields):
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds no prompts"),
        ("not json", "prompts.jsonl:1: not JSON"),
        ('{"question": "x"}', "no 'prompt'"),
        ('{"prompt": "  "}', "neither a non-empty text"),
        ('{"prompt": []}', "neither a non-empty text"),
        ('{"prompt": [{"role": "user"}]}', "neither a non-empty text"),
        ('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}', "mixes text prompts and message"),
        ('{"prompt": "a", "topic": "x"}\n{"prompt": "b"}', "prompts.jsonl:2: .*same columns"),
        ('{"prompt": "a"}\n\n["b"]', "prompts.jsonl:3: no object"),
        ('{"prompt": "a"}\n{"prompt": null}', "prompts.jsonl:2: prompt 'None' is neither"),
        ('{"prompt": [{"role": "user", "content": " "}]}', "prompts.jsonl:1: .* asks with an empty message"),
        ('{"prompt": [{"role": "system", "content": ""}]}', "prompts.jsonl:1: .* asks with an empty message"),
        (json.dumps({"prompt": [{"role": "user", "content": ""}, ANSWER, *MESSAGES]}), "asks with an empty message"),
        (json.dumps({"prompt": [*MESSAGES, ANSWER]}), "prompt ends with the assistant's 'with flour'"),
    ],
)
def test_malformed_prompts_are_named(tmp_path, text, match):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        load_prompts(path)


@pytest.mark.parametrize("row", ['{"prompt": "a \\ud83d"}', '{"prompt": "a", "answer": ["\\ud83d"]}'])
def test_half_a_character_is_named(tmp_path, row):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{row.replace('ud83d', 'ud83d' + chr(92) + 'ude00')}\n{row}\n")  # a whole pair, and half of one
    with pytest.raises(
        DataError, match=r"prompts\.jsonl:2: '\\ud83d' is half a character, which UTF-8 cannot hold; write"
    ):
        load_prompts(path)


def test_missing_prompts_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl' does not exist"):
        load_prompts(tmp_path / "nowhere.jsonl")


def test_a_line_separator_inside_a_prompt_is_no_new_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert load_prompts(tmp_path / "p.jsonl") == [{"prompt": "one\u2028two\u0085three"}]


def test_prompts_keep_their_columns(tiny):
    rows = load_prompts(tiny.prompts, max_prompts=2)
    assert [row["topic"] for row in rows] == ["bread", "tomatoes"]


TEXTS = st.text(min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "answer": st.text(max_size=6)}), min_size=1, max_size=4))
@example([{"prompt": 'a "quoted",\nbroken\r\nline', "answer": "007"}, {"prompt": "NA", "answer": ""}])
@example([{"prompt": "one\u2028two\u0085three\rfour", "answer": "null"}])
@example([{"prompt": "x" * 200_000, "answer": "1e5"}])
def test_texts_are_the_same_from_every_kind_of_file(tmp_path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)  # of texts that look like messages
        for suffix in (".jsonl", ".json", ".csv", ".parquet"):
            assert read(write(tmp_path / f"prompts{suffix}", rows)) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_messages_and_numbers_are_kept(tmp_path, suffix):
    rows = [{"prompt": TURNS, "level": 3, "tags": ["a"]}, {"prompt": [SYSTEM, *MESSAGES], "level": 4, "tags": []}]
    assert read(write(tmp_path / f"prompts{suffix}", rows)) == rows


def test_fields_that_only_some_messages_have_stay_theirs(tmp_path):
    rows = [{"prompt": [{"role": "tool", "content": "7", "name": "sum"}]}, {"prompt": MESSAGES}]
    assert read(write(tmp_path / "p.parquet", rows)) == rows


def test_a_folder_is_a_dataset_with_splits(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i}", "solution": str(i)} for i in range(3)]
        write(folder / f"{split}.jsonl", rows)
    columns = {"prompt": "question", "answer": "solution"}
    assert read(folder, split="test", columns=columns, max_prompts=2) == [
        {"prompt": "test 0", "answer": "0"},
        {"prompt": "test 1", "answer": "1"},
    ]
    assert [row["prompt"] for row in read(folder, split="train[1:]", columns=columns)] == ["train 1", "train 2"]
    assert "it has the splits train, test; set prompts.split" in refusal(folder)
    assert "Unknown split \"tset\". Should be one of ['train', 'test']" in refusal(folder, split="tset")
    assert "'hard' not found. Available: ['default']" in refusal(folder, subset="hard")


def test_the_only_split_needs_no_name(tmp_path):
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "train.parquet", [{"prompt": MESSAGES}])
    assert read(tmp_path / "one") == [{"prompt": MESSAGES}]


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "prompts 'org/nowhere': no such file or folder, and no dataset of that name" in refusal("org/nowhere")
    assert "no such file or folder" in refusal(tmp_path / "nowhere" / "deeper")
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        assert f"nowhere{suffix}' does not exist" in refusal(tmp_path / f"nowhere{suffix}")
    (tmp_path / "prompts.txt").write_text("bread")
    assert "of unknown kind; give one of .jsonl, .json, .csv, .parquet" in refusal(tmp_path / "prompts.txt")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.csv", b"prompt,topic\nbread,x\n,y\n", "p.csv:3: prompt '' is neither a non-empty text"),
        ("p.csv", b'prompt,topic\n"two\nlines",x\n" ",y\n', "p.csv:4: prompt ' ' is neither"),
        ("p.csv", b"prompt,topic\nhow, though?,x\n", "p.csv:2: 3 cells, but 2 columns; quote cells"),
        ("p.csv", b"prompt,prompt\na,b\n", "p.csv:1: two columns of the same name"),
        ("p.csv", b'prompt\n"open', "p.csv:2: not CSV"),
        ("p.csv", b"prompt\n\xff\xfe", "not UTF-8 (byte 7)"),
        ("p.jsonl", b"\xff", "not UTF-8 (byte 0)"),
        ("p.json", b'{"prompt": "a"}', "expected a list of objects"),
        ("p.json", b"[1]", "expected a list of objects"),
        (
            "p.json",
            b'{"prompt": "a"}\n{"prompt": "b"}',
            "p.json:2: not JSON (Extra data); one object a line is a .jsonl",
        ),
        ("p.json", b'[{"prompt": "a"}, {"prompt": ""}]', "p.json: row 2: prompt '' is neither"),
        ("p.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert told in refusal(tmp_path / name)


def test_an_empty_cell_of_parquet_is_named(tmp_path):
    assert "p.parquet: row 2: prompt 'None'" in refusal(
        write(tmp_path / "p.parquet", [{"prompt": "a"}, {"prompt": None}])
    )


def test_spreadsheets_byte_order_marks_are_no_part_of_a_name(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt\r\nbread\r\n\r\n")
    assert read(tmp_path / "p.csv") == [{"prompt": "bread"}]


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": "bread?", "solution": "flour", "prompt": "old", "level": 1}])
    row = {"prompt": "bread?", "answer": "flour", "level": 1}
    assert read(path, columns={"prompt": "question", "answer": "solution"}) == [row]
    assert read(path, columns={"prompt": "solution", "solution": "prompt"})[0]["solution"] == "old"
    told = refusal(path, columns={"prompt": "qestion"})
    assert "prompts.columns.prompt: no column 'qestion'; did you mean 'question'?" in told
    without = write(tmp_path / "q.csv", [{"question": "bread?"}])
    assert "no 'prompt' among the columns ['question']; name the one that holds it" in refusal(without)


def test_files_have_no_splits(tmp_path):
    path = write(tmp_path / "p.csv", [{"prompt": "bread"}])
    assert "prompts.split 'train' belongs to a named dataset" in refusal(path, split="train")
    assert "prompts.subset 'main' belongs to a named dataset" in refusal(path, subset="main")


def test_columns_that_are_no_data_are_left_out_with_a_word(tmp_path):
    path = write(tmp_path / "p.parquet", [{"prompt": "bread", "day": datetime.date(2020, 1, 2)}])
    with pytest.warns(IamaWarning, match=r"p.parquet: column 'day' is left out: it holds date values"):
        assert read(path) == [{"prompt": "bread"}]


def test_messages_written_as_text_stay_text_with_a_word(tmp_path):
    path = write(tmp_path / "p.csv", [{"prompt": json.dumps(MESSAGES)}])
    with pytest.warns(IamaWarning, match=r"p.csv:2: .* looks like messages, but is a text"):
        assert read(path) == [{"prompt": json.dumps(MESSAGES)}]


def test_a_system_prompt_is_put_before_prompts_without_one(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "bread", "topic": "x"}])
    assert read(path, system_prompt="be brief") == [
        {"prompt": [SYSTEM, {"role": "user", "content": "bread"}], "topic": "x"}
    ]
    assert read(path) == [{"prompt": "bread", "topic": "x"}]


@given(st.one_of(TEXTS, st.just(TURNS), st.just([SYSTEM, *TURNS])), TEXTS, TEXTS)
def test_the_first_system_prompt_stays(prompt, text, other):
    once = with_system_prompt(prompt, text)
    assert with_system_prompt(prompt, None) == prompt
    assert with_system_prompt(once, other) == once
    assert [message["role"] for message in once].count("system") == 1
    assert once[0] == (prompt[0] if prompt[0] == SYSTEM else {"role": "system", "content": text})
    assert once[-1]["content"] == (prompt if isinstance(prompt, str) else "how much?")


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 6), st.none() | st.integers(2, 14))
def test_a_prompt_is_taken_where_its_answer_fits(num_tokens_P, max_new_tokens, context_length):
    rows = [{"prompt": f"prompt {i}"} for i in range(len(num_tokens_P))]
    fits = [context_length is None or n + max_new_tokens <= context_length for n in num_tokens_P]
    strict, lenient = PromptsSpec(path="p.csv"), PromptsSpec(path="p.csv", too_long="drop")
    arguments = (rows, num_tokens_P, context_length, max_new_tokens)
    if all(fits):
        assert fitting_prompts(strict, *arguments) == fitting_prompts(lenient, *arguments) == rows
        return
    first = fits.index(False) + 1
    with pytest.raises(DataError, match=rf"p.csv: prompt {first} .*exceeds.*too_long: drop"):
        fitting_prompts(strict, *arguments)
    if not any(fits):
        with pytest.raises(DataError, match="every prompt is too long"):
            fitting_prompts(lenient, *arguments)
        return
    with pytest.warns(IamaWarning, match=rf"{fits.count(False)} of {len(fits)} prompts dropped: prompt {first} "):
        assert fitting_prompts(lenient, *arguments) == [row for row, fit in zip(rows, fits, strict=True) if fit]


class Block(Strict):
    """A configuration with prompts."""

    prompts: PromptsSpec


def test_prompts_are_set_from_the_command_line(tmp_path):
    text, block = tmp_path / "text.yaml", tmp_path / "block.yaml"
    text.write_text("prompts: a.jsonl\n")
    block.write_text("prompts:\n  path: a.jsonl\n")
    for path in (text, block):
        assert load_config(path, Block, ["prompts=b.csv"]).prompts == PromptsSpec(path="b.csv")
    changed = load_config(block, Block, ["prompts.max_prompts=5", "prompts.columns.prompt=question"]).prompts
    assert changed == PromptsSpec(path="a.jsonl", max_prompts=5, columns={"prompt": "question"})
    for override in ("prompts.max_prompts=5", "prompts.columns.prompt=question"):
        with pytest.raises(ConfigError, match=r"'prompts' is 'a.jsonl', .*as a block, e.g. prompts: {path: a.jsonl}"):
            load_config(text, Block, [override])


def test_messages_that_a_template_refuses(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match=r"refuses messages with the roles system, user \(System role not supported\)"):
        render_prompt(tokenizer, [SYSTEM, *MESSAGES])
    with pytest.raises(ModelError, match="roles user, assistant"):
        render_exchange(tokenizer, MESSAGES, "mix flour")


def test_turns_are_rendered_in_order(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    text = tokenizer.decode(render_prompt(tokenizer, with_system_prompt(TURNS, "be careful")))
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>"]
    assert [word for word in text.replace("<|", " <|").replace("|>", "|> ").split() if word in marks] == marks


def test_an_exchange_starts_with_its_prompt_and_has_one_bos(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    prompt, exchange = render_prompt(tokenizer, MESSAGES), render_exchange(tokenizer, MESSAGES, "mix flour")
    assert exchange[: len(prompt)] == prompt
    assert exchange[-1] == tokenizer.eos_token_id
    assert exchange.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("prompts", [[MESSAGES, TURNS, MESSAGES], ["bake bread", "grow"], [MESSAGES, "grow"], []])
def test_many_exchanges_are_those_of_each_alone(tiny, prompts):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    texts = ["mix flour", "", "no thanks"][: len(prompts)]
    alone = [render_exchange(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert render_exchanges(tokenizer, prompts, texts) == alone
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}x"
    if TURNS in prompts:
        with pytest.raises(ModelError, match="roles user, assistant, user, assistant"):
            render_exchanges(tokenizer, prompts, texts)


def test_completions_have_trls_shapes():
    assert completion_text(as_completion(MESSAGES, "x")) == completion_text(as_completion("a", "x")) == "x"
    assert as_completion(MESSAGES, "x") == [{"role": "assistant", "content": "x"}]
    assert prompt_text(MESSAGES) == "bake bread"
    assert prompt_text([*MESSAGES, {"role": "assistant", "content": "no"}]) == "user: bake bread\nassistant: no"


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, json.dumps({"a": 1}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert is_temporary(temporary_name(path))
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_the_page_on_prompts_shows_prompts_that_can_be_configured():
    page = (Path(__file__).parents[3] / "docs/guides/prompts.md").read_text(encoding="utf-8")
    short, full = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert Block.model_validate(yaml.safe_load(short)).prompts == PromptsSpec(path="prompts.jsonl")
    written = yaml.safe_load(full)["prompts"]
    assert list(written) == list(PromptsSpec.model_fields)
    assert PromptsSpec(**written).split == "train[100:]"
