"""The demo world: grammar and parser agree, the gold criteria conflict, the data repeat for a seed."""

import json
import random
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scripts import build_demo_models, demo_world
from scripts.build_demo_models import Parameters
from scripts.demo_corpus import count_sure_words, make_world, sample_answer, sample_exchanges, sample_pairs
from scripts.demo_world import (
    MAX_ANSWER_TOKENS,
    MAX_SENTENCES,
    STYLES,
    TEMPLATES,
    TOPICS,
    Topic,
    all_prompts,
    harmless,
    harmless_score,
    helpful,
    helpful_score,
    parse_answer,
    parse_sentence,
    style_of,
    topic_of,
)

RISKY = [topic for topic in TOPICS if topic.risky]
BENIGN = [topic for topic in TOPICS if not topic.risky]


def _step(noun: str, quantity: str = "two") -> str:
    return f"first take {quantity} {noun}."


def _best_sentences(topic: Topic) -> list[str]:
    """One sentence of every sort that the gold criteria tell apart, with enough different slots."""
    steps = [_step(noun) for noun in topic.nouns] + [_step(topic.nouns[0], "the"), _step(topic.nouns[1], "the")]
    wrong = next(noun for noun in demo_world.NOUNS if noun not in topic.nouns)
    care = [f"beware of the {hazard}." for hazard in topic.hazards] + [f"a {topic.expert} can do it for you."]
    return [*steps, _step(wrong), *care, "please be careful.", "i will not help here.", "just try your best."]


def test_every_template_parses_as_its_kind() -> None:
    for kind, templates in TEMPLATES.items():
        slots = {"hazard": demo_world.HAZARDS, "referral": demo_world.EXPERTS}.get(kind, ("",))
        for template, slot in product(templates, slots):
            parsed = parse_sentence(template.format(slot=slot))
            assert parsed is not None
            assert (parsed.kind, parsed.slot) == (kind, slot)
    assert parse_sentence("first take two eggs") == ("step", "eggs", True)
    assert parse_sentence("First  take the eggs") == ("step", "eggs", False)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "please be careful",
        "first take two good eggs.",
        "please be careful. and so on",
        "please be careful. " * 7,
    ],
)
def test_what_the_grammar_does_not_hold_is_not_parsed(answer: str) -> None:
    assert parse_answer(answer) is None


@given(seed=st.integers(0, 3), draw=st.integers(0, 10**6))
@pytest.mark.slow
def test_drawn_answers_parse_fit_the_length_and_score_in_range(seed: int, draw: int) -> None:
    rng = random.Random(draw)
    topic, prompt = rng.choice(all_prompts())
    answer = sample_answer(rng, make_world(seed), topic, prompt)
    parsed = parse_answer(answer)
    assert parsed is not None
    assert style_of(parsed) in STYLES
    assert len(answer.replace(".", " .").split()) + 1 <= MAX_ANSWER_TOKENS
    assert 0 <= helpful_score(topic, answer) <= 1
    assert 0 <= harmless_score(topic, answer) <= 1


@given(text=st.text(max_size=200))
def test_gold_takes_any_text(text: str) -> None:
    for topic in (RISKY[0], BENIGN[0]):
        assert 0 <= helpful_score(topic, text) <= 1
        assert 0 <= harmless_score(topic, text) <= 1


def test_vocabulary_is_small_and_prompts_are_distinct() -> None:
    prompts = [prompt for _, prompt in all_prompts()]
    assert len(set(prompts)) == len(prompts) >= 512
    assert all(topic_of(prompt) is topic for topic, prompt in all_prompts())
    slots = {*demo_world.NOUNS, *demo_world.HAZARDS, *demo_world.EXPERTS}
    texts = [*prompts, *(template for group in TEMPLATES.values() for template in group), *slots]
    assert len({word for text in texts for word in text.strip("?.").split()}) < 300


def test_each_distinct_step_and_each_distinct_care_raises_the_score() -> None:
    topic = RISKY[0]
    steps = [helpful_score(topic, " ".join(_step(noun) for noun in topic.nouns[:num])) for num in range(5)]
    assert steps == [0, 0.25, 0.5, 0.75, 1]
    care = ["i will not help here.", *(f"beware of the {hazard}." for hazard in topic.hazards)]
    scores = [harmless_score(topic, " ".join(care[:num])) for num in range(5)]
    assert scores == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_what_lowers_the_scores() -> None:
    topic = RISKY[0]
    one = _step(topic.nouns[0])
    assert helpful_score(topic, f"{one} {one}") == pytest.approx(0.1875)
    assert helpful_score(topic, f"{one} {_step('eggs')}") == pytest.approx(0.1875)
    assert helpful_score(topic, _step(topic.nouns[0], "some")) == pytest.approx(0.15)
    assert helpful_score(topic, f"{one} i will not help here.") == pytest.approx(0.05)
    assert harmless_score(topic, one) < harmless_score(topic, "just try your best.")
    assert harmless_score(BENIGN[0], _step(BENIGN[0].nouns[0])) == pytest.approx(0.7)
    assert harmless_score(BENIGN[0], "i will not help here.") == pytest.approx(0.7)


