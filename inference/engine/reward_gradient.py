"""A reward classifier read from embeddings instead of token ids, so that a gradient tells what would raise the reward.

Gradients mean something only where policy and reward share their tokens
(`inference.engine.vocabulary.check_shared_vocabulary`). A response's ids stay the policy's: they are put between those
of the reward's template (`around`), never tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from iama.errors import ConfigError
from iama.models.flops import ModelSize, backward_flops, forward_flops
from iama.models.inputs import accepted_arguments, pad
from iama.models.loading import is_out_of_memory
from iama.prompts.render import Prompt, prompt_name, render_exchanges
from iama.rewards.classifier import Classifier, filling
from iama.rewards.reward import Reward
from inference.engine.kv_cache import SlotCache
from inference.engine.reward_rows import num_before_padding, num_common
from inference.engine.rows import Rows, differs
from inference.engine.vocabulary import INSTEAD, special_tokens

NUM_WORDS = 3
PROBE = (9, 4, 7)  # tokens of the trial's rows
_words: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


def around(reward: Reward, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Token ids of the reward's template before and after a response to a prompt.

    Those after it end with the token that speaks for the row: padding behind it, which a classifier ignores, is left
    out. So `before + response + after`, read to its last token, is what the reward scores. Where the text before a
    response merges with its first word (a plain prompt, or a template such as "Bot: "), that holds of a response that
    begins with a space, as policies write it there; any other is the same text in other tokens. Raises `ConfigError`
    for a template that does not show a response as it is, or merges with it even so.
    """
    classifier = reward.classifier
    assert classifier is not None, "a function has no template"
    for lead in (" ",) if isinstance(prompt, str) else ("", " "):
        before, after, misread = _split(classifier.tokenizer, prompt, lead)
        if misread is None:
            return before, after[: num_before_padding(after, classifier.pad_id)]
    raise ConfigError(
        f"{classifier.source}: where a response begins and ends cannot be told in its template "
        f"({misread} after {prompt_name(prompt)}); {INSTEAD}"
    )


def _split(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, lead: str) -> tuple[list[int], list[int], str | None]:
    """What stands before and after words that follow `lead`, and what a word is misread as."""
    words = _distinct_words(tokenizer)
    rendered = render_exchanges(tokenizer, [prompt] * len(words), [lead + word for word in words])
    num_before = min(num_common(rendered[0], row) for row in rendered)
    num_after = min(num_common(rendered[0][::-1], row[::-1]) for row in rendered)
    read = [str(tokenizer.decode(row[num_before : len(row) - num_after])) for row in rendered]
    misread = (
        f"{word!r} is {text!r}" for word, text in zip(words, read, strict=True) if text.removeprefix(lead) != word
    )
    return rendered[0][:num_before], rendered[0][len(rendered[0]) - num_after :], next(misread, None)


