"""The study of guided samplers: fresh prompts, settings by proxy, units that are kept, and the page from them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import typer

from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError
from scripts import demo_world
from scripts.experiments import frame, guided_page, guided_parts, guided_study
from scripts.experiments.guided_parts import FORMS, Demo, Part, Story, method_text
from scripts.experiments.pools import prompts

CHOSEN = {
    "GGRO": {"min_p": 0.1},
    "distinct": {"min_p": 0.1},
    "tilted": {"tau": 0.25, "min_p": 0.1},
    "CARDS_length": {"entropy": 2.0, "share": 0.3},
    "CARDS_target": {"entropy": 2.0, "share": 1.0},
}


# Prompts and models. ------------------------------------------------------------------------------------


def test_fresh_prompts_are_in_no_split_of_the_world_and_in_one_of_the_study(small_world):
    used = [text for _, text in demo_world.all_prompts()][::2]
    lines = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in used]
    (small_world / "prompts-train.jsonl").write_text("\n".join(lines))
    guided_parts.fresh_prompts.cache_clear()
    parts = [Demo().rows("validation", 0), *(Demo().rows("test", seed) for seed in range(3))]
    guided_parts.fresh_prompts.cache_clear()
    assert [len(rows) for rows in parts] == [32, 32, 32, 32]
    texts = [row["prompt"][0]["content"] for rows in parts for row in rows]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & set(used)
    assert all(demo_world.topic_of(row["prompt"][0]["content"]).risky == row["risky"] for row in parts[0])


def test_stories_begin_with_two_sentences_and_too_few_are_refused(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(f"Once there was a cat {i}. It sat. It ran." for i in range(44)))
    parts = [[row["prompt"] for row in Story(tmp_path, path).rows(split, seed)] for split, seed in (
        ("validation", 0), ("test", 0), ("test", 1), ("test", 2),
    )]  # fmt: skip
    assert [len(rows) for rows in parts] == [8, 12, 12, 12]
    assert len({text for rows in parts for text in rows}) == 44
    assert parts[0][0].endswith(". It sat.")
    other = tmp_path / "other.txt"
    other.write_text("Once there was a cat. It sat.\n\nA dog ran. It sat.")
    with pytest.raises(ConfigError, match=r"other.txt: 1 paragraphs begin with Once .* at least 44"):
        Story(tmp_path, other).rows("test", 0)


def test_models_of_a_folder_are_told_apart_by_what_they_are(tmp_path):
    for name, architecture, kind in (("p", "GPTNeoForCausalLM", "gpt_neo"), ("a", "BertForX", "bert")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": kind}))
    with pytest.raises(ConfigError, match="1 language models, 1 classifiers, 0 of them"):
        guided_parts.found_models(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"architectures": ["GPTNeoForX"], "model_type": "gpt_neo"}')
    found = guided_parts.found_models(tmp_path)
    assert {role: path.name for role, path in found.items()} == {"policy": "p", "proxy": "b", "gold": "a"}


def test_targets_and_temperatures_are_those_of_the_rewards():
    rewards = np.arange(100.0)
    text = method_text("CARDS, length", CHOSEN, rewards)
    assert text == (
        f"cards(target=90, finish=length, entropy_threshold=2.0, acceptance_temperature={0.3 * rewards.std():.4g})"
    )
    assert method_text("GGRO 2", CHOSEN, rewards) == "ggro(num_candidates=2, nudge_min_p=0.1)"


# On tiny models. ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_part(small_world):
    """Two policies' worth of a part on tiny models; each criterion's gold is the other one's model."""

    class Tiny(Part):
        name, policies, tried_on, criteria = "demo", ("base",), ("base",), frame.CRITERIA
        kinds = ("tilted",)
        sampling, num_samples, num_compared = Sampling(max_new_tokens=8), 8, 6

        def rows(self, split, seed):
            return prompts(0, split)

        def spec(self, policy, seed):
            return PolicySpec(path=str(small_world / "policy"))

        def criterion(self, name):
            other = next(c for c in frame.CRITERIA if c != name)
            proxy, gold = (RewardSpec(model=str(small_world / f"rm-{c}")) for c in (name, other))
            return EvaluationCriterion(name=name, proxy=proxy, gold=gold)

        def methods(self, policy):
            return {"BoN 4": 1, "blockwise tilted 2": 2}

    return Tiny()


