"""Rewards on vLLM's pooling runner: the scores of transformers, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BartConfig, BartForSequenceClassification

from iama.config.specs import RewardSpec
from iama.errors import ConfigError, RewardError
from iama.models.vllm import close_llm
from iama.rewards.load import load_reward
from inference.pools.score import reward_key
from tests.inference.classifiers import llama_tokenizer, save, save_classifiers

QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
PROMPTS = [[{"role": "user", "content": "how to bake bread"}], [{"role": "user", "content": "fix a bike please"}]] * 4
TEXTS = ["mix water", "be careful then", "no", "grow tomatoes, or bread", "", "thanks", "mix flour " * 9, "no thanks"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    save_classifiers(root, width=64, heads=2)
    return root


def scores(spec, prompts=PROMPTS, texts=TEXTS):
    """By vLLM and by transformers, with what reading cost."""
    by_vllm = load_reward("r", spec)
    ours = load_reward("r", RewardSpec(**spec.model_dump(exclude={"engine", "vllm"})))
    try:
        return by_vllm.score(prompts, texts, {}), ours.score(prompts, texts, {})
    finally:
        close_llm(by_vllm.scorer.llm)


def check_same(spec, **given):
    (theirs, their_cost), (ours, our_cost) = scores(spec, **given)
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    assert np.std(ours) > 0.01
    assert (their_cost.reward_tokens, their_cost.flops) == (our_cost.reward_tokens, our_cost.flops)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"head": "good"}),
        ("llama", {"head": 0, "sign": -1, "scale": {"mean": 0.1, "std": 2.0}}),
        ("gpt2", {}),  # its end token is no padding, and speaks for the row
        ("bert", {}),
    ],
)
def test_scores_are_those_of_transformers(folders, name, more):
    check_same(RewardSpec(model=str(folders / name), engine="vllm", vllm=QUICK, **more))


@pytest.mark.vllm
@pytest.mark.slow
def test_the_demos_kind_of_reward_is_scored_alike(wide):
    """Its template ends in the end token; padding is another."""
    check_same(RewardSpec(model=str(wide.reward), engine="vllm", vllm=QUICK))


@pytest.mark.vllm
@pytest.mark.slow
def test_padding_behind_a_text_speaks_in_neither_engine(folders, tmp_path):
    """Where the end token is the padding token, transformers lets the token before it speak."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "llama")
    tokenizer.pad_token = tokenizer.eos_token
    for file in (folders / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_same(RewardSpec(model=str(tmp_path), head="good", engine="vllm", vllm=QUICK))


@pytest.mark.vllm
@pytest.mark.slow
def test_a_pair_has_its_types(folders, tmp_path):
    for file in (folders / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = RewardSpec(model=str(tmp_path), pair=True, engine="vllm", vllm=QUICK)
    check_same(spec, prompts=["how to bake bread"] * len(TEXTS))


@pytest.mark.vllm
def test_what_vllm_does_not_score_with_is_told(wide, tmp_path):
    config = BartConfig(
        vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_labels=1,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    save(tmp_path, BartForSequenceClassification(config), llama_tokenizer())
    with pytest.raises(RewardError, match="is an encoder-decoder, which vLLM does not score with; write engine: trans"):
        load_reward("r", RewardSpec(model=str(tmp_path), engine="vllm"))
    with pytest.raises(ConfigError, match=r"vllm.max_model_len 500 is more than the 128 tokens"):
        load_reward("r", RewardSpec(model=str(wide.reward), engine="vllm", vllm={"max_model_len": 500}))


def test_scores_of_two_engines_have_journals_of_their_own(tiny):
    specs = [RewardSpec(model=str(tiny.reward)), RewardSpec(model=str(tiny.reward), engine="vllm")]
    assert len({reward_key(spec) for spec in specs}) == 2
