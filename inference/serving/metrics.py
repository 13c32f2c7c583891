"""What a server tells Prometheus: counters, gauges and histograms in its text format, and monitors of drift."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from inference.serving.answering import State
from inference.serving.asks import Answer
from inference.serving.catalogue import Catalogue, Model

Labels: TypeAlias = tuple[str, ...]
Samples: TypeAlias = Iterable[tuple[Labels, float]]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends, in seconds."""
WINDOW = 500
"""Answers that a monitor looks back on."""


@dataclass(eq=False)
class Counter:
    """Numbers that grow, or that are set (`kind` gauge), by label values."""

    name: str
    help: str
    labels: Labels = ()
    kind: Literal["counter", "gauge"] = "counter"
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, number: float, *labels: str) -> None:
        """Count."""
        self.values[labels] = self.values.get(labels, 0.0) + number

    def lines(self) -> Iterable[str]:
        """As Prometheus reads it."""
        values = self.values if self.values or self.labels else {(): 0.0}
        return _lines(self.name, self.help, self.kind, self.labels, values.items())


@dataclass(eq=False)
class Histogram:
    """Seconds by label values."""

    name: str
    help: str
    labels: Labels
    counts: dict[Labels, list[int]] = field(default_factory=dict)
    sums: dict[Labels, float] = field(default_factory=dict)

    def observe(self, seconds: float, *labels: str) -> None:
        """Note one time."""
        counts = self.counts.setdefault(labels, [0] * (len(BUCKETS) + 1))
        counts[bisect_left(BUCKETS, seconds)] += 1
        self.sums[labels] = self.sums.get(labels, 0.0) + seconds

    def lines(self) -> Iterable[str]:
        """As Prometheus reads it: each bucket counts those below it, too."""
        yield from (f"# HELP {self.name} {self.help}", f"# TYPE {self.name} histogram")
        for labels, counts in self.counts.items():
            pairs, below = list(zip(self.labels, labels, strict=True)), 0
            for end, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                below += count
                yield f"{self.name}_bucket{_braces([*pairs, ('le', end)])} {below}"
            yield f"{self.name}_sum{_braces(pairs)} {self.sums[labels]:.6f}"
            yield f"{self.name}_count{_braces(pairs)} {below}"


def _lines(name: str, told: str, kind: str, labels: Labels, samples: Samples) -> Iterable[str]:
    yield from (f"# HELP {name} {told}", f"# TYPE {name} {kind}")
    for values, number in samples:
        yield f"{name}{_braces(zip(labels, values, strict=True))} {number:.10g}"


def _braces(pairs: Iterable[tuple[str, str]]) -> str:
    text = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)
    return f"{{{text}}}" if text else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@dataclass(eq=False)