@pytest.mark.slow
def test_settings_are_chosen_without_gold_and_what_is_measured_is_kept(tiny_part, tmp_path, monkeypatch):
    tried = {"tilted": ("blockwise tilted 2", [{"tau": 0.25, "min_p": p} for p in (0.0, 0.9)])}
    monkeypatch.setattr(guided_study, "CANDIDATES", tried)
    asked = []
    judged = guided_study.guided.judged
    monkeypatch.setattr(guided_study.guided, "judged", lambda *a: asked.append(a) or judged(*a))
    with pytest.raises(typer.Exit):
        guided_study.run(tiny_part, [0], guided_study.Clock(9), tmp_path)
    assert not asked
    kept = json.loads((tmp_path / "guided-settings.json").read_text())["demo"]
    assert kept["chosen"]["tilted"]["min_p"] == max(kept["tried"], key=lambda row: row["gain"])["min_p"]
    with pytest.raises(guided_study.TimeUpError):
        guided_study.run(tiny_part, [0], guided_study.Clock(0), tmp_path)
    guided_study.run(tiny_part, [0], guided_study.Clock(9), tmp_path)
    units = guided_study.read_units(tmp_path)
    assert [unit["key"] for unit in units] == [["demo", 0, "base", name] for name in sorted(frame.CRITERIA)]
    monkeypatch.setattr(guided_study, "measure", lambda *_: pytest.fail("what is kept is not measured again"))
    guided_study.run(tiny_part, [0], guided_study.Clock(9), tmp_path)

    cell = guided_page.cell_of(units[0])
    case = guided_study.cases_of(tiny_part, "base", "test", 0)[units[0]["key"][3]]
    scores = case.task.scored(case.criterion)
    whole = guided_study.guided.bon_curves(case, case.task.sampled(), {"gold": scores.gold, "proxy": scores.proxy_PS})
    assert cell.bon["flops"] == pytest.approx(whole["flops"][:, :6] / 1e6, rel=1e-2)
    assert cell.bon["gold"] == pytest.approx(whole["gold"][:, :6], rel=1e-2, abs=1e-3)
    assert cell.gold_PS == pytest.approx(scores.gold[:, 2:], rel=1e-2)
    assert cell.served["blockwise tilted 2"].gold_RM.shape == (4, 2)
    line = guided_study.guided.answers(case, units[0]["methods"]["blockwise tilted 2"]["text"], num_answers=2)
    gold = judged(case, line, case.criterion.gold).reshape(2, 4).T
    assert cell.served["blockwise tilted 2"].gold_RM == pytest.approx(gold, rel=1e-2, abs=1e-3)


# The page. ----------------------------------------------------------------------------------------------


def unit_of(part, seed, policy, criterion, num_prompts=6):
    """A unit of made-up numbers: Best-of-n's gold is log n, costs 10 n; every method costs 40 and has gold 5."""
    points = [1, 2, 4, 8]
    gold = [[float(np.log(n)) for n in points]] * num_prompts
    unit = {"key": [part.name, seed, policy, criterion], "points": points, "gold": gold, "proxy": gold}
    unit |= {"steps": [[20.0, 22, 24, 26]] * num_prompts, "mflops": [[10.0] * num_prompts, [80.0] * num_prompts]}
    wrong = {"wrong": [[0.1] * 4] * num_prompts} if part is Demo else {}
    if part is Story:
        rng = np.random.default_rng(seed)
        unit["rest_gold"], unit["rest_proxy"] = rng.normal(size=(2, num_prompts, 8)).tolist()
        unit["seen_gold"] = np.sort(rng.normal(size=(num_prompts, 40)))[:, ::-1].tolist()
    methods = {}
    for name in FORMS:
        answers = 2 if part is Story and "4" in name else 1
        number = answers * num_prompts
        methods[name] = {"text": name, "num_answers": answers, "gold": [5.0] * number, "proxy": [5.0] * number}
        methods[name] |= {"mflops": [40.0] * number, "steps": [50] * number, "core_seconds": 0.01}
        methods[name] |= {"wrong": [0] * number} if part is Demo else {"fluency": [-2.0] * number}
    return unit | wrong | {"methods": methods}


def test_differences_are_at_equal_operations():
    found = guided_page.Measured([guided_page.cell_of(unit_of(Demo, s, "base", "helpful")) for s in (0, 1)], [])
    gap = found.at_equal_cost("GGRO 2")
    assert (gap.reference_samples, gap.difference) == (pytest.approx(4), pytest.approx(5 - np.log(4)))
    assert found.beside_bon("GGRO 2", "steps") == pytest.approx((50, 24))
    assert found.beside_bon("GGRO 2", "wrong") == pytest.approx((0, 0.1))
    cell = found.cells[0]
    for metric, value in (("gold", (1.0, 3.0)), ("flops", (10.0, 50.0))):
        for name, number in zip(("blockwise policy 2", "blockwise policy 4"), value, strict=True):
            cell.served[name].values[metric][:] = number
    gap = guided_page.between([cell], "GGRO 2", ["blockwise policy 2", "blockwise policy 4"])
    assert gap.ci95[0] <= gap.mean <= gap.ci95[1]
    assert 5 - 3 < gap.mean < 5 - 1


def measured(part, policy, criterion, changes):
    """A place of two seeds, with these golds or shares of ungrammatical answers."""
    units = [unit_of(part, seed, policy, criterion) for seed in (0, 1)]
    for unit in units:
        for (name, metric), values in changes.items():
            unit["methods"][name][metric] = values
    return {(policy, criterion): guided_page.Measured([guided_page.cell_of(unit) for unit in units], units)}


