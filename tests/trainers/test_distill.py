"""A distilled reward: its loss, its pairs, what it learns, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from iama.config.specs import RewardSpec
from iama.errors import DataError, ModelError, RunError
from iama.prompts.render import prompt_text
from iama.rewards.ensemble import within_prompt_spread
from iama.rewards.load import load_reward
from tests.conftest import WORDS
from trainers.distill import (
    DistillSettings,
    MarginTrainer,
    ScoredAnswers,
    compare,
    distill,
    draw_pairs,
    margin_loss,
    scored_answers,
    split,
)

MARGIN = 0.8  # agreement on prompts that were held out, set beforehand; a coin has 0.5
NUM_PROMPTS, NUM_SAMPLES = 24, 8


def teacher(text: str) -> float:
    """More bread and flour, fewer words."""
    return 2.0 * sum(word in ("bread", "flour") for word in text.split()) - 0.1 * len(text.split())


@pytest.fixture(scope="module")
def answers():
    """Prompts `[P]` with texts `[P][S]` of random words, and the teacher's scores."""
    rng = np.random.default_rng(0)
    words = WORDS.split()

    def some(low: int, high: int) -> str:
        return " ".join(rng.choice(words, size=rng.integers(low, high)))

    prompts = [[{"role": "user", "content": some(3, 6)}] for _ in range(NUM_PROMPTS)]
    texts = [[some(2, 9) for _ in range(NUM_SAMPLES)] for _ in prompts]
    return prompts, texts, [[teacher(text) for text in row] for row in texts]


def write_pool(path: Path, answers, name: str = "helpful") -> Path:
    lines = [{"iama_pool": 1, "policy": {"name": "base"}}]
    for prompt, texts, scores in zip(*answers, strict=True):
        lines += [{"prompt": prompt, "text": t, "scores": {name: s}} for t, s in zip(texts, scores, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# The loss and the data. ---------------------------------------------------------------------------------


def test_the_loss_by_hand():
    first, second = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5, 1.0, -2.0])
    margins = torch.tensor([2.0, 0.5, 1.0])
    assert margin_loss(first, second, margins).item() == pytest.approx((1.5**2 + 1.5**2 + 1.0**2) / 3)


def test_the_trainers_loss_is_the_formula_on_the_batch_as_trl_collates_it(tiny, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward)
    rows = [
        {"chosen_ids": [7, 8, 9], "rejected_ids": [10, 11], "margin": 0.5},
        {"chosen_ids": [12], "rejected_ids": [13, 14, 15, 16], "margin": 1.5},
    ]
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    trainer = MarginTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss.item())
    with torch.no_grad():
        reward = lambda ids: model(input_ids=torch.tensor([ids])).logits[0, 0].item()  # noqa: E731
        expected = [(reward(r["chosen_ids"]) - reward(r["rejected_ids"]) - r["margin"]) ** 2 for r in rows]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert outputs.logits.shape == (4, 1)
    loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_scored_answers_leave_out_and_count_what_lacks_a_score():
    texts = [["a", "b", "a", "c"], ["d", "d", "d", "d"], ["e", "f", "g", "h"]]
    scores = [[1.0, 2.0, 3.0, math.nan], [1.0] * 4, [math.nan, math.nan, math.nan, 0.0]]
    groups, num_pairs, num_unscored = scored_answers(["p", "q", "r"], texts, scores)
    assert [(group.prompt, group.texts, group.scores.tolist()) for group in groups] == [("p", ["a", "b"], [2.0, 2.0])]
    assert (num_pairs, num_unscored) == (3 + 0 + 6, 2 + 0 + 6)
    with pytest.raises(DataError, match="no prompt has two different answers with a score"):
        scored_answers(["q"], texts[1:2], scores[1:2])
    assert within_prompt_spread(group.scores for group in groups) == 0


