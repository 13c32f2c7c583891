"""Tuning files: written whole or not at all, and giving numbers only to what they were tuned for."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iama.config.files import EvaluationConfig
from iama.config.methods import FIXED_DRAWS, TUNABLE, find_tunable, read_tunable, written_tuned
from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaWarning
from iama.objective.operators import RankOperator
from inference.evaluation.calibration import Scored, correlation_interval, tuning_of
from inference.evaluation.sources import Source
from inference.evaluation.tuned import tuned_methods
from inference.hedging.guarantee import within_prompt_correlation
from inference.hedging.tuning_file import (
    Calibration,
    TunedCriterion,
    Tuning,
    Wanted,
    find,
    gold_key,
    load_tuning,
    order_key,
    save_tuning,
    setting,
    text_id,
)
from inference.pools.file import prompt_ids
from inference.pools.format import full_header
from inference.pools.journal import digest
from inference.samplers.serve import read_method
from inference.statistics.bootstrap import percentile_interval, prompt_weights
from tests.inference.methods import read_served

PROMPTS = [f"what is {number}?" for number in range(6)]


def header(name="base", fingerprint: str | None = "f", **more) -> dict:
    raw = {"iama_pool": 1, "policy": {"name": name, "fingerprint": fingerprint}, "sampling": {"max_new_tokens": 8}}
    return full_header(raw | more, "test")


def scored(
    name="helpful", proxy: RewardSpec | None = None, told: dict | None = None, prompts=PROMPTS, gold=None
) -> Scored:
    rng = np.random.default_rng(len(name))
    proxy_PS, gold_PS = rng.normal(size=(2, len(prompts), 16))
    proxy, gold = proxy or RewardSpec(verifier="math", answer_column=name), gold or RewardSpec(column="gold")
    keys = {"proxy_key": order_key(proxy), "gold_key": gold_key(gold)}
    criterion = TunedCriterion(name=name, proxy=proxy, gold=gold, **keys)
    ids = prompt_ids([{"prompt": prompt} for prompt in prompts])
    return Scored(told or header(), criterion, ids, list(prompts), proxy_PS, gold_PS, None, 3.0)


def tuning(*pools: Scored, tunables=(("bon", None),)) -> Tuning:
    return tuning_of(pools, tunables, max_budget=None, num_bootstrap=50, seed=0)


def number(calibration: Calibration, path: Path, method: str) -> str:
    """What a method is with its number from the file."""
    return setting(calibration, path, read_method(method)).text


def wanted(told: dict | None = None, criterion: str | None = "helpful", gold=None, **proxy) -> Wanted:
    told = told or header()
    sampling = None if told["sampling"] is None else Sampling(**told["sampling"])
    spec = RewardSpec(**(proxy or {"verifier": "math", "answer_column": criterion}))
    return Wanted(told["policy"], told["system_prompt"], sampling, spec, criterion, gold)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.json"


def test_what_is_written_is_read(tmp_path):
    written = tuning(scored(), scored("brief"), tunables=[("bon", None), ("bop_zt", None), ("soft_bon", 4)])
    path = save_tuning(tmp_path / "new" / "folder", written)
    assert load_tuning(path) == written
    assert list(written.calibrations[0].methods) == ["bon(tuned)", "bop_zt(tuned)", "soft_bon(4, tuned)"]
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]
    assert written.calibrations[0].generation_seconds == 3.0
    assert len(json.loads(path.read_text())["calibrations"][0]["methods"]["bon(tuned)"]["result"]["curve"]) == 4


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    good = tuning(scored())
    path = save_tuning(tmp_path, good)
    broken = good.model_copy(
        update={"calibrations": [good.calibrations[0].model_copy(update={"correlation": math.nan})]}
    )
    with pytest.raises(ValueError, match="JSON"):
        save_tuning(tmp_path, broken)
    assert load_tuning(path) == good


@given(st.sampled_from(sorted(TUNABLE)), st.integers(2, 5000))
def test_tunables_are_written_as_they_are_read(name, number):
    tunable = (name, number if name in FIXED_DRAWS else None)
    written = written_tuned(tunable)
    assert find_tunable(written) == find_tunable(f" {written.replace('(', ' ( ')} ") == tunable
    assert read_tunable(f"{name}({number})" if name in FIXED_DRAWS else name) == tunable
    assert find_tunable(written.replace("tuned", "0.5")) is None
    draws, law = (f"n={number}, ", f", {FIXED_DRAWS[name]}") if name in FIXED_DRAWS else ("", "")
    assert find_tunable(f"{name}({draws}{TUNABLE[name]} = tuned{law})") == tunable
    assert find_tunable(written.replace(")", f"{law})")) == tunable


@pytest.mark.parametrize(
    "method",
    ["soft_bon(1, tuned)", "itp(tuned)", "bop(3, tuned)", "sea(tuned)", "soft_bon(a, tuned)", "bon(mu=tuned)",
     "itp(16, tuned, batches=2)", "soft_bon(tuned, 16)", "soft_bon(16, tuned, ranks=0)", "soft_bon(n=tuned)",
     "bon(tuned, tuned)", "cards(target=tuned)", "bon(tuned, cap=4)", "bop(tuned, cap=0)", "bop(3, cap=tuned)"],
)  # fmt: skip
def test_what_cannot_be_tuned(method):
    with pytest.raises(ConfigError, match="has such a number; write bon") as raised:
        find_tunable(method)
    assert repr(method) in str(raised.value)


class TestFind:
    def test_a_policy_by_its_fingerprint_whatever_its_name(self, path):
        found = find(tuning(scored()), path, wanted(header("served")))
        assert found.policy.name == "base"
        with pytest.raises(ConfigError, match="tuned for another policy 'base' \\(weights"):
            find(tuning(scored()), path, wanted(header(fingerprint="g")))

    @pytest.mark.parametrize("marks", [(None, None), (None, "f"), ("f", None)])
    def test_a_policy_by_its_name_where_a_fingerprint_is_missing(self, path, marks):
        own, other = (header(fingerprint=mark) for mark in marks)
        with pytest.warns(IamaWarning, match="taken on trust: the policy 'base' is the same model, since it has no"):
            assert find(tuning(scored(told=own)), path, wanted(other)).policy.name == "base"
        with pytest.raises(ConfigError, match="tuned for 'base', and the policy 'theirs' is another; run `iama tune`"):
            find(tuning(scored(told=own)), path, wanted(header("theirs", marks[1])))

    def test_one_model_under_two_names(self, path):
        both = tuning(scored(told=header("a")), scored(told=header("b")))
        assert [find(both, path, wanted(header(name))).policy.name for name in "bac"] == ["b", "a", "a"]

    def test_a_proxy_by_the_order_it_makes(self, path, tiny):
        spec = {"model": str(tiny.reward)}
        file = tuning(scored(proxy=RewardSpec(**spec)))
        found = [find(file, path, wanted(**spec, **more)) for more in ({}, {"scale": {"mean": 1, "std": 2}})]
        assert found[0] is found[1] is file.calibrations[0]
        for changes in ({"sign": -1}, {"dtype": "bfloat16"}, {"model": str(tiny.other_reward)}):
            with pytest.raises(ConfigError, match=r"tuned for the proxy model '.*', and model '.*' is another, or has"):
                find(file, path, wanted(**(spec | changes)))

    @pytest.mark.parametrize(
        ("proxy", "named"),
        [({"function": "f.py:g"}, "f.py:g"), ({"kind": "f.py:G(a=1)"}, "f.py:G"), ({"kind": "g"}, "g")],
    )
    def test_the_code_of_a_proxy_is_taken_on_trust(self, path, proxy, named):
        file = tuning(scored(proxy=RewardSpec(**proxy)))
        with pytest.warns(IamaWarning, match=f"taken on trust: the code of {named} is unchanged"):
            find(file, path, wanted(**proxy))

    def test_a_column_by_the_criterion_s_name(self, path):
        file = tuning(scored("a", RewardSpec(column="x")), scored("b", RewardSpec(column="y")))
        with pytest.warns(IamaWarning, match="'b' was tuned with the column 'y', and function 'f.py:g' gives the same"):
            found = find(file, path, wanted(criterion="b", function="f.py:g"))
        assert found.criterion.name == "b"
        with pytest.warns(IamaWarning, match="taken on trust: column 'x' holds scores of the same reward"):
            assert find(file, path, wanted(criterion="renamed", column="x")).criterion.name == "a"
        with pytest.raises(ConfigError, match="the criteria a, b were tuned with this proxy; name one of them"):
            find(file, path, wanted(criterion=None, function="f.py:g"))
        with pytest.raises(ConfigError, match=r"proxy column 'x', column 'y', and function 'f\.py:g' is another"):
            find(file, path, wanted(criterion="c", function="f.py:g"))

    def test_two_criteria_of_one_proxy(self, path):
        spec = RewardSpec(function="file.py:same")
        file = tuning(scored("a", spec), scored("b", spec))
        with pytest.warns(IamaWarning, match=r"taken on trust: the code of file\.py:same is unchanged"):
            assert find(file, path, wanted(criterion="b", function="file.py:same")).criterion.name == "b"
        with pytest.raises(ConfigError, match="the criteria a, b were"):
            find(file, path, wanted(criterion=None, function="file.py:same"))

    def test_another_gold_is_told(self, path):
        judge = {"url": "http://x/v1", "model": "m", "prompt_file": __file__, "draw": 0}
        file = tuning(scored(gold=RewardSpec(judge=judge)))
        for same in (None, RewardSpec(column="gold"), RewardSpec(judge=judge | {"draw": 1})):
            find(file, path, wanted(gold=same))
        with pytest.warns(IamaWarning, match="was tuned for the gold judge 'm', and judge 'n' is another, or has been"):
            find(file, path, wanted(gold=RewardSpec(judge=judge | {"model": "n"})))

    def test_sampling_where_both_are_known(self, path):
        file = tuning(scored())
        with pytest.raises(ConfigError, match=r"tuned with top_p 1\.0, but it is 0\.5; max_new_tokens 8, but it is 9"):
            find(file, path, wanted(header(sampling={"top_p": 0.5, "max_new_tokens": 9})))
        with pytest.raises(ConfigError, match="tuned with the system prompt None, but it is 'be kind'"):
            find(file, path, wanted(header(system_prompt="be kind")))

    def test_unknown_sampling_is_told(self, path):
        for there, here in (({"max_new_tokens": 8}, None), (None, {"max_new_tokens": 8}), (None, None)):
            file = tuning(scored(told=header(sampling=there)))
            with pytest.warns(IamaWarning, match="on trust: 'base' is sampled as it was, since a pool's header has no"):
                assert find(file, path, wanted(header(sampling=here)))

    def test_one_of_several_samplings(self, path):
        hot, cold = ({"temperature": value} for value in (1.0, 0.5))
        both = tuning(scored(told=header(sampling=hot)), scored(told=header(sampling=cold)))
        for told, found in zip((hot, cold), both.calibrations, strict=True):
            assert find(both, path, wanted(header(sampling=told))) is found
        with pytest.raises(ConfigError, match=r"'base' was tuned with temperature 1\.0 and 0\.5, and the pool to"):
            find(both, path, wanted(header(sampling=None)))
        one = tuning(scored(told=header(sampling=None)), scored(told=header(sampling=cold)))
        assert find(one, path, wanted(header(sampling=cold))) is one.calibrations[1]
        with pytest.raises(ConfigError, match="a sampling that is known and one that is not, and the pool"):
            find(one, path, wanted(header(sampling=None)))

    def test_a_method_that_was_tuned(self, path):
        calibration = tuning(scored(), tunables=[("bon", None), ("soft_bon", 4)]).calibrations[0]
        for name in ("bon", "soft_bon"):
            method = "bon( tuned)" if name == "bon" else "soft_bon( 4,tuned )"
            found = next(m for m in calibration.methods.values() if m.result.family == name)
            assert number(calibration, path, method) == found.result.written
        assert number(calibration, path, "bon(n=tuned)") == number(calibration, path, "bon(tuned)")
        with pytest.raises(ConfigError, match=r"soft_bon\(8, tuned\) was not tuned for 'base' and 'helpful', only bon"):
            number(calibration, path, "soft_bon(8, tuned)")


def test_a_latency_cap_beside_a_tuned_number(path):
    """It is served with the number that was tuned without it; a single sample needs none."""
    pool = scored()
    risen, fallen = (
        tuning(replace(pool, gold_PS=sign * pool.proxy_PS), tunables=[("bop", None)]).calibrations[0]
        for sign in (1, -1)
    )
    for method in ("bop(tuned, cap=3)", "bop(cap = 3, mu = tuned)"):
        written = number(risen, path, method)
        assert written == number(risen, path, "bop(tuned)").replace(")", ", cap=3)")
        operator = read_served(written)
        assert isinstance(operator, RankOperator)
        assert operator.capped_share > 0
        assert number(fallen, path, method) == "identity"


@pytest.mark.parametrize(
    "written", ["{file}:Evil", "mbr(8, 0.5, utility={file}:Evil)", "bop(tuned)", "bop", "bon(4)", "best(3)"]
)
def test_another_method_in_the_place_of_a_number_is_refused(path, tmp_path, written):
    """A tuning file from elsewhere runs no code."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    written = written.format(file=tmp_path / "evil.py")
    calibration = tuning(scored(), tunables=[("bop", None)]).calibrations[0]
    tuned = calibration.methods["bop(tuned)"]
    result = replace(tuned.result, written=written)
    changed = calibration.model_copy(update={"methods": {"bop(tuned)": tuned.model_copy(update={"result": result})}})
    for method in ("bop(tuned)", "bop(tuned, cap=3)"):
        with pytest.raises(ConfigError, match=re.escape(written)):
            number(changed, path, method)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("method", "capped"), [("bop(3.5)", "bop(3.5, cap=64)"), ("bop_zt(lam=2)", "bop_zt(lam=2, cap=64)")]
)
def test_a_capped_method_is_the_one_that_is_read(method, capped):
    changed = read_method(method).with_cap(64)
    assert (changed.text, changed.call) == (capped, read_method(capped).call)
    assert changed == read_method(capped)


