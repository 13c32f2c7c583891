"""The rows of `summary.json`, one type a table; docs/reference/numbers.md says how each number is computed.

A value is None where it was not measured. Rewards are means over prompts; intervals hold 95 %, and are None below
`inference.statistics.bootstrap.MIN_PROMPTS` prompts. Keys that are not required stand only in rows that they say
something of.
"""

# Annotations are evaluated here, since `load_summary` reads from the types which keys are required.
from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from inference.engine.responses import SegmentRow

Unit = Literal[
    "samples",
    "policy_tokens",
    "policy_prefill_tokens",
    "policy_decode_tokens",
    "reward_calls",
    "reward_tokens",
    "backward_tokens",
    "sequential_steps",
    "flops",
    "seconds",
]
"""What a budget is counted in, a prompt."""
Level = Literal["some", "none", "flat", "not told"]
"""Whether a criterion has headroom; flat: no choice among answers changes its value, so nothing follows."""
Relation = Literal["conflict", "agree", "not told"]
"""How a criterion fares at another's best."""
Verdict = Literal["train", "draw more", "adapter each", "nothing", "not told"]
"""What to do with a policy."""
IntervalRow = Annotated[Sequence[float], Field(min_length=2, max_length=2)]
"""`[low, high]`, as JSON has an `Interval` (`inference.statistics.bootstrap`)."""


class Costs(TypedDict):
    """Mean cost of a prompt in every unit of the ledger."""

    policy_tokens: float | None
    policy_prefill_tokens: float | None
    policy_decode_tokens: float | None
    reward_calls: float | None
    reward_tokens: float | None
    backward_tokens: float | None
    sequential_steps: float | None
    flops: float | None
    seconds: float | None


class CurveExtras(TypedDict, total=False):
    """`disagreement` of an ensemble's members about what is kept; `written`, a tuned method with its settings.

    `draws`: the mean number of samples that are really drawn, where it is another than `samples`. Of a point of a dial,
    `dial` is the method as the evaluation names it, and `value` where its dial stands.
    """

    disagreement: float | None
    written: str
    draws: float | None
    dial: str
    value: str


class CurveRow(Costs, CurveExtras):
    """One (policy, criterion, method, budget); a method that is one point has no number of `samples`.

    `kl` is to the reference, in nats.
    """

    policy: str
    criterion: str
    method: str
    samples: int | None
    proxy: float | None
    proxy_ci95: IntervalRow | None
    gold: float | None
    gold_ci95: IntervalRow | None
    kl: float | None
    kl_kind: str | None
    num_prompts: int


class Compared(TypedDict):
    """What the trained policy is compared by, and with which reference."""

    criterion: str
    method: str
    metric: str
    reference: str


class Ratio(TypedDict):
    """Cost of the reference over cost of the trained policy, for the same value."""

    ratio: float
    ci95: IntervalRow | None


class SavingsFigures(Ratio):
    """A ratio (in samples, if the row has no `unit`) and that in each of `units`.

    `inference.statistics.savings.Savings` says what the flags mean.

    `constant_proxy` is there, and true, where a side's proxy is the same for all answers to each prompt in some seed:
    it selects by chance, and the ratio says nothing, so it does not count. `constant_gold` likewise in a row by gold,
    where gold is the same for all answers of both sides to each prompt.
    """

    units: dict[str, Ratio]
    censored: bool
    num_censored: int
    num_seeds: int
    ci_censored: float
    ci_floor: float
    floor: bool
    hacked: bool | None
    counts: bool
    token_ratio: float | None
    token_ci95: IntervalRow | None
    constant_proxy: NotRequired[bool]
    constant_gold: NotRequired[bool]
    reference_method: NotRequired[str]
    unit: NotRequired[Unit]


class SavingsRow(Compared, SavingsFigures):
    """The saving of the trained policy at `samples` over one reference.

    A method that is one point has no number of samples. Its reference stands by another curve, `reference_method`: its
    method's dial, or the first of the methods that are measured at every budget; `unit` is that of `ratio`.
    """

    samples: int | None


