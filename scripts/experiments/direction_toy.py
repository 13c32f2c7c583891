"""A policy so small that every group of roll-outs can be counted, behind TRL's real trainer.

The policy is a table: logits over four tokens after each prefix. TRL scores, masks, weighs and differentiates it as it
does any causal language model. Sampling alone is replaced, by TRL's own `rollout_func`, which hands over every group of
four completions. The sampler's probabilities are eighths, so that one batch can hold every group exactly as often as it
is drawn: 4096 groups, of which 126 differ in more than the order of their completions.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import GRPOConfig

from iama.arrays import Floats
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import Operator
from trainers.nonlinear_grpo import NonlinearGRPOTrainer

TOKENS = ("<pad>", "<end>", "a", "b")
PAD, END, A, B = range(4)
COMPLETIONS = ((END,), (A, END), (B, END), (A, A, END), (A, A, A, END), (A, A, A, A))
"""All that the policy can say. The last one never ends, and is cut at four tokens."""
EIGHTHS = (1, 2, 2, 1, 1, 1)
"""Probabilities of the completions under the sampler."""
IS_CUT = np.array([y[-1] != END for y in COMPLETIONS])
GROUP = 4
MAX_LENGTH = max(map(len, COMPLETIONS))
IMPOSSIBLE = -1e4
"""Logit of a token that no completion has after a prefix."""
PREFIXES = sorted({y[:t] for y in COMPLETIONS for t in range(len(y))}, key=lambda prefix: (len(prefix), prefix))


def all_groups(size: int) -> list[tuple[int, ...]]:
    """All groups of so many completions, up to their order."""
    return list(itertools.combinations_with_replacement(range(len(COMPLETIONS)), size))


def group_counts(size: int) -> list[int]:
    """How often each of them stands among the `8^size` ordered draws of the sampler."""
    counts = []
    for group in all_groups(size):
        times = Counter(group)
        orders = math.factorial(size) // math.prod(math.factorial(m) for m in times.values())
        counts.append(orders * math.prod(EIGHTHS[y] ** m for y, m in times.items()))
    return counts


# The policy. --------------------------------------------------------------------------------------------


class TableConfig(PretrainedConfig):
    """Configuration of the policy."""

    model_type = "iama_table"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"vocab_size": len(TOKENS), "pad_token_id": PAD, "eos_token_id": END, **kwargs})
        self.hidden_size = len(PREFIXES) + 1


class Prefixes(PreTrainedModel):
    """What stands for a transformer's layers: a prompt of one token and a prefix to the prefix's number, one-hot."""

    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        number = {prefix: i for i, prefix in enumerate(PREFIXES)}
        follows = torch.full((len(PREFIXES) + 1, len(TOKENS)), len(PREFIXES))  # the last row: no prefix
        for prefix, token in itertools.product(PREFIXES, range(len(TOKENS))):
            follows[number[prefix], token] = number.get((*prefix, token), len(PREFIXES))
        self.register_buffer("follows", follows)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Hidden states `[B, 1 + T, prefixes + 1]`."""
        state = torch.zeros(len(input_ids), dtype=torch.long)
        states = [state]
        for tokens in input_ids[:, 1:].T:
            state = self.follows[state, tokens]
            states.append(state)
        one_hot = torch.nn.functional.one_hot(torch.stack(states, dim=1), len(PREFIXES) + 1)
        return BaseModelOutput(last_hidden_state=one_hot.to(torch.float32))


class TablePolicy(PreTrainedModel, GenerationMixin):
    """The policy: its only weights are the logits after each prefix."""

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = Prefixes(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, len(TOKENS), bias=False)
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The table."""
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        """Logits `[B, 1 + T, V]`."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def take(self, logits: torch.Tensor) -> None:
        """Take the table `[prefixes, V]`."""
        with torch.no_grad():
            self.lm_head.weight.zero_()
            self.lm_head.weight[:, : len(PREFIXES)] = logits.T.float()


def sampler_logits() -> torch.Tensor:
    """Logits `[prefixes, V]`, float64, of the policy that says each completion with its `EIGHTHS`."""
    mass = torch.zeros(len(PREFIXES), len(TOKENS), dtype=torch.float64)
    for y, weight in zip(COMPLETIONS, EIGHTHS, strict=True):
        for t, token in enumerate(y):
            mass[PREFIXES.index(y[:t]), token] += weight
    return torch.where(mass > 0, (mass / mass.sum(dim=1, keepdim=True)).log(), IMPOSSIBLE)


