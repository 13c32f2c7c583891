"""`iama tune --pool`, and evaluations of pools that take their number from what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iama.config.files import TrainingConfig
from iama.config.schema import validate
from iama.errors import ConfigError
from inference.hedging.tune import tune
from inference.hedging.tuning_file import load_tuning
from inference.pools.file import prompt_ids

NUM_SAMPLES = 32
PROMPTS = [f"what about {word}" for word in ("bread", "tomatoes", "bikes", "water", "flour", "red", "cake", "tea")]
OTHER_PROMPTS = [f"and {prompt}" for prompt in PROMPTS]


def done(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def refusal(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def scores(num_prompts: int, num_samples: int = NUM_SAMPLES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A proxy with a heavy tail of samples that it likes and gold does not: gold rises, then falls."""
    rng = np.random.default_rng(seed)
    gold_PS = rng.normal(size=(num_prompts, num_samples))
    hacked_PS = rng.random((num_prompts, num_samples)) < 0.1
    return np.where(hacked_PS, 4 + gold_PS, gold_PS), np.where(hacked_PS, gold_PS - 3, gold_PS)


def write(path: Path, columns: dict[str, np.ndarray], prompts=PROMPTS, name="theirs", **header) -> Path:
    """A pool as another program would write it; NaN is a missing score."""
    lines = [json.dumps({"iama_pool": 1, "policy": {"name": name}} | header)]
    for p, prompt in enumerate(prompts):
        for s in range(len(next(iter(columns.values()))[p])):
            told = {key: None if np.isnan(v[p][s]) else float(v[p][s]) for key, v in columns.items()}
            lines.append(json.dumps({"prompt": prompt, "text": f"answer {s}", "scores": told}))
    path.write_text("\n".join(lines) + "\n")
    return path


def pair(path: Path, prompts=PROMPTS, seed: int = 0, **header) -> Path:
    proxy_PS, gold_PS = scores(len(prompts), seed=seed)
    return write(path, {"helpful": proxy_PS, "helpful/gold": gold_PS}, prompts, **header)


@pytest.fixture
def base(tmp_path) -> Path:
    return pair(tmp_path / "base.jsonl")


@pytest.mark.parametrize(
    ("command", "name", "is_folder"),
    [
        ("tune", "tuning.json", True),
        ("tune", "tuning.json", False),
        ("evaluate", "summary.json", True),
        ("evaluate", "prompt_values.npz", False),
    ],
)
def test_results_that_could_not_be_written_are_refused_before_the_work(run, base, tmp_path, command, name, is_folder):
    out = tmp_path / "out"
    out.mkdir()
    if is_folder:
        (out / name).mkdir()
    else:
        (tmp_path / "theirs").write_text("theirs")
        (out / name).hardlink_to(tmp_path / "theirs")
    pool = [base] if command == "tune" else [f"base={base}", "--criterion", "helpful=helpful,helpful/gold"]
    told = refusal(run(command, "--pool", *pool, "--out", out))
    assert str(out / name) in told
    assert ("is a folder" if is_folder else "has 2 names") in told
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == [name]