def test_the_spread_is_within_prompts():
    """What prompts differ in by themselves is no margin; missing scores, and prompts with a single one, say nothing."""
    groups = [np.asarray(scores) for scores in ([0.0, 2.0, math.nan], [1000.0, 1000.0, math.nan])]
    lone = np.asarray([5.0, math.nan, math.nan])
    assert within_prompt_spread(groups) == within_prompt_spread([*groups, lone]) == pytest.approx(math.sqrt(0.5))
    assert within_prompt_spread([np.full(3, 0.1), lone]) == 0


@given(st.integers(0, 99))
def test_a_prompt_that_occurs_twice_is_on_one_side(seed):
    """In whichever form: its answers would be learnt from, and judged by."""
    forms = [lambda text: text, lambda text: f"{text} ", lambda text: [{"role": "user", "content": text}]]
    prompts = [form(name) for form in forms for name in "pqrs"]
    groups = [ScoredAnswers(prompt, ["a", "b"], np.asarray([0.0, 1.0])) for prompt in prompts]
    trained, held_out = split(groups, 0.25, seed)
    texts = [{prompt_text(group.prompt).strip() for group in side} for side in (trained, held_out)]
    assert not texts[0] & texts[1]
    assert (len(trained), len(held_out), len(texts[1])) == (9, 3, 1)
    with pytest.raises(DataError, match="1 different prompts with margins are too few"):
        split([group for group in groups if prompt_text(group.prompt).strip() == "p"], 0.25, seed)


