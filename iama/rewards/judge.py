"""Judges: language models behind an OpenAI-compatible endpoint that score a text, or compare it with another.

The comparison in both orders, with a disagreement as a tie, is that of MT-Bench (Zheng et al. 2023, section 3.4).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iama.config.specs import JudgeSpec, RewardSpec
from iama.cost import Cost
from iama.environment import world_size
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.files import whole_lines
from iama.prompts.render import Prompt, completion_text, prompt_name, prompt_text
from iama.reading import decode, reason
from iama.rewards.remote import ChatAnswer, ChatRequest, Endpoint, check_addresses
from iama.rewards.reward import Columns, Scorer, TrlCompletion

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_PLACEHOLDERS = {"pointwise": {"prompt", "completion"}, "pairwise": {"prompt", "first", "second"}}
_VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}  # what the first text is worth
CHARS_PER_TOKEN = 4  # of English; for estimates only


class Judge(Scorer):
    """A judge as a scorer.

    Pointwise, a score is the judge's number; pairwise, 1 where the completion beats the text of `baseline_column` in
    both orders, 0 where it loses in both, else 0.5. An answer that cannot be read gives NaN, counted in
    `num_unparsable`. A cost's `reward_tokens` are the prompt and completion tokens of the answers. Kept answers count
    too, so that a run that goes on after a kill costs what one without costs; `num_asked` counts what was sent.
    """

    def __init__(self, spec: JudgeSpec, source: str) -> None:
        self.spec, self.source = spec, source
        self.template = read_template(spec, source)
        self.num_asked = self.num_unparsable = 0
        self._answers = AnswerCache(cache_path(spec), self._is_readable)
        self._unreadable: dict[str, dict[str, Any]] = {}
        self._has_warned = {"unparsable": False, "estimated": False}
        self._endpoint = Endpoint(
            spec.url,
            spec.model,
            spec.api_key_env,
            spec.timeout_s,
            spec.num_retries,
            max(1, spec.concurrency // world_size()),  # the processes of a training ask side by side
            source,
            spec.leave_out,
            # A judge is an instrument: its numbers at the server's own temperature are noisier, and numbers still.
            droppable=("seed", "temperature"),
        )

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores (NaN: missing) and their cost; raises `RewardError` for a missing baseline, and as `Endpoint` does."""
        questions = self._questions(prompts, completions, columns)
        keys = {text: question_key(self.spec, text) for row in questions for text in row}
        self._ask({key: text for text, key in keys.items()})
        answers = {text: self._answers.rows.get(key) or self._unreadable[key] for text, key in keys.items()}
        scores = [self._score([answers[text] for text in row]) for row in questions]
        self._note_unparsable(scores, questions, answers)
        rows = answers.values()
        if any(row["estimated"] for row in rows):
            self._warn("estimated", f"the model {self.spec.model!r} tells no usage; its tokens are estimated by length")
        tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        return scores, Cost(reward_tokens=tokens, sequential_steps=int(tokens > 0))

    def announcement(self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns) -> str:
        """What scoring these will ask and cost at most, in one line (`judge_plan`); asks nothing."""
        _, num_cached = self.count_requests(prompts, completions, columns)
        pairs = zip(prompts, completions, strict=True)
        num_chars = sum(len(prompt_text(prompt)) + len(completion_text(completion)) for prompt, completion in pairs)
        return judge_plan(self.spec, len(prompts), num_chars / len(prompts), num_cached)

    def count_requests(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[int, int]:
        """How many requests scoring these takes, and how many of them have answers that are kept; asks nothing."""
        questions = self._questions(prompts, completions, columns)
        keys = {question_key(self.spec, text) for row in questions for text in row}
        self._answers.refresh()
        return len(keys), len(keys & self._answers.rows.keys())

    def _questions(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> list[list[str]]:
        """What to ask about each completion: one text, or pairwise two, the completion first and second."""
        texts = [(prompt_text(p), completion_text(c)) for p, c in zip(prompts, completions, strict=True)]
        if self.spec.mode == "pointwise":
            return [[fill(self.template, {"prompt": prompt, "completion": text})] for prompt, text in texts]
        questions = []
        for (prompt, text), other in zip(texts, self._baselines(prompts, columns), strict=True):
            orders = ((text, other), (other, text))
            questions.append([fill(self.template, {"prompt": prompt, "first": a, "second": b}) for a, b in orders])
        return questions

    def _baselines(self, prompts: Sequence[Prompt], columns: Mapping[str, Any]) -> list[str]:
        name = self.spec.baseline_column
        assert name is not None
        if name not in columns:
            raise RewardError(
                f"{self.source}: the prompts have no column {name!r} (baseline_column); they have {sorted(columns)}"
            )
        for prompt, value in zip(prompts, columns[name], strict=True):
            if not isinstance(value, str):
                raise RewardError(
                    f"{self.source}: column {name!r} of the prompt {prompt_name(prompt)} is {value!r}; "
                    "it must be the text to compare with"
                )
        return list(columns[name])

    def _ask(self, questions: Mapping[str, str]) -> None:
        """Ask what has no answer yet, by key, and keep each answer as it arrives.

        One that cannot be read is kept in memory alone: while this judge lives it is not asked for again, and the next
        run asks afresh, perhaps a server that was mended.
        """
        self._answers.refresh()
        known = self._answers.rows.keys() | self._unreadable.keys()
        missing = [(key, text) for key, text in questions.items() if key not in known]
        requests = [
            ChatRequest(
                prompt=[{"role": "user", "content": text}],
                temperature=self.spec.temperature,
                max_tokens=self.spec.max_tokens,
                # Of the key, so that two draws differ, and two questions do not share their noise.
                seed=int(key[:8], 16) >> 1,
            )
            for key, text in missing
        ]
        if requests:
            self._answers.check_writable()
        fresh = []
        for index, answer in self._endpoint.ask_all(requests):
            key, text = missing[index]
            self.num_asked += 1
            row = as_row(key, text, answer)
            if self._is_readable(row):
                self._answers.append(row)
                fresh.append(row)
            else:
                self._unreadable[key] = row
        self._answers.refresh()
        for row in fresh:
            self._answers.rows.setdefault(row["key"], row)

    def _score(self, rows: list[dict[str, Any]]) -> float:
        """The score that one answer, or the answers to both orders, give; NaN where one was cut or is something else.

        A number that was cut may be the beginning of another.
        """
        replies = ["" if row["finish_reason"] == "length" else row["text"] for row in rows]
        if self.spec.mode == "pointwise":
            return parse_number(replies[0], self.spec.lowest, self.spec.highest)
        first, second = (parse_verdict(reply) for reply in replies)
        if math.isnan(first) or math.isnan(second):
            return math.nan
        second = 1.0 - second  # there the completion stood second
        return first if first == second else 0.5

    def _is_readable(self, row: dict[str, Any]) -> bool:
        """Whether an answer alone is what was asked for."""
        return not math.isnan(self._score([row] * (1 if self.spec.mode == "pointwise" else 2)))

    def _note_unparsable(
        self, scores: list[float], questions: list[list[str]], answers: Mapping[str, dict[str, Any]]
    ) -> None:
        """Count the missing scores; of the first, say what the judge wrote."""
        unread = [row for score, row in zip(scores, questions, strict=True) if math.isnan(score)]
        self.num_unparsable += len(unread)
        if not unread:
            return
        row = next(answers[text] for text in unread[0] if not self._is_readable(answers[text]))
        cut, more = "", ""
        if row["finish_reason"] == "length":
            cut, more = f" and was cut at max_tokens ({self.spec.max_tokens})", ", or raise max_tokens"
        self._warn(
            "unparsable",
            f"the judge answered {row['text'][:60]!r}{cut}, which is not {_wanted(self.spec)}; such scores are missing "
            f"(make {self.spec.prompt_file!r} ask for nothing else{more})",
        )

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind."""
        if not self._has_warned[kind]:
            self._has_warned[kind] = True
            warnings.warn(f"{self.source}: {message}", IamaWarning, stacklevel=4)


def cache_path(spec: JudgeSpec) -> Path:
    """The file of the answers that are kept."""
    return Path(spec.cache) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', spec.model)}.jsonl"


class AnswerCache:
    """Answers by key, in memory and in an append-only JSONL file that several processes may share.

    A line that `is_readable` refuses is passed over, as if its question had not been asked.

    Why no journal as pools have (`inference.pools.journal`): that has one writer, which cuts a torn last line off. Here
    every process of a training writes into one file while the others read on. So each answer is appended in one write,
    nothing is cut off, and a line that a kill has torn is passed over; its question is asked again.
    """

    def __init__(self, path: Path, is_readable: Callable[[dict[str, Any]], bool]) -> None:
        self.path, self.is_readable = path, is_readable
        self.rows: dict[str, dict[str, Any]] = {}
        self._position = 0  # in bytes: what comes before is read

    def refresh(self) -> None:
        """Read what this and other processes have appended since; of two answers to a question the first counts."""
        try:
            if not self.path.is_file():
                return
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError as error:
            raise RewardError(f"{self.path}: cannot read the judge's answers ({reason(error)})") from error
        whole = whole_lines(data)
        self._position += len(whole)
        for line in whole.split(b"\n"):
            row = _as_answer(line)
            if row is not None and self.is_readable(row):
                self.rows.setdefault(row["key"], row)

    def check_place(self) -> None:
        """Raise `RewardError` where a file stands in the folder's place, or a folder in the file's; makes nothing."""
        folder = next((parent for parent in self.path.parents if os.path.lexists(parent)), Path())
        if not folder.is_dir():
            raise self._unusable(f"{folder} is no folder")
        if os.path.lexists(self.path) and not self.path.is_file():
            raise self._unusable("it is no file")

    def check_writable(self) -> None:
        """Raise `RewardError` where no answer could be kept, before one is asked for and paid."""
        self.check_place()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise self._unusable(reason(error)) from error

    def _unusable(self, why: str, remedy: str = "set `cache` to a folder") -> RewardError:
        return RewardError(f"{self.path}: cannot keep the judge's answer ({why}); {remedy}")

    def append(self, row: dict[str, Any]) -> None:
        """Put an answer into the file; `refresh` brings it to `rows`."""
        line = json.dumps(row).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                if file.seek(0, 2) > 0:
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # end another's torn line
                is_whole = file.write(line) == len(line)
        except OSError as error:
            raise self._unusable(reason(error), "make room, or set `cache` to another folder") from error
        if not is_whole:
            raise RewardError(f"{self.path}: cannot keep the judge's answer whole; is the disk full?")


_FIELDS: dict[str, type] = {"key": str, "text": str, "finish_reason": str}
_FIELDS |= {"prompt_tokens": int, "completion_tokens": int, "estimated": bool}


def _as_answer(line: bytes) -> dict[str, Any] | None:
    """A line of the file, or None for one that is not whole."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in _FIELDS.items())
    return row if is_whole and min(row["prompt_tokens"], row["completion_tokens"]) >= 0 else None


def as_row(key: str, text: str, answer: ChatAnswer) -> dict[str, Any]:
    """An answer to a text as it is kept; tokens that the server did not count are estimated."""
    reply, counts = answer.texts[0], (answer.prompt_tokens, answer.completion_tokens)
    return {
        "key": key,
        "text": reply,
        "finish_reason": answer.finish_reasons[0],
        "prompt_tokens": num_tokens(len(text)) if counts[0] is None else counts[0],
        "completion_tokens": num_tokens(len(reply)) if counts[1] is None else counts[1],
        "estimated": None in counts,
    }


def question_key(spec: JudgeSpec, text: str) -> str:
    """Hash of all that decides an answer: model, text, temperature, max_tokens and draw.

    The url is left out: the same model at another address gives the same answers.
    """
    sent = [spec.model, text, spec.temperature, spec.max_tokens, spec.draw]
    left_out = sorted(set(spec.leave_out) - {"seed"})
    sent += [left_out] if left_out else []
    return hashlib.blake2b(json.dumps(sent).encode(), digest_size=16).hexdigest()


def parse_number(reply: str, lowest: float, highest: float) -> float:
    """The number that a reply is, decimal and from `lowest` to `highest`; NaN for any other reply."""
    reply = reply.strip()
    number = float(reply) if _NUMBER.fullmatch(reply) else math.nan
    return number if lowest <= number <= highest else math.nan


def parse_verdict(reply: str) -> float:
    """What a reply of exactly A, B or tie says of the first text: 1, 0 or 0.5; NaN for any other reply."""
    return _VERDICTS.get(reply.strip(), math.nan)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values in the places of {names}, all at once: braces in a value stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def read_template(spec: JudgeSpec, source: str) -> str:
    """The prompt file; raises `RewardError` where it is missing or its placeholders are not those of the mode."""
    try:
        data = Path(spec.prompt_file).read_bytes()
    except OSError as error:
        raise RewardError(f"{source}: cannot read prompt_file {spec.prompt_file!r} ({reason(error)})") from error
    text = decode(data, f"{source}: prompt_file {spec.prompt_file}", RewardError)
    template = text.replace("\r\n", "\n").replace("\r", "\n")  # the same question wherever it was written
    wanted, written = _PLACEHOLDERS[spec.mode], set(_PLACEHOLDER.findall(template))
    if missing := sorted(wanted - written):
        raise RewardError(
            f"{source}: prompt_file {spec.prompt_file!r} lacks {{{missing[0]}}}; mode {spec.mode} needs "
            f"{_names(wanted)}"
        )
    if unknown := sorted(written - wanted):
        raise RewardError(
            f"{source}: prompt_file {spec.prompt_file!r} has {{{unknown[0]}}}, but mode {spec.mode} knows only "
            f"{_names(wanted)}; for the text itself write {{ {unknown[0]} }}"
        )
    return template


def load_judge(spec: RewardSpec, source: str) -> Judge:
    """The judge that a reward names."""
    assert spec.judge is not None
    return Judge(spec.judge, source)


def check_judge(spec: RewardSpec, source: str, _prompts: Sequence[Prompt]) -> None:
    """Check the prompt file, the url, the key and the cache's place; asks nothing."""
    assert spec.judge is not None
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(f"{source}: a judge needs the openai package; pip install 'iama[remote]'")
    read_template(spec.judge, source)
    check_addresses(spec.judge.urls, source, spec.judge.api_key_env)
    AnswerCache(cache_path(spec.judge), bool).check_place()


def judge_plan(spec: JudgeSpec, num_texts: int, mean_chars: float, num_cached: int = 0) -> str:
    """What scoring will ask and cost, in one line, before it starts.

    `mean_chars` are the characters of a prompt with its completion, on average, and `num_cached` the requests whose
    answers are kept (`Judge.count_requests`). Tokens are estimated by length, those of answers by their limit.
    """
    num_orders = 1 if spec.mode == "pointwise" else 2
    num_requests = num_texts * num_orders - num_cached
    # Pairwise, the baseline is taken to be as long as the completion, and that as long as the two together.
    chars = mean_chars * num_orders + len(read_template(spec, "judge"))
    prompt_tokens, answer_tokens = num_requests * num_tokens(chars), num_requests * spec.max_tokens
    price = (prompt_tokens * spec.input_price + answer_tokens * spec.output_price) / 1e6
    priced = f", at a price of about {price:.2f}" if price else ""
    return (
        f"judge {spec.model} at {', '.join(spec.urls)}: {num_requests:,} requests ({num_cached:,} more are answered "
        f"already), about {prompt_tokens:,} prompt tokens and at most {answer_tokens:,} answer tokens{priced}"
    )


def num_tokens(num_chars: float) -> int:
    """Tokens of a text, estimated."""
    return math.ceil(num_chars / CHARS_PER_TOKEN)


def _wanted(spec: JudgeSpec) -> str:
    return f"one number from {spec.lowest:g} to {spec.highest:g}" if spec.mode == "pointwise" else "A, B or tie"


def _names(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