def test_prompts_are_disjoint_from_those_calibrated_on(tmp_path):
    """A repeated prompt counts as often as it occurs, whichever of the two lists repeats it."""
    path = save_tuning(tmp_path, tuning(scored(prompts=[*PROMPTS, PROMPTS[0]])))
    config = EvaluationConfig.model_validate(
        {
            "name": "t",
            "output_dir": "o",
            "policies": {"base": {"path": "p"}},
            "trained": "base",
            "references": [],
            "prompts": "p.jsonl",
            "criteria": [{"name": "helpful", "proxy": {"verifier": "math", "answer_column": "helpful"}}],
            "methods": ["bon", "bon(tuned)"],
            "tuning": str(path),
        }
    )
    methods = [read_method(text) for text in config.methods]
    sources = [Source("base", "base", ("helpful",), header())]
    rows = [{"prompt": prompt} for prompt in ("new", PROMPTS[0], PROMPTS[0], PROMPTS[4])]
    with pytest.raises(DataError, match="3 of the evaluation's 4 prompts are among the 7 that 'base' was") as raised:
        tuned_methods(config, methods, rows, sources)
    assert "\n" not in str(raised.value)
    calibration: Calibration = load_tuning(path).calibrations[0]
    found = tuned_methods(config, methods, rows[:1], sources)
    assert found == {("base", "helpful", "bon(tuned)"): read_method(calibration.methods["bon(tuned)"].result.written)}
    assert tuned_methods(config, [read_method("bon")], rows, sources) == {}
    asked = {"role": "user", "content": f" {PROMPTS[1]}"}
    chats = ([asked], [{"role": "system", "content": "be kind"}, asked], [asked, {"role": "assistant", "content": "?"}])
    for other in (f"{PROMPTS[1]} \n", *chats):
        with pytest.raises(DataError, match="1 of the evaluation's 2 prompts are among the 7 that 'base' was calibr"):
            tuned_methods(config, methods, [{"prompt": "new"}, {"prompt": other}], sources)