@given(st.lists(st.integers(2, 7), min_size=1, max_size=5), st.integers(1, 200), st.integers(0, 99))
def test_pairs_are_of_one_prompt_and_read_all_answers_equally_often(sizes, number, seed):
    pairs = draw_pairs(sizes, number, seed)
    assert len(pairs) == number
    assert pairs == draw_pairs(sizes, number, seed)
    assert all(i != j and max(i, j) < sizes[group] for group, i, j in pairs)
    if all(size % 2 == 0 for size in sizes):
        whole = pairs[: number - number % (sum(sizes) // 2)]
        seen = Counter((group, i) for group, *both in whole for i in both)
        assert len({seen[group, i] for group, size in enumerate(sizes) for i in range(size)}) == 1


def test_agreement_and_r_squared_equal_a_slow_loop():
    rng = np.random.default_rng(1)
    groups = [ScoredAnswers("p", list(map(str, range(5))), rng.integers(0, 3, 5).astype(float)) for _ in range(3)]
    student = [rng.integers(0, 3, 5).astype(float).tolist() for _ in groups]
    agreed, squares, left = [], 0.0, 0.0
    for group, own in zip(groups, student, strict=True):
        for i in range(5):
            for j in range(i):
                wanted, found = (group.scores[i] - group.scores[j]) / 2.0, own[i] - own[j]
                squares, left = squares + wanted**2, left + (found - wanted) ** 2
                if wanted:
                    agreed.append(0.5 if found == 0 else float((found > 0) == (wanted > 0)))
    assert compare(groups, student, 2.0) == pytest.approx((np.mean(agreed), 1 - left / squares))
    assert compare(groups, [(group.scores / 2.0 + 7).tolist() for group in groups], 2.0) == pytest.approx((1.0, 1.0))


# Training. ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_learns_its_teachers_margins(tiny, answers, tmp_path, run):
    pool = write_pool(tmp_path / "pool.jsonl", answers)
    out = tmp_path / "student"
    settings = ("--max-steps", 150, "--learning-rate", 3e-3, "--held-out", 0.25)
    code, told, err = run("distill", pool, "--column", "helpful", "--base", tiny.policy, "--out", out, *settings)
    assert code == 0, err
    result = json.loads((out / "distillation.json").read_text())["result"]
    assert result["last_loss"] < 0.3 * result["first_loss"]
    assert result["agreement"] > MARGIN
    assert result["r_squared"] > 0.3
    assert (result["num_trained"], result["num_held_out"], result["num_unscored"]) == (18, 6, 0)
    assert f"agreement {result['agreement']:.3f}" in told
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"pool.jsonl", "student"}  # nothing unfinished is left
    reward = load_reward("student", RewardSpec(model=str(out)))
    assert reward.classifier.model.config.id2label == {0: "helpful"}
    scores, _ = reward.score([answers[0][0]] * 2, ["bread flour bread", "a bike a bike"], {})
    assert scores[0] > scores[1]


@pytest.mark.slow
def test_a_classifier_may_be_the_base_and_missing_scores_are_left_out(tiny, answers, tmp_path):
    prompts, texts, scores = answers
    holes = [[math.nan, *row[1:]] for row in scores]
    settings = DistillSettings(str(tiny.reward), "helpful", max_steps=3, batch_size=4)
    steps = []
    found = distill(prompts, texts, holes, settings, tmp_path / "student", steps.append)
    assert sum(steps) == 3
    assert found.num_pairs == NUM_PROMPTS * 28
    assert found.num_unscored == NUM_PROMPTS * 7
    assert math.isfinite(found.agreement)


# What is refused. ---------------------------------------------------------------------------------------


def test_bad_input_is_one_line_each(tiny, answers, tmp_path, run):
    pool = write_pool(tmp_path / "pool.jsonl", answers)
    prompts, texts, scores = answers
    lone = write_pool(tmp_path / "lone.jsonl", (prompts, [row[:1] for row in texts], [row[:1] for row in scores]))
    flat = write_pool(tmp_path / "flat.jsonl", (prompts, texts, [[1.0] * NUM_SAMPLES for _ in texts]))
    few = write_pool(tmp_path / "few.jsonl", (prompts[:1], texts[:1], scores[:1]))
    for file, changes, message in [
        (lone, {}, "has one sample a prompt"),
        (pool, {"--column": "gone"}, r"has no score 'gone' (there: helpful)"),
        (flat, {}, "answers of different scores"),
        (few, {}, "are too few"),
        (pool, {"--base": "./gone"}, "--base: model directory './gone' does not exist"),
        (pool, {"--base": tiny.two_headed_reward}, "has 2 outputs, and a reward has one"),
        (pool, {"--out": tiny.policy}, "exists and is not empty"),
        (pool, {"--held-out": 1.5}, "--held-out 1.5 must lie between 0 and 1"),
        (pool, {"--learning-rate": 0}, "--learning-rate 0 must be positive"),
    ]:
        flags = {"--column": "helpful", "--base": tiny.policy, "--out": tmp_path / "out", "--max-steps": 1} | changes
        code, _, err = run("distill", file, *(part for pair in flags.items() for part in pair))
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), err
        assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_of_numpys(run, tmp_path, seed):
    code, _, err = run("distill", tmp_path / "pool.jsonl", "--column", "c", "--base", "b", "--out", "o", "--seed", seed)
    assert code == 2
    assert "'--seed'" in err


def test_a_text_that_the_base_cannot_read_is_refused_and_no_text_is_cut(tiny, tmp_path):
    long = ["bread " * 200, "flour"]
    settings = DistillSettings(str(tiny.policy), "helpful", max_steps=1)
    with pytest.raises(DataError, match=r"reads at most 128"):
        distill(["how", "what"], [long, long], [[1.0, 0.0]] * 2, settings, tmp_path / "out")


def test_half_a_base_is_refused(tiny, tmp_path, answers):
    folder = shutil.copytree(tiny.policy, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, e.g. 'model.layers.0.mlp.up_proj.weight'"):
        distill(*answers, DistillSettings(str(folder), "helpful", max_steps=1), tmp_path / "out")


def test_help_has_an_example(run):
    code, out, _ = run("distill", "--help")
    assert code == 0
    assert "Examples: iama distill base.jsonl --column helpful" in " ".join(out.split())


def test_what_is_in_the_way_is_left_alone(tiny, tmp_path, answers):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty"):
        distill(*answers, DistillSettings(str(tiny.policy), "helpful", max_steps=1), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
