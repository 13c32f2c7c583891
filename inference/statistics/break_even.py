"""After how many queries a training run has paid for itself, in FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

NOT_KNOWN = "not known"
"""In a note: why there are no queries is that nobody knows, and not that nothing is saved."""


@dataclass(frozen=True)
class BreakEven:
    """Queries after which training has paid; None: never, or not known. `bound`: an upper one. `note` says why.

    `reference_training_flops` is what the reference's own training took, 0 where that is not known.
    """

    training_flops: float
    reference_training_flops: float
    reference_flops: float
    trained_flops: float
    queries: float | None
    bound: bool
    note: str


def break_even(
    training_flops: float,
    reference_flops: float,
    trained_flops: float,
    *,
    censored: bool,
    floor: bool = False,
    reference_training_flops: float = 0.0,
) -> BreakEven:
    """`(training_flops - reference_training_flops) / (reference_flops - trained_flops)`, the last two at equal value.

    0 where the reference's training took no less. `censored`: the reference never reaches that value, so its cost is a
    lower bound and the queries are an upper one. `floor`: one reference sample is more than good enough, so its cost
    is an upper bound; then the queries say nothing and are None, as where nothing is saved.
    """
    saved = reference_flops - trained_flops
    extra = training_flops - reference_training_flops
    queries, bound, note = None, False, ""
    if saved <= 0 and censored:
        note = f"the reference does not reach the value at its largest budget, which costs less: {NOT_KNOWN}"
    elif saved <= 0:
        note = "nothing is saved"
    elif floor:
        note = f"a single sample of the reference is already better: {NOT_KNOWN}"
    elif extra <= 0:
        queries, note = 0.0, "the reference's training took no less"
    else:
        queries, bound = extra / saved, censored
        note = "at most: the reference does not reach the value at all" if censored else ""
    return BreakEven(
        training_flops, reference_training_flops, reference_flops, trained_flops, queries, bound=bound, note=note
    )
