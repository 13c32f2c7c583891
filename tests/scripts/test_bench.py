from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from iama.cost import Cost
from iama.errors import DataError
from inference.engine.responses import Response
from inference.samplers.base import Completion, Segment
from inference.samplers.cards import CardsSettings
from scripts import launch
from scripts.bench import cards, entries, page, plain_sampling, record, sections, setting
from scripts.bench.__main__ import app
from scripts.bench.cluster import ClusterFigures
from scripts.bench.counting import num_suffix, policy_necessary, reward_necessary, watched
from scripts.bench.parts import Part
from scripts.experiments.frame import PAGES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*none of which was accepted"),
    pytest.mark.filterwarnings("ignore:.*of the completions reach sampling.max_new_tokens"),
]
WORDS = ["please", "bake", "bread", "grow", "red", "fix", "bike", "then", "mix", "water", "be", "careful"]
SETTING = dataclasses.replace(setting.QUICK, new_tokens=32)


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """The tiny models as a demo world."""
    folder = tmp_path_factory.mktemp("world")
    for name, source in (("policy", tiny.policy), ("rm-helpful", tiny.reward), ("rm-harmless", tiny.other_reward)):
        shutil.copytree(source, folder / name)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        texts = ["how do i climb a roof? " + " ".join(rng.choice(WORDS, 4)) for _ in range(12)]
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
        (folder / f"prompts-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def bench(world):
    """Models in float64."""
    found = setting.prepare(world, SETTING, "cpu")
    found.policy.model.double()
    found.classifier.model.double()
    return found


@pytest.mark.slow
def test_the_bench_in_miniature(world, tmp_path):
    published = [launch.ROOT / PAGES / name for name in ("performance.md", "data/performance.json")]
    before = [path.read_bytes() for path in published]
    done = CliRunner().invoke(app, ["--quick", "--world", str(world), "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "entropy threshold" in done.output
    sections = record.read(tmp_path)
    assert set(sections) == set(Part)
    ratios = {ratio.name: ratio for section in sections.values() for ratio in section.ratios}
    assert set(ratios) == set(entries.BARS)
    for name, ratio in ratios.items():
        assert 0 < ratio.low <= ratio.ratio <= ratio.high
        at_most = name.endswith(
            ("_necessary", "_overhead", "sea_step", "nonlinear_step", "nonlinear_memory", "cluster_workers")
        )
        good = ratio.ratio <= ratio.bar.target if at_most else ratio.ratio >= ratio.bar.target
        assert ratio.holds is good
        assert (ratio.low == ratio.high) or "necessary" not in name
    counts = json.loads((tmp_path / "cards.json").read_text())["figures"]["counts"]
    assert all(isinstance(value, int) for value in counts.values())
    assert (counts["policy"], counts["reward"]) == (counts["policy_ledger"], counts["reward_ledger"])
    assert ratios["cards_policy_tokens"].ratio == counts["policy_whole"] / counts["policy"]
    assert ratios["cards_necessary"].ratio == counts["policy"] / counts["policy_necessary"]
    latency = page.merged(sections.values())["latency"]
    assert {(row[0], int(row[1])) for row in latency.rows} == {
        (what, batch) for what in ("single sample", "CARDS") for batch in (1, setting.QUICK.num_prompts)
    }
    assert all(0 < float(row[2]) <= float(row[3]) for row in latency.rows)
    for name in ("performance", "performance-internals"):
        text = (tmp_path / f"{name}.md").read_text()
        assert "mean nothing" in text
        assert "Not measured yet" not in text
    assert [path.read_bytes() for path in published] == before


SETTINGS = {
    "soft": CardsSettings(target=0.8, entropy_threshold=4.0, min_segment=2, max_segment=9, max_proposals=5),
    "hopeless": CardsSettings(target=99.0, entropy_threshold=4.0, max_segment=9, max_proposals=3),
    "one token at a time": CardsSettings(target=0.5, entropy_threshold=0.0, min_segment=1, max_proposals=4),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.slow
def test_the_references_answer_what_cards_answers(bench, case):
    settings = SETTINGS[case]
    completions = setting.cards(bench, settings).sample(bench.prompts, seed=2)
    trace = [segment for completion in completions for segment in completion.trace]
    assert sum(segment.wasted_tokens for segment in trace) > 0
    assert case != "soft" or {segment.forced for segment in trace} == {False, True}
    assert case != "hopeless" or all(segment.forced for segment in trace)
    fed = {}
    for name, cached in cards.READERS.items():
        with watched(bench.policy.model) as policy_fed:
            answers = cards.baseline(bench, settings, 2, cached=cached)
        assert [tuple(answer) for answer in answers] == [completion.token_ids for completion in completions]
        fed[name] = policy_fed.num_tokens
    spent = sum(completion.cost.policy_tokens for completion in completions)
    assert spent < fed["cached"] < fed["whole"]


def test_the_reference_reads_the_whole_text_for_every_token(bench):
    """Where all is accepted at once the count is known: every prefix once, and every segment's text."""
    settings = CardsSettings(target=-50.0, entropy_threshold=99.0, max_segment=8)
    with watched(bench.policy.model) as policy_fed, watched(bench.classifier.model) as reward_fed:
        answers = cards.baseline(bench, settings, 0, cached=False)
    lengths = range(SETTING.prompt_tokens, SETTING.prompt_tokens + SETTING.new_tokens)
    assert policy_fed.num_tokens == SETTING.num_prompts * sum(lengths)
    assert len(reward_fed.inputs) == SETTING.num_prompts * (1 + SETTING.new_tokens // 8)
    with watched(bench.policy.model) as policy_fed:
        assert cards.baseline(bench, settings, 0, cached=True) == answers
    # A segment that was cut by its length is read whole for the logits after it; its last token, not before.
    starts = range(SETTING.prompt_tokens, SETTING.prompt_tokens + SETTING.new_tokens, 8)
    assert policy_fed.num_tokens == SETTING.num_prompts * sum(start + 7 for start in starts)


def test_necessary_tokens_are_counted_from_texts(bench):
    tokenizer, prompt = bench.classifier.tokenizer, bench.prompts[0]
    texts = ["", "bake", "mix water", "mix water then flour", "mix water first", "mix water please tell"]
    rewards = [0.0, 0.1, 0.5, 0.2, 0.9, 0.3]
    trace = (Segment(3, 0.5, 0, 2, forced=False, wasted_tokens=2), Segment(2, 0.9, 0, 3, forced=True, wasted_tokens=4))
    completion = Completion([Response("mix water first", (1, 2, 3, 4, 5), "length", 0.9)], 0, Cost(), trace)
    scored = {prompt[-1]["content"]: list(zip(texts, rewards, strict=True))}

    def num(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    own = [num(text) for text in texts[1:3]] + [num(text) - num("mix water") for text in texts[3:]]
    empty = len(tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": ""}])["input_ids"])
    assert num_suffix(tokenizer, prompt, "mix") == 1  # <|end|>
    assert reward_necessary(tokenizer, [prompt], [completion], scored) == empty + sum(own) + len(own)
    assert policy_necessary(bench.policy.tokenizer, [prompt], [completion]) == SETTING.prompt_tokens + 5 + 6


def test_all_ways_to_sample_give_full_lengths_without_special_tokens(bench):
    number = SETTING.num_prompts * 2 * SETTING.new_tokens
    samplers = (plain_sampling.ours, plain_sampling.generate, plain_sampling.bare_loop)
    assert [sample(bench, 2, 0) for sample in samplers] == [number] * 3
    assert plain_sampling.alone(bench, 3, 1) == 3 * SETTING.new_tokens
    with torch.inference_mode():
        logits_TV = bench.policy.model(input_ids=torch.tensor(bench.prompts_ids[:1])).logits[0]
    special = torch.softmax(logits_TV, dim=-1)[:, bench.policy.tokenizer.all_special_ids]
    assert special.max() == 0


def test_prompts_have_one_length_and_differ(bench):
    assert {len(ids) for ids in bench.prompts_ids} == {SETTING.prompt_tokens}
    assert len({tuple(ids) for ids in bench.prompts_ids}) == SETTING.num_prompts
    with pytest.raises(DataError, match="1 test prompts give 1 of 18 tokens"):
        setting.cut_prompts(bench.policy, [bench.prompts[0][-1]["content"]], SETTING)


def test_thresholds_cut_samples_to_the_wanted_length():
    entropies_ST = np.random.default_rng(0).exponential(size=(50, 200))
    settings = CardsSettings(target=0.0)
    threshold = setting.threshold_for(20.0, entropies_ST, settings)
    number = sum(setting.num_cuts(row, threshold, 4, 64) for row in entropies_ST.tolist())
    assert entropies_ST.size / number == pytest.approx(20.0, rel=0.02)
    assert setting.num_cuts([9.0] * 10, 1.0, 4, 64) == 3
    assert setting.num_cuts([0.0] * 10, 1.0, 1, 5) == 2
    assert setting.num_cuts([0.0, 9.0, 9.0], 1.0, 2, 5) == 2


def test_sides_and_quantiles():
    at_most = entries.Entry("engine_overhead", [1.4, 1.3, 1.1]).found
    at_least = entries.Entry("cards_wall", [4.0]).found
    assert (at_most.ratio, at_most.low, at_most.high, at_most.holds) == (1.3, 1.1, 1.4, True)
    assert at_most.spread == "1.3 (1.1 to 1.4)"
    assert at_most.margins == pytest.approx((1.0, 1.3 / 1.4, 1.3 / 1.1))
    assert (at_least.holds, at_least.spread, at_least.margins) == (False, "4", (0.5, 0.5, 0.5))
    latency = entries.Latency("CARDS", 1, [float(i) for i in range(20, 0, -1)])
    assert latency.row == ["CARDS", "1", "10.000", "19.000", "20"]


def test_a_part_renews_its_section_and_the_others_stay(tmp_path):
    shutil.copytree(launch.ROOT / PAGES / "data", tmp_path / "data")
    before = record.read(tmp_path)
    assert set(Part) < set(before)
    ratio = entries.Entry("bon16_generate", [0.5, 0.25, 1.0]).found
    section = dataclasses.replace(before[Part.SAMPLING], machine="another", ratios=[ratio])
    record.renew(tmp_path, Part.SAMPLING, section)
    assert record.read(tmp_path) == before | {Part.SAMPLING: section}
    page.write(tmp_path)
    assert "| **0.5 (0.25 to 1)** |" in (tmp_path / "performance.md").read_text()
    row = "at least 1,0.5,0.25,1,3,another,no\n"
    assert row in (tmp_path / "data/performance-parts.csv").read_text()


def test_the_published_pages_are_those_of_the_record(tmp_path):
    shutil.copytree(launch.ROOT / PAGES / "data", tmp_path / "data")
    page.write(tmp_path)
    for name in ("performance.md", "performance-internals.md", "data/performance-parts.csv"):
        published = (launch.ROOT / PAGES / name).read_text()
        assert (tmp_path / name).read_text() == published, f"{name} is older than data/performance.json"


def test_a_page_has_what_one_part_measured(tmp_path, bench):
    """The claim on workers is about two of each."""
    sampling, bare = {"1": [6.0, 6.2, 6.1], "2": [3.3, 3.2, 3.6]}, {"1": [5.0, 5.0, 5.0], "2": [3.0, 3.2, 3.0]}
    figures = ClusterFigures({"1": [1.0], "16": [1.04, 1.02, 1.2]}, sampling, bare, num_prompts=256)
    section = sections.cluster(figures, bench)
    assert [(ratio.name, round(ratio.ratio, 3)) for ratio in section.ratios] == [
        ("cluster_overhead", 1.04),
        ("cluster_workers", 1.1),
    ]
    record.renew(tmp_path, Part.CLUSTER, section)
    page.write(tmp_path)
    text = (tmp_path / "performance.md").read_text()
    missing = sum(bar.kind in page.PEOPLE and bar.kind != "cluster" for bar in entries.BARS.values())
    answer = f"Yes: all 2 parts hold; {missing} more are not measured. By subject: workers on Ray 2 of 2.\n"
    assert f"**Answer.** {answer}" in text
    assert "| Best-of-16: seconds of `generate` over ours | at least 1 | not measured |  |" in text
    assert (tmp_path / "data/performance-sleeping.csv").read_text().endswith("\n16,10.0\n")
    assert (tmp_path / "data/performance-workers.csv").read_text().endswith("\n2,3.3,3\n")
    assert not (tmp_path / "performance-internals.md").exists()


def test_help_has_an_example():
    text = CliRunner().invoke(app, ["--help"]).output
    assert "Example: python -m scripts.bench --quick" in " ".join(text.split())
