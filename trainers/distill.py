"""A reward distilled from another's scores: a classifier learns the teacher's margins between answers to one prompt.

The loss is the squared difference of margins of Fisch et al. 2025 (arXiv 2405.19316, reward model distillation), here
with a reward model as the student, so that an ensemble's score costs one model. Only margins within a prompt are
learnt: what the student adds to all answers of a prompt is its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

from iama.arrays import Floats
from iama.config.specs import RewardSpec
from iama.errors import DataError, ModelError
from iama.files import building
from iama.models.checkpoint import check_token_ids, read_outline
from iama.models.loading import load_model, loading, pick_device
from iama.prompts.conversations import check_exchanges
from iama.prompts.render import Prompt, prompt_name, prompt_text, render_exchange
from iama.rewards.ensemble import within_prompt_spread
from iama.rewards.load import load_reward
from trainers.run.build import one_line_errors

Pair = tuple[int, int, int]  # a prompt and two of its answers, by index

FILE_NAME = "distillation.json"
WARMUP_SHARE = 0.05
ENDS_SHARE = 0.1  # of the steps, over which a first and a last loss are averaged


@dataclass(frozen=True)
class ScoredAnswers:
    """Distinct answers to one prompt that have a score, and the teacher's scores `[S]`."""

    prompt: Prompt
    texts: list[str]
    scores: Floats


@dataclass(frozen=True)
class DistillSettings:
    """What is trained and how; `label` names the student's output, `held_out` is a share of the prompts.

    `base` is a model directory, a causal language model or a classifier of one output; all its weights are trained.
    A step reads `batch_size` pairs.
    """

    base: str
    label: str
    max_steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-5
    held_out: float = 0.1
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Distilled:
    """What became of it. Losses and margins are in units of `spread`, the teacher's within-prompt standard deviation.

    `num_unscored` of `num_pairs` pairs of distinct answers were left out because one has no score. `agreement` is the
    share of held-out pairs that the student orders as the teacher does (its ties count half, the teacher's are left
    out), `r_squared` what of the squared margins there it explains, 1 at best.
    """

    num_trained: int
    num_held_out: int
    num_pairs: int
    num_unscored: int
    spread: float
    first_loss: float
    last_loss: float
    agreement: float
    r_squared: float


class MarginTrainer(RewardTrainer):
    """TRL's reward trainer with the squared-margin loss; its column `margin` is the teacher's."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`margin_loss` of a batch, whose first half are the answers that the teacher prefers; logs as TRL does."""
        plain = {key: value for key, value in inputs.items() if key != "margin"}
        _, outputs = super().compute_loss(model, plain, True, num_items_in_batch)
        first, second = outputs.logits.squeeze(-1).float().chunk(2)
        loss = margin_loss(first, second, inputs["margin"])
        return (loss, outputs) if return_outputs else loss


def margin_loss(first_R: torch.Tensor, second_R: torch.Tensor, margins_R: torch.Tensor) -> torch.Tensor:
    """Mean of ((r1 - r2) - (t1 - t2))^2 over pairs: rewards of the student, margins of the teacher."""
    return (first_R - second_R - margins_R).square().mean()


