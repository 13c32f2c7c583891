"""Pools are filled and scored prompt by prompt: resumed, split and repeated they are the same."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from iama.config.specs import PolicySpec, RewardScale, RewardSpec, Sampling
from iama.errors import DataError, IamaWarning, RewardError, RunError
from iama.prompts.data import load_prompts
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.responses import Pool
from inference.engine.reward_rows import RewardRows
from inference.pools import engines
from inference.pools import fill as pools
from inference.pools.engines import transformers_draw
from inference.pools.file import merge_pools, read_pool, write_pool
from inference.pools.fill import fill_pool, pool_header
from inference.pools.score import KnownScores, add_column, reward_key, score_pool

SAMPLING = Sampling(max_new_tokens=8)
NUM_SAMPLES = 3


def ignore(_: int) -> None:
    pass


@pytest.fixture
def rows(tiny):
    """Three prompts of which one is repeated."""
    found = load_prompts(tiny.prompts)[:3]
    return [*found, found[0]]


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the engine was given, call by call."""
    calls = []
    real = engines.iter_decode

    def counted(policy, prompts_ids, *args, **kwargs):
        calls.append(len(prompts_ids))
        return real(policy, prompts_ids, *args, **kwargs)

    monkeypatch.setattr(engines, "iter_decode", counted)
    return calls


@pytest.fixture
def fill(tiny, tmp_path, rows):
    def run(name="pool", rows=rows, indices=None, system_prompt=None, seed=0, batch_size=64, advance=ignore):
        spec = PolicySpec(path=str(tiny.policy))
        header = pool_header("base", spec, system_prompt, "transformers", SAMPLING, NUM_SAMPLES, seed)
        draw = transformers_draw("base", spec, system_prompt, NUM_SAMPLES, SAMPLING, seed, batch_size)
        return fill_pool(tmp_path / f"{name}.jsonl", header, rows, draw, advance, indices)

    return run


def without_costs(pool: Pool):
    """Samples; seconds differ from run to run."""
    return [(p.prompt_id, p.prompt, p.columns, p.samples, p.cost.policy_tokens) for p in pool.prompts]


def test_a_pool_is_what_its_file_holds_and_is_not_drawn_again(fill, rows, tmp_path, asked):
    told = []
    pool = fill(advance=told.append)
    assert told == [0, 1, 1, 1, 1]
    assert [p.prompt for p in pool.prompts] == [row["prompt"] for row in rows]
    assert pool.prompts[1].columns == {"topic": rows[1]["topic"]}
    stored = {p.prompt_id: p for p in read_pool(tmp_path / "pool.jsonl").prompts}
    assert [stored[p.prompt_id] for p in pool.prompts] == pool.prompts
    assert pool.prompts[0].samples != pool.prompts[3].samples  # the same prompt, sampled afresh
    for prompt in pool.prompts:
        assert prompt.cost.policy_decode_tokens == sum(s.num_tokens - 1 for s in prompt.samples)
        assert all(s.num_tokens == len(s.token_ids) for s in prompt.samples)
    assert fill().prompts == pool.prompts
    assert asked == [4]


