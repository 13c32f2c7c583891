"""Classifiers as rewards on vLLM's pooling runner: token ids and outputs are those of `iama.rewards.classifier`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from iama.config.specs import RewardSpec
from iama.errors import RewardError
from iama.models.flops import ModelSize, size_of
from iama.models.loading import LIBRARY_ERRORS
from iama.models.vllm import check_vllm, context_limit, import_vllm, llm_settings, open_llm
from iama.prompts.render import Prompt
from iama.rewards.classifier import ClassifierFiles, TextClassifier, adapter_base, pooling_config


@dataclass(frozen=True, eq=False)
class VllmClassifier(TextClassifier):
    """A sequence classifier that vLLM runs: a `Scorer`.

    `config` is the model's, `padding` a causal model's padding token. In transformers a row's last token that is no
    padding speaks for it; vLLM lets the last one speak, so padding behind it is left out.
    """

    llm: Any
    config: Any
    tokenizer: Any
    head: int
    sign: int
    context_length: int | None
    path: str
    source: str
    dtype: str
    padding: int | None = None
    pair: bool = False
    has_types: bool = False
    _checked: set[Any] = field(default_factory=set, repr=False)

    @cached_property
    def size(self) -> ModelSize:
        """The model's size, from its configuration."""
        with torch.device("meta"):
            return size_of(AutoModelForSequenceClassification.from_config(self.config))

    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], list[list[int]]]:
        """Scores of whole texts, and their token ids as `render` gives them; raises `RewardError`."""
        if not texts:
            return [], []
        vllm = import_vllm(self.source)
        rows = self._render(prompts, texts)
        ids = [ids for ids, _ in rows]
        try:
            outputs = self.llm.encode(
                [{"prompt_token_ids": self._spoken(row)} for row in ids],
                pooling_params=[self._params(vllm, types) for _, types in rows],
                pooling_task="classify",
                use_tqdm=False,
            )
        except LIBRARY_ERRORS as error:
            reason = " ".join(str(error).split())[:240]
            raise RewardError(
                f"{self.source}: LLM.encode does not score with {self.path!r} ({reason}); write engine: transformers"
            ) from error
        logits_RH = torch.stack([torch.as_tensor(output.outputs.data).float().reshape(-1) for output in outputs])
        return self.scores(logits_RH), ids

    def _spoken(self, ids: list[int]) -> list[int]:
        """The row without the padding behind the token that speaks for it."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self.padding:
            end -= 1
        return ids[:end]

    def _params(self, vllm: Any, types: list[int] | None) -> Any:
        """Raw outputs; of a pair, the place where its second text begins, which is how vLLM takes types of tokens."""
        params = vllm.PoolingParams(use_activation=False)
        if types is not None and 1 in types:
            params.extra_kwargs = {"compressed_token_type_ids": types.index(1)}
        return params


def load_vllm_classifier(files: ClassifierFiles, spec: RewardSpec, source: str) -> VllmClassifier:
    """Open a reward in vLLM; raises `ModelError` with what vLLM does not open."""
    llm = open_llm(files.path, source, llm_settings(spec) | {"runner": "pooling"})
    padding = pooling_config(files.config).pad_token_id
    return VllmClassifier(
        llm=llm,
        config=files.config,
        tokenizer=files.tokenizer,
        head=files.head,
        sign=spec.sign,
        context_length=context_limit(spec, files.context_length, files.path, source),
        path=files.path,
        source=source,
        dtype=spec.dtype,
        padding=padding if llm.model_config.attn_type == "decoder" else None,
        pair=bool(spec.pair),
        has_types=files.has_types,
    )


def check_vllm_classifier(spec: RewardSpec, files: ClassifierFiles, source: str) -> None:
    """Raise `RewardError` for a reward that vLLM is known not to run, and `ConfigError` where it is not installed."""
    check_vllm(source)
    if adapter_base(files.path, source) is not None:
        raise RewardError(
            f"{source}: {files.path!r} is an adapter on a classifier, and vLLM takes whole ones; save it merged "
            "(PEFT's merge_and_unload), or write engine: transformers"
        )
    if files.config.is_encoder_decoder:
        raise RewardError(
            f"{source}: {files.path!r} is an encoder-decoder, which vLLM does not score with; write engine: "
            "transformers"
        )
    context_limit(spec, files.context_length, files.path, source)