class TestFromPools:
    def test_is_what_the_maths_says(self, run, base, tmp_path):
        out = tmp_path / "tune"
        told = done(run("tune", "--pool", base, "--method", "bon", "--method", "soft_bon(8)", "--out", out))
        (calibration,) = load_tuning(out / "tuning.json").calibrations
        proxy_PS, gold_PS = scores(len(PROMPTS))
        ids = prompt_ids([{"prompt": prompt} for prompt in PROMPTS])
        order = np.argsort(ids)
        assert list(calibration.methods) == ["bon(tuned)", "soft_bon(8, tuned)"]
        for name, family, draws in (("bon(tuned)", "bon", None), ("soft_bon(8, tuned)", "soft_bon", 8)):
            assert calibration.methods[name].result == tune(proxy_PS[order], gold_PS[order], family, num_draws=draws)
        best = calibration.methods["bon(tuned)"].result
        assert best.regime == "hacks"
        assert best.written in told
        assert f"{best.gain:+.3f}" in told
        assert f"guaranteed gold gain: {calibration.safe_samples} (conservative" in told
        assert calibration.safe_searched == NUM_SAMPLES // 4
        low, high = calibration.correlation_ci95
        assert f"corr(proxy, gold) = {calibration.correlation:.2f} ({low:.2f} to {high:.2f}): " in told
        assert low < calibration.correlation < high
        assert sorted(calibration.prompt_ids) == sorted(ids)
        assert (calibration.policy.name, calibration.policy.fingerprint) == ("theirs", None)
        assert (calibration.criterion.name, calibration.num_samples) == ("helpful", NUM_SAMPLES)
        assert calibration.generation_seconds is None

    def test_the_page_s_file_of_scores_alone(self, run, tmp_path):
        """Its two lines, with further prompts and samples; without the header or the text it is refused by name."""
        page = (Path(__file__).parents[3] / "docs/guides/hedge.md").read_text()
        head, line = [part.strip() for part in page.splitlines() if part.startswith('    {"')]
        proxy_PS, gold_PS = scores(len(PROMPTS))
        told = [
            json.loads(line) | {"prompt": prompt, "scores": {"helpful": proxy_PS[p, s], "helpful/gold": gold_PS[p, s]}}
            for p, prompt in enumerate(PROMPTS)
            for s in range(NUM_SAMPLES)
        ]
        assert {row["text"] for row in told} == {""}
        mute = [{key: value for key, value in row.items() if key != "text"} for row in told]
        files = {"whole": [json.loads(head), *told], "headless": told, "mute": [json.loads(head), *mute]}
        for name, rows in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--method", "bon", "--out", tmp_path / "tune"]
        done(run("tune", "--pool", tmp_path / "whole", *options))
        (calibration,) = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
        assert calibration.policy.name == json.loads(head)["policy"]["name"]
        assert all(point.chi2 is not None for point in calibration.methods["bon(tuned)"].result.curve)
        assert "headless:1: no header" in refusal(run("tune", "--pool", tmp_path / "headless", *options))
        assert "'scores' belongs to a sample, and" in refusal(run("tune", "--pool", tmp_path / "mute", *options))

    def test_the_end_of_the_search_is_no_largest_n(self, run, tmp_path):
        proxy_PS, _ = scores(len(PROMPTS))
        path = write(tmp_path / "p.jsonl", {"helpful": proxy_PS, "helpful/gold": proxy_PS})
        for options, end in (([], 8), (["--max-budget", 4], 4)):
            told = done(run("tune", "--pool", path, "--method", "bon", *options, "--out", tmp_path / "tune"))
            assert f"guaranteed gold gain: at least {end} (end of the search) (conservative" in told

    def test_the_order_of_the_lines_does_not_matter(self, run, base, tmp_path):
        header, *lines = base.read_text().splitlines(keepends=True)
        other = tmp_path / "other.jsonl"
        blocks = [lines[i : i + NUM_SAMPLES] for i in range(0, len(lines), NUM_SAMPLES)]
        other.write_text(header + "".join("".join(block) for block in reversed(blocks)))
        found = []
        for path in (base, other):
            done(run("tune", "--pool", path, "--method", "bon", "--out", tmp_path / "tune"))
            (calibration,) = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
            found.append((calibration.methods["bon(tuned)"].result, calibration.prompt_ids))
        assert found[0] == found[1]

    def test_without_names_every_column_with_gold_and_bon_and_bop(self, run, tmp_path):
        proxy_PS, gold_PS = scores(len(PROMPTS))
        columns = {
            "helpful": proxy_PS,
            "helpful/gold": gold_PS,
            "brief": gold_PS,
            "brief/gold": proxy_PS,
            "alone": gold_PS,
        }
        for name in "ab":
            write(tmp_path / f"{name}.jsonl", columns, name=name)
        out = tmp_path / "tune"
        done(run("tune", "--pool", tmp_path / "a.jsonl", "--pool", tmp_path / "b.jsonl", "--out", out))
        found = load_tuning(out / "tuning.json").calibrations
        assert [(c.policy.name, c.criterion.name) for c in found] == [
            ("a", "helpful"), ("a", "brief"), ("b", "helpful"), ("b", "brief")]  # fmt: skip
        assert all(list(c.methods) == ["bon(tuned)", "bop(tuned)"] for c in found)

    def test_other_columns_and_a_report(self, run, tmp_path):
        """Chosen by one draw of a noisy judge, reported by another: its own draw overstates the gain."""
        rng = np.random.default_rng(1)
        proxy_PS = rng.normal(size=(len(PROMPTS), NUM_SAMPLES))
        judge_PS, again_PS = rng.normal(size=(2, len(PROMPTS), NUM_SAMPLES))
        path = write(tmp_path / "p.jsonl", {"rm": proxy_PS, "judge": judge_PS, "again": again_PS})
        columns = ["--proxy-column", "rm", "--gold-column", "judge", "--report-column", "again"]
        told = done(run("tune", "--pool", path, *columns, "--method", "bon", "--out", tmp_path / "tune"))
        assert "gain by report" in told
        (calibration,) = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
        method = calibration.methods["bon(tuned)"]
        assert calibration.criterion.name == "rm"
        assert calibration.criterion.report is not None
        assert method.report is not None
        assert method.report.single == pytest.approx(again_PS.mean())
        n = int(method.result.value)
        order = np.argsort(proxy_PS, axis=1)
        weights = [np.prod([(i - k) / (NUM_SAMPLES - k) for k in range(n)]) for i in range(NUM_SAMPLES + 1)]
        expected = np.take_along_axis(again_PS, order, axis=1).mean(axis=0) @ np.diff(weights)
        assert method.report.gold == pytest.approx(expected)

    @pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
    def test_missing_scores_are_left_out_and_counted(self, run, tmp_path):
        """A prompt without gold goes; one that lacks two of its samples' gold keeps the others."""
        proxy_PS, gold_PS = scores(len(PROMPTS))
        gold_PS[3] = np.nan
        gold_PS[5, :2] = np.nan
        path = write(tmp_path / "p.jsonl", {"helpful": proxy_PS, "helpful/gold": gold_PS})
        code, told, err = run("tune", "--pool", path, "--method", "bon", "--out", tmp_path / "tune")
        assert code == 0, err
        assert "1 of 8 prompts have scores for less than half of their samples and are left out" in err
        shorter = "has all scores for 30 of 32 samples only, so that at most 7 draws are tried instead of 8"
        assert f"the prompt {PROMPTS[5]!r} {shorter}" in err
        assert "7 prompts (1 left out) x 32 samples, 2 of them without all scores" in told
        (calibration,) = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
        ids = np.asarray(prompt_ids([{"prompt": prompt} for prompt in PROMPTS]))
        order = [i for i in np.argsort(ids) if i != 3]
        proxy_PS[np.isnan(gold_PS)] = np.nan
        assert calibration.methods["bon(tuned)"].result == tune(proxy_PS[order], gold_PS[order], "bon")
        assert calibration.prompt_ids == [ids[i] for i in order]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--method", "soft_bon(9)"], "soft_bon(9) draws more than 8, a quarter of the 32 scored samples of a"),
            (["--method", "itp(33)"], "itp(33) draws more than 8, a quarter of the 32 scored samples of a prompt"),
            (["--method", "itp(17)", "--max-budget", "16"], "itp(17) draws more than --max-budget 16; write fewer"),
            (["--max-budget", "33"], "--max-budget 33 is more than the 32 scored samples of a prompt"),
            (["--method", "cards"], "method 'cards' cannot be tuned; write bon, bop, bop_zt, soft_bon(16) or itp(16)"),
            (["--method", "bno"], "method 'bno' cannot be tuned; did you mean 'bon'? write bon,"),
            (["--method", "soft_bon"], "method 'soft_bon' cannot be tuned; write"),
            (["--method", "bon(4)"], "method 'bon(4)' cannot be tuned; write"),
            (["--criterion", "helpfull"], "criterion 'helpfull' has no proxy scores: there is no column 'helpfull'"),
            (["--criterion", "only"], "'only' has no gold scores: there is no column 'only/gold', only helpful"),
            (["--gold-column", "judge"], "has no gold scores: there is no column 'judge', only"),
            (["--report-column", "judge"], "has no report scores: there is no column 'judge', only"),
            (["--gold-column", "helpful"], "criterion 'helpful' uses a column twice (helpful, helpful)"),
            (["--report-column", "helpful/gold"], "uses a column twice (helpful, helpful/gold, helpful/gold)"),
            (["--criterion", "a", "--criterion", "b", "--proxy-column", "c"], "'c' is given for 2 criteria"),
            (["--criterion", "flat"], "criterion 'flat': the proxy score is the same for all samples of every prompt"),
            (["--set", "seed=1"], "--set 'seed=1' belongs to --config"),
            (["--config", "c.yaml"], "give --pool FILE for scored completions, or --config FILE"),
        ],
    )  # fmt: skip
    def test_mistakes(self, run, tmp_path, options, told):
        proxy_PS, gold_PS = scores(len(PROMPTS))
        flat_PS = np.ones_like(proxy_PS)
        columns = {"helpful": proxy_PS, "helpful/gold": gold_PS, "only": gold_PS, "flat": flat_PS, "flat/gold": gold_PS}
        path = write(tmp_path / "p.jsonl", columns)
        own = [] if "--criterion" in options else ["--criterion", "helpful"]
        line = refusal(run("tune", "--pool", path, *own, *options, "--out", tmp_path / "tune"))
        assert told in line
        assert not (tmp_path / "tune").exists()

    def test_more_than_a_quarter_is_asked_for(self, run, base, tmp_path):
        out = tmp_path / "tune"
        done(run("tune", "--pool", base, "--method", "itp(16)", "--max-budget", 16, "--out", out))
        (calibration,) = load_tuning(out / "tuning.json").calibrations
        assert list(calibration.methods) == ["itp(16, tuned)"]

    def test_files_that_cannot_be_tuned_on(self, run, tmp_path):
        proxy_PS, gold_PS = scores(len(PROMPTS))
        both = {"helpful": proxy_PS, "helpful/gold": gold_PS}
        few = {name: values[:, :6] for name, values in both.items()}
        none = both | {"helpful/gold": np.full_like(gold_PS, np.nan)}
        uneven = write(tmp_path / "uneven.jsonl", both)
        uneven.write_text("".join(uneven.read_text().splitlines(keepends=True)[:-1]))
        text = write(tmp_path / "nan.jsonl", both).read_text()
        (tmp_path / "nan.jsonl").write_text(text.replace('"helpful": ', '"helpful": NaN, "x": ', 1))
        cases = [
            (write(tmp_path / "nothing.jsonl", {"helpful": proxy_PS}), "no criterion has gold scores, without which"),
            (write(tmp_path / "few.jsonl", few), "a prompt has 6 samples with all scores; at least 8 are needed"),
            (write(tmp_path / "none.jsonl", none), "0 of 8 prompts have scores for half of their samples or more"),
            (write(tmp_path / "one.jsonl", both, PROMPTS[:1]), "1 of 1 prompts have scores for half"),
            (uneven, "has 31 samples, prompt"),
            (tmp_path / "nan.jsonl", "NaN is not JSON, write null for a missing number"),
            (tmp_path / "gone.jsonl", "gone.jsonl' does not exist"),
        ]
        for path, told in cases:
            assert told in refusal(run("tune", "--pool", path, "--out", tmp_path / "tune"))
        line = refusal(run("tune", "--out", tmp_path / "tune"))
        assert "give --pool FILE for scored completions" in line
        good = pair(tmp_path / "good.jsonl")
        assert "given twice" in refusal(run("tune", "--pool", good, "--pool", good, "--out", tmp_path / "tune"))


