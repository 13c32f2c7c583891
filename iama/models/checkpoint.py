"""A checkpoint before its weights are read: is it what it is used as, and do configuration and tokenizer fit it?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer

from iama.errors import IamaWarning, ModelError
from iama.models.loading import LIBRARY_ERRORS, REMOTE_CODE, check_model_dir, load_model, loading

Use = Literal["policy", "reward", "body"]
CLASS_NAMES: Mapping[str, Mapping[str, str]] = {
    "policy": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "reward": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
"""transformers' class of every `model_type`."""
WANTED = {
    "policy": "a policy must be a causal language model",
    "reward": "a reward model must be a sequence classifier, or write a `function` that reads this one",
}
KINDS = {
    "ForTokenClassification": "labels every token, as process reward models do",
    "ForQuestionAnswering": "marks an answer in a text",
    "ForMultipleChoice": "picks one of several texts",
    "ForSequenceClassification": "scores texts",
    "ForMaskedLM": "fills gaps in a text",
    "ForCausalLM": "writes texts",
    "LMHeadModel": "writes texts",
}
"""What a model does, by the end of its class's name."""
NO_TOKEN = -1
"""What the first Llamas write for a token that they lack."""


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    `context_length` is the most tokens that it reads (None: it names no limit), `num_rows` the size of its table of
    tokens, `num_types` how many types of tokens it knows (2: those of a pair's first text and of its second).
    In RoBERTa and its kin (`skips_positions`) positions begin behind that of the padding.
    """

    config: Any
    context_length: int | None
    num_rows: int
    num_types: int
    skips_positions: bool


def read_outline(path: str, source: str, use: Use, *, trust_remote_code: bool = False) -> Outline:
    """What a checkpoint is, from its files; of the weights names and shapes are read.

    `body` is a model whose head is not used: the base of a classifier's adapter, or one that becomes a classifier.
    Raises `ModelError` where the checkpoint was saved as something else than `use`, holds other tensors than its class
    reads, is quantized and cannot be read here, or brings code that was not asked for. The tensors of a model of the
    hub are looked at when it is loaded.
    """
    check_model_dir(path, source)
    with loading(path, source):
        raw, _ = PreTrainedConfig.get_config_dict(path)
    _check_types(raw, path, source)
    if use != "body":
        _check_architecture(raw, path, source, use, trust_remote_code=trust_remote_code)
    with loading(path, source):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    quantization = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if quantization is not None:
        _check_quantization(quantization, path, source)
    auto_class = AutoModelForCausalLM if use == "policy" else AutoModelForSequenceClassification
    if quantization is None and Path(path).is_dir():
        options = {"trust_remote_code": trust_remote_code, "device_map": "meta"}
        model = load_model(auto_class, path, source, new_head=use == "body", **options)
    else:
        with loading(path, source), torch.device("meta"):  # transformers writes into the configuration
            model = auto_class.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    types = [m for name, m in model.named_modules() if name.endswith("token_type_embeddings")]
    text_config = model.config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    skipping = _positions_behind_padding(model)
    whole = min([limit, *skipping]) if isinstance(limit, int) and limit > 0 else None
    context_length = None if whole is None else min([whole, *_short_rope(text_config)])
    if context_length != whole:
        message = (
            f"{source}: {path!r} would read {whole} tokens by longrope, where a row of more than {context_length} "
            f"changes the answers beside it; it reads at most {context_length} here, prompt and answer together"
        )
        warnings.warn(message, IamaWarning, stacklevel=1)  # one place, so that it is said once
    return Outline(
        config,
        context_length,
        int(model.get_input_embeddings().weight.shape[0]),
        max((m.num_embeddings for m in types if isinstance(m, nn.Embedding)), default=0),
        skips_positions=bool(skipping),
    )


def _check_types(raw: Any, path: str, source: str) -> None:
    """Raise `ModelError` where config.json holds values of another type in the keys that are read before its class."""
    types = {"model_type": str, "architectures": list, "text_config": dict, "quantization_config": dict}
    if not isinstance(raw, dict):
        raise ModelError(f"{source}: config.json of {path!r} holds no object; give the model's own file")
    for key, wanted in types.items():
        value = raw.get(key)
        is_list_of_others = isinstance(value, list) and not all(isinstance(name, str) for name in value)
        if value is not None and (not isinstance(value, wanted) or is_list_of_others):
            told = {str: "text", list: "a list of names", dict: "an object"}[wanted]
            raise ModelError(f"{source}: {key} in config.json of {path!r} is {value!r}; it must be {told}")


def _positions_behind_padding(model: Any) -> list[int]:
    """Usable positions of tables whose first rows, up to that of the padding, no token gets."""
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    return [m.num_embeddings - m.padding_idx - 1 for m in tables if getattr(m, "padding_idx", None) is not None]


def _short_rope(config: Any) -> list[int]:
    """Tokens up to which longrope keeps its first angles: transformers picks those of a batch by its longest row.

    (`dynamic` does so beyond `max_position_embeddings` alone.)
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]  # of a kind of layers each
    return [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]