def _distinct_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the vocabulary that begin and end with different letters, so that they share no token."""
    if tokenizer not in _words:
        special = set(special_tokens(tokenizer).values())
        words: list[str] = []
        for index in range(len(tokenizer)):
            word = str(tokenizer.decode([index])).strip()
            if index in special or not (word.isascii() and word.isalpha() and word.islower()):
                continue
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            distinct = all(word[0] != other[0] and word[-1] != other[-1] for other in words)
            if distinct and str(tokenizer.decode(ids)).strip() == word:
                words.append(word)
            if len(words) == NUM_WORDS:
                break
        _words[tokenizer] = words
    if len(_words[tokenizer]) < NUM_WORDS:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no {NUM_WORDS} plain words; {INSTEAD}")
    return _words[tokenizer]


class EmbeddedReward:
    """A classifier reward read from input embeddings; its weights are frozen, and get no gradient.

    All is in the model's precision. `embeddings` is the table `[V, D]`, as the model scales it; `source` names the
    reward in errors.
    """

    def __init__(self, reward: Reward) -> None:
        """Raise `ConfigError` for a model that does not score embeddings as it scores their tokens."""
        assert reward.classifier is not None, "a function reads texts"
        self._classifier = reward.classifier
        self.source = self._classifier.source
        self._model: Any = self._classifier.model
        self._model.requires_grad_(False)
        zero, one = reward.finish(["", ""], ["", ""], [0.0, 1.0])  # the reward's scale, which is affine
        self._shift, self._slope = zero, one - zero
        self.embeddings = embedding_table(self._model)
        self._takes_positions = "position_ids" in accepted_arguments(self._model)
        self._padding = self._fitting_padding()

    def scores(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores `[R]` of rows of embeddings, `[T, D]` each, of any lengths; differentiable in them.

        A row is read to its end: the last one speaks, where the model lets the last token speak.
        """
        return self.scaled(self._logits(rows, self._padding))

    @property
    def classifier(self) -> Classifier:
        """The model, with its tokenizer."""
        return self._classifier

    @property
    def slope(self) -> float:
        """What a unit of the model's output is in the reward."""
        return self._slope * self._classifier.sign

    def scaled(self, logits_R: torch.Tensor) -> torch.Tensor:
        """Scores of the output that is the reward."""
        return self._shift + self.slope * logits_R

    def _logits(self, rows: Sequence[torch.Tensor], padding: str) -> torch.Tensor:
        """The output that is the reward, `[R]`; `padding` is left, right or none (a row at a time)."""
        if padding == "none":
            return torch.cat([self._logits([row], "left") for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        gaps = (width - lengths).tolist()
        left = padding == "left"
        inputs_RTD = torch.stack(
            [
                nn.functional.pad(row, (0, 0, gap, 0) if left else (0, 0, 0, gap))
                for row, gap in zip(rows, gaps, strict=True)
            ]
        )
        starts_R1 = (width - lengths)[:, None] if left else torch.zeros(len(rows), 1, dtype=torch.long)
        places_RT = torch.arange(width)[None, :] - starts_R1
        mask_RT = (places_RT >= 0) & (places_RT < lengths[:, None])
        inputs: dict[str, Any] = {"attention_mask": mask_RT.long().to(inputs_RTD.device)} if any(gaps) else {}
        if self._takes_positions and left:
            inputs["position_ids"] = places_RT.clamp(min=0).to(inputs_RTD.device)
        logits: torch.Tensor = self._model(inputs_embeds=inputs_RTD, **inputs).logits[:, self._classifier.head]
        return logits

    def _fitting_padding(self) -> str:
        """How rows of unequal length are brought together, so that their scores are those of their tokens."""
        classifier = self._classifier
        ids = _probe_rows(classifier)
        reason = ""
        for padding in ("left", "right", "none"):
            rows = [self.embeddings[row].detach().requires_grad_() for row in ids]
            try:
                expected = torch.tensor(classifier.score_ids(ids)) * classifier.sign
                scores = self._logits(rows, padding)
                gradients = torch.autograd.grad(scores.sum(), rows)
            except Exception as error:  # whatever a model does that cannot be read so
                if is_out_of_memory(error):
                    raise
                reason = f"cannot ({type(error).__name__})"
                continue
            is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            if is_finite and not differs(scores.detach().float().cpu(), expected, self._model.dtype):
                return padding
            reason = "gives other scores"
        raise ConfigError(
            f"{classifier.source}: {classifier.path!r} asked to score embeddings in place of tokens {reason}; {INSTEAD}"
        )


class GradientRows(Rows):
    """Rows of a classifier that also tell how a reward changes with the embeddings of tokens that they are given.

    Earlier tokens are constants: exact, since they attend to none after them.
    """

    def __init__(self, model: Any, source: str) -> None:
        super().__init__(model, source)
        self._cache = _GradientCache(model.device)

    def extend_with_gradient(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], places: Sequence[int], head: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens to each row; logits `[R, labels]`, and the gradient `[R, D]` of output `head` with respect to
        the embedding of each row's token in `places`, counted from its first new one."""
        logits, gradients = self._extend(slots, tokens, [[place] for place in places], head)
        return logits, torch.cat(gradients)

    def extend_with_gradients(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], head: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same with the gradients `[T, D]` with respect to all of a row's new tokens."""
        return self._extend(slots, tokens, [range(len(row)) for row in tokens], head)

    def _extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], places: Sequence[Sequence[int]], head: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        counts = np.asarray([len(row) for row in tokens], dtype=np.int64)
        with torch.inference_mode():
            step = self._cache.plan(slots, counts)
        order = step.order.tolist()
        in_line = [tokens[i] for i in order]
        lines = [line for line, i in enumerate(order) for _ in places[i]]
        columns = [step.num_queries - len(tokens[i]) + place for i in order for place in places[i]]
        with torch.enable_grad(), _leaves(self._model, lines, columns) as leaves:
            logits = self._forward(in_line, step).logits
        (gradient_ND,) = torch.autograd.grad(logits[:, head].sum(), leaves)
        self._note_fed(slots, tokens, counts, step)
        back = np.argsort(step.order)
        parts = torch.split(gradient_ND, [len(places[i]) for i in order])
        return logits.detach()[torch.from_numpy(back).to(logits.device)], [parts[line] for line in back]


class _GradientCache(SlotCache):
    """Keeps what it is given, and lets gradients flow through the keys and values of the input."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            return super().update(key_states, value_states, layer_idx)
        with torch.inference_mode():
            keys, values = super().update(key_states.detach(), value_states.detach(), layer_idx)
        return self._spliced(keys, key_states), self._spliced(values, value_states)

    def _spliced(self, held_RHWD: torch.Tensor, states_RHQD: torch.Tensor) -> torch.Tensor:
        """What the rows attend to, with the states of the input in their places."""
        step = self._step
        assert step is not None
        full = held_RHWD.clone()  # the buffer can be in no graph
        if step.real is None:
            full[:, :, step.width - step.num_queries :] = states_RHQD
        else:
            line, query, column = (index.clone() for index in step.real)
            full[line, :, column - (step.end - step.width)] = states_RHQD[line, :, query]
        return full


@contextmanager
def _leaves(model: Any, lines: Sequence[int], columns: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """While the model reads one batch, let the embeddings in these places be leaves; yields them, `[N, D]`."""
    leaves: list[torch.Tensor] = []
    where = torch.tensor(lines, device=model.device), torch.tensor(columns, device=model.device)

    def splice(_module: nn.Module, _inputs: Any, output_RTD: torch.Tensor) -> torch.Tensor:
        assert not leaves, "embeddings are asked for once a pass"
        spliced = output_RTD.detach().clone()
        leaves.append(spliced[where].clone().requires_grad_())
        spliced[where] = leaves[0]
        return spliced

    handle = model.get_input_embeddings().register_forward_hook(splice)
    try:
        yield leaves
    finally:
        handle.remove()


def whole_with_gradient(
    classifier: Classifier, ids: Sequence[Sequence[int]], places: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`extend_with_gradient` for a model that reads rows whole."""
    with torch.enable_grad(), _leaves(classifier.model, range(len(places)), places) as leaves:
        logits = _padded_logits(classifier, ids)
    (gradient_RD,) = torch.autograd.grad(logits[:, classifier.head].sum(), leaves)
    return logits.detach(), gradient_RD


@torch.inference_mode()
def whole(classifier: Classifier, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits `[R, labels]` of rows, read whole."""
    return _padded_logits(classifier, ids)


def _padded_logits(classifier: Classifier, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    device = classifier.model.device
    mask = pad([[1] * len(row) for row in ids], 0, device=device)
    with filling(classifier.model, ids, classifier.pad_id) as filler:
        inputs = pad(ids, filler, device=device)
        logits: torch.Tensor = classifier.model(input_ids=inputs, attention_mask=mask).logits
    return logits


def suffix_backward_flops(size: ModelSize, start: int, count: int) -> float:
    """`backward_flops` of the last `count` tokens of a row, what they attend to before `start` being constant.

    Of that, attention asks for the gradient of one factor only, of each of its two products.
    """
    inside = backward_flops(size, count) - forward_flops(size, 0, count)
    return forward_flops(size, start, count) + inside


def embedding_table(model: Any) -> torch.Tensor:
    """A model's input embeddings `[V, D]`, as the embedding layer gives them (some scale them)."""
    layer = model.get_input_embeddings()
    if type(layer) is nn.Embedding:
        weight: torch.Tensor = layer.weight.detach()
        return weight
    with torch.no_grad():
        table: torch.Tensor = layer(torch.arange(layer.num_embeddings, device=model.device))
    return table


def _probe_rows(classifier: Classifier) -> list[list[int]]:
    """Ragged rows of plain tokens."""
    special = {*special_tokens(classifier.tokenizer).values(), classifier.pad_id}
    plain = [i for i in range(len(classifier.tokenizer)) if i not in special]
    sizes = [min(size, classifier.context_length or size) for size in PROBE]
    return [[plain[(7 * i + size) % len(plain)] for i in range(size)] for size in sizes]