Stopping = Literal["stopping", "training", "compounding", "both"]
"""What is compared: the reference that stops with itself; the trained policy with the reference that stops; the trained
policy that stops with itself, and with the reference."""


class StoppingRow(SavingsRow):
    """`policy` by `method` at `samples` draws, against the curve of `reference` by `reference_method`.

    The ratio is that of draws: what the latter needs for the same value, over what the former makes.
    """

    compared: Stopping
    policy: str


class StopSettingRow(TypedDict):
    """The method that would serve about `samples` draws on average, chosen by proxy on all prompts.

    `draws` are those that it makes there, `proxy` is what it keeps there.
    """

    policy: str
    criterion: str
    samples: int
    method: str
    draws: float
    proxy: float


class AverageRow(TypedDict):
    """Geometric means over criteria; intervals where several runs were combined elsewhere.

    `reference_method` and `unit` are those of the rows.
    """

    method: str
    metric: str
    reference: str
    samples: int | None
    ratio: float | None
    token_ratio: float | None
    seconds_ratio: NotRequired[float | None]
    num_censored: int
    num_floor: int
    num_censored_total: int
    num_not_counted: int
    num_criteria: int
    ci95: NotRequired[IntervalRow | None]
    reference_method: NotRequired[str]
    unit: NotRequired[Unit]


class DifferenceRow(TypedDict):
    """Rewards summed over criteria: trained minus reference, both at `samples`."""

    method: str
    metric: str
    reference: str
    samples: int
    mean: float
    ci95: IntervalRow | None
    num_seeds: int


class EqualCostFigures(TypedDict):
    """Trained minus reference at the same cost; `clipped`: the end of the reference's curve that it stands at."""

    budget: float
    difference: float
    ci95: IntervalRow | None
    reference_samples: float
    clipped: str | None
    num_seeds: int


class EqualBudgetRow(Compared, EqualCostFigures):
    """The same in one unit, against the reference's curve by `reference_method`."""

    reference_method: str
    unit: str


class QualityIntervals(TypedDict):
    """Intervals of what the trained policy has more than a reference, paired by prompt.

    `without`: gold of one sample. `worst_with`: gold of the worst 5 % with the method; None of several seeds together.
    """

    without: IntervalRow | None
    worst_with: IntervalRow | None


QualityRow = TypedDict(
    "QualityRow",
    {
        "without": float | None,
        "with": float | None,
        "proxy_without": float | None,
        "proxy_with": float | None,
        "worst_without": float | None,
        "worst_with": float | None,
        "method": str,
        "samples": int,
        "against": dict[str, QualityIntervals],
    },
)
"""Gold, proxy and the worst 5 % by gold, of one sample and of `method` at `samples`.

`against` has, by reference, the intervals of the trained policy's differences; it is empty for other policies.
"""


class HackingRow(TypedDict):
    """Where gold turns down along a curve; `onset` is the first budget surely below the peak."""

    policy: str
    criterion: str
    method: str
    peak_samples: float
    peak_gold: float
    onset: float | None
    last_gold: float
    drop: float
    drop_ci95: IntervalRow


class ControlRow(TypedDict):
    """Another way to choose among the same samples."""

    policy: str
    criterion: str
    control: str
    samples: int
    proxy: float
    gold: float
    gold_ci95: IntervalRow | None


class WinRateRow(TypedDict):
    """Share of prompts on which an answer beats the baseline's, ties half."""

    policy: str
    criterion: str
    method: str
    samples: int
    metric: str
    baseline_policy: str
    baseline_samples: int
    win_rate: float
    ci95: IntervalRow | None
    length_controlled: float | None
    length_controlled_ci95: IntervalRow | None


class Choice(TypedDict):
    """A policy, method and number of samples, with the gold that it is worth.

    `written`: what a user writes for the method at this number, e.g. as `iama generate --method`.
    """

    policy: str
    method: str
    samples: int | None
    gold: float
    written: NotRequired[str]


class RecommendationRow(Choice):
    """What to use for a budget, and the next best; `halves_gold` is of what one half of the prompts would choose."""

    criterion: str
    unit: str
    budget: float
    ci95: IntervalRow
    halves_gold: float | None
    halves_ci95: IntervalRow | None
    runner_up: Choice | None


