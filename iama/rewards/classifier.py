"""Classifiers as rewards: a sequence classifier's directory, or a PEFT adapter on one, as RewardTrainer saves it.

One output of the model, times a sign, is the score. The model reads texts with its own tokenizer and chat template.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import ModelError, RewardError, TooLongError
from iama.models.checkpoint import Outline, check_token_ids, read_outline
from iama.models.flops import ModelSize, row_flops, size_of
from iama.models.inputs import pad
from iama.models.loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_pulled,
    halved,
    is_adapter,
    load_adapter,
    load_model,
    loading,
    pick_device,
    warn_if_slow,
)
from iama.nearest import meant
from iama.prompts.conversations import check_exchanges
from iama.prompts.render import (
    Message,
    Prompt,
    completion_text,
    prompt_name,
    render_exchange,
    render_exchanges,
    render_pair,
)
from iama.reading import read_object

HEADS = ("score", "classifier", "classification_head")
"""Names of a sequence classifier's last layer, which an adapter saves beside its matrices."""
MAX_CHECKED = 100_000
"""Prompts that are known to be read rightly, before all are forgotten: a server meets new ones for ever."""
NO_PADDING = -1
"""`pad_id` where no token counts as padding, so that a row's last token speaks whatever it is."""


class TextClassifier(ABC):
    """What a sequence classifier does whatever runs it: texts to token ids, and what reading them costs.

    The output `head`, times `sign`, is the reward; `source` names it in errors, and `path` is where the model came
    from. A prompt with its answer may have `context_length` tokens (None: the model names no limit). A model of a
    `pair` reads prompt and answer as its tokenizer's pair of texts, with the tokens' types where it `has_types`; any
    other reads one text.
    """

    tokenizer: Any
    head: int
    sign: int
    context_length: int | None
    path: str
    source: str
    pair: bool
    has_types: bool
    _checked: set[Any]

    dtype: Any
    """What the model computes in."""
    size: Any
    """The model's `ModelSize`, as operations are counted from it."""

    @abstractmethod
    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], list[list[int]]]:
        """Scores of whole texts, and their token ids as `render` gives them."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | list[Message]],
        columns: Mapping[str, Sequence[Any]],  # noqa: ARG002 - a classifier reads the texts alone
    ) -> tuple[list[float], Cost]:
        """Scores, and what reading the texts cost."""
        scores, ids = self.score_texts(prompts, [completion_text(completion) for completion in completions])
        return scores, reduce(Cost.beside, self.costs(ids), Cost())

    # What else `Scorer` asks for. It names this class, so this class cannot derive from it.

    @property
    def classifier(self) -> Classifier | None:
        """The model in this process, where it is one."""
        return None

    @property
    def members(self) -> tuple[()]:
        """None: it combines no rewards."""
        return ()

    def disagreement(self, *_: Any) -> None:
        """None: it has no members."""
        return

    def announcement(self, *_: Any) -> None:
        """None: it asks nobody."""
        return

    def costs(self, ids: Sequence[Sequence[int]]) -> list[Cost]:
        """Of reading rendered texts from their beginning, in one step: tokens and operations of each."""
        lengths = [len(row) for row in ids]
        flops = row_flops(self.size, 0, lengths).tolist()
        return [Cost(reward_tokens=n, sequential_steps=1, flops=f) for n, f in zip(lengths, flops, strict=True)]

    def render(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Token ids as the model reads them; raises `TooLongError` where they are more than it can read."""
        return [ids for ids, _ in self._render(prompts, texts)]

    def _render(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[tuple[list[int], list[int] | None]]:
        """Ids with the types of a pair's tokens, where the model has types."""
        if self.pair:
            pairs = [render_pair(self.tokenizer, p, text) for p, text in zip(prompts, texts, strict=True)]
            rows = [(ids, types if self.has_types else None) for ids, types in pairs]
        else:
            if len(self._checked) >= MAX_CHECKED:
                self._checked.clear()
            check_exchanges(self.tokenizer, prompts, self.source, self._checked)
            try:
                exchanges = render_exchanges(self.tokenizer, prompts, texts)
            except ModelError as error:  # some templates refuse an answer by what it says
                raise ModelError(f"{self.source}: {error}") from error
            rows = [(ids, None) for ids in exchanges]
        for prompt, (ids, _) in zip(prompts, rows, strict=True):
            if self.context_length is not None and len(ids) > self.context_length:
                raise TooLongError(
                    f"{self.source}: the prompt {prompt_name(prompt)} with its answer has {len(ids)} tokens, "
                    f"but {self.path!r} reads at most {self.context_length}; use shorter prompts or a smaller "
                    "max_new_tokens"
                )
        return rows

    def scores(self, logits_RH: torch.Tensor) -> list[float]:
        """The output that is the reward, of each row's logits; raises `RewardError` for NaN, which is no score."""
        scores: list[float] = (logits_RH[:, self.head] * self.sign).tolist()
        if any(map(math.isnan, scores)):
            raise RewardError(
                f"{self.source}: the model {self.path!r} gives NaN; its weights are damaged, or numbers overflow in "
                f"{self.dtype} (then write another `dtype`, float32 is the widest)"
            )
        return scores


@dataclass(eq=False)
class LastRead:
    """What a model read last, and its logits `[rows, heads]`: rewards that are its heads read the same texts."""

    ids: list[list[int]] = field(default_factory=list)
    types: list[list[int]] = field(default_factory=list)
    logits_RH: torch.Tensor | None = None

    def logits(
        self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]], read: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Those of the same rows, or what `read` gives, which is kept."""
        given = [list(row) for row in ids], [list(row) for row in types]
        if self.logits_RH is None or given != (self.ids, self.types):
            self.logits_RH = read()
            self.ids, self.types = given
        return self.logits_RH


@dataclass(frozen=True, eq=False)
class Classifier(TextClassifier):
    """A sequence classifier of transformers, in this process: a `Scorer`.

    `pad_id` fills short rows, and transformers takes a row's last token that is another as the one that speaks for
    it; of a model whose configuration names none it is `NO_PADDING` (see `filling`). `last_read` is shared by the heads
    of one model (`sharing`).
    """

    model: Any
    tokenizer: Any
    head: int
    sign: int
    pad_id: int
    context_length: int | None
    batch_size: int
    path: str
    source: str
    pair: bool = False
    has_types: bool = False
    last_read: LastRead | None = None
    _checked: set[Any] = field(default_factory=set, repr=False)

    @property
    def classifier(self) -> Classifier:
        """Itself: the reward is one model."""
        return self

    @cached_property
    def size(self) -> ModelSize:
        """The model's size, as operations are counted from it."""
        return size_of(self.model)

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], list[list[int]]]:
        """Scores of whole texts, and their token ids as `render` gives them."""
        rows = self._render(prompts, texts)
        ids = [ids for ids, _ in rows]
        return self.score_ids(ids, [types for _, types in rows if types is not None]), ids

    def score_ids(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> list[float]:
        """Scores of rendered texts, read from their beginning; where memory runs out, in batches half as large.

        `types` are those of all their tokens, or none. Of a pair use `score_texts`, which knows them.
        """
        assert len(types) == len(ids) or not (self.pair and self.has_types), "a pair's tokens have types"
        batch_size = self.batch_size
        while True:
            try:
                read = partial(_forward, self.model, ids, types, self.pad_id, batch_size)
                return self.scores(read() if self.last_read is None else self.last_read.logits(ids, types, read))
            except ValueError as error:
                end = self.model.config.eos_token_id if self.model.config.is_encoder_decoder else None
                if end is None or all(end in row for row in ids):
                    raise
                raise RewardError(
                    f"{self.source}: a text has no end token, which speaks for it in {self.path!r}; end the chat "
                    "template or the tokenizer's texts with its eos_token"
                ) from error
            except RuntimeError as error:
                batch_size = halved(batch_size, self.source, error)


def sharing(model: Classifier, head: int, spec: RewardSpec, source: str) -> Classifier:
    """Another reward of the same model, which then reads texts once for both."""
    return replace(model, head=head, sign=spec.sign, batch_size=spec.batch_size, source=source, _checked=set())


@torch.inference_mode()
def _forward(
    model: Any, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> torch.Tensor:
    """Logits `[rows, heads]` in fp32."""
    logits = torch.empty(len(ids), model.config.num_labels)
    for batch in _batches(model.config, ids, pad_id, batch_size):
        rows = [ids[i] for i in batch]
        mask = pad([[1] * len(ids[i]) for i in batch], 0, device=model.device)
        further = {"token_type_ids": pad([types[i] for i in batch], 0, device=model.device)} if types else {}
        with filling(model, rows, pad_id) as filler:
            input_ids = pad(rows, filler, device=model.device)
            output = model(input_ids=input_ids, attention_mask=mask, **further)
        logits[batch] = output.logits.float().cpu()
    return logits


def _batches(config: Any, ids: Sequence[Sequence[int]], pad_id: int, batch_size: int) -> Iterator[list[int]]:
    """Rows to forward together, of similar length, so that little is padding.

    Classifiers of encoder-decoders let the last end token speak, and want as many end tokens in all rows of a batch.
    """
    end = config.eos_token_id if config.is_encoder_decoder else None
    size = 1 if end is not None and end == pad_id else batch_size

    def num_ends(row: int) -> int:
        return ids[row].count(end)

    order = sorted(range(len(ids)), key=lambda i: (num_ends(i), len(ids[i])))
    for _, rows in itertools.groupby(order, key=num_ends):
        alike = list(rows)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


@contextmanager
def filling(model: Any, ids: Sequence[Sequence[int]], pad_id: int) -> Iterator[int]:
    """The id that fills short rows while the model reads `ids`; where no token is padding, one that speaks for no row.

    It is no end token either, which some classifiers count.
    """
    if pad_id != NO_PADDING:
        yield pad_id
        return
    config = pooling_config(model.config)
    taken = {*(row[-1] for row in ids if row), config.eos_token_id}
    config.pad_token_id = next(i for i in itertools.count() if i not in taken)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = NO_PADDING


def pooling_config(config: Any) -> Any:
    """The part of a model's configuration that names the padding token, which tells what speaks for a row."""
    return config if config.is_encoder_decoder else config.get_text_config()


def load_weights(
    files: ClassifierFiles, spec: RewardSpec, source: str, last_read: LastRead | None = None
) -> Classifier:
    """The model whose files were read before."""
    model = load_reward_model(files, source, getattr(torch, spec.dtype))
    model.to(pick_device(spec.device, source)).eval()
    warn_if_slow(model, source)
    config = pooling_config(model.config)
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = NO_PADDING  # with None transformers reads no two rows together
    return Classifier(
        model=model,
        tokenizer=files.tokenizer,
        head=files.head,
        sign=spec.sign,
        pad_id=config.pad_token_id,
        context_length=files.context_length,
        batch_size=spec.batch_size,
        path=files.path,
        source=source,
        pair=bool(spec.pair),
        has_types=files.has_types,
        last_read=last_read,
    )


@dataclass(frozen=True)
class ClassifierFiles:
    """What a classifier's directory says of it without its weights; `head` is the output that is the reward."""

    path: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    head: int
    context_length: int | None = None
    has_types: bool = False


def read_files(spec: RewardSpec, source: str) -> ClassifierFiles:
    """Check a classifier's directory, and read its configuration and tokenizer."""
    assert spec.model is not None
    pick_device(spec.device, source)
    base = adapter_base(spec.model, source)
    num_outputs = None if base is None else _num_outputs(spec.model, source)
    outline = read_outline(base or spec.model, source, "reward" if num_outputs is None else "body")
    config = outline.config
    if num_outputs is not None:
        config.num_labels = num_outputs
    head = _pick_head(config, spec, source)
    home = spec.model if base is None or (Path(spec.model) / "tokenizer_config.json").is_file() else base
    with loading(home, source):
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=False)
    check_token_ids(outline, tokenizer, spec.model, source)
    _check_pair(outline, tokenizer, spec, source)
    return ClassifierFiles(spec.model, config, tokenizer, head, outline.context_length, outline.num_types > 1)


def check_classifier(spec: RewardSpec, source: str, prompts: Sequence[Prompt]) -> ClassifierFiles:
    """Make the checks that need no weights, and return what they read; all prompts must render for the reward."""
    files = read_files(spec, source)
    if not spec.pair:
        check_exchanges(files.tokenizer, prompts, source)
    return files


def render_rewarded(files: ClassifierFiles, spec: RewardSpec, prompt: Prompt, text: str) -> list[int]:
    """Token ids of a prompt with an answer, as the model reads them."""
    if spec.pair:
        return render_pair(files.tokenizer, prompt, text)[0]
    return render_exchange(files.tokenizer, prompt, text)


def _check_pair(outline: Outline, tokenizer: PreTrainedTokenizerBase, spec: RewardSpec, source: str) -> None:
    """Whether a model that can tell two texts apart was trained to do so, only its user knows.

    RoBERTa and its kin have types that nothing is trained on.
    """
    types = tokenizer("a", "b").get("token_type_ids") or [0]
    tells_apart = outline.num_types > 1 and max(types) > 0 and not outline.skips_positions
    if spec.pair is None and (tells_apart or hasattr(outline.config, "sentence_transformers")):
        raise RewardError(
            f"{source}: {spec.model!r} can read a pair of texts, and as one text its scores are others; write `pair: "
            "true` beside `model:` if it was trained on pairs (a cross-encoder), else `pair: false` (on the command "
            "line in a file, --spec)"
        )


def _pick_head(config: Any, spec: RewardSpec, source: str) -> int:
    """Index of the output that is the reward; more than one output needs `head`."""
    labels: dict[int, str] = config.id2label
    if len(labels) == 1 and spec.head is None:
        return 0
    if spec.head is None:
        raise RewardError(
            f"{source}: the model {spec.model!r} has {len(labels)} outputs {list(labels.values())}; "
            "set `head:` to the label or index that is the reward"
        )
    if spec.head in labels:
        return int(spec.head)
    by_name = {label: index for index, label in labels.items()}
    if spec.head in by_name:
        return by_name[str(spec.head)]
    raise RewardError(
        f"{source}: head {spec.head!r} is not an output of {spec.model!r}; {meant(str(spec.head), by_name)}"
        f"choose one of {list(labels.values())}"
    )


def adapter_base(path: str, source: str) -> str | None:
    """The model that an adapter was trained on; None for a directory that is a whole model."""
    if not is_adapter(Path(path)):
        return None
    check_pulled(Path(path), source)
    file = Path(path) / ADAPTER_CONFIG
    if not (Path(path) / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{source}: the adapter {path!r} holds no {ADAPTER_WEIGHTS}; save it with save_pretrained")
    base = read_object(file, ModelError, "save the adapter again").get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{source}: {file} names no base model; merge the adapter into its base and give that")
    return str(base)


def _num_outputs(adapter: str, source: str) -> int | None:
    """Outputs of the head that an adapter brings; None where it brings none."""
    with loading(adapter, source), safe_open(Path(adapter) / ADAPTER_WEIGHTS, framework="pt") as file:
        heads = [key for key in file.keys() if _is_head(key)]  # noqa: SIM118 - not a dict
        return int(file.get_slice(heads[0]).get_shape()[0]) if heads else None


def load_reward_model(files: ClassifierFiles, source: str, dtype: Any) -> Any:
    """A classifier with its weights, an adapter merged into its base; `ModelError` where something is missing."""
    path, options = files.path, {"config": files.config, "dtype": dtype, "trust_remote_code": False}
    base = adapter_base(path, source)
    if base is None:
        return load_model(AutoModelForSequenceClassification, path, source, **options)
    brings_head = _num_outputs(path, source) is not None
    model = load_model(AutoModelForSequenceClassification, base, source, new_head=brings_head, **options)
    adapted = load_adapter(model, path, source, "SEQ_CLS")
    with loading(path, source):
        return adapted.merge_and_unload(safe_merge=True)


def _is_head(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] == "weight" and any(head in parts for head in HEADS) and not any("lora_" in p for p in parts)
