"""Classifiers as rewards: a sequence classifier's directory, or a PEFT adapter on one, as RewardTrainer saves it.

One output of the model, times a sign, is the score. The model reads texts with its own tokenizer and chat template.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import ModelError, RewardError
from iama.models.flops import ModelSize, row_flops, size_of
from iama.models.inputs import pad
from iama.models.loading import check_model_dir, halved, loading, pick_device, refuse_missing_tensors
from iama.prompts.render import Message, Prompt, completion_text, prompt_name, render_exchange
from iama.reading import read_object

HEADS = ("score", "classifier", "classification_head")
"""Names of a sequence classifier's last layer, which an adapter saves beside its matrices."""
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A sequence classifier whose output `head`, times `sign`, is a reward: a `Scorer`.

    `pad_id` fills short rows, and transformers takes a row's last token that is another as the one that speaks for
    it. `context_length` is the most tokens that a prompt with its answer may have (None: the model names no limit),
    `source` names the reward in errors, and `path` is where the model came from.
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

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | list[Message]],
        columns: Mapping[str, Sequence[Any]],  # noqa: ARG002 - a classifier reads the texts alone
    ) -> tuple[list[float], Cost]:
        """Scores, and what reading the texts cost."""
        ids = self.render(prompts, [completion_text(completion) for completion in completions])
        return self.score_ids(ids), reduce(Cost.beside, self.costs(ids), Cost())

    # What else `Scorer` asks for. It names this class, so this class cannot derive from it.

    @property
    def classifier(self) -> Classifier:
        """Itself: the reward is one model."""
        return self

    @property
    def members(self) -> tuple[()]:
        """None: it combines no rewards."""
        return ()

    def disagreement(self, *_: Any) -> None:
        """None: it has no members."""

    def announcement(self, *_: Any) -> None:
        """None: it asks nobody."""

    @cached_property
    def size(self) -> ModelSize:
        """The model's size, as operations are counted from it."""
        return size_of(self.model)

    def costs(self, ids: Sequence[Sequence[int]]) -> list[Cost]:
        """Of reading rendered texts from their beginning, in one step: tokens and operations of each."""
        lengths = [len(row) for row in ids]
        flops = row_flops(self.size, 0, lengths).tolist()
        return [Cost(reward_tokens=n, sequential_steps=1, flops=f) for n, f in zip(lengths, flops, strict=True)]

    def render(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Token ids as the model reads them; raises `RewardError` where they are more than it can read."""
        ids = [render_exchange(self.tokenizer, p, text) for p, text in zip(prompts, texts, strict=True)]
        for prompt, row in zip(prompts, ids, strict=True):
            if self.context_length is not None and len(row) > self.context_length:
                raise RewardError(
                    f"{self.source}: the prompt {prompt_name(prompt)} with its answer has {len(row)} tokens, "
                    f"but {self.path!r} reads at most {self.context_length}; use shorter prompts or a smaller "
                    "max_new_tokens"
                )
        return ids

    def score_ids(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Scores of rendered texts, read from their beginning; where memory runs out, in batches half as large."""
        batch_size = self.batch_size
        while True:
            try:
                return self.scores(_forward(self.model, ids, self.pad_id, batch_size))
            except RuntimeError as error:
                batch_size = halved(batch_size, self.source, error)

    def scores(self, logits_RH: torch.Tensor) -> list[float]:
        """The output that is the reward, of each row's logits."""
        scores: list[float] = (logits_RH[:, self.head] * self.sign).tolist()
        return scores


@torch.inference_mode()
def _forward(model: Any, ids: Sequence[Sequence[int]], pad_id: int, batch_size: int) -> torch.Tensor:
    """Logits `[rows, heads]` in fp32; rows of similar length share a batch, so that little is padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    logits = torch.empty(len(ids), model.config.num_labels)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        input_ids = pad([ids[i] for i in batch], pad_id, device=model.device)
        mask = pad([[1] * len(ids[i]) for i in batch], 0, device=model.device)
        output = model(input_ids=input_ids, attention_mask=mask)
        logits[batch] = output.logits.float().cpu()
    return logits


def load_classifier(spec: RewardSpec, source: str) -> Classifier:
    """The model of a reward with its weights; raises `RewardError` or `ModelError` with what to mend."""
    return load_weights(read_files(spec, source), spec, source)


def load_weights(files: ClassifierFiles, spec: RewardSpec, source: str) -> Classifier:
    """The model whose files were read before."""
    model = load_reward_model(files, source, getattr(torch, spec.dtype))
    model.to(pick_device(spec.device)).eval()
    tokenizer = files.tokenizer
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return Classifier(
        model=model,
        tokenizer=tokenizer,
        head=files.head,
        sign=spec.sign,
        pad_id=model.config.pad_token_id if model.config.pad_token_id is not None else 0,
        context_length=getattr(model.config, "max_position_embeddings", None),
        batch_size=spec.batch_size,
        path=files.path,
        source=source,
    )


@dataclass(frozen=True)
class ClassifierFiles:
    """What a classifier's directory says of it without its weights; `head` is the output that is the reward."""

    path: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    head: int


def read_files(spec: RewardSpec, source: str) -> ClassifierFiles:
    """Check a classifier's directory, and read its configuration and tokenizer."""
    assert spec.model is not None
    check_reward_model(spec.model, source)
    config = reward_config(spec.model, source)
    head = _pick_head(config, spec, source)
    with loading(spec.model, source):
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
    return ClassifierFiles(spec.model, config, tokenizer, head)


def check_classifier(spec: RewardSpec, source: str, prompt: Prompt | None) -> ClassifierFiles:
    """Make the checks that need no weights, and return what they read; `prompt` must render for the reward."""
    files = read_files(spec, source)
    if prompt is not None:
        render_exchange(files.tokenizer, prompt, "")
    return files


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
        f"{source}: head {spec.head!r} is not an output of {spec.model!r}; choose one of {list(labels.values())}"
    )


