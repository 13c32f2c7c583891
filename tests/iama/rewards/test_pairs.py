"""Classifiers that were trained on pairs of texts are read so, or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from iama.config.specs import PolicySpec, RewardSpec
from iama.errors import ConfigError, RewardError
from iama.rewards.load import check_reward, load_reward
from inference.engine.policy import load_policy
from inference.engine.reward_rows import RewardRows, reads_in_pieces
from inference.engine.vocabulary import check_shared_vocabulary
from inference.pools.file import read_pool
from inference.pools.score import reward_key
from tests.conftest import make_tokenizer

ANSWERS = ["bake bread", "no", "mix water then flour", "grow red tomatoes", "be careful please"]
QUESTION = "how to fix a bike"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cross-encoder with types, and a classifier of one stream whose tokenizer has no pairs of its own."""
    root, tokenizer = tmp_path_factory.mktemp("pairs"), make_tokenizer()
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), type_vocab_size=2, max_position_embeddings=32, initializer_range=0.7, **SIZES
    )
    BertForSequenceClassification(config).save_pretrained(root / "bert")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 1, "num_labels": 1}
    GPT2ForSequenceClassification(GPT2Config(**ids, n_embd=32, n_layer=1, n_head=2)).save_pretrained(root / "gpt2")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "gpt2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|end|>",
        pair="<s> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)],
    )
    tokenizer.save_pretrained(root / "bert")
    settings = json.loads((root / "bert" / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's tokenizer
    (root / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


def as_trained(reward, texts):
    """The model's own reading of pairs, one at a time."""
    classifier = reward.classifier
    with torch.inference_mode():
        pairs = [classifier.tokenizer(QUESTION, text, return_tensors="pt") for text in texts]
        if not classifier.has_types:
            pairs = [{key: value for key, value in pair.items() if key != "token_type_ids"} for pair in pairs]
        return [classifier.model(**pair).logits.item() for pair in pairs]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_pair_scores_as_it_was_trained(folders, name):
    """In batches, whether the prompt is a text or a message."""
    reward = load_reward("r", RewardSpec(model=str(folders / name), pair=True, batch_size=2))
    expected = pytest.approx(as_trained(reward, ANSWERS), abs=1e-4)
    for prompt in (QUESTION, [{"role": "user", "content": QUESTION}]):
        scores, cost = reward.score([prompt] * len(ANSWERS), ANSWERS, {})
        assert scores == expected
    assert cost.reward_tokens == sum(len(reward.classifier.tokenizer(QUESTION, text)["input_ids"]) for text in ANSWERS)


def test_as_one_text_the_scores_are_others(folders):
    pair = load_reward("r", RewardSpec(model=str(folders / "bert"), pair=True))
    one = load_reward("r", RewardSpec(model=str(folders / "bert"), pair=False))
    prompts = [QUESTION] * len(ANSWERS)
    assert len({reward_key(RewardSpec(model=str(folders / "bert"), pair=pair)) for pair in (True, False)}) == 2
    assert one.score(prompts, ANSWERS, {})[0] != pytest.approx(pair.score(prompts, ANSWERS, {})[0], abs=1e-2)


def test_whether_a_model_that_can_tell_two_texts_apart_reads_pairs_must_be_said(folders, tmp_path):
    told = r"^reward 'r': '.*' can read a pair of texts, .*; write `pair: true` .* else `pair: false` .*--spec"
    with pytest.raises(RewardError, match=told):
        load_reward("r", RewardSpec(model=str(folders / "bert")))
    check_reward("r", RewardSpec(model=str(folders / "gpt2")))
    folder = shutil.copytree(folders / "gpt2", tmp_path / "cross-encoder")
    config = json.loads((folder / "config.json").read_text()) | {"sentence_transformers": {"version": "5.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match=told):
        check_reward("r", RewardSpec(model=str(folder)))


def test_growing_texts_of_a_pair_are_read_whole(folders):
    reward = load_reward("r", RewardSpec(model=str(folders / "gpt2"), pair=True))
    rows = RewardRows(reward)
    assert not rows.in_pieces
    assert not reads_in_pieces(reward.classifier)
    names = rows.allocate(2)
    for texts in (["bake", "no"], ["bake bread", "no"]):
        scores, costs = rows.score(names, [QUESTION] * 2, texts)
        assert scores == pytest.approx(as_trained(reward, texts), abs=1e-4)
        assert [c.reward_tokens for c in costs] == [len(row) for row in reward.classifier.render([QUESTION] * 2, texts)]


def test_a_pair_is_too_long_without_a_gradient_and_of_models_only(folders, tiny):
    reward = load_reward("r", RewardSpec(model=str(folders / "bert"), pair=True))
    with pytest.raises(RewardError, match="reads at most 32"):
        reward.score([QUESTION], ["bake bread " * 20], {})
    policy = load_policy("base", PolicySpec(path=str(tiny.policy)))
    with pytest.raises(
        ConfigError, match="ggro needs the gradient of a reward, and 'r' is a classifier of pairs of text"
    ):
        check_shared_vocabulary(policy, reward, "ggro")
    with pytest.raises(ValidationError, match="`pair` belongs to a `model`, not to a function"):
        RewardSpec(function="m:f", pair=True)


def test_a_file_says_that_a_model_reads_pairs(run, folders, tmp_path):
    """`iama score` refuses the bare model, and takes what the file says."""
    pool = tmp_path / "pool.jsonl"
    rows = [{"iama_pool": 1, "policy": {"name": "base"}}, *({"prompt": QUESTION, "text": text} for text in ANSWERS)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run("score", pool, "--column", "r", "--reward", folders / "bert")
    assert (code, err.count("\n")) == (2, 1)
    assert "write `pair: true`" in err
    (tmp_path / "reward.yaml").write_text(f"model: {folders / 'bert'}\npair: true\n")
    assert run("score", pool, "--column", "r", "--spec", tmp_path / "reward.yaml")[0] == 0
    reward = load_reward("r", RewardSpec(model=str(folders / "bert"), pair=True))
    scores = [sample.scores["r"] for sample in read_pool(pool).prompts[0].samples]
    assert scores == pytest.approx(as_trained(reward, ANSWERS), abs=1e-4)
