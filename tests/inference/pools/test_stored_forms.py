"""Pool files that are compressed or Parquet: the same pool in every form, damaged files, and unfinished ones."""

from __future__ import annotations

import gc
import gzip
import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import DataError, IamaWarning, RunError
from iama.rewards.load import load_reward
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.pools import file as pools_file
from inference.pools import held as pools_held
from inference.pools.file import merge_pools, read_pool, write_pool
from inference.pools.fill import fill_pool
from inference.pools.format import full_header
from inference.pools.held import Holder, Spool, held, table_of
from inference.pools.score import add_column
from inference.pools.storage import unfinished
from tests.inference.pools.test_pool_file import HEADER, pools

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ODD = "a\x00b \U0001f600 \ufffd \u2028 naïve"


def small(num_samples=3):
    samples = tuple(
        Response(f"{ODD} {i}", finish_reason="stop", length=i, scores={"helpful": None if i == 1 else i / 7})
        for i in range(num_samples)
    )
    prompts = [
        PooledPrompt("q1", "why?", {"answer": {"a": [1, None]}}, samples, Cost(3, 4, seconds=0.5), False),
        PooledPrompt("q2", ODD, {}, samples, Cost(), True),
    ]
    return Pool({**HEADER, "num_samples": num_samples}, prompts)


