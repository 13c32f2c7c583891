"""The page docs/results/hedging.md and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import hedging_ensembles as several
from scripts.experiments import hedging_plot, pages
from scripts.experiments import hedging_tables as tables
from scripts.experiments import hedging_values as values
from scripts.experiments.hedging_ensembles import DISTILLED
from scripts.experiments.hedging_plot import NAMES, POLICIES, bon_means, cells
from scripts.experiments.hedging_tables import HOW_NAMES
from scripts.experiments.hedging_values import DRAWS, FAMILIES, FAR, MAX_BUDGET
from scripts.experiments.pages import Claim, claims_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.experiments.hedging import Size
    from scripts.experiments.hedging_values import Hedge, Pressed, Results
    from scripts.experiments.weak_proxy import Weakness

PAGE, PLOT = Path("docs/results/hedging.md"), Path("docs/results/hedging.svg")
COMMAND = "python -m scripts.experiments.hedging"

INTRO = """![gold against n, against KL, and under guided samplers](hedging.svg)

Thick lines are means over worlds; thin ones are Best-of-n in each world, the vertical one is at {max_budget} draws.

**What is measured.** A user has a weak proxy for helpful and few gold labels: how hard may the proxy be pushed? The
proxy is a reward model of {num_pairs} preferences (read {num_epochs} times; the world's own has 10,000), {flips} of
them turned round. In {sure_share} of the pairs one answer sounds surer than the other, with two words like "surely" or
more, and labels prefer it; in the others such a word is worth {bonus:g} of gold (gold is 0 to 1). The proxy orders
{accuracies} of clean held-out pairs as gold does. Some twenty such settings were tried on world 0 until gold of
Best-of-n on the base, by each of five members, rose and then fell; worlds {seeds} were judged once before with another
proxy ([below](#an-earlier-attempt)). Policies: the base, and IAMA (`bon(4)` for both criteria, settings of
[the search](search.md)) trained with the weak proxy for helpful and the world's own for harmless. Everything here is
gold helpfulness, selected by the weak proxy.

**Prompts.** None is in a training split. Settings are tuned (`inference.hedging.tune`) on {num_calibration} prompts
with {calibration_samples} samples, {max_budget} draws at most (a quarter of the pool); they are judged on
{num_prompts} *other* prompts with {num_samples} samples each. *Best fixed*: the best of the settings that are tried,
chosen by gold on one half of the judge's samples; all are scored on the other half. *Gain*: gold above a single
sample's; one within two standard errors of 0 is called none. Soft Best-of-n and ITP (InferenceTimePessimism, one
batch) weigh the ranks of their {draws} draws, not raw rewards. Every curve comes from one pool a policy, unbiased for
every n.

**Bounds of what this shows.** Models of about a million parameters, a synthetic language, a proxy made to be hacked.
Intervals (95 %) resample seeds and, within a seed, prompts (1000 times); three seeds say little of other worlds."""

VERDICT = """## Verdict

The bars were set before these worlds were judged. {met} of {number} are met; the table says which are not.

Gold of a single sample is {base:.3f} on the base and {iama:.3f} on IAMA, which was trained with the weak proxy, and
{best:.3f} at IAMA's best n. Where training has pushed a proxy too far, hedging a sampler does not undo it.

{in_short}"""
IN_SHORT = "In short: {met} of {number} claims met, HedgeTune loses at most {most:.1f} % of the best fixed gain."
"""What `scripts.results_page` puts into its row."""

NO_ONSET = """HedgeTune's claims presuppose that the onset of hacking lies within n = {max_budget}. It does not for
{worlds}: those claims rest on the other worlds, and its figures are in brackets."""

TOLD = """*{policy} in world {seed}: no onset within n = {max_budget}.* On the {num_prompts} test prompts gold is
highest at n = {peak:g}, so of the settings allowed the last is best. On the calibration prompts `tune` says
"{regime}" and takes n = {value:g} (95 % of its replicates: {low:g} to {high:g}), where gold is
{loss} above that at n = {max_budget}.
{conclusion}
Best-of-n, soft Best-of-n and Best-of-Poisson lose {lost} of the gain there."""

AGREED = "The test prompts say the same."
BEYOND_NOISE = "The calibration prompts show that fall beyond their noise; the test prompts do not have it."
WITHIN_NOISE = """That is within the noise of so few prompts: "hacks" says where the curve of the
calibration prompts is highest and is no test of a fall; the interval must be read with it."""

CURVES = """## Best-of-n: gold rises, then falls

Means over prompts, the first member as proxy. *Onset*: the first n after the peak whose gold is surely below it
(`inference.statistics.hacking`). Proxy is in standard deviations of the calibration pool."""

HEDGED = """## HedgeTune against the best fixed setting

*Lost*: share of the best fixed setting's gain that the tuned one does not have (negative: it is better). *Strongest*:
gold of the last setting allowed, what an unhedged user gets who pushes that far."""

RESISTS = """## What resists

InferenceTimePessimism by its number of draws, Best-of-n beside it: gold, mean over seeds. *Falls*: gold at its peak
less gold at {far}."""

ENSEMBLES = """Ensembles of {num_members} members; *one member*: mean of what each gives alone. *Distilled*: one reward
model, from the first member, trained for {num_steps} steps on the margins of the ensemble's mean over the calibration
pool (`trainers.distill`).

*One scale*, within prompts: from a member's score its mean over that prompt's {num_near} samples is taken, and the rest
is divided by the root of its mean variance within a prompt of the calibration pool. Otherwise what a member adds to all
answers of a prompt can make it the minimum, or the median, of all of them. The samples that fix the mean are more than
Best-of-n draws; a user would need as many to every prompt."""

EARLIER_SCALE = """An earlier version of this page used one mean and one deviation of a member over the whole
calibration pool, so that those offsets stayed. The scale above was chosen and written down before its outcome was seen,
with the bars as they were. Of these {number} claims {then} were met on the earlier scale and {now} are on this one (the
distilled reward was trained anew and is left out here):"""

AGREEMENT = """An ensemble mends errors that its members do not share. Correlations over the samples of a prompt, means
over members and seeds; *given gold*: what two members still have in common once gold is held constant. All members
learned from labels that prefer sure words, and averaging does not remove what they share."""

SECONDS = """## What tuning costs

Seconds in one process beside others on two cores: sampling and scoring the calibration pool once, by the proxy; then
`tune` with 1000 bootstrap replicates, each tuned again. Gold labels are functions here and cost nothing."""

KL = """## Gold against KL

KL to the policy in nats, for a proxy without ties, in closed form. Differences of gold at equal KL that are no greater
than Best-of-n's own deficit to the KL-optimal tilt are called ties. That deficit is one of the expected quantile; it is
put into gold by the slope of Best-of-n's gold against its expected quantile, from n - 1 to n + 1 (absolute, of means
over worlds). Near the peak of gold the slope is small, and so is what passes for a tie. An earlier version of this page
compared gold with the deficit in quantiles itself, which is the wider bound."""

PRESSURE = """## Gold against pressure of guided samplers

