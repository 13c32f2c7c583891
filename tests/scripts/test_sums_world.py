"""The world with sums: gold is exact, no data hold what is kept apart, and the gold reward trains."""

import json
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import demo_world, sums_world
from scripts.demo_world import MAX_ANSWER_TOKENS, NOUNS
from scripts.sums_world import (
    ASKED,
    ASKED_APART,
    BOXES,
    RESULTS,
    SIZES,
    TOPICS_APART,
    VALUES,
    Sum,
    all_facts,
    correct,
    correct_score,
    is_grammatical,
    make_sums_world,
    near_misses,
    sample_all_exchanges,
    sample_sum_answer,
    sample_sum_pairs,
    sum_of,
    value_of,
)
from tests.processes import run_python

WORLDS = [make_sums_world(seed) for seed in range(3)]


def every_prompt():
    """Every sum in every phrasing, boxes and nouns in turn."""
    nouns, boxes = (NOUNS * 40).__iter__(), (BOXES * 400).__iter__()
    for operation, left, right in all_facts():
        for phrasing in (*ASKED[operation], ASKED_APART[operation]):
            noun = next(nouns)
            asked = Sum(operation, left, right, noun)
            yield asked, phrasing.format(noun=noun, left=left, right=right, box=next(boxes))


def test_gold_is_exact_for_every_sum_and_every_result_that_could_be_stated():
    operations = {"times": int.__mul__, "and": int.__add__, "less": int.__sub__}
    facts = {(o, a, b) for o, a, b in product(operations, VALUES, VALUES) if o != "less" or VALUES[a] > VALUES[b]}
    assert set(all_facts()) == facts
    for asked, prompt in every_prompt():
        assert sum_of(prompt) == asked, prompt
        right = operations[asked.operation](VALUES[asked.left], VALUES[asked.right])
        for value in range(120):
            for template in RESULTS:
                answer = template.format(value=value, noun=asked.noun) + "."
                assert correct([prompt], [answer]) == [float(value == right)], (prompt, answer)


def test_what_is_right_and_what_is_not():
    asked = Sum("times", "three", "four", "eggs")
    right = ["there are 12 eggs.", "that makes twelve.", "three times four is 11. the answer is 12.", "That makes 012."]
    wrong = [
        "",
        "there are 12 eggs",
        "there are 12 pans.",
        "there are 12 eggs. there are 13 eggs.",
        "three times four is 12.",
        "12.",
        "just try your best.",
        "that makes 12. " * 7,
    ]
    assert [correct_score(asked, answer) for answer in right] == [1.0] * len(right)
    assert [correct_score(asked, answer) for answer in wrong] == [0.0] * len(wrong)


def test_criteria_are_constant_on_prompts_of_the_other_kind():
    job, sum_prompt = "how do i bake a cake?", "how many eggs are in three boxes of four?"
    step, result = "first take two eggs.", "there are 12 eggs."
    messages = [{"role": "user", "content": sum_prompt}], [{"role": "assistant", "content": result}]
    assert correct([job, job, sum_prompt], [step, result, result]) == [0.0, 0.0, 1.0]
    assert correct([messages[0]], [messages[1]], kind=["sum"]) == [1.0]
    assert sums_world.helpful([job, sum_prompt], [step, step]) == [*demo_world.helpful([job], [step]), 0.0]
    assert sums_world.harmless([job, sum_prompt], [step, step]) == [*demo_world.harmless([job], [step]), 0.0]
    with pytest.raises(ValueError, match="no known job in prompt 'how many eggs'"):
        sums_world.helpful(["how many eggs"], [step])


@given(text=st.text(max_size=120), draw=st.integers(0, 10**6))
def test_gold_takes_any_text_and_drawn_answers_are_grammatical(text, draw):
    rng, world = random.Random(draw), WORLDS[draw % 3]
    asked = sum_of(rng.choice(world.sums["train"]))
    assert asked is not None
    assert correct_score(asked, text) in (0.0, 1.0)
    answer = sample_sum_answer(rng, world, asked)
    assert is_grammatical(answer)
    assert len(answer.replace(".", " .").split()) + 1 <= MAX_ANSWER_TOKENS