def check_reward_model(path: str, source: str) -> None:
    """Raise `ModelError` if a directory, or the base of an adapter, is missing or half built."""
    base = adapter_base(path, source)
    if base is not None and not (Path(path) / WEIGHTS).is_file():
        raise ModelError(f"{source}: the adapter {path!r} holds no {WEIGHTS}; save it with save_pretrained")
    check_model_dir(path if base is None else base, source)


def adapter_base(path: str, source: str) -> str | None:
    """The model that an adapter was trained on; None for a directory that is a whole model."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    base = read_object(file, ModelError, "save the adapter again").get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{source}: {file} names no base model; merge the adapter into its base and give that")
    return str(base)


def reward_config(path: str, source: str) -> Any:
    """The model's configuration; of an adapter its base's, with as many outputs as the adapter's head has."""
    base = adapter_base(path, source)
    with loading(path, source):
        config = AutoConfig.from_pretrained(path if base is None else base)
        if base is not None:
            with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
                heads = [key for key in file.keys() if _is_head(key)]  # noqa: SIM118 - not a dict
                if heads:
                    config.num_labels = file.get_slice(heads[0]).get_shape()[0]
    return config


def load_reward_model(files: ClassifierFiles, source: str, dtype: Any) -> Any:
    """A classifier with its weights, an adapter merged into its base; `ModelError` where something is missing."""
    path, config = files.path, files.config
    base = adapter_base(path, source)
    with loading(path, source):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path if base is None else base,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    if base is None:
        refuse_missing_tensors(info, path, source)
        return model
    with loading(path, source), safe_open(Path(path) / WEIGHTS, framework="pt") as file:
        has_head = any(_is_head(key) for key in file.keys())  # noqa: SIM118 - not a dict
    missing = {key for key in info["missing_keys"] if not (has_head and key.split(".")[0] in HEADS)}
    refuse_missing_tensors({"missing_keys": missing}, base, source)
    return _merged(model, path, source)


def _is_head(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] == "weight" and any(head in parts for head in HEADS) and not any("lora_" in p for p in parts)


def _merged(model: Any, path: str, source: str) -> Any:
    """The model with the adapter's weights in its own."""
    from peft import PeftModel

    try:
        with loading(path, source), warnings.catch_warnings():
            # PEFT only warns about tensors that an adapter lacks, and leaves them at their starting values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
    except (RuntimeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{source}: the adapter {path!r} does not fit its base model ({reason})") from error
