"""Scores of growing texts equal those of whole texts, and the ledger says what was forwarded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from classifiers import (
    CONTEXT,
    ENCODER_DECODER,
    LLAMA,
    RECURRENT,
    one_by_one,
    save_classifiers,
    tiny_classifier,
    watched,
)
from families import CONFIGS
from hypothesis import given, settings
from transformers import BioGptConfig

from iama.config.specs import RewardScale, RewardSpec
from iama.errors import IamaWarning, RewardError
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.reward_rows import RewardRows, micro_batches

PIECES = ["bake bread", " grow", " toma", "toes", ",", " ", "é", "<|endoftext|>", "<pad>", "</s>", " mix water"]
PROMPTS = ["", "how to bake ", "fix a bike: ", "<|endoftext|>", *[
    [{"role": "user", "content": text}] for text in ("how to grow tomatoes", "fix", " ")
]]  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scoring")
    save_classifiers(root)
    return root


SPECS = {"llama": {"head": "good", "sign": -1, "scale": RewardScale(mean=0.3, std=2.0)}, "gpt2": {}, "bert": {}}


@pytest.fixture(scope="session")
def rewards(folders):
    """Each with small batches, so that there are several."""
    return {
        name: load_reward(name, RewardSpec(model=str(folders / name), batch_size=3, **more))
        for name, more in SPECS.items()
    }


def num_fed(passes):
    return sum(len(row) for batch in passes for row in batch)


def check(rows, reward, prompts, texts, names):
    """Score, and compare with scores from scratch."""
    scores, costs = rows.score(names, prompts, texts)
    assert scores == pytest.approx(reward.score(prompts, texts, {})[0], abs=1e-5)
    assert [cost.reward_calls for cost in costs] == [1] * len(names)
    return [cost.reward_tokens for cost in costs]


@dataclass
class Machine:
    """Rows under random operations, with their prompts and texts, and what each was last scored for."""

    reward: Reward
    rows: RewardRows
    texts: dict[int, tuple] = field(default_factory=dict)

    def run(self, data):
        self.allocate(data, 3)
        for _ in range(data.draw(st.integers(4, 10), "operations")):
            getattr(self, data.draw(st.sampled_from(["grow", "grow", "grow", "cut", "copy", "free", "score"])))(data)
            self.score(data)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.texts)))

    def allocate(self, data, number):
        for row in self.rows.allocate(number):
            assert row not in self.texts
            self.texts[row] = (data.draw(st.sampled_from(PROMPTS)), "")

    def grow(self, data):
        for row in data.draw(st.lists(st.sampled_from(sorted(self.texts)), unique=True)):
            prompt, text = self.texts[row]
            self.texts[row] = (prompt, text + "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=3))))

    def cut(self, data):
        row = self.pick(data)
        prompt, text = self.texts[row]
        self.texts[row] = (prompt, text[: data.draw(st.integers(0, len(text)))])

    def copy(self, data):
        source = self.pick(data)
        targets = data.draw(st.lists(st.sampled_from(sorted(self.texts.keys() - {source})), unique=True))
        self.rows.copy(source, targets)
        self.texts |= dict.fromkeys(targets, self.texts[source])

    def free(self, data):
        row = self.pick(data)
        self.rows.free([row])
        del self.texts[row]
        self.allocate(data, data.draw(st.integers(1, 2)))

    def score(self, data):
        names = data.draw(st.permutations(sorted(self.texts)))[: data.draw(st.integers(1, len(self.texts)))]
        prompts, texts = zip(*(self.texts[row] for row in names), strict=True)
        check(self.rows, self.reward, prompts, texts, names)
        assert check(self.rows, self.reward, prompts[:1], texts[:1], names[:1])[0] == self.again(prompts[0], texts[0])

    def again(self, prompt, text):
        """Tokens to forward for a text that the row has just been scored for."""
        return 0 if self.rows.in_pieces else len(self.reward.classifier.render([prompt], [text])[0])


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.slow
def test_scores_equal_those_from_scratch_after_any_operations(rewards, name, data):
    Machine(rewards[name], RewardRows(rewards[name])).run(data)


def must_be_fed(held, ids, pad_id):
    """From the first token that the cache lacks on, or from the last that is not padding; None: all is padding."""
    speaking = [i for i, token in enumerate(ids) if token != pad_id]
    if not speaking:
        return None
    kept = 0
    while kept < speaking[-1] and held[kept : kept + 1] == ids[kept : kept + 1]:
        kept += 1
    return len(ids) - kept


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15)
@given(data=st.data())
def test_the_ledger_equals_a_count_of_what_is_forwarded_and_that_is_what_must_be(rewards, name, data):
    """The count is taken where rows go one by one; in batches, padded, the ledger must say the same."""
    reward = rewards[name]
    rows, single = RewardRows(reward), RewardRows(one_by_one(reward))
    names = rows.allocate(4)
    assert single.allocate(4) == names
    held, last = {row: [] for row in names}, {}
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        prompts = [data.draw(st.sampled_from(PROMPTS)) for _ in chosen]
        texts = ["".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=4))) for _ in chosen]
        counts = [cost.reward_tokens for cost in rows.score(chosen, prompts, texts)[1]]
        with watched(reward) as passes:
            assert [cost.reward_tokens for cost in single.score(chosen, prompts, texts)[1]] == counts
        assert sum(counts) == num_fed(passes)
        for row, ids, count in zip(chosen, reward.classifier.render(prompts, texts), counts, strict=True):
            number = must_be_fed(held[row], ids, reward.classifier.pad_id)
            if rows.in_pieces and ids == last.get(row):
                assert count == 0
            elif rows.in_pieces and number is not None:
                assert count == number
                held[row] = ids
            else:
                assert count == len(ids)
            last[row] = ids


def test_a_growing_text_costs_what_is_new_and_the_end(rewards):
    """Counted by hand: every letter is a token, and the template ends with a line break and the end token."""
    rows = RewardRows(one_by_one(rewards["llama"]))
    first, *others = rows.allocate(5)
    prompt = [{"role": "user", "content": "xx"}]
    whole = rows.score([first], [prompt], ["QQQQ"])[1][0].reward_tokens
    rows.copy(first, others)
    texts = ["QQQQ", "QQQQ", "QQQQZ", "QQQQZZZ", "QQ"]
    with watched(rewards["llama"]) as passes:
        counts = [cost.reward_tokens for cost in rows.score([first, *others], [prompt] * 5, texts)[1]]
    assert counts == [0, 0, 1 + 2, 3 + 2, 2]
    assert whole > 15
    assert num_fed(passes) == sum(counts)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_given_up_or_made_equal_to_an_empty_one_starts_anew(rewards, name):
    rows = RewardRows(rewards[name])
    first, second, empty = rows.allocate(3)
    whole = check(rows, rewards[name], ["x"] * 2, ["bake", "grow"], [first, second])
    rows.free([first])
    rows.copy(empty, [second])
    assert rows.allocate(1) == [first]
    assert check(rows, rewards[name], ["x"] * 2, ["bake", "grow"], [first, second]) == whole


def test_rows_of_similar_length_share_a_pass_and_no_pass_has_too_many(rewards):
    rows = RewardRows(rewards["gpt2"])
    names = rows.allocate(5)
    texts = ["Q" * number for number in (100, 2, 101, 3, 1)]
    with watched(rewards["gpt2"]) as passes:
        rows.score(names, ["x"] * 5, texts)
    assert [[len(ids) for ids in batch] for batch in passes] == [[5, 5, 5], [103, 103]]


@given(counts=st.lists(st.integers(1, 200), max_size=40), batch_size=st.integers(1, 9))
def test_micro_batches_hold_each_row_once_and_little_padding(counts, batch_size):
    batches = micro_batches(dict(enumerate(counts)), batch_size)
    assert sorted(row for batch in batches for row in batch) == list(range(len(counts)))
    for batch in batches:
        sizes = [counts[row] for row in batch]
        assert len(batch) <= batch_size
        assert max(sizes) <= 2 * min(sizes) + 16


@pytest.mark.parametrize("prompt", ["how to bake ", [{"role": "user", "content": "how to bake"}]])
def test_one_begin_token_is_fed(rewards, prompt):
    """Whether the tokenizer adds it or the template writes it, and none again when the text grows."""
    reward = rewards["llama"]
    rows = RewardRows(reward)
    names = rows.allocate(1)
    fed = []
    for text in ("", "bread", "bread, grow", "bread, grow toma", "bread, grow tomatoes"):
        with watched(reward) as passes:
            rows.score(names, [prompt], [text])
        fed += [token for batch in passes for row in batch for token in row]
    begin = reward.classifier.tokenizer.bos_token_id
    assert fed[0] == begin
    assert fed.count(begin) == 1


@pytest.mark.parametrize(("head", "value"), [("good", math.nan), ("good", math.inf), ("bad", math.nan)])
def test_scores_that_are_no_numbers_are_the_error_of_whole_texts(folders, head, value):
    reward = load_reward("harmless", RewardSpec(model=str(folders / "llama"), head=head))
    rows = RewardRows(reward)
    names = rows.allocate(2)
    prompts, texts = ["how ", "fix "], ["to bake", "a bike"]
    check(rows, reward, prompts, texts, names)
    reward.classifier.model.score.weight.data.fill_(value)
    texts = [text + " grow" for text in texts]
    with pytest.raises(
        RewardError, match=r"'harmless'(: .* gives NaN; | returned -?inf for the prompt 'how ')"
    ) as whole:
        reward.score(prompts, texts, {})
    for _ in range(2):
        with pytest.raises(RewardError) as pieces:
            rows.score(names, prompts, texts)
        assert str(pieces.value) == str(whole.value)


def test_a_models_nan_is_no_missing_score(folders):
    """Whatever may be missing, whole or in pieces."""
    reward = load_reward("gold", RewardSpec(model=str(folders / "gpt2")), missing_ok=True)
    rows = RewardRows(reward)
    names = rows.allocate(1)
    rows.score(names, ["x"], ["y"])
    reward.classifier.model.score.weight.data.fill_(math.nan)
    told = r"^reward 'gold': the model '.*gpt2' gives NaN; its weights are damaged, or numbers overflow in float32"
    for ask in (lambda: rows.score(names, ["x"], ["y z"]), lambda: reward(["x"], ["y"])):
        with pytest.raises(RewardError, match=told):
            ask()


@pytest.mark.parametrize("name", SPECS)
def test_a_text_too_long_is_refused_and_nothing_is_forwarded(rewards, name):
    reward = rewards[name]
    rows = RewardRows(reward)
    names = rows.allocate(2)
    check(rows, reward, ["x", "y"], ["", "a"], names)
    with watched(reward) as passes, pytest.raises(RewardError, match=rf"'{name}': .* reads at most {CONTEXT}; use"):
        rows.score(names, ["x", "y"], ["bake", "Q" * CONTEXT])
    assert passes == []
    check(rows, reward, ["x", "y"], ["bake", "Q"], names)


def test_a_pass_that_fails_leaves_rows_that_can_be_scored(rewards):
    reward = rewards["llama"]
    rows = RewardRows(reward)
    names = rows.allocate(5)
    check(rows, reward, ["x"] * 5, ["bake bread", "a", "b", "c", "d"], names)
    forward, calls = reward.classifier.model.forward, []

    def failing(**inputs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return forward(**inputs)

    texts = ["bake tomatoes", "aa", "bbb", "cccc", "ddddd"]
    reward.classifier.model.forward = failing
    try:
        with pytest.raises(torch.OutOfMemoryError):
            rows.score(names, ["x"] * 5, texts)
    finally:
        del reward.classifier.model.forward
    check(rows, reward, ["x"] * 5, ["bake bread", "aa", "b", "cccc", "d"], names)
    check(rows, reward, ["x"] * 5, texts, names)


def test_a_function_gets_texts_and_columns():
    def judge(prompts, completions, topic, **_):
        return [len(c[-1]["content"]) + len(t) for c, t in zip(completions, topic, strict=True)]

    reward = reward_from_function(judge, "gold", RewardScale(mean=1.0, std=2.0))
    rows = RewardRows(reward)
    first, second = rows.allocate(2)
    prompt = [{"role": "user", "content": "x"}]
    assert rows.score([first], [prompt], ["abc"], {"topic": ["no"]})[0] == [2.0]
    rows.copy(first, [second])
    scores, costs = rows.score([second, first], [prompt] * 2, ["abcd", "a"], {"topic": ["no", ""]})
    assert scores == [2.5, 0.0]
    assert [(cost.reward_calls, cost.reward_tokens) for cost in costs] == [(1, 0)] * 2
    rows.free([first])
    assert set(rows.allocate(2)).isdisjoint({second})
    assert not rows.in_pieces


def test_nothing_to_score(rewards):
    assert RewardRows(rewards["llama"]).score([], [], []) == ([], [])


def grown(reward):
    """Check scores of ragged rows as they grow, one follows another, and one is cut back."""
    rows = RewardRows(reward)
    names = rows.allocate(3)
    prompts = ["how to bake ", [{"role": "user", "content": "fix a bike"}], ""]
    check(rows, reward, prompts, ["", "first", "mix water"], names)
    check(rows, reward, prompts, ["bread, grow tomatoes", "first be", "mix water and then flour"], names)
    rows.copy(names[0], names[2:])
    prompts[2] = prompts[0]
    check(rows, reward, prompts, ["bread", "first be careful", "bread, grow toma"], names)
    return rows


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "falcon"])
def test_decoders_read_in_pieces(family):
    assert grown(tiny_classifier(CONFIGS[family])).in_pieces


WHOLE = {
    "both sides": lambda: tiny_classifier(CONFIGS["llama"], is_causal=False),
    "both sides, gemma": lambda: tiny_classifier(CONFIGS["gemma3"], use_bidirectional_attention=True),
    "recurrent": lambda: tiny_classifier(RECURRENT),
    "positions that cannot be named": lambda: tiny_classifier(CONFIGS["falcon"]),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_read_in_pieces_is_read_whole(kind):
    assert not grown(WHOLE[kind]()).in_pieces


def test_an_encoder_decoder_is_read_whole():
    """tests/iama/rewards/test_rewards.py has its scores."""
    assert not RewardRows(tiny_classifier(ENCODER_DECODER)).in_pieces


def test_a_model_without_a_padding_token_is_read_whole():
    reward = tiny_classifier(CONFIGS["llama"], pad_token_id=None)
    assert not RewardRows(reward).in_pieces


def warns_that_it_reads_whole(reason):
    return pytest.warns(IamaWarning, match=rf"^reward 'r': 'tiny' .* in pieces {reason}; every text is read whole")


def test_a_decoder_that_cannot_go_on_from_a_cache_is_read_whole_with_a_warning():
    """BioGPT asks for a mask where there is nothing to mask."""
    reward = tiny_classifier(BioGptConfig(**LLAMA, hidden_act="gelu"), initializer_range=0.2)
    with warns_that_it_reads_whole(r"cannot \(IndexError\)"):
        assert not grown(reward).in_pieces


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_differ_are_found_whatever_their_size_and_precision(dtype, size):
    """Falcon's classifier takes no positions; here its configuration does not tell that it has any."""
    reward = tiny_classifier(CONFIGS["falcon"], initializer_range=0.2)
    model = reward.classifier.model.to(dtype)
    model.config.rope_parameters = None
    model.score.weight.data *= size
    with warns_that_it_reads_whole(r"gives -?\d.* for -?\d.*"):
        assert not RewardRows(reward).in_pieces


def test_memory_that_runs_out_in_the_trial_is_not_taken_for_a_failure(monkeypatch):
    reward = tiny_classifier(CONFIGS["llama"])
    forward = reward.classifier.model.forward

    def small(**inputs):
        return torch.empty(2**58) if inputs.get("past_key_values") is not None else forward(**inputs)

    monkeypatch.setattr(reward.classifier.model, "forward", small)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        RewardRows(reward)


def test_the_trial_is_made_once_a_model(rewards):
    reward = rewards["llama"]
    RewardRows(reward)
    with watched(reward) as passes:
        RewardRows(reward)
    assert passes == []


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_rounding_passes_the_trial_whatever_the_size_of_the_scores(family, dtype, size):
    reward = tiny_classifier(CONFIGS[family])
    reward.classifier.model.to(dtype).score.weight.data *= size
    assert RewardRows(reward).in_pieces


def test_a_row_twice_is_a_mistake(rewards):
    rows = RewardRows(rewards["llama"])
    name = rows.allocate(1)[0]
    with pytest.raises(AssertionError, match="each row once"):
        rows.score([name, name], ["x", "x"], ["y", "z"])
