"""The format of pool files: what is written is read, foreign files, and what is refused and how."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iama.cost import Cost
from iama.errors import DataError, RunError
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.pools import file as pool_file
from inference.pools.file import (
    append_block,
    merge_pools,
    open_unfinished,
    prompt_ids,
    read_pool,
    read_so_far,
    read_unfinished,
    union,
    write_pool,
)
from inference.pools.format import full_header, header_difference

HEADER = full_header({"iama_pool": 1, "policy": {"name": "base", "path": "p", "fingerprint": "f"}, "seed": 3}, "test")
FOREIGN = '{"iama_pool": 1, "policy": {"name": "theirs"}}'


def foreign(tmp_path, *rows, header=FOREIGN):
    path = tmp_path / "foreign.jsonl"
    path.write_text("\n".join([header, *(row if isinstance(row, str) else json.dumps(row) for row in rows)]) + "\n")
    return path


texts = st.text(max_size=6)
scores = st.dictionaries(st.sampled_from(["helpful", "helpful/gold", "é"]), st.none() | st.floats(-1e50, 1e50))
ids = st.lists(st.integers(0, 10**6)).map(tuple)
samples = st.one_of(
    st.builds(
        lambda text, reason, n, s: Response(text, finish_reason=reason, length=n, scores=s),
        texts,
        st.sampled_from(["stop", "length"]),
        st.none() | st.integers(0, 9),
        scores,
    ),
    st.builds(
        lambda text, i, s: Response(text, i, "stop", None, None if i else 0, s, ({"text": text},)), texts, ids, scores
    ),
)
messages = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), min_size=1)
prompts = st.one_of(messages, texts.filter(str.strip))
costs = st.builds(Cost, st.integers(0, 99), st.integers(0, 99), seconds=st.floats(0, 9))


@st.composite
def pools(draw):
    number = draw(st.integers(1, 3))
    given = draw(st.lists(prompts, min_size=1, max_size=3, unique_by=json.dumps))
    blocks = [
        PooledPrompt(
            name,
            prompt,
            {"topic": draw(texts)},
            tuple(draw(samples) for _ in range(number)),
            draw(costs),
            draw(st.booleans()),
        )
        for name, prompt in zip(prompt_ids([{"prompt": p} for p in given]), given, strict=True)
    ]
    return Pool({**HEADER, "num_samples": number}, blocks)


@settings(max_examples=30)
@given(pools(), st.randoms())
def test_what_is_written_is_read_whatever_the_order_of_its_lines(tmp_path_factory, pool, random):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    write_pool(path, pool)
    assert read_pool(path) == pool
    header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    random.shuffle(lines)
    path.write_text("\n".join([header, "", *lines]), encoding="utf-8")  # a blank line, and none at the end
    read = read_pool(path)
    assert sorted(read.prompts, key=lambda p: p.prompt_id) == sorted(pool.prompts, key=lambda p: p.prompt_id)


def test_a_block_torn_at_any_byte_is_cut_off_and_nothing_else(tmp_path):
    path = tmp_path / "torn.jsonl"
    body = (Response("naïve\n", (3, 4), "stop", scores={"helpful": None}), Response("", finish_reason="length"))
    blocks = [PooledPrompt(name, "why?", {}, body, Cost(1), False) for name in "ab"]
    write_pool(path, Pool({**HEADER, "num_samples": 2}, blocks[:1]))
    start = path.stat().st_size
    append_block(path, blocks[1])
    whole = path.read_bytes()
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        is_whole = end >= len(whole) - 1  # all but the last line's end
        assert read_unfinished(path).prompts == (blocks if is_whole else blocks[:1])
        assert path.read_bytes() == (whole if is_whole else whole[:start])


def test_a_file_that_is_being_written_is_read_and_left_as_it_is(tmp_path):
    path = tmp_path / "pool.jsonl"
    blocks = [PooledPrompt(name, "why?", {}, (Response("x"), Response("y")), Cost(1), False) for name in "ab"]
    write_pool(path, Pool({**HEADER, "num_samples": 2}, blocks))
    whole = path.read_bytes()
    for cut in (3, 70, 150):
        path.write_bytes(whole[:-cut])
        assert read_so_far(path).prompts == blocks[:1]
        assert path.read_bytes() == whole[:-cut]


def test_what_two_processes_have_both_drawn_counts_once(tmp_path):
    path = tmp_path / "pool.jsonl"
    block = PooledPrompt("a", "why?", {}, (Response("x"), Response("y", scores={"c": 1.0})), Cost(1), False)
    other = replace(block, prompt_id="b", prompt="how?")
    write_pool(path, Pool({**HEADER, "num_samples": 2}, [block, other]))
    append_block(path, replace(block, cost=Cost(1, seconds=9.0)))
    assert read_pool(path).prompts == read_unfinished(path).prompts == [block, other]
    append_block(path, replace(other, samples=(Response("x"), Response("z"))))
    with pytest.raises(DataError, match="prompt 'b' has a sample 1 already"):
        read_pool(path)


def test_a_foreign_file_needs_prompts_and_texts_only(tmp_path):
    path = foreign(
        tmp_path,
        {"prompt": "a?", "text": "one"},
        {"prompt": [{"role": "user", "content": "b?"}], "text": "two", "columns": {"answer": 2}},
        {"prompt": "a?", "text": "three", "num_tokens": 5},
        {"prompt": [{"role": "user", "content": "b?"}], "text": "two", "scores": {"helpful": None}},
    )
    pool = read_pool(path)
    assert pool.header == full_header(json.loads(FOREIGN), "x") | {"num_samples": 2}
    assert pool.texts == [["one", "three"], ["two", "two"]]
    first, second = pool.prompts
    assert [p.prompt_id for p in pool.prompts] == prompt_ids([{"prompt": p.prompt} for p in pool.prompts])
    assert first.samples[1] == Response("three", length=5)
    assert (first.cost, first.estimated) == (Cost(policy_decode_tokens=4), True)
    assert (second.columns, second.samples[1].scores) == ({"answer": 2}, {"helpful": None})


def test_samples_may_stand_before_their_prompt_and_in_any_order(tmp_path):
    path = foreign(
        tmp_path,
        {"prompt_id": "q", "sample": 1, "text": "second"},
        {"prompt_id": "q", "sample": 0, "text": "first", "token_ids": [3, 4]},
        {"prompt_id": "q", "prompt": "why?", "cost": {"policy_prefill_tokens": 4, "seconds": 1}},
    )
    (prompt,) = read_pool(path).prompts
    assert [s.text for s in prompt.samples] == ["first", "second"]
    assert prompt.samples[0].num_tokens == 2
    assert (prompt.prompt, prompt.cost, prompt.estimated) == ("why?", Cost(4, seconds=1), False)


@pytest.mark.parametrize(
    ("counts", "written", "has_ids"),
    [
        ({"num_tokens": 0}, {"num_tokens": 0}, False),
        ({"token_ids": []}, {"num_tokens": 0, "token_ids": []}, True),
        ({"token_ids": [3], "num_tokens": 1}, {"num_tokens": 1, "token_ids": [3]}, True),
        ({"num_tokens": 2}, {"num_tokens": 2}, False),
        ({}, {}, False),
    ],
)
def test_token_ids_are_written_where_they_are_known(tmp_path, counts, written, has_ids):
    """An answer of no tokens that was counted elsewhere stays without ids."""
    row = {"prompt_id": "q", "prompt": "why?", "text": "", **counts}
    pool = read_pool(foreign(tmp_path, row))
    assert pool.prompts[0].samples[0].has_ids == has_ids
    write_pool(tmp_path / "again.jsonl", pool)
    sample = json.loads((tmp_path / "again.jsonl").read_text().splitlines()[-1])
    assert {key: sample[key] for key in ("num_tokens", "token_ids") if key in sample} == written
    assert read_pool(tmp_path / "again.jsonl").prompts == pool.prompts


def test_repeated_prompts_have_ids_of_their_own():
    names = prompt_ids([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    assert names[0] != names[1]
    assert names[2] == f"{names[0]}-2"
    assert prompt_ids([{"prompt": "a"}]) == names[:1]


SAMPLE = {"prompt": "a?", "text": "one"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], ":2: not JSON"),
        (["[1]"], r":2: '\[1\]' is no JSON object; write"),
        ([{"prompt": "a?", "texts": ["one"]}], r":2: unknown key 'texts'; did you mean 'text'\?"),
        (
            [{"prompt": "a?", "sample": 0, "completion": "one"}],
            r":2: 'sample' belongs to a sample, and there is no 'text'",
        ),
        ([{"prompt": "a?", "completion": "one"}], r":2: unknown key 'completion'; known keys: .*text"),
        ([{"prompt": "a?", "text": "x", "score": 1}], r":2: unknown key 'score'; did you mean 'scores'\?"),
        ([{**SAMPLE, "text": 3}], r":2: text '3' is not a text"),
        ([{**SAMPLE, "scores": {"helpful": "high"}}], r":2: scores .* null where one is missing"),
        ([{**SAMPLE, "scores": {"helpful": True}}], r":2: scores .* is not an object of numbers"),
        (
            [{**SAMPLE, "scores": {"a": 1e50, "b": -1.1e50}}],
            r":2: the score 'b' is -1.1e\+50, and 1e\+50 is the largest size",
        ),
        (
            [{**SAMPLE, "scores": {"a": 10**399}}],
            r":2: the score 'a' is 1000000000... of 400 digits",
        ),
        (['{"prompt": "a?", "text": "x", "scores": {"helpful": NaN}}'], r":2: .*NaN is not JSON, write null"),
        ([{**SAMPLE, "token_ids": [1, 2.5]}], r":2: token_ids '\[1, 2.5\]' is not a list of numbers"),
        ([{**SAMPLE, "token_ids": [1, 2], "num_tokens": 3}], r":2: num_tokens is 3, but token_ids are 2"),
        ([{**SAMPLE, "sample": -1}], r":2: sample '-1' is not a number from 0 on"),
        ([{**SAMPLE, "prompt": " "}], r":2: prompt ' ' is not a text, or a list of"),
        ([{**SAMPLE, "prompt": [{"role": "user"}]}], r":2: prompt .* is not a text, or a list of"),
        ([{"text": "one"}], r":2: neither 'prompt' nor 'prompt_id'; write the prompt"),
        ([{"prompt_id": "q"}], r":2: neither a 'text' .* nor a 'prompt'"),
        ([{"prompt_id": "q", "text": "x"}], r":2: prompt_id 'q' is never given its prompt"),
        ([{"prompt": "a?", "cost": {"policy_tokens": 3}}], r":2: cost .* keys among policy_prefill_tokens"),
        ([{**SAMPLE, "sample": 0}, {**SAMPLE, "sample": 0}], r":3: prompt '.*' has a sample 0 already"),
        ([{**SAMPLE, "sample": 1}, {**SAMPLE, "sample": 2}], r":2: the 2 samples of prompt .* numbered up to 2"),
        ([SAMPLE, {**SAMPLE, "columns": {"a": 1}}, {**SAMPLE, "columns": {"a": 2}}], r":4: .* another columns here"),
        ([{**SAMPLE, "prompt_id": "q"}, {"prompt": "b", "prompt_id": "q", "text": ""}], r":3: .* another prompt here"),
        (
            [SAMPLE, SAMPLE, {"prompt": "b?", "text": "x"}],
            r"prompt '\w+' has 1 samples, prompt '\w+' has 2; give every",
        ),
        (
            [{"prompt": "a?", "num_samples": 2}, SAMPLE],
            r":2: prompt '\w+' has 1 of 2 samples, so the file is unfinished",
        ),
        ([{**SAMPLE, "text": "a \ud83d"}], r":2: '\\ud83d' is half a character, .* write \\ufffd in its place"),
        ([{**SAMPLE, "columns": {"a": ["\udc00"]}}], r":2: '\\udc00' is half a character"),
        ([{"prompt": "a?"}], r":2: prompt '\w+' has 0 of its samples"),
        ([], r"no completions; add lines such as"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, rows, message):
    path = foreign(tmp_path, *rows)
    with pytest.raises(DataError, match=message) as told:
        read_pool(path)
    assert str(told.value).startswith(str(path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"prompt": "a", "text": "b"}', r':1: no header; .* \{"iama_pool": 1, "policy": \{"name": "my-model"\}\}'),
        ("", ":1: no header"),
        ('{"iama_pool": 2, "policy": {"name": "x"}}', ":1: iama_pool 2 is a format that is not known here"),
        ('{"iama_pool": 1}', ":1: 'policy' is missing"),
        ('{"iama_pool": 1, "policy": {"name": "\\ud83d"}}', r":1: '\\ud83d' is half a character"),
        ('{"iama_pool": 1, "policy": {"name": ""}}', ":1: policy.name: "),
        (
            '{"iama_pool": 1, "policy": {"name": "x"}, "smpling": null}',
            "unknown key 'smpling'; did you mean 'sampling'",
        ),
        ('{"iama_pool": 1, "policy": {"name": "x"}, "num_samples": 3}', ":1: num_samples is 3, but every prompt has 1"),
    ],
)
def test_headers_are_checked(tmp_path, header, message):
    with pytest.raises(DataError, match=message):
        read_pool(foreign(tmp_path, SAMPLE, header=header))


def test_files_that_are_missing_or_not_utf8_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"pool file '.*none.jsonl' does not exist; `iama pool` makes one"):
        read_pool(tmp_path / "none.jsonl")
    path = foreign(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"prompt": "a", "text": "\xff"}\n')
    with pytest.raises(DataError, match=":2: not UTF-8"):
        read_pool(path)


def test_a_file_of_other_samples_is_neither_used_nor_touched(tmp_path):
    path = tmp_path / "pool.jsonl"
    pool = Pool({**HEADER, "num_samples": 1}, [PooledPrompt("q", "a?", {}, (Response("x"),), Cost(), True)])
    write_pool(path, pool)
    torn = path.read_bytes() + b'{"prompt_id": "r", "pro'
    path.write_bytes(torn)
    with pytest.raises(RunError, match=r"pool\.jsonl holds other samples \(seed was 3, is 4\); choose another file"):
        open_unfinished(path, {**pool.header, "seed": 4})
    assert path.read_bytes() == torn
    assert open_unfinished(path, {**pool.header, "versions": {"torch": "9"}}).prompts == pool.prompts
    path.write_text("notes of mine")
    with pytest.raises(DataError, match=":1: no header"):
        open_unfinished(path, pool.header)
    assert path.read_text() == "notes of mine"


def test_headers_differ_in_what_decides_the_samples():
    moved = {**HEADER, "policy": {**HEADER["policy"], "path": "elsewhere"}}
    assert header_difference(HEADER, {**moved, "versions": {"torch": "9"}}) is None
    other = {**moved, "policy": {**moved["policy"], "fingerprint": "g"}}
    assert header_difference(HEADER, other) == "policy.path was 'p', is 'elsewhere'; policy.fingerprint was 'f', is 'g'"
    unknown = [full_header({"iama_pool": 1, "policy": {"name": "x", "path": path}}, "test") for path in "ab"]
    assert header_difference(*unknown) == "policy.path was 'a', is 'b'"
    sampled = full_header({**HEADER, "sampling": {"top_p": 0.5}}, "test")
    assert (
        header_difference(sampled, full_header({**HEADER, "sampling": {}}, "test")) == "sampling.top_p was 0.5, is 1.0"
    )


def parts(tmp_path, scores=({}, {})):
    paths = []
    for name, own in zip("ab", scores, strict=True):
        block = PooledPrompt(
            name, f"{name}?", {}, (Response("x", scores=own), Response("y", scores=own)), Cost(1), False
        )
        paths.append(tmp_path / f"{name}.jsonl")
        write_pool(paths[-1], Pool({**HEADER, "num_samples": 2}, [block]))
    return paths


def test_parts_of_a_pool_are_put_together(tmp_path):
    first, second = parts(tmp_path)
    both = merge_pools([first, second])
    assert both.prompts == read_pool(first).prompts + read_pool(second).prompts
    union(first, read_pool(second))
    union(first, read_pool(second))  # what is there stays
    assert read_pool(first) == both
    with pytest.raises(DataError, match=r"b\.jsonl: prompt 'b' is in .*a\.jsonl as well"):
        merge_pools([first, second])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({1: 3, 2: 3, 3: 2}, None),
        ({2: 3}, r"3 of 8 prompts are there: no file holds part 1/3; no file holds part 3/3; sample what is missing"),
        ({1: 3, 3: 2}, r"5 of 8 prompts are there: no file holds part 2/3; sample"),
        ({1: 3, 2: 1, 3: 2}, r"6 of 8 prompts are there: \S*2\.jsonl has 1 of the 3 prompts of part 2/3; sample"),
        ({1: 8}, None),  # the same command without --shard has completed it
    ],
)
def test_a_merge_says_which_part_lacks(tmp_path, parts, message):
    paths = []
    for index, size in parts.items():
        blocks = [
            PooledPrompt(f"{index}-{i}", f"{index} {i}?", {}, (Response("x"),), Cost(1), False) for i in range(size)
        ]
        paths.append(tmp_path / f"{index}.jsonl")
        part = {"index": index, "count": 3, "num_prompts": 8}
        write_pool(paths[-1], Pool({**HEADER, "num_samples": 1, "part": part}, blocks))
    if message is None:
        merged = merge_pools(paths)
        assert len(merged.prompts) == 8
        assert "part" not in merged.header
    else:
        with pytest.raises(RunError, match=message):
            merge_pools(paths)


def test_a_part_is_not_written_into_the_file_of_another(tmp_path):
    first, second = ({"part": {"index": i, "count": 3, "num_prompts": 8}} for i in (1, 2))
    path = tmp_path / "base.jsonl"
    headers = [full_header({**HEADER, "num_samples": 1, **part}, "header") for part in (first, second)]
    open_unfinished(path, headers[1])
    open_unfinished(path, headers[0])  # there are no samples yet
    append_block(path, PooledPrompt("p", "a?", {}, (Response("x"),), Cost(), False))
    assert len(open_unfinished(path, headers[0]).prompts) == 1
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"base\.jsonl holds other samples \(part was 1/3, is 2/3\)"):
        open_unfinished(path, headers[1])
    assert path.read_bytes() == before


def test_parts_of_unlike_pools_are_refused(tmp_path):
    first, second = parts(tmp_path, ({"helpful": 1.0}, {}))
    with pytest.raises(DataError, match=r"b\.jsonl: prompt 'b' lacks the scores helpful, which .*a\.jsonl has"):
        merge_pools([first, second])
    with pytest.raises(DataError, match=r"b\.jsonl lacks the scores helpful, which .*a\.jsonl: prompt 'a' has"):
        merge_pools([second, first])
    pool = read_pool(second)
    write_pool(second, Pool({**pool.header, "seed": 9}, pool.prompts))
    with pytest.raises(RunError, match=r"b\.jsonl holds other samples than .*a\.jsonl \(seed was 3, is 9\)"):
        merge_pools([first, second])
    with pytest.raises(RunError, match="seed was 3, is 9"):
        union(first, read_pool(second))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "pool.jsonl"
    block = PooledPrompt("q", "a?", {}, (Response("x", scores={"helpful": 1.0}),), Cost(), True)
    write_pool(path, Pool({**HEADER, "num_samples": 1}, [block]))
    before = path.read_bytes()
    broken = PooledPrompt("q", "a?", {}, (Response("x", scores={"helpful": float("nan")}),), Cost(), True)
    with pytest.raises(ValueError, match="JSON"):
        write_pool(path, Pool({**HEADER, "num_samples": 1}, [broken]))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_big_files_are_read_in_one_pass(tmp_path):
    """About 10 microseconds a sample; a quadratic reader would take minutes."""
    number = 200
    body = tuple(Response("some words " * 10, tuple(range(20)), "stop", scores={"helpful": 0.5}) for _ in range(number))
    blocks = [PooledPrompt(f"q{i}", "why?", {}, body, Cost(), False) for i in range(200)]
    path = tmp_path / "big.jsonl"
    write_pool(path, Pool({**HEADER, "num_samples": number}, blocks))
    start = time.process_time()
    pool = read_pool(path)
    assert time.process_time() - start < 10
    assert len(pool.prompts) * number == 40_000
    assert pool_file.check_even(pool.prompts, "x") is None


def test_the_examples_of_the_pages_run(tmp_path, monkeypatch, capsys):
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "reference/pool-files.md").read_text() + (docs / "guides/pools.md").read_text()
    header, *lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", page, re.MULTILINE)]
    (prompt,) = read_pool(foreign(tmp_path, *lines, header=json.dumps(header | {"num_samples": 1}))).prompts
    assert (prompt.prompt_id, prompt.samples[0].scores) == ("q1", {"helpful": 0.3})
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, {})
    assert capsys.readouterr().out == "theirs [['Because of scattering.', 'It reflects the sea.']]\n"