def distill(
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    settings: DistillSettings,
    out: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> Distilled:
    """Train a classifier on the margins of scores `[P][S]` (NaN: missing) of texts, and save it with its tokenizer.

    `advance` gets numbers of steps. `out` appears whole or not at all, and what is reported was measured by the
    saved model. Raises `DataError` for scores that hold no margins, `ModelError` for a base that cannot be used,
    `RunError` where `out` is in the way.
    """
    with building(out) as folder:
        return _distill(prompts, texts, scores, settings, folder, advance)


def _distill(
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    settings: DistillSettings,
    folder: Path,
    advance: Callable[[int], None],
) -> Distilled:
    groups, num_pairs, num_unscored = scored_answers(prompts, texts, scores)
    trained, held_out = split(groups, settings.held_out, settings.seed)
    spread = within_prompt_spread(group.scores for group in trained)
    if not spread:
        raise DataError("all answers of a prompt have the same score, so there are no margins to learn")
    tokenizer, ids = _tokenized(trained, settings)
    losses = _train(trained, ids, spread, tokenizer, settings, folder, advance)
    agreement, r_squared = compare(held_out, _student_scores(held_out, folder, settings), spread)
    size = max(1, round(ENDS_SHARE * len(losses)))
    ends = float(np.mean(losses[:size])), float(np.mean(losses[-size:]))
    result = Distilled(len(trained), len(held_out), num_pairs, num_unscored, spread, *ends, agreement, r_squared)
    record = {"settings": asdict(settings), "result": asdict(result)}
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")
    return result


# What the teacher says. ---------------------------------------------------------------------------------


def scored_answers(
    prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> tuple[list[ScoredAnswers], int, int]:
    """Prompts with two or more scored answers; pairs of distinct answers in all; and those without both scores.

    An answer that was sampled twice counts once, with the mean of the scores that it has. Raises `DataError` where no
    prompt has two.
    """
    groups, num_pairs, num_scored = [], 0, 0
    for prompt, row, values in zip(prompts, texts, scores, strict=True):
        scores_of: dict[str, list[float]] = {text: [] for text in row}
        for text, value in zip(row, values, strict=True):
            if not np.isnan(value):
                scores_of[text].append(value)
        known = {text: float(np.mean(values)) for text, values in scores_of.items() if values}
        num_pairs += len(scores_of) * (len(scores_of) - 1) // 2
        num_scored += len(known) * (len(known) - 1) // 2
        if len(known) > 1:
            groups.append(ScoredAnswers(prompt, list(known), np.asarray(list(known.values()), dtype=np.float64)))
    if not groups:
        raise DataError(
            "no prompt has two different answers with a score, so there are no margins to learn; draw several samples "
            "a prompt (iama pool --n 16) and score them"
        )
    return groups, num_pairs, num_pairs - num_scored


def split(groups: Sequence[ScoredAnswers], share: float, seed: int) -> tuple[list[ScoredAnswers], list[ScoredAnswers]]:
    """Prompts to learn from, and a share of the prompts held out.

    Raises `DataError` as `held_out_prompts` does, and where the held-out scores do not differ.
    """
    learnt, judged = held_out_prompts([group.prompt for group in groups], share, seed, "prompts with margins")
    held_out = [groups[i] for i in judged]
    if not any(np.ptp(group.scores) for group in held_out):
        raise DataError(
            f"none of the {len(judged)} prompts that are held out has answers of different scores, so the student "
            "could not be judged; hold more out, or take another seed"
        )
    return [groups[i] for i in learnt], held_out


def held_out_prompts(prompts: Sequence[Prompt], share: float, seed: int, what: str) -> tuple[list[int], list[int]]:
    """Indices of prompts to learn from, and of a share of the different prompts, which only judge.

    A prompt that occurs several times is on one side only, whether it is written as text or as a message. Raises
    `DataError`, which calls them `what`, for too few.
    """
    by_text: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_text.setdefault(prompt_text(prompt).strip(), []).append(i)
    parts = list(by_text.values())
    order = np.random.default_rng(seed).permutation(len(parts)).tolist()
    num_held_out = max(1, round(share * len(parts)))
    if num_held_out >= len(parts):
        raise DataError(f"{len(parts)} different {what} are too few to hold {share:g} of them out; give more prompts")
    learnt, judged = order[num_held_out:], order[:num_held_out]
    return [i for part in learnt for i in parts[part]], [i for part in judged for i in parts[part]]


def draw_pairs(sizes: Sequence[int], number: int, seed: int) -> list[Pair]:
    """Pairs of answers: round by round each prompt's answers in random couples, so that all are read equally often."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    while len(pairs) < number:
        rows: list[Pair] = []
        for group, size in enumerate(sizes):
            order = rng.permutation(size)[: size - size % 2].reshape(-1, 2)
            rows.extend((group, int(i), int(j)) for i, j in order)
        pairs.extend(rows[i] for i in rng.permutation(len(rows)))
    return pairs[:number]


def compare(groups: Sequence[ScoredAnswers], student: Sequence[Sequence[float]], spread: float) -> tuple[float, float]:
    """Agreement and R^2 of `Distilled`, over all pairs of answers to one prompt."""
    agreed, squares, left = [], 0.0, 0.0
    for group, scores in zip(groups, student, strict=True):
        i, j = np.triu_indices(len(scores), k=1)
        scores_S = np.asarray(scores, dtype=np.float64)
        margin_R, wanted_R = scores_S[i] - scores_S[j], (group.scores[i] - group.scores[j]) / spread
        differs = wanted_R != 0
        agreed.append((1 + np.sign(margin_R) * np.sign(wanted_R))[differs] / 2)
        squares += float(np.square(wanted_R).sum())
        left += float(np.square(margin_R - wanted_R).sum())
    return float(np.concatenate(agreed).mean()), 1 - left / squares


# The student. -------------------------------------------------------------------------------------------


def _tokenized(groups: Sequence[ScoredAnswers], settings: DistillSettings) -> tuple[Any, list[list[list[int]]]]:
    """The base's tokenizer, and every answer with its prompt as the student will read it; too long ones are refused."""
    source = "--base"
    pick_device(settings.device, "--device")
    outline = read_outline(settings.base, source, "body")
    config, limit = outline.config, outline.context_length
    with loading(settings.base, source):
        tokenizer = AutoTokenizer.from_pretrained(settings.base, trust_remote_code=False)
    check_token_ids(outline, tokenizer, settings.base, source)
    check_exchanges(tokenizer, [group.prompt for group in groups], source)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ModelError(
            f"{source}: the classifier {settings.base!r} has {config.num_labels} outputs, and a reward has one; give a "
            "classifier of one output, or a language model"
        )
    ids = [[render_exchange(tokenizer, group.prompt, text) for text in group.texts] for group in groups]
    for group, rows in zip(groups, ids, strict=True):
        longest = max(map(len, rows))
        if limit is not None and longest > limit:
            raise DataError(
                f"the prompt {prompt_name(group.prompt)} with an answer has {longest} tokens, but "
                f"{settings.base!r} reads at most {limit}; leave it out, or give another base"
            )
    return tokenizer, ids


def _load_student(settings: DistillSettings) -> Any:
    """The base as a classifier of one output; only its head may be missing, which then begins at random."""
    labels = {"num_labels": 1, "id2label": {0: settings.label}, "label2id": {settings.label: 0}}
    options = {"dtype": torch.float32, "trust_remote_code": False, **labels}
    return load_model(AutoModelForSequenceClassification, settings.base, "--base", new_head=True, **options)


def _train(
    groups: Sequence[ScoredAnswers],
    ids: Sequence[Sequence[Sequence[int]]],
    spread: float,
    tokenizer: Any,
    settings: DistillSettings,
    folder: Path,
    advance: Callable[[int], None],
) -> list[float]:
    """Train and save into `folder`; the loss of every step."""
    set_seed(settings.seed)
    model = _load_student(settings)
    pairs = draw_pairs([len(g.texts) for g in groups], settings.max_steps * settings.batch_size, settings.seed)
    rows = [_row(ids[g], groups[g].scores / spread, i, j) for g, i, j in pairs]
    with one_line_errors():
        trainer = MarginTrainer(
            model=model,
            args=RewardConfig(**_arguments(settings, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[_Progress(advance)],
        )
    trainer.remove_callback(PrinterCallback)
    with one_line_errors("training failed"):
        trainer.train()
    # By the model itself: a trainer would put a pickle beside the weights.
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _row(ids: Sequence[Sequence[int]], scores: Floats, i: int, j: int) -> dict[str, Any]:
    """A pair as TRL's trainer takes it tokenized, the answer that the teacher prefers first."""
    if scores[i] < scores[j]:
        i, j = j, i
    return {"chosen_ids": list(ids[i]), "rejected_ids": list(ids[j]), "margin": float(scores[i] - scores[j])}


def _arguments(settings: DistillSettings, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "seed": settings.seed,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(WARMUP_SHARE * settings.max_steps),
        "max_length": None,  # a pair that is too long would leave the data unseen
        "use_cpu": pick_device(settings.device).type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _student_scores(groups: Sequence[ScoredAnswers], folder: Path, settings: DistillSettings) -> list[list[float]]:
    """By the saved model, as anybody will load it."""
    reward = load_reward("student", RewardSpec(model=str(folder), device=settings.device))
    return [reward.score([group.prompt] * len(group.texts), group.texts, {})[0] for group in groups]


class _Progress(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._advance(1)
