"""The words of docs/results/gradient_samplers.md."""

INTRO = """![gold against operations, and gold against proxy](gradient_samplers.svg)

**What is compared.** GGRO with its three scores and two controls, SEA with its controls, and Best-of-n, on the base,
linear GRPO and IAMA (`bon(4)`; both at equal weights, settings of [the search](search.md)) of the demo world; seeds
{seeds}, the first {num_prompts} test prompts of each. Each criterion is served with its own proxy reward; gold only
judges. One answer a prompt (sampled GGRO with S = 4 answers {num_answers} times; its figures are means). SEA answers
only {num_sea} of the prompts, and is compared with Best-of-n on the same ones. Best-of-n is unbiased for every n up to
{size}, from one pool a prompt.

**Settings.** The defaults: GGRO ends a segment before an entropy of {threshold:g} nats and nudges among the {top_k}
likeliest tokens; *gradient* (as published), *taylor* and *exact* are its scores (the first two rank nudges alike, and
differ only in when they stop). It decodes greedily, except *sampled*: tokens other than nudges are drawn at
temperature 1, as Best-of-n draws them, and nudges are the gradient's unless more is said. *Random nudges*: tokens of
the {top_k} at random in place of the reward's. *Random cuts*: segments end at random places, as often where they may
end as those of the same method do; the first is nudged as always. SEA: {chains} chains, alpha = {alpha:g} and the best
text passed, unless its name says otherwise. With *alpha = 0* the reward moves no chain, but it still chooses the answer
among the {chains}: the control has Best-of-{chains}'s selection in it, and the claim about alpha asks what the reward's
gradient adds to that, not what the reward is worth.

**Cost.** Operations of policy and reward, forward and backward, from the ledger, means over prompts. *At equal
operations*: Best-of-n at the (real) n that costs as many, its value linear in log n; *beyond the pool* where that n
exceeds {size}: then the difference is to Best-of-{size}, which had fewer operations.

**Bounds of what this shows.** Answers are a few short sentences of a synthetic language, models have about a million
parameters; {num_prompts} prompts a seed are few, so only large differences show. Intervals (95 %) resample seeds and,
within a seed, prompts, jointly for both sides ({num_bootstrap} times), and nothing corrects for their number."""

EQUAL = """## At equal operations

Each method minus Best-of-n with as many operations (means over prompts and seeds; *n*: of that Best-of-n). *Fluency*:
log-probability a token under the base, nats. *Ungrammatical*: share of answers that the demo world's grammar does not
hold, the method's and Best-of-n's; *strict gold* counts them as 0, on both sides."""

GROWTH = """## Gold and proxy as S grows

Beside Best-of-n with as many operations. Where proxy rises and gold does not, the proxy is exploited. S = 1 of greedy
GGRO is greedy decoding, of sampled GGRO the single sample."""

COVERAGE = """## Coverage

Share of prompts with at least one of m answers that has a gold value which the base's Best-of-{n} reaches with at most
{share:.0%} of its answers (where even its greatest gold is more frequent: that). GGRO samples with S = 4; each of
Best-of-n's m answers has as many operations as one of GGRO's, and is drawn afresh from the law of the pool."""

CONTROL = """## Scores, boundaries, decoding: what each part adds

Gold and proxy of the first minus the second, with the same S or steps on the same prompts, and the ratio of
their operations: a control that spends more is not held to equal operations here."""

WORK = """## What is changed, and the time

Greedy decoding is the reference. *Nudged*: share of tokens that were overridden; *different*: share of an answer's
tokens that the greedy answer does not have in their places (all that follows a nudge may differ). *Seconds* a prompt
over greedy decoding's in the same run, median over seeds: on two processes at once, tiny models, so mostly overhead;
GGRO's prompts are answered together, sampled S = 4 has {num_answers} times as many of them."""

SETTINGS = """## Every setting

Means over prompts and seeds; operations in millions, length in tokens with the end token. Gold counts
ungrammatical answers too, *strict* counts them as 0; *ungrammatical* is their share."""

TIES = """## gradient or taylor, argmax or top_k

**gradient and taylor gave the same answers in {same} of {pairs} cases** (a policy, criterion, seed and S). The two
differ by the constant `g . E_current` for all options of a place, so they rank other tokens alike; only the test
whether the best one promises more than 0 can differ. Where the base nudged with these rewards ({prompts} prompts of
each seed and criterion, {number} gradients), the median of `|g . E_current|` was {own:.1g} and that of the best other
option's `g . E_v` {best:.1g}; the test came out differently in {flips} cases. That is what RMSNorm makes likely: a
reward that reads every embedding scaled to one length hardly changes where one grows longer, so g is nearly orthogonal
to it.
`gradient` stays the default on this tie: it is the published score, and taylor cost the same and gave nothing more. A
reward that does not norm its inputs may tell them apart.

**SEA decodes by argmax by default.** Of the policies and criteria, with equal alpha, its gold is above top_k's in
{gold}, its fluency above in {fluency}. The comparison is confounded: argmax returns
the text of the lowest energy that the chain passed (`keep`), top_k decodes the last state, which may be worse than an
earlier one; what is due to `keep` was not measured apart. On a toy that was tried before the
samplers were built, top_k with a large alpha restored fluency; here it came out less fluent, with
alpha = {alpha:g} as with 100."""

MISSING = """## Not measured

[Small sums](reasoning.md) has the criterion *correct*, training twins and the S or steps that the untrained base needs,
coverage up to m = 16, prompts out of the distribution, and SEA on weak bases beside ARGS and Best-of-256. Neither page
has:

- GGRO's `parallel` mode and SEA's random start;
- settings searched for these models: both methods run with their defaults."""