@settings(max_examples=15)
@given(pools())
def test_every_form_holds_the_same_pool(tmp_path_factory, pool):
    folder = tmp_path_factory.mktemp("pool")
    before = pool
    for number, ending in enumerate((*ENDINGS[1:], ".jsonl")):  # each from what the one before it holds
        path = folder / f"{number}{ending}"
        write_pool(path, before)
        before = read_pool(path)
        assert before == pool


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_form_is_written_alike_every_time_and_keeps_odd_characters(tmp_path, ending):
    pool = small()
    for name in "ab":
        write_pool(tmp_path / f"{name}{ending}", pool)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    assert read_pool(tmp_path / f"a{ending}") == pool
    write_pool(tmp_path / "first.jsonl", pool)
    write_pool(tmp_path / "last.jsonl", read_pool(tmp_path / f"a{ending}"))
    assert (tmp_path / "last.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    assert merge_pools([tmp_path / f"a{ending}"]).prompts == pool.prompts


@pytest.mark.parametrize("ending", ENDINGS)
def test_half_a_character_is_refused_and_the_old_file_stays(tmp_path, ending):
    path, pool = tmp_path / f"pool{ending}", small()
    write_pool(path, pool)
    before = path.read_bytes()
    for prompt in (
        replace(pool.prompts[0], prompt="\ud83d"),
        replace(pool.prompts[0], columns={"a": "\ud83d"}),
        replace(pool.prompts[0], samples=(Response("\ud83d"),) * 3),
    ):
        with pytest.raises(RunError, match=r"cannot be written: '\\ud83d' is half a character"):
            write_pool(path, Pool(pool.header, [prompt]))
        assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_column_is_added_to_every_form(tmp_path, gold_file, ending):
    path = tmp_path / f"pool{ending}"
    write_pool(path, small())
    spec = RewardSpec(function=f"{gold_file}:vowels")
    values_PS = add_column(path, read_pool(path), "vowels", load_reward("v", spec), spec, lambda _: None)
    pool = read_pool(path)
    for prompt, before, values_S in zip(pool.prompts, small().prompts, values_PS, strict=True):
        expected = [replace(s, scores={**s.scores, "vowels": v}) for s, v in zip(before.samples, values_S, strict=True)]
        assert prompt.samples == tuple(expected)


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_torn_file_is_one_line(tmp_path, ending):
    """Wherever it breaks off: none is ever read as if it were whole."""
    path = tmp_path / f"pool{ending}"
    write_pool(path, small())
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"(torn or damaged|not) (gzip|Zstandard|Parquet)|is empty") as told:
            read_pool(path)
        assert str(told.value).startswith(str(path))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_a_changed_byte_is_noticed_where_there_are_checksums(tmp_path, ending):
    path, pool = tmp_path / f"pool{ending}", small()
    write_pool(path, pool)
    data = bytearray(path.read_bytes())
    places = range(20, min(len(data), 800) - 8, 11)
    num_told = 0
    for place in places:
        data[place] ^= 0x55
        path.write_bytes(data)
        try:
            assert read_pool(path) == pool  # the byte decides nothing, such as one of the statistics beside a column
        except DataError:
            num_told += 1
        data[place] ^= 0x55
    assert num_told > len(places) / 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            b'{"iama_pool": 1}\n',
            "not gzip, whatever its name says; a file of plain lines is named .jsonl",
        ),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"gzip, whatever its name says; let its name end in \.gz"),
        ("a.parquet", gzip.compress(b"{}", mtime=0), r"gzip, whatever its name says; let its name end in \.gz"),
        ("a.jsonl.gz", b"", "is empty; fetch or write it again"),
        ("a.parquet", b"", "is empty; fetch or write it again"),
        ("a.jsonl.zst", b"PAR1", r"Parquet, whatever its name says; let its name end in \.parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0), ":1: no header"),
    ],
)
def test_a_file_is_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_pool(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a?"], "completion": ["x"]}, r"no column 'text' \(there: prompt, completion\)"),
        ({"text": ["x"]}, r"no column 'prompt' \(there: text\)"),
        ({"prompt": ["a?"], "text": [3]}, r"row 1: text '3' is not a text"),
        ({"prompt": ["a?", "a?"], "text": ["x", None]}, "row 2: no text; write the completion there"),
        ({"prompt": ["a?"], "text": ["x"], "scores": [1.5]}, "row 1: scores '1.5' is not an object of numbers"),
        ({"prompt": ["a?"], "text": ["x"], "scores": [{"h": "high"}]}, "row 1: scores .* is not an object of numbers"),
        ({"prompt": ["a?"], "text": ["x"], "scores": [{"h": float("nan")}]}, "row 1: the score 'h' is NaN; write null"),
        ({"prompt": ["a?"], "text": ["x"], "num_tokens": [1.5]}, r"row 1: num_tokens '1\.5' is not a number"),
        ({"prompt": ["a?"], "text": ["x"], "columns": ["{"]}, "row 1:1: not JSON .* write 'columns' as JSON"),
        ({"prompt": ["a?"], "text": ["x"], "rating": [1]}, "row 1: unknown key 'rating'"),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_told(tmp_path, columns, message):
    path = tmp_path / "theirs.parquet"
    metadata = {"iama_pool": json.dumps({"iama_pool": 1, "policy": {"name": "theirs"}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=message) as told:
        read_pool(path)
    assert str(told.value).startswith(str(path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("prompt", ["a?", [{"role": "user", "content": "a?"}]])
def test_a_data_set_is_a_pool_and_a_pool_is_a_data_set(tmp_path, prompt):
    theirs = datasets.Dataset.from_list(
        [{"prompt": prompt, "text": text, "scores": {"helpful": score}} for text, score in (("x", 1.0), ("y", None))]
    )
    theirs.to_parquet(tmp_path / "theirs.parquet")
    with pytest.warns(IamaWarning, match="its policy is called 'theirs'"):
        pool = read_pool(tmp_path / "theirs.parquet")
    assert pool.header["policy"]["name"] == "theirs"
    assert pool.prompts[0].prompt == prompt
    assert [s.scores for s in pool.prompts[0].samples] == [{"helpful": 1.0}, {"helpful": None}]
    write_pool(tmp_path / "ours.parquet", pool)
    ours = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "ours.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert ours["text"][:] == ["x", "y"]
    assert ours["prompt"][:] == [prompt, prompt]
    assert ours["scores"][:] == [{"helpful": 1.0}, {"helpful": None}]


# Files that are filled. ---------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_file_that_is_written_whole_goes_on_where_it_was(tmp_path, ending):
    rows = [{"prompt": f"{i}?"} for i in range(3)]
    header = full_header({**HEADER, "num_samples": 2}, "test")
    asked = []

    def draw_until(last):
        def draw(rows, indices):
            for i in indices:
                if i == last:
                    raise KilledError
                asked.append(i)
                yield i, [Response(f"{i} {s}", (i, s), "stop") for s in range(2)], Cost(1), False

        return draw

    path = tmp_path / f"pool{ending}"
    with pytest.raises(KilledError):
        fill_pool(path, header, rows, draw_until(1), lambda _: None)
    assert not path.exists()
    with pytest.raises(
        DataError, match=r"is not finished, what there is of it lies in .*\.unfinished\.jsonl; run again"
    ):
        read_pool(path)
    with unfinished(path).open("a", encoding="utf-8") as file:
        file.write('{"prompt_id": "torn", "pro')
    pool = fill_pool(path, header, rows, draw_until(None), lambda _: None)
    assert asked == [0, 1, 2]
    assert not unfinished(path).exists()
    assert read_pool(path) == pool
    again = fill_pool(path, header, rows, draw_until(0), lambda _: None)
    assert again.prompts == pool.prompts
    more = fill_pool(path, header, [*rows, {"prompt": "3?"}], draw_until(None), lambda _: None)
    assert asked == [0, 1, 2, 3]
    assert read_pool(path).prompts == more.prompts
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"holds other samples \(seed was 3, is 4\)"):
        fill_pool(path, {**header, "seed": 4}, rows, draw_until(None), lambda _: None)
    assert path.read_bytes() == before


def draw_until(last):
    """Two samples a prompt, until one at which the process is killed."""

    def draw(rows, indices):
        for i in indices:
            if i == last:
                raise KilledError
            yield i, [Response(f"{i} {s}", (i, s), "stop") for s in range(2)], Cost(1), False

    return draw


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_what_was_scored_since_a_kill_stays_scored(tmp_path, gold_file, ending):
    rows, header = [{"prompt": f"{i}?"} for i in range(4)], full_header({**HEADER, "num_samples": 2}, "test")
    path, spec = tmp_path / f"pool{ending}", RewardSpec(function=f"{gold_file}:vowels")
    fill_pool(path, header, rows[:2], draw_until(None), lambda _: None)
    with pytest.raises(KilledError):
        fill_pool(path, header, rows, draw_until(3), lambda _: None)
    add_column(path, read_pool(path), "gold", load_reward("v", spec), spec, lambda _: None)
    fill_pool(path, header, rows[:2], draw_until(0), lambda _: None)  # which lacks nothing, and leaves the third prompt
    with pytest.raises(KilledError):
        fill_pool(path, header, rows, draw_until(3), lambda _: None)
    fill_pool(path, header, rows, draw_until(2), lambda _: None)
    assert not unfinished(path).exists()
    prompts = read_pool(path).prompts
    assert [prompt.prompt for prompt in prompts] == ["0?", "1?", "2?", "3?"]
    assert [["gold" in sample.scores for sample in prompt.samples] for prompt in prompts] == [[True] * 2] * 2 + [
        [False] * 2
    ] * 2


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_kill_after_the_last_write_leaves_nothing_that_is_read_again(tmp_path, monkeypatch, ending):
    rows, header = [{"prompt": f"{i}?"} for i in range(2)], full_header({**HEADER, "num_samples": 2}, "test")
    path = tmp_path / f"pool{ending}"

    original = type(path).unlink

    def unlink(self, missing_ok=False):
        if self == unfinished(path):
            raise KilledError
        original(self, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "unlink", unlink)
        with pytest.raises(KilledError):
            fill_pool(path, header, rows, draw_until(None), lambda _: None)
    assert path.exists()
    assert unfinished(path).exists()
    pool = fill_pool(path, header, rows, draw_until(0), lambda _: None)
    assert not unfinished(path).exists()
    assert read_pool(path).prompts == pool.prompts


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_others_that_were_begun_beside_a_finished_file_stay_where_they_are(tmp_path, ending):
    rows, header = [{"prompt": "0?"}], full_header({**HEADER, "num_samples": 2}, "test")
    path = tmp_path / f"pool{ending}"
    pool = fill_pool(path, header, rows, draw_until(None), lambda _: None)
    write_pool(unfinished(path), Pool({**header, "seed": 4}, pool.prompts))
    assert fill_pool(path, header, rows, draw_until(0), lambda _: None).prompts == pool.prompts
    assert unfinished(path).exists()


# Held samples. ------------------------------------------------------------------------------------------


def test_held_samples_are_read_like_a_tuple(tmp_path):
    spool, samples = Spool(), small(5).prompts[0].samples
    holder = Holder(spool)
    for number in (3, 0, 4, 1, 2):  # in two chunks, out of order
        holder.add(number, samples[number])
        assert holder.get(number) == samples[number]
    kept = holder.held()
    assert (len(kept), kept == samples, tuple(kept) == samples) == (5, True, True)
    assert [kept[i] for i in (0, -1)] == [samples[0], samples[-1]]
    assert kept[:2] == samples[:2] != kept[:3]
    assert kept[1:4:2] == samples[1:4:2]
    assert kept.texts == [s.text for s in samples]
    assert kept[:2].texts == [s.text for s in samples[:2]]
    with pytest.raises(IndexError):
        kept[5]
    changed = kept.with_scores("more", table_of(samples).scores["helpful"])
    assert [s.scores["more"] for s in changed] == [s.scores["helpful"] for s in samples]
    assert changed[1].scores == {"helpful": None, "more": None}
    assert list(changed.with_scores("helpful", None)[0].scores) == ["more"]
    assert kept == samples
    kept[0].scores["mine"] = 1.0  # of a copy
    assert kept == samples


def test_many_texts_go_into_a_file_that_is_closed_with_its_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(pools_held, "IN_MEMORY", 100)
    monkeypatch.setattr(pools_file, "_TOGETHER", 3000)  # bytes that wait: chunks of a few samples
    write_pool(tmp_path / "pool.jsonl", small(40))
    pool = read_pool(tmp_path / "pool.jsonl")
    assert pool == small(40)
    first, *others = pool.prompts
    spool = first.samples._spool
    assert spool._file._rolled
    del pool, first, others
    assert not spool._file.closed
    file = spool._file
    del spool
    gc.collect()
    assert file.closed


def test_tables_say_what_the_samples_do():
    given = [{"a": 1.0}, {"b": 2}, {"a": None, "b": 3.0}, {}]
    samples = [
        Response("x" * i, finish_reason=r, length=n, scores=s)
        for i, (r, n, s) in enumerate(
            zip(["stop", "length", "unknown", "odd"], [1, None, 2**40, 0], given, strict=True)
        )
    ]
    prompt = held(Spool(), PooledPrompt("q", "a?", {}, tuple(samples), Cost(), True))
    for table in (table_of(samples), table_of(prompt.samples)):
        assert table.num_tokens_S.tolist() == [1, -1, 2**40, 0]
        assert table.num_characters_S.tolist() == [0, 1, 2, 3]
        assert (table.num_cut, table.num_unknown, table.columns, dict(table.lacking)) == (1, 1, [], {"a": 1, "b": 0})
        assert table.first(1).columns == ["a"]
        assert [None if v != v else v for v in table.scores["a"].tolist()] == [1.0, None, None, None]
