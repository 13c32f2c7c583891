"""The words of docs/results/reasoning.md."""

INTRO = """![gold against operations](reasoning.svg)

**What is compared.** GGRO (sampled) and SEA beside Best-of-n in worlds with sums (`scripts/sums_world.py`), seeds
{seeds}: the demo world's jobs, and prompts that need a small sum ("how many eggs are in three boxes of four?").
*Correct* is 1 where the stated result is right, exactly from the text; its proxy is a reward model fitted on noisy
preferences like the other two. Helpful and harmless count on jobs, correct on sums. The base is fitted on answers of
which about half are wrong; some sums it nearly always gets wrong, with a wrong result that it prefers.

**Policies.** The base; linear GRPO; IAMA (`bon(4)`); and two more twins, `tilt(T)` and capped `tilt(T, cap)`, T being
one standard deviation of the base's proxy and the cap one above its mean. 60 steps each on all three proxies, weights
0.5, 0.5 and 1; learning rate and beta are what [the search](search.md) chose for IAMA and linear GRPO in the demo
world; the tilts take IAMA's. Nothing was searched in the worlds with sums.

**Settings.** The first {num_prompts} test prompts of a kind; SEA and ARGS answer {num_few} of them and are compared
with Best-of-n on the same ones. Defaults throughout: GGRO ends a segment before an entropy of 1.5 nats (once, where it
says so, 0.5) and answers twice (16 times on the base where S = 4; figures are means); SEA has 4 chains, alpha = 20.
With alpha = 0 the reward moves no chain, but it still chooses the answer among the 4: Best-of-4's selection is in it.
Best-of-n is unbiased for every n up to {num_base_samples} on bases, {num_samples} on trained policies, from one pool a
prompt. *At equal operations* is Best-of-n at the (real) n that costs as many floating-point operations, forward and
backward, its value linear in log n; *beyond the pool* the difference is to the largest n, which had fewer operations.

**Bounds of what this shows.** Models of about a million parameters that speak a synthetic language; a "sum" is one of
87 facts, which every split asks about other things and in other combinations of words. {num_prompts} prompts a seed are
few. Intervals (95 %) resample seeds and, within a seed, prompts ({num_bootstrap} times); nothing corrects for their
number, and with so few seeds they hardly know how worlds differ.

**What was seen before.** Claims and bars were written before anything was measured. Everything was measured once on
seed 10 with a first proxy of correct (10,000 pairs of the base's own answers), which put the answers to a third of the
prompts in no better order than chance: gold of Best-of-n was 0.51, 0.57, 0.27 and 0.13 for n = 1, 4, 64 and 256. That
says little of any sampler, so the proxy was refitted on 24,000 pairs with worse answers among them, and the columns
*best with fewer* were added, later the table of weak bases; nothing else was changed. Gold was seen in that choice.
Seeds 11 and 12 were measured afterwards, once."""

WORLDS = """## The worlds

Share of sums that samples of the base get right, and of answers that the grammar holds, on validation prompts, of the
whole fit and its two checkpoints; pairs without noise that the proxies order right. KL to the base in nats per token,
mean of the last 20 steps."""

EQUAL = """## At equal operations

Each method minus Best-of-n with as many operations (*n*: of that Best-of-n). SEA's rows are means over its own prompts.
*Best with fewer*: the greatest gold of Best-of-n up to that n, since more samples are worse where they exploit the
proxy (its n is chosen by gold). *Fluency*: log-probability a token under the base, nats. *Ungrammatical*: share of
answers that the world's grammar does not hold; *strict* is gold that counts them as 0."""

TWINNING = """## Training twins

Every policy under each sampler: gold by criterion, its mean over the three, and what that is above the base's and above
the `bon(4)` twin's under the same sampler."""

NEEDED = """## What the base needs for a trained policy's gold

The least S (2, 4, 8, 16) or number of steps (10, 30) at which the untrained base has the gold of the trained policy in
the same sampler, and the n of its Best-of-n that has it. `>`: none of those measured has it."""

COVERAGE = """## Coverage

Share of prompts with at least one of m answers that has a gold value which the base's Best-of-{n} reaches with at most
{share:.0%} of its answers (where even its greatest gold is more frequent: that). GGRO samples with S = 4 from the base;
each of Best-of-n's m answers has as many operations as one of GGRO's, and is drawn afresh from the law of the pool."""

HARD = """### On hard prompts

Correct has two values, and most prompts are answered right now and then. *Hard* are those that the base's Best-of-{n}
answers with the gold value in at most {share:.0%} of cases; shares over the hard prompts of all seeds. Where plain
samples often have it, the proxy is what fails."""

DRIFTING = """## Outside the distribution

GGRO with S = 8. *Phrasing*: the same topics and sums asked in words that no split used in fitting has; *topic*: two
jobs that no model was fitted on, in the usual phrasings (their names are spelled letter by letter, and the proxies have
never seen which nouns and hazards fit). *Threshold fires*: share of tokens that could begin a
segment (the first is none, and a segment has 3 tokens or more) and did, being as uncertain as that, in the answers that
were kept. *Nudged segments*: share of segments whose kept candidate begins with a nudge.
*Gain*: gold over a single sample's on the same prompts."""

WEAK = """## SEA on weak bases

Checkpoints at 10 % and 30 % of the base's fit, and the whole fit, all on SEA's prompts. *Relative gain*: of gold over a
single sample's. The four last columns compare with Best-of-n at equal operations. Gold counts ungrammatical answers
too (a cut-off or garbled answer may still earn some); *ungrammatical* is their share, and *strict gold* counts them as
0, on both sides."""

WEAKNESS = """Does a weak base change how SEA (30 steps) compares with Best-of-n at equal operations? Where Best-of-n
exploits the proxy (correct, whole fit), the gap says little of SEA."""

PARITY = """A toy that was tried before the samplers were built found SEA at parity with Best-of-n at equal compute. Of
SEA (30 steps), in the table of bases above, gold over Best-of-n's is
{weak} of {weak_count} on weak bases and
{whole} of {whole_count} on the whole fit: **a weak base {changes} to a gain over Best-of-n**.
{few} prompts a seed would not
show small differences, and the whole fit's win on correct, where there is one, is one over an exploited proxy."""

MISSING = """## Not measured

- settings searched for these worlds: the samplers run with their defaults, and training with the demo world's choice;
- training on `correct` itself as a verifiable reward (`configs/experiments/sums.yaml` does it; a test runs its steps);
- sums that no data held: every sum is in training, only its words differ;
- SEA's decode `top_k` and its random start on sums; GGRO's greedy decoding, its scores and controls on sums;
- drift of SEA; coverage of trained policies."""