Base policy, guided by the weak proxy; the first {num_prompts} test prompts of each seed ({num_answers} answers each; of
SEA 1). CARDS by target (a quantile of the calibration pool's proxy; entropy threshold and acceptance temperature as
[chosen with the world's own proxy](cards.md)), GGRO by candidates (sampled decoding), SEA by steps (4 chains). *n = 1*:
the samplers' own lowest pressure is not unguided, so gold of a single sample on the same prompts stands beside."""

EARLIER = """## An earlier attempt

The proxy was chosen first by two members on world 0: a word like "surely" was worth 0.25 and 40 % of the pairs sounded
sure. Judged were the base on worlds 10 and 11 and IAMA on world 10. On world 10 gold peaked at n = 5 on the base (onset
7) and at n = 2 on IAMA (onset 3); the tuned settings lost 1.2, 0.4 and 0.4 % (Best-of-n, soft Best-of-n,
Best-of-Poisson) of the base's gain and at most 0.5 % of IAMA's. On world 11 the first member, more accurate than the
others (67 %), did not fall within n = 128: nothing to hedge, and nothing was lost. The attempt was given up there,
since a proxy that is not hacked shows nothing of hedging; the one above was chosen on world 0 alone, by five members,
and sounds surer."""


def write(
    results: Results,
    pressed: Mapping[int, Sequence[Pressed]],
    weakness: Weakness,
    accuracies: Mapping[int, Sequence[float]],
    size: Size,
) -> None:
    """Write the page and its plot."""
    hedges = {(p, f): [values.hedge(c, f) for c in cells(results, p)] for p in POLICIES for f in FAMILIES}
    hedging_plot.draw(PLOT, results, pressed, hedges)
    first = next(iter(accuracies.values()))
    shares = [share[0] for share in accuracies.values()]
    intro = INTRO.format(
        num_pairs=weakness.num_pairs,
        num_epochs=weakness.num_epochs,
        flips=f"{weakness.flip_rate:.0%}",
        sure_share=f"{weakness.sure_share:.0%}",
        bonus=weakness.spurious_bonus,
        accuracies=" to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares)))),
        max_budget=MAX_BUDGET,
        seeds=", ".join(map(str, accuracies)),
        num_calibration=size.num_calibration_prompts,
        calibration_samples=size.num_calibration_samples,
        num_prompts=size.num_prompts,
        num_samples=size.num_samples,
        draws=DRAWS,
    )
    told = claims(results, hedges)
    parts = [
        intro,
        _verdict(results, hedges, told),
        *_without_onset(results),
        claims_table(told),
        CURVES,
        tables.curves(results),
        HEDGED,
        tables.hedged(results, hedges),
        *_told_without_onset(results, hedges),
        RESISTS.format(far=FAR),
        tables.pessimism(results),
        ENSEMBLES.format(num_members=len(first), num_steps=size.num_distill_steps, num_near=size.num_member_samples),
        tables.ensembles(results),
        _earlier_scale(results),
        AGREEMENT,
        tables.agreement(results),
        SECONDS,
        tables.seconds(results),
        KL,
        tables.tuned_on_kl(results, hedges),
        tables.equal_kl(results),
        PRESSURE.format(num_prompts=size.num_guided_prompts, num_answers=size.num_answers),
        tables.guided(results, pressed),
        EARLIER,
    ]
    pages.write_page(PAGE, "Hedging against a weak proxy", COMMAND, parts)


def claims(results: Results, hedges: Mapping[tuple[str, str], Sequence[Hedge]]) -> list[Claim]:
    """What is to be shown, with the bars that were set beforehand."""
    return [
        *(_rises_and_falls(results, policy) for policy in POLICIES),
        *(_loses_little(results, policy, f, hedges[policy, f]) for policy in POLICIES for f in FAMILIES),
        *(_stays_flat(results, policy) for policy in POLICIES),
        *(_delays(results, policy, how) for policy in POLICIES for how in HOW_NAMES),
        _is_cheap(results),
    ]


def _rises_and_falls(results: Results, policy: str) -> Claim:
    found = cells(results, policy)
    good, told = 0, []
    for cell in found:
        hack = values.hacked(cell.test.proxy_PS, cell.test.gold_PS)
        gain = values.best_of([cell], hack.peak_samples, minus=1)
        good += gain.ci95[0] > 0 and values.onset_inside(cell)
        told.append(f"{hack.peak_samples:g} and {'-' if hack.onset is None else f'{hack.onset:g}'}")
    text = f"{POLICIES[policy]}: gold rises, then falls with n, onset within n = {MAX_BUDGET}; proxy rises"
    measured = f"{good} of {len(found)} seeds; peak and onset {', '.join(told)}"
    return Claim(text, "every seed; both intervals above 0", measured, good == len(found))


def _loses_little(results: Results, policy: str, family: str, hedges: Sequence[Hedge]) -> Claim:
    inside = [values.onset_inside(cell) for cell in cells(results, policy)]
    lost = ["none" if h.is_none else f"{100 * h.lost:+.1f} %" for h in hedges]
    shown = ", ".join(share if good else f"({share})" for share, good in zip(lost, inside, strict=True))
    text = f"{POLICIES[policy]}: tuned {NAMES[family]} loses at most 5 % of the best fixed setting's gain"
    measured = f"{shown}; onset inside in {sum(inside)} of {len(inside)} seeds"
    return Claim(text, "every seed; in brackets: onset not inside", measured, all(h.met for h in hedges))


def _stays_flat(results: Results, policy: str) -> Claim:
    found = cells(results, policy)
    betas = [cell.tuned["itp"].value for cell in found]
    far = [values.pessimism([cell], beta, FAR)[0] for cell, beta in zip(found, betas, strict=True)]
    near = [values.pessimism([cell], beta, MAX_BUDGET)[0] for cell, beta in zip(found, betas, strict=True)]
    bon = [values.expected("bon", [MAX_BUDGET, FAR], c.test.proxy_PS, c.test.gold_PS) for c in found]
    own, other = values.gap(far, near), values.gap([b[:, 1] for b in bon], [b[:, 0] for b in bon])
    rest = values.gap([f - n for f, n in zip(far, near, strict=True)], [b[:, 1] - b[:, 0] for b in bon])
    text = (
        f"{POLICIES[policy]}: ITP at the tuned beta stays flat from {MAX_BUDGET} to {FAR} draws where Best-of-n falls"
    )
    bar = "its change within 0.005 of 0; above Best-of-n's, interval above 0"
    met = abs(own.mean) <= 0.005 and rest.ci95[0] > 0
    return Claim(text, bar, f"ITP {own.mean:+.3f}, Best-of-n {other.mean:+.3f}; difference {rest}", met)


def _delays(results: Results, policy: str, how: str) -> Claim:
    found = several.delay(cells(results, policy), how)
    what = "a reward" if how == DISTILLED else "the ensemble's"
    text = f"{POLICIES[policy]}: {what} {HOW_NAMES[how]} delays the fall"
    bar = f"peak at no smaller n; gold at n = {FAR} above one member's, interval above 0"
    return Claim(text, bar, f"peak {found.peak} against {found.single_peak}; {found.gap}", found.met)


def _is_cheap(results: Results) -> Claim:
    shares = [sum(c.seconds[f] for f in FAMILIES) / c.calibration.sampling_seconds for c in results.values()]
    text = "tuning Best-of-n, soft Best-of-n and Best-of-Poisson takes less time than sampling what they are tuned on"
    return Claim(text, "every policy and seed", f"{min(shares):.2f} to {max(shares):.2f} of it", max(shares) < 1)


def _verdict(results: Results, hedges: Mapping[tuple[str, str], Sequence[Hedge]], told: Sequence[Claim]) -> str:
    base, iama = (
        np.mean([bon_means(cell, values.NS) for cell in cells(results, policy)], axis=0) for policy in POLICIES
    )
    met, number = sum(claim.met for claim in told), len(told)
    most = max(100 * h.lost for found in hedges.values() for h in found if not h.is_none)
    in_short = IN_SHORT.format(met=met, number=number, most=most)
    return VERDICT.format(met=met, number=number, base=base[0], iama=iama[0], best=iama.max(), in_short=in_short)


def _no_onset(results: Results) -> list[tuple[int, str]]:
    return [key for key, cell in results.items() if not values.onset_inside(cell)]


def _without_onset(results: Results) -> list[str]:
    missing = _no_onset(results)
    worlds = " and ".join(f"the {POLICIES[policy]} policy of world {seed}" for seed, policy in missing)
    return [NO_ONSET.format(max_budget=MAX_BUDGET, worlds=worlds)] if missing else []


def _told_without_onset(results: Results, hedges: Mapping[tuple[str, str], Sequence[Hedge]]) -> list[str]:
    """What tuning says where there was nothing to hedge."""
    parts = []
    for seed, policy in _no_onset(results):
        cell = results[seed, policy]
        tuned, place = cell.tuned["bon"], list(dict.fromkeys(s for s, _ in results)).index(seed)
        low, high = tuned.loss_at_max_ci95
        own = [hedges[policy, family][place] for family in FAMILIES]
        told = TOLD.format(
            policy={"base": "Base", "iama": "IAMA"}[policy],
            seed=seed,
            max_budget=MAX_BUDGET,
            num_prompts=len(cell.test.gold_PS),
            peak=values.hacked(cell.test.proxy_PS, cell.test.gold_PS).peak_samples,
            regime=tuned.regime,
            value=tuned.value,
            low=tuned.value_ci95[0],
            high=tuned.value_ci95[1],
            loss=f"{tuned.loss_at_max:.4f} ({low:+.4f} to {high:+.4f})",
            conclusion=AGREED if tuned.value >= MAX_BUDGET else BEYOND_NOISE if low > 0 else WITHIN_NOISE,
            lost=", ".join("none" if h.is_none else f"{100 * h.lost:.1f} %" for h in own),
        )
        parts.append(told)
    return parts


def _earlier_scale(results: Results) -> str:
    pairs = {
        (policy, how): [several.delay(cells(results, policy), how, by_prompt=now) for now in (False, True)]
        for policy in POLICIES
        for how in HOW_NAMES
        if how != DISTILLED
    }
    then, now = (sum(pair[k].met for pair in pairs.values()) for k in range(2))
    return EARLIER_SCALE.format(number=len(pairs), then=then, now=now) + "\n\n" + tables.scales(pairs)
