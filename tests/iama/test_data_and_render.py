"""Prompts, rendering, the cost ledger and atomic files."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from iama.cost import Cost
from iama.data import load_prompts
from iama.errors import DataError
from iama.files import is_temporary, temporary_name, write_atomically
from iama.render import as_completion, completion_text, prompt_text, render_exchange, render_prompt

MESSAGES = [{"role": "user", "content": "bake bread"}]


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
        ('{"prompt": "a", "topic": "x"}\n{"prompt": "b"}', "same columns"),
    ],
)
def test_malformed_prompts_are_named(tmp_path, text, match):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
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


def test_an_exchange_starts_with_its_prompt_and_has_one_bos(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    prompt, exchange = render_prompt(tokenizer, MESSAGES), render_exchange(tokenizer, MESSAGES, "mix flour")
    assert exchange[: len(prompt)] == prompt
    assert exchange[-1] == tokenizer.eos_token_id
    assert exchange.count(tokenizer.bos_token_id) == 1


def test_completions_have_trls_shapes():
    assert completion_text(as_completion(MESSAGES, "x")) == completion_text(as_completion("a", "x")) == "x"
    assert as_completion(MESSAGES, "x") == [{"role": "assistant", "content": "x"}]
    assert prompt_text(MESSAGES) == "bake bread"
    assert prompt_text([*MESSAGES, {"role": "assistant", "content": "no"}]) == "user: bake bread\nassistant: no"


def test_costs_add_up():
    total = Cost(1, 2, 3, 4, 0.5) + Cost(10, 20, 30, 40, 1.5)
    assert total == Cost(11, 22, 33, 44, 2.0)
    assert total.policy_tokens == total.as_dict()["policy_tokens"] == 33


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, json.dumps({"a": 1}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert is_temporary(temporary_name(path))
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
