"""Rewards: classifiers and functions, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BartConfig, T5Config

from iama.config.specs import RewardScale, RewardSpec
from iama.errors import IamaWarning, ModelError, RewardError
from iama.prompts.data import load_prompts
from iama.prompts.render import render_exchange
from iama.rewards import classifier as classifier_module
from iama.rewards.function import load_function, reward_from_function
from iama.rewards.load import check_reward, load_reward
from inference.engine.reward_gradient import EmbeddedReward, around, whole_with_gradient
from inference.engine.reward_rows import RewardRows
from tests.conftest import CHAT_TEMPLATE

TEXTS = ["bake red bread", "no thanks", "mix flour then water then flour please", "be careful"]


@pytest.fixture
def prompts(tiny):
    return [row["prompt"] for row in load_prompts(tiny.prompts)]


def slow_scores(folder, prompts, texts, head=0):
    """One text at a time, straight through the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        rows = [torch.tensor([render_exchange(tokenizer, p, t)]) for p, t in zip(prompts, texts, strict=True)]
        return [model(input_ids=row).logits[0, head].item() for row in rows], sum(row.numel() for row in rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_scores_equal_one_by_one(tiny, prompts, batch_size):
    reward = load_reward("helpful", RewardSpec(model=str(tiny.reward), batch_size=batch_size))
    scores, cost = reward.score(prompts, TEXTS, {})
    expected, tokens = slow_scores(tiny.reward, prompts, TEXTS)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert (cost.reward_calls, cost.reward_tokens) == (4, tokens)
    assert cost.seconds > 0


@pytest.mark.parametrize("pad", ["distinct", "the end token", "missing", "below 0"])
@pytest.mark.parametrize("in_tokenizer", ["<pad>", "<|end|>", None])
def test_the_token_that_speaks_is_the_one_that_transformers_takes_for_a_single_row(
    tiny, prompts, tmp_path, pad, in_tokenizer
):
    """Whole, growing and for a gradient; the template ends with the end token."""
    folder = shutil.copytree(tiny.reward, tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ids = {"distinct": tokenizer.pad_token_id, "the end token": tokenizer.eos_token_id, "missing": None, "below 0": -1}
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": ids[pad]}))
    tokenizer.pad_token = in_tokenizer
    tokenizer.save_pretrained(folder)
    texts = [*TEXTS[:3], "be careful <pad>"]
    expected, _ = slow_scores(folder, prompts, texts)
    reward = load_reward("helpful", RewardSpec(model=str(folder)))
    assert reward.score(prompts, texts, {})[0] == pytest.approx(expected, abs=1e-5)
    rows = RewardRows(reward)
    names = rows.allocate(4)
    assert rows.in_pieces
    rows.score(names, prompts, ["be", "no", "mix flour", "be careful <pad> now"])
    assert rows.score(names, prompts, texts)[0] == pytest.approx(expected, abs=1e-5)
    embedded = EmbeddedReward(reward)
    inside = [around(reward, prompt) for prompt in prompts]
    answers = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    read = [[*before, *answer, *after] for (before, after), answer in zip(inside, answers, strict=True)]
    found = embedded.scores([embedded.embeddings[row] for row in read])
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    logits, _ = whole_with_gradient(reward.classifier, read, [len(before) for before, _ in inside])
    assert logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_plain_text_that_ends_with_the_tokenizers_padding_is_read_to_its_end(tiny, tmp_path):
    folder = shutil.copytree(tiny.reward, tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    texts = ["bake <pad>", "mix<unk>", "bread<|end|>", "no thanks bread"]
    expected, _ = slow_scores(folder, [""] * 4, texts)
    reward = load_reward("helpful", RewardSpec(model=str(folder)))
    assert reward.score([""] * 4, texts, {})[0] == pytest.approx(expected, abs=1e-5)


END = "<|end|>"
PART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
ENCODER_DECODERS = {
    "t5": T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1, num_labels=1),
    "bart": BartConfig(
        d_model=16, max_position_embeddings=128, decoder_start_token_id=3, num_labels=1,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in PART.items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pad", ["<pad>", END])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_scores_texts_with_any_number_of_end_tokens(tiny, prompts, tmp_path, name, pad):
    """transformers wants as many in all rows of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    ids = {"pad_token_id": tokenizer.convert_tokens_to_ids(pad), "eos_token_id": tokenizer.eos_token_id}
    config = ENCODER_DECODERS[name].to_dict() | ids | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(type(ENCODER_DECODERS[name])(**config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = [*prompts, [*prompts[0], {"role": "assistant", "content": "mix"}, *prompts[1]]]
    texts = [*TEXTS[:3], f"be{END} careful", "thanks"]
    expected, _ = slow_scores(tmp_path, told, texts)
    reward = load_reward("helpful", RewardSpec(model=str(tmp_path)))
    assert reward.score(told, texts, {})[0] == pytest.approx(expected, abs=1e-5)
    reward.classifier.tokenizer.chat_template = CHAT_TEMPLATE.replace(END, "")
    with pytest.raises(RewardError, match=r"^reward 'helpful': a text has no end token, which speaks for it in '"):
        reward.score(prompts, TEXTS, {})


FROZEN = [1.827560544013977, 1.4640390872955322, 1.8256194591522217, 1.4047460556030273]
"""Scores of the texts by a classifier whose weights are given by a formula."""


def test_scores_stay_what_they_are_when_packages_change(tiny, prompts, tmp_path):
    """Loading, template, padding and head all have a part in them."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward)
    with torch.no_grad():
        for k, (_, parameter) in enumerate(sorted(model.named_parameters())):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64) + 1000 * k
            parameter.copy_(torch.sin(numbers).reshape(parameter.shape))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.reward).save_pretrained(tmp_path)
    scores = load_reward("helpful", RewardSpec(model=str(tmp_path)))(prompts, TEXTS)
    assert scores == pytest.approx(FROZEN, abs=1e-5)


def no_room():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("ask", [no_room, lambda: torch.empty(2**58)], ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_batch_and_gives_the_same_scores(tiny, prompts, monkeypatch, ask):
    reward = load_reward("helpful", RewardSpec(model=str(tiny.reward), batch_size=4))
    expected, cost = reward.score(prompts, TEXTS, {})
    forward = reward.classifier.model.forward

    def small(input_ids, **kwargs):
        if len(input_ids) > 2:
            ask()
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(reward.classifier.model, "forward", small)
    with pytest.warns(IamaWarning, match="reward 'helpful': out of memory with 4 rows; going on with 2"):
        found, again = reward.score(prompts, TEXTS, {})
    assert found == pytest.approx(expected, abs=1e-5)
    assert again.reward_tokens == cost.reward_tokens
    monkeypatch.setattr(reward.classifier.model, "forward", lambda **_: small([0] * 3))
    with pytest.warns(IamaWarning), pytest.raises(ModelError, match="out of memory with a single row"):
        reward.score(prompts, TEXTS, {})


def test_head_and_sign(tiny, prompts):
    spec = RewardSpec(model=str(tiny.two_headed_reward), head="bad", sign=-1)
    scores, _ = load_reward("harmless", spec).score(prompts, TEXTS, {})
    expected, _ = slow_scores(tiny.two_headed_reward, prompts, TEXTS, head=0)
    assert scores == pytest.approx([-score for score in expected], abs=1e-5)
    by_index = load_reward("harmless", RewardSpec(model=str(tiny.two_headed_reward), head=0, sign=-1))
    assert by_index.score(prompts, TEXTS, {})[0] == scores


def test_the_same_scores_as_a_trl_reward_function(tiny, prompts):
    reward = load_reward("helpful", RewardSpec(model=str(tiny.reward)))
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert reward(prompts=prompts, completions=completions, topic=["x"] * 4) == reward.score(prompts, TEXTS, {})[0]
    assert reward.__name__ == "helpful"


def test_the_classifier_scores_as_the_reward_does_but_for_the_scale(tiny, prompts):
    spec = RewardSpec(
        model=str(tiny.two_headed_reward), head="good", sign=-1, batch_size=3, scale=RewardScale(mean=2.0, std=0.5)
    )
    reward = load_reward("harmless", spec)
    classifier = reward.classifier
    assert (classifier.head, classifier.sign, classifier.batch_size, classifier.context_length) == (1, -1, 3, 128)
    assert (classifier.path, classifier.source) == (str(tiny.two_headed_reward), "reward 'harmless'")
    assert classifier.pad_id == classifier.model.config.pad_token_id == classifier.tokenizer.pad_token_id
    raw = classifier.score_ids(classifier.render(prompts, TEXTS))
    assert raw == classifier.score(prompts, TEXTS, {})[0]
    scores = reward.score(prompts, TEXTS, {})[0]
    assert scores == reward.finish(prompts, TEXTS, raw) == [(score - 2.0) / 0.5 for score in raw]
    with pytest.raises(RewardError, match=r"'harmless' returned inf for the prompt 'fix a bike' .* 'mix flour"):
        reward.finish(prompts, TEXTS, [0.0, 0.0, math.inf, 0.0])


def test_a_function_has_no_classifier():
    assert reward_from_function(lambda **_: [0.0], "gold").classifier is None


def test_a_function_from_a_file_gets_the_columns(tmp_path, prompts):
    path = tmp_path / "judge.py"
    path.write_text("def judge(prompts, completions, topic, **_):\n    return [len(t) for t in topic]\n")
    reward = load_reward("gold", RewardSpec(function=f"{path}:judge"))
    scores, cost = reward.score(prompts, TEXTS, {"topic": ["a", "bb", "ccc", "dddd"]})
    assert scores == [1.0, 2.0, 3.0, 4.0]
    assert (cost.reward_calls, cost.reward_tokens) == (4, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_names_reward_and_prompt(prompts, bad):
    reward = reward_from_function(lambda **_: [0.0, bad, 0.0, 0.0], "gold")
    with pytest.raises(RewardError, match=r"'gold' returned (nan|inf) for the prompt 'how to grow tomatoes'"):
        reward(prompts, TEXTS)


def test_a_wrong_number_of_scores_is_refused(prompts):
    with pytest.raises(RewardError, match="returned a list of 1 for 4 completions"):
        reward_from_function(lambda **_: [0.0], "gold")(prompts, TEXTS)


def test_functions_that_cannot_be_imported(tmp_path):
    (tmp_path / "empty.py").write_text("answer = 42\n")
    for reference, match in [
        (f"{tmp_path}/none.py:f", "no such file"),
        (f"{tmp_path}/empty.py:f", "has no attribute"),
        (f"{tmp_path}/empty.py:answer", "is not callable"),
        ("no_such_package:f", "No module named"),
    ]:
        with pytest.raises(RewardError, match=match):
            load_function(reference, "reward 'gold'")


def test_an_answer_longer_than_the_reward_model_reads(tiny, prompts):
    reward = load_reward("helpful", RewardSpec(model=str(tiny.reward)))
    with pytest.raises(RewardError, match=r"reads at most 128"):
        reward.score(prompts[:1], ["bread " * 200], {})


def test_a_template_that_refuses_an_answer_by_what_it_says_names_the_reward(tiny, prompts):
    reward = load_reward("helpful", RewardSpec(model=str(tiny.reward)))
    refuses = "{% if 'flour' in messages[-1]['content'] %}{{ raise_exception('no flour') }}{% endif %}"
    reward.classifier.tokenizer.chat_template = refuses + CHAT_TEMPLATE
    with pytest.raises(ModelError, match=r"^reward 'helpful': .*no flour.*such as the prompt"):
        reward.score(prompts[:1], ["mix flour"], {})


def test_a_model_without_a_trained_head_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.reward, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, e.g. 'score.weight'"):
        load_reward("helpful", RewardSpec(model=str(folder)))


def test_truncated_weights_are_one_line(tiny, tmp_path):
    shutil.copytree(tiny.reward, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"reward 'helpful': cannot load .*torn"):
        load_reward("helpful", RewardSpec(model=str(tmp_path / "torn")))


def test_heads_of_one_model_share_it_and_read_the_same_texts_once(tiny, prompts, monkeypatch):
    forwarded = []
    forward = classifier_module._forward
    monkeypatch.setattr(classifier_module, "_forward", lambda *given: forwarded.append(1) or forward(*given))
    specs = {
        "good": RewardSpec(model=str(tiny.two_headed_reward), head="good"),
        "bad": RewardSpec(model=str(tiny.two_headed_reward), head="bad", sign=-1, batch_size=2),
        "good again": RewardSpec(model=str(tiny.two_headed_reward), head="good"),
        "other": RewardSpec(model=str(tiny.reward)),
    }
    shared = {}
    files = {spec: found for name, spec in specs.items() for spec, found in check_reward(name, spec).items()}
    together = {name: load_reward(name, spec, files=files, shared=shared) for name, spec in specs.items()}
    assert len(shared) == 2
    models = {id(reward.classifier.model) for reward in together.values()}
    assert len(models) == 2
    for texts in (TEXTS, TEXTS[::-1], TEXTS):
        forwarded.clear()
        scores = {name: reward.score(prompts, texts, {}) for name, reward in together.items()}
        assert len(forwarded) == 2
        for name, spec in specs.items():
            expected, cost = load_reward(name, spec).score(prompts, texts, {})
            assert scores[name][0] == pytest.approx(expected, abs=1e-6)
            assert scores[name][1].reward_tokens == cost.reward_tokens