@pytest.mark.filterwarnings("default:.*taken on trust:iama.errors.IamaWarning")
class TestEvaluatedFromPools:
    """The policy of a foreign pool is known by its name, its proxy by its column."""

    @pytest.fixture
    def tuning(self, run, base, tmp_path) -> Path:
        done(run("tune", "--pool", base, "--method", "bon", "--method", "bop", "--out", tmp_path / "tune"))
        return tmp_path / "tune" / "tuning.json"

    def evaluate(self, run, path: Path, out: Path, tuning: Path, methods="[bon(tuned), bop(tuned)]", *more):
        options = ["--set", f"methods={methods}", "--set", f"tuning={tuning}", "--set", "num_bootstrap=100"]
        return run("evaluate", "--pool", f"theirs={path}", "--out", out, *options, *more)

    def test_the_number_is_the_file_s(self, run, tuning, tmp_path):
        path = pair(tmp_path / "test.jsonl", OTHER_PROMPTS, seed=3)
        code, told, err = self.evaluate(run, path, tmp_path / "out", tuning)
        assert code == 0, err
        assert "since it has no fingerprint; column 'helpful' holds scores of the same reward" in err
        found = {name: m.result.written for name, m in load_tuning(tuning).calibrations[0].methods.items()}
        keyed = self.evaluate(
            run, path, tmp_path / "keyed", tuning, "['bon(n=tuned)', 'bop(tuned, cap=9)']", "--dry-run"
        )
        lines = done(keyed)
        assert f"theirs, helpful: bon(n=tuned) is {found['bon(tuned)']}" in lines
        assert f"theirs, helpful: bop(tuned, cap=9) is {found['bop(tuned)'][:-1]}, cap=9)" in lines
        fixed = f"[{', '.join(found.values())}]"
        done(self.evaluate(run, path, tmp_path / "fixed", tuning, fixed))
        rows, expected = (
            {row["method"]: row for row in json.loads((tmp_path / name / "summary.json").read_text())["curves"]}
            for name in ("out", "fixed")
        )
        assert set(rows) == {"bon(tuned)", "bop(tuned)"}
        for name, written in found.items():
            assert rows[name].pop("written") == written
            assert f"theirs, helpful: {name} is {written}" in told
            assert rows[name] | {"method": written} == expected[written]
        assert (tmp_path / "out" / "report.html").stat().st_size > 10_000

    def test_every_family_is_served_as_it_was_tuned(self, run, base, tmp_path):
        """On the same scores an evaluation finds the gold that tuning promised."""
        methods = ["bon", "bop", "bop_zt", "soft_bon(8)", "itp(8)"]
        options = [part for method in methods for part in ("--method", method)]
        done(run("tune", "--pool", base, *options, "--out", tmp_path / "tune"))
        tuning = tmp_path / "tune" / "tuning.json"
        found = load_tuning(tuning).calibrations[0].methods
        path = pair(tmp_path / "test.jsonl", OTHER_PROMPTS)
        done(self.evaluate(run, path, tmp_path / "out", tuning, json.dumps(list(found))))
        rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["curves"]}
        assert set(rows) == set(found)
        for name, method in found.items():
            assert rows[name]["gold"] == pytest.approx(method.result.gold, abs=1e-5), name
            assert rows[name]["proxy"] == pytest.approx(method.result.proxy, abs=1e-5), name
            assert rows[name]["reward_calls"] == pytest.approx(method.draws, rel=1e-4), name

    def test_disagreement_that_a_pool_holds_is_told_at_the_answer(self, run, tuning, tmp_path):
        """Of an ensemble that `iama score` has scored: the best of n by its column, by brute force."""
        proxy_PS, gold_PS = scores(len(PROMPTS), seed=3)
        spread_PS = np.random.default_rng(4).random(proxy_PS.shape)
        columns = {"helpful": proxy_PS, "helpful/gold": gold_PS, "helpful/disagreement": spread_PS}
        path = write(tmp_path / "test.jsonl", columns, OTHER_PROMPTS)
        done(self.evaluate(run, path, tmp_path / "out", tuning, "['bon(2)']"))
        (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["curves"]
        order = np.argsort(proxy_PS, axis=1)
        weights = np.diff([k * (k - 1) for k in range(NUM_SAMPLES + 1)]) / (NUM_SAMPLES * (NUM_SAMPLES - 1))
        expected = np.take_along_axis(spread_PS, order, axis=1).mean(axis=0) @ weights
        assert row["disagreement"] == pytest.approx(expected, abs=1e-6)

    def test_each_policy_has_its_own(self, run, tmp_path):
        """Gold that never falls, and gold that does."""
        proxy_PS, gold_PS = scores(len(PROMPTS))
        columns = {"hacked": {"helpful": proxy_PS, "helpful/gold": gold_PS},
                   "sound": {"helpful": proxy_PS, "helpful/gold": proxy_PS + 1}}  # fmt: skip
        files = []
        for name, values in columns.items():
            files += ["--pool", write(tmp_path / f"{name}.jsonl", values, name=name)]
        done(run("tune", *files, "--method", "bon", "--out", tmp_path / "tune"))
        tests = []
        for name, values in columns.items():
            path = write(tmp_path / f"{name}-test.jsonl", values, OTHER_PROMPTS, name=name)
            tests += ["--pool", f"{name}={path}"]
        settings = ["methods=[bon(tuned)]", f"tuning={tmp_path / 'tune' / 'tuning.json'}", "num_bootstrap=100"]
        done(run("evaluate", *tests, "--out", tmp_path / "out", *(p for s in settings for p in ("--set", s))))
        rows = json.loads((tmp_path / "out" / "summary.json").read_text())["curves"]
        written = {row["policy"]: row["written"] for row in rows}
        assert written["sound"] == f"bon({NUM_SAMPLES // 4})"
        assert written["hacked"] != written["sound"]

    @pytest.mark.parametrize(
        ("methods", "told"),
        [
            ("[bop_zt(tuned)]", "bop_zt(tuned) was not tuned for 'theirs' and 'helpful', only bon(tuned), bop(tuned)"),
            ("['soft_bon(16, tuned)']", "soft_bon(16, tuned) was not tuned for"),
            ("['bon(4, tuned)']", "method 'bon(4, tuned)': no file of `iama tune` has such a number"),
            ("[soft_bon(tuned)]", "no file of `iama tune` has such a number; write bon(tuned), bop(tuned)"),
            ("[cards(tuned)]", "method 'cards(tuned)': no file of `iama tune` has such a number"),
        ],
    )
    def test_methods_that_were_not_tuned(self, run, tuning, tmp_path, methods, told):
        path = pair(tmp_path / "test.jsonl", OTHER_PROMPTS)
        line = refusal(self.evaluate(run, path, tmp_path / "out", tuning, methods))
        assert told in line
        assert not (tmp_path / "out").exists()

    def test_prompts_that_were_calibrated_on(self, run, tuning, tmp_path):
        path = pair(tmp_path / "test.jsonl", [*OTHER_PROMPTS[:5], *PROMPTS[:3]])
        line = refusal(self.evaluate(run, path, tmp_path / "out", tuning))
        assert "3 of the evaluation's 8 prompts are among the 8 that 'theirs' was calibrated on" in line

    def test_files_of_something_else(self, run, tuning, tmp_path):
        proxy_PS, gold_PS = scores(len(PROMPTS))
        both = {"helpful": proxy_PS, "helpful/gold": gold_PS}
        other = {"brief": proxy_PS, "brief/gold": gold_PS}
        a = write(tmp_path / "a.jsonl", both, OTHER_PROMPTS, name="ours")
        b = write(tmp_path / "b.jsonl", other, OTHER_PROMPTS)
        c = pair(tmp_path / "c.jsonl", OTHER_PROMPTS, system_prompt="be kind")
        cases = [
            (a, "tuned for 'theirs', and the policy 'ours' is another; run `iama tune` for what is to be served"),
            (b, "tuned for the proxy column 'helpful', and column 'brief' is another"),
            (c, "tuned with the system prompt None, but it is 'be kind'"),
        ]
        for path, told in cases:
            assert told in refusal(self.evaluate(run, path, tmp_path / "out", tuning))

    def test_a_number_too_large_for_the_evaluation_s_pool(self, run, tmp_path):
        proxy_PS, _ = scores(len(PROMPTS))
        sound = {"helpful": proxy_PS, "helpful/gold": proxy_PS * 2}
        done(run("tune", "--pool", write(tmp_path / "p.jsonl", sound), "--method", "bon", "--out", tmp_path / "tune"))
        small = {name: values[:, :16] for name, values in sound.items()}
        path = write(tmp_path / "small.jsonl", small, OTHER_PROMPTS)
        line = refusal(self.evaluate(run, path, tmp_path / "out", tmp_path / "tune" / "tuning.json", "[bon(tuned)]"))
        assert "'bon(8)' keeps one of 8 samples, more than a quarter of the 16 samples" in line

    def test_tuning_files_that_cannot_be_read(self, run, tuning, tmp_path):
        path = pair(tmp_path / "test.jsonl", OTHER_PROMPTS)
        raw = json.loads(tuning.read_text())
        cases = [
            (tmp_path / "gone.json", None, "gone.json' does not exist; `iama tune --out FOLDER` writes tuning.json"),
            # What the parser expected depends on where the cut falls, and so on the length of the paths in the file.
            (tmp_path / "torn.json", tuning.read_text()[:-40], "); it is damaged; run `iama tune` again"),
            (tmp_path / "other.json", '{"format": 1}', "other.json is no tuning file; give the tuning.json"),
            (tmp_path / "old.json", json.dumps(raw | {"format": 2}), "has format 2, and 1 is known here"),
            (tmp_path / "more.json", json.dumps(raw | {"more": 1}), "unknown key 'more'"),
        ]
        for file, text, told in cases:
            if text is not None:
                file.write_text(text)
            assert told in refusal(self.evaluate(run, path, tmp_path / "out", file))

    def test_no_tuning_file(self, run, tmp_path):
        path = pair(tmp_path / "test.jsonl", OTHER_PROMPTS)
        result = run("evaluate", "--pool", f"theirs={path}", "--out", tmp_path / "out", "--set", "methods=[bon(tuned)]")
        assert "'bon(tuned)' takes its number from a file of `iama tune`; name it with tuning:" in refusal(result)
        (tmp_path / "config.yaml").write_text("{}")
        raw = {"name": "c", "proxy": {"function": "a:b"}, "operator": "bon(tuned)"}
        objective = {"criteria": [raw]}
        training = {
            "name": "t",
            "output_dir": "o",
            "policy": {"path": "p"},
            "prompts": "p.jsonl",
            "objective": objective,
        }
        with pytest.raises(ConfigError, match=r"'bon\(tuned\)': training needs a number; write the one that") as raised:
            validate(training, TrainingConfig, "train.yaml")
        assert "\n" not in str(raised.value)