def token_logps(logits: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of the tokens of each completion."""
    logps = logits.log_softmax(dim=1)
    return [torch.stack([logps[PREFIXES.index(y[:t]), token] for t, token in enumerate(y)]) for y in COMPLETIONS]


def law(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities `[Y]` of the completions."""
    return torch.stack([logps.sum() for logps in token_logps(logits)]).exp()


def kl(from_logits: torch.Tensor, logits: torch.Tensor) -> float:
    """KL of two policies, in nats a completion."""
    p, q = law(from_logits), law(logits)
    return float((p * (p / q).log()).sum())


def kl_gradient(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gradient `[prefixes, V]` of the KL to a reference, in nats a completion."""
    logits = logits.clone().requires_grad_()
    p = law(logits)
    (p * (p / law(reference)).log()).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


def at_distance(direction: torch.Tensor, distance: float) -> torch.Tensor:
    """The sampler's logits moved along a direction until the KL of the sampler to them is `distance` nats."""
    start = sampler_logits()
    direction = torch.where(start > IMPOSSIBLE / 2, direction, 0.0)
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kl(start, start + middle * direction) > distance else (middle, high)
    return start + low * direction


def true_gradient(
    logits: torch.Tensor, operator: Operator, rewards_Y: Floats, *, finished_only: bool = False
) -> torch.Tensor:
    """Gradient `[prefixes, V]` of the value under the operator: `sum_y (first variation at y) grad p(y)`.

    With `finished_only` the value is that of the policy given that it ends.
    """
    logits = logits.clone().requires_grad_()
    p = law(logits)
    if finished_only:
        p = p * torch.tensor(~IS_CUT)
        p = p / p.sum()
    phi = operator.first_variation(p.detach().numpy(), rewards_Y)
    (torch.from_numpy(phi) * p).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


# TRL's trainer on it. -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Fields of GRPOConfig, and the policy that TRL differentiates; `sampler_logits` draw the groups.

    `is_engine`: the sampler is another engine, whose log-probabilities TRL is given. Otherwise it is the policy before
    earlier updates on the same roll-outs, whose log-probabilities TRL computes.
    """

    fields: Mapping[str, Any]
    logits: torch.Tensor
    is_engine: bool = False
    size: int = GROUP


class Unchecked(NonlinearGRPOTrainer):
    """The trainer with any option: those that it refuses are measured too."""

    def _check_options(self) -> None:
        """Let everything pass."""


class Counted:
    """Every group, scored and weighed by the real trainer: what a step of TRL would take."""

    def __init__(self, case: Case, operator: Operator, rewards_Y: Floats, trainer_class: Any = Unchecked) -> None:
        self.trainer = make_trainer(case, operator, rewards_Y, trainer_class)
        self.policy: Any = self.trainer.model
        self.policy.take(case.logits if case.is_engine else sampler_logits())
        self._size, self._counts = case.size, torch.tensor(group_counts(case.size))
        self._roll_outs = self.trainer._generate_and_score_completions([{"prompt": "a"}] * self._num_rows)
        self.policy.take(case.logits)

    def gradient(self) -> torch.Tensor:
        """Gradient `[prefixes, V]`, uphill, of a step whose batch holds each group as often as it is drawn."""
        return self._gradient(
            torch.arange(self._num_rows).repeat_interleave(self._counts.repeat_interleave(self._size))
        )

    def gradient_of_few(self, num_rows: int) -> torch.Tensor:
        """Expected gradient `[prefixes, V]`, uphill, where a loss holds so many completions of one group."""
        num_parts = self._size // num_rows
        shares = (self._counts / self._counts.sum()).repeat_interleave(num_parts) / num_parts
        rows = torch.arange(num_rows)
        return sum(
            (share * self._gradient(rows + num_rows * part) for part, share in enumerate(shares.tolist())),
            start=torch.zeros(len(PREFIXES), len(TOKENS), dtype=torch.float64),
        )

    def kl_gradient(self, reference: torch.Tensor) -> torch.Tensor:
        """Gradient, uphill, of TRL's KL penalty at beta = 1 alone: all advantages are taken as zero."""
        logps = pad_sequence(
            [token_logps(reference)[y].float() for group in all_groups(self._size) for y in group], batch_first=True
        )
        self._roll_outs |= {"ref_per_token_logps": logps, "advantages": torch.zeros(len(logps))}
        self.trainer.beta = 1.0
        return self.gradient()

    @property
    def _num_rows(self) -> int:
        return self._size * len(self._counts)

    def _gradient(self, rows: torch.Tensor) -> torch.Tensor:
        batch = {name: value[rows] if value.dim() else value for name, value in self._roll_outs.items()}
        batch["num_items_in_batch"] = batch["completion_mask"].sum()  # as TRL counts it for the batch
        self.trainer.current_gradient_accumulation_steps = self.trainer.args.steps_per_generation = 1
        self.policy.zero_grad()
        self.trainer._compute_loss(self.policy, batch).backward()
        downhill: torch.Tensor = self.policy.lm_head.weight.grad[:, : len(PREFIXES)].T.double()
        return -downhill


def make_trainer(case: Case, operator: Operator, rewards_Y: Floats, trainer_class: Any) -> NonlinearGRPOTrainer:
    """The real trainer, in its training mode, which is handed groups instead of sampling them."""
    drawn = [y for group in all_groups(case.size) for y in group]
    fields: dict[str, Any] = {
        "per_device_train_batch_size": len(drawn),
        "num_generations": case.size,
        "max_completion_length": MAX_LENGTH,
        "beta": 0.0,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "output_dir": tempfile.gettempdir(),
        **case.fields,
    }
    sampled = token_logps(sampler_logits())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(rewards_Y[COMPLETIONS.index(tuple(ids))]) for ids in completion_ids]

    def roll_out(prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [[A]] * len(prompts),
            "completion_ids": [list(COMPLETIONS[y]) for y in drawn],
            "logprobs": [sampled[y].tolist() for y in drawn],
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is warned of is measured here
        trainer: NonlinearGRPOTrainer = trainer_class(
            model=TablePolicy(TableConfig()),
            reward_funcs=[reward],
            args=GRPOConfig(**fields),
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=_tokenizer(),
            rollout_func=roll_out,
            objective=Objective([Criterion("reward", operator)]),
        )
    trainer.model.train()
    if case.is_engine:  # the groups are there, so that vLLM is not needed
        trainer.use_vllm = True
        trainer._last_loaded_step = trainer.state.global_step
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=TOKENS[A])),
        pad_token=TOKENS[PAD],
        eos_token=TOKENS[END],
    )