class Window:
    """The last answers of one policy, criterion and method: their rewards, and which were plain samples."""

    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    fallbacks: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    segments: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Proposals that were accepted, and those that were tested."""


class Metrics:
    """All that is counted."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        way = ("policy", "criterion", "method")
        self.requests = Counter("iama_requests_total", "Requests by route and status.", ("route", "status"))
        self.answers = Counter("iama_answers_total", "Answers that were finished.", way)
        self.tokens = Counter(
            "iama_tokens_total",
            "Tokens: prompt (each prompt once), sampled, kept and rejected ones of these, reward (read by rewards).",
            ("policy", "kind"),
        )
        told = "Tokens that policies were fed, by ledgers."
        self.ledger = Counter("iama_ledger_tokens_total", told, ("policy", "kind"))
        self.reward_calls = Counter("iama_reward_calls_total", "Texts scored.", ("criterion",))
        self.failures = Counter("iama_failures_total", "Answers that failed.", ("criterion", "code"))
        self.first = Histogram(
            "iama_first_text_seconds", "From the request to the first text of its stream.", ("method",)
        )
        self.whole = Histogram("iama_request_seconds", "From the request to the end of its reply.", ("method",))
        self._windows: dict[Labels, Window] = {}

    def way_of(self, model: Model) -> Labels:
        """Labels of a model: a method that a client wrote goes by its name, lest there be a label for each number."""
        written = model.written if model.id in self._catalogue.models else f"{model.method.name}(...)"
        return model.policy, model.criterion or "", "single" if model.written == "single" else written

    def note(self, model: Model, answer: Answer) -> None:
        """Count an answer."""
        completion, cost, labels = answer.completion, answer.completion.cost, self.way_of(model)
        self.answers.add(1, *labels)
        kept = len(completion.token_ids)
        counts = {"sampled": answer.num_sampled, "kept": kept, "rejected": answer.num_rejected}
        for kind, number in (counts | {"reward": cost.reward_tokens}).items():
            self.tokens.add(number, model.policy, kind)
        self.ledger.add(cost.policy_prefill_tokens, model.policy, "prefill")
        self.ledger.add(cost.policy_decode_tokens, model.policy, "decode")
        if model.criterion is not None:
            self.reward_calls.add(cost.reward_calls, model.criterion)
        window = self._windows.setdefault(labels, Window())
        window.fallbacks.append(completion.fallback)
        if completion.reward is not None:
            window.rewards.append(completion.reward)
        if completion.trace:
            accepted = sum(not segment.forced for segment in completion.trace)
            window.segments.append((accepted, sum(segment.num_tested for segment in completion.trace)))

    def text(self, state: State, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything, with the engine's state and the `gauges` of whoever takes requests: by name, help and value."""
        lines: list[str] = []
        for part in (self.requests, self.answers, self.tokens, self.ledger, self.reward_calls, self.failures):
            lines += part.lines()
        lines += [*self.first.lines(), *self.whole.lines()]
        for name, (told, value) in gauges.items():
            lines += _lines(name, told, "gauge", (), [((), value)])
        lines += _of_the_engine(state)
        for name, told, samples in self._monitors():
            lines += _lines(name, told, "gauge", ("policy", "criterion", "method"), samples)
        return "\n".join(lines) + "\n"

    def _monitors(self) -> Iterable[tuple[str, str, list[tuple[Labels, float]]]]:
        """Of the last answers; a share that moves while nothing was changed is drift."""
        last, ways = f"of the last {WINDOW} answers", self._windows.items()
        rewarded = [(way, window.rewards) for way, window in ways if window.rewards]
        yield "iama_proxy_mean", f"Mean proxy reward {last}.", [(way, sum(r) / len(r)) for way, r in rewarded]
        above = [
            (way, sum(reward > highest for reward in rewards) / len(rewards))
            for way, rewards in rewarded
            if (highest := self._highest(way)) is not None
        ]
        yield "iama_above_calibration_share", f"Share {last} whose reward is above all of the calibration.", above
        shares = [(way, sum(w.fallbacks) / len(w.fallbacks)) for way, w in ways if w.fallbacks]
        yield "iama_fallback_share", f"Share {last} that are plain samples, since none was accepted.", shares
        acceptance = [
            (way, sum(a for a, _ in w.segments) / tested)
            for way, w in ways
            if (tested := sum(t for _, t in w.segments))
        ]
        yield "iama_acceptance", f"Share of tested proposals that were accepted, {last}.", acceptance

    def _highest(self, way: Labels) -> float | None:
        rewards = self._catalogue.rewards.get((way[0], way[1]))
        return None if rewards is None else max(rewards)


def _of_the_engine(state: State) -> Iterable[str]:
    """What the engine holds now, and what it has fed, that of answers which failed or were given up included."""
    yield from _lines("iama_rows", "Rows of keys and values in use.", "gauge", (), [((), state.num_rows)])
    for name, told, counts in (
        ("iama_answers_running", "Answers that are worked on.", state.live),
        ("iama_answers_waiting", "Answers that wait for rows.", state.waiting),
    ):
        yield from _lines(name, told, "gauge", ("kind",), [((kind,), count) for kind, count in counts.items()])
    fed = [(("policy",), float(state.fed[0])), (("reward",), float(state.fed[1]))]
    lost = [(("policy",), float(state.lost[0])), (("reward",), float(state.lost[1]))]
    yield from _lines("iama_fed_tokens_total", "Tokens that models were fed.", "counter", ("model",), fed)
    told = "Tokens of these that are in no ledger: of answers that failed or were given up."
    yield from _lines("iama_lost_tokens_total", told, "counter", ("model",), lost)
