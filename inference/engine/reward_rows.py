"""Rewards of growing texts: of a text that a row has read before, only what changed is read again.

Exact: a score is the one that `Reward.score` gives for the whole text (tests/inference/engine/test_reward_rows.py).
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from iama.cost import Cost
from iama.errors import IamaError, IamaWarning, ModelError
from iama.models.inputs import accepted_arguments
from iama.models.loading import is_out_of_memory
from iama.prompts.render import Prompt
from iama.rewards.classifier import Classifier
from iama.rewards.reward import Reward
from inference.engine.rows import Rows, differs, refuse_recurrent

SLACK = 16  # in one pass a row may have twice as many new tokens as the shortest, and so many more
PROBE = (37, 5, 26, 9, 17, 13)  # tokens of the trial's rows
POSITIONS = ("rope_parameters", "rope_theta", "n_positions")  # what tells, in a configuration, of positions
_probed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class RewardRows:
    """Rows of texts that one reward scores again and again while they grow, are cut back or follow another.

    `in_pieces` tells whether the tokens that a text shares with the row's last one are kept, or all is scored whole
    through the reward: a function or an ensemble is, and any classifier of which `reads_in_pieces` says no.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._last: dict[int, tuple[list[int], float]] = {}  # a row's last text and its score, before any scale
        classifier = reward.classifier
        self.in_pieces = classifier is not None and reads_in_pieces(classifier)
        self._rows = Rows(classifier.model, classifier.source) if classifier is not None and self.in_pieces else None
        self._names = itertools.count()
        self.num_fed = 0
        """Tokens that the reward has read."""

    def allocate(self, num_rows: int) -> list[int]:
        """Empty rows, named by integers."""
        if self._rows is None:
            return list(itertools.islice(self._names, num_rows))
        return self._rows.allocate(num_rows)

    def free(self, rows: Sequence[int]) -> None:
        """Give rows up."""
        for row in rows:
            self._last.pop(row, None)
        if self._rows is not None:
            self._rows.free(rows)

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Let rows go on from another's text; nothing is forwarded."""
        for target in targets:
            self._last.pop(target, None)
            if source in self._last:
                self._last[target] = self._last[source]
        if self._rows is not None and targets:
            held = self._rows.ids(source)
            self._rows.copy(source, targets, min(num_common(held, self._rows.ids(target)) for target in targets))

    def score(
        self,
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[list[float], list[Cost]]:
        """Scores of the rows' texts as they are at this point, each with its cost (seconds in equal shares).

        All arguments have one length. Each text that is read takes one step; those of one call go side by side
        (`Cost.beside`). What a function read is shared out evenly. `columns` are the prompts' further columns, for
        functions.

        Raises `RewardError` as `Reward.score` does; a text that is too long is refused before anything is forwarded.
        """
        assert len(set(rows)) == len(rows) == len(prompts) == len(texts), "one prompt and one text a row, each row once"
        if not rows:
            return [], []
        begin = time.perf_counter()
        scores, read = self._scored(rows, prompts, texts, columns or {})
        self.num_fed += sum(cost.reward_tokens for cost in read)
        seconds = (time.perf_counter() - begin) / len(rows)
        return scores, [replace(cost, reward_calls=self._reward.num_calls, seconds=seconds) for cost in read]

    def refused(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[int, IamaError]:
        """Of texts that `score` refused together: places of those that the model cannot read, and why."""
        found: dict[int, IamaError] = {}
        classifier = self._reward.classifier
        if classifier is None:
            return found
        for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            try:
                classifier.render([prompt], [text])
            except IamaError as error:
                found[place] = error
        return found

    def _scored(self, rows: Any, prompts: Any, texts: Any, columns: Any) -> tuple[list[float], list[Cost]]:
        """Scores and what was forwarded for each."""
        classifier = self._reward.classifier
        if classifier is None:
            scores, cost = self._reward.score(prompts, texts, columns)
            return scores, _shares(cost, len(rows))
        if self._rows is None:
            scores, ids = classifier.score_texts(prompts, texts)
            return self._reward.finish(prompts, texts, scores), classifier.costs(ids)
        ids = classifier.render(prompts, texts)
        read = self._read(classifier, self._rows, dict(zip(rows, ids, strict=True)))
        scores = [self._last[row][1] for row in rows]
        return self._reward.finish(prompts, texts, scores), [read.get(row, Cost()) for row in rows]

    def _read(self, classifier: Classifier, held: Rows, ids: Mapping[int, list[int]]) -> dict[int, Cost]:
        """Bring rows up to their ids and note their scores; returns what was forwarded for each, if anything."""
        starts = {}
        silent = []
        for row, new in ids.items():
            speaker = num_before_padding(new, classifier.pad_id) - 1
            if row in self._last and self._last[row][0] == new:
                continue
            if speaker < 0:
                silent.append(row)
            else:
                starts[row] = min(num_common(held.ids(row), new), speaker)
        counts = {row: len(ids[row]) - start for row, start in starts.items()}
        read = {}
        for batch in micro_batches(counts, classifier.batch_size):
            for row in batch:
                held.roll_back(row, starts[row])
            logits = held.extend(batch, [ids[row][starts[row] :] for row in batch])
            for row, flops in zip(batch, held.last_flops.tolist(), strict=True):
                read[row] = Cost(reward_tokens=counts[row], sequential_steps=1, flops=flops)
            self._note(batch, ids, classifier.scores(logits.float().cpu()))
        if silent:
            # Where all is padding the first column speaks, which in a left-padded batch is another one.
            self._note(silent, ids, classifier.score_ids([ids[row] for row in silent]))
            read |= zip(silent, classifier.costs([ids[row] for row in silent]), strict=True)
        return read

    def _note(self, rows: Sequence[int], ids: Mapping[int, list[int]], scores: Sequence[float]) -> None:
        for row, score in zip(rows, scores, strict=True):
            self._last[row] = (ids[row], score)


def _shares(cost: Cost, number: int) -> list[Cost]:
    """A cost in `number` parts, whose tokens differ by at most one; all are in one step."""
    tokens, rest = divmod(cost.reward_tokens, number)
    part = replace(cost, flops=cost.flops / number)
    return [replace(part, reward_tokens=tokens + (i < rest)) for i in range(number)]


def num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def num_before_padding(ids: Sequence[int], pad_id: int) -> int:
    """Number of ids up to the last that is not `pad_id`: the one that speaks for the row in transformers' pooling."""
    return next((i for i in range(len(ids), 0, -1) if ids[i - 1] != pad_id), 0)


def micro_batches(counts: Mapping[int, int], batch_size: int) -> list[list[int]]:
    """Rows to forward together, of similar numbers of new tokens, so that little is padding."""
    batches: list[list[int]] = []
    for row in sorted(counts, key=lambda row: (counts[row], row)):
        if not batches or len(batches[-1]) == batch_size or counts[row] > 2 * counts[batches[-1][0]] + SLACK:
            batches.append([])
        batches[-1].append(row)
    return batches


def reads_in_pieces(classifier: Classifier) -> bool:
    """Whether a text may be read in pieces, each once.

    It is read whole if it is one of a pair, if the model's `forward` takes no `past_key_values` (BERT and its kin), if
    it is an encoder-decoder, keeps recurrent state, attends to both sides by its configuration, has no padding token,
    or has positions (rotary or learned) that its `forward` does not let one name. Any other model is tried, once:
    ragged rows in two passes must score as they do whole. If they do not, a warning says so. What the trial forwards
    stands in no ledger.
    """
    model, config = classifier.model, classifier.model.config.get_text_config()
    accepted = accepted_arguments(model)
    both_sides = getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False)
    has_positions = any(getattr(config, name, None) for name in POSITIONS)
    if classifier.pair or "past_key_values" not in accepted or (has_positions and "position_ids" not in accepted):
        return False
    if model.config.is_encoder_decoder or both_sides or config.pad_token_id is None:
        return False
    try:
        refuse_recurrent(model, classifier.source)
    except ModelError:
        return False
    if model not in _probed:
        _probed[model] = _probe(classifier)
    return _probed[model]


def _probe(classifier: Classifier) -> bool:
    """Score ragged rows whole and in two passes; warn where they differ by more than rounding."""
    special = {*classifier.tokenizer.all_special_ids, classifier.pad_id}
    plain = [i for i in range(len(classifier.tokenizer)) if i not in special]
    sizes = [min(size, classifier.context_length or size) for size in PROBE]
    ids = [[plain[(7 * i + size) % len(plain)] for i in range(size)] for size in sizes]
    whole = torch.tensor(classifier.score_ids(ids))
    try:
        pieces = torch.tensor(_score_in_two(classifier, ids))
    except Exception as error:  # whatever a model does that cannot go on from a cache
        if is_out_of_memory(error):
            raise
        reason = f"cannot ({type(error).__name__})"
    else:
        if not differs(pieces, whole, classifier.model.dtype):
            return True
        worst = int((pieces - whole).abs().argmax())
        reason = f"gives {pieces[worst]:.4g} for {whole[worst]:.4g}"
    warnings.warn(
        f"{classifier.source}: {classifier.path!r} asked to read a text in pieces {reason}; every text is read whole, "
        "which is slower",
        IamaWarning,
        stacklevel=4,
    )
    return False


def _score_in_two(classifier: Classifier, ids: Sequence[Sequence[int]]) -> list[float]:
    """Scores of rows whose beginnings, of unlike shares, are read first."""
    held = Rows(classifier.model, classifier.source)
    rows = held.allocate(len(ids))
    cuts = [max(1, len(row) * (i + 1) // (len(ids) + 1)) for i, row in enumerate(ids)]
    held.extend(rows, [row[:cut] for row, cut in zip(ids, cuts, strict=True)])
    logits = held.extend(rows, [row[cut:] for row, cut in zip(ids, cuts, strict=True)])
    return classifier.scores(logits.float().cpu())
