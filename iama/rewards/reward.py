"""Rewards, scored the same way in training and at inference.

A reward is a sequence classifier (a Hugging Face directory, read with its own tokenizer and chat template), a
TRL reward function `(prompts, completions, **columns) -> list[float]`, used unchanged, a judge, a verifier, or an
ensemble of these.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AutoTokenizer

from iama.cost import Cost, peak_memory, start_peak
from iama.errors import RewardError
from iama.installation import find_file
from iama.models.flops import row_flops, size_of
from iama.models.inputs import pad
from iama.models.loading import halved, loading, pick_device
from iama.prompts.render import as_completion, completion_text, prompt_text, render_exchange
from iama.rewards.classifier_files import check_reward_model, load_reward_model, reward_config
from iama.rewards.ensemble import Ensemble, check_scales, member_name
from iama.rewards.judge import Judge, check_judge
from iama.rewards.verifier import MathVerifier, check_math_verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from iama.config.specs import RewardScale, RewardSpec
    from iama.models.flops import ModelSize
    from iama.prompts.render import Message, Prompt

    RewardFn: TypeAlias = Callable[..., Sequence[float | None]]
    Scorer: TypeAlias = Callable[..., tuple[list[float], int]]


class Reward:
    """A named reward; calling it is TRL's reward-function interface, so it goes to any TRL trainer as it is.

    `missing_ok` lets a score of None or NaN through as NaN; `scale` standardises. `classifier` is the model that
    scores, `judge` the judge and `ensemble` the ensemble, None for any other kind of reward.
    """

    def __init__(
        self, name: str, scorer: Scorer, scale: RewardScale | None = None, *, missing_ok: bool = False
    ) -> None:
        self.name = name
        self.__name__ = name  # TRL names metrics and columns after it
        self.classifier = scorer if isinstance(scorer, Classifier) else None
        self.judge = scorer if isinstance(scorer, Judge) else None
        self.ensemble = scorer if isinstance(scorer, Ensemble) else None
        self._scorer = scorer
        self._scale = scale
        self._missing_ok = missing_ok

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str | list[Message]], **columns: Any
    ) -> list[float]:
        """Scores `[len(prompts)]`; raises `RewardError` on infinity and, unless `missing_ok`, on a missing score."""
        return self.scored(prompts, completions, columns)[0]

    @property
    def classifiers(self) -> list[Classifier]:
        """The models that score, an ensemble's members' too."""
        if self.ensemble is not None:
            return [classifier for member in self.ensemble.members for classifier in member.classifiers]
        return [] if self.classifier is None else [self.classifier]

    @property
    def num_calls(self) -> int:
        """How many rewards score each text: an ensemble's members, else one."""
        return 1 if self.ensemble is None else len(self.ensemble.members)

    def scored(self, prompts: Any, completions: Any, columns: Mapping[str, Any]) -> tuple[list[float], int]:
        """Scores, checked, and the number of tokens read."""
        scores, tokens = self._scorer(prompts, completions, **columns)
        return self.finish(prompts, completions, scores), tokens

    def finish(
        self, prompts: Sequence[Prompt], completions: Sequence[str | list[Message]], scores: list[float]
    ) -> list[float]:
        """What the scorer gave, checked and standardised; the last step of every way to score.

        Raises `RewardError` on infinity, on a wrong number of scores and, unless `missing_ok`, on a missing score.
        """
        if len(scores) != len(prompts):
            raise RewardError(f"reward {self.name!r} returned {len(scores)} scores for {len(prompts)} completions")
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not (math.isfinite(score) or (self._missing_ok and math.isnan(score))):
                raise RewardError(
                    f"reward {self.name!r} returned {score} for the prompt {prompt_text(prompt)[:80]!r} and the "
                    f"completion {completion_text(completion)[:80]!r}; it must return a finite number"
                )
        if self._scale is not None:
            scores = [(score - self._scale.mean) / self._scale.std for score in scores]
        return scores

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[float], Cost]:
        """Scores of texts with what they cost; `columns` are the prompts' further columns."""
        start = time.perf_counter()
        completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        if self.classifier is not None:
            scores, read = self._read(self.classifier, prompts, texts)
        elif self.ensemble is not None:
            unscaled, read = self.ensemble.read(prompts, texts, columns)
            scores = self.finish(prompts, completions, unscaled)
        else:
            scores, tokens = self.scored(prompts, completions, columns)
            read = Cost(reward_tokens=tokens, sequential_steps=int(tokens > 0))
        return scores, replace(read, reward_calls=len(texts) * self.num_calls, seconds=time.perf_counter() - start)

    def disagreement(
        self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Standard deviation of each text's scores over an ensemble's members, on their common scale.

        Texts that `score` met shortly before are not read again. Raises `RewardError` for any other kind of reward.
        """
        if self.ensemble is None:
            raise RewardError(f"reward {self.name!r} is no ensemble, so it has no members that could disagree")
        return self.ensemble.disagreement(prompts, texts, columns)

    def _read(
        self, classifier: Classifier, prompts: Sequence[Prompt], texts: Sequence[str]
    ) -> tuple[list[float], Cost]:
        """Scores of a classifier, and what reading the texts cost."""
        start_peak(classifier.model.device)
        ids = classifier.render(prompts, texts)
        scores = self.finish(prompts, texts, classifier.score_ids(ids))
        read = reduce(Cost.beside, classifier.costs(ids), Cost())
        return scores, replace(read, peak_memory=peak_memory(classifier.model.device))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A sequence classifier whose output `head`, times `sign`, is a reward; called, it is a scorer.

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

    def __call__(self, prompts: Any, completions: Any, **_: Any) -> tuple[list[float], int]:
        """Scores, and the number of tokens read."""
        ids = self.render(prompts, [completion_text(completion) for completion in completions])
        return self.score_ids(ids), sum(map(len, ids))

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
                    f"{self.source}: the prompt {prompt_text(prompt)[:60]!r} with its answer has {len(row)} tokens, "
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


def load_reward(name: str, spec: RewardSpec, *, missing_ok: bool = False) -> Reward:
    """Load a reward; raises `RewardError` or `ModelError` with what to mend.

    A judge's score may always be missing: only whoever uses it can say what an unparsable answer means there.
    """
    source = f"reward {name!r}"
    if spec.function is not None:
        return reward_from_function(load_function(spec.function, source), name, spec.scale, missing_ok=missing_ok)
    if spec.column is not None:
        raise _column_error(spec, source)
    if spec.judge is not None:
        return Reward(name, Judge(spec.judge, source), spec.scale, missing_ok=True)
    if spec.ensemble is not None:
        return _load_ensemble(name, spec, missing_ok=missing_ok)
    if spec.verifier is not None:
        return Reward(name, MathVerifier(spec.answer_column, source), spec.scale, missing_ok=missing_ok)
    return Reward(name, load_classifier(name, spec), spec.scale, missing_ok=missing_ok)


def _load_ensemble(name: str, spec: RewardSpec, *, missing_ok: bool) -> Reward:
    assert spec.ensemble is not None
    check_scales(spec.ensemble, f"reward {name!r}")
    members = [
        load_reward(member_name(name, number), member, missing_ok=missing_ok)
        for number, member in enumerate(spec.ensemble.members)
    ]
    missing_ok = missing_ok or any(member.judge is not None for member in members)
    return Reward(name, Ensemble(spec.ensemble, members), spec.scale, missing_ok=missing_ok)


def check_reward(name: str, spec: RewardSpec, prompt: Prompt | None = None) -> None:
    """Make the checks of `load_reward` that need no weights in memory; `prompt` must render for the reward."""
    source = f"reward {name!r}"
    if spec.function is not None:
        load_function(spec.function, source)
    elif spec.column is not None:
        raise _column_error(spec, source)
    elif spec.judge is not None:
        check_judge(spec.judge, source)
    elif spec.verifier is not None:
        check_math_verify(source)
    elif spec.ensemble is not None:
        check_scales(spec.ensemble, source)
        for number, member in enumerate(spec.ensemble.members):
            check_reward(member_name(name, number), member, prompt)
    else:
        _check_classifier(spec, source, prompt)


def _column_error(spec: RewardSpec, source: str) -> RewardError:
    return RewardError(
        f"{source}: column {spec.column!r} belongs to pool files, whose samples have scores already; here a reward "
        "must score texts: give a model, function, judge, verifier or ensemble"
    )


def _check_classifier(spec: RewardSpec, source: str, prompt: Prompt | None) -> None:
    assert spec.model is not None
    check_reward_model(spec.model, source)
    _pick_head(reward_config(spec.model, source), spec, source)
    with loading(spec.model, source):
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
    if prompt is not None:
        render_exchange(tokenizer, prompt, "")


def reward_from_function(
    function: RewardFn, name: str, scale: RewardScale | None = None, *, missing_ok: bool = False
) -> Reward:
    """Wrap a TRL reward function; a score of None counts as NaN."""

    def scorer(prompts: Any, completions: Any, **columns: Any) -> tuple[list[float], int]:
        scores = function(prompts=prompts, completions=completions, **columns)
        return [math.nan if score is None else float(score) for score in scores], 0

    return Reward(name, scorer, scale, missing_ok=missing_ok)


def load_function(reference: str, source: str) -> RewardFn:
    """Import `path/to/file.py:name` or `package.module:name`; importing runs that file's code."""
    module_name, _, attribute = reference.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _module_from_file(find_file(module_name))
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise RewardError(
            f"{source}: cannot import function {reference!r} ({error}); "
            "write path/to/file.py:name or package.module:name"
        ) from error
    if not callable(function):
        raise RewardError(f"{source}: {reference!r} is not callable; name a function (prompts, completions, **columns)")
    loaded: RewardFn = function
    return loaded


def _module_from_file(path: Path) -> Any:
    """Import a file once per path, so that two functions of one file share its module."""
    name = f"iama_user_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_classifier(name: str, spec: RewardSpec) -> Classifier:
    """Load the model of a reward; raises `RewardError` or `ModelError` with what to mend."""
    assert spec.model is not None
    source = f"reward {name!r}"
    check_reward_model(spec.model, source)
    head = _pick_head(reward_config(spec.model, source), spec, source)
    with loading(spec.model, source):
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = load_reward_model(spec.model, source, getattr(torch, spec.dtype))
    model.to(pick_device(spec.device)).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    return Classifier(
        model=model,
        tokenizer=tokenizer,
        head=head,
        sign=spec.sign,
        pad_id=pad_id,
        context_length=getattr(model.config, "max_position_embeddings", None),
        batch_size=spec.batch_size,
        path=spec.model,
        source=source,
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
        f"{source}: head {spec.head!r} is not an output of {spec.model!r}; choose one of {list(labels.values())}"
    )


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
