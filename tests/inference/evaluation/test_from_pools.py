"""Evaluations of completions that exist already: from pool files alone, without a configuration."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from iama.cli.app import app
from iama.config.files import EvaluationConfig
from iama.errors import ConfigError, DataError, IamaError, IamaWarning, RewardError
from inference.evaluation.from_pools import config_from_pools
from inference.evaluation.plan import make_plan
from inference.evaluation.summary import load_summary
from inference.report import write_report
from inference.statistics.costs import UNITS
from tests.inference.evaluation.running import evaluate

PROMPTS = ("bake bread", "grow tomatoes", "fix a bike")
NUM_SAMPLES = 16


def write(path: Path, shift: float = 0.0, columns=("helpful", "helpful/gold"), prompts=PROMPTS, size=NUM_SAMPLES,
          missing=()) -> Path:  # fmt: skip
    """A pool as another program would write it: prompt, text and scores, nothing else."""
    rng = random.Random(7)
    lines = [json.dumps({"iama_pool": 1, "policy": {"name": path.stem}})]
    for p, prompt in enumerate(prompts):
        for i in range(size):
            value = rng.gauss(shift, 1)
            scores = {name: None if (p, i, name) in missing else value + 0.1 * k for k, name in enumerate(columns)}
            lines.append(json.dumps({"prompt": prompt, "text": f"{prompt}: word {rng.random():.3f}", "scores": scores}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return {"base": write(tmp_path / "a.jsonl"), "iama": write(tmp_path / "b.jsonl", 0.5)}


def pool_options(files: dict[str, Path]) -> list[str]:
    return [part for name, path in files.items() for part in ("--pool", f"{name}={path}")]


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "100"})


def test_two_files_and_nothing_else(files, tmp_path):
    done = invoke(
        *pool_options(files), "--out", tmp_path / "out", "--set", "num_bootstrap=100", "--set", "trained_budget=1"
    )
    assert done.exit_code == 0, done.exception
    assert "trained_budget" not in done.stderr  # told by the caller
    assert "Savings by gold" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["trained"], summary["references"], summary["criteria"]) == ("iama", ["base"], ["helpful"])
    gold = next(row for row in summary["savings"] if row["metric"] == "gold")
    assert gold["ratio"] > 1
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_what_a_foreign_pool_does_not_tell_is_null(files, tmp_path):
    config = EvaluationConfig.model_validate(config_from_pools(files, [], None, str(tmp_path / "out")))
    summary = evaluate(config.model_copy(update={"num_bootstrap": 100}))
    told = {"reward_calls", "reward_tokens", "backward_tokens"}
    for row in summary["curves"]:
        assert {unit for unit in UNITS if row[unit] is not None} <= told
        assert row["reward_calls"] == row["samples"]
        assert (row["kl_kind"] is not None) == (row["policy"] == "base")  # bound of the first reference's own sampler
    for row in summary["sampling"]:
        unknown = ("mean_tokens", "truncated", "prefill_tokens", "decode_tokens", "flops", "seconds", "peak_memory")
        assert [row[name] for name in unknown] == [None] * len(unknown)
        assert row["engine"] == "unknown"
        assert row["estimated"] is True
    for row in summary["savings"]:
        assert row["token_ratio"] is None
        assert set(row["units"]) == {"reward_calls"}
    page = write_report(Path(config.output_dir)).read_text(encoding="utf-8")
    assert "nan" not in page.lower().split("<script")[0]


def test_columns_are_criteria_by_their_names(tmp_path):
    columns = ("helpful", "helpful/gold", "brief", "alone/gold")
    files = {name: write(tmp_path / f"{name}.jsonl", columns=columns) for name in ("x", "y")}
    raw = config_from_pools(files, [], None, "out")
    assert raw["criteria"] == [
        {"name": "helpful", "proxy": {"column": "helpful"}, "gold": {"column": "helpful/gold"}},
        {"name": "brief", "proxy": {"column": "brief"}},
        {"name": "alone/gold", "proxy": {"column": "alone/gold"}},
    ]
    assert (raw["trained"], raw["references"]) == ("y", ["x"])  # the last, where none is called iama
    assert (raw["num_samples"], raw["budgets"], raw["trained_budget"]) == (16, [1, 2, 4], 1)
    assert config_from_pools(files, [], "x", "out")["references"] == ["y"]
    only = config_from_pools(files, ["h=helpful, brief", "b=brief"], None, "out")["criteria"]
    assert only[0] == {"name": "h", "proxy": {"column": "helpful"}, "gold": {"column": "brief"}}
    assert only[1] == {"name": "b", "proxy": {"column": "brief"}}


def test_only_common_columns_and_samples(tmp_path):
    files = {
        "a": write(tmp_path / "a.jsonl", columns=("one", "two"), size=24),
        "b": write(tmp_path / "b.jsonl", columns=("two", "three"), size=9),
    }
    with pytest.warns(IamaWarning, match="not in every sample of") as told:
        raw = config_from_pools(files, [], None, str(tmp_path / "out"))
    assert [str(warning.message).split()[1] for warning in told] == ["'one'", "'three'"]
    assert [c["name"] for c in raw["criteria"]] == ["two"]
    assert (raw["num_samples"], raw["budgets"], raw["trained_budget"]) == (9, [1, 2], 1)
    summary = evaluate(EvaluationConfig.model_validate(raw | {"num_bootstrap": 100}))
    assert summary["num_samples"] == 9
    rows = {row["policy"]: row for row in summary["sampling"]}
    assert (rows["a"]["num_samples"], rows["b"]["num_samples"]) == (24, 9)
    texts = [line for line in map(json.loads, files["a"].read_text().splitlines()) if "text" in line]
    shares = []
    for prompt in PROMPTS:
        words = [w for line in [t for t in texts if t["prompt"] == prompt][:9] for w in line["text"].split()]
        shares.append(len(set(words)) / len(words))
    assert rows["a"]["distinct_1"] == pytest.approx(np.mean(shares))  # of as many samples as the other has


def test_missing_scores_are_left_out_and_counted(tmp_path):
    missing = {(0, 3, "helpful"), (0, 4, "helpful/gold"), (2, 0, "helpful/gold")}
    files = {"base": write(tmp_path / "a.jsonl"), "iama": write(tmp_path / "b.jsonl", missing=missing)}
    raw = config_from_pools(files, [], None, str(tmp_path / "out"))
    summary = evaluate(EvaluationConfig.model_validate(raw | {"num_bootstrap": 100}))
    counts = {(r["policy"], r["metric"]): (r["num_missing"], r["num_samples"]) for r in summary["missing"]}
    assert counts == {("base", "proxy"): (0, 48), ("base", "gold"): (0, 48),
                      ("iama", "proxy"): (1, 48), ("iama", "gold"): (2, 48)}  # fmt: skip
    lines = [line for line in map(json.loads, files["iama"].read_text().splitlines()) if "text" in line]
    by_prompt = [[line["scores"] for line in lines if line["prompt"] == prompt] for prompt in PROMPTS]
    both = [[s for s in row if None not in s.values()] for row in by_prompt]
    means = {
        "proxy": np.mean([np.mean([s["helpful"] for s in row if s["helpful"] is not None]) for row in by_prompt]),
        "gold": np.mean([np.mean([s["helpful/gold"] for s in row]) for row in both]),
    }
    row = next(r for r in summary["curves"] if (r["policy"], r["samples"]) == ("iama", 1))
    assert (row["proxy"], row["gold"]) == pytest.approx((means["proxy"], means["gold"]))
    example = next(r for r in summary["examples"] if r["policy"] == "iama" and r["prompt"] == PROMPTS[2])
    assert example["single"]["gold"] is None
    write_report(tmp_path / "out")


def test_a_gold_that_one_pool_lacks_is_warned_of(tmp_path):
    files = {"base": write(tmp_path / "a.jsonl"), "iama": write(tmp_path / "b.jsonl", columns=("helpful",))}
    told = f"column 'helpful/gold' is in base and not in every sample of iama.*`iama score {files['iama']} --column h"
    with pytest.warns(IamaWarning, match=told):
        config = config_from_pools(files, [], None, str(tmp_path / "out"))
    assert config["criteria"] == [{"name": "helpful", "proxy": {"column": "helpful"}}]
    assert config_from_pools(files, ["h=helpful"], None, str(tmp_path / "out"))["criteria"]  # asked for: no warning


def test_too_many_missing_scores(tmp_path):
    missing = {(1, i, "helpful/gold") for i in range(13)}
    files = {"base": write(tmp_path / "a.jsonl"), "iama": write(tmp_path / "b.jsonl", missing=missing)}
    config = EvaluationConfig.model_validate(config_from_pools(files, [], None, str(tmp_path / "out")))
    with pytest.raises(RewardError, match=r"only 3 of the 16 samples of policy 'iama' for the prompt 'grow tomatoes'"):
        evaluate(config)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_files_that_do_not_fit_together(tmp_path):
    good = write(tmp_path / "good.jsonl")
    cases = [
        (write(tmp_path / "c.jsonl", columns=("other",)), ConfigError, "have no score column in common; .*`iama score"),
        (write(tmp_path / "s.jsonl", size=3), ConfigError, "have 3 samples a prompt; at least 4 are needed"),
        (write(tmp_path / "p.jsonl", prompts=("bake bread", "sing")), DataError, "no completions for 2 of 3 prompts"),
        (write(tmp_path / "m.jsonl", prompts=(*PROMPTS, "sing")), DataError, "has 4 prompts, that of 'base' has 3"),
        (tmp_path / "gone.jsonl", DataError, r"gone\.jsonl' does not exist"),
    ]
    for other, error, told in cases:
        with pytest.raises(error, match=told) as raised:
            plan_of({"base": good, "iama": other})
        assert "\n" not in str(raised.value)


def plan_of(files: dict[str, Path]):
    return make_plan(EvaluationConfig.model_validate(config_from_pools(files, [], None, "out")))


def test_a_method_or_baseline_larger_than_a_stored_pool(files, tmp_path):
    raw = config_from_pools(files, [], None, str(tmp_path / "out")) | {"num_samples": 256}
    for changes, told in (
        ({"methods": ["bon", "bon(8)"]}, r"'bon\(8\)' keeps one of 8 samples, more than a quarter of the 16 samples"),
        ({"budgets": [1, 8]}, "budget 8 is more than a quarter of the 16 samples a prompt in the pool of 'base'"),
        ({"win_rate_baseline": {"policy": "base", "samples": 9}}, "budget 9 is more than a quarter of the 16"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_plan(EvaluationConfig.model_validate(raw | changes))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trained", "imaa"], "--trained 'imaa' is none of the pools; did you mean 'iama'?"),
        (["--criterion", "helpful"], "--criterion 'helpful': write NAME=PROXY_COLUMN,GOLD_COLUMN"),
        (["--criterion", "h=a,b,c"], "write NAME=PROXY_COLUMN,GOLD_COLUMN"),
        (
            ["--criterion", "h=helpfull"],
            "has the score column 'helpfull'; did you mean 'helpful'? the pools have helpful",
        ),
        (["--pool", "base=again.jsonl"], "write NAME=FILE, each name once"),
        (["--pool", "nothing"], "write NAME=FILE, each name once"),
        (["--config", "some.yaml"], "give --config FILE, or --pool NAME=FILE"),
        (["--set", "methods=[cards]"], "needs a model, but policy 'base' is a pool file"),
        (["--set", "budgets=[1, 8]"], r"budgets [8] lie outside 1..4"),
    ],
)
def test_mistakes_on_the_command_line(files, tmp_path, options, told):
    out = tmp_path / "out"
    done = invoke(*pool_options(files), "--out", out, *options)
    assert isinstance(done.exception, IamaError)
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not out.exists()


def test_options_of_pools_do_not_go_with_a_file(tmp_path):
    for option in (["--criterion", "a=b"], ["--trained", "x"], ["--out", "y"]):
        done = invoke("--config", tmp_path / "c.yaml", *option)
        assert "belong to --pool; write them into the file" in str(done.exception)


def test_one_prompt_gives_figures_and_no_verdict(tmp_path):
    """No interval of zero width, no onset, no advice: in no table, in words, on the page and in a comparison."""
    options = pool_options({n: write(tmp_path / f"{n}.jsonl", prompts=PROMPTS[:1]) for n in ("base", "iama")})
    for out in ("a", "b"):
        done = invoke(*options, "--out", tmp_path / out, "--set", "num_bootstrap=100", "--set", f"name={out}")
        assert done.exit_code == 0, done.exception
    assert "No verdict, interval or advice: 1 prompt is too few, at least 4 are needed." in done.stdout
    assert "with 1 there are no intervals; take 30 or more" in done.stdout
    assert "Reward hacking: not told: 1 prompt is too few" in done.stdout
    assert not re.search(r"\[-?\d|none seen|not worse|falls", done.stdout)
    summary = load_summary(tmp_path / "b")
    assert not summary["hacking"] + summary["recommendations"] + summary["break_even"]
    intervals = [value for key, value in pairs_of(summary) if key.endswith("ci95")]
    assert len(intervals) > 20
    assert set(intervals) == {None}
    page = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert "No verdict, interval or advice: 1 prompt is too few" in page
    compared = CliRunner().invoke(app, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--compare"])
    assert compared.exit_code == 0
    page = (tmp_path / "b" / "compare.html").read_text(encoding="utf-8")
    assert page.count("No verdict, interval or advice: 1 prompt is too few") == 2


def pairs_of(value):
    """Every key of every mapping in it, with its value."""
    if isinstance(value, dict):
        yield from value.items()
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from pairs_of(item)


@pytest.mark.parametrize("column", ["", " ", "/gold", "h\n", "h ", "a\tb"])
def test_a_column_that_no_criterion_can_be_named_after_is_refused(files, tmp_path, column):
    before = files["base"].read_bytes()
    options = ["--column", column, "--reward", f"{tmp_path / 'absent.py'}:one"]
    refused = CliRunner().invoke(app, ["score", str(files["base"]), *options])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith(f"--column {column!r} is no name of a criterion; write letters")
    assert files["base"].read_bytes() == before


@pytest.mark.parametrize("side", ["base", "iama"])
def test_a_constant_proxy_claims_no_saving(tmp_path, side):
    """Chosen by chance, the trained policy may have more gold than the reference ever gets, and nothing follows."""
    prompts, files = [f"question {i}" for i in range(6)], {}
    for name, shift in (("base", 0.0), ("iama", 3.0)):
        files[name] = write(tmp_path / f"{name}.jsonl", shift, prompts=prompts)
    lines = [json.loads(line) for line in files[side].read_text().splitlines()]
    for row in lines[1:]:
        row["scores"]["helpful"] = 0.3
    files[side].write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = invoke(*pool_options(files), "--out", tmp_path / "out", "--set", "num_bootstrap=100")
    assert done.exit_code == 0, done.exception
    summary, told = load_summary(tmp_path / "out"), " ".join(done.stdout.split())
    assert [(row["counts"], row["constant_proxy"]) for row in summary["savings"]] == [(False, True)] * 2
    assert [(row["ratio"], row["num_not_counted"]) for row in summary["averages"]] == [(None, 1)] * 2
    assert "on helpful none can be told, since the reward that selects is the same for all answers" in told
    assert not re.search(r"\d\.\d+x", told)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "not counted: a proxy is the same for all answers" in page
    if side == "iama":
        assert "Reward hacking: not told: the proxy on helpful selects by chance." in told


@pytest.mark.parametrize("trained", [1.0, 2.0])
def test_gold_that_judges_nothing_claims_no_saving(tmp_path, trained):
    """Where both sides have one gold for all answers nothing follows; where one has another, that one is better."""
    files = {}
    for name, gold in (("base", 1.0), ("iama", trained)):
        files[name] = write(tmp_path / f"{name}.jsonl", prompts=[f"question {i}" for i in range(8)])
        lines = [json.loads(line) for line in files[name].read_text().splitlines()]
        for row in lines[1:]:
            row["scores"]["helpful/gold"] = gold
        files[name].write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = invoke(*pool_options(files), "--out", tmp_path / "out", "--set", "num_bootstrap=100")
    assert done.exit_code == 0, done.exception
    assert (
        "note: trained_budget is 1: a 16th of the 16 samples a prompt, 1 at least and 4 at most; --set" in done.stderr
    )
    summary, told = load_summary(tmp_path / "out"), " ".join(done.stdout.split())
    counted = {row["counts"] for row in summary["savings"] if row["metric"] == "gold"}
    assert counted == {trained == 2.0}
    assert {row["counts"] for row in summary["savings"] if row["metric"] == "proxy"} == {True}
    words = "on helpful none can be told, since the reward that judges is the same for all answers"
    assert (words in told) == (trained == 1.0)
    assert "Reward hacking: not told: gold on helpful is the same for all answers" in told
    assert {row["onset"] for row in summary["hacking"]} == {None}


def test_a_constant_reward_is_a_risk_with_its_name(tmp_path):
    """Zero variance over a pool, or within every prompt: the proxy selects by chance, and the tables look like any."""
    files = {}
    for name, constant in (("base", [0.25, 0.25, 0.25]), ("iama", [1, 2, 3])):
        lines = write(tmp_path / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[1:]]
        for row in rows:
            row["scores"]["helpful"] = constant[PROMPTS.index(row["prompt"])]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join([lines[0], *map(json.dumps, rows)]) + "\n")
    done = invoke(*pool_options(files), "--out", tmp_path / "out", "--set", "num_bootstrap=100")
    assert done.exit_code == 0, done.exception
    wanted = (
        "! Constant scores: proxy of base on helpful is 0.25 for all answers, so it selects by chance; proxy of iama "
        "on helpful is the same for all answers to a prompt, so it selects by chance."
    )
    assert wanted in " ".join(done.stdout.split())
    assert wanted[2:60].split(": ")[1] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "one.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    options = ["--column", "one", "--reward", f"{tmp_path / 'one.py'}:one"]
    scored = CliRunner().invoke(app, ["score", str(files["base"]), *options])
    assert scored.exit_code == 0
    assert "note: 'one' is the same for all answers to each prompt, so choosing by it" in scored.stderr
