"""Tiny classifiers with tokenizers and templates of their own, and a watch on what they read."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

from iama.rewards.classifier import Classifier
from iama.rewards.reward import Reward

CONTEXT = 256
CORPUS = ["please tell me how to bake bread, grow tomatoes or fix a bike; mix water and flour, be careful, no thanks"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}{{ eos_token }}"
)
GPT2_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
RECURRENT = Qwen3NextConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
ENCODER_DECODER = BartConfig(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16,
)  # fmt: skip


def make_tokenizer(special, **named):
    """Bytes and merges of a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def llama_tokenizer():
    """Adds BOS itself; its template writes BOS too."""
    special = ["<s>", "</s>", "<pad>"]
    tokenizer = make_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def gpt2_tokenizer():
    """One token is begin, end and padding."""
    end = "<|endoftext|>"
    tokenizer = make_tokenizer([end], bos_token=end, eos_token=end, pad_token=end)
    tokenizer.chat_template = GPT2_TEMPLATE
    return tokenizer


def bert_tokenizer():
    special = ["[CLS]", "[SEP]", "<pad>"]
    tokenizer = make_tokenizer(special, cls_token="[CLS]", sep_token="[SEP]", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}[SEP]{% endfor %}"
    return tokenizer


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_classifiers(root, width=32, heads=4):
    """Classifiers on disk: Llama with grouped queries and two outputs, GPT-2 without a padding token, BERT."""
    torch.manual_seed(0)
    sizes = {**LLAMA, "hidden_size": width, "num_attention_heads": heads}
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        **sizes, num_key_value_heads=heads // 2, vocab_size=300, max_position_embeddings=CONTEXT, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    save(root / "llama", LlamaForSequenceClassification(config), tokenizer)
    config = GPT2Config(
        vocab_size=300, n_embd=width, n_layer=2, n_head=heads, n_positions=CONTEXT, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, num_labels=1,
    )  # fmt: skip
    save(root / "gpt2", GPT2ForSequenceClassification(config), gpt2_tokenizer())
    config = BertConfig(
        **sizes, vocab_size=300, max_position_embeddings=CONTEXT, initializer_range=0.2, pad_token_id=2, num_labels=1
    )
    save(root / "bert", AutoModelForSequenceClassification.from_config(config), bert_tokenizer())


def tiny_classifier(config, **changes):
    """A reward on a random classifier of a family, with the tokenizer whose padding token ends its texts."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 300, "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0, "num_labels": 1,
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(type(config)(**{**config.to_dict(), **fields, **changes}))
    return Reward("r", Classifier(model.eval(), gpt2_tokenizer(), 0, 1, 0, CONTEXT, 3, "tiny", "reward 'r'"))


@contextmanager
def watched(reward):
    """The ids that each forward pass of the reward's model is given, a list a row, padding included."""
    model, passes = reward.classifier.model, []
    forward = model.forward

    def noting(*args, input_ids, **inputs):
        passes.append(input_ids.tolist())
        return forward(*args, input_ids=input_ids, **inputs)

    model.forward = noting
    try:
        yield passes
    finally:
        del model.forward


def one_by_one(reward):
    """The same classifier with one row a pass, so that no token that it is given is padding."""
    return Reward(reward.name, replace(reward.classifier, batch_size=1))