def check_token_ids(outline: Outline, tokenizer: PreTrainedTokenizerBase, path: str, source: str) -> None:
    """Raise `ModelError` for a token of tokenizer or configuration that has no row in the model's table.

    Also for ids, and for a limit of the tokenizer, that are no numbers.
    """
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float):
        raise ModelError(
            f"{source}: model_max_length in the tokenizer_config.json of {path!r} is {limit!r}; it must be a number"
        )
    named = [(f"{token!r}", i) for token, i in tokenizer.get_vocab().items()]
    with loading(path, source):
        places = [("config.json", outline.config.get_text_config(decoder=True))]
        if (Path(path) / "generation_config.json").is_file():
            places.append(("generation_config.json", GenerationConfig.from_pretrained(path)))
    for place, settings in places:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(settings, key, None)
            for i in ids if isinstance(ids, list) else [ids]:
                if i is not None and (type(i) is not int or i < NO_TOKEN):
                    raise ModelError(
                        f"{source}: {key} in {place} of {path!r} is {ids!r}; write a token's id, or null for none"
                    )
                named += [(f"{key} in {place}", i)] if i is not None else []
    name, largest = max(named, key=lambda pair: pair[1])
    if largest >= outline.num_rows:
        number = sum(i >= outline.num_rows for _, i in named)
        raise ModelError(
            f"{source}: {number} token ids lie outside the table of {path!r}, which has {outline.num_rows} rows, e.g. "
            f"{largest} ({name}); give the tokenizer and configuration that the model was trained with"
        )


def _check_architecture(
    raw: Mapping[str, Any], path: str, source: str, use: Literal["policy", "reward"], *, trust_remote_code: bool
) -> None:
    """Refuse a checkpoint that was saved as another kind of model than it shall be used as."""
    kind, saved = raw.get("model_type"), raw.get("architectures") or []
    names = CLASS_NAMES[use]
    if kind in names and (not saved or any(_is_meant(name, use, raw) for name in saved)):
        return
    if raw.get("auto_map"):
        if trust_remote_code:
            return
        raise ModelError(f"{source}: {path!r} {REMOTE_CODE}")
    if kind not in CONFIG_MAPPING_NAMES:
        return  # transformers says so
    name = saved[0] if saved else str(kind)
    told = next((told for end, told in KINDS.items() if name.endswith(end)), None)
    if raw.get("is_encoder_decoder") or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        told = told or _inputs(raw)
    raise ModelError(f"{source}: {path!r} is a {name}{f', which {told}' if told else ''}; {WANTED[use]}")


def _is_meant(name: str, use: str, raw: Mapping[str, Any]) -> bool:
    """Whether a class that the model was saved by may be read as the class for `use`: its tensors tell the rest.

    A model of texts and images is saved whole, and its class for texts reads its part.
    """
    if name in CLASS_NAMES[use].values():
        return True
    if name.endswith("Model"):
        return not name.endswith(("LMHeadModel", "DoubleHeadsModel"))
    return use == "policy" and name.endswith("ForConditionalGeneration") and not raw.get("is_encoder_decoder")


def _inputs(raw: Mapping[str, Any]) -> str | None:
    others = [key.removesuffix("_config") for key in raw if key in ("vision_config", "audio_config")]
    return f"reads more than texts ({' and '.join(others)})" if others else "has an encoder of its own for the prompt"


def _check_quantization(quantization: Mapping[str, Any], path: str, source: str) -> None:
    """Raise `ModelError` for a quantized checkpoint whose package or device is missing here."""
    method = quantization.get("quant_method", "an unknown method")
    try:
        if not AutoHfQuantizer.supports_quant_method(dict(quantization)):
            raise NotImplementedError("this transformers does not know it")
        settings = AutoHfQuantizer.merge_quantization_configs(dict(quantization), None)
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelError(
            f"{source}: {path!r} is quantized ({method}) and cannot be read here ({reason}); install what is "
            "missing, or give the model as it was before"
        ) from error