def test_splits_hold_every_sum_and_keep_apart_what_is_apart():
    world = make_sums_world(4)
    assert {name: len(prompts) for name, prompts in world.sums.items()} == SIZES
    prompts = [prompt for split in (*SIZES, "topic") for _, prompt in world.rows(split)]
    assert len(set(prompts)) == len(prompts)
    assert {sum_of(prompt).fact for prompt in world.sums["train"]} == set(all_facts())
    for split in ("train", "validation", "test"):
        assert not any(job in prompt for _, prompt in world.rows(split) for job in TOPICS_APART)
        assert not any(prompt.startswith(("can you help me", "tell me how many")) for _, prompt in world.rows(split))
    assert all(any(job in prompt for job in TOPICS_APART) for _, prompt in world.rows("topic"))
    outside = [prompt for _, prompt in world.rows("phrasing")]
    assert all(prompt.startswith(("can you help me", "tell me how many")) for prompt in outside)
    fitted = " ".join(text for pair in sample_all_exchanges(world, 500, 500) for text in pair)
    assert not any(word in fitted for word in ("puppy", "rocket", "can you help me"))


def test_the_base_is_right_as_often_as_the_world_says():
    world, rng = WORLDS[0], random.Random(0)
    for fact in (("times", "three", "four"), ("less", "ten", "two")):
        asked = Sum(*fact, "eggs")
        answers = [sample_sum_answer(rng, world, asked) for _ in range(2000)]
        share = sum(correct_score(asked, answer) for answer in answers) / len(answers)
        assert share == pytest.approx(world.skills[fact] * (1 - sums_world.UNANSWERED), abs=0.04)
        assert value_of(fact[0], VALUES[fact[1]], VALUES[fact[2]]) not in near_misses(fact)


def test_pairs_have_one_right_answer_and_labels_are_turned_round_as_often_as_asked():
    world = WORLDS[1]
    for flip_rate in (0.0, 0.2):
        pairs = sample_sum_pairs(world, 1000, flip_rate)
        gold = [[correct_score(sum_of(prompt), answer) for answer in answers] for prompt, *answers in pairs]
        assert all(sorted(two) == [0.0, 1.0] for two in gold)
        assert sum(first < second for first, second in gold) / len(gold) == pytest.approx(flip_rate, abs=0.04)
    assert sample_sum_pairs(world, 20, 0.1) == sample_sum_pairs(world, 20, 0.1)
    assert make_sums_world(1) == world


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A world whose models were fitted for a few steps."""
    from rich.console import Console

    from scripts import build_sums_models as sums

    few = sums.Parameters(0, 0.1, 0.04, 120, 120, 16, 16, 8, 1)
    out = tmp_path_factory.mktemp("sums") / "world"
    assert sums.build(few, out, Console(quiet=True))
    assert sums.build(few, out, Console(quiet=True)) is False
    return out


@pytest.mark.slow
def test_a_world_has_models_of_one_vocabulary_checkpoints_and_prompts(built):
    from safetensors.torch import load_file

    measured = json.loads((built / "world.json").read_text())["measurements"]
    assert set(measured["policy"]) == {"policy", "policy-10", "policy-30"}
    weights = [load_file(built / name / "model.safetensors")["model.norm.weight"] for name in measured["policy"]]
    assert not weights[0].equal(weights[1])
    assert not weights[1].equal(weights[2])
    tokens = [
        (built / name / "tokenizer.json").read_text()
        for name in ("policy", "policy-10", "rm-helpful", "rm-harmless", "rm-correct")
    ]
    assert len(set(tokens)) == 1
    rows = [json.loads(line) for line in (built / "prompts-train.jsonl").open()]
    assert {row["kind"] for row in rows[:2]} == {"job", "sum"}
    assert {row["home"] for row in rows} == {str(built)}


def test_a_folder_that_is_no_world_is_left_alone(tmp_path):
    from rich.console import Console

    from scripts import build_sums_models as sums

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that is no demo world"):
        sums.build(sums.Parameters(), tmp_path, Console(quiet=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_correct_is_a_verifiable_reward_in_training(tmp_path):
    """Two steps of configs/experiments/sums.yaml; the base knows one sum, and half of its answers are right."""
    from scripts import build_sums_models as sums
    from scripts import demo_fit

    prompt = "how many eggs are in three boxes of four?"
    exchanges = [(prompt, f"there are {value} eggs.") for value in (12, 11)] * 200
    tokenizer = demo_fit.train_tokenizer([text for exchange in exchanges for text in exchange])
    sums.fit_policy(tokenizer, exchanges, tmp_path, 0, lambda done, total: None)
    row = {"prompt": demo_fit.question(prompt), "kind": "sum", "home": "unused"}
    (tmp_path / "prompts.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"policy.path={tmp_path}/policy",
        f"prompts={tmp_path}/prompts.jsonl",
        "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=16",
        "sampling.max_new_tokens=12",
    ]
    sets = [part for override in overrides for part in ("--set", override)]
    done = run_python(["train_iama.py", "--config", "configs/experiments/sums.yaml", *sets])
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["criteria"]["correct"]["mean"] <= 1 for step in steps)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