def test_a_conversation_is_known_by_all_its_turns():
    """Not by its last one alone, which many share; a single turn has the id that older files hold."""

    def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
        roles = ("user", "assistant") * 2
        turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return turns if system is None else [{"role": "system", "content": system}, *turns]

    texts = ("a text", "another")
    ends_alike = [text_id(talk(text, "noted", "Summarise the above.")) for text in texts]
    assert len({*ends_alike, text_id("Summarise the above."), text_id(texts[0])}) == 4
    assert ends_alike[0] == text_id(talk("a text ", "noted", "\nSummarise the above.", system="be brief"))
    assert ends_alike[0] != text_id(talk("a text", "seen", "Summarise the above."))
    assert ends_alike[0] == text_id(talk("a text", "noted", "Summarise the above.", "In short:"))  # prefilled
    assert text_id("why?") == text_id(talk("why? ", system="be kind")) == digest("why?")[:16]
    assert text_id([{"role": "system", "content": "why?"}]) == text_id("why?")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_interval_of_the_correlation_is_that_of_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    gold_PS = rng.normal(size=(5, 9))
    proxy_PS = gold_PS + rng.normal(size=(5, 9)) + 10 * rng.normal(size=(5, 1))
    proxy_PS[0] = 1.0
    gold_PS[2, 4] = proxy_PS[2, 4] = math.nan
    found = []
    for weights in prompt_weights(5, 200, seed):
        chosen = [p for p in range(5) for _ in range(round(5 * weights[p]))]
        constant = all(p == 0 for p in chosen)
        found.append(0.0 if constant else within_prompt_correlation(proxy_PS[chosen], gold_PS[chosen]))
    assert correlation_interval(proxy_PS, gold_PS, 200, seed) == pytest.approx(percentile_interval(np.asarray(found)))


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[3] / "docs/guides/hedge.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "bon(4) hacks\n"


@pytest.mark.parametrize("text", ["bop(tuned, cap={})", "soft_bon({}, tuned)"])
def test_a_number_of_thousands_of_digits_is_refused(text):
    with pytest.raises(ConfigError, match="no file of `iama tune` has such a number"):
        find_tunable(text.format("9" * 5000))