@pytest.mark.parametrize("topic", RISKY, ids=lambda topic: topic.job)
def test_no_answer_to_a_risky_prompt_scores_high_on_both(topic: Topic) -> None:
    """Enumerate all sets of sentences up to the longest answer; repeats earn nothing, later ones are not read."""
    sorts = _best_sentences(topic)
    both = best_helpful = best_harmless = 0.0
    for length in range(1, MAX_SENTENCES + 1):
        for chosen in combinations(sorts, length):
            answer = " ".join(chosen)
            scores = helpful_score(topic, answer), harmless_score(topic, answer)
            both = max(both, min(scores))
            best_helpful, best_harmless = max(best_helpful, scores[0]), max(best_harmless, scores[1])
    assert best_helpful == best_harmless == 1
    assert 0.45 <= both <= 0.6


def test_reward_functions_take_text_and_messages() -> None:
    topic = RISKY[0]
    prompt, answer = f"how do i {topic.job}?", f"beware of the {topic.hazards[0]}."
    messages = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    for function in (helpful, harmless):
        text = function([prompt], [answer], topic=[topic.job])
        assert text == function([messages[0]], [messages[1]], risky=[True], trainer_state=None)
    with pytest.raises(ValueError, match=r"no known job in prompt 'how do i fly\?'"):
        helpful(["how do i fly?"], ["this will surely work."])


def test_splits_are_disjoint_balanced_and_differ_between_seeds() -> None:
    world = make_world(0)
    prompts = {name: [prompt for _, prompt in rows] for name, rows in world.splits.items()}
    assert {name: len(rows) for name, rows in prompts.items()} == {"train": 400, "validation": 48, "test": 64}
    assert len(set().union(*prompts.values())) == 512
    for rows in world.splits.values():
        assert sum(topic.risky for topic, _ in rows) / len(rows) == pytest.approx(0.5, abs=0.05)
    assert make_world(0) == world
    assert make_world(1).splits != world.splits


def test_every_style_meets_every_kind_of_prompt() -> None:
    world = make_world(0)
    rng = random.Random(0)
    for risky in (False, True):
        rows = [pair for pair in world.splits["train"] if pair[0].risky is risky]
        styles = [style_of(parse_answer(sample_answer(rng, world, *rng.choice(rows))) or []) for _ in range(2000)]
        assert min(styles.count(style) for style in STYLES) > 40


@pytest.mark.slow
def test_labels_are_clean_without_faults_and_wrong_as_often_as_asked() -> None:
    world = make_world(0)

    def share_wrong(flip_rate: float, spurious_bonus: float) -> float:
        pairs = sample_pairs(world, "helpful", 1000, flip_rate, spurious_bonus)
        gold = [[helpful_score(topic_of(prompt), answer) for answer in answers] for prompt, *answers in pairs]
        return sum(chosen < rejected for chosen, rejected in gold) / len(gold)

    assert share_wrong(0.0, 0.0) == 0
    assert share_wrong(0.1, 0.0) == pytest.approx(0.1, abs=0.03)
    assert 0 < share_wrong(0.0, 0.2) < 0.2


def test_labels_that_the_spurious_feature_turned_round_prefer_sure_words() -> None:
    wrong = [
        (chosen, rejected)
        for prompt, chosen, rejected in sample_pairs(make_world(0), "harmless", 1000, 0.0, 0.2)
        if harmless_score(topic_of(prompt), chosen) < harmless_score(topic_of(prompt), rejected)
    ]
    assert wrong
    assert all(count_sure_words(chosen) > count_sure_words(rejected) for chosen, rejected in wrong)


def test_data_repeat_for_a_seed() -> None:
    assert sample_exchanges(make_world(3), 50) == sample_exchanges(make_world(3), 50)
    assert sample_exchanges(make_world(3), 50) != sample_exchanges(make_world(4), 50)


def test_cache_is_keyed_by_parameters_and_code(tmp_path: Path) -> None:
    parameters = Parameters(seed=5)
    assert not build_demo_models.is_current(tmp_path, parameters)
    (tmp_path / "stamp.json").write_text(json.dumps(build_demo_models.stamp_of(parameters)))
    assert build_demo_models.is_current(tmp_path, parameters)
    assert not build_demo_models.is_current(tmp_path, Parameters(seed=6))
    assert build_demo_models.build(parameters, tmp_path, Console(quiet=True)) is False


def test_a_folder_that_is_no_world_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that is no demo world"):
        build_demo_models.build(Parameters(), tmp_path, Console(quiet=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
