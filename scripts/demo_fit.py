"""Fit the demo world's models from scratch with TRL on the CPU: tokenizer, base policy, proxy reward models."""

import logging
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar as disable_weights_bar
from transformers.utils.logging import set_verbosity_error
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from scripts.demo_world import MAX_ANSWER_TOKENS, STYLES, Message, Topic, parse_answer, style_of

BOS, END, PAD, UNKNOWN, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY, CONTEXT = 512, 256  # at most
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.,?!'-:;()"
RARE_PIECE = -20.0  # log probability of a single character: spelling is the last resort
POLICY_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
REWARD_SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}

BATCH_SIZE = 8  # steps, not tokens, sharpen the policy's grammar
POLICY_RATE, REWARD_RATE = 2e-3, 1.5e-3
# Small embeddings under a large last norm: what the norm scales up, a step of Adam moves further. So tied
# embeddings learn in few steps to give next to nothing to the words that the grammar rules out.
INITIAL_RANGE, LAST_NORM = 0.04, 4.0

Report = Callable[[int, int], None]  # called with (steps done, steps in all)


Row = TypeVar("Row")


class _Progress(TrainerCallback):
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.report(state.global_step, state.max_steps)


def quieten(num_threads: int = 1) -> None:
    """Set this process's thread count and silence what libraries print that is no news to a user."""
    torch.set_num_threads(num_threads)
    set_verbosity_error()
    disable_progress_bar()
    disable_weights_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")  # TRL 1.16 sets it


def question(prompt: str) -> list[Message]:
    """Put a prompt's text into TRL's conversational format."""
    return [{"role": "user", "content": prompt}]


def reply(answer: str) -> list[Message]:
    """Put an answer's text into TRL's conversational format."""
    return [{"role": "assistant", "content": answer}]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Fit a lower-casing Unigram tokenizer with the chat template; any text encodes.

    Its pieces are the texts' words, by frequency, and single characters, which spell every other word. BPE
    would spend most of a small vocabulary on parts of words, and an answer's length in tokens would depend
    on its nouns.
    """
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), "isolated"),
        ]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    words = Counter(word for text in texts for word, _ in core.pre_tokenizer.pre_tokenize_str(text))
    total = words.total()
    pieces = [(special, 0.0) for special in (PAD, BOS, END, UNKNOWN, USER, ASSISTANT)]
    pieces += [(word, math.log(num / total)) for word, num in sorted(words.items())]
    pieces += [(character, RARE_PIECE) for character in CHARACTERS if character not in words]
    assert len(pieces) <= VOCABULARY
    core.model = models.Unigram(pieces, unk_id=[piece for piece, _ in pieces].index(UNKNOWN))
    core.add_special_tokens([PAD, BOS, END, UNKNOWN, USER, ASSISTANT])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _llama_config(tokenizer: PreTrainedTokenizerFast, shape: dict[str, int], **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=INITIAL_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
        **options,
    )


def bucketed(rows: Sequence[Row], length: Callable[[Row], int], batch_size: int, seed: int) -> list[Row]:
    """Reorder rows so that consecutive batches hold rows of like length: less padding, hence less time."""
    rng = random.Random(seed)
    shuffled = rng.sample(rows, len(rows))
    window = 40 * batch_size
    ordered = [
        row for start in range(0, len(rows), window) for row in sorted(shuffled[start : start + window], key=length)
    ]
    batches = [ordered[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def _trainer_options(out: Path, seed: int, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "seed": seed,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": learning_rate,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": CONTEXT,
    }


def fit_policy(
    tokenizer: PreTrainedTokenizerFast,
    exchanges: Sequence[tuple[str, str]],
    out: Path,
    seed: int,
    report: Report,
) -> None:
    """Fit the base policy on (prompt, answer) pairs with SFTTrainer and save it with its tokenizer to ``out``."""
    set_seed(seed)
    model = LlamaForCausalLM(_llama_config(tokenizer, POLICY_SHAPE))
    torch.nn.init.constant_(model.model.norm.weight, LAST_NORM)
    ordered = bucketed(exchanges, lambda row: len(row[1].split()), BATCH_SIZE, seed)
    rows = [{"prompt": question(prompt), "completion": reply(answer)} for prompt, answer in ordered]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_trainer_options(out, seed, POLICY_RATE)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_Progress(report)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    _save(model, tokenizer, out)


def _longer(pair: tuple[str, str, str]) -> int:
    return max(len(answer.split()) for answer in pair[1:])


def fit_reward_model(
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str, str]],
    out: Path,
    name: str,
    seed: int,
    report: Report,
) -> None:
    """Fit a one-output classifier on (prompt, chosen, rejected) with RewardTrainer and save it to ``out``."""
    set_seed(seed)
    config = _llama_config(tokenizer, REWARD_SHAPE, id2label={0: name}, label2id={name: 0})
    model = LlamaForSequenceClassification(config)
    rows = [
        {"prompt": question(prompt), "chosen": reply(chosen), "rejected": reply(rejected)}
        for prompt, chosen, rejected in bucketed(pairs, _longer, BATCH_SIZE, seed)
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**_trainer_options(out, seed, REWARD_RATE)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_Progress(report)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _save(model, tokenizer, out)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]], batch_size: int = 128) -> torch.Tensor:
    """Score (prompt, answer) rows with a reward model; returns shape (rows,)."""
    texts = [tokenizer.apply_chat_template(question(prompt) + reply(answer), tokenize=False) for prompt, answer in rows]
    scores = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        scores.append(model(**batch).logits[:, 0])
    return torch.cat(scores)


def measure_reward_model(folder: Path, pairs: Sequence[tuple[str, str, str]]) -> float:
    """Return the share of (prompt, chosen, rejected) in which the saved model scores the chosen one higher."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    chosen = score(model, tokenizer, [(prompt, answer) for prompt, answer, _ in pairs])
    rejected = score(model, tokenizer, [(prompt, answer) for prompt, _, answer in pairs])
    return float((chosen > rejected).float().mean())


@torch.no_grad()
def sample_policy(model: Any, tokenizer: Any, prompts: Sequence[str], num: int) -> list[list[str]]:
    """Sample ``num`` answers a prompt at temperature 1; one list of answers a prompt."""
    texts = [
        tokenizer.apply_chat_template(question(prompt), tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = tokenizer(
        texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    tokens = model.generate(
        **batch, num_return_sequences=num, do_sample=True, top_k=0, max_new_tokens=MAX_ANSWER_TOKENS
    )
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answers[start : start + num] for start in range(0, len(answers), num)]


def measure_policy(policy: Path, prompts: Sequence[tuple[Topic, str]], num: int, seed: int) -> dict[str, Any]:
    """Sample the saved policy and return its parse rate and the share of each style, by kind of prompt."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    set_seed(seed)
    samples = sample_policy(model, tokenizer, [prompt for _, prompt in prompts], num)
    styles: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for (topic, _), answers in zip(prompts, samples, strict=True):
        parsed = [parse_answer(answer) for answer in answers]
        styles[topic.risky].update(style_of(sentences) if sentences else "unparsed" for sentences in parsed)
    total = sum(count.total() for count in styles.values())
    shares = {
        "risky" if risky else "benign": {style: count[style] / count.total() for style in STYLES}
        for risky, count in styles.items()
    }
    num_unparsed = sum(count["unparsed"] for count in styles.values())
    return {"num_samples": total, "parse_rate": 1 - num_unparsed / total, "style_shares": shares}