def test_the_gradient_is_said_to_help_only_where_that_is_shown():
    assert guided_page.gradient_text({}) == ""
    text = guided_page.gradient_text(measured(Story, "base", "positive", {}))
    assert text.startswith("On real text no gain of the gradient ")
    assert text.endswith(" Choosing segment by segment carries the gain there.")
    without = measured(Story, "base", "positive", {("random nudges 8", "gold"): [-9.0, 9.0] * 3})
    assert "carries" not in guided_page.gradient_text(without)
    higher = measured(Story, "base", "positive", {("GGRO 8", "gold"): [9.0] * 6})
    assert guided_page.gradient_text(higher).endswith("is shown to add gold in 1 of 3 comparisons.")


def test_ungrammatical_answers_are_judged_by_the_ends_of_their_intervals():
    fine = measured(Demo, "base", "helpful", {})
    some = measured(Demo, "iama", "helpful", {("blockwise tilted 2", "wrong"): [0, 1, 0, 0, 0, 0]})
    assert guided_page.grammar(fine).met
    claim = guided_page.grammar(fine | some)
    assert not claim.met
    assert claim.measured.startswith("worst in points: +6.7 (-10.0 to ")
    assert "), IAMA helpful, m = 2; -10.0 (-10.0 to -10.0), base helpful, m = 2: within 3 in 3 of 4" in (claim.measured)
    text = guided_page.grammar_text(fine | some)
    assert text.startswith("intervals are 0 to ")
    assert "shown in 3 of 4 cases, and more than 3 in 0" in text


def test_a_share_of_rare_gold_has_its_interval():
    header = "criterion | gold | num_prompts | method | answers | reached | minus_bon | low | high | plain_samples"
    rows = [["positive", "4", "9", "GGRO 2", "1", "0.1", "0.1", "0", "0.4", "0"]]
    text = guided_page.covered_text(frame.table(header, rows))
    assert text.startswith("Of 1 differences to Best-of-n ")
    assert text.endswith(
        "none is shown. The greatest is +0.10 (+0.00 to +0.40): GGRO greedy, S = 2 with 1 answer, positive."
    )
    rows.append(["negative", "4", "9", "GGRO 4", "1", "0.3", "0.3", "0.2", "0.4", "0"])
    assert "1 are above 0 and 0 below" in guided_page.covered_text(frame.table(header, rows))
    few = [[*rows[0][:7], "", "", "0"]]
    assert guided_page.covered_text(frame.table(header, few)) == "These are too few for an interval."
    assert guided_page.covered_text(frame.table(header, [])) == ""


@pytest.mark.slow
def test_the_published_page_is_that_of_what_is_kept(tmp_path):
    published = frame.launch.ROOT / frame.PAGES
    (tmp_path / "data").mkdir()
    for name in (guided_page.UNITS, guided_page.SETTINGS):
        (tmp_path / "data" / name).write_bytes((published / "data" / name).read_bytes())
    guided_page.write(tmp_path)
    for path in (tmp_path / "guided.md", *(tmp_path / "data").glob("guided-*.csv")):
        assert path.read_text() == (published / path.relative_to(tmp_path)).read_text(), f"{path.name} is out of date"


@pytest.mark.slow
def test_the_page_is_written_from_what_is_kept(tmp_path):
    data = tmp_path / "data"
    guided_page.write(tmp_path)
    assert not (tmp_path / "guided.md").is_file()
    for part, policies in ((Demo, Demo.policies), (Story, Story.policies)):
        for seed in range(2):
            for policy in policies:
                for criterion in part.criteria:
                    guided_study.append_unit(data, unit_of(part, seed, policy, criterion))
        guided_study.write_settings(data, part.name, CHOSEN, [])
        guided_page.write(tmp_path)
        parts = list(csv.DictReader((data / "guided-parts.csv").open()))
        assert len(parts) == 14
        assert sum(row["measured"] == "not yet measured" for row in parts) == (7 if part is Demo else 0)
        assert sum(row["what was set"] == guided_page.AFTERWARDS for row in parts) == 3
        assert ("*Rare gold*" in (tmp_path / "guided.md").read_text()) == (part is Story)
    page = (tmp_path / "guided.md").read_text()
    assert "nan" not in page
    assert "**Answer.** In part: 8 of 14 parts hold; 3 of the parts were looked at afterwards. On real text no " in page
    assert page.count("*Does not hold (looked at afterwards):* real text: ") == 3
    assert "(real text:\n  160, n at most 60)" in page
    rows = list(csv.DictReader((data / "guided-differences.csv").open()))
    assert len(rows) == (4 * 2 + 2) * (len(FORMS) - 2)
    assert {row["minus_bon"] for row in rows} == {f"{5 - np.log(4):.4g}"}
    assert "<svg" in (tmp_path / "guided.svg").read_text()
    assert len((data / "guided-twins.csv").read_text().splitlines()) == 1 + 4
    assert list(csv.DictReader((data / "guided-coverage.csv").open()))