class BreakEvenRow(TypedDict):
    """Queries until a training's FLOPs are saved (None: never, or not known, as `note` says); `bound`: at most so many.

    `reference_method` stands where something was fitted for the method, which counts as training.
    """

    reference: str
    criterion: str
    method: str
    reference_method: NotRequired[str]
    training_flops: float
    reference_training_flops: float
    reference_flops: float
    trained_flops: float
    queries: float | None
    bound: bool
    note: str


class HeadroomRow(TypedDict):
    """Values at the trained and at the far budget, and their difference; `metric` is proxy where there is no gold.

    `spread`: standard deviation within a prompt. `needed`: samples for nearly the far value, or for half the headroom.
    `falls_from`: samples from which the value is surely below its peak.
    """

    criterion: str
    metric: str
    value: float
    far_value: float
    headroom: float
    ci95: IntervalRow | None
    spread: float
    level: Level
    needed: float
    needed_ci95: IntervalRow | None
    half_needed: float | None
    falls_from: float | None


class ExclusionRow(TypedDict):
    """A criterion in the answers kept for another: `value`, beside what it has for itself and in a random sample.

    `correlation`: of ranks, over the samples of a prompt.
    """

    kept_for: str
    criterion: str
    metric: str
    samples: int
    value: float
    own: float
    single: float
    change: float
    ci95: IntervalRow | None
    relation: Relation
    correlation: float | None
    correlation_ci95: IntervalRow | None


class HeadroomFigures(TypedDict):
    """Whether training a policy has anything to gain; `inference.statistics.headroom` has the rules."""

    policy: str
    samples: int
    far: int
    verdict: Verdict
    conflicting: list[str]
    criteria: list[HeadroomRow]
    exclusions: list[ExclusionRow]


class TextFigures(TypedDict):
    """Lengths and variety of answers; shares that were cut at the limit, or are different texts and n-grams."""

    num_samples: int | None
    mean_tokens: float | None
    truncated: float | None
    distinct: float | None
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None


class SamplingCost(TypedDict):
    """What drawing the answers took; `estimated` where a server did not report it."""

    prefill_tokens: int | None
    decode_tokens: int | None
    flops: float | None
    seconds: float | None
    peak_memory: int | None
    estimated: bool | None


class LikelihoodFigures(TypedDict):
    """Fluency under the reference, beside the reference's own; mean log-ratio to it, in nats a response."""

    fluency: float | None
    fluency_z: float | None
    mean_log_ratio: float | None


class SamplingRow(TextFigures, SamplingCost, LikelihoodFigures):
    """A pool (without a method), or what a method that is one point answered: what it looks like and what it took.

    `fallback` and `capped` are shares: of segments that were forced or prompts without a choice, of draws cut short.
    """

    policy: str
    criterion: str | None
    method: str | None
    engine: str
    fallback: float | None
    capped: float | None


class MissingRow(TypedDict):
    """Scores that a reward did not give; with a `method` among its answers, else among the pool's samples."""

    policy: str
    criterion: str
    metric: str
    method: NotRequired[str]
    num_missing: int
    num_samples: int


class ConstantRow(TypedDict):
    """Scores that are the same for all answers to each prompt; `value` where they are the same for all prompts too."""

    policy: str
    criterion: str
    metric: str
    value: float | None


class RewardCostRow(TypedDict):
    """What scoring the pools took."""

    reward: str
    reward_calls: int
    reward_tokens: int
    seconds: float
    flops: NotRequired[float | None]


class Answer(TypedDict):
    """A text with its scores."""

    text: str
    proxy: float | None
    gold: float | None


class Candidate(Answer):
    """One of the samples that a method chose from."""

    chosen: bool


class ExampleRow(TypedDict):
    """A prompt, the policy's first sample, and what the method keeps of how many samples."""

    prompt: str
    policy: str
    criterion: str
    method: str
    samples: int | None
    single: Answer
    best: Answer
    candidates: list[Candidate]
    segments: list[SegmentRow]