def test_a_killed_job_goes_on_and_gives_the_same(fill, tmp_path, asked):
    whole = fill()
    path = tmp_path / "pool.jsonl"
    data = path.read_bytes()
    block = data.index(b'\n{"prompt_id"', len(data) * 2 // 3)  # a line within the last or last but one block
    path.write_bytes(data[: block + 30])
    assert without_costs(fill()) == without_costs(whole)
    assert asked[0] == 4
    assert asked[1] in (1, 2)
    assert without_costs(read_pool(path)) != []


def test_shards_are_parts_of_the_whole(fill, tmp_path, rows):
    whole = fill()
    fill("one", indices=[3, 1])  # the repeated prompt is drawn where its first occurrence is not
    fill("two", indices=[0, 2], batch_size=2)
    merged = merge_pools([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    by_id = {told[0]: told for told in without_costs(merged)}
    assert [by_id[told[0]] for told in without_costs(whole)] == without_costs(whole)
    assert [p.prompt for p in fill("one", indices=[3, 1]).prompts] == [rows[3]["prompt"], rows[1]["prompt"]]


def test_fewer_prompts_and_other_columns_need_no_drawing(fill, rows, asked):
    whole = fill()
    changed = [{**row, "topic": "other"} for row in rows[:2]]
    part = fill(rows=changed)
    assert [p.samples for p in part.prompts] == [p.samples for p in whole.prompts[:2]]
    assert part.prompts[0].columns == {"topic": "other"}
    assert fill().prompts == whole.prompts
    assert asked == [4]


def test_other_settings_are_refused(fill):
    fill()
    with pytest.raises(RunError, match=r"pool\.jsonl holds other samples \(seed was 0, is 1\)"):
        fill(seed=1)
    with pytest.raises(RunError, match=r"\(system_prompt was None, is 'be kind'\)"):
        fill(system_prompt="be kind")


def test_a_system_prompt_is_for_the_policy_alone(fill, rows):
    plain, told = fill(), fill("told", system_prompt="be careful")
    assert [p.prompt for p in told.prompts] == [row["prompt"] for row in rows]
    assert told.header["system_prompt"] == "be careful"
    longer = [
        t.cost.policy_prefill_tokens - p.cost.policy_prefill_tokens
        for t, p in zip(told.prompts, plain.prompts, strict=True)
    ]
    assert len(set(longer)) == 1
    assert longer[0] > 0


def test_other_versions_are_told_where_they_mix(fill, tmp_path, monkeypatch):
    fill(indices=[0])
    monkeypatch.setattr(pools, "__version__", "9.9")
    assert len(fill(indices=[0]).prompts) == 1  # nothing is mixed
    with pytest.warns(IamaWarning, match=r"pool\.jsonl was begun with .* and goes on with .*'9\.9'"):
        fill()


def test_a_column_that_json_has_not_is_refused_before_sampling(fill, rows, asked):
    with pytest.raises(DataError, match="prompt 2: column 'weight' is nan"):
        fill(rows=[{**row, "weight": float("nan") if i else 1.0} for i, row in enumerate(rows)])
    assert asked == []


# Scores. ------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(fill):
    """A pool in which a text stands twice."""
    drawn = fill()
    first = drawn.prompts[0]
    twice = dataclasses.replace(first, samples=(*first.samples[:2], first.samples[0]))
    return Pool(drawn.header, [twice, *drawn.prompts[1:]])


def same(one, two):
    for field in ("values_PS", "tokens_PS", "prompt_tokens_P", "seconds_P"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    assert one.num_calls == two.num_calls


def test_scores_are_the_rewards_and_tokens_are_those_of_reading_in_pieces(pool, reward_spec, tmp_path):
    reward = load_reward("r", reward_spec)
    scores = score_pool(pool, reward, reward_spec, tmp_path / "j", None, ignore)
    for p, (prompt, texts) in enumerate(zip(pool.prompts, pool.texts, strict=True)):
        values, cost = reward.score([prompt.prompt] * NUM_SAMPLES, texts, {})
        assert scores.values_PS[p] == pytest.approx(values, abs=1e-5)
        assert scores.tokens_PS[p].sum() == cost.reward_tokens
        # Read in pieces on one row, one text after the other: the first whole, of the next at most what is not shared.
        pieces = RewardRows(reward)
        rows = pieces.allocate(1)
        read = [pieces.score(rows, [prompt.prompt], [text])[1][0].reward_tokens for text in texts]
        assert read[0] == scores.tokens_PS[p, 0]
        assert all(r <= t - scores.prompt_tokens_P[p] for r, t in zip(read[1:], scores.tokens_PS[p, 1:], strict=True))
    assert (scores.prompt_tokens_P > 0).all()
    distinct = sum(len(set(texts)) for texts in pool.texts)
    assert scores.num_calls == distinct < scores.values_PS.size


def test_scoring_goes_on_where_it_was_killed(pool, reward_spec, tmp_path, monkeypatch):
    journal = tmp_path / "journal.jsonl"
    reward = load_reward("r", reward_spec)
    scored = []
    real = type(reward.classifier).score_ids
    monkeypatch.setattr(
        type(reward.classifier),
        "score_ids",
        lambda self, ids, *types: scored.append(len(ids)) or real(self, ids, *types),
    )
    first = score_pool(pool, reward, reward_spec, journal, None, ignore)
    scored.clear()
    same(score_pool(pool, reward, reward_spec, journal, None, ignore), first)
    assert scored == []
    journal.write_bytes(journal.read_bytes()[:-20])
    again = score_pool(pool, reward, reward_spec, journal, None, ignore)
    assert scored == [len(set(pool.texts[-1]))]
    np.testing.assert_array_equal(again.values_PS, first.values_PS)
    assert again.num_calls == first.num_calls
    other = reward_spec.model_copy(update={"sign": -1})
    score_pool(
        pool, reward, other, journal, None, ignore
    )  # by its specification another reward: nothing of it is there
    assert len(scored) == 1 + len(pool.prompts)


def test_what_is_known_of_other_pools_is_not_scored_again(pool, reward_spec, tmp_path):
    reward, known = load_reward("r", reward_spec), KnownScores()
    first = score_pool(pool, reward, reward_spec, tmp_path / "one", known, ignore)
    second = score_pool(pool, reward, reward_spec, tmp_path / "two", known, ignore)
    assert second.num_calls == 0
    same(dataclasses.replace(second, num_calls=first.num_calls), first)
    # The second's journal is whole in itself.
    same(score_pool(pool, reward, reward_spec, tmp_path / "two", None, ignore), second)


def test_a_function_gets_columns_and_may_miss_scores(pool, tmp_path):
    seen = []

    def by_topic(prompts, completions, topic, **_):
        seen.extend(topic)
        return [None if t == "bike" else float(len(c[-1]["content"])) for t, c in zip(topic, completions, strict=True)]

    spec = RewardSpec(function="mine.py:by_topic")
    reward = reward_from_function(by_topic, "mine", missing_ok=True)
    scores = score_pool(pool, reward, spec, tmp_path / "journal", None, ignore)
    missing_P = np.asarray([p.columns["topic"] == "bike" for p in pool.prompts])
    assert missing_P.any()
    assert np.isnan(scores.values_PS).tolist() == [[bool(m)] * NUM_SAMPLES for m in missing_P]
    assert scores.values_PS[0].tolist() == [len(text) for text in pool.texts[0]]
    assert not scores.tokens_PS.any()
    assert not scores.prompt_tokens_P.any()
    assert not (tmp_path / "journal").exists()  # whether its code has changed is not known
    assert len(seen) == scores.num_calls
    with pytest.raises(RewardError, match="'mine' returned nan"):
        score_pool(pool, reward_from_function(by_topic, "mine"), spec, tmp_path / "journal", None, ignore)


def test_columns_are_read_from_the_samples(pool, tmp_path):
    values = [[1.0, None, 3.0]] * len(pool.prompts)
    prompts = [
        dataclasses.replace(
            p, samples=tuple(dataclasses.replace(s, scores={"h": v}) for s, v in zip(p.samples, row, strict=True))
        )
        for p, row in zip(pool.prompts, values, strict=True)
    ]
    scored = Pool(pool.header, prompts)
    spec = RewardSpec(column="h", sign=-1, scale=RewardScale(mean=1, std=2))
    found = score_pool(scored, None, spec, tmp_path / "journal", None, ignore)
    np.testing.assert_array_equal(found.values_PS, np.asarray([[-1, np.nan, -2]] * len(prompts)))
    assert found.num_calls == 0
    missing = RewardSpec(column="helpful")
    with pytest.raises(RewardError, match=r"sample 0 of prompt '\w+' has no score 'helpful' \(there: h\)"):
        score_pool(scored, None, missing, tmp_path / "journal", None, ignore)


def test_an_ensemble_s_column_has_its_disagreement_beside_it(pool, tmp_path):
    """As it is, whatever the column's scale; only where every score has one."""
    spec = RewardSpec(column="h", sign=-1, scale=RewardScale(mean=1, std=2))
    told = [{"h": 0.5, "h/disagreement": 0.25}, {"h": None, "h/disagreement": None}, {"h": 2.0, "h/disagreement": 0.0}]
    cases = [(told, [0.25, np.nan, 0.0]), ([{"h": 0.5}, *told[1:]], None), ([{"h": 0.5}] * 3, None)]
    for scores, expected in cases:
        prompts = [
            dataclasses.replace(
                p, samples=tuple(dataclasses.replace(s, scores=dict(x)) for s, x in zip(p.samples, scores, strict=True))
            )
            for p in pool.prompts
        ]
        found = score_pool(Pool(pool.header, prompts), None, spec, tmp_path / "j", None, ignore)
        if expected is None:
            assert found.disagreement_PS is None
        else:
            np.testing.assert_array_equal(found.disagreement_PS, [expected] * len(prompts))


def test_rewards_have_keys_by_what_decides_their_scores(tiny, tmp_path):
    model = RewardSpec(model=str(tiny.two_headed_reward), head="good")
    specs = [model, model.model_copy(update={"head": "bad"}), model.model_copy(update={"sign": -1})]
    specs += [RewardSpec(model=str(tiny.reward)), RewardSpec(verifier="math"), RewardSpec(column="h")]
    prompt_file = tmp_path / "judge.txt"
    prompt_file.write_text("{prompt} {completion}")
    judge = {"url": "http://localhost:1/v1", "model": "m", "prompt_file": str(prompt_file)}
    specs += [RewardSpec(judge=judge), RewardSpec(judge={**judge, "draw": 1})]
    assert len({reward_key(spec) for spec in specs}) == len(specs)
    alike = {**judge, "url": "http://localhost:2/v1", "concurrency": 3}
    before = reward_key(RewardSpec(judge=judge))
    assert reward_key(RewardSpec(judge=alike)) == before
    prompt_file.write_text("{prompt}: {completion}")
    assert reward_key(RewardSpec(judge=judge)) != before
    assert reward_key(model.model_copy(update={"batch_size": 3, "device": "cpu"})) == reward_key(model)


def test_a_column_is_added_whole_or_not_at_all(pool, reward_spec, tmp_path):
    path = tmp_path / "scored.jsonl"
    write_pool(path, pool)
    reward, done = load_reward("r", reward_spec), []

    def killed(number: int) -> None:
        done.append(number)
        if len(done) == 3:
            raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        add_column(path, pool, "r", reward, reward_spec, killed)
    assert path.read_bytes() == before
    (journal,) = tmp_path.glob("*.scoring")
    assert len(journal.read_text().splitlines()) == 3
    values_PS = add_column(path, pool, "r", reward, reward_spec, ignore)
    assert not journal.exists()
    stored = read_pool(path)
    assert [[s.scores["r"] for s in p.samples] for p in stored.prompts] == values_PS.tolist()
    assert [p.cost for p in stored.prompts] == [p.cost for p in pool.prompts]
    halves = reward_from_function(
        lambda prompts, completions, **_: [None, 1.0, 2.0][: len(prompts)], "half", missing_ok=True
    )
    add_column(path, pool, "r/gold", halves, RewardSpec(function="a.py:b"), ignore)  # what came in the meantime stays
    first = read_pool(path).prompts[1].samples[0].scores
    assert first == {"r": values_PS[1, 0], "r/gold": None}
    assert json.loads(path.read_text().splitlines()[-1])["scores"].keys() == {"r", "r/gold"}


def test_columns_without_a_score_and_changed_files_are_refused(pool, tmp_path):
    path = tmp_path / "scored.jsonl"
    write_pool(path, pool)
    before = path.read_bytes()
    spec = RewardSpec(function="a.py:b")
    nothing = reward_from_function(lambda prompts, completions, **_: [None] * len(prompts), "none", missing_ok=True)
    with pytest.raises(RewardError, match=r"'none' gave none of the 12 texts of .*scored\.jsonl a score"):
        add_column(path, pool, "n", nothing, spec, ignore)
    assert path.read_bytes() == before
    write_pool(path, Pool(pool.header, pool.prompts[:2]))
    ones = reward_from_function(lambda prompts, completions, **_: [1.0] * len(prompts), "one")
    with pytest.raises(RunError, match="has been changed while it was scored"):
        add_column(path, pool, "n", ones, spec, ignore)


def length_of(name: str):
    """A reward of a user's own: letters."""
    return reward_from_function(lambda prompts, completions, **_: [float(len(str(c))) for c in completions], name)


OWN = RewardSpec(function="a.py:b")


@pytest.fixture
def foreign(tmp_path):
    """A pool file of somebody else's, large enough that writing it takes a moment."""
    lines = [{"iama_pool": 1, "policy": {"name": "base"}}]
    lines += [{"prompt": f"q {p}", "text": f"a {s}" * 20, "scores": {}} for p in range(60) for s in range(20)]
    path = tmp_path / "race.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_who_score_one_pool_at_once_both_have_their_column(foreign, tmp_path):
    """Of several at once, each with another column; waiting for one another is no mistake."""
    columns = ("helpful", "harmless", "brief", "helpful/gold")
    gate = threading.Barrier(len(columns))

    def score(name: str) -> None:
        before = read_pool(foreign)
        gate.wait()
        add_column(foreign, before, name, length_of(name), OWN, ignore)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="another process is writing .*race.jsonl", category=IamaWarning)
        with ThreadPoolExecutor(len(columns)) as executor:
            list(executor.map(score, columns))
    scores = [sample.scores for prompt in read_pool(foreign).prompts for sample in prompt.samples]
    assert all(row.keys() == set(columns) and len(set(row.values())) == 1 for row in scores)
    assert list(tmp_path.iterdir()) == [foreign]


def test_of_two_who_add_the_same_column_one_is_told(foreign):
    before = read_pool(foreign)
    add_column(foreign, before, "brief", length_of("one"), OWN, ignore)
    content = foreign.read_bytes()
    with pytest.raises(RunError, match=r"another process has given .*race\.jsonl a column 'brief'; give --replace"):
        add_column(foreign, before, "brief", length_of("other"), OWN, ignore)
    assert foreign.read_bytes() == content
    add_column(foreign, read_pool(foreign), "brief", length_of("again"), OWN, ignore)  # as --replace does


def test_a_pool_behind_a_link_is_scored_where_it_is(foreign, tmp_path):
    link = tmp_path / "mine.jsonl"
    link.symlink_to(foreign.name)
    foreign.chmod(0o640)
    add_column(link, read_pool(link), "brief", length_of("brief"), OWN, ignore)
    assert link.is_symlink()
    assert foreign.stat().st_mode & 0o777 == 0o640
    assert read_pool(foreign).prompts[0].samples[0].scores["brief"] > 0
    assert sorted(tmp_path.iterdir()) == [link, foreign]


def test_a_pool_that_cannot_be_rewritten_is_refused_before_anything_is_scored(foreign):
    def never(prompts, completions, **_):
        raise AssertionError

    foreign.chmod(0o444)
    with pytest.raises(RunError, match=r"race\.jsonl is read-only"):
        add_column(foreign, read_pool(foreign), "brief", reward_from_function(never, "never"), OWN, ignore)


def test_one_pool_file_is_filled_by_one_at_a_time(fill, rows, asked):
    """The second waits, finds all there, and draws nothing."""
    gate = threading.Barrier(2)

    def run(_: int) -> Pool:
        gate.wait()
        return fill()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="another process is writing .*pool.jsonl", category=IamaWarning)
        with ThreadPoolExecutor(2) as executor:
            first, second = executor.map(run, range(2))
    assert first == second
    assert sum(asked) == len(rows)


def test_missing_scores_of_a_reward_that_can_be_asked_again_are_not_kept(pool, tmp_path):
    """A judge that answered nothing is asked again by the next run, for what is missing alone."""
    path, asked_for = tmp_path / "scored.jsonl", []
    write_pool(path, pool)
    prompt_file = tmp_path / "judge.txt"
    prompt_file.write_text("{prompt} {completion}")
    spec = RewardSpec(judge={"url": "http://localhost:1/v1", "model": "m", "prompt_file": str(prompt_file)})

    def judge(score):
        def reply(prompts, completions, topic, **_):
            asked_for.extend(topic)
            return [score(t) for t in topic]

        return reward_from_function(reply, "judge", missing_ok=True)

    with pytest.raises(RewardError, match="'judge' gave none of the 12 texts"):
        add_column(path, pool, "n", judge(lambda _: None), spec, ignore)
    journal = tmp_path / "journal"
    half = score_pool(pool, judge(lambda topic: None if topic == "bike" else 1.0), spec, journal, None, ignore)
    asked_for.clear()
    whole = score_pool(pool, judge(lambda _: 2.0), spec, journal, None, ignore)
    assert set(asked_for) == {"bike"}
    assert whole.num_calls == half.num_calls  # each text once, whichever run has asked
    assert np.unique(whole.values_PS[np.isnan(half.values_PS)]).tolist() == [2.0]
    assert np.array_equal(whole.values_PS[~np.isnan(half.values_PS)], half.values_PS[~np.isnan(half.values_PS)])
    # Of an earlier version, which did keep them.
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rows[0]["values"][0] = None
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = score_pool(pool, judge(lambda _: 3.0), spec, journal, None, ignore)
    assert not np.isnan(again.values_PS).any()
    assert add_column(path, pool, "n", judge(lambda _: 1.0), spec, ignore).tolist() == [[1.0] * NUM_SAMPLES] * 4


def test_scores_that_are_too_large_are_told_as_such(pool, tmp_path):
    for scores, spec, told in (
        ([float("inf")], OWN, "'r' returned inf"),
        ([-1.1e50], OWN, r"'r' returned -1.1e\+50 for .*a finite number, of at most 1e\+50 in size"),
        (
            [-1e40],
            OWN.model_copy(update={"scale": RewardScale(mean=1e40, std=1e-19)}),
            r"which its scale makes -2.*e\+59",
        ),
    ):
        reward = reward_from_function(
            lambda prompts, completions, scores=scores, **_: scores * len(prompts), "r", missing_ok=True
        )
        scaled = Reward("r", reward.scorer, spec.scale, missing_ok=True)
        with pytest.raises(RewardError, match=told):
            score_pool(pool, scaled, spec, tmp_path / "journal", None, ignore)
    stored = [dataclasses.replace(s, scores={"h": 1e40}) for s in pool.prompts[0].samples]
    column = RewardSpec(column="h", scale=RewardScale(mean=-1e40, std=1e-19))
    with pytest.raises(RewardError, match=r"column 'h'.* too large"):
        score_pool(
            Pool(pool.header, [dataclasses.replace(pool.prompts[0], samples=tuple(stored))]),
            None, column, tmp_path / "journal", None, ignore,
        )  # fmt: skip
